"""What --json prints: findings, scores, summaries and comparisons as plain data, NLL in nats per token."""

from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dem_opt.analysis.utilization import usage_of
from dem_opt.simplex import UNIT, Coefficients

if TYPE_CHECKING:
    from dem_opt.analysis.regret import Comparison
    from dem_opt.export.writer import Export
    from dem_opt.types import ResultRow, Score, Summary
    from dem_opt.workflows.check import Findings


def of_findings(found: "Findings") -> dict[str, Any]:
    """What a check found: bytes, tokens and seconds."""
    plan = found.plan
    sums = {name: getattr(plan, name) for name in ("needed", "fitting", "gradients_fit")}
    sums["memory"] = asdict(plan.memory) | {"peak": plan.memory.peak, "gradient_peak": plan.memory.gradient_peak}
    sums["work"] = asdict(plan.work) | {"tokens": plan.work.tokens}
    return asdict(found) | {"plan": asdict(plan) | sums, "unhashed": found.unhashed}


def of_score(score: "Score") -> dict[str, Any]:
    """A score; a perplexity beyond a float is null."""
    perplexity = score.perplexity
    return {"nll": score.nll, "perplexity": perplexity if isfinite(perplexity) else None, "tokens": score.tokens}


def of_scores(one: "ResultRow") -> dict[str, Any]:
    """Scores and objective of a composite, by split."""
    scores = {
        split: {name: of_score(score) for name, score in by_name.items()} for split, by_name in one.scores.items()
    }
    return {"objective": dict(one.objective), "scores": scores}


def of_export(out: Path, dtype: str | None, export: "Export", coefficients: Coefficients) -> dict[str, Any]:
    """A written folder; `coefficients` are those of the distributions, the base has the rest."""
    return {
        "path": str(out),
        "content": export.content,
        "dtype": dtype,
        "coefficients": coefficients.weights,
        "objective": {},
        "scores": {},
    }


def of_summary(summary: "Summary") -> dict[str, Any]:
    """What a study found; `forwards` are forward-equivalents, passes over all windows of the search split.

    `usage` has seconds, and shares from 0 to 1.
    """
    return {
        "study": summary.study,
        "objective": summary.function or ("worst regret" if summary.worst else "mean"),
        "weights": dict(summary.weights),
        "winner": summary.winner.label,
        "standings": [_of_standing(one) for one in summary.results],
        "margins": [asdict(margin) for margin in summary.margins],
        "top": [_of_standing(one) for one in summary.top],
        "trials": {run: len(records) for run, records in summary.trials.items()},
        "partial": {run: sum(one.is_partial for one in records) for run, records in summary.trials.items()},
        "stopped": dict(summary.stopped or {}),
        "usage": {run: asdict(usage_of(records)) for run, records in summary.trials.items()},
    }


def of_comparison(comparison: "Comparison") -> dict[str, Any]:
    """A comparison, with its units."""
    units = {
        "forwards, spent_S, marks": "forward-equivalents: passes over all windows of the search split",
        "best, best_S, median, low, high": "nats per token",
        "ask, asking, measuring": "seconds",
    }
    return asdict(comparison) | {"units": units}


def as_weights(coefficients: Coefficients) -> str:
    """Coefficients as --weights takes them, exactly."""
    used = {name: units for name, units in coefficients.items if units} or dict(coefficients.items[:1])
    return ",".join(f"{name}={units / UNIT:.9f}".rstrip("0").rstrip(".") for name, units in used.items())


def _of_standing(one: "ResultRow") -> dict[str, Any]:
    return {
        "label": one.label,
        "role": one.role,
        "algorithm": one.algorithm,
        "coefficients": one.coefficients and one.coefficients.weights,
        **of_scores(one),
        "violation": one.violation,
        "evaluations": one.evaluations,
        "forwards": one.forwards,
        "forward_tokens": one.forward_tokens,
        "seconds": one.seconds,
    }
