"""`dem-opt report` and `dashboard`, and what other commands show through the dashboards: figures, notes, tables."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dem_opt.cli import json_output, published
from dem_opt.cli.console import Terminal, json_text

if TYPE_CHECKING:
    from dem_opt.analysis.regret import Comparison
    from dem_opt.dashboards.live_updates import LiveUpdates
    from dem_opt.study import Study
    from dem_opt.types import Summary

DOTS_PER_INCH = 80
"""Resolution of the figures that MLflow gets."""


@contextmanager
def study_beside_dashboards(path: Path, terminal: Terminal) -> Iterator[tuple["Study", "LiveUpdates"]]:
    """Load a study file; show progress on the terminal and in Optuna Dashboard while the context is open."""
    from dem_opt.config import load
    from dem_opt.dashboards.live_updates import LiveUpdates
    from dem_opt.study import Study, mlflow_tracker

    config = load(path)
    with terminal.progress() as progress, LiveUpdates(config.storage, progress, partial(_draw, path)) as updates:
        tracker = mlflow_tracker(config, on_pages=updates.link)
        yield Study(config, path, tracker=tracker, progress=updates), updates


def _draw(path: Path, pages: Mapping[str, str]) -> None:
    """Draw the figures and notes of a study in Optuna Dashboard; `pages` are those of its runs in MLflow."""
    from dem_opt.study import Study

    study = Study.load(path)
    _publish_figures(study, study.summary(), pages)


def publish(study: "Study", pages: Mapping[str, str], terminal: Terminal) -> "Summary":
    """Write the results into Optuna Dashboard and MLflow; `pages` are those of the study's runs in MLflow."""
    from dem_opt.dashboards.figures import all_figures
    from dem_opt.dashboards.html_report import render, study_note
    from dem_opt.dashboards.static_export import image
    from dem_opt.dashboards.tables import final_table, markdown

    with terminal.progress() as progress, progress.phase("drawing figures, writing them into the dashboards"):
        summary = study.summary()
        note = _publish_figures(study, summary, pages)
        tables = "\n\n".join(markdown(final_table(summary, split)) for split in ("search", "held_out"))
        figures = all_figures(summary).items()
        images = {f"figures/{name}.png": image(figure, "png", DOTS_PER_INCH) for name, figure in figures}
        files: dict[str, str | bytes] = {
            "report.html": render(summary, study.overlap()),
            "summary.json": json_text(json_output.of_summary(summary)),
            "final_table.md": tables,
            **images,
        }
        if study.describe(summary, f"{study_note(summary, {})}\n\n{tables}" if note else "", files):
            published.keep(study.config, summary)
    return summary


def _publish_figures(study: "Study", summary: "Summary", pages: Mapping[str, str]) -> str:
    """Write figures and a note into Optuna Dashboard, for every run of a study; return the note of the last."""
    from dem_opt.dashboards.figures import all_figures
    from dem_opt.dashboards.html_report import study_note
    from dem_opt.dashboards.optuna_dashboard import publish as publish_in_optuna

    figures, note = all_figures(summary), ""
    for name in {records[0].study: None for records in summary.trials.values() if records}:
        links = {"This search in MLflow": pages[name]} if name in pages else {}
        note = study_note(summary, links)
        publish_in_optuna(study.config.storage, name, figures, note)
    return note


def report(arguments: Namespace, terminal: Terminal) -> None:
    """Write the page, and the figures as files where a folder is given."""
    from dem_opt.dashboards.figures import all_figures
    from dem_opt.dashboards.html_report import write_report
    from dem_opt.dashboards.static_export import write_figures
    from dem_opt.study import Study

    if arguments.full:
        with study_beside_dashboards(arguments.study, terminal) as (study, updates):
            study.complete_report()
        summary = publish(study, updates.pages, terminal)
    else:
        study = Study.load(arguments.study)
        summary = study.summary()
    out = arguments.out or study.config.output / "report.html"
    write_report(summary, out, study.overlap())
    written = write_figures(all_figures(summary), arguments.figures) if arguments.figures else []
    if arguments.json:
        terminal.json({"report": str(out), "figures": [str(path) for path in written]})
        return
    terminal.line(f"Written: {out}")
    if arguments.figures:
        terminal.line(f"Written: {len(written)} figures in {arguments.figures}")


