"""`dem-opt pareto`: the front between two losses, from the database alone."""

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from dem_opt.cli import json_output
from dem_opt.cli.console import Terminal
from dem_opt.errors import InputError

if TYPE_CHECKING:
    from dem_opt.pareto import Front


def pareto(arguments: Namespace, terminal: Terminal) -> None:
    """Print the front; write it as a page and as figures where these are asked for."""
    if arguments.csv and arguments.json:
        raise InputError(None, "--csv", True, "choose one of --csv and --json")
    from dem_opt.config import load
    from dem_opt.workflows.front import read_front

    config = load(arguments.study)
    front = read_front(config, arguments.study, arguments.between)
    written = _write(config.name, front, arguments.out, arguments.figures)
    if arguments.json:
        files = [str(path) for path in written]
        terminal.json({"study": config.name} | json_output.of_front(front) | {"written": files})
    elif arguments.csv:
        terminal.raw(_csv(front))
    else:
        _print(front, terminal)
        for path in written:
            terminal.line(f"Written: {path}")


def _print(front: "Front", terminal: Terminal) -> None:
    from dem_opt.dashboards.fronts import front_lines, front_table, front_title

    table = front_table(front)
    place = front.points.index(front.lowest_mean)
    terminal.table(front_title(front), table.headers, table.rows, strong=place, words=table.words, groups=table.groups)
    for line in front_lines(front):
        terminal.line(line)


def _write(study: str, front: "Front", page: Path | None, folder: Path | None) -> list[Path]:
    """Write what is asked for; return the files."""
    if page is None and folder is None:
        return []
    from dem_opt.dashboards.front_plots import front_figure
    from dem_opt.dashboards.fronts import front_lines, front_table, front_title
    from dem_opt.dashboards.html_report import render_page, write_page
    from dem_opt.dashboards.static_export import write_figures

    figure, written = front_figure(front), []
    if page is not None:
        between = f"{study}: the front between {' and '.join(front.names)}"
        table = (front_title(front), front_table(front))
        write_page(render_page(between, between, front_lines(front), {"pareto": figure}, [table]), page, "front")
        written.append(page)
    if folder is not None:
        written += write_figures({f"pareto-{'-'.join(front.names)}": figure}, folder)
    return written


def _csv(front: "Front") -> str:
    text, rows = io.StringIO(), front.rows()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
