"""A Summary -> tables of texts, told the same in terminal and report."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb, exp

from dem_opt.analysis.regret import Comparison, Regret, Row, compare
from dem_opt.analysis.utilization import usage_of
from dem_opt.dashboards.style import ABSENT, coefficients_text
from dem_opt.types import Margin, ResultRow, Summary

SPLITS = {"search": "search split", "held_out": "held-out split"}
"""The splits, and what a reader calls them."""

_BREAK = "\n"

GRID_DIVISIONS = 10
"""Of the grid that a report counts where none was run: steps of a tenth, the study file's default."""

MOST_MARKS = 3
"""Of how many costs a comparison's table tells regrets: the first, the last and those between."""


@dataclass(frozen=True)
class Table:
    """A table of texts.

    lowest  cells (row, column) that hold the lowest NLL, objective or perplexity of their column
    words   how many columns from the left hold words, the others numbers
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lowest: frozenset[tuple[int, int]] = frozenset()
    words: int = 1


def final_table(summary: Summary, split: str) -> Table:
    """The standings on one split: NLL of each corpus in nats per token, then the objective.

    That is the weighted mean, followed by perplexity exp(mean), or the worst regret.  Then what finding the composite
    took: evaluations, forward-equivalents (FE), seconds.  A composite that violates what is protected, on the search
    split, says by how many nats per token.
    """
    objective = ("worst regret",) if summary.worst else ("mean", "perplexity")
    headers = ("composite", *summary.weights, *objective, "evals", "FE", "seconds")
    values = [_values(result, split, summary) for result in summary.results]
    lowest = {(row, column) for column, each in enumerate(zip(*values, strict=True), 1) for row in _lowest(each)}
    rows = tuple(
        (_label(result), *_numbers(known, summary), *_costs(result))
        for result, known in zip(summary.results, values, strict=True)
    )
    return Table(headers, rows, frozenset(lowest))


def top_table(summary: Summary) -> Table:
    """The best composites of the search split with the objective on both splits, and held-out minus search."""
    rows = []
    for place, one in enumerate(summary.top, start=1):
        search, held_out = (one.objective.get(split) for split in SPLITS)
        gap = None if search is None or held_out is None else held_out - search
        shown = ABSENT if gap is None else f"{gap:+.4f}"
        rows.append(
            (str(place), coefficients_text(one.coefficients) + _over(one), number(search), number(held_out), shown)
        )
    return Table(("no.", "coefficients", "search", "held-out", "gap"), tuple(rows), words=2)


def margin_table(summary: Summary) -> Table:
    """The winner's margin over each rival in nats per token, its 95% paired interval, and what that shows."""
    headers = ("rival", *(f"{words}\n[95% interval]" for words in SPLITS.values()), "the winner is")
    rivals = dict.fromkeys(margin.rival for margin in summary.margins)
    found = {(margin.rival, margin.split): margin for margin in summary.margins}
    rows = [(rival, [found.get((rival, split)) for split in SPLITS]) for rival in rivals]
    return Table(headers, tuple((rival, *map(_interval, pair), _verdict(pair)) for rival, pair in rows))


def trial_table(summary: Summary) -> Table:
    """Each search's trials: how many were scored whole, stopped early or failed, what they took, and why it ended."""
    headers = ("search", "ended after", "failures", "whole", "stopped early", "failed", "FE", "measuring", "proposing")
    rows = []
    for run in (run for row in compare(summary).rows for run in row.runs):
        failed = [record for record in summary.trials[run.name] if record.objective is None]
        reasons = "; ".join(dict.fromkeys(record.reason or "unknown" for record in failed)) or ABSENT
        counts = (run.trials - run.partial - run.failed, run.partial, run.failed)
        spent = (f"{run.forwards:,.1f}", f"{run.measuring:.1f} s", f"{run.asking:.1f} s")
        rows.append((run.name, run.stopped or ABSENT, reasons, *map(str, counts), *spent))
    return Table(headers, tuple(rows), words=3)


def usage_table(summary: Summary) -> Table:
    """What workers did for each search's trials: seconds in all, their utilisation, tokens that were not scored."""
    headers = ("search", "measured", "merging", "scoring", "waiting", "proposing", "utilisation", "unscored", "batch")
    rows = []
    for run, records in summary.trials.items():
        used = usage_of(records)
        seconds = (f"{spent:.1f} s" for spent in (used.merging, used.scoring, used.waiting, used.proposing))
        batch = f"{used.batch:,}" if used.batch else ABSENT
        rows.append((run, str(used.trials), *seconds, _share(used.utilisation), _share(used.unscored), batch))
    return Table(headers, tuple(rows))


def cost_table(summary: Summary) -> Table:
    """What the study's parts took: forward-equivalents and seconds; and the grid of tenths, where it was not run.

    Its seconds are those that the shown searches took for a forward-equivalent, times its points.
    """
    rows = [_baseline_cost(summary)]
    rates = []
    for run, records in summary.trials.items():
        used = usage_of(records)
        forwards, spent = sum(record.forwards for record in records), used.merging + used.scoring
        rows.append((run, f"{len(records):,}", f"{forwards:,.1f}", f"{spent + used.proposing:,.1f}"))
        measured = sum(record.forwards for record in records if record.measured)
        rates += [spent / measured] if measured else []
    if "grid" not in summary.trials:
        points = comb(GRID_DIVISIONS + len(summary.distributions) - 1, len(summary.distributions) - 1)
        seconds = f"about {points * sum(rates) / len(rates):,.0f}" if rates else ABSENT
        rows.append((f"a grid of {GRID_DIVISIONS} divisions, not run", f"{points:,}", f"{points:,}.0", seconds))
    return Table(("part", "composites", "FE", "seconds"), tuple(rows))


