"""A Summary as tables of text, which the terminal, the report and the notes in both dashboards share."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb

from dem_opt.analysis.regret import Comparison, Regret, compare
from dem_opt.analysis.rivals import RIVALS
from dem_opt.analysis.utilization import usage_of
from dem_opt.dashboards.words import ABSENT, coefficients_text, margin_text
from dem_opt.data.overlap import Overlap, OverlapRow
from dem_opt.evaluation.objective import mean_nll
from dem_opt.types import BITS_PER_BYTE, HELD_OUT, SEARCH, Margin, ResultRow, Summary, perplexity

SPLIT_NAMES = {SEARCH: "search split", HELD_OUT: "held-out split"}
"""Each split, as readers know it."""

GRID_DIVISIONS = 10
"""Divisions of the grid whose cost a report estimates where none was run: the study file's default."""

MAX_MARKS = 3
"""Costs at which a comparison lists regret: the first, the last and those between."""


@dataclass(frozen=True)
class Table:
    """A table of text.

    lowest  cells (row, column) with the lowest NLL, objective or perplexity of their column
    words   number of leading columns that hold words; the others hold numbers
    groups  the other columns by group, the most important first: a narrow screen shows the groups that fit;
            none where they count in their order
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lowest: frozenset[tuple[int, int]] = frozenset()
    words: int = 1
    groups: tuple[tuple[int, ...], ...] = ()


PART_NAMES = {"train": "training data", **SPLIT_NAMES}
"""Each part of a distribution's data, as readers know it."""


def overlap_table(overlap: Overlap) -> Table:
    """List the overlaps of corpora with training data and with each other, the largest first; none where none is."""
    rows = sorted((row for row in overlap.rows if row.sharing or row.near_duplicates), key=_overlap_order)
    return Table(
        ("documents", "stand in", "number", "share a\n13-gram", "13-grams\nshared", "near-\nduplicates", "example"),
        tuple(
            (
                f"{row.corpus}, {SPLIT_NAMES.get(row.split, row.split)}",
                f"{row.source}, {PART_NAMES.get(row.part, row.part)}",
                f"{row.documents:,}",
                f"{row.sharing:,}",
                f"{row.share:.1%}",
                f"{row.near_duplicates:,}",
                row.example,
            )
            for row in rows
        ),
        words=2,
        groups=((4,), (5,), (3,), (2,), (6,)),
    )


def _overlap_order(row: OverlapRow) -> tuple[bool, float]:
    return not row.is_large, -row.share


def final_table(summary: Summary, split: str) -> Table:
    """List the results on one split: NLL of each corpus in the objective's unit, the objective, and the cost.

    The objective is the weighted mean NLL, followed by other forms of it, or the largest regret.  The cost of
    finding the composite is in evaluations, forward-equivalents (FE) and seconds.  A composite that violates a
    constraint on the search split is marked with its violation.
    """
    mean = "mean" if _weighs_equally(summary) else "weighted\nmean"
    others = _other_means(summary, split)
    objective = (mean, *others) if summary.is_mean else ("largest regret" if summary.worst else "objective",)
    corpora = [_corpus_header(name, summary) for name in summary.weights]
    headers = ("composite", *corpora, *objective, "evals", "FE", "seconds")
    # The sum of all vectors is scored on the held-out split only where it is good on the search split.
    results = [result for result in summary.results if result.role != "sum" or split in result.objective]
    values = [_measurements(result, split, summary, others) for result in results]
    lowest = {(row, column) for column, cells in enumerate(zip(*values, strict=True), 1) for row in _lowest(cells)}
    rows = tuple(
        (result.label + _violation(result), *_format_measurements(measured, others), *_costs(result))
        for result, measured in zip(results, values, strict=True)
    )
    first = 1 + len(corpora)
    last = len(headers) - 1
    further = ((first + place,) for place in range(1, 1 + len(others)))
    groups = ((first,), tuple(range(1, first)), (last - 1,), *further, (last - 2,), (last,))
    return Table(headers, rows, frozenset(lowest), groups=groups)


