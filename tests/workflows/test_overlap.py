"""Overlap of a study's data: what stands in training data or in another split is counted, kept, warned of and shown."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import in_process
import pytest
import worlds
import yaml

from dem_opt.cli.main import main
from dem_opt.config import load
from dem_opt.dashboards.html_report import render
from dem_opt.data.overlap import Overlap, OverlapRow
from dem_opt.workflows import overlap as workflow
from dem_opt.workflows.overlap import measure_overlap, overlap_warnings


def unlike(seed: int, count: int) -> list[str]:
    """Documents of numbers, of which no two share 13 tokens."""
    return [" ".join(f"{seed}{number}{place}" for place in range(900, 925)) for number in range(100, 100 + count)]


def pairs(texts: list[str]) -> list[dict[str, object]]:
    return [{"prompt": text[:9], "completion": text[9:]} for text in texts]


def chats(texts: list[str]) -> list[dict[str, object]]:
    turns = [[{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:]}] for text in texts]
    return [{"messages": messages} for messages in turns]


def texts_of(texts: list[str]) -> list[dict[str, object]]:
    return [{"text": text} for text in texts]


FORMATS = {"text": texts_of, "prompt_completion": pairs, "messages": chats}
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + PROMPT


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def study_of(folder: Path, files: dict[str, list[str]], format: str = "text", **sections: object) -> Path:
    """A study of `code` and `math` with data files of these texts: NAME.train, NAME.validation, NAME.held_out."""
    path = worlds.study(folder, ("code", "math"), evaluation={"window": 64, "windows": 2, "held_out": 2}, **sections)
    (folder / "models/base/chat_template.jinja").write_text(TEMPLATE)
    content = yaml.safe_load(path.read_text())
    for name, texts in files.items():
        distribution, part = name.split(".")
        write(folder / f"data/{name}.jsonl", FORMATS[format](texts))
        data = {"path": f"data/{name}.jsonl", "format": format}
        content["distributions"][distribution][part] = data
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def measured(path: Path) -> Overlap:
    return measure_overlap(load(path), path)


def row_of(overlap: Overlap, source: str, part: str, corpus: str, split: str) -> OverlapRow:
    (row,) = [
        row for row in overlap.rows if (row.source, row.part, row.corpus, row.split) == (source, part, corpus, split)
    ]
    return row


CLEAN = {
    f"{name}.{part}": unlike(10 * number + place + 11, 20)
    for number, name in enumerate(("code", "math"))
    for place, part in enumerate(("train", "validation", "held_out"))
}


@pytest.mark.parametrize("format", FORMATS)
def test_copies_are_counted_where_they_are_in_every_format(tmp_path, format):
    """Five held-out documents in another distribution's training file, and one of these without its last word."""
    held_out = CLEAN["math.held_out"]
    copies = [*held_out[:4], held_out[4].rpartition(" ")[0]]
    files = CLEAN | {"code.train": [*CLEAN["code.train"], *copies]}
    overlap = measured(study_of(tmp_path, files, format))
    assert len(overlap.rows) == 2 * 4 + 3 + 2 + 1 and overlap.without_training == ()
    row = row_of(overlap, "code", "train", "math", "held_out")
    assert (row.documents, row.sharing, row.near_duplicates) == (20, 5, 5)
    assert 0.2 < row.share < 0.25 and row.is_large and row.example
    assert [other for other in overlap.rows if other.share or other.near_duplicates] == [row]


def test_training_texts_are_read_piece_by_piece(tmp_path, monkeypatch):
    """A text that is cut in pieces has the same n-grams, but for those at the cuts."""
    files = CLEAN | {"code.train": [" ".join([*CLEAN["code.train"], *CLEAN["math.held_out"]])]}
    path = study_of(tmp_path, files)
    whole = row_of(measured(path), "code", "train", "math", "held_out")
    monkeypatch.setattr(workflow, "_PIECE", 800)
    cut = row_of(measured(path), "code", "train", "math", "held_out")
    assert whole.sharing == cut.sharing == 20
    assert 0.6 < cut.share < whole.share


def test_splits_are_compared_with_each_other_too(tmp_path):
    """Held-out documents that differ from search documents in one word, and documents that two distributions share."""
    edited = [f"{text} 7" for text in CLEAN["code.validation"][:6]]
    files = CLEAN | {
        "code.held_out": [*CLEAN["code.held_out"], *edited],
        "math.validation": [*CLEAN["math.validation"], *CLEAN["code.validation"][:2]],
    }
    path = study_of(tmp_path, files)
    overlap = measured(path)
    own = row_of(overlap, "code", "search", "code", "held_out")
    assert (own.documents, own.near_duplicates) == (26, 6)
    assert row_of(overlap, "code", "search", "math", "search").near_duplicates == 2
    assert row_of(overlap, "math", "search", "code", "held_out").near_duplicates == 2
    lines = overlap_warnings(overlap, load(path))
    assert len(lines) == 3
    for field in ("code.held_out", "math.validation"):
        assert any(line.startswith(f"distributions.{field}: ") for line in lines)


