"""The results of a study as pandas data frames."""

import pandas as pd

from dem_opt.types import SPLITS, ResultRow, Summary, TrialRecord


def trials_frame(summary: Summary) -> pd.DataFrame:
    """Return the finished trials, one row each; `Study.trials` documents the columns."""
    columns = [
        *("run", "number", "state", "objective", "violation", "penalized", "standard_error", "forward_equivalents"),
        *(f"loss.{name}" for name in (summary.front.names if summary.front else ())),
        *(f"w.{name}" for name in summary.distributions),
        *(f"nll.{name}" for name in summary.weights),
        *(f"perplexity.{name}" for name in summary.weights),
        *(f"bpb.{name}" for name in summary.weights),
        *("forward_tokens", "scored_tokens", "merge_seconds", "score_seconds", "wait_seconds", "propose_seconds"),
        "reason",
    ]
    rows = [_trial_row(run, record) for run, records in summary.trials.items() for record in records]
    return pd.DataFrame(rows, columns=columns)


def results_frame(summary: Summary) -> pd.DataFrame:
    """Return the results table with the top composites and leave-one-out; `Study.results` documents the columns."""
    columns = [
        *("label", "role", "run", *(f"w.{name}" for name in summary.distributions)),
        *(
            column
            for split in SPLITS
            for column in (
                f"{split}.objective",
                *(f"{split}.{kind}" for kind in ("margin", "margin_low", "margin_high")),
                *(f"{split}.nll.{name}" for name in summary.weights),
                *(f"{split}.perplexity.{name}" for name in summary.weights),
                *(f"{split}.bpb.{name}" for name in summary.weights),
            )
        ),
        *("violation", "evaluations", "forward_equivalents", "forward_tokens", "seconds"),
    ]
    table = [_result_row(row) | _margins(summary, row) for row in summary.results]
    others = [_result_row(row) for row in (*summary.top, *summary.left_out)]
    return pd.DataFrame(table + others, columns=columns)


def gradients_frame(summary: Summary) -> pd.DataFrame:
    """Return the gradients of the trials that measured one; `Study.gradients` documents the columns."""
    columns = [
        *("run", "number"),
        *(f"w.{name}" for name in summary.distributions),
        *(f"gradient.{name}" for name in summary.distributions),
    ]
    rows = [
        {
            "run": run,
            "number": record.number,
            **{f"w.{name}": weight for name, weight in record.coefficients.weights.items()},
            **{f"gradient.{name}": slope for name, slope in record.gradient.items()},
        }
        for run, records in summary.trials.items()
        for record in records
        if record.gradient
    ]
    return pd.DataFrame(rows, columns=columns)


def groups_frame(summary: Summary) -> pd.DataFrame:
    """Return the winner's coefficients by group, one row each."""
    names = list(summary.distributions)
    rows = summary.groups.coefficients.rows if summary.groups else ()
    columns = ["group", *(f"w.{name}" for name in names)]
    return pd.DataFrame([[group, *(row[name] for name in names)] for group, row in rows], columns=columns)


def vectors_frame(summary: Summary) -> pd.DataFrame:
    """Return the geometry of the distribution vectors; `Study.vectors` documents the columns."""
    vectors = summary.vectors
    names = () if vectors is None else vectors.names
    columns = ["distribution", "norm", *(f"cosine.{name}" for name in names)]
    if vectors is None:
        return pd.DataFrame(columns=columns)
    rows = [
        (name, vectors.norms[row], *(vectors.cosine(row, column) for column in range(len(names))))
        for row, name in enumerate(names)
    ]
    return pd.DataFrame(rows, columns=columns)


def _trial_row(run: str, record: TrialRecord) -> dict[str, object]:
    evaluation = record.evaluation
    return {
        "run": run,
        "number": record.number,
        "state": record.state,
        "objective": record.objective,
        "violation": record.violation,
        "penalized": record.penalized,
        "standard_error": record.error,
        "forward_equivalents": record.forwards,
        **{f"loss.{name}": loss for name, loss in record.losses.items()},
        **{f"w.{name}": weight for name, weight in record.coefficients.weights.items()},
        **{f"nll.{name}": score.nll for name, score in record.scores.items()},
        **{f"perplexity.{name}": score.perplexity for name, score in record.scores.items()},
        **{f"bpb.{name}": score.bits_per_byte for name, score in record.scores.items()},
        "forward_tokens": evaluation.forward_tokens,
        "scored_tokens": evaluation.scored_tokens,
        "merge_seconds": evaluation.merge_seconds,
        "score_seconds": evaluation.score_seconds,
        "wait_seconds": evaluation.wait_seconds,
        "propose_seconds": record.propose_seconds,
        "reason": record.reason,
    }


def _result_row(row: ResultRow) -> dict[str, object]:
    weights = {} if row.coefficients is None else row.coefficients.weights
    values: dict[str, object] = {
        "label": row.label,
        "role": row.role,
        "run": row.run,
        **{f"w.{name}": weight for name, weight in weights.items()},
        "violation": row.violation,
        "evaluations": row.evaluations,
        "forward_equivalents": row.forwards,
        "forward_tokens": row.forward_tokens,
        "seconds": row.seconds,
    }
    for split, objective in row.objective.items():
        values[f"{split}.objective"] = objective
    for split, scores in row.scores.items():
        values |= {f"{split}.nll.{name}": score.nll for name, score in scores.items()}
        values |= {f"{split}.perplexity.{name}": score.perplexity for name, score in scores.items()}
        values |= {f"{split}.bpb.{name}": score.bits_per_byte for name, score in scores.items()}
    return values


def _margins(summary: Summary, row: ResultRow) -> dict[str, float]:
    return {
        f"{margin.split}.{kind}": value
        for margin in summary.margins
        if margin.rival == row.label
        for kind, value in (("margin", margin.mean), ("margin_low", margin.low), ("margin_high", margin.high))
    }