def _other_means(summary: Summary, split: str) -> tuple[str, ...]:
    """Name the forms in which a mean is shown beside the objective; bits per byte where all bytes are known."""
    if not summary.is_mean:
        return ()
    if summary.unit == BITS_PER_BYTE:
        return ("NLL", "perplexity")
    scores = [result.scores.get(split, {}).get(name) for result in summary.results for name in summary.weights]
    return ("perplexity", "bits per\nbyte") if all(score.bytes for score in scores if score) else ("perplexity",)


def _mean(form: str, result: ResultRow, split: str, summary: Summary) -> float | None:
    """Return a mean in one of the forms of `_other_means`; None where the objective is not known."""
    if split not in result.objective:
        return None
    scores = result.scores[split]
    if form.startswith("bits"):
        return mean_nll(scores, summary.weights, BITS_PER_BYTE)
    nll = mean_nll(scores, summary.weights)
    return perplexity(nll) if form == "perplexity" else nll


def _weighs_equally(summary: Summary) -> bool:
    """Return whether all corpora of the objective have the same weight."""
    return len({weight for weight in summary.weights.values() if weight}) == 1


def _corpus_header(name: str, summary: Summary) -> str:
    """Return a corpus's name, with its weight where a mean does not count all alike."""
    weight = summary.weights[name]
    if summary.function or (weight and (summary.worst or _weighs_equally(summary))):
        return name
    return f"{name}\nx {weight:.3g}"


def top_table(summary: Summary) -> Table:
    """List the best composites by the search split: objective on both splits and the gap between them."""
    rows = []
    for rank, result in enumerate(summary.top, start=1):
        search, held_out = (result.objective.get(split) for split in SPLIT_NAMES)
        gap = ABSENT if search is None or held_out is None else f"{held_out - search:+.4f}"
        coefficients = coefficients_text(result.coefficients) + _violation(result)
        rows.append((str(rank), coefficients, number(search), number(held_out), gap))
    return Table(("no.", "coefficients", "search", "held-out", "gap"), tuple(rows), words=2)


def margin_table(summary: Summary) -> Table:
    """List the winner's margin over each rival in the objective's unit, its 95% paired interval, and the conclusion."""
    headers = ("rival", *(f"{words}\n[95% interval]" for words in SPLIT_NAMES.values()), "winner")
    margins = {(margin.rival, margin.split): margin for margin in summary.margins}
    rows = []
    for rival in dict.fromkeys(margin.rival for margin in summary.margins):
        by_split = [margins.get((rival, split)) for split in SPLIT_NAMES]
        rows.append((rival, *map(_interval, by_split), _conclusion(by_split)))
    return Table(headers, tuple(rows), groups=((3,), (2,), (1,)))


def rival_table(summary: Summary) -> Table:
    """List the winner and its rivals: objective on both splits, rival minus winner held out, and the cost."""
    winner = summary.winner
    objective = [number(winner.objective.get(split)) for split in SPLIT_NAMES]
    trials = len(summary.trials.get(winner.run, ()))
    rows = [(f"winner: {winner.label}", *objective, ABSENT, ABSENT, f"{trials} trials")]
    for rival in summary.rivals:
        objective = [number(rival.objective.get(split)) for split in SPLIT_NAMES]
        effort = f"{rival.trials} trials" if rival.is_placebo else f"{rival.steps} steps"
        margin = _interval(rival.held_out), _conclusion([rival.held_out])
        rows.append((RIVALS[rival.kind], *objective, *margin, f"{effort}, {rival.flops:.2e} FLOPs"))
    headers = ("model", "search", "held-out", "held-out minus winner\n[95% interval]", "winner", "cost")
    return Table(headers, tuple(rows), groups=((2,), (3,), (4,), (1,), (5,)))


