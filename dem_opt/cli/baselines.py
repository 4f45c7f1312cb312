"""What people and programs are told of the method held against others: data mixing, tasks."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dem_opt.cli import console
from dem_opt.errors import InputError

if TYPE_CHECKING:
    from dem_opt.analysis.mixing_cost import MixingComparison
    from dem_opt.analysis.task_scores import TaskTable


def of_mixing(found: "MixingComparison") -> dict[str, Any]:
    """Merging against mixing as plain data, with its units."""
    units = {
        "objective, nll": "nats per token",
        "tokens": "tokens through a model, padding included",
        "flops": "floating-point operations: 2 P T forward, 6 P T for training all parameters",
        "ratio, equal_ratio": "floating-point operations of the mixtures over those of the fine-tunes and the search",
    }
    return asdict(found) | {"against": [asdict(one) for one in found.against], "units": units}


def mix(given: Namespace) -> None:
    """`dem-opt compare --data-mixing GRID`: the winner against models trained on mixtures."""
    from dem_opt.study import Study

    if given.algorithms is not None or given.seeds is not None:
        mend = "holds what was found against mixtures; leave --algorithms and --seeds out"
        raise InputError(None, "--data-mixing", given.data_mixing, mend)
    with console.ConsoleProgress(quiet=given.json) as watching:
        study = Study.load(given.study, progress=watching)
        found = study.mix(given.data_mixing)
    tell_mixing(found, study.config.output, given.json)


def tell_mixing(found: "MixingComparison", folder: Path, as_json: bool) -> None:
    """Write the comparison as a page and for programs, then tell it."""
    from dem_opt.dashboards.html_report import write
    from dem_opt.dashboards.mixing_plots import BUDGETS, curve_table, quality_table, render_mixing, verdicts

    page, data = folder / "mixing.html", folder / "mixing.json"
    write(render_mixing(found), page, "comparison")
    write(console.as_json(of_mixing(found)), data, "comparison")
    if as_json:
        console.say_json(of_mixing(found))
        return
    made = quality_table(found)
    console.table("Cost, and NLL in nats per token; by corpus held out", made.headers, made.rows, strong=0)
    for one in found.against:
        made = curve_table(found, one)
        title = f"What k of {one.mixtures} mixtures are expected to give, {BUDGETS[one.budget]}, held out"
        console.table(title, made.headers, made.rows)
    for line in verdicts(found):
        console.say(line)
    console.say(f"Written: {page} and {data}")


def evaluate(given: Namespace) -> None:
    """`dem-opt evaluate`: models on tasks, ranked by loss or by a task."""
    from dem_opt.study import Study

    with console.ConsoleProgress(quiet=given.json) as watching:
        found = Study.load(given.study, progress=watching).evaluate()
    ranked = found.ranked(given.by)
    if given.json:
        console.say_json(of_tasks(found) | {"ranked": [one.label for one in ranked]})
        return
    headers = ("model", "search", "held-out", *(f"{task} {_metric(found, task)}" for task in found.tasks))
    rows = [
        (
            one.label,
            *(f"{one.objective[split]:.4f}" if split in one.objective else "-" for split in ("search", "held_out")),
            *(f"{score.value:.4f}" + _error(score.error) for score in (one.scores[task] for task in found.tasks)),
        )
        for one in ranked
    ]
    order = "loss on the search split" if given.by is None else given.by
    console.table(f"Loss in nats per token, and tasks; the best by {order} first", headers, rows, strong=0)
    for task, by_split in found.agreement.items():
        told = ", ".join(f"{split.replace('_', '-')} {_correlation(value)}" for split, value in by_split.items())
        console.say(f"Rank correlation of loss and {task} over {len(found.models)} models (1: they agree): {told}")


def of_tasks(found: "TaskTable") -> dict[str, Any]:
    """Models on tasks as plain data."""
    units = {"objective": "nats per token", "agreement": "Spearman's rank correlation, 1 where lower loss is better"}
    return asdict(found) | {"agreement": found.agreement, "units": units}


def _metric(found: "TaskTable", task: str) -> str:
    return found.models[0].scores[task].metric


def _error(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"


def _correlation(value: float | None) -> str:
    return "none, one of both is constant" if value is None else f"{value:+.2f}"
