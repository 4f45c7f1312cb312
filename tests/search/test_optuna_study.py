"""The Optuna study: ask, tell, best, adopt, on a real SQLite file."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from optuna import load_study
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import text

from dem_opt import config
from dem_opt.search.beginning import Beginning
from dem_opt.search.optuna_study import METRIC, Search
from dem_opt.search.trial_attributes import TrialAttributes
from dem_opt.simplex import Coefficients, Space
from dem_opt.storage.engine import connect
from dem_opt.storage.leases import holding

ALGORITHMS = ["simplex-gp", "grid", "random"]
SPACE = Space(("code", "math", "prose"))
TRIALS = 7


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests: making its tables takes longer than a study."""
    return f"sqlite:///{tmp_path_factory.mktemp('search')}/study.db"


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A study for each test."""
    return f"example/{request.node.name}#1"


def open_search(url: str, name: str, algorithm: str = "simplex-gp", **settings: object) -> Search:
    chosen = config.SearchSection.model_validate({"algorithm": algorithm, "trials": TRIALS, "divisions": 2, **settings})
    return Search(url, name, SPACE, chosen)


def loss(coefficients: Coefficients) -> float:
    """Quadratic, least on the face code = 0."""
    return float(((SPACE.point(coefficients) - [0.0, 0.4, 0.6]) ** 2).sum())


def play(search: Search, objective: Callable[[Coefficients], float] = loss) -> Iterator[Coefficients]:
    while (proposal := search.ask()) is not None:
        search.tell(proposal.number, objective(proposal.coefficients), TrialAttributes())
        yield proposal.coefficients


def storage_of(url: str, name: str) -> tuple[RDBStorage, int]:
    storage = RDBStorage(url)
    return storage, storage.get_study_id_from_name(name)


def die_while_asking(url: str, name: str) -> None:
    """Leave a trial as a kill between two parameters of a proposal left it in earlier releases."""
    storage, study_id = storage_of(url, name)
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_param(trial_id, "code", 0.25, FloatDistribution(0.0, 1.0))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_asks_what_is_planned_and_no_more(url: str, name: str, algorithm: str) -> None:
    search = open_search(url, name, algorithm)
    proposals = list(play(search))
    # C(2 + 3 - 1, 3 - 1) = 6 points of the lattice
    planned = 6 if algorithm == "grid" else TRIALS
    assert len(proposals) == search.planned == search.finished == planned
    assert search.ask() is None
    storage, study_id = storage_of(url, name)
    assert all(trial.state is TrialState.COMPLETE for trial in storage.get_all_trials(study_id))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_trial_keeps_exact_units_and_what_was_told(url: str, name: str, algorithm: str) -> None:
    search = open_search(url, name, algorithm)
    for number in range(5):
        proposal = search.ask()
        assert proposal is not None and proposal.number == number and proposal.propose_seconds > 0
        attributes = TrialAttributes(nll={"code": 2.5}, forward_tokens=12, forwards=0.5, gradient={"code": -0.5})
        search.tell(number, 2.0 + number, attributes)
        (*_, trial) = open_search(url, name, algorithm).trials()
        assert trial.coefficients == proposal.coefficients
        assert sum(trial.coefficients.units.values()) == SPACE.total_units
        assert (trial.state, trial.objective) == ("complete", 2.0 + number)
        assert trial.attributes == attributes


@pytest.mark.parametrize("total", [0.5, 2 / 3, 1.0, 1.7])
def test_vertices_of_any_total_survive_the_storage(url: str, name: str, total: float) -> None:
    space = Space(("a", "b"), total)
    search = Search(url, f"{name}/scaled", space, config.SearchSection())
    proposals = [search.ask(), search.ask()]
    assert [proposal and proposal.coefficients for proposal in proposals] == space.vertices()
    assert [trial.coefficients for trial in search.trials()] == space.vertices()


@pytest.fixture(scope="module", params=ALGORITHMS)
def uninterrupted(request: pytest.FixtureRequest, url: str) -> tuple[str, list[Coefficients]]:
    return request.param, list(play(open_search(url, f"uninterrupted/{request.param}", request.param)))


@pytest.mark.parametrize("death", ["between trials", "while asking", "while scoring"])
@pytest.mark.parametrize("after", [1, 5])
def test_a_resumed_study_proposes_what_an_uninterrupted_one_does(
    url: str, name: str, uninterrupted: tuple[str, list[Coefficients]], death: str, after: int
) -> None:
    algorithm, whole = uninterrupted
    first = open_search(url, name, algorithm)
    parts = list(islice(play(first), after))
    if death == "while asking":
        die_while_asking(url, name)
    elif death == "while scoring":
        first.ask()

    resumed = open_search(url, name, algorithm)
    parts += play(resumed)

    assert parts == whole
    assert all(trial.state == "complete" for trial in resumed.trials())


def test_what_died_while_asking_is_failed_and_not_counted(url: str, name: str) -> None:
    search = open_search(url, name)
    search.ask()
    die_while_asking(url, name)
    search.ask()
    resumed = open_search(url, name)
    adopted = [resumed.ask(), resumed.ask()]
    assert [proposal and proposal.number for proposal in adopted] == [0, 2]
    assert [proposal and proposal.coefficients for proposal in adopted] == SPACE.vertices()[:2]
    assert [trial.number for trial in search.trials()] == [0, 2] and search.finished == 0
    storage, study_id = storage_of(url, name)
    broken = storage.get_all_trials(study_id)[1]
    assert broken.state is TrialState.FAIL and "interrupted" in broken.user_attrs["reason"]


OUTCOMES = {
    "stopped": (1.9, TrialAttributes(error=0.25, objective=1.9, windows={"code": 4}), {2: 1.8, 4: 1.9}),
    "infeasible": (2.001, TrialAttributes(violation=1e-4, objective=2.0), {}),
    "stopped and infeasible": (1.901, TrialAttributes(violation=1e-4, error=0.5, objective=1.9), {4: 1.9}),
    "winner": (2.05, TrialAttributes(nll={"code": 2.05}), {}),
    "worse": (2.1, TrialAttributes(), {}),
    "failed": (None, TrialAttributes(reason="lost"), {}),
}
"""Value that is minimized, measurements and estimates of trials."""


@pytest.mark.parametrize("reverse", [False, True])
def test_only_what_may_win_is_optunas_best_trial_and_all_is_read_back(url: str, name: str, reverse: bool) -> None:
    search = open_search(url, name)
    outcomes = dict(reversed(OUTCOMES.items()) if reverse else OUTCOMES)
    for number, outcome in enumerate(outcomes.values()):
        search.ask()
        search.tell(number, *outcome)
    storage, study_id = storage_of(url, name)
    study = load_study(study_name=name, storage=storage)
    winner = list(outcomes).index("winner")
    assert study.best_trial.number == storage.get_best_trial(study_id).number == winner
    table = study.trials_dataframe().sort_values(f"value_{METRIC}")
    assert table["number"].iloc[0] == winner
    states = {label: trial.state.name for label, trial in zip(outcomes, study.trials, strict=True)}
    assert states == {
        "stopped": "PRUNED",
        "infeasible": "COMPLETE",
        "stopped and infeasible": "PRUNED",
        "winner": "COMPLETE",
        "worse": "COMPLETE",
        "failed": "FAIL",
    }
    for label, trial in zip(outcomes, open_search(url, name).trials(), strict=True):
        value, attributes, estimates = outcomes[label]
        assert (trial.objective, trial.estimates) == (value, estimates)
        assert replace(trial.attributes, penalized=None) == attributes
        assert trial.is_whole == (label in ("infeasible", "winner", "worse"))


def test_failure_is_told_with_its_reason(url: str, name: str) -> None:
    search = open_search(url, name)
    search.ask()
    search.tell(0, None, TrialAttributes(reason="lost"))
    (failed,) = search.trials()
    assert (failed.state, failed.objective, failed.attributes.reason) == ("failed", None, "lost")


def test_a_finished_trial_stays_as_it_is(url: str, name: str) -> None:
    search = open_search(url, name)
    search.ask()
    search.tell(0, 1.0, TrialAttributes(forward_tokens=1))
    search.tell(0, None, TrialAttributes(reason="told twice"))
    search.tell(0, 5.0, TrialAttributes(forward_tokens=2))
    (trial,) = search.trials()
    assert (trial.state, trial.objective, trial.attributes.forward_tokens) == ("complete", 1.0, 1)


def test_what_was_taken_over_from_a_silent_driver_is_not_its_to_finish(postgres_url: str) -> None:
    """The process runs, as one that was suspended does after it wakes."""
    engine = connect(postgres_url)
    with holding(engine, "study", several=True) as silent, holding(engine, "study", several=True) as lease:
        first, second = (
            Search(postgres_url, "study", SPACE, config.SearchSection(), lease=driver) for driver in (silent, lease)
        )
        (trial, other) = first.ask(), second.ask()
        assert (trial and trial.number, other and other.number, second.elsewhere) == (0, 1, 1)
        with engine.begin() as connection:
            connection.execute(text("UPDATE dem_driver SET renewed = 0 WHERE token = :token"), {"token": silent.token})
        lease._reached = 0.0
        adopted = second.ask()
        assert adopted and trial and (adopted.number, adopted.coefficients) == (0, trial.coefficients)
        assert not first.tell(0, 1.0, TrialAttributes())
        assert second.trials()[0].state == "running"
        assert second.tell(0, 2.0, TrialAttributes())
        assert second.trials()[0].objective == 2.0
        first.close()
        second.close()
    engine.dispose()


@pytest.mark.parametrize("moment", ["others", "_read", "_take_over"])
def test_a_driver_may_finish_its_trial_and_end_while_another_asks(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """At each step of asking: another's last trial is taken over before it is finished, or not at all."""
    engine = connect(postgres_url)
    with ExitStack() as life, holding(engine, "study", several=True) as lease:
        ending = life.enter_context(holding(engine, "study", several=True))
        last, search = (
            Search(postgres_url, "study", SPACE, config.SearchSection(), lease=driver) for driver in (ending, lease)
        )
        assert last.ask()
        if moment == "_take_over":  # it was silent for too long, and wakes
            with engine.begin() as connection:
                connection.execute(text("UPDATE dem_driver SET renewed = 0 WHERE token = :it"), {"it": ending.token})
            lease._reached = 0.0
        owner: object = lease if moment == "others" else search
        step = getattr(owner, moment)

        def end_first(*arguments: object) -> object:
            last.tell(0, 1.0, TrialAttributes())
            life.close()
            return step(*arguments)

        with monkeypatch.context() as patches:
            patches.setattr(owner, moment, end_first)
            trial = search.ask()
        assert trial and trial.number == 1
        assert [trial.state for trial in search.trials()] == ["complete", "running"]
        last.close()
        search.close()
    engine.dispose()


