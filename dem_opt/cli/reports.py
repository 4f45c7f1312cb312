"""What commands show through the dashboards: figures and notes beside a study, pages, tables."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dem_opt.cli import console, json_output

if TYPE_CHECKING:
    from dem_opt.analysis.regret import Comparison
    from dem_opt.dashboards.live_updates import LiveUpdates
    from dem_opt.study import Study
    from dem_opt.types import Summary

DOTS = 80
"""Dots in an inch of the figures that MLflow gets."""


@contextmanager
def watched(path: Path, quiet: bool) -> Iterator[tuple["Study", "LiveUpdates"]]:
    """A study file, with progress on the terminal and in Optuna Dashboard while the block runs."""
    from dem_opt.config import load
    from dem_opt.dashboards.live_updates import LiveUpdates
    from dem_opt.study import Study, mlflow_tracker

    config = load(path)
    with (
        console.ConsoleProgress(quiet=quiet) as progress,
        LiveUpdates(config.storage, progress, lambda pages: _show(study, study.summary(), pages)) as board,
    ):
        study = Study.load(path, tracker=mlflow_tracker(config, on_pages=board.link), progress=board)
        yield study, board


def publish(study: "Study", pages: Mapping[str, str]) -> "Summary":
    """What was found, in Optuna Dashboard and MLflow; `pages` are those of searches in MLflow."""
    from dem_opt.dashboards.figures import all_figures
    from dem_opt.dashboards.html_report import render, study_note
    from dem_opt.dashboards.static_export import image
    from dem_opt.dashboards.tables import final_table, markdown

    summary = study.summary()
    note = _show(study, summary, pages)
    tables = "\n\n".join(markdown(final_table(summary, split)) for split in ("search", "held_out"))
    images = {f"figures/{name}.png": image(figure, "png", DOTS) for name, figure in all_figures(summary).items()}
    table = console.as_json(json_output.of_summary(summary))
    files: dict[str, str | bytes] = {
        "report.html": render(summary),
        "summary.json": table,
        "final_table.md": tables,
        **images,
    }
    study.describe(summary, f"{study_note(summary, {})}\n\n{tables}" if note else "", files)
    return summary


def _show(study: "Study", summary: "Summary", pages: Mapping[str, str]) -> str:
    """Figures and note into Optuna Dashboard, for every search of a study; the note."""
    from dem_opt.dashboards.figures import all_figures
    from dem_opt.dashboards.html_report import study_note
    from dem_opt.dashboards.optuna_dashboard import publish as put

    figures, note = all_figures(summary), ""
    for name in {records[0].study: None for records in summary.trials.values() if records}:
        links = {"This search in MLflow": pages[name]} if name in pages else {}
        note = study_note(summary, links)
        put(study.config.storage, name, figures, note)
    return note


def write_report(summary: "Summary", out: Path, figures: Path | None) -> list[Path]:
    """The page, and its figures as files where a folder is given; the paths of these."""
    from dem_opt.dashboards.figures import all_figures
    from dem_opt.dashboards.html_report import write_report as write_page
    from dem_opt.dashboards.static_export import write_figures

    write_page(summary, out)
    return [] if figures is None else write_figures(all_figures(summary), figures)


def tell_comparison(summary: "Summary", folder: Path, as_json: bool) -> None:
    """Write the comparison as a page and for programs, then tell it."""
    from dem_opt.analysis.regret import compare
    from dem_opt.dashboards.html_report import render_comparison, write

    comparison = compare(summary)
    page, data = folder / "comparison.html", folder / "comparison.json"
    write(render_comparison(summary, comparison), page, "comparison")
    write(console.as_json(json_output.of_comparison(comparison)), data, "comparison")
    if as_json:
        console.say_json(json_output.of_summary(summary) | {"comparison": json_output.of_comparison(comparison)})
        return
    print_tables(summary)
    _print_comparison(comparison)
    console.say(f"Written: {page} and {data}")


def print_tables(summary: "Summary") -> None:
    """The final table on both splits, the best five, the margins, the winner."""
    from dem_opt.dashboards.style import objective_words
    from dem_opt.dashboards.tables import SPLITS, final_table, margin_table, top_table

    for split, words in SPLITS.items():
        made = final_table(summary, split)
        console.table(f"NLL in nats per token, {words}", made.headers, made.rows, strong=len(made.rows) - 1)
    top, words = top_table(summary), objective_words(summary)
    console.table(f"Top five by the search split: {words}, nats per token", top.headers, top.rows, words=top.words)
    margins = margin_table(summary)
    console.table(f"Rival minus winner in {words}, nats per token", margins.headers, margins.rows)
    winner = summary.winner
    console.say(f"The winner: {winner.label}: {winner.coefficients}")


def _print_comparison(comparison: "Comparison") -> None:
    from dem_opt.dashboards.tables import comparison_table

    made = comparison_table(comparison)
    title = "Regret in nats per token: median [quartiles] over runs; of the grid the mean over orders"
    console.table(title, made.headers, made.rows)
