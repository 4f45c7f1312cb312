"""Laws of the time left, on a simulated clock: from the fifth trial on it is within half as much again of the truth."""

from collections import deque
from dataclasses import dataclass

import pytest
from summaries import a_trial

from dem_opt.search.time_left import FIRST, FinalTable, PlannedRun, TimeLeft
from dem_opt.types import Evaluation, TrialRecord

FACTOR = 1.5
"""Largest ratio of an estimate and the truth, either way."""

LANDMARKS = 5
"""Trials that do not race: four single fine-tunes and their average."""

FORWARDS = (
    [1.0] * 5 + [0.125] * 7 + [0.875] * 4 + [0.125] * 4 + [0.875] * 4 + [0.125] * 3
    + [0.5, 0.375, 0.375, 0.25, 0.5, 0.625, 0.625, 0.75, 0.25, 0.25, 0.25, 0.25, 0.75]
)  # fmt: skip
"""Forward-equivalents of the quickstart's trials, as its database has them."""

SCORING = [
    0.732, 0.658, 0.973, 0.636, 0.478, 0.098, 0.09, 0.083, 0.091, 0.133, 0.095, 0.093, 0.797, 0.866,
    0.639, 0.581, 0.125, 0.135, 0.124, 0.066, 0.715, 0.844, 0.883, 0.752, 0.132, 0.161, 0.144, 0.48,
    0.379, 0.452, 0.328, 0.492, 0.515, 0.763, 0.551, 0.253, 0.154, 0.175, 0.207, 0.402,
]  # fmt: skip
"""Seconds of scoring them, on two busy cores."""

PROPOSING = [
    0.03, 0.018, 0.037, 0.026, 0.023, 0.484, 0.255, 0.158, 0.13, 0.139, 0.166, 0.164, 0.159, 0.33,
    0.386, 0.625, 0.164, 0.139, 0.14, 0.136, 0.123, 0.112, 0.134, 0.293, 0.498, 0.337, 0.34, 0.243,
    0.251, 0.135, 0.187, 0.15, 0.138, 0.551, 0.403, 0.402, 0.495, 0.226, 0.181, 0.222,
]  # fmt: skip
"""Seconds of proposing them."""

LATE_STOPS = [1.0] * 4 + [0.5] * 7 + [0.75] * 3 + [1.0, 1.0, 0.5] + [0.75] * 7 + [0.25] + [0.75] * 25
"""Forward-equivalents of a study whose races are decided late, as its database has them."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A study that was run: its trials' forward-equivalents, seconds of scoring and of proposing."""

    forwards: list[float]
    scoring: list[float]
    proposing: list[float]

    def slower(self, factor: float) -> "Recorded":
        """The same study with a model that takes so many times as long."""
        return Recorded(
            forwards=self.forwards, scoring=[seconds * factor for seconds in self.scoring], proposing=self.proposing
        )

    def record(self, number: int) -> TrialRecord:
        evaluation = Evaluation(scores={}, forward_tokens=1, merge_seconds=0.001, score_seconds=self.scoring[number])
        trial = a_trial(number, 1.0, forwards=self.forwards[number], seconds=self.proposing[number])
        return TrialRecord(**{**vars(trial), "evaluation": evaluation})


QUICKSTART = Recorded(forwards=FORWARDS, scoring=SCORING, proposing=PROPOSING)
LATE = Recorded(forwards=LATE_STOPS, scoring=[3.0 * each for each in LATE_STOPS], proposing=[0.2] * len(LATE_STOPS))
GROWING = Recorded(
    forwards=FORWARDS, scoring=SCORING, proposing=[0.02] * 5 + [0.12 + 0.18 * number / 35 for number in range(35)]
)
STUDIES = {
    "quickstart": QUICKSTART,
    "a hundred times slower": QUICKSTART.slower(100),
    "late stops": LATE,
    "late stops, slower": LATE.slower(100),
    "growing proposals": GROWING,
    "growing proposals, slower": GROWING.slower(10),
}


class Simulation:
    """A driver and its workers on a simulated clock, with the driver's order of asking and collecting."""

    def __init__(self, study: Recorded, workers: int, table: FinalTable, raced: bool, overhead: float) -> None:
        self.study, self.table, self.now = study, table, 0.0
        self.free = [0.0] * workers
        self.estimates: list[tuple[float, float]] = []
        plan = PlannedRun(name="s", trials=len(study.forwards), is_raced=raced)
        self.left = TimeLeft(workers, [plan], table, clock=lambda: self.now)
        self.search(raced, overhead)
        rate = sum(study.scoring) / sum(study.forwards)
        began = self.now
        ends = [self.work(table.forwards / table.requests * rate, began) for _ in range(table.requests)]
        self.end = max([self.now, *ends])

    def work(self, seconds: float, at: float) -> float:
        """Give work to the worker that is free first; the time at which it is done."""
        worker = min(range(len(self.free)), key=self.free.__getitem__)
        self.free[worker] = max(self.free[worker], at) + seconds
        return self.free[worker]

    def search(self, raced: bool, overhead: float) -> None:
        trials, proposals = deque[tuple[int, float]](), 0
        for _ in self.study.forwards:
            while len(trials) < 2 * len(self.free) and proposals < len(self.study.forwards):
                self.now += self.study.proposing[proposals]
                self.left.proposed("s", self.study.proposing[proposals], proposals < LANDMARKS)
                trials.append((proposals, self.work(0.001 + self.study.scoring[proposals], self.now)))
                proposals += 1
            number, done = trials.popleft()
            with self.left.waiting("s"):
                self.now = max(self.now, done)
            self.now += overhead
            self.left.finished(self.study.record(number), raced and number >= LANDMARKS)
            if (seconds := self.left.seconds()) is not None:
                self.estimates.append((self.now, seconds))


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("each", [1.0, 4.0], ids=["as many held-out windows", "four times the held-out windows"])
@pytest.mark.parametrize("overhead", [0.0, 0.05, 0.5])
def test_the_time_left_is_within_a_factor_of_the_truth_from_the_fifth_trial_on(study, workers, each, overhead):
    simulation = Simulation(study, workers, FinalTable(requests=7, forwards=7 * each), True, overhead)
    assert len(simulation.estimates) == len(study.forwards) - FIRST + 1
    for now, seconds in simulation.estimates:
        assert 1 / FACTOR <= seconds / (simulation.end - now) <= FACTOR


