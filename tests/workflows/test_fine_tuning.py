"""Laws of trainings: killed and resumed same bits, kept steps, adapters, what the Trainer is told, mistakes."""

import dataclasses
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import in_process
import pytest
import torch
import worlds
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dem_opt.atomic import write_text
from dem_opt.checkpoints.adapters import read_adapter
from dem_opt.checkpoints.training_record import JOURNAL, STEPS, read_journal
from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.config import DataFile, load
from dem_opt.data.mixtures import Mixture, Part
from dem_opt.data.windows import build_corpora
from dem_opt.errors import InputError
from dem_opt.evaluation.nll import document_layout, prepare, score
from dem_opt.planning.inputs import load_inputs
from dem_opt.training.fine_tune import FineTuneJob, fine_tune, is_finished, is_wanted, result_of
from dem_opt.training.recipe import DivergedError, check_trainer

STEPS_OF_A_JOB = 12


@pytest.fixture
def job(tmp_path: Path) -> FineTuneJob:
    worlds.save_model(tmp_path / "base", seed=0)
    data = worlds.write_documents(tmp_path / "math.jsonl", worlds.documents(1, 40))
    return FineTuneJob(
        name="math",
        base=tmp_path / "base",
        train=DataFile(path=data),
        out=tmp_path / "out" / "math",
        window=32,
        steps=STEPS_OF_A_JOB,
        learning_rate=3e-3,
        batch_size=4,
        seed=0,
        save_every=3,
    )


def bits(folder: Path) -> bytes:
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


def training_study(folder: Path, names: tuple[str, ...] = ("code", "math"), kind: str = "checkpoint", **more: object):
    """A study whose distributions are all to be trained."""
    path = worlds.study(folder, names)
    content = yaml.safe_load(path.read_text())
    content["distributions"] = {
        name: {
            kind: f"trained/{name}",
            "train": str(worlds.write_documents(folder / f"data/{name}.train.jsonl", worlds.documents(number, 40))),
            "validation": f"data/{name}.jsonl",
        }
        for number, name in enumerate(names)
    }
    content["fine_tuning"] = {"steps": STEPS_OF_A_JOB, "batch_size": 4, "save_every": 3}
    path.write_text(yaml.safe_dump(content | more, sort_keys=False))
    return path


def train(path: Path) -> dict[str, object]:
    return in_process.open_tracked(path).train()


KILLED = """
import os, sys, pickle
from pathlib import Path
import torch
torch.set_num_threads(1)
from dem_opt.training import trainer
from dem_opt.training.fine_tune import fine_tune
job = pickle.loads(Path(sys.argv[1]).read_bytes())
write = trainer._Journal._write

def life(moment):
    lines = 0
    def counted(journal, mode, *points):
        nonlocal lines
        write(journal, mode, *points)
        lines += 1
        if lines == moment:
            os._exit(9)
    trainer._Journal._write = counted
    fine_tune(job)
    os._exit(0)

for moment in map(int, sys.argv[2:]):
    pid = os.fork() or life(moment)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9, moment
    assert not job.out.exists()
"""
"""A fine-tuning in several lives, each of which dies when it has written its journal for the n-th time."""


def test_a_training_killed_again_and_again_ends_with_the_same_bits(job: FineTuneJob, tmp_path: Path) -> None:
    validation, _ = build_corpora(
        "math",
        load(training_study(tmp_path / "study")).distributions["math"],
        load(tmp_path / "study/study.yaml").evaluation,
        AutoTokenizer.from_pretrained(job.base),
    )
    job = dataclasses.replace(job, validation=validation, trainer={"weight_decay": 0.1})
    fine_tune(job)
    whole = {path.relative_to(job.out): path.read_bytes() for path in job.out.rglob("*.safetensors")}
    again = dataclasses.replace(job, out=tmp_path / "again" / "math")
    job_file = tmp_path / "job"
    job_file.write_bytes(pickle.dumps(again))
    moments = [str(moment) for moment in random.Random(0).sample(range(2, 7), 5)]
    subprocess.run([sys.executable, "-c", KILLED, job_file, *moments], env=os.environ, check=True)
    fine_tune(again)
    assert {path.relative_to(again.out): path.read_bytes() for path in again.out.rglob("*.safetensors")} == whole
    journal, untouched = read_journal(again.out / JOURNAL), read_journal(job.out / JOURNAL)
    assert [dataclasses.replace(entry, seconds=0) for entry in journal] == [
        dataclasses.replace(entry, seconds=0) for entry in untouched
    ]
    assert [path.name for path in again.out.parent.iterdir()] == ["math"]


