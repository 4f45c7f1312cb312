"""The offline pages: a Summary as one HTML file that needs no network, the report or the comparison of its searches."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from math import exp
from pathlib import Path
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from dem_opt.analysis.regret import Comparison, compare
from dem_opt.atomic import write_text
from dem_opt.dashboards.figures import all_figures
from dem_opt.dashboards.regret_plots import comparison_figure
from dem_opt.dashboards.style import objective_words
from dem_opt.dashboards.tables import (
    SPLITS,
    Table,
    comparison_table,
    cost_table,
    final_table,
    margin_table,
    number,
    top_table,
    trial_table,
    usage_table,
    vector_table,
)
from dem_opt.errors import InputError
from dem_opt.types import ResultRow, Summary

_USED = "What workers did: seconds in all, utilisation from the second trial on, tokens not scored, a smaller batch"


def study_note(summary: Summary, links: Mapping[str, str]) -> str:
    """The study in Markdown, for notes in both dashboards: what is optimized, its state, the best, links."""
    winner = summary.winner
    weights = {} if winner.coefficients is None else winner.coefficients.weights
    stopped = summary.stopped or {}
    trials = "; ".join(
        f"{run}: {len(records)} trials, {f'ended after {stopped[run]}' if stopped.get(run) else 'going on'}"
        for run, records in summary.trials.items()
    )
    table = [
        "| distribution | coefficient |",
        "|---|---|",
        *(f"| `{name}` | {w:.3f} |" for name, w in weights.items()),
    ]
    lines = [
        f"**Objective:** {objective_words(summary)} over distributions, search split, nats per token: low is good.",
        f"**State:** {trials or 'no trials'}.",
        f"**Best so far:** `{winner.label}`, {number(winner.objective.get('search'))} nats per token"
        f"{_beside(summary)}.",
        "\n".join(table),
        *_warning(summary),
        *(f"[{name}]({target})" for name, target in links.items()),
        *(["Links to this machine answer while `dem-opt dashboard` runs."] if links else []),
    ]
    return "\n\n".join(lines)


def _warning(summary: Summary) -> list[str]:
    """That Optuna Dashboard may call another trial the best: it does not know estimates from scores."""
    best = summary.winner.objective.get("search")
    lower = [
        record.number
        for records in summary.trials.values()
        for record in records
        if record.is_partial and best is not None and (record.penalized or best) < best
    ]
    text = (
        "Trials that were stopped early show an estimate, and it may be lower: the best trial that is shown elsewhere"
    )
    return [f"{text} need not be the winner. A stopped trial never wins."] if lower else []


def _beside(summary: Summary) -> str:
    """The base's and the uniform average's objective, where they are known."""
    found = [
        (one.label, one.objective["search"])
        for one in summary.results
        if one.role in ("base", "uniform") and one is not summary.winner and "search" in one.objective
    ]
    return f" ({', '.join(f'{label} {number(value)}' for label, value in found)})" if found else ""


def write_report(summary: Summary, path: Path) -> None:
    """Writes the report as one HTML file, whole or not at all.

    Raises InputError where the file can't be written.
    """
    write(render(summary), path, "report")


def write(text: str, path: Path, what: str) -> None:
    """Writes a file, whole or not at all; `what` names it in the InputError where it can't be written."""
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(path, None, None, f"the {what} can't be written ({error.strerror})") from None


def render(summary: Summary) -> str:
    """The report: the answer, the search, how to reproduce it."""
    figures = all_figures(summary)
    places = ("best-so-far", "comparison", "simplex", "surrogate", "best-over-time")
    searches = [name for name in places if name in figures]
    above = f"Rival minus winner in {objective_words(summary)}, nats per token; above 0 the winner is better"
    best = f"The best by the search split: {objective_words(summary)} in nats per token"
    several = [_comparison_table(compare(summary))] if "comparison" in figures else []
    main = _template("report.html").substitute(
        answer=_answer(summary),
        coefficients=_figure("coefficients", figures),
        tables="".join(
            _html_table(final_table(summary, split), f"NLL in nats per token, {SPLITS[split]}") for split in SPLITS
        ),
        objective=_objective(summary),
        margins=_html_table(margin_table(summary), above),
        change="".join(_figure(name, figures) for name in ("change", "price") if name in figures),
        top=_html_table(top_table(summary), best, "top"),
        search="".join([*(_figure(name, figures) for name in searches), *several]),
        trials=_html_table(trial_table(summary), "Trials by search", "words"),
        vectors=_html_table(vector_table(summary), "Each distribution; left out: nats per token above the winner"),
        distributions="".join(_figure(name, figures) for name in ("worth", "vectors") if name in figures),
        cost=_html_table(cost_table(summary), "What the parts of the study took; seconds of workers and proposals")
        + _html_table(usage_table(summary), _USED)
        + _figure("utilisation", figures),
        facts=_facts(summary.facts),
    )
    return _page(f"{summary.study}: best composite", f"{summary.study}: the best composite", main, figures)


