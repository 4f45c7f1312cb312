"""Offline pages: the report of a study, or the comparison of its searches, as one HTML file without network access."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from dem_opt.analysis.regret import Comparison, compare_searches
from dem_opt.atomic import write_text
from dem_opt.dashboards.figures import all_figures
from dem_opt.dashboards.fronts import front_table, front_title, winner_lines
from dem_opt.dashboards.regret_plots import comparison_figure
from dem_opt.dashboards.tables import (
    SPLIT_NAMES,
    Table,
    comparison_table,
    cost_table,
    final_table,
    margin_table,
    number,
    overlap_table,
    rival_table,
    top_table,
    trial_table,
    usage_table,
    vector_table,
)
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
from dem_opt.data.overlap import Overlap
from dem_opt.errors import InputError
from dem_opt.evaluation.objective import mean_nll
from dem_opt.types import BITS_PER_BYTE, HELD_OUT, SEARCH, Summary, perplexity

_POLICY = (
    b"""content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:\""""
)
"""Part of the head of every page, those of earlier releases included, by which it is known from a user's file."""


def study_note(summary: Summary, links: Mapping[str, str]) -> str:
    """Describe the study in Markdown, for the notes in both dashboards.

    Args:
        summary: The study.
        links: Addresses by link text.
    """
    winner = summary.winner
    weights = {} if winner.coefficients is None else winner.coefficients.weights
    stopped = summary.stopped or {}
    runs = "; ".join(
        f"{run}: {len(records)} trials, {f'ended after {stopped[run]}' if stopped.get(run) else 'running'}"
        for run, records in summary.trials.items()
    )
    table = [
        f"| distribution | {'global coefficient' if winner.groups else 'coefficient'} |",
        "|---|---|",
        *(f"| `{name}` | {weight:.3f} |" for name, weight in weights.items()),
    ]
    paragraphs = [
        f"**Objective:** {objective_name(summary)} over distributions on the search split, in {summary.unit_words}; "
        "lower is better.",
        f"**State:** {runs or 'no trials'}.",
        f"**Best so far:** `{winner.label}`, {number(winner.objective.get(SEARCH))} {summary.unit_words}"
        f"{_baseline_objectives(summary)}.",
        "\n".join(table),
        *winner_lines(summary.front),
        *group_lines(summary),
        *rival_lines(summary),
        *total_lines(summary),
        *rounding_lines(summary),
        *(f"[{text}]({address})" for text, address in links.items()),
        *(["Links to this machine work while `dem-opt dashboard` runs."] if links else []),
    ]
    return "\n\n".join(paragraphs)


def _baseline_objectives(summary: Summary) -> str:
    """List the objectives of base and uniform average in parentheses, as far as they are known."""
    baselines = [
        f"{result.label} {number(result.objective[SEARCH])}"
        for result in summary.results
        if result.role in ("base", "uniform") and result is not summary.winner and SEARCH in result.objective
    ]
    return f" ({', '.join(baselines)})" if baselines else ""


def write_report(summary: Summary, path: Path, overlap: Overlap | None = None) -> None:
    """Write the report as one HTML file, atomically; an earlier report is replaced.

    Raises:
        InputError: The file cannot be written, or is there and no report.
    """
    write_page(render(summary, overlap), path, "report")


def write_page(text: str, path: Path, what: str) -> None:
    """Write a page atomically; an earlier page is replaced.  `what` names it in errors.

    Raises:
        InputError: The file cannot be written, or is there and no page of dem-opt.
    """
    if path.exists() and not _is_page(path):
        raise InputError(path, None, None, "exists and is no report of dem-opt: name another file")
    write(text, path, what)


