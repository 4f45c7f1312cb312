"""`dem-opt show`, `list`, `trials` and `reset`: what a study's database holds."""

import csv
import io
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dem_opt.cli import json_output, reports
from dem_opt.cli.console import Terminal
from dem_opt.config import StudyConfig, load
from dem_opt.errors import InputError
from dem_opt.types import NATS_PER_TOKEN, UNITS

if TYPE_CHECKING:
    from dem_opt.search.catalog import StudyOverview
    from dem_opt.storage.ledger import Ledger
    from dem_opt.types import TrialRecord
    from dem_opt.workflows.reset import ResetPlan

KEPT = (
    "measured scores, and the gradients: the next run takes them from the ledger",
    "MLflow runs, which get the tag `dem_opt.reset`, and registered models: the next run logs new runs beside them",
    "fine-tuned checkpoints, exported models, reports: no file is removed",
)
"""Things that a reset keeps; the first follows the number of scores."""


def show(arguments: Namespace, terminal: Terminal) -> None:
    """Print what `run` prints at its end, from the database alone."""
    from dem_opt.workflows.stored_results import stored_results

    summary = stored_results(load(arguments.study), arguments.study)
    if arguments.json:
        terminal.json(json_output.of_summary(summary))
        return
    reports.print_results(summary, terminal)
    for run, records in summary.trials.items():
        reason = (summary.stopped or {}).get(run)
        terminal.line(f"{run}: {len(records)} trials, {f'ended after {reason}' if reason else 'not ended'}")


def list_studies(arguments: Namespace, terminal: Terminal) -> None:
    """Print the studies of the database."""
    from dem_opt.search.catalog import study_overviews

    config = load(arguments.study)
    with _ledger(config, arguments.study) as ledger:
        studies = study_overviews(config.storage, ledger)
    if arguments.json:
        terminal.json([asdict(study) | {"best": study.best} for study in studies])
        return
    from dem_opt.storage.engine import masked

    headers = ("study", "run", "generation", "complete", "estimated", "failed", "running", "best")
    rows = [row for study in studies for row in _overview_rows(study)]
    terminal.line(f"Studies in {masked(config.storage)}")
    title = "Trials by state; the best objective, in nats per token where no unit is named"
    terminal.table(title, headers, rows, words=2)


def _overview_rows(study: "StudyOverview") -> Iterator[tuple[str, ...]]:
    """A row for each run of a study, or one that says that there is none."""
    if not study.runs:
        yield (study.name, "no run yet", str(study.generation), "0", "0", "0", "0", "-")
    for run in study.runs:
        counts = (str(count) for count in (run.complete, run.stopped, run.failed, run.running))
        unit = "" if study.unit == UNITS[NATS_PER_TOKEN] else f" {study.unit}"
        mean = f" mean of {' and '.join(study.pareto)}" if study.pareto else ""
        best = "-" if run.best is None else f"{run.best:.4f}{unit}{mean}"
        yield (study.name, run.name, str(study.generation), *counts, best)


def trials(arguments: Namespace, terminal: Terminal) -> None:
    """Print one row for each finished trial."""
    if arguments.csv and arguments.json:
        raise InputError(None, "--csv", True, "choose one of --csv and --json")
    config = load(arguments.study)
    rows = [_trial_row(run, record) for run, records in _trials(config, arguments.study).items() for record in records]
    if arguments.json:
        terminal.json(rows)
    elif arguments.csv:
        terminal.raw(_csv(rows, config))
    else:
        names = list(config.fine_tunes)
        unit = UNITS[config.objective.unit]
        title = f"Trials: objective and its standard error in {unit}; FE: forward-equivalents"
        losses = [axis.name for axis in config.axes or ()]
        objective = "mean of\nboth" if losses else "objective"
        headers = ("run", "trial", "state", objective, "error", *losses, *names, "FE", "tokens", "seconds")
        first, last = 5 + len(losses), len(headers) - 1
        groups = (tuple([3, *range(5, first)]), tuple(range(first, last - 2)), (last - 2,), (4,), (last,), (last - 1,))
        terminal.table(title, headers, [_cells(row, names, losses) for row in rows], words=3, groups=groups)


