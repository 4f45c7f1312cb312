"""Laws of the assets: splits share nothing, sums are right, same seed same bytes, an ordinary study file."""

import ast
import dataclasses
import io
import json
import random
import re
import shutil
import tokenize
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from recorded import RecordedProgress
from test_fine_tune import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from dem_opt import config
from dem_opt.data.windows import build_corpora
from dem_opt.errors import InputError
from dem_opt.workflows.quickstart import (
    DISTRIBUTIONS,
    END,
    RECORD,
    SPLITS,
    Corpora,
    Settings,
    make_assets,
    make_corpora,
    make_tokenizer,
    mixture_documents,
    untrained_base,
)
from dem_opt.workflows.quickstart.generated import json_record, math_problem
from dem_opt.workflows.quickstart.library import split_modules, take_docstrings

SMALL = dataclasses.replace(TINY, characters=(20_000, 8_000, 8_000), windows=4, held_out_windows=6)


@pytest.fixture(scope="module", params=[0, 1])
def corpora(request: pytest.FixtureRequest) -> Corpora:
    return make_corpora(SMALL, request.param)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_assets(tmp_path_factory.mktemp("quickstart"), 0, settings=SMALL)


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def test_no_document_stands_in_two_splits_or_twice(corpora: Corpora) -> None:
    assert sorted(corpora) == sorted(DISTRIBUTIONS)
    for splits in corpora.values():
        assert tuple(splits) == SPLITS
        documents = [document for split in SPLITS for document in splits[split]]
        assert len(documents) == len(set(documents))


def test_splits_are_about_as_long_as_asked_for(corpora: Corpora) -> None:
    """Generators write on until there is enough; the library stops before there is too much."""
    for name, splits in corpora.items():
        least, most = (1, 1.1) if name in ("math", "records") else (0.3, 1)
        for split, characters in zip(SPLITS, SMALL.characters, strict=True):
            assert least * characters <= sum(map(len, splits[split])) <= most * characters


@pytest.mark.parametrize("seed", range(5))
def test_a_module_stands_in_one_split(seed: int) -> None:
    splits = split_modules(Settings().module_shares, random.Random(seed))
    modules = [module for split in splits for module in split]
    assert len(modules) == len(set(modules)) > 100
    assert all(len(split) > 20 for split in splits)


def test_code_has_neither_docstrings_nor_comments(corpora: Corpora) -> None:
    for documents in corpora["code"].values():
        for document in documents:
            assert take_docstrings(ast.parse(document)) == []
            tokens = tokenize.generate_tokens(io.StringIO(document).readline)
            assert tokenize.COMMENT not in {token.type for token in tokens}


def test_docstrings_are_taken_out_of_every_place() -> None:
    source = '"m"\nclass A:\n    "a"\n    def f(self):\n        "f"\n        async def g():\n            "g"'
    tree = ast.parse(source)
    assert sorted(take_docstrings(tree)) == ["a", "f", "g", "m"]
    assert ast.unparse(tree) == "class A:\n\n    def f(self):\n\n        async def g():\n            pass"


@pytest.mark.parametrize("seed", range(300))
def test_the_sums_of_a_problem_are_right(seed: int) -> None:
    problem = math_problem(random.Random(seed))
    sums = re.findall(r"(\d+) ([*+-]) (\d+) = (\d+)", problem)
    assert 2 <= len(sums) <= 3
    for left, sign, right, result in sums:
        value = {"*": int(left) * int(right), "+": int(left) + int(right), "-": int(left) - int(right)}[sign]
        assert value == int(result) >= 0, problem
    answer = problem.rpartition("Answer: ")[2]
    number = re.findall(r"\d+", answer)[-1]
    assert number == sums[-1][3], problem


def test_records_are_nested_json() -> None:
    for seed in range(100):
        record = json.loads(json_record(random.Random(seed)))
        assert any(isinstance(value, dict) for value in record.values())


def test_the_mixture_is_training_text_in_its_shares(corpora: Corpora) -> None:
    mixture = mixture_documents(corpora, SMALL, 0)
    assert len(mixture) == len(set(mixture))
    for name, share in zip(DISTRIBUTIONS, SMALL.mixture, strict=True):
        train, wanted = set(corpora[name]["train"]), share * SMALL.base_characters
        longest = max(map(len, train))
        assert wanted - longest <= sum(len(document) for document in mixture if document in train) <= wanted


