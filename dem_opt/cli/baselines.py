"""`dem-opt compare` with rivals of the winner, and `dem-opt evaluate`: data mixing, placebos, tasks."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from dem_opt.cli import json_output
from dem_opt.cli.console import Terminal, json_text
from dem_opt.types import SPLITS

if TYPE_CHECKING:
    from dem_opt.analysis.mixing_cost import MixingComparison
    from dem_opt.analysis.task_scores import Correlation, TaskTable
    from dem_opt.types import Summary


def compare_with_mixing(arguments: Namespace, terminal: Terminal) -> None:
    """Compare the winner with models trained on mixtures of the data."""
    from dem_opt.study import Study

    with terminal.progress() as progress:
        study = Study.load(arguments.study, progress=progress)
        comparison = study.mix(arguments.data_mixing)
    print_mixing(comparison, study.config.output, terminal)


def print_mixing(comparison: "MixingComparison", folder: Path, terminal: Terminal) -> None:
    """Write the comparison as a page and as JSON into `folder`, then print it."""
    from dem_opt.dashboards.html_report import write
    from dem_opt.dashboards.mixing_plots import (
        BUDGETS,
        curve_table,
        quality_table,
        quality_title,
        render_mixing,
        verdicts,
    )

    page, data = folder / "mixing.html", folder / "mixing.json"
    answer = json_output.of_mixing(comparison)
    write(render_mixing(comparison), page, "comparison")
    write(json_text(answer), data, "comparison")
    if terminal.as_json:
        terminal.json(answer)
        return
    quality = quality_table(comparison)
    terminal.table(quality_title(comparison), quality.headers, quality.rows, strong=0)
    for budget in comparison.against:
        curve = curve_table(comparison, budget)
        title = f"Expected best of k of {budget.mixtures} mixtures, {BUDGETS[budget.budget]}, held out"
        terminal.table(title, curve.headers, curve.rows)
    for line in verdicts(comparison):
        terminal.line(line)
    terminal.line(f"Written: {page} and {data}")


def compare_with_placebo(arguments: Namespace, terminal: Terminal) -> None:
    """Compare the winner with those of the same search over placebos."""
    from dem_opt.study import Study

    with terminal.progress() as progress:
        study = Study.load(arguments.study, progress=progress)
        study.placebo()
    _print_rivals(study.summary(), terminal)


def compare_with_training(arguments: Namespace, terminal: Terminal) -> None:
    """Compare the winner with models trained on the search split at the search's cost."""
    from dem_opt.study import Study

    with terminal.progress() as progress:
        study = Study.load(arguments.study, progress=progress)
        study.fine_tune_on_search()
    _print_rivals(study.summary(), terminal)


def _print_rivals(summary: "Summary", terminal: Terminal) -> None:
    from dem_opt.dashboards.tables import rival_table
    from dem_opt.dashboards.words import objective_name, rival_lines

    if terminal.as_json:
        terminal.json(json_output.of_rivals(summary))
        return
    rivals = rival_table(summary)
    title = f"Rivals: {objective_name(summary)} in {summary.unit_words}, and minus the winner's"
    terminal.table(title, rivals.headers, rivals.rows, strong=0, groups=rivals.groups)
    for line in rival_lines(summary):
        terminal.line(line)


def evaluate(arguments: Namespace, terminal: Terminal) -> None:
    """Evaluate models on tasks, ranked by loss or by a task."""
    from dem_opt.study import Study

    with terminal.progress() as progress:
        table = Study.load(arguments.study, progress=progress).evaluate()
    ranked = table.ranked(arguments.by)
    if arguments.json:
        terminal.json(json_output.of_tasks(table) | {"ranked": [model.label for model in ranked]})
        return
    metrics = table.models[0].scores
    headers = ("model", "search", "held-out", *(f"{task} {metrics[task].metric}" for task in table.tasks))
    rows = []
    for model in ranked:
        losses = [f"{model.objective[split]:.4f}" if split in model.objective else "-" for split in SPLITS]
        scores = [model.scores[task] for task in table.tasks]
        rows.append((model.label, *losses, *(f"{score.value:.4f}{_plus_minus(score.error)}" for score in scores)))
    order = "loss on the search split" if arguments.by is None else arguments.by
    terminal.table(f"Loss in {table.unit}, and tasks; the best by {order} first", headers, rows, strong=0)
    _print_agreement(table, terminal)


def _print_agreement(table: "TaskTable", terminal: Terminal) -> None:
    headers = ("task", "loss", "split", "models", "Spearman", "Kendall")
    rows = [
        (
            agreement.task,
            agreement.loss,
            agreement.split.replace("_", "-"),
            str(agreement.models),
            _interval(agreement.spearman),
            _interval(agreement.kendall),
        )
        for agreement in table.agreement
    ]
    terminal.table("Rank correlation of loss and task over models [95%]; 1: they agree", headers, rows, words=3)


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"


def _interval(correlation: "Correlation | None") -> str:
    if correlation is None:
        return "- (constant)"
    if correlation.low is None or correlation.high is None:
        return f"{correlation.value:+.2f}"
    return f"{correlation.value:+.2f} [{correlation.low:+.2f}, {correlation.high:+.2f}]"