def test_a_half_written_state_is_not_gone_on_from(job: FineTuneJob, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dataclasses.replace(job, out=job.out.with_name("whole"))
    fine_tune(whole)

    def die(path: Path, text: str) -> None:
        if path.parent.name == "checkpoint-9":
            raise KeyboardInterrupt
        write_text(path, text)

    monkeypatch.setattr("dem_opt.training.trainer.write_text", die)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(job)
    monkeypatch.undo()
    (job.place / "checkpoint-9/model.safetensors").write_bytes(b"half of it")
    fine_tune(job)
    assert bits(job.out) == bits(whole.out)


def test_what_another_job_left_in_the_middle_is_not_gone_on_from(job: FineTuneJob, tmp_path: Path) -> None:
    job.place.mkdir(parents=True)
    (job.place / "fine_tuning.json").write_text("{}")
    (job.place / "checkpoint-6").mkdir()
    (job.place / "checkpoint-6/whole").touch()
    fine_tune(job)
    assert [path.name for path in job.out.parent.iterdir()] == ["math"]


def test_a_finished_one_is_not_trained_again(job: FineTuneJob) -> None:
    made = fine_tune(job)
    before = (job.out / "model.safetensors").stat().st_mtime_ns
    assert fine_tune(job) == made == result_of(job.out)
    assert (job.out / "model.safetensors").stat().st_mtime_ns == before


def test_kept_steps_are_candidates_and_the_best_has_the_lowest_validation_nll(tmp_path: Path) -> None:
    path = training_study(tmp_path, fine_tuning={"steps": 6, "batch_size": 4, "save_every": 2, "keep": True})
    content = yaml.safe_load(path.read_text())
    source = content["distributions"]["code"]
    content["distributions"] = {
        name: source | {"checkpoint": {"run": "trained/code", "step": step}} for name, step in (("a", 2), ("b", "best"))
    }
    path.write_text(yaml.safe_dump(content))
    assert list(train(path)) == ["a"], "one run for both"
    assert train(path) == {}
    run = tmp_path / "trained/code"
    validated = {entry.step: entry.validation for entry in read_journal(run / JOURNAL) if entry.validation is not None}
    assert sorted(validated) == [2, 4, 6]
    config = load(path)
    sources = load_inputs(config, path)
    best = min(validated, key=lambda step: validated[step])
    assert sources.fine_tunes["a"].path == run / STEPS / "2"
    assert sources.fine_tunes["b"].path == run / STEPS / str(best)
    assert bits(run / STEPS / "6") == bits(run)
    windows = next(
        corpus.windows for corpus in sources.corpora if corpus.distribution == "a" and corpus.split == "search"
    )
    for step, nll in validated.items():
        model = AutoModelForCausalLM.from_pretrained(run / STEPS / str(step))
        measured, _ = score(model, prepare(windows, model.device), 4096, document_layout(model))
        assert measured.nll == pytest.approx(nll, abs=1e-6)
    content["distributions"]["a"]["checkpoint"]["step"] = 3
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=r"distributions.a.checkpoint.step = 3: was not kept; there are best, 2, 4, 6"):
        load_inputs(load(path), path)


