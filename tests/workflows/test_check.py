"""Laws of a check: it tells what a study will meet, refuses what can't be, and changes nothing."""

import json
import shutil
from math import ceil
from pathlib import Path

import pytest
import worlds
import yaml
from in_process import open_study

from dem_opt.checkpoints.files import content_hash, known_content, read_header
from dem_opt.cli.main import main
from dem_opt.config import load
from dem_opt.errors import InputError
from dem_opt.planning.hardware import Machine
from dem_opt.planning.inputs import identical_checkpoints, load_inputs
from dem_opt.progress import NullProgress, reporting
from dem_opt.storage.engine import connect
from dem_opt.storage.ledger import Ledger, StudyRow
from dem_opt.types import HELD_OUT, SEARCH, Composite, Precision, Score
from dem_opt.workflows.check import PROPOSED_REGRET, check, comparison_plan, proposed_windows


@pytest.fixture
def world(tmp_path):
    """A tiny study to spoil."""
    return worlds.study(tmp_path / "world").parent


class Notes(NullProgress):
    """Keeps notes."""

    def __init__(self):
        self.notes = []

    def note(self, message):
        """Keep a note."""
        self.notes.append(message)


def listing(folder: Path) -> dict[Path, bytes]:
    """Everything below a folder, files with what is in them."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def test_a_check_uses_what_the_ledger_has_measured(world):
    config = load(world / "study.yaml")
    identity = load_inputs(config, "study.yaml").identity()
    engine = connect(config.storage)
    ledger = Ledger(engine)
    ledger.enter_study(StudyRow(config.name, 1, identity.scoring_fields(), identity.identity_fields()))
    scores = {key: Score((1.0,), (1,)) for key in identity.keys(SEARCH)}
    for content, seconds in zip((identity.base, *identity.fine_tunes.values()), (30.0, 50.0, 70.0), strict=False):
        ledger.record(Composite.single(content), scores, identity.scoring, 100, seconds)
    engine.dispose()
    report = check(config, "study.yaml")
    assert report.speed.token_seconds == 0.5 and report.seconds == 0.5 * report.plan.work.tokens
    low, high = report.seconds_range
    assert 0.3 * report.plan.work.tokens < low < report.seconds < high < 0.7 * report.plan.work.tokens


@pytest.mark.parametrize(
    ("weights", "left_out"),
    [
        (None, ()),
        ({"code": 4, "math": 2}, ("prose",)),
        ({"math": 1}, ("code", "prose")),
        ({"code": 4, "math": 2, "prose": 0}, ()),
        ({"code": 4, "math": 2, "prose": 1}, ()),
    ],
)
def test_a_distribution_that_the_weights_leave_out_is_told_by_check_and_run(tmp_path, weights, left_out):
    path = worlds.study(tmp_path, **({"objective": {"weights": weights}} if weights else {}))
    config = load(path)
    warnings = [warning for warning in check(config, path).warnings if "objective.weights" in warning]
    assert warnings == [warning for warning in load_inputs(config, path).warnings() if "objective.weights" in warning]
    assert len(warnings) == bool(left_out) and all(name in warnings[0] for name in left_out)
    assert not warnings or not any(name in warnings[0].partition(":")[0] for name in weights)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A study of three trials that was run to its end."""
    path = worlds.study(tmp_path_factory.mktemp("finished"), search={"algorithm": "random", "trials": 3})
    open_study(path).run()
    return path


def with_sections(finished: Path, **sections) -> Path:
    """The same study with other sections in its study file."""
    content = yaml.safe_load(finished.read_text())
    path = finished.with_name("other.yaml")
    path.write_text(yaml.safe_dump(content | sections, sort_keys=False))
    return path


