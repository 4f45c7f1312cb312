"""The offline report: a Summary as one HTML page that needs no network, and its tables for the terminal too."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from math import exp
from pathlib import Path
from string import Template
from tempfile import NamedTemporaryFile

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from dashboards.figures import all_figures
from dem_opt.errors import InputError
from dem_opt.records import Margin, Standing, Summary

SPLITS = {"search": "search split", "held_out": "held-out split"}
"""The splits, and what a reader calls them."""

ABSENT = "–"


@dataclass(frozen=True)
class Table:
    """A table of texts, told the same in terminal and report.

    lowest  cells (row, column) that hold the lowest NLL or perplexity of their column
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lowest: frozenset[tuple[int, int]] = frozenset()


def final_table(summary: Summary, split: str) -> Table:
    """The standings on one split: NLL of each distribution and their weighted mean in nats per token, perplexity
    exp(mean), evaluations, forward tokens and seconds spent."""
    headers = ("composite", *summary.weights, "mean", "perplexity", "evals", "tokens", "seconds")
    nll = [_nll_of(standing, split, list(summary.weights)) for standing in summary.standings]
    rows = tuple(_row(standing, values) for standing, values in zip(summary.standings, nll, strict=True))
    columns = zip(*nll, strict=True)
    lowest = {(row, column) for column, values in enumerate(columns, start=1) for row in _lowest(values)}
    mean = len(summary.weights) + 1
    return Table(headers, rows, frozenset(lowest | {(row, mean + 1) for row, column in lowest if column == mean}))


def margin_table(summary: Summary) -> Table:
    """The winner's margin over each rival in nats per token with its 95% paired interval, and what it shows."""
    headers = ("rival", *(f"{words} [95% interval]" for words in SPLITS.values()), "the winner is")
    rivals = dict.fromkeys(margin.rival for margin in summary.margins)
    found = {(margin.rival, margin.split): margin for margin in summary.margins}
    rows = [(rival, [found.get((rival, split)) for split in SPLITS]) for rival in rivals]
    return Table(headers, tuple((rival, *map(_interval, pair), _verdict(pair)) for rival, pair in rows))


def study_note(summary: Summary, links: Mapping[str, str]) -> str:
    """The study in Markdown, for Optuna Dashboard's note: what is optimized, the best so far, and links by name."""
    winner = summary.winner
    weights = {} if winner.coefficients is None else winner.coefficients.weights
    trials = ", ".join(f"{len(records)} {algorithm} trials" for algorithm, records in summary.trials.items())
    lines = [
        "**Objective:** weighted mean NLL over distributions on the search split, in nats per token (lower is better).",
        f"**Done:** {trials or 'no trials'}.",
        f"**Best:** `{winner.label}`, {_number(winner.objective.get('search'))} nats per token.",
        "\n".join(["| distribution | coefficient |", "|---|---|", *(f"| `{name}` | {w:.3f} |" for name, w in weights.items())]),
        *(f"[{name}]({target})" for name, target in links.items()),
    ]
    return "\n\n".join(lines)