def test_measuring_steps_changes_no_bit(job: FineTuneJob, tmp_path: Path) -> None:
    """A model with dropout, whose random numbers a validation must not use up."""
    config = json.loads((job.base / "config.json").read_text()) | {"attention_dropout": 0.3}
    (job.base / "config.json").write_text(json.dumps(config))
    study = load(training_study(tmp_path / "study"))
    corpus, _ = build_corpora(
        "math", study.distributions["math"], study.evaluation, AutoTokenizer.from_pretrained(job.base)
    )
    kept = dataclasses.replace(job, out=tmp_path / "kept", validation=corpus)
    fine_tune(job), fine_tune(kept)
    assert bits(job.out) == bits(kept.out)
    assert AutoModelForCausalLM.from_pretrained(kept.out / STEPS / "3").config.use_cache


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, when it loads
def test_an_adapter_is_trained_read_and_merged(job: FineTuneJob, tmp_path: Path) -> None:
    lora = {"r": 2, "lora_alpha": 4}
    apart = dataclasses.replace(job, lora=lora)
    whole = dataclasses.replace(job, lora=lora, merged=True, out=tmp_path / "out" / "whole")
    made, _ = fine_tune(apart), fine_tune(whole)
    assert 0 < made.trained < made.parameters == sum(parameter.numel() for parameter in model_of(job.base).parameters())
    assert made.last_loss < made.first_loss
    assert read_adapter(apart.out, "adapter").factors
    tuned = PeftModel.from_pretrained(model_of(job.base), apart.out).merge_and_unload()
    for mine, theirs in zip(model_of(whole.out).parameters(), tuned.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert is_finished(apart) and not is_finished(dataclasses.replace(apart, lora={"r": 4}))
    assert not is_finished(dataclasses.replace(apart, lora=None))


UNMERGEABLE = {
    "head of a tied base": ({"target_modules": ["lm_head", "q_proj"]}, "lora"),
    "embedding of a tied base": ({"target_modules": ["embed_tokens", "q_proj"]}, "lora"),
    "factors of tied weights": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "lora"),
    "saved embedding of a tied base": ({"modules_to_save": ["embed_tokens"]}, "lora"),
    "activated": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights"),
    "bias of B without a bias": ({"lora_bias": True}, "lora"),
    "repeated layers": ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
    "block-diagonal": ({"use_bdlora": {"nblocks": 1, "match_strict": False}}, "use_bdlora"),
    "no such module": ({"target_modules": ["strange"]}, "lora"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:Target modules:UserWarning")
@pytest.mark.parametrize("case", UNMERGEABLE)
def test_an_adapter_that_no_run_could_merge_is_not_trained(tmp_path: Path, case: str) -> None:
    lora, field = UNMERGEABLE[case]
    path = training_study(tmp_path, kind="adapter", fine_tuning={"lora": lora})
    with pytest.raises(InputError) as refused:
        train(path)
    assert refused.value.field == "fine_tuning.lora" + ("" if field == "lora" else f".{field}")
    assert not (tmp_path / "trained").exists()


def model_of(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_study_of_adapters_trains_them(tmp_path: Path) -> None:
    path = training_study(tmp_path, kind="adapter")
    assert sorted(train(path)) == ["code", "math"]
    assert load_inputs(load(path), path).fine_tunes["code"].base is not None


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_weights_trained_in_float32_are_saved_in_the_bases_dtype(job: FineTuneJob, dtype: str) -> None:
    base = model_of(job.base).to(torch.bfloat16)
    base.save_pretrained(job.base)
    job = dataclasses.replace(job, dtype=dtype)
    fine_tune(job)
    made = AutoModelForCausalLM.from_pretrained(job.out, dtype="auto")
    assert made.dtype == torch.bfloat16
    assert any(not torch.equal(*pair) for pair in zip(made.parameters(), base.parameters(), strict=True))


def test_a_batch_in_several_passes_is_the_same_batch(job: FineTuneJob, tmp_path: Path) -> None:
    """Sums of other orders: the same loss up to rounding, and as many tokens."""
    parts = dataclasses.replace(job, out=tmp_path / "parts", trainer={"gradient_accumulation_steps": 2})
    whole, split = fine_tune(job), fine_tune(parts)
    assert split.tokens == whole.tokens == STEPS_OF_A_JOB * 4 * 32
    assert split.first_loss == pytest.approx(whole.first_loss, rel=1e-5)
    with pytest.raises(InputError, match=r"gradient_accumulation_steps = 3: must divide fine_tuning.batch_size, the 4"):
        fine_tune(dataclasses.replace(job, out=tmp_path / "odd", trainer={"gradient_accumulation_steps": 3}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_decai": 0.1}, r"study.yaml: fine_tuning.trainer.weight_decai = 0.1: .*did you mean 'weight_decay'"),
        ({"max_steps": 5}, r"fine_tuning.trainer.max_steps = 5: is set by fine_tuning.steps"),
        ({"lr_scheduler_type": "sideways"}, r"fine_tuning.trainer = .*the Trainer refuses it"),
    ],
)
def test_the_trainer_is_told_only_what_it_knows(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    path = training_study(tmp_path, fine_tuning={"steps": 2, "batch_size": 2, "trainer": arguments})
    with pytest.raises(InputError, match=message):
        train(path)


def test_every_owned_argument_is_one_of_the_trainer() -> None:
    from transformers import TrainingArguments

    from dem_opt.training.recipe import OWNED

    assert OWNED.keys() <= {field.name for field in dataclasses.fields(TrainingArguments)}
    check_trainer({"weight_decay": 0.1, "max_grad_norm": 0.5, "bf16": False}, None)


def test_a_lora_argument_that_peft_does_not_know(tmp_path: Path) -> None:
    path = training_study(tmp_path, kind="adapter", fine_tuning={"lora": {"lora_alfa": 3}})
    with pytest.raises(InputError, match=r"fine_tuning.lora.lora_alfa = 3: .*did you mean 'lora_alpha'"):
        train(path)


def test_one_with_too_little_data_fails_alone(tmp_path: Path) -> None:
    """The other is trained; run again, only the one that failed is tried."""
    path = training_study(tmp_path)
    content = yaml.safe_load(path.read_text())
    worlds.save_model(tmp_path / "huge", 0)
    lines = worlds.write_documents(tmp_path / "short.jsonl", ["alpha"])
    content["distributions"]["math"]["train"] = str(lines)
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=r"short.jsonl: fine_tuning.batch_size = 4: makes 1 windows of 32 tokens"):
        train(path)
    assert (tmp_path / "trained/code").exists() and not (tmp_path / "trained/math").exists()


def test_a_learning_rate_that_diverges_is_named(job: FineTuneJob) -> None:
    with pytest.raises(DivergedError, match=r"loss is (nan|inf) at step \d+: lower learning_rate \(now 1e\+30"):
        fine_tune(dataclasses.replace(job, learning_rate=1e30))
    assert list(job.out.parent.iterdir()) == []


def test_trainings_that_diverge_are_told_in_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their names; the status is that of work which could not be done."""
    in_process.replace_dependencies(monkeypatch, compute=InProcessCompute())
    diverging = {"steps": STEPS_OF_A_JOB, "batch_size": 4, "learning_rate": 1e30}
    path = training_study(tmp_path, fine_tuning=diverging)
    assert main(["train", str(path)]) == 1
    assert re.fullmatch(
        r"dem-opt: code: not trained: training loss is (nan|inf) at step \d+: lower learning_rate \(now 1e\+30\)",
        capsys.readouterr().err.splitlines()[-1],
    )
    assert not (tmp_path / "trained/code").exists() and not (tmp_path / "trained/math").exists()


@pytest.mark.parametrize("begin", [train, lambda path: load_inputs(load(path), path)], ids=["train", "run"])
def test_a_distribution_with_neither_checkpoint_nor_data_is_named(
    tmp_path: Path, begin: Callable[[Path], object]
) -> None:
    path = worlds.study(tmp_path)
    shutil.rmtree(tmp_path / "models/code")
    with pytest.raises(InputError, match=r"distributions.code.checkpoint = .*give distributions.code.train"):
        begin(path)


def test_conversations_need_a_chat_template(job: FineTuneJob, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    data = DataFile.model_validate({"path": tmp_path / "chats.jsonl", "format": "messages"})
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        fine_tune(dataclasses.replace(job, train=data))


def test_two_trainings_of_one_folder_are_refused(tmp_path: Path) -> None:
    path = training_study(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["distributions"]["math"]["checkpoint"] = content["distributions"]["code"]["checkpoint"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=r"distributions.math.checkpoint = .*code is trained into this folder too"):
        train(path)


def test_a_mixture_takes_its_shares_of_the_tokens(job: FineTuneJob, tmp_path: Path) -> None:
    other = DataFile(path=worlds.write_documents(tmp_path / "code.jsonl", worlds.documents(2, 40)))
    parts = (Part("math", job.train, 0.25), Part("code", other, 0.75))
    mixed = dataclasses.replace(job, train=Mixture(parts), out=tmp_path / "out" / "mixed")
    made = fine_tune(mixed)
    assert made.tokens == mixed.tokens and is_finished(mixed)
    for changed in ((parts[1], parts[0]), (dataclasses.replace(parts[0], share=0.5), parts[1])):
        assert is_wanted(dataclasses.replace(mixed, train=Mixture(changed)))


def test_a_command_that_is_killed_leaves_what_the_next_one_goes_on_from(tmp_path: Path) -> None:
    """`dem-opt train` itself, on Ray, where each of two jobs has one thread of two."""
    names, steps = ("code", "math"), {"steps": 60, "batch_size": 4, "save_every": 5}
    whole = training_study(tmp_path / "whole", names, fine_tuning=steps)
    killed = training_study(tmp_path / "killed", names, fine_tuning=steps)
    train(whole)
    command = [sys.executable, "-c", "import sys; from dem_opt.cli.main import main; sys.exit(main())", "train", killed]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_steps(tmp_path / "killed", running, 30)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert bits(tmp_path / "killed/trained" / name) == bits(tmp_path / "whole/trained" / name)


def wait_for_steps(folder: Path, running: subprocess.Popen[bytes], steps: int) -> None:
    """Until the command's trainings have gone so many steps on, or it has ended."""

    def gone() -> int:
        return sum(len(read_journal(path)) for path in (folder / "trained").glob("*/steps.jsonl"))

    before = gone()
    while running.poll() is None and gone() < before + steps:
        time.sleep(0.02)