def test_nothing_is_left_of_a_finished_study(finished, capsys):
    report = check(load(finished), finished)
    assert report.left is not None and report.left.trials == 0 and report.left.work.tokens == 0 == report.left_seconds
    assert main(["check", str(finished)]) == 0
    assert "3 of 3 trials are done. Nothing is left to score" in capsys.readouterr().out
    assert main(["check", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left"]["trials"] == 0


def test_a_search_that_ended_before_its_budget_has_its_own_number_of_trials(tmp_path, capsys):
    search = {"algorithm": "simplex-gp", "trials": 30, "patience": 1, "tolerance": 1e9, "lookahead": 0}
    path = worlds.study(tmp_path, search=search)
    trials = len(open_study(path).run().summary.trials["simplex-gp"])
    left = check(load(path), path).left
    assert left is not None and (left.trials, left.done, left.planned) == (0, trials, 30) and trials < 10
    assert main(["check", str(path)]) == 0
    assert f"{trials} of 30 trials are done, and the search has ended." in capsys.readouterr().out


def test_what_more_trials_need_is_left(finished):
    """Seven more trials; of the table the winner may be new, and where asked for it without each of three."""
    for report, more in (({}, 0), ({"leave_one_out": True}, 3)):
        path = with_sections(finished, search={"algorithm": "random", "trials": 10}, report=report)
        left = check(load(path), path).left
        assert left is not None and (left.trials, left.planned) == (7, 10)
        assert (left.work.composites, left.work.reported) == (7 + more, 1 + more)


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"weights": {"code": 2, "math": 1, "prose": 1}}},
        {"simplex": {"bounds": {"code": [0, 0.5]}}},
        {"objective": {"protect": {"code": 0.1}}},
        {"objective": {"worst": True}},
        {"name": "another"},
    ],
)
def test_a_study_that_asks_for_something_else_is_planned_whole(finished, sections):
    path = with_sections(finished, **sections)
    assert check(load(path), path).left is None


def test_an_algorithm_that_was_not_begun_has_its_trials_left(finished):
    path = with_sections(finished, search={"algorithm": "tpe", "trials": 5})
    left = check(load(path), path).left
    assert left is not None and (left.trials, left.planned) == (5, 5)


@pytest.mark.parametrize(
    ("search", "refused"),
    [
        ({"divisions": 10, "grid_limit": 65}, True),
        ({"divisions": 10, "grid_limit": 66}, False),
        ({"divisions": 30}, False),
        ({"divisions": 31}, True),
        ({"divisions": 31, "grid_limit": 528}, False),
        ({"divisions": 31, "algorithm": "grid"}, False),
    ],
)
def test_a_comparison_is_told_before_and_a_large_grid_is_refused(tmp_path, search, refused):
    """C(d + 2, 2) points of three distributions: 66 for 10 divisions, 496 for 30, 528 for 31."""
    path = worlds.study(tmp_path, search={"trials": 40} | search)
    points = (search["divisions"] + 2) * (search["divisions"] + 1) // 2
    before = listing(tmp_path)
    comparison = check(load(path), path).comparison
    assert f"{points:,}" in comparison and ("refused" in comparison) == refused
    if refused:
        with pytest.raises(InputError, match=r"search\.grid_limit"):
            comparison_plan(load(path), path, ["grid", "random"], 1)
        with pytest.raises(InputError, match=r"search\.grid_limit"):
            open_study(path).compare(["grid", "random"])
    else:
        comparison = comparison_plan(load(path), path, ["grid", "random"], 2)
        assert f"{points + 80:,} passes" in comparison and f"grid {points:,}, random 80" in comparison
    assert listing(tmp_path) == before