def _is_page(path: Path) -> bool:
    """A file has the head of the pages that are written here, by this release or an earlier one."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return _POLICY in stream.read(1000)


def write(text: str, path: Path, what: str) -> None:
    """Write a text file atomically; `what` names it in the InputError raised where that fails."""
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(path, None, None, f"the {what} can't be written ({error.strerror})") from None


def render(summary: Summary, overlap: Overlap | None = None) -> str:
    """Render the report: the winner, how it compares, the search, distributions, cost, how to reproduce it.

    Args:
        summary: The study.
        overlap: What `dem-opt check --overlap` measured of its data, where it was asked for.
    """
    figures = all_figures(summary)
    objective = objective_name(summary)
    has_comparison = "comparison" in figures
    main = _template("report.html").substitute(
        answer=_answer(summary),
        coefficients=_figures(("coefficients", "groups"), figures),
        tables="".join(
            _html_table(final_table(summary, split), f"{loss_title(summary)}, {words}")
            for split, words in SPLIT_NAMES.items()
        ),
        objective=_explain_objective(summary),
        unit=summary.unit_words,
        margins=_html_table(
            margin_table(summary),
            f"Rival minus winner: {objective} in {summary.unit_words}; above 0, the winner is better; "
            f"{sampled_note(summary)}",
        ),
        rivals=_rivals(summary),
        change=_figures(("change", "price"), figures),
        top=_html_table(
            top_table(summary), f"Best composites by the search split: {objective} in {summary.unit_words}", "top"
        ),
        search=_front(summary)
        + _figures(
            ("pareto", "hypervolume", "best-so-far", "comparison", "simplex", "surrogate", "best-over-time"), figures
        )
        + (_comparison_table(compare_searches(summary)) if has_comparison else ""),
        trials=_trial_table(summary),
        vectors=_html_table(
            vector_table(summary), f"Distributions; without it: change of the objective in {summary.unit_words}"
        ),
        distributions=_figures(("worth", "vectors"), figures),
        overlap=_overlap(overlap) if overlap is not None else "",
        cost=_html_table(
            cost_table(summary),
            "Cost by part since the study began: forward-equivalents, seconds of workers and proposals",
        )
        + _usage_table(summary)
        + _figure("utilisation", figures),
        facts=_facts(summary.facts),
    )
    return _page(f"{summary.study}: best composite", f"{summary.study}: the best composite", main, figures)


def render_comparison(summary: Summary, comparison: Comparison) -> str:
    """Render the comparison of searches: regret against cost as a figure and a table, and the trials of every run."""
    figures = {"comparison": comparison_figure(comparison)}
    runs = sum(len(row.runs) for row in comparison.rows)
    main = _template("comparison.html").substitute(
        answer=f"{runs} runs of {len(comparison.rows)} algorithms over one ledger. {_answer(summary)}",
        figure=_figure("comparison", figures),
        table=_comparison_table(comparison),
        trials=_trial_table(summary) + _usage_table(summary),
        facts=_facts(summary.facts),
    )
    heading = f"{summary.study}: comparison of search algorithms"
    return _page(f"{summary.study}: comparison", heading, main, figures)


def render_page(
    title: str,
    heading: str,
    answer: Sequence[str],
    figures: Mapping[str, go.Figure],
    tables: Sequence[tuple[str, Table]],
) -> str:
    """Render a page of paragraphs, figures by name, and tables with their captions."""
    main = "".join(f'<p class="answer">{escape(paragraph)}</p>' for paragraph in answer)
    main += _figures(figures, figures)
    main += "".join(f"<section>{_html_table(table, caption)}</section>" for caption, table in tables)
    return _page(title, heading, main, figures)


def _page(title: str, heading: str, main: str, figures: Mapping[str, go.Figure]) -> str:
    return _template("page.html").substitute(
        title=escape(title),
        heading=escape(heading),
        main=main,
        figures=_embedded_json({name: figure.to_plotly_json() for name, figure in figures.items()}),
        plotly=get_plotlyjs(),
    )


def _template(name: str) -> Template:
    return Template(files("dem_opt.dashboards").joinpath(name).read_text(encoding="utf-8"))


def _answer(summary: Summary) -> str:
    """Name the winner, its coefficients, and its objective beside the base's on both splits."""
    winner, base = summary.winner, summary.results[0]
    coefficients = winner_text(winner)
    scores = ", ".join(
        f"{number(winner.objective.get(split))} {summary.unit_words} on the {words} "
        f"(base: {number(base.objective.get(split))})"
        for split, words in SPLIT_NAMES.items()
    )
    if summary.is_mean:
        scores += _other_means(summary)
    objective = objective_name(summary)
    sentence = f"{objective[0].upper()}{objective[1:]} {escape(scores)}."
    said = [
        *winner_lines(summary.front),
        *group_lines(summary),
        *rival_lines(summary),
        *total_lines(summary),
        *rounding_lines(summary),
        *precision_lines(summary),
        cost_line(summary),
    ]
    lines = [sentence, *map(escape, filter(None, said))]
    return f"<strong>{escape(winner.label)}</strong>: {escape(coefficients)}.<br>{'<br>'.join(lines)}"


