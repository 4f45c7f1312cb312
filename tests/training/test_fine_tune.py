"""Laws of fine-tuning: what the loss is, same job same bits, whole or not at all, what finished means."""

import dataclasses
import fcntl
import functools
import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dem_opt.checkpoints.training_record import RECORD
from dem_opt.config import DataFile
from dem_opt.data.documents import read_documents
from dem_opt.data.packing import pack
from dem_opt.errors import InputError
from dem_opt.training.fine_tune import HOLDER, FineTuneJob, fine_tune, holder_of, is_finished, save_checkpoint
from dem_opt.training.recipe import Recipe
from dem_opt.training.trainer import train_model
from dem_opt.workflows.quickstart import Settings, generated_documents, make_tokenizer, untrained_base, write_corpora
from dem_opt.workflows.quickstart.generated import math_problem

TINY = Settings(
    characters=(16_000, 2_000, 2_000),
    base_characters=16_000,
    vocabulary=300,
    hidden=32,
    layers=1,
    heads=2,
    feed_forward=64,
    window=32,
    base_steps=5,
    batch_size=4,
)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained base, and math problems to train it on."""
    folder = tmp_path_factory.mktemp("assets")
    splits = generated_documents(math_problem, TINY.characters, random.Random(0))
    write_corpora(folder, {"math": splits})
    tokenizer = make_tokenizer({"math": splits}, TINY.vocabulary)
    model = untrained_base(TINY, len(tokenizer), tokenizer.eos_token_id, seed=0)
    save_checkpoint(folder / "base", model, tokenizer, {})
    return folder


@pytest.fixture
def job(assets: Path, tmp_path: Path) -> FineTuneJob:
    return FineTuneJob(
        name="math",
        base=assets / "base",
        train=DataFile(path=assets / "math.train.jsonl"),
        out=tmp_path / "math",
        window=TINY.window,
        steps=8,
        learning_rate=3e-3,
        batch_size=4,
        seed=0,
    )


def bits(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_job_travels_unchanged(job: FineTuneJob) -> None:
    assert pickle.loads(pickle.dumps(job)) == job


def test_same_job_same_bits(job: FineTuneJob, tmp_path: Path) -> None:
    again = dataclasses.replace(job, out=tmp_path / "again")
    other = dataclasses.replace(job, out=tmp_path / "other", seed=1)
    losses = [fine_tune(each).last_loss for each in (job, again, other)]
    assert bits(job.out) == bits(again.out) != bits(other.out)
    assert losses[0] == losses[1] != losses[2]


def test_mixed_precision_rounds_products_and_keeps_small_steps(job: FineTuneJob, tmp_path: Path) -> None:
    """Steps of 1e-5 are below half a unit in the last place of most bfloat16 weights, and above it in float32."""
    jobs = {
        dtype: dataclasses.replace(job, out=tmp_path / dtype, learning_rate=1e-5, dtype=dtype)
        for dtype in ("float32", "mixed", "bfloat16")
    }
    losses = {dtype: fine_tune(each).first_loss for dtype, each in jobs.items()}
    base_P = weights_of(job.base)
    starts = {"float32": base_P, "mixed": base_P, "bfloat16": base_P.bfloat16().float()}
    moved = {dtype: (weights_of(jobs[dtype].out) != starts[dtype]).float().mean().item() for dtype in jobs}
    assert losses["mixed"] != losses["float32"]
    assert losses["mixed"] == pytest.approx(losses["float32"], rel=1e-2)
    assert moved["bfloat16"] < 0.5 < 0.9 * moved["float32"] < moved["mixed"]


def weights_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_fine_tune_lowers_its_own_loss_and_loads(
    job: FineTuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made = fine_tune(dataclasses.replace(job, steps=30))
    assert list(Path().iterdir()) == [], "writes to its own folder alone"
    assert made.last_loss < made.first_loss - 0.2
    assert (made.path, made.steps, made.tokens) == (job.out, 30, 30 * 4 * TINY.window)
    base = AutoModelForCausalLM.from_pretrained(job.base)
    model = AutoModelForCausalLM.from_pretrained(job.out)
    assert model.config.use_cache == base.config.use_cache
    assert [(n, p.dtype) for n, p in model.named_parameters()] == [(n, p.dtype) for n, p in base.named_parameters()]
    base_tokenizer, tokenizer = (AutoTokenizer.from_pretrained(folder) for folder in (job.base, job.out))
    assert tokenizer.get_vocab() == base_tokenizer.get_vocab()


def test_the_loss_is_the_mean_nll_of_scored_tokens_of_separate_documents(job: FineTuneJob) -> None:
    """One batch of all windows: the loss is all nats / all tokens over the fragments, each fed by itself."""
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    windows = pack(read_documents(job.train)[:6], tokenizer, job.window).windows
    model = AutoModelForCausalLM.from_pretrained(job.base)
    nats, tokens = 0.0, 0
    for ids_T, positions_T in zip(windows.ids_WT, windows.positions_WT, strict=True):
        for fragment_T in np.split(ids_T, np.flatnonzero(positions_T == 0)[1:]):
            ids_BT = torch.from_numpy(fragment_T[None])
            with torch.no_grad():
                logprobs_TV = model(ids_BT, use_cache=False).logits[0].log_softmax(-1)
            nats -= logprobs_TV[:-1].gather(1, ids_BT[0, 1:, None]).sum().item()
            tokens += len(fragment_T) - 1
    (point,) = train_model(model, windows, Recipe(steps=1, learning_rate=1e-3, batch_size=len(windows), seed=0))
    assert tokens == sum(windows.tokens_W)
    assert point.loss == pytest.approx(nats / tokens, rel=1e-5)


TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>"
    "{% if turn.role == 'assistant' %}{% generation %}{{ turn.content }}.{% endgeneration %}"
    "{% else %}{{ turn.content }}{% endif %}{% endfor %}"
)

ASKED: dict[str, dict[str, object]] = {
    "prompt_completion": {"prompt": "what is it?", "completion": "an answer"},
    "messages": {
        "messages": [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "an answer"}]
    },
}
"""A line of each format; with EOS or the template's full stop, the answer alone is learnt."""


