"""Laws of reading trials back: few queries however many there are, and an outline says what the records say."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import in_process
import pytest
import worlds
from sqlalchemy import Engine, event

from dem_opt.config import StudyConfig
from dem_opt.search.optuna_study import Search
from dem_opt.search.runs import Runs
from dem_opt.search.trials import READ_AT_ONCE, finished, outlined
from dem_opt.storage.read_ahead import ReadAhead
from dem_opt.types import SEARCH, SPLITS, Composite, TrialRecord
from dem_opt.workflows.stored_study import StoredStudy, stored_study

STUDIES = {
    "races": {"search": {"racing": True}},
    "probes": {"search": {"gradients": True}},
    "gradients of all windows": {"search": {"gradients": True, "racing": False}},
    "protected": {"objective": {"protect": {"code": 0.0001}}},
    "regret": {"objective": {"worst": True}},
    "bits": {"objective": {"unit": "bits_per_byte"}},
    "fronts": {"objective": {"pareto": ["code", "math"]}},
}


def run(folder: Path, trials: int = 9, **sections: dict) -> StudyConfig:
    """A study of 16 windows that has been run."""
    search = {"algorithm": "simplex-gp", "trials": trials, "lookahead": 0} | sections.pop("search", {})
    evaluation = {"window": 32, "windows": 16, "held_out": 4}
    study = in_process.open_study(worlds.study(folder, search=search, evaluation=evaluation, **sections))
    study.run()
    return study.config


@contextmanager
def opened(config: StudyConfig) -> Iterator[tuple[StoredStudy, Search]]:
    with stored_study(config) as stored, Runs(config, stored.generation).existing() as searches:
        yield stored, searches[config.search.algorithm]


@pytest.fixture(scope="module", params=STUDIES)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    return run(tmp_path_factory.mktemp("study"), **STUDIES[request.param])


def without_scores(record: TrialRecord) -> TrialRecord:
    return replace(record, scores={}, gradient={}, estimates={}, losses={})


def test_an_outline_says_what_the_records_say(config: StudyConfig) -> None:
    with opened(config) as (stored, search):
        records = finished(stored.ledger, stored.identity, search)
        outlines = outlined(search, stored.identity.unit)
    assert len(records) > 5 and all(record.scores for record in records)
    for record, outline in zip(map(without_scores, records), outlines, strict=True):
        assert outline.objective == pytest.approx(record.objective, rel=1e-12)
        assert replace(outline, objective=record.objective) == record


def test_what_was_read_ahead_is_what_the_ledger_has(config: StudyConfig) -> None:
    with opened(config) as (stored, search):
        ledger, identity = stored.ledger, stored.identity
        composites = [identity.composite(trial.coefficients) for trial in search.trials()]
        ahead = ReadAhead(ledger, composites[:3], identity.keys(SEARCH), identity.scoring)
        for composite in [*composites, Composite.single(identity.base), Composite.single("unknown")]:
            for split in SPLITS:
                for scoring in (identity.scoring, "another"):
                    expected = ledger.look_up(composite, identity.keys(split), scoring)
                    assert ahead.look_up(composite, identity.keys(split), scoring) == expected


@pytest.mark.parametrize("objective", [{}, {"protect": {"code": 0.0001}}, {"worst": True}], ids=str)
def test_reading_all_trials_takes_as_many_statements_as_reading_few(tmp_path: Path, objective: object) -> None:
    statements = []

    def listen(*words: object) -> None:
        statements.append(words[2])

    counts = []
    for trials in (3, 12):
        search = {"algorithm": "random", "trials": trials, "racing": False}
        config = run(tmp_path / str(trials), search=search, objective=objective)
        with opened(config) as (stored, search):
            search.trials()
            event.listen(Engine, "before_cursor_execute", listen)
            assert len(finished(stored.ledger, stored.identity, search)) == trials
            event.remove(Engine, "before_cursor_execute", listen)
        counts.append(len(statements))
        statements.clear()
    assert counts[0] == counts[1] < READ_AT_ONCE


def test_only_the_searches_that_are_asked_for_are_opened(tmp_path: Path) -> None:
    path = worlds.study(tmp_path, search={"algorithm": "random", "trials": 3})
    study = in_process.open_study(path)
    study.compare(["random", "simplex-gp", "tpe"])
    runs = Runs(study.config, 1)
    assert set(runs.labels()) == {"random", "simplex-gp", "tpe"}
    for labels in (None, [], ["tpe"], ["tpe", "cmaes", "random"]):
        with runs.existing(labels) as searches:
            assert list(searches) == [label for label in runs.labels() if labels is None or label in labels]