def _baseline_cost(summary: Summary) -> tuple[str, ...]:
    """Composites that no search asked for: base, fine-tunes, uniform average, the winner without one distribution."""
    found = [*(one for one in summary.results if one.role != "best"), *summary.left_out]
    forwards, seconds = sum(one.forwards for one in found), sum(one.seconds for one in found)
    return "baselines and leave-one-out", f"{len(found):,}", f"{forwards:,.1f}", f"{seconds:,.1f}"


def vector_table(summary: Summary) -> Table:
    """Each distribution: its coefficient, its vector's norm, and what leaving it out costs in the objective."""
    winner, vectors = summary.winner, summary.vectors
    weights = {} if winner.coefficients is None else winner.coefficients.weights
    norms = dict(zip(vectors.names, vectors.norms, strict=True)) if vectors else {}
    without = {one.label: one for one in summary.left_out}
    rows = []
    for name in summary.distributions:
        norm = f"{norms[name]:.4g}" if name in norms else ABSENT
        gaps = [_gap(without.get(name), winner, split) for split in SPLITS]
        rows.append((name, f"{weights.get(name, 0.0):.3f}", norm, *gaps))
    headers = ("distribution", "coefficient", "norm", *(f"left out,\n{words}" for words in SPLITS.values()))
    return Table(headers, tuple(rows))


def _gap(one: ResultRow | None, winner: ResultRow, split: str) -> str:
    """Objective of a standing minus the winner's, signed."""
    if one is None or split not in one.objective or split not in winner.objective:
        return ABSENT
    return f"{one.objective[split] - winner.objective[split]:+.4f}"


def comparison_table(comparison: Comparison) -> Table:
    """Regret in nats per token at some costs, by algorithm: the median over runs, and below it the quartiles.

    Of the grid it is the mean over all orders of its points.  FE is what all runs spent together; proposing is the
    median over trials.
    """
    count = len(comparison.marks)
    places = sorted({i * (count - 1) // (MOST_MARKS - 1) for i in range(MOST_MARKS)}) if count else []
    marks = [f"at {comparison.marks[place]:,.0f} FE" for place in places]
    headers = ("algorithm", "runs", "FE in all", *marks, "proposing")
    rows = tuple(
        (
            row.algorithm + (" (mean)" if row.is_expected else ""),
            str(len(row.runs)),
            f"{row.forwards:,.1f}",
            *(_regret(row.regrets[place]) for place in places),
            _ask(row),
        )
        for row in comparison.rows
    )
    return Table(headers, rows)


def markdown(table: Table) -> str:
    """A table for notes; texts stay texts."""
    rows = [table.headers, ("---",) * len(table.headers), *table.rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows)


def _plain(text: str) -> str:
    return re.sub(r"[|<>\[\]*_`\\]", lambda found: f"&#{ord(found[0])};", text.replace("\n", " "))


def number(value: float | None) -> str:
    """Nats per token, to a ten-thousandth."""
    return ABSENT if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1%}"


def _values(result: ResultRow, split: str, summary: Summary) -> list[float | None]:
    """What is compared: NLL of each corpus, the objective, and of a mean its perplexity; None where not scored."""
    scores, objective = result.scores.get(split, {}), result.objective.get(split)
    values = [*(scores[name].nll if name in scores else None for name in summary.weights), objective]
    return values if summary.worst else [*values, None if objective is None else exp(objective)]


def _numbers(values: Sequence[float | None], summary: Summary) -> list[str]:
    if summary.worst:
        return [number(value) for value in values]
    *nll, perplexity = values
    return [*map(number, nll), ABSENT if perplexity is None else f"{perplexity:.3f}"]


def _costs(result: ResultRow) -> tuple[str, str, str]:
    return f"{result.evaluations:,}", f"{result.forwards:,.1f}", f"{result.seconds:.1f}"


def _label(result: ResultRow) -> str:
    return result.label + _over(result)


def _over(result: ResultRow) -> str:
    return f" (protect: +{result.violation:.3f} over)" if result.violation else ""


def _lowest(values: Iterable[float | None]) -> list[int]:
    """Rows of the lowest value, among at least two."""
    known = {row: value for row, value in enumerate(values) if value is not None}
    return [row for row, value in known.items() if value == min(known.values())] if len(known) > 1 else []


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
    short = {split.removesuffix(" split"): word for split, word in words.items()}
    return ";\n".join(f"{split}:{' ' if len(word) < 7 else _BREAK}{word}" for split, word in short.items())


def _regret(regret: Regret | None) -> str:
    if regret is None:
        return ABSENT
    quartiles = "" if regret.low is None or regret.high is None else f"\n[{regret.low:.4f}, {regret.high:.4f}]"
    return f"{regret.median:.4f}{quartiles}"


def _ask(row: Row) -> str:
    return f"{row.ask:.3f} s"