def trial_table(summary: Summary) -> Table:
    """List each run's trials: how many were scored on all windows, on some, or failed, their cost, their end."""
    headers = (
        *("run", "ended after", "failures", "on all windows", "on some", "failed"),
        *("FE", "measuring", "proposing"),
    )
    rows = []
    for run in (run for row in compare(summary).rows for run in row.runs):
        failed = [record for record in summary.trials[run.name] if record.objective is None]
        reasons = "; ".join(dict.fromkeys(record.reason or "unknown" for record in failed)) or ABSENT
        counts = (run.trials - run.partial - run.failed, run.partial, run.failed)
        costs = (f"{run.forwards:,.1f}", f"{run.measuring:.1f} s", f"{run.asking:.1f} s")
        rows.append((run.name, run.stopped or ABSENT, reasons, *map(str, counts), *costs))
    return Table(headers, tuple(rows), words=3)


def usage_table(summary: Summary) -> Table:
    """List how workers spent their time on each run's trials, their utilization, and tokens without a score."""
    headers = (
        *("run", "trials", "merging", "scoring", "idle", "proposing"),
        *("utilization", "unscored tokens", "batch tokens"),
    )
    rows = []
    for run, records in summary.trials.items():
        usage = usage_of(records)
        seconds = (f"{spent:.1f} s" for spent in (usage.merging, usage.scoring, usage.waiting, usage.proposing))
        batch = f"{usage.batch:,}" if usage.batch else ABSENT
        rows.append((run, str(usage.trials), *seconds, _percent(usage.utilisation), _percent(usage.unscored), batch))
    return Table(headers, tuple(rows))


def cost_table(summary: Summary) -> Table:
    """List what each part of the study has cost in forward-equivalents and seconds, its total, and a grid not run.

    The seconds of a run include those of its proposals.  The grid's are its number of points times the mean seconds of
    the runs for a forward-equivalent.
    """
    rows, rates = [], []
    proposing = {run: usage_of(records).proposing for run, records in summary.trials.items()}
    for cost in summary.costs:
        seconds = cost.seconds + proposing.get(cost.part, 0.0)
        rows.append((cost.part, f"{cost.evaluations:,}", f"{cost.forwards:,.1f}", f"{seconds:,.1f}"))
        rates += [cost.seconds / cost.forwards] if cost.part in summary.trials and cost.forwards else []
    evaluations = sum(cost.evaluations for cost in summary.costs)
    total = sum(cost.seconds for cost in summary.costs) + sum(proposing.values())
    rows.append(("the whole study", f"{evaluations:,}", f"{summary.forwards:,.1f}", f"{total:,.1f}"))
    if "grid" not in summary.trials:
        # Points of a lattice with d divisions on the simplex of K distributions: C(d + K - 1, K - 1).
        points = comb(GRID_DIVISIONS + len(summary.distributions) - 1, len(summary.distributions) - 1)
        estimate = f"about {points * sum(rates) / len(rates):,.0f}" if rates else ABSENT
        rows.append((f"grid of {GRID_DIVISIONS} divisions (not run)", f"{points:,}", f"{points:,.1f}", estimate))
    return Table(("part", "evaluations", "FE", "seconds"), tuple(rows))


def vector_table(summary: Summary) -> Table:
    """List each distribution's coefficient, the norm of its vector, and the change of the objective without it."""
    winner, vectors = summary.global_winner, summary.vectors
    weights = {} if winner.coefficients is None else winner.coefficients.weights
    norms = dict(zip(vectors.names, vectors.norms, strict=True)) if vectors else {}
    left_out = {result.label: result for result in summary.left_out}
    rows = []
    for name in summary.distributions:
        norm = f"{norms[name]:.4g}" if name in norms else ABSENT
        changes = [_objective_change(left_out.get(name), winner, split) for split in SPLIT_NAMES]
        rows.append((name, f"{weights.get(name, 0.0):.3f}", norm, *changes))
    headers = ("distribution", "coefficient", "norm", *(f"without it,\n{words}" for words in SPLIT_NAMES.values()))
    return Table(headers, tuple(rows))