def render_comparison(summary: Summary, comparison: Comparison) -> str:
    """The comparison: regret against cost, as a figure and a table, and what came of every run."""
    figures = {"comparison": comparison_figure(comparison)}
    runs = sum(len(row.runs) for row in comparison.rows)
    main = _template("comparison.html").substitute(
        answer=f"{runs} runs of {len(comparison.rows)} algorithms over one ledger. {_answer(summary)}",
        figure=_figure("comparison", figures),
        table=_comparison_table(comparison),
        trials=_trials(summary),
        facts=_facts(summary.facts),
    )
    heading = f"{summary.study}: what its searches found for what they spent"
    return _page(f"{summary.study}: comparison", heading, main, figures)


def render_page(
    title: str,
    heading: str,
    answer: Sequence[str],
    figures: Mapping[str, go.Figure],
    tables: Sequence[tuple[str, Table]],
) -> str:
    """A page with an answer in paragraphs, figures by name, and tables with their captions."""
    main = "".join(f'<p class="answer">{escape(paragraph)}</p>' for paragraph in answer)
    main += "".join(_figure(name, figures) for name in figures)
    main += "".join(f"<section>{_html_table(table, caption)}</section>" for caption, table in tables)
    return _page(title, heading, main, figures)


def _page(title: str, heading: str, main: str, figures: Mapping[str, go.Figure]) -> str:
    return _template("page.html").substitute(
        title=escape(title),
        heading=escape(heading),
        main=main,
        figures=_embedded({name: figure.to_plotly_json() for name, figure in figures.items()}),
        plotly=get_plotlyjs(),
    )


def _template(name: str) -> Template:
    return Template(files("dem_opt.dashboards").joinpath(name).read_text(encoding="utf-8"))


def _answer(summary: Summary) -> str:
    """The winner in two sentences, and its perplexities where the objective is a mean."""
    winner, base = summary.winner, summary.results[0]
    shown = "the base alone" if winner.coefficients is None else str(winner.coefficients)
    found = [
        (words, number(winner.objective.get(split)), number(base.objective.get(split)))
        for split, words in SPLITS.items()
    ]
    scores = ", ".join(f"{nll} nats per token on the {words} (the base: {of_base})" for words, nll, of_base in found)
    if not summary.worst:
        scores += _perplexities(winner, base)
    what = objective_words(summary)
    return f"<strong>{escape(winner.label)}</strong>: {escape(shown)}.<br>{what[0].upper()}{what[1:]} {escape(scores)}."


def _perplexities(winner: ResultRow, base: ResultRow) -> str:
    """exp(mean NLL) of both on the held-out split."""
    split = "held_out"
    if split not in winner.objective or split not in base.objective:
        return ""
    found, before = exp(winner.objective[split]), exp(base.objective[split])
    return f"; perplexity on the {SPLITS[split]} {found:.2f} (the base: {before:.2f})"


def _objective(summary: Summary) -> str:
    """What the objective's column means."""
    if summary.worst:
        return "Regret on a distribution is the NLL minus that of its own fine-tune; what counts is the largest."
    return "Perplexity is exp(mean NLL)."


def _comparison_table(comparison: Comparison) -> str:
    caption = "Regret in nats per token: median and quartiles over runs; of the grid the mean over orders"
    return _html_table(comparison_table(comparison), caption)


def _trials(summary: Summary) -> str:
    return _html_table(trial_table(summary), "Trials by search", "words") + _html_table(usage_table(summary), _USED)


def _html_table(table: Table, caption: str, kind: str = "") -> str:
    head = "".join(f'<th scope="col"><span>{escape(header)}</span></th>' for header in table.headers)
    body = "".join(
        "<tr>" + "".join(_cell(text, row, column, table) for column, text in enumerate(texts)) + "</tr>"
        for row, texts in enumerate(table.rows)
    )
    return (
        f'<div class="wide {kind}" tabindex="0" role="region" aria-label="{escape(caption)}">'
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
        f'<figure><div class="plot" tabindex="0"><div id="{name}" role="img" '
        f'aria-label="{escape(words["description"])}"></div></div>'
        f"<figcaption>{escape(words['reading'])}</figcaption></figure>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    shown = [(escape(label), escape(str(value))) for label, value in facts.items()]
    return "".join(f"<dt>{label}</dt><dd><pre>{value}</pre></dd>" for label, value in shown)


def _embedded(value: object) -> str:
    """JSON that can stand in a script element: no `<`, so that no text can end it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