def write_report(summary: Summary, path: Path) -> None:
    """Writes the report as one HTML file, whole or not at all.

    Raises InputError where the file can't be written.
    """
    page = render(summary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False) as file:
            try:
                file.write(page)
                file.close()
                Path(file.name).chmod(0o644)
                os.replace(file.name, path)
            finally:
                Path(file.name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(path, None, None, f"the report can't be written ({error.strerror})") from None


def render(summary: Summary) -> str:
    """The page as text: the answer, the search, how to reproduce it."""
    figures = all_figures(summary)
    page = Template(files("dashboards").joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute(
        study=escape(summary.study),
        answer=_answer(summary),
        coefficients=_figure("coefficients", figures),
        tables="".join(_html_table(final_table(summary, split), f"NLL in nats per token, {words}") for split, words in SPLITS.items()),
        margins=_html_table(margin_table(summary), "Rival minus winner in mean NLL, nats per token; above 0 the winner is better"),
        change=_figure("change", figures),
        search="".join(_figure(name, figures) for name in ("best-so-far", "simplex")),
        trials=_html_table(_trial_table(summary), "Trials by algorithm"),
        facts=_facts(summary.facts),
        figures=_embedded({name: figure.to_plotly_json() for name, figure in figures.items()}),
        plotly=get_plotlyjs(),
    )


def _answer(summary: Summary) -> str:
    """The winner in two sentences."""
    winner, base = summary.winner, summary.standings[0]
    told = "the base alone" if winner.coefficients is None else str(winner.coefficients)
    scores = [
        f"{_number(winner.objective[split])} nats per token on the {words} (the base: {_number(base.objective.get(split))})"
        for split, words in SPLITS.items()
        if split in winner.objective
    ]
    return f"<strong>{escape(winner.label)}</strong>: {escape(told)}.<br>Mean NLL {escape(', '.join(scores) or ABSENT)}."


def _trial_table(summary: Summary) -> Table:
    """How many trials of each algorithm were scored, and why others failed."""
    rows = []
    for algorithm, records in summary.trials.items():
        failed = [record for record in records if record.objective is None]
        reasons = "; ".join(dict.fromkeys(record.reason or "unknown" for record in failed)) or ABSENT
        seconds = sum(record.evaluation.merge_seconds + record.evaluation.score_seconds for record in records)
        proposing = sum(record.propose_seconds for record in records)
        rows.append((algorithm, str(len(records) - len(failed)), str(len(failed)), reasons, f"{seconds:.1f}", f"{proposing:.1f}"))
    return Table(("algorithm", "scored", "failed", "reasons", "seconds evaluating", "seconds proposing"), tuple(rows))


def _nll_of(standing: Standing, split: str, names: Sequence[str]) -> list[float | None]:
    """NLL of each distribution, then the weighted mean; None where it was not scored."""
    scores = standing.scores.get(split, {})
    return [*(scores[name].nll if name in scores else None for name in names), standing.objective.get(split)]


def _row(standing: Standing, nll: Sequence[float | None]) -> tuple[str, ...]:
    mean = nll[-1]
    perplexity = ABSENT if mean is None else f"{exp(mean):.3f}"
    cost = (f"{standing.evaluations:,}", _compact(standing.forward_tokens), f"{standing.seconds:.1f}")
    return (standing.label, *map(_number, nll), perplexity, *cost)


def _lowest(values: Iterable[float | None]) -> list[int]:
    """Rows of the lowest value, among at least two."""
    known = {row: value for row, value in enumerate(values) if value is not None}
    return [row for row, value in known.items() if value == min(known.values())] if len(known) > 1 else []


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def _compact(count: int) -> str:
    """A count in three figures or so: 950, 8.0k, 2.29M, 1.20G."""
    for unit, sign, digits in ((10**9, "G", 2), (10**6, "M", 2), (10**3, "k", 1)):
        if count >= unit:
            return f"{count / unit:.{digits}f}{sign}"
    return str(count)


def _interval(margin: Margin | None) -> str:
    return ABSENT if margin is None else f"{margin.mean:+.4f} [{margin.low:+.4f}, {margin.high:+.4f}]"


def _verdict(margins: Sequence[Margin | None]) -> str:
    """What the intervals show: one word where the splits agree, else a word for each."""
    words = {
        SPLITS[margin.split]: "better" if margin.low > 0 else "worse" if margin.high < 0 else "not told apart"
        for margin in margins
        if margin is not None
    }
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return "; ".join(f"{split}: {word}" for split, word in words.items())


def _html_table(table: Table, caption: str) -> str:
    head = "".join(f'<th scope="col"><span>{escape(header)}</span></th>' for header in table.headers)
    body = "".join(
        "<tr>" + "".join(_cell(text, row, column, table) for column, text in enumerate(texts)) + "</tr>"
        for row, texts in enumerate(table.rows)
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str, row: int, column: int, table: Table) -> str:
    if column == 0:
        return f'<th scope="row"><span>{escape(text)}</span></th>'
    return f"<td><strong>{escape(text)}</strong></td>" if (row, column) in table.lowest else f"<td>{escape(text)}</td>"


def _figure(name: str, figures: Mapping[str, go.Figure]) -> str:
    """A place for a figure, with its text alternative."""
    words = figures[name].layout.meta
    return (
        f'<figure><div id="{name}" role="img" aria-label="{escape(words["description"])}"></div>'
        f"<figcaption>{escape(words['reading'])}</figcaption></figure>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    return "".join(f"<dt>{escape(label)}</dt><dd><pre>{escape(str(value))}</pre></dd>" for label, value in facts.items())


def _embedded(value: object) -> str:
    """JSON that can stand in a script element: no `<`, so that no text can end it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