@pytest.mark.parametrize("was_run", [False, True])
def test_a_check_writes_nothing(world, capsys, was_run):
    if was_run:
        engine = connect(f"sqlite:///{world}/runs/tiny/study.db")
        Ledger(engine)
        engine.dispose()
    before = listing(world)
    assert main(["check", str(world / "study.yaml")]) == 0
    assert listing(world) == before
    output = capsys.readouterr().out
    assert "fit together" in output and len(output.splitlines()) <= 50
    assert main(["check", str(world / "study.yaml"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["plan"]["memory"]["peak"] > answer["plan"]["memory"]["stored"] > 0 and len(answer["checkpoints"]) == 4
    assert main(["check", str(world / "study.yaml")]) == 0  # the first check may have compiled the kernel
    assert "merge kernel" in answer["kernel"] and answer["kernel"][1:] in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "run", "compare", "score"])
def test_a_study_too_large_for_this_machine_is_refused_before_it_loads(world, capsys, monkeypatch, command):
    monkeypatch.setattr("dem_opt.planning.inputs.this_machine", lambda: Machine("cpu", 1, 10**8, 10**7))
    monkeypatch.setattr("dem_opt.planning.inputs.content_hash", lambda *_: pytest.fail("read before it was refused"))
    before = listing(world)
    more = ["--coefficients", "code=1"] if command == "score" else []
    assert main([command, str(world / "study.yaml"), *more]) == 2
    output = capsys.readouterr().err
    assert "compute.workers = 1" in output and "are available" in output and output.count("\n") == 1
    assert listing(world) == before


def test_a_merge_holds_no_worker_and_is_not_refused(world, monkeypatch):
    monkeypatch.setattr("dem_opt.planning.inputs.this_machine", lambda: Machine("cpu", 1, 10**8, 10**7))
    assert main(["merge", str(world / "study.yaml"), "--coefficients", "code=1", "--out", str(world / "out")]) == 0


def test_content_is_known_once_it_was_hashed(world):
    header = read_header(world / "models/code", "checkpoint")
    assert known_content(header) is None
    content = content_hash(header.folder)
    assert known_content(header) == content


def test_twins_are_named(world):
    assert identical_checkpoints({"base": "x", "a": "y", "b": "z"}) == []
    assert identical_checkpoints({"base": "x", "a": "x"}) == [
        "a is identical to the base: its distribution vector is zero"
    ]
    (warning,) = identical_checkpoints({"base": "x", "a": "y", "b": "y"})
    assert "b and a have the same weights" in warning
    shutil.rmtree(world / "models/math")
    shutil.copytree(world / "models/base", world / "models/math")
    sources = load_inputs(load(world / "study.yaml"), "study.yaml")
    assert sources.warnings() == ["math is identical to the base: its distribution vector is zero"]
    report = check(load(world / "study.yaml"), "study.yaml")
    assert report.warnings == tuple(sources.warnings()) and report.unhashed == 0


def test_another_tokenizer_is_told(world):
    file = world / "models/math/tokenizer.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(state | {"truncation": {"max_length": 8}}))
    assert check(load(world / "study.yaml"), "study.yaml").warnings == ()
    file.write_text(json.dumps(state | {"pre_tokenizer": None}))
    (warning,) = check(load(world / "study.yaml"), "study.yaml").warnings
    assert warning.startswith("math has another tokenizer")


def test_tracking_that_can_not_be_reached_is_a_warning(world):
    path = worlds.study(world, tracking={"uri": "http://127.0.0.1:9"})
    report = check(load(path), "study.yaml")
    assert "cannot be reached" in report.tracking and len(report.warnings) == 1


def test_a_file_that_is_no_database_is_refused(world):
    (world / "runs/tiny").mkdir(parents=True)
    (world / "runs/tiny/study.db").write_text("not a database, but a text")
    with pytest.raises(InputError, match="can't be used as a database"):
        check(load(world / "study.yaml"), "study.yaml")


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (["math.jsonl"], None),
        (["math.jsonl", "more"], None),
        (["m*.jsonl"], None),
        (["more"], None),
        (["none*.jsonl"], "no file matches"),
        (["math.jsonl", "m*.jsonl"], "named twice"),
        (["empty.jsonl"], "has no text"),
        (["math.jsonl", "empty.jsonl"], None),
    ],
)
def test_data_may_be_files_folders_and_patterns(world, names, refused):
    data = world / "data"
    (data / "more").mkdir()
    (data / "empty.jsonl").touch()
    shutil.copy(data / "code.jsonl", data / "more/code.jsonl")
    content = yaml.safe_load((world / "study.yaml").read_text())
    content["distributions"]["math"]["validation"] = [f"data/{name}" for name in names]
    (world / "study.yaml").write_text(yaml.safe_dump(content))
    config = load(world / "study.yaml")
    if refused is None:
        check(config, world / "study.yaml")
        load_inputs(config, world / "study.yaml")
    else:
        with pytest.raises(InputError, match=refused) as caught:
            check(config, world / "study.yaml")
        assert caught.value.field == "distributions.math.validation"


ROWS = [{"text": text} for text in worlds.documents(7)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)