def formatted(job: FineTuneJob, tmp_path: Path, form: str) -> FineTuneJob:
    """A job on data of a format, and a base with a chat template."""
    data, base = tmp_path / f"{form}.jsonl", tmp_path / "talking"
    data.write_text((json.dumps(ASKED[form]) + "\n") * 12, encoding="utf-8")
    shutil.copytree(job.base, base, dirs_exist_ok=True)
    (base / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    file = DataFile.model_validate({"path": data, "format": form})
    return dataclasses.replace(job, train=file, base=base, batch_size=1, steps=2)


@pytest.mark.parametrize("form", ASKED)
def test_prompts_are_not_learnt(job: FineTuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Labels are the tokens of the answers, and -100 on all others."""
    job, seen = formatted(job, tmp_path, form), []
    original = LlamaForCausalLM.forward

    @functools.wraps(original)
    def watched(model: LlamaForCausalLM, *arguments: object, **inputs: object) -> object:
        seen.append({name: inputs[name].clone() for name in ("input_ids", "labels", "position_ids")})
        return original(model, *arguments, **inputs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    made = fine_tune(job)
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    end = tokenizer.eos_token if form == "prompt_completion" else "."
    for batch in seen:
        assert ((batch["labels"] == -100) | (batch["labels"] == batch["input_ids"])).all()
        learnt = [tokenizer.decode(labels[labels >= 0]) for labels in batch["labels"]]
        assert learnt and all(text == f"an answer{end}" * text.count("answer") and text for text in learnt)
    assert is_finished(job) and made.steps == 2


@pytest.mark.parametrize("form", ASKED)
def test_another_format_column_or_template_is_another_job(job: FineTuneJob, tmp_path: Path, form: str) -> None:
    job = formatted(job, tmp_path, form)
    fine_tune(job)
    columns = [{"path": job.train.path, "format": form, column: "other"} for column in job.train.columns]
    for data in [{"path": job.train.path}, {"path": job.train.path, "text": "other"}, *columns]:
        assert not is_finished(dataclasses.replace(job, train=DataFile.model_validate(data)))
    (job.base / "chat_template.jinja").write_text("{# the same #}" + TEMPLATE, encoding="utf-8")
    assert is_finished(job) is (form == "prompt_completion")


def test_the_record_of_plain_texts_has_no_format(job: FineTuneJob) -> None:
    """As in records from before there were formats, which stay valid."""
    fine_tune(dataclasses.replace(job, steps=1))
    record = json.loads((job.out / RECORD).read_text(encoding="utf-8"))
    assert set(record["made_from"]) == {"base", "train", "settings"}


def replaced_data(job: FineTuneJob, tmp_path: Path) -> FineTuneJob:
    data = tmp_path / "other.jsonl"
    data.write_text(job.train.path.read_text(encoding="utf-8") + '{"text": "more"}\n', encoding="utf-8")
    return dataclasses.replace(job, train=DataFile(path=data))


def replaced_base(job: FineTuneJob, tmp_path: Path) -> FineTuneJob:
    model = AutoModelForCausalLM.from_pretrained(job.base)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    save_checkpoint(tmp_path / "base", model, AutoTokenizer.from_pretrained(job.base), {})
    return dataclasses.replace(job, base=tmp_path / "base")


def replaced(**settings: float) -> Callable[[FineTuneJob, Path], FineTuneJob]:
    return lambda job, tmp_path: dataclasses.replace(job, **settings)  # type: ignore[arg-type]


CHANGES = {
    "data": replaced_data,
    "base": replaced_base,
    "window": replaced(window=16),
    "steps": replaced(steps=3),
    "learning_rate": replaced(learning_rate=1e-3),
    "batch_size": replaced(batch_size=2),
    "seed": replaced(seed=1),
}


def test_finished_means_made_from_the_same(job: FineTuneJob, tmp_path: Path) -> None:
    job = dataclasses.replace(job, steps=2)
    assert not is_finished(job)
    fine_tune(job)
    assert is_finished(job)
    assert {name for name, change in CHANGES.items() if is_finished(change(job, tmp_path))} == set()


def test_a_finished_job_is_replaced_by_one_of_other_settings(job: FineTuneJob) -> None:
    first, second = (dataclasses.replace(job, steps=steps) for steps in (2, 3))
    fine_tune(first)
    before = bits(job.out)
    fine_tune(second)
    assert is_finished(second) and not is_finished(first)
    assert bits(job.out) != before


def test_too_little_data_is_the_users_mistake(job: FineTuneJob, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a few words"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"short.jsonl: fine_tuning.batch_size = 4: makes 1 windows of 32 tokens"):
        fine_tune(dataclasses.replace(job, train=DataFile(path=short)))
    assert not job.out.exists()


@pytest.mark.parametrize("field", ["base", "train"])
def test_missing_files_are_the_users_mistake(job: FineTuneJob, tmp_path: Path, field: str) -> None:
    fine_tune(dataclasses.replace(job, steps=1))
    nowhere = tmp_path / "missing"
    missing = dataclasses.replace(job, **{field: nowhere if field == "base" else DataFile(path=nowhere)})
    for ask in (is_finished, fine_tune):
        with pytest.raises(InputError, match=rf"{field}: no such file"):
            ask(missing)
    assert is_finished(dataclasses.replace(job, steps=1))


def test_a_loss_that_is_not_finite_stops_and_leaves_nothing(job: FineTuneJob) -> None:
    with pytest.raises(RuntimeError, match=r"training loss is (nan|inf) at step \d: lower learning_rate"):
        fine_tune(dataclasses.replace(job, learning_rate=1e30))
    assert list(job.out.parent.iterdir()) == []


def test_a_place_that_cant_be_written_is_found_before_the_training(job: FineTuneJob) -> None:
    with pytest.raises(InputError, match="can't be made"):
        fine_tune(dataclasses.replace(job, out=job.train.path / "math", steps=10**9))


def test_a_foreign_checkpoint_is_not_overwritten(job: FineTuneJob) -> None:
    job.out.mkdir()
    (job.out / "model.safetensors").write_bytes(b"somebody's")
    with pytest.raises(InputError, match="move it away"):
        fine_tune(job)
    assert bits(job.out) == b"somebody's"


@pytest.mark.parametrize("change", ["a note", "other weights", "no list of files"])
def test_a_file_that_was_not_trained_here_is_not_removed(job: FineTuneJob, change: str) -> None:
    fine_tune(dataclasses.replace(job, steps=1))
    record = json.loads((job.out / RECORD).read_text(encoding="utf-8"))
    if change == "a note":
        (job.out / "note.txt").write_text("mine", encoding="utf-8")
    elif change == "other weights":
        (job.out / "model.safetensors").write_bytes(b"mine")
    else:
        (job.out / RECORD).write_text(json.dumps({"made_from": record["made_from"]}), encoding="utf-8")
    before = {path.name: path.read_bytes() for path in job.out.iterdir()}
    with pytest.raises(InputError, match="move it away") as refused:
        fine_tune(job)
    assert refused.value.where == job.out
    assert {path.name: path.read_bytes() for path in job.out.iterdir()} == before


def test_an_interrupted_save_leaves_the_earlier_checkpoint(job: FineTuneJob) -> None:
    fine_tune(dataclasses.replace(job, steps=1))
    before, record = bits(job.out), json.loads((job.out / RECORD).read_text(encoding="utf-8"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(job.base), AutoTokenizer.from_pretrained(job.base)
    with pytest.raises(TypeError):
        save_checkpoint(job.out, model, tokenizer, {RECORD: object()})
    assert bits(job.out) == before
    assert json.loads((job.out / RECORD).read_text(encoding="utf-8")) == record
    del record["files"]
    save_checkpoint(job.out, model, tokenizer, {RECORD: record})
    assert [path.name for path in job.out.parent.iterdir()] == [job.out.name]


@contextmanager
def locked_elsewhere(job: FineTuneJob) -> Iterator[None]:
    """The lock of another process that works on a job."""
    job.place.mkdir(parents=True)
    lock = os.open(job.place, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (job.place / HOLDER).write_text("process 4242 on node-7")
    try:
        yield
    finally:
        os.close(lock)


def test_a_process_that_writes_nothing_is_not_waited_for(job: FineTuneJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suspended one, say: the wait ends and names it; it keeps its place."""
    monkeypatch.setattr("dem_opt.training.fine_tune.PATIENCE", 0.3)
    monkeypatch.setattr("dem_opt.training.fine_tune.POLL", 0.05)
    assert holder_of(job) is None
    with locked_elsewhere(job):
        assert holder_of(job) == "process 4242 on node-7"
        with pytest.raises(TimeoutError, match="process 4242 on node-7"):
            fine_tune(job)
        assert (job.place / HOLDER).exists() and not job.out.exists()
    assert holder_of(job) is None
    assert fine_tune(job).steps == job.steps


def test_a_process_that_writes_is_waited_for(job: FineTuneJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the limit, which begins anew with everything that it writes."""
    monkeypatch.setattr("dem_opt.training.fine_tune.PATIENCE", 1.0)
    monkeypatch.setattr("dem_opt.training.fine_tune.POLL", 0.05)
    with ThreadPoolExecutor() as threads:
        with locked_elsewhere(job):
            waiting = threads.submit(fine_tune, job)
            for step in range(8):
                time.sleep(0.2)
                (job.place / f"file-{step}").touch()
            assert not waiting.done()
        assert waiting.result().steps == job.steps
    assert not job.place.exists()


def test_a_checkpoint_of_a_release_that_listed_no_files_is_left_alone(job: FineTuneJob) -> None:
    fine_tune(job)
    record = json.loads((job.out / RECORD).read_text())
    (job.out / RECORD).write_text(json.dumps({name: record[name] for name in record if name != "files"}))
    before = bits(job.out)
    assert fine_tune(job).path == job.out
    with pytest.raises(InputError, match="move it away") as refusal:
        fine_tune(dataclasses.replace(job, steps=9))
    assert refusal.value.where == job.out and bits(job.out) == before


@pytest.mark.parametrize("form", ASKED)
def test_padding_beyond_the_embedding_is_read_by_none(job: FineTuneJob, tmp_path: Path, form: str) -> None:
    """Many published bases have a padding token that was added behind their vocabulary: the same bits as without."""
    plain = formatted(job, tmp_path, form)
    padded = dataclasses.replace(plain, base=tmp_path / "padded", out=tmp_path / "out-padded")
    shutil.copytree(plain.base, padded.base)
    tokenizer = AutoTokenizer.from_pretrained(padded.base)
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    tokenizer.save_pretrained(padded.base)
    rows = len(AutoModelForCausalLM.from_pretrained(padded.base).get_input_embeddings().weight)
    assert tokenizer.pad_token_id >= rows
    assert fine_tune(padded).first_loss == fine_tune(plain).first_loss
    assert bits(padded.out) == bits(plain.out)
    assert AutoTokenizer.from_pretrained(padded.out).pad_token == "<|padding|>"