@pytest.mark.parametrize("objective", [float("nan"), float("inf")])
def test_an_objective_is_finite(url: str, name: str, objective: float) -> None:
    search = open_search(url, name)
    search.ask()
    with pytest.raises(ValueError, match="objective of trial 0"):
        search.tell(0, objective, TrialAttributes())
    assert search.trials()[0].state == "running"


def test_a_study_keeps_its_uid_and_starting_points(url: str, name: str) -> None:
    start = [SPACE.nearest(np.array([0.2, 0.3, 0.5])), SPACE.nearest(np.array([0.0, 0.3, 0.7]))]
    first = Search(url, f"{name}/grown#2", SPACE, config.SearchSection(), Beginning(start))
    again = Search(url, f"{name}/grown#2", SPACE, config.SearchSection(), Beginning(start[:1]))
    other = Search(url, f"{name}/grown#3", SPACE, config.SearchSection())
    assert first.uid == again.uid != other.uid
    expected = [*start, *SPACE.landmarks()]
    assert list(islice(play(again), len(expected))) == expected


def test_more_trials_may_be_planned_later(url: str, name: str) -> None:
    assert len(list(play(open_search(url, name, trials=4)))) == 4
    assert len(list(play(open_search(url, name, trials=6)))) == 2


def test_a_search_waits_for_what_promised_much(url: str, name: str) -> None:
    """A proposal promises little beside one that is being scored and promises much: only without that is it an end."""
    search = open_search(url, name, trials=30)
    first = list(islice(play(search), 4))
    much, little = search.ask(), search.ask()
    assert len(first) == 4 and much is not None and little is not None
    storage, study_id = storage_of(url, name)
    promised = [trial.user_attrs.get("expected_improvement") for trial in storage.get_all_trials(study_id)]
    assert promised[:4] == [None] * 4 and promised[4] > 1.5 * promised[5]
    tolerance = (promised[4] + promised[5]) / 2
    search.tell(little.number, loss(little.coefficients), TrialAttributes())
    assert open_search(url, name, trials=30, patience=1, tolerance=tolerance).unfinished == 25
    search.tell(much.number, loss(much.coefficients), TrialAttributes())
    ended = open_search(url, name, trials=30, patience=1, tolerance=tolerance)
    assert ended.unfinished == 0 and ended.ask() is None and "each of the last 1 proposals" in ended.stopped
    assert open_search(url, name, trials=30).unfinished == 24


def test_one_distribution_has_one_trial(url: str, name: str) -> None:
    space = Space(("only",))
    search = Search(url, f"{name}/one", space, config.SearchSection())
    assert [point.units for point in play(search, lambda _: 1.0)] == [{"only": 10**9}]
    assert search.planned == 1


def test_a_path_may_hold_braces_and_percent_signs(tmp_path: Path) -> None:
    folder = tmp_path / "{run} 5%"
    folder.mkdir()
    Search(f"sqlite:///{folder}/study.db", "x", SPACE, config.SearchSection())
    assert (folder / "study.db").exists()


def test_optuna_shows_the_metric_and_the_journal_is_written_ahead(url: str, name: str) -> None:
    open_search(url, name)
    storage, study_id = storage_of(url, name)
    assert METRIC in str(storage.get_study_system_attrs(study_id))
    with storage.engine.connect() as connection:
        assert connection.exec_driver_sql("pragma journal_mode").scalar() == "wal"
