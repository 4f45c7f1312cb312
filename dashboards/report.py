"""The offline report: a Summary as one HTML page that needs no network, and its tables, for terminals too."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from math import exp
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from dashboards.figures import all_figures
from dashboards.look import ABSENT
from dem_opt.errors import InputError
from dem_opt.records import Margin, Standing, Summary

SPLITS = {"search": "search split", "held_out": "held-out split"}
"""The splits, and what a reader calls them."""


@dataclass(frozen=True)
class Table:
    """A table of texts, told the same in terminal and report.

    lowest  cells (row, column) that hold the lowest NLL or perplexity of their column
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lowest: frozenset[tuple[int, int]] = frozenset()


def final_table(summary: Summary, split: str) -> Table:
    """The standings on one split: NLL of each corpus and the distributions' weighted mean in nats per token.

    Then perplexity exp(mean), and the evaluations, forward tokens and seconds that were spent.  A composite that
    violates what is protected, on the search split, says by how many nats per token.
    """
    headers = ("composite", *summary.weights, "mean", "perplexity", "evals", "tokens", "seconds")
    nll = [_nll_of(standing, split, list(summary.weights)) for standing in summary.standings]
    rows = tuple(_row(standing, values) for standing, values in zip(summary.standings, nll, strict=True))
    columns = zip(*nll, strict=True)
    lowest = {(row, column) for column, values in enumerate(columns, start=1) for row in _lowest(values)}
    mean = len(summary.weights) + 1
    perplexity = {(row, mean + 1) for row, column in lowest if column == mean}
    return Table(headers, rows, frozenset(lowest | perplexity))


def margin_table(summary: Summary) -> Table:
    """The winner's margin over each rival in nats per token, its 95% paired interval, and what that shows."""
    headers = ("rival", *(f"{words} [95% interval]" for words in SPLITS.values()), "the winner is")
    rivals = dict.fromkeys(margin.rival for margin in summary.margins)
    found = {(margin.rival, margin.split): margin for margin in summary.margins}
    rows = [(rival, [found.get((rival, split)) for split in SPLITS]) for rival in rivals]
    return Table(headers, tuple((rival, *map(_interval, pair), _verdict(pair)) for rival, pair in rows))


def study_note(summary: Summary, links: Mapping[str, str]) -> str:
    """The study in Markdown, for Optuna Dashboard's note: what is optimized, the best, links by name."""
    winner = summary.winner
    weights = {} if winner.coefficients is None else winner.coefficients.weights
    trials = ", ".join(f"{len(records)} {algorithm} trials" for algorithm, records in summary.trials.items())
    table = [
        "| distribution | coefficient |",
        "|---|---|",
        *(f"| `{name}` | {w:.3f} |" for name, w in weights.items()),
    ]
    lines = [
        "**Objective:** weighted mean NLL over distributions, search split, nats per token: low is good.",
        f"**Done:** {trials or 'no trials'}.",
        f"**Best:** `{winner.label}`, {_number(winner.objective.get('search'))} nats per token.",
        "\n".join(table),
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
        with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            whole = Path(folder) / path.name
            whole.write_text(page, encoding="utf-8")
            whole.replace(path)
    except OSError as error:
        raise InputError(path, None, None, f"the report can't be written ({error.strerror})") from None


def render(summary: Summary) -> str:
    """The page as text: the answer, the search, how to reproduce it."""
    figures = all_figures(summary)
    page = Template(files("dashboards").joinpath("report.html").read_text(encoding="utf-8"))
    tables = [_html_table(final_table(summary, split), f"NLL in nats per token, {SPLITS[split]}") for split in SPLITS]
    above = "Rival minus winner in mean NLL, nats per token; above 0 the winner is better"
    return page.substitute(
        study=escape(summary.study),
        answer=_answer(summary),
        coefficients=_figure("coefficients", figures),
        tables="".join(tables),
        margins=_html_table(margin_table(summary), above),
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
    found = [
        (words, _number(winner.objective.get(split)), _number(base.objective.get(split)))
        for split, words in SPLITS.items()
    ]
    scores = ", ".join(f"{nll} nats per token on the {words} (the base: {of_base})" for words, nll, of_base in found)
    return f"<strong>{escape(winner.label)}</strong>: {escape(told)}.<br>Mean NLL {escape(scores)}."


def _trial_table(summary: Summary) -> Table:
    """How many trials of each algorithm were scored, and why others failed."""
    headers = ("algorithm", "scored", "failed", "reasons", "seconds evaluating", "seconds proposing")
    rows = []
    for algorithm, records in summary.trials.items():
        failed = [record for record in records if record.objective is None]
        reasons = "; ".join(dict.fromkeys(record.reason or "unknown" for record in failed)) or ABSENT
        seconds = sum(record.evaluation.merge_seconds + record.evaluation.score_seconds for record in records)
        proposing = sum(record.propose_seconds for record in records)
        counts = (str(len(records) - len(failed)), str(len(failed)))
        rows.append((algorithm, *counts, reasons, f"{seconds:.1f}", f"{proposing:.1f}"))
    return Table(headers, tuple(rows))


def _nll_of(standing: Standing, split: str, names: Sequence[str]) -> list[float | None]:
    """NLL of each distribution, then the weighted mean; None where it was not scored."""
    scores = standing.scores.get(split, {})
    return [*(scores[name].nll if name in scores else None for name in names), standing.objective.get(split)]


def _row(standing: Standing, nll: Sequence[float | None]) -> tuple[str, ...]:
    mean = nll[-1]
    perplexity = ABSENT if mean is None else f"{exp(mean):.3f}"
    cost = (f"{standing.evaluations:,}", _compact(standing.forward_tokens), f"{standing.seconds:.1f}")
    over = f" (protect: +{standing.violation:.3f} over)" if standing.violation else ""
    return (standing.label + over, *map(_number, nll), perplexity, *cost)


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
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str, row: int, column: int, table: Table) -> str:
    if column == 0:
        return f'<th scope="row"><span>{escape(text)}</span></th>'
    shown = f"<strong>{escape(text)}</strong>" if (row, column) in table.lowest else escape(text)
    return f"<td>{shown}</td>"


def _figure(name: str, figures: Mapping[str, go.Figure]) -> str:
    """A place for a figure, with its text alternative."""
    words = figures[name].layout.meta
    return (
        f'<figure><div id="{name}" role="img" aria-label="{escape(words["description"])}"></div>'
        f"<figcaption>{escape(words['reading'])}</figcaption></figure>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    shown = [(escape(label), escape(str(value))) for label, value in facts.items()]
    return "".join(f"<dt>{label}</dt><dd><pre>{value}</pre></dd>" for label, value in shown)


def _embedded(value: object) -> str:
    """JSON that can stand in a script element: no `<`, so that no text can end it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