def test_the_tokenizer_writes_any_text(corpora: Corpora) -> None:
    tokenizer = make_tokenizer(corpora, 400)
    assert len(tokenizer) == 400 and tokenizer.eos_token == END
    for text in ("naïve 東京 🙂\t\n  x", corpora["code"]["val"][0], corpora["records"]["val"][0]):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_base_is_about_a_million_float32_parameters() -> None:
    settings = Settings()
    model = untrained_base(settings, settings.vocabulary, 0, seed=0)
    assert 0.8e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.3e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_another_seed_gives_other_data_and_another_base() -> None:
    modules = [split_modules(SMALL.module_shares, random.Random(seed)) for seed in (0, 1)]
    assert all(set(first) != set(second) for first, second in zip(*modules, strict=True))
    for make in (math_problem, json_record):
        assert make(random.Random(0)) != make(random.Random(1))
    first, second = (untrained_base(SMALL, 300, 0, seed).state_dict() for seed in (0, 1))
    assert not any(torch.equal(first[name], second[name]) for name in first if "norm" not in name)


def test_finished_assets_are_reused_and_half_finished_ones_made_again_to_the_same_bits(
    study: Path, tmp_path: Path
) -> None:
    before = contents(study.parent)
    times = {path: path.stat().st_mtime_ns for path in study.parent.rglob("*")}
    progress = RecordedProgress()
    assert make_assets(study.parent, 0, progress, SMALL) == study
    assert {path: path.stat().st_mtime_ns for path in study.parent.rglob("*")} == times
    assert len(progress.notes) == 1 and not progress.phases
    (study.parent / RECORD).write_text("{}", encoding="utf-8")
    (study.parent / "models" / "base" / "model.safetensors").write_bytes(b"half")
    make_assets(study.parent, 0, progress, SMALL)
    assert contents(study.parent) == before


@pytest.mark.parametrize("file", ["study.yaml", "data/math.val.jsonl", "models/base/config.json"])
def test_an_edited_file_is_not_made_again_by_another_seed(study: Path, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "quickstart"
    shutil.copytree(study.parent, folder)
    (folder / file).write_text("mine", encoding="utf-8")
    assert make_assets(folder, 0, settings=SMALL) == folder / "study.yaml", "the same seed makes nothing"
    before = contents(folder)
    with pytest.raises(InputError, match=file) as refused:
        make_assets(folder, 1, settings=SMALL)
    assert refused.value.where == folder and contents(folder) == before


def test_assets_without_a_list_of_files_are_not_made_again(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    shutil.copytree(study.parent, folder)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    del record["files"]
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")
    before = contents(folder)
    assert make_assets(folder, 0, settings=SMALL) == folder / "study.yaml"
    with pytest.raises(InputError, match="another release"):
        make_assets(folder, 1, settings=SMALL)
    assert contents(folder) == before


@pytest.mark.parametrize("kind", ["other things", "a file"])
def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "mine"
    mine = folder / "study.yaml" if kind == "other things" else folder
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"holds other things|can't be written"):
        make_assets(folder, 0, settings=SMALL)
    assert mine.read_text(encoding="utf-8") == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


def test_the_study_file_is_an_ordinary_one(study: Path) -> None:
    loaded = config.load(study)
    assert sorted(loaded.distributions) == sorted(DISTRIBUTIONS)
    assert (loaded.search.algorithm, loaded.search.trials) == ("simplex-gp", SMALL.trials)
    assert loaded.fine_tuning.learning_rate == SMALL.fine_tuning_learning_rate
    tokenizer = AutoTokenizer.from_pretrained(loaded.base.path)
    assert AutoModelForCausalLM.from_pretrained(loaded.base.path).config.vocab_size == len(tokenizer)
    for name, distribution in loaded.distributions.items():
        assert distribution.train is not None and distribution.train.path.is_file()
        assert distribution.checkpoint.path == study.parent / "models" / name
        search, held_out = build_corpora(name, distribution, loaded.evaluation, tokenizer)
        assert (len(search.windows), len(held_out.windows)) == (SMALL.windows, SMALL.held_out_windows)
