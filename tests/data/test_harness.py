"""Documents of tasks: prompts and gold answers are the texts that lm-evaluation-harness itself would make of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_windows import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dem_opt.config import DataFile
from dem_opt.data.byte_counts import scored_bytes
from dem_opt.data.documents import Pair, read_documents
from dem_opt.data.packing import pack
from dem_opt.data.tokenize import encode_pairs
from dem_opt.errors import InputError
from dem_opt.evaluation.nll import prepare, score
from dem_opt.progress import NullProgress, reporting

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -c constraints.txt -e '.[downstream]'")

ROWS = [
    {"question": "How many?", "answer": "two", "also": ["two", "2"], "label": 1, "choices": ["one", "two", "three"]},
    {"question": "the rest ", "answer": " 17 ", "also": ["17"], "label": 0, "choices": ["the more", "others", "x"]},
    {"question": "Who is\nmerry", "answer": "the\nothers", "also": ["o"], "label": 2, "choices": ["a", "b", "c d"]},
]

METRIC = {"aggregation": "mean", "higher_is_better": True}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", **METRIC}],
}
CHOOSE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", **METRIC}],
}
FORMATS: dict[str, dict[str, Any]] = {
    "generated": GENERATE,
    "delimiter": GENERATE | {"target_delimiter": "\n"},
    "no delimiter": GENERATE | {"target_delimiter": ""},
    "description": GENERATE | {"description": "Answer {{question}}.\n\n"},
    "prefix": GENERATE | {"doc_to_text": "Q: {{question}}", "gen_prefix": "The answer is"},
    "several targets": GENERATE | {"doc_to_target": "also"},
    "choice to write": GENERATE | {"doc_to_choice": "choices", "doc_to_target": "label"},
    "shots of its own": GENERATE | {"num_fewshot": 2},
    "chosen": CHOOSE,
    "letters": CHOOSE | {"doc_to_choice": ["A", "B", "C"]},
    "chosen by text": CHOOSE | {"doc_to_target": "{{choices[label]}}"},
    "several inputs": CHOOSE
    | {"doc_to_text": "label", "doc_to_choice": "{{choices}}", "doc_to_target": "{{question}}", "target_delimiter": ""},
    "mutual information": CHOOSE | {"metric_list": [{"metric": "acc_mutual_info", **METRIC}]},
    "likely": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{answer}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    },
}


class Messages(NullProgress):
    """Keeps warnings and notes."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def warning(self, message: str) -> None:
        self.warnings.append(message)

    def note(self, message: str) -> None:
        self.notes.append(message)


def write_task(folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]] = ROWS, **splits: str) -> DataFile:
    """A task file with its documents, of which by default all are in the test split."""
    splits = splits or {"test_split": "test"}
    documents = folder / "documents.jsonl"
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "made_up",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(documents) for split in splits.values()}},
        "metadata": {"version": 1.0},
    }
    (folder / "made_up.yaml").write_text(yaml.safe_dump(task | splits | settings), encoding="utf-8")
    return DataFile.model_validate({"task": "made_up", "include": folder})