NO_TABLE = FinalTable(requests=0, forwards=0.0)


def after(trials: int, workers: int = 1, **plan: object) -> TimeLeft:
    """The time left after so many trials of 20, each of a second of work, proposed in a tenth; the clock shows that."""
    clock = [0.0]
    left = TimeLeft(workers, [PlannedRun(name="s", trials=20, **plan)], NO_TABLE, clock=lambda: clock[0])
    study = Recorded(forwards=[1.0] * 20, scoring=[0.999] * 20, proposing=[0.1] * 20)
    for number in range(trials):
        clock[0] += 0.1
        left.proposed("s", 0.1, False)
        with left.waiting("s"):
            clock[0] += 0.9 if not plan.get("is_sequential") else 1.0
        left.finished(study.record(number), False)
    return left


@pytest.mark.parametrize(
    ("plan", "seconds"),
    [
        ({}, 10.0),
        ({"is_sequential": True}, 11.0),
        ({"forwards": 14.0}, 4.0),
        ({"seconds": 12.5}, 2.5),
        ({"seconds": 1.0}, 0.0),
    ],
    ids=["trials", "one after the other", "a budget of passes", "a budget of time", "time is over"],
)
def test_what_ends_first_ends_the_search(plan, seconds):
    assert after(10, **plan).seconds() == pytest.approx(seconds, abs=0.2)


def test_the_first_trials_say_nothing():
    assert after(FIRST - 1).seconds() is None and after(FIRST).seconds() is not None


def test_trials_of_which_the_scores_are_known_take_only_their_proposals():
    clock = [0.0]
    left = TimeLeft(1, [PlannedRun(name="s", trials=20)], NO_TABLE, clock=lambda: clock[0])
    for number in range(10):
        clock[0] += 0.1
        left.proposed("s", 0.1, False)
        left.finished(a_trial(number, 1.0, seconds=0.1), False)
    assert left.seconds() == pytest.approx(1.0)


def test_landmarks_of_which_the_scores_are_known_say_nothing():
    left = TimeLeft(1, [PlannedRun(name="s", trials=20)], NO_TABLE, clock=lambda: 0.0)
    for number in range(2 * FIRST):
        left.proposed("s", 0.0, is_known=number <= FIRST)
        left.finished(a_trial(number, 1.0), False)
        assert left.seconds() is None
    left.proposed("s", 0.0, is_known=False)
    left.finished(Recorded(forwards=[1.0], scoring=[1.0], proposing=[0.0]).record(0), False)
    assert left.seconds() > 0


def test_starting_points_of_an_earlier_command_say_nothing_of_races():
    """Ten known composites at no cost, then three races of half a pass: the others are expected to take as much."""
    study = Recorded(forwards=[0.0] * 10 + [0.5] * 3, scoring=[0.0] * 10 + [0.5] * 3, proposing=[0.0] * 13)
    records = [study.record(number) for number in range(13)]
    plan = PlannedRun(name="s", trials=20, is_raced=True)
    known, without = (TimeLeft(1, [plan], NO_TABLE, clock=lambda: 0.0) for _ in range(2))
    starts = iter([True] * 10 + [False] * 3)
    known.begin(plan, records, lambda point: next(starts))
    without.begin(plan, records[10:])
    assert list(known._runs["s"].raced) == list(without._runs["s"].raced) == [0.5] * 3


def test_trials_from_earlier_tell_what_a_forward_equivalent_takes():
    """Of a run that is resumed, five trials of this command are known to the ledger; the others take a second each."""
    left = TimeLeft(2, [PlannedRun(name="s", trials=20)], NO_TABLE, clock=lambda: 0.0)
    study = Recorded(forwards=[1.0] * 30, scoring=[1.0] * 30, proposing=[0.0] * 30)
    left.begin(PlannedRun(name="s", trials=10), [study.record(number) for number in range(30)])
    for number in range(30, 35):
        left.proposed("s", 0.0, False)
        left.finished(a_trial(number, 1.0), False)
    # 25 of the latest 30 trials were measured.
    assert left.seconds() == pytest.approx(5 * 25 / 30 * 1.001 / 2)
