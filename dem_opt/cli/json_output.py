"""Answers of --json as plain data; NLL in nats per token."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dem_opt.grouping import GroupedCoefficients
from dem_opt.simplex import Coefficients

if TYPE_CHECKING:
    from dem_opt.analysis.mixing_cost import MixingComparison
    from dem_opt.analysis.mixture_proposal import MixtureProposal
    from dem_opt.analysis.regret import Comparison
    from dem_opt.analysis.task_scores import TaskTable
    from dem_opt.export.writer import Export
    from dem_opt.grouping import GroupResult
    from dem_opt.pareto import Front
    from dem_opt.types import Cost, Margin, ResultRow, Rival, Score, Summary, TotalPrice, TrialRecord
    from dem_opt.workflows.check import Findings


def of_findings(findings: "Findings") -> dict[str, Any]:
    """The findings of a check: bytes, tokens and seconds."""
    plan = findings.plan
    sums = {
        "needed": plan.needed,
        "fitting": plan.fitting,
        "gradients_fit": plan.gradients_fit,
        "memory": asdict(plan.memory) | {"peak": plan.memory.peak, "gradient_peak": plan.memory.gradient_peak},
        "work": asdict(plan.work) | {"tokens": plan.work.tokens},
    }
    return asdict(findings) | {"plan": asdict(plan) | sums, "unhashed": findings.unhashed}


def of_score(score: "Score") -> dict[str, Any]:
    """A score; a perplexity beyond the range of a float is null, and so are bytes that are not known."""
    perplexity = score.perplexity
    return {
        "nll": score.nll,
        "perplexity": perplexity if isfinite(perplexity) else None,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "bytes": score.bytes,
    }


def of_scores(scores: Mapping[str, Mapping[str, "Score"]]) -> dict[str, Any]:
    """Scores by split and corpus."""
    return {split: {name: of_score(score) for name, score in by_name.items()} for split, by_name in scores.items()}


def of_objective(row: "ResultRow") -> dict[str, Any]:
    """The objective by split, and the scores that it is made from."""
    return {"objective": dict(row.objective), "scores": of_scores(row.scores)}


def of_export(
    out: Path, dtype: str | None, export: "Export", coefficients: Coefficients | GroupedCoefficients
) -> dict[str, Any]:
    """A written folder; `coefficients` are those of the distributions, the base has the rest."""
    return {
        "path": str(out),
        "content": export.content,
        "dtype": dtype,
        "rank": export.rank,
        "coefficients": coefficients.weights,
        "objective": {},
        "scores": {},
    }


def of_summary(summary: "Summary") -> dict[str, Any]:
    """The results of a study.

    `forward_equivalents` are passes over all windows of the search split; `usage` has seconds, and shares from 0 to 1.
    `cost` is what the study has spent since it began, everything included.  `rounding` is the error of the uniform
    average in the base's dtype, by its distance from the base; null where composites are rounded stochastically.
    """
    from dem_opt.analysis.utilization import usage_of

    return {
        "study": summary.study,
        "objective": summary.function or ("largest regret" if summary.worst else "mean"),
        "unit": summary.unit_words,
        "weights": dict(summary.weights),
        "winner": summary.winner.label,
        "results": [_of_row(row) for row in summary.results],
        "margins": [_of_margin(margin) for margin in summary.margins],
        "top": [_of_row(row) for row in summary.top],
        "trials": {run: len(records) for run, records in summary.trials.items()},
        "stopped_early": {run: _count(records, "stopped") for run, records in summary.trials.items()},
        "probes": {run: _count(records, "probe") for run, records in summary.trials.items()},
        "precision": summary.precision and asdict(summary.precision) | {"detectable": _detectable(summary)},
        "stop_reasons": dict(summary.stopped or {}),
        "cost": {"forward_equivalents": summary.forwards, "parts": [_of_cost(cost) for cost in summary.costs]},
        "usage": {run: asdict(usage_of(records)) for run, records in summary.trials.items()},
        "rivals": [_of_rival(rival) for rival in summary.rivals],
        **({"total_price": _of_price(summary.total_price)} if summary.total_price else {}),
        **({"rounding": summary.vectors.rounding} if summary.vectors else {}),
        **({"front": of_front(summary.front)} if summary.front else {}),
        **({"groups": _of_groups(summary.groups)} if summary.groups else {}),
    }


def of_rivals(summary: "Summary") -> dict[str, Any]:
    """The winner beside placebos and models trained on the search split, with units."""
    from dem_opt.dashboards.words import rival_lines

    units = {
        "objective": summary.unit_words,
        "margins": f"rival minus winner in {summary.unit_words}, with a 95% interval",
        "flops": "floating-point operations of the search or the training",
    }
    return {
        "study": summary.study,
        "winner": _of_row(summary.winner),
        "rivals": [_of_rival(rival) for rival in summary.rivals],
        "conclusions": rival_lines(summary),
        "units": units,
    }


def of_comparison(comparison: "Comparison") -> dict[str, Any]:
    """A comparison of algorithms, with its units."""
    units = {
        "forwards, spent_S, marks": "forward-equivalents: passes over all windows of the search split",
        "best, best_S, median, low, high": comparison.unit,
        "ask, asking, measuring": "seconds",
    }
    return asdict(comparison) | {"units": units}


def of_front(front: "Front") -> dict[str, Any]:
    """A front with its units; `lowest_mean` and `knee` are places in `points`, which ascend in the first loss."""
    return {
        "between": list(front.names),
        "unit": front.unit,
        "composites": len(front.points) + len(front.dominated),
        "points": front.rows(),
        "lowest_mean": front.points.index(front.lowest_mean),
        "knee": None if front.knee is None else front.points.index(front.knee),
        "hypervolume": front.hypervolume,
        "reference": _of_losses(front, front.reference),
        "baselines": {name: _of_losses(front, point.search) for name, point in front.baselines.items()},
        "held_out": {"scored": len(front.held_out), "on_the_front": front.confirmed},
        "units": {"losses, gaps": front.unit, "hypervolume": f"{front.unit}, squared", "gap_low, gap_high": "95%"},
    }


def _of_losses(front: "Front", losses: tuple[float, float]) -> dict[str, float]:
    """Losses by the names of the axes."""
    return dict(zip(front.names, losses, strict=True))


def of_mixing(comparison: "MixingComparison") -> dict[str, Any]:
    """A comparison with data mixing, with its units."""
    units = {
        "objective": comparison.unit,
        "nll": "nats per token",
        "trained_tokens, forward_tokens": "tokens through a model, padding included",
        "flops, training_flops, forward_flops": "floating-point operations: 2 P T forward, 6 P T for training all "
        "parameters",
        "seconds": "seconds",
        "shares": "shares of a mixture's tokens, from 0 to 1",
        "ratio, equal_ratio": "floating-point operations of the mixtures over those of the fine-tunes and the search",
    }
    return asdict(comparison) | {"against": [asdict(budget) for budget in comparison.against], "units": units}


def of_proposal(result: "MixtureProposal") -> dict[str, Any]:
    """Proposed shares of the training data, with units."""
    units = {
        "shares, region, natural": "shares of the tokens, from 0 to 1",
        "predicted, at_equal, at_natural, detectable, regret": result.unit,
        "divergence": "nats",
        "epochs": "passes over a distribution's training data",
        "flops, training_flops, forward_flops": "floating-point operations",
    }
    return asdict(result) | {"folder": str(result.folder), "cost": asdict(result.cost), "units": units}


def of_tasks(table: "TaskTable") -> dict[str, Any]:
    """Models on tasks, with units."""
    units = {
        "objective": table.unit,
        "gold": "nats per token",
        "low, high": "bounds of a rank correlation's 95% interval; the correlation is 1 where lower loss is better",
    }
    return asdict(table) | {"agreement": [asdict(agreement) for agreement in table.agreement], "units": units}


def _of_cost(cost: "Cost") -> dict[str, Any]:
    return {
        "part": cost.part,
        "evaluations": cost.evaluations,
        "forward_equivalents": cost.forwards,
        "seconds": cost.seconds,
    }


def _of_margin(margin: "Margin") -> dict[str, Any]:
    """A margin; an interval without ends is null."""
    ends = {end: value if isfinite(value) else None for end, value in (("low", margin.low), ("high", margin.high))}
    return asdict(margin) | ends


def _of_rival(rival: "Rival") -> dict[str, Any]:
    return asdict(rival) | {"margins": [_of_margin(margin) for margin in rival.margins]}


def _of_price(price: "TotalPrice") -> dict[str, Any]:
    """The price of the sum; an interval without ends is null."""
    ends = {"low": price.low, "high": price.high}
    finite = {end: value if value is not None and isfinite(value) else None for end, value in ends.items()}
    return asdict(price) | finite | {"rivals": [_of_margin(margin) for margin in price.rivals]}


def _detectable(summary: "Summary") -> dict[str, float]:
    """Least difference that the windows of each split detect, in the objective's unit."""
    from dem_opt.dashboards.words import detectable

    return detectable(summary)


def _of_groups(groups: "GroupResult") -> dict[str, Any]:
    """Coefficients by group with what folds say of them; an infinite penalty is null."""
    return {
        "coefficients": groups.coefficients.weights,
        "global": groups.centre.weights,
        "shrink": groups.shrink if isfinite(groups.shrink) else None,
        "optimism": groups.optimism,
        "folds": [
            {"shrink": judged.shrink if isfinite(judged.shrink) else None, "own": judged.own, "other": judged.other}
            for judged in groups.judgements
        ],
        "gradients": groups.gradients,
        "forward_equivalents": groups.forwards,
        "seconds": groups.seconds,
    }


def _count(records: "Sequence[TrialRecord]", state: str) -> int:
    return sum(record.state == state for record in records)


def _of_row(row: "ResultRow") -> dict[str, Any]:
    return {
        "label": row.label,
        "role": row.role,
        "algorithm": row.algorithm,
        "coefficients": row.coefficients and row.coefficients.weights,
        **({"groups": row.groups.weights} if row.groups else {}),
        **of_objective(row),
        "violation": row.violation,
        "evaluations": row.evaluations,
        "forward_equivalents": row.forwards,
        "forward_tokens": row.forward_tokens,
        "seconds": row.seconds,
    }
