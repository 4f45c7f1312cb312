"""Made-up studies with random scores, for whatever draws or tells them."""

from collections.abc import Mapping, Sequence

import numpy as np

from dem_opt.analysis.surrogate import surrogate_of
from dem_opt.evaluation.objective import mean_nll
from dem_opt.simplex import UNIT, Coefficients, Space
from dem_opt.types import Cost, Evaluation, Margin, ResultRow, Score, Summary, TrialRecord, VectorGeometry

SPLITS = ("search", "held_out")
RUNS = ("grid", "simplex-gp", "simplex-gp@1", "new")
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=http://e.example/x>",
    "%{x}$a$ 'q' \"d\" &lt;b&gt;",
    "n" * 64,
)
CASES = {
    "one": {"names": ("a",)},
    "two": {"names": ("a", "b")},
    "three": {"names": ("code", "math", "prose")},
    "four": {"names": ("code", "math", "prose", "records")},
    "eight": {"names": tuple("abcdefgh"), "trials": 40},
    "twelve": {"names": tuple(f"distribution {i}" for i in range(12)), "trials": 20},
    "hostile": {"names": HOSTILE, "study": HOSTILE[0]},
    "hostile three": {"names": HOSTILE[:3], "label": HOSTILE[1]},
    "one run": {"names": ("a", "b", "c"), "runs": ("simplex-gp",)},
    "many runs": {"names": ("a", "b", "c"), "runs": ("grid", *(f"tpe@{k}" for k in range(9)), "cmaes", "gradient")},
    "one trial": {"names": ("a", "b", "c"), "trials": 1},
    "partial only": {"names": ("a", "b"), "outcome": "partial"},
    "failures only": {"names": ("a", "b", "c"), "outcome": "failed"},
    "no trials": {"names": ("a", "b", "c"), "trials": 0},
    "worst": {"names": ("a", "b", "c"), "worst": True},
    "free sums": {"names": ("a", "b", "c"), "total": (0, 2)},
    "free sums of four": {"names": ("a", "b", "c", "d"), "total": (0, 2)},
    "base wins": {"names": ("a", "b", "c", "d"), "outcome": "failed", "baselines": False},
}


def a_trial(
    number: int,
    objective: float | None,
    forwards: float = 1.0,
    error: float = 0.0,
    violation: float = 0.0,
    seconds: float = 0.0,
) -> TrialRecord:
    """A trial of two distributions of which only the numbers matter."""
    point = Space(("a", "b")).centroid()
    reason = "" if objective is not None else "nan"
    return TrialRecord(
        study="s",
        number=number,
        coefficients=point,
        objective=objective,
        propose_seconds=seconds,
        reason=reason,
        violation=violation,
        forwards=forwards,
        error=error,
    )


def of_trials(trials: Mapping[str, Sequence[TrialRecord]], **fields: object) -> Summary:
    """A summary of nothing but trials."""
    frozen = {run: tuple(records) for run, records in trials.items()}
    return Summary(study="s", weights={"a": 1.0, "b": 1.0}, results=(), margins=(), trials=frozen, facts={}, **fields)


def a_summary(
    names: Sequence[str],
    trials: int = 12,
    outcome: str = "",
    baselines: bool = True,
    study: str = "example",
    label: str = "best of simplex-gp",
    runs: Sequence[str] = RUNS,
    worst: bool = False,
    total: tuple[float, float] = (1, 1),
) -> Summary:
    """A study with random scores; the winner stands last, whatever its score.

    Of five trials one failed, and of those of a search other than the grid one was stopped; `outcome` ("failed" or
    "partial") says how all ended.  Where coefficients may sum to nothing, every first trial is the base alone.
    """
    rng = np.random.default_rng(0)
    least, most = total
    space = Space(tuple(names), most, None if least == most else least)
    origin = Coefficients(tuple((name, 0) for name in space.names))
    weights = dict.fromkeys(names, 1.0)

    def scores(windows: int = 3) -> dict[str, Score]:
        return {name: Score(tuple(rng.uniform(200, 300, windows)), (90, 100, 110)[:windows]) for name in names}

    def trial(run: str, number: int) -> TrialRecord:
        name, point = f"{study}/{run}", space.sample(rng) if least or number else origin
        if outcome == "failed" or (not outcome and number % 5 == 4):
            return TrialRecord(
                study=name,
                number=number,
                coefficients=point,
                objective=None,
                reason=f"window <0> is nan {study}",
                forwards=0.0,
            )
        is_partial = outcome == "partial" or (number % 5 == 3 and run != "grid")
        by_name = scores(1 if is_partial else 3)
        cost = {"forwards": 1 / 3, "error": 0.01} if is_partial else {}
        evaluation = Evaluation(scores={}, forward_tokens=900, merge_seconds=0.1, score_seconds=0.2)
        return TrialRecord(
            study=name,
            number=number,
            coefficients=point,
            objective=mean_nll(by_name, weights),
            scores=by_name,
            evaluation=evaluation,
            propose_seconds=0.05,
            **cost,
        )

    def result(label: str, role: str, coefficients: Coefficients | None, algorithm: str = "") -> ResultRow:
        by_split = {split: scores() for split in SPLITS}
        objective = {split: mean_nll(each, weights) for split, each in by_split.items()}
        return ResultRow(
            label=label,
            role=role,
            algorithm=algorithm,
            coefficients=coefficients,
            scores=by_split,
            objective=objective,
            evaluations=1,
            forward_tokens=900,
            seconds=0.3,
        )

    searches = {run: tuple(trial(run, i) for i in range(trials)) for run in runs}
    results = [result("base", "base", None)]
    if baselines:
        alone = [Coefficients(tuple((axis, UNIT * (axis == name)) for axis in space.names)) for name in names]
        results += [result(name, "single", point) for name, point in zip(names, alone, strict=True)]
        results += [result("uniform", "uniform", space.centroid())]
    top: tuple[ResultRow, ...] = ()
    if not outcome and trials:
        results += [result(label, "best", space.sample(rng), "simplex-gp")]
        top = tuple(result(f"no. {place}", "top", space.sample(rng)) for place in range(1, 6))
    margins = tuple(
        Margin(rival=each.label, split=split, mean=0.1, low=-0.1, high=0.3) for each in results[:-1] for split in SPLITS
    )
    facts = {"study": study, "command": "dem-opt run"}
    stopped = {run: f"all {trials} planned trials of <{study}>" for run in runs}
    left_out = tuple(result(name, "without", space.sample(rng)) for name in names) if top and len(names) > 1 else ()
    vectors_KP = rng.normal(size=(len(names), 9))
    vectors = VectorGeometry(tuple(names), tuple(map(tuple, (vectors_KP @ vectors_KP.T).tolist())))
    costs = [Cost(part="baselines", evaluations=1, forwards=1.0, seconds=0.3)]
    for run, records in searches.items():
        paid = [record for record in records if record.measured]
        forwards = sum(record.forwards for record in paid)
        costs += [Cost(part=run, evaluations=len(paid), forwards=forwards, seconds=0.3 * len(paid))] if paid else []
    costs += [Cost(part="final table", evaluations=6, forwards=24.0, seconds=7.2)]
    all_records = [record for records in searches.values() for record in records]
    believed = surrogate_of(space, all_records) if len(all_records) < 200 else None
    return Summary(
        study=study,
        weights=weights,
        results=tuple(results),
        margins=margins,
        trials=searches,
        facts=facts,
        top=top,
        stopped=stopped,
        worst=worst,
        left_out=left_out,
        vectors=vectors,
        surrogate=believed,
        costs=tuple(costs),
    )