def _other_means(summary: Summary) -> str:
    """Return perplexity and bits per byte of winner and base on the held-out split, as far as they are known."""
    pair = [result.scores.get(HELD_OUT, {}) for result in (summary.winner, summary.results[0])]
    if any(HELD_OUT not in result.objective for result in (summary.winner, summary.results[0])):
        return ""
    of_winner, of_base = (perplexity(mean_nll(scores, summary.weights)) for scores in pair)
    words = f"; perplexity {of_winner:.2f} on the {SPLIT_NAMES[HELD_OUT]} (base: {of_base:.2f})"
    if summary.unit == BITS_PER_BYTE or not all(score.bytes for scores in pair for score in scores.values()):
        return words
    bits, of_base = (mean_nll(scores, summary.weights, BITS_PER_BYTE) for scores in pair)
    return f"{words}, {bits:.4f} bits per byte (base: {of_base:.4f})"


def _explain_objective(summary: Summary) -> str:
    if summary.function:
        return f"The objective is {escape(summary.function)}, a function of the scores; lower is better."
    if summary.worst:
        return (
            "Regret on a distribution is the NLL minus that of its own fine-tune; the objective is the largest regret."
        )
    return (
        "Perplexity is exp(mean NLL), with NLL in nats per token; bits per byte are the mean over corpora of "
        "nats / (ln 2 x UTF-8 bytes of the scored text)."
    )


def _comparison_table(comparison: Comparison) -> str:
    caption = f"{comparison.title} in {comparison.unit}: median [quartiles] over runs"
    if any(row.is_expected for row in comparison.rows):
        caption += "; grid: mean over all orders of its points"
    return _html_table(comparison_table(comparison), caption)


def _front(summary: Summary) -> str:
    """Return the table of the front of a study that searches for one."""
    return _html_table(front_table(summary.front), front_title(summary.front)) if summary.front else ""


def _rivals(summary: Summary) -> str:
    """Return the table of placebos and trained models, where the winner was compared with any."""
    if not summary.rivals:
        return ""
    return _html_table(rival_table(summary), "Rivals: the same search over placebos, training on the search split")


def _trial_table(summary: Summary) -> str:
    caption = "Trials by run. Scored: on all windows; measuring: worker seconds of merging and scoring"
    return _html_table(trial_table(summary), caption, "words")


def _usage_table(summary: Summary) -> str:
    caption = (
        "Worker time by run, for trials that needed a forward pass. Utilization: from the second trial on; unscored "
        "tokens: padding, prompts, first tokens; batch tokens: the limit where memory allowed less than configured"
    )
    return _html_table(usage_table(summary), caption)


def _overlap(overlap: Overlap) -> str:
    """Return the section on overlap: a table of what overlaps, and what is not known."""
    table = overlap_table(overlap)
    without_training = ", ".join(overlap.without_training)
    lines = [
        f"Measured {overlap.measured}, in tokens of the base: 13-grams that stand in both, and documents of which "
        "80% of the 5-grams of both are common (near-duplicates).",
        *([] if table.rows else ["Nothing overlaps."]),
        *([f"Training data that the study file does not name: {without_training}."] if without_training else []),
    ]
    body = _html_table(table, "Documents that stand in training data or in another split") if table.rows else ""
    return f"<section><h2>Overlap</h2>{body}<p>{escape(' '.join(lines))}</p></section>"


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
    content = f"<strong>{escape(text)}</strong>" if (row, column) in table.lowest else escape(text)
    return f"<td>{content}</td>"


def _figures(names: Iterable[str], figures: Mapping[str, go.Figure]) -> str:
    """Return the elements of those figures that were drawn."""
    return "".join(_figure(name, figures) for name in names if name in figures)


def _figure(name: str, figures: Mapping[str, go.Figure]) -> str:
    """Return the element that the page's script draws a figure into, with its text alternative and caption."""
    texts = figures[name].layout.meta
    return (
        f'<figure><div class="plot" tabindex="0"><div id="{name}" role="img" '
        f'aria-label="{escape(texts["description"])}"></div></div>'
        f"<figcaption>{escape(texts['reading'])}</figcaption></figure>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    pairs = [(escape(name), escape(str(value))) for name, value in facts.items()]
    return "".join(f"<dt>{name}</dt><dd><pre>{value}</pre></dd>" for name, value in pairs)


def _embedded_json(value: object) -> str:
    """Encode as JSON for a script element: without `<`, so that no text can close the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