UNREADABLE = {
    "wrong column": ({"path": "data/new.jsonl", "text": "body"}, LINES, "validation"),
    "wrong format": ({"path": "data/new.jsonl", "format": "messages"}, LINES, "validation"),
    "pairs without completions": (
        {"path": "data/new.jsonl", "format": "prompt_completion", "prompt": "text"},
        LINES,
        "validation",
    ),
    "no template": (
        {"path": "data/new.jsonl", "format": "messages"},
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n",
        None,
    ),
    "empty": ({"path": "data/new.jsonl"}, "", "validation"),
    "white space": ({"path": "data/new.jsonl"}, json.dumps({"text": " \n"}) + "\n", "validation"),
    "null everywhere": ({"path": "data/new.jsonl"}, json.dumps({"text": None}) + "\n", "validation"),
    "a broken last line": ({"path": "data/new.jsonl"}, LINES + '{"text": "half', "validation"),
    "a number in the middle": ({"path": "data/new.jsonl"}, LINES + '{"text": 5}\n' + LINES, "validation"),
    "not UTF-8 at its end": ({"path": "data/new.jsonl"}, LINES.encode() + b"\xff", "validation"),
    "a table without the column": ({"path": "data/new.csv"}, "body,label\na,b\n", "validation"),
    "too little text": ({"path": "data/new.jsonl"}, "".join(LINES.splitlines(keepends=True)[:2]), "evaluation.windows"),
    "one document": ({"path": "data/new.txt"}, "alpha " * 1000, "validation"),
}
"""Data that no run can score: entry of the study file, the file's content, the field of the refusal."""


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("case", UNREADABLE)
def test_data_that_a_run_would_refuse_are_refused_by_check(world, capsys, case, command):
    """Both exit with 2 and the same line, before anything is written."""
    entry, text, field = UNREADABLE[case]
    (world / entry["path"]).write_bytes(text if isinstance(text, bytes) else text.encode())
    content = yaml.safe_load((world / "study.yaml").read_text())
    content["distributions"]["math"]["validation"] = entry
    (world / "study.yaml").write_text(yaml.safe_dump(content))
    before = listing(world)
    assert main([command, str(world / "study.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert field is None or field in line
    assert listing(world) == before


def test_the_date_of_a_chat_template_is_told_and_lets_a_study_go_on(world):
    """The same identity whatever the clock says, another one for another `evaluation.date`."""
    (world / "models/base/chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y %S') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows = [json.loads(line)["text"] for line in (world / "data/math.jsonl").read_text().splitlines()]
    turns = [[{"role": "user", "content": row[:9]}, {"role": "assistant", "content": row[9:]}] for row in rows]
    (world / "data/math.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    content = yaml.safe_load((world / "study.yaml").read_text())
    content["distributions"]["math"]["validation"] = {"path": "data/math.jsonl", "format": "messages"}
    content.setdefault("evaluation", {})["window"] = 64
    fields = []
    for date in (None, "2025-01-01", "2024-12-31"):
        content["evaluation"] |= {"date": date} if date else {}
        (world / "study.yaml").write_text(yaml.safe_dump(content))
        progress = Notes()
        with reporting(progress):
            fields.append(load_inputs(load(world / "study.yaml"), world / "study.yaml").identity().scoring_fields())
        assert any((date or "2025-01-01") in note for note in progress.notes)
    assert fields[0] == fields[1] != fields[2]


def test_a_check_tells_what_windows_detect_by_a_default_before_there_are_trials(world):
    config = load(world / "study.yaml")
    detection = check(config, "study.yaml", difference=0.01).detection
    assert not detection.is_measured and detection.windows == {
        SEARCH: config.evaluation.windows,
        HELD_OUT: config.evaluation.held_out,
    }
    search, held_out = detection.least[SEARCH], detection.least[HELD_OUT]
    assert search * config.evaluation.windows == pytest.approx(held_out * config.evaluation.held_out)
    assert detection.needed == ceil(config.evaluation.windows * search / 0.01)
    assert check(config, "study.yaml").detection.needed is None


@pytest.mark.parametrize("difference", ["0", "-0.1", "nan", "inf"])
def test_a_difference_to_detect_is_above_zero(world, capsys, difference):
    assert main(["check", str(world / "study.yaml"), "--difference", difference]) == 2
    assert "--difference" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [0.1, 1.0, 1.5, 10.0])
def test_windows_are_proposed_only_where_more_are_needed(world, factor):
    config = load(world / "study.yaml")
    windows = config.evaluation.windows
    precision = Precision(
        windows=windows, composites=9, regret=factor * PROPOSED_REGRET, high=1.0, intervals={}, noise=0.1
    )
    advice = proposed_windows(config, precision).partition("; ")[2]
    if factor > 1:
        assert int(advice.split()[0]) >= factor * windows
    else:
        assert not any(character.isdigit() for character in advice)