def _trials(config: StudyConfig, path: Path) -> dict[str, list["TrialRecord"]]:
    """The finished trials of the study's generation, by run."""
    from dem_opt.search.runs import Runs
    from dem_opt.search.trials import finished
    from dem_opt.storage.identity import StudyIdentity, refuse_other_space

    with _ledger(config, path) as ledger:
        row = ledger.study(config.name)
        if row is None:
            raise _not_run(path)
        identity = StudyIdentity.recall(row.identity, row.scoring)
        refuse_other_space(path, identity, config.space)
        with Runs(config, row.generation).existing() as searches:
            return {run: finished(ledger, identity, search) for run, search in searches.items()}


def _trial_row(run: str, record: "TrialRecord") -> dict[str, Any]:
    """A trial by column: the columns of `Study.trials` that most people want, under the same names."""
    evaluation = record.evaluation
    return {
        "run": run,
        "number": record.number,
        "state": record.state,
        "objective": record.objective,
        "standard_error": record.error if record.is_partial else None,
        **{f"loss.{name}": loss for name, loss in record.losses.items()},
        **{f"w.{name}": weight for name, weight in record.coefficients.weights.items()},
        "forward_equivalents": record.forwards,
        "forward_tokens": evaluation.forward_tokens,
        "seconds": evaluation.merge_seconds + evaluation.score_seconds,
    }


def _csv(rows: list[dict[str, Any]], config: StudyConfig) -> str:
    weights = [f"w.{name}" for name in config.fine_tunes]
    losses = [f"loss.{axis.name}" for axis in config.axes or ()]
    columns = ["run", "number", "state", "objective", "standard_error", *losses, *weights]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, "forward_equivalents", "forward_tokens", "seconds"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cells(row: Mapping[str, Any], names: list[str], losses: list[str]) -> tuple[str, ...]:
    return (
        row["run"],
        str(row["number"]),
        row["state"],
        "-" if row["objective"] is None else f"{row['objective']:.4f}",
        "-" if row["standard_error"] is None else f"{row['standard_error']:.4f}",
        *(f"{row[f'loss.{name}']:.4f}" if f"loss.{name}" in row else "-" for name in losses),
        *(f"{row[f'w.{name}']:.3f}" for name in names),
        f"{row['forward_equivalents']:.2f}",
        f"{row['forward_tokens']:,}",
        f"{row['seconds']:.2f}",
    )


def reset(arguments: Namespace, terminal: Terminal) -> None:
    """Remove the study's trials, after asking."""
    from dem_opt.study import mlflow_tracker
    from dem_opt.workflows import reset as workflow

    config = load(arguments.study)
    plan = workflow.plan_reset(config, arguments.study)
    if not arguments.yes:
        for line in _removal(plan):
            terminal.error(line)
        answer = terminal.ask(f"Remove {sum(plan.trials.values())} trials?")
        if answer is None:
            raise InputError(None, "--yes", None, "there is no terminal to ask on; add --yes")
        if not answer:
            terminal.line("Nothing was removed.")
            return
    removed = workflow.reset(config, arguments.study, mlflow_tracker(config), terminal.error)
    if arguments.json:
        terminal.json({"study": removed.study, "removed_trials": removed.trials, "kept_scores": removed.scores})
        return
    for line in _removal(removed) if arguments.yes else ():
        terminal.line(line)
    terminal.line(f"Reset. To start again: dem-opt run {arguments.study}")


def _removal(plan: "ResetPlan") -> list[str]:
    """The lines that say what a reset removes and keeps."""
    trials = [f"  {count} trials of {name}" for name, count in plan.trials.items()] or ["  no trials: there are none"]
    kept = [f"  {plan.scores} {KEPT[0]}", *(f"  {line}" for line in KEPT[1:])]
    generation = "  the study's generation and the record of its settings"
    return [f"Removes from {plan.storage}:", *trials, generation, "Keeps:", *kept]


@contextmanager
def _ledger(config: StudyConfig, path: Path) -> Iterator["Ledger"]:
    """The ledger of a database that has one; nothing is created."""
    from dem_opt.storage.engine import is_there
    from dem_opt.storage.ledger import Ledger
    from dem_opt.storage.retry import opened

    if not is_there(config.storage):
        raise _not_run(path)
    with opened(config.storage) as engine:
        if not Ledger.is_in(engine):
            raise _not_run(path)
        yield Ledger(engine)


def _not_run(path: Path) -> InputError:
    return InputError(path, None, None, f"nothing is measured yet; first: dem-opt run {path}")