def loaded(folder: Path) -> Any:
    """The task as the harness loads it, without worked examples."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    task = manager.load(["made_up"])["tasks"]["made_up"]
    task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(0)
    return task


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", FORMATS.values(), ids=FORMATS)
def test_pairs_are_what_the_harness_asks_for(tmp_path, settings):
    """The gold request itself; where the harness generates, its prompt, and the worked example that it would write."""
    pairs = read_documents(write_task(tmp_path, settings))
    task = loaded(tmp_path)
    task.build_all_requests()
    assert len(pairs) == len(ROWS)
    for number, (pair, row) in enumerate(zip(pairs, ROWS, strict=True)):
        requests = [request for request in task.instances if request.doc_id == number]
        if settings["output_type"] == "generate_until":
            ((prompt, _),) = [request.args for request in requests]
            assert pair.prompt == prompt
            shown = task.sampler.sample
            task.sampler.sample = lambda n, eval_doc=None, row=row: [row]
            worked = task.fewshot_context({**row, "question": "next"}, 1, gen_prefix=task.doc_to_prefix(row))
            task.sampler.sample = shown
            description = task.resolve_field(row, task.config.description) or ""
            other = task.resolve_field({**row, "question": "next"}, task.config.description) or ""
            example = pair.prompt.removeprefix(description) + pair.completion
            assert worked.startswith(other + example + task.config.fewshot_delimiter)
        elif settings["output_type"] == "loglikelihood":
            assert [(pair.prompt, pair.completion)] == [request.args for request in requests]
        else:
            assert (pair.prompt, pair.completion) == requests[row["label"]].args


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece does it: a space before each text, so that a completion by itself has other tokens."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    alphabet = sorted({letter for row in ROWS for letter in json.dumps(row)} | {"\n", "Q", "A", ":", "."})
    trainer = trainers.BpeTrainer(
        vocab_size=140, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([row["question"] + " " + row["answer"] for row in ROWS] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {
    "eos": make_tokenizer(merges=20),
    "bos and eos": make_tokenizer(merges=20, bos=True),
    "space before": metaspace_tokenizer(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("name", ["generated", "description", "prefix", "chosen", "several inputs", "likely"])
def test_nats_are_the_harness_loglikelihoods(tmp_path, name, tokenizer):
    """Relative difference 1e-5: float32, in batches of other shapes."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)).eval()
    pairs = [*read_documents(write_task(tmp_path, FORMATS[name])), Pair("", " the rest", joined=True)]
    arguments = [(pair.prompt, pair.completion) for pair in pairs]
    requests = [Instance("loglikelihood", {}, argument, 0) for argument in arguments]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, max_length=128)
    theirs = [-nats for nats, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    ours = []
    for pair in pairs:
        measured, _ = score(
            model, prepare(pack([pair], tokenizer, 64).windows, torch.device("cpu")), 4096, layout="packed"
        )
        ours.append(sum(measured.nats_W))
    assert ours == pytest.approx(theirs, rel=1e-5)
    packed, _ = score(model, prepare(pack(pairs, tokenizer, 128).windows, torch.device("cpu")), 4096, layout="packed")
    assert sum(packed.nats_W) == pytest.approx(sum(theirs), rel=1e-5)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("paired", [False, True])
def test_scored_bytes_are_those_of_the_answer(tokenizer, paired):
    """White space at the end of the prompt belongs to the answer."""
    pairs = [Pair("the rest", " of others", joined=True), Pair("Who is ", "m\u00e9rry\n17", joined=True)]
    pairs += [] if paired else [Pair("", " the rest", joined=True)]
    for pair, tokens in zip(pairs, encode_pairs(pairs, tokenizer, paired), strict=True):
        answer = (pair.prompt + pair.completion)[len(pair.prompt.rstrip()) :]
        assert scored_bytes(tokens, tokenizer).sum() == len(answer.encode())


def test_an_encoder_decoder_scores_the_answer_alone():
    pair, tokenizer = Pair("the rest ", "of others", joined=True), TOKENIZERS["eos"]
    windows = pack([pair], tokenizer, 64, paired=True).windows
    source = tokenizer("the rest")["input_ids"]
    answer = tokenizer(" of others")["input_ids"]
    assert windows.ids_WT[0][: len(source) + len(answer)].tolist() == source + answer
    assert np.flatnonzero(windows.scored_WT[0]).tolist() == list(range(len(source), len(source) + len(answer)))


@pytest.mark.parametrize(
    ("splits", "written", "role", "split", "is_evaluated"),
    [
        (("training", "validation", "test"), None, "validation", "validation", False),
        (("training", "validation", "test"), None, "held_out", "test", True),
        (("training", "test"), None, "validation", "training", False),
        (("validation",), None, "validation", "validation", True),
        (("validation",), None, "held_out", "validation", True),
        (("test",), None, "validation", "test", True),
        (("training", "test"), "test", "validation", "test", True),
        (("training", "test"), "training", "held_out", "training", False),
    ],
)
def test_the_split_follows_from_the_role_and_is_told(tmp_path, splits, written, role, split, is_evaluated):
    """A search on documents that `evaluate` scores is a warning; held-out documents that it scores are a note."""
    data = write_task(tmp_path, GENERATE, **{f"{name}_split": name for name in splits})
    data = DataFile.model_validate(data.model_dump() | ({"split": written} if written else {}))
    messages = Messages()
    with reporting(messages):
        assert len(read_documents(data, "general.web.validation", role)) == len(ROWS)
    lines = messages.warnings if role == "validation" else messages.notes[1:]
    assert len(lines) == is_evaluated and len(messages.warnings) + len(messages.notes) == 1 + is_evaluated
    assert f"split {split}" in messages.notes[0] and f"{len(ROWS)} documents" in messages.notes[0]


def test_documents_without_a_gold_answer_are_passed_over(tmp_path):
    rows = [ROWS[0], ROWS[1] | {"label": -1}, ROWS[2] | {"label": 3}]
    messages = Messages()
    with reporting(messages):
        assert len(read_documents(write_task(tmp_path, CHOOSE, rows))) == 1
    assert "2 have no gold answer" in messages.notes[0]


ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
BYTES = [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]


@pytest.mark.parametrize(
    ("settings", "more", "field", "words"),
    [
        (ROLLING | {"metric_list": BYTES}, {}, "task", "no gold answers"),
        (CHOOSE | {"doc_to_target": "{{label - 9}}"}, {}, "task", "no document has a gold answer"),
        (GENERATE | {"doc_to_target": "{{nothing.at_all}}"}, {}, "task", "can't be read"),
        ({key: value for key, value in GENERATE.items() if key != "doc_to_target"}, {}, "task", "can't be read"),
        (GENERATE, {"task": "made_app"}, "task", "did you mean 'made_up'"),
        (GENERATE, {"split": "dev"}, "split", "it has test"),
        (GENERATE | {"dataset_path": "nobody/nothing", "dataset_kwargs": {}}, {}, "task", "must be on this machine"),
        (
            GENERATE | {"dataset_kwargs": {"data_files": {"test": "https://127.0.0.1:9/nothing.jsonl"}}},
            {},
            "task",
            "must be on this machine",
        ),
        (GENERATE | {"dataset_kwargs": {"data_files": {"test": "/nowhere/x.jsonl"}}}, {}, "task", "must be on this"),
    ],
)
def test_a_task_that_cannot_be_read_is_refused_in_one_line(tmp_path, settings, more, field, words):
    data = write_task(tmp_path, settings)
    data = DataFile.model_validate(data.model_dump() | more)
    with pytest.raises(InputError) as caught:
        read_documents(data, "general.web.validation")
    assert caught.value.field == f"general.web.validation.{field}"
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_folder_of_tasks_is_named(tmp_path):
    data = DataFile.model_validate({"task": "made_up", "include": tmp_path / "nowhere"})
    with pytest.raises(InputError) as caught:
        read_documents(data, "general.web.validation")
    assert (caught.value.where, caught.value.field) == (tmp_path / "nowhere", "general.web.validation.include")


def test_a_missing_harness_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'dem-opt\[downstream\]'") as caught:
        read_documents(write_task(tmp_path, GENERATE), "general.web.validation")
    assert caught.value.field == "general.web.validation"


def test_a_broken_data_file_of_a_task_is_told(tmp_path):
    data = write_task(tmp_path, GENERATE)
    (tmp_path / "documents.jsonl").write_text('{"question": "a"\n{{{', encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_documents(data, "general.web.validation")
    assert caught.value.field == "general.web.validation.task"


def test_reading_a_task_leaves_the_network_as_it_was(tmp_path):
    import datasets
    import huggingface_hub.constants

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    read_documents(write_task(tmp_path, GENERATE))
    assert before == (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)