def test_short_documents_are_compared_whole(tmp_path):
    short = [f"{number} of" for number in range(100, 260)]
    files = CLEAN | {"math.validation": short[:80], "math.held_out": short[80:], "code.train": [*short[40:120], "of"]}
    overlap = measured(study_of(tmp_path, files))
    assert row_of(overlap, "code", "train", "math", "search").sharing == 40
    assert row_of(overlap, "code", "train", "math", "held_out").near_duplicates == 40


def test_training_data_that_are_not_named_are_told(tmp_path):
    path = study_of(tmp_path, {name: texts for name, texts in CLEAN.items() if name != "math.train"})
    overlap = measured(path)
    assert overlap.without_training == ("math",) and set(overlap.training) == {"code"}
    assert [line.partition(":")[0] for line in overlap_warnings(overlap, load(path))] == ["distributions.math.train"]


@pytest.mark.parametrize(("copies", "is_large"), [(1, False), (2, True)])
def test_a_warning_begins_at_one_percent(tmp_path, copies, is_large):
    """Of 200 documents 1 is half a percent, 2 are one."""
    held_out = unlike(77, 200)
    files = CLEAN | {"math.held_out": held_out, "code.train": [*CLEAN["code.train"], *held_out[:copies]]}
    path = study_of(tmp_path, files)
    assert bool(overlap_warnings(measured(path), load(path))) == is_large


def test_the_command_prints_and_keeps_it(tmp_path, capsys):
    evil = "\x1b[2J<script>alert(1)</script>\u202e" + CLEAN["math.held_out"][0]
    files = CLEAN | {"math.held_out": [evil, *CLEAN["math.held_out"][1:]], "code.train": [*CLEAN["code.train"], evil]}
    path = study_of(tmp_path, files)
    assert main(["check", str(path), "--overlap"]) == 0
    shown = capsys.readouterr().out
    assert "near-" in shown and "distributions.math.held_out" in shown
    assert "\x1b[2J" not in shown and "\u202e" not in shown
    assert main(["check", str(path), "--overlap", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["overlap"]
    kept = json.loads((load(path).output / "overlap.json").read_text())
    assert answer == kept and len(kept["rows"]) == 14


def test_without_the_option_no_data_are_read(tmp_path, capsys):
    path = study_of(tmp_path, CLEAN)
    assert main(["check", str(path), "--json"]) == 0
    assert "overlap" not in json.loads(capsys.readouterr().out)
    assert not (load(path).output / "overlap.json").exists()


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_data_that_cannot_be_read_are_refused(tmp_path, capsys, part):
    path = study_of(tmp_path, CLEAN)
    (tmp_path / f"data/math.{part}.jsonl").write_text("{")
    assert main(["check", str(path), "--overlap"]) == 2
    refusal = capsys.readouterr().err
    assert f"distributions.math.{part}" in refusal and refusal.count("\n") == 1
    assert not (load(path).output / "overlap.json").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A study that was run, and whose overlap was measured."""
    folder = tmp_path_factory.mktemp("finished")
    evil = "<script>alert(1)</script> " + CLEAN["math.held_out"][0]
    files = CLEAN | {"math.held_out": [evil, *CLEAN["math.held_out"][1:]], "code.train": [*CLEAN["code.train"], evil]}
    path = study_of(folder, files, search={"algorithm": "random", "trials": 4})
    in_process.open_study(path).run()
    measured(path)
    return path


def test_the_report_has_it_escaped(finished):
    study = in_process.open_study(finished)
    page = render(study.summary(), study.overlap())
    assert "<h2>Overlap</h2>" in page and "&lt;script&gt;" in page and "<script>alert" not in page
    assert "<h2>Overlap</h2>" not in render(study.summary())


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"measured": 3}', "\x00\xff", None])
def test_a_damaged_file_is_no_overlap(finished, tmp_path, damage):
    file = load(finished).output / "overlap.json"
    kept = file.read_bytes()
    try:
        file.unlink()
        if damage is None:
            file.mkdir()
        else:
            file.write_text(damage, encoding="latin-1")
        assert in_process.open_study(finished).overlap() is None
        in_process.open_study(finished).report(tmp_path / "report.html")
    finally:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        file.write_bytes(kept)


def test_an_overlap_of_other_data_is_not_shown(finished, monkeypatch):
    study = in_process.open_study(finished)
    known = study.overlap()
    assert known is not None
    corpora = {split: dict.fromkeys(names, "another") for split, names in known.corpora.items()}
    monkeypatch.setattr(workflow, "find_json", lambda file, schema: replace(known, corpora=corpora))
    assert study.overlap() is None


def test_the_largest_overlaps_come_first(finished):
    page = render(in_process.open_study(finished).summary(), in_process.open_study(finished).overlap())
    section = page[page.index("<h2>Overlap</h2>") :].partition("</section>")[0]
    shares = [float(share) for share in re.findall(r"<td>([\d.]+)%</td>", section)]
    assert shares == sorted(shares, reverse=True) and shares