def _objective_change(result: ResultRow | None, winner: ResultRow, split: str) -> str:
    if result is None or split not in result.objective or split not in winner.objective:
        return ABSENT
    return f"{result.objective[split] - winner.objective[split]:+.4f}"


def comparison_table(comparison: Comparison) -> Table:
    """List regret at some costs by algorithm: the median over runs and, below it, the quartiles.

    For the grid it is the mean over all orders of its points.  FE are those of all runs; the seconds of proposing a
    trial are the median over trials.
    """
    count = len(comparison.marks)
    indices = sorted({i * (count - 1) // (MAX_MARKS - 1) for i in range(MAX_MARKS)}) if count else []
    marks = [f"at {comparison.marks[index]:,.0f} FE" for index in indices]
    rows = tuple(
        (
            row.algorithm + (" (mean over orders)" if row.is_expected else ""),
            str(len(row.runs)),
            f"{row.forwards:,.1f}",
            *(_regret(row.regrets[index]) for index in indices),
            f"{row.ask:.3f} s",
        )
        for row in comparison.rows
    )
    return Table(("algorithm", "runs", "total FE", *marks, "proposing"), rows)


def markdown(table: Table) -> str:
    """Format a table in Markdown, with every special character escaped."""
    rows = [table.headers, ("---",) * len(table.headers), *table.rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows)


def _plain(text: str) -> str:
    return re.sub(r"[|<>\[\]*_`\\]", lambda match: f"&#{ord(match[0])};", text.replace("\n", " "))


def number(value: float | None) -> str:
    """Format a loss with four decimals."""
    return ABSENT if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1%}"


def _measurements(result: ResultRow, split: str, summary: Summary, others: Sequence[str]) -> list[float | None]:
    """Return NLL of each corpus, the objective and other forms of a mean; None where not scored."""
    scores = result.scores.get(split, {})
    losses = (scores[name].loss(summary.unit) if name in scores else None for name in summary.weights)
    return [*losses, result.objective.get(split), *(_mean(form, result, split, summary) for form in others)]


def _format_measurements(values: Sequence[float | None], others: Sequence[str]) -> list[str]:
    first = len(values) - len(others)
    means = zip(others, values[first:], strict=True)
    return [
        *map(number, values[:first]),
        *(f"{value:.3f}" if form == "perplexity" and value is not None else number(value) for form, value in means),
    ]


def _costs(result: ResultRow) -> tuple[str, str, str]:
    return f"{result.evaluations:,}", f"{result.forwards:,.1f}", f"{result.seconds:.1f}"


def _violation(result: ResultRow) -> str:
    return f" (violation {result.violation:.3f})" if result.violation else ""


def _lowest(values: Iterable[float | None]) -> list[int]:
    """Return the rows with the lowest value, if at least two rows have one."""
    measured = {row: value for row, value in enumerate(values) if value is not None}
    return [row for row, value in measured.items() if value == min(measured.values())] if len(measured) > 1 else []


def _interval(margin: Margin | None) -> str:
    return ABSENT if margin is None else margin_text(margin)


def _conclusion(margins: Sequence[Margin | None]) -> str:
    """State whether the winner is better: once where the splits agree, else for each split on a line of its own."""
    words = {margin.split: _significance(margin) for margin in margins if margin is not None}
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    lines = (f"{split.replace('_', '-')}: {word}" for split, word in words.items())
    return ";\n".join(line.replace(": not ", ":\nnot ") for line in lines)


def _significance(margin: Margin) -> str:
    """Compare the 95% interval of rival minus winner with 0."""
    return "better" if margin.low > 0 else "worse" if margin.high < 0 else "not significant"


def _regret(regret: Regret | None) -> str:
    if regret is None:
        return ABSENT
    quartiles = "" if regret.low is None or regret.high is None else f"\n[{regret.low:.4f}, {regret.high:.4f}]"
    return f"{regret.median:.4f}{quartiles}"