def dashboard(arguments: Namespace, terminal: Terminal) -> None:
    """Serve both dashboards until interrupted."""
    from dem_opt.config import load
    from dem_opt.dashboards.servers import serve
    from dem_opt.search.optuna_storage import check_tables
    from dem_opt.storage.engine import is_there
    from dem_opt.storage.ledger import Ledger
    from dem_opt.storage.retry import opened
    from dem_opt.study import mlflow_store
    from dem_opt.tracking.mlflow_client import follow_artifacts

    config = load(arguments.study)
    if is_there(config.storage):
        with opened(config.storage) as engine:
            if Ledger.is_in(engine):
                Ledger(engine)  # upgrades what an earlier release has written, which Optuna Dashboard reads by itself
        check_tables(config.storage)
    follow_artifacts(mlflow_store(config))
    serve(config.storage, config.tracking.uri, config.output / "artifacts", terminal.line, arguments.open)


def print_comparison(summary: "Summary", folder: Path, terminal: Terminal) -> None:
    """Write the comparison of algorithms as a page and as JSON into `folder`, then print it."""
    from dem_opt.analysis.regret import compare_searches
    from dem_opt.dashboards.html_report import render_comparison, write

    comparison = compare_searches(summary)
    page, data = folder / "comparison.html", folder / "comparison.json"
    answer = json_output.of_comparison(comparison)
    write(render_comparison(summary, comparison), page, "comparison")
    write(json_text(answer), data, "comparison")
    if terminal.as_json:
        terminal.json(json_output.of_summary(summary) | {"comparison": answer})
        return
    print_results(summary, terminal)
    _print_regrets(comparison, terminal)
    terminal.line(f"Written: {page} and {data}")


def print_results(summary: "Summary", terminal: Terminal) -> None:
    """Print the results table on both splits, the best five composites, the margins and the winner."""
    from dem_opt.dashboards.fronts import front_table, front_title, winner_lines
    from dem_opt.dashboards.tables import SPLIT_NAMES, final_table, margin_table, top_table
    from dem_opt.dashboards.words import (
        cost_line,
        group_lines,
        loss_title,
        objective_name,
        precision_lines,
        rival_lines,
        rounding_lines,
        sampled_note,
        total_lines,
        winner_text,
    )

    objective = objective_name(summary)
    for split, words in SPLIT_NAMES.items():
        final = final_table(summary, split)
        terminal.table(
            f"{loss_title(summary)}, {words}; {objective}; FE: forward-equivalents",
            final.headers,
            final.rows,
            strong=len(final.rows) - 1,
            groups=final.groups,
        )
    top = top_table(summary)
    title = f"Top five by the search split: {objective}, {summary.unit_words}"
    terminal.table(title, top.headers, top.rows, words=top.words)
    margins = margin_table(summary)
    title = f"Rival minus winner in {objective}, {summary.unit_words}; {sampled_note(summary)}"
    terminal.table(title, margins.headers, margins.rows, groups=margins.groups)
    if summary.front is not None:
        front = front_table(summary.front)
        terminal.table(front_title(summary.front), front.headers, front.rows, words=front.words, groups=front.groups)
    terminal.line(f"The winner: {summary.winner.label}: {winner_text(summary.winner)}")
    lines = [
        *winner_lines(summary.front),
        *group_lines(summary),
        *rival_lines(summary),
        *total_lines(summary),
        *rounding_lines(summary),
        *precision_lines(summary),
        cost_line(summary),
    ]
    for line in filter(None, lines):
        terminal.line(line)


def _print_regrets(comparison: "Comparison", terminal: Terminal) -> None:
    from dem_opt.dashboards.tables import comparison_table

    regrets = comparison_table(comparison)
    orders = "; of the grid the mean over orders" if any(row.is_expected for row in comparison.rows) else ""
    title = f"{comparison.title} in {comparison.unit}: median [quartiles] over runs{orders}"
    terminal.table(title, regrets.headers, regrets.rows)
