"""The files of a mixture: shares and a token budget, for people, for `dem-opt train` and for other programs."""

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite
from pathlib import Path
from typing import Any

import yaml

from dem_opt.analysis.mixture_proposal import Evidence, MixtureProposal
from dem_opt.analysis.task_scores import Correlation
from dem_opt.atomic import write_text
from dem_opt.config import StudyConfig
from dem_opt.config.sections import SHARES_TOLERANCE
from dem_opt.config.yaml import read_yaml
from dem_opt.data.mixture_files import MixtureRun, megatron_blend, olmix_tables, row_probabilities
from dem_opt.errors import InputError, nearest
from dem_opt.types import HELD_OUT, TrialRecord
from dem_opt.workflows.trained_mixtures import TrainedMixture

FOLDER = "mixture"
"""Folder in the study's output for the proposed mixture."""

FILE = "mixture.yaml"
"""Name of the file."""

LINE = 10**6
"""Characters in a line of it at most, so that Megatron's arguments are one line."""

PROPOSED = "proposed"
"""Word for the study's own file on the command line."""


@dataclass(frozen=True, kw_only=True)
class MixtureFile:
    """Content of a mixture's file, as far as `dem-opt train` reads it.

    Attributes:
        path: The file.
        shares: Shares by distribution, which sum to 1; a name left out has 0.
        tokens: Tokens to train on.
    """

    path: Path
    shares: Mapping[str, float]
    tokens: int


def proposed_file(config: StudyConfig) -> Path:
    """Where a study's proposed mixture is."""
    return config.output / FOLDER / FILE


def read_mixture(path: Path, names: Collection[str]) -> MixtureFile:
    """Read a mixture's file; keys beside `shares` and `tokens` are for people.

    Raises:
        InputError: There is no such file, or its shares or its tokens are none.
    """
    if not path.is_file():
        raise InputError(path, None, None, "no such mixture; `dem-opt mix STUDY` proposes one")
    content = read_yaml(path)
    shares, tokens = content.get("shares"), content.get("tokens")
    if not isinstance(shares, dict) or not shares:
        raise InputError(path, "shares", shares, "must be a mapping of distributions to shares")
    for name, share in shares.items():
        if name not in names:
            raise InputError(path, f"shares.{name}", share, f"no such distribution; {nearest(str(name), names)}")
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if not is_number or not isfinite(share) or share < 0:
            raise InputError(path, f"shares.{name}", share, "must be a number of at least 0")
    if abs((total := fsum(shares.values())) - 1) > SHARES_TOLERANCE:
        raise InputError(path, "shares", shares, f"sums to {total:g}; shares must sum to 1")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise InputError(path, "tokens", tokens, "must be a whole number of at least 1")
    return MixtureFile(path=path, shares={name: float(shares.get(name, 0.0)) for name in names}, tokens=tokens)


def write_mixture(
    config: StudyConfig, result: MixtureProposal, trials: Sequence[TrialRecord], trained: Sequence[TrainedMixture]
) -> None:
    """Write the proposal for people and for programs."""
    try:
        write_text(proposed_file(config), _mixture_text(config, result))
        write_text(result.folder / "mixture.csv", _csv(result))
        for name, runs in {"merges": merge_runs(trials), "trained": trained_runs(trained)}.items():
            for file, text in olmix_tables(runs).items() if runs else ():
                write_text(result.folder / "olmix" / name / file, text)
    except OSError as error:
        raise InputError(result.folder, None, None, f"can't be written ({error.strerror})") from None


def _mixture_text(config: StudyConfig, result: MixtureProposal) -> str:
    """The content of `mixture.yaml`."""
    proposal = result.proposal
    shares = {name: round(share, 9) for name, share in proposal.shares.items()}
    rows = {name: size.tokens / size.documents for name, size in result.sizes.items()}
    files = {name: _prefix(config, name) for name in shares}
    content: dict[str, Any] = {
        "study": result.study,
        "shares": shares,
        "tokens": result.tokens,
        "steps": result.steps,
        "region": {name: [round(low, 4), round(high, 4)] for name, (low, high) in proposal.region.items()},
        "epochs": {name: round(epochs, 4) for name, epochs in result.epochs.items()},
        "natural": {name: round(share, 9) for name, share in result.natural.items()},
        "limits": {"epochs": result.epochs_limit, "kl_penalty": result.penalty},
        "basis": {
            "predictor": result.predictor,
            **({"sum_of_coefficients": result.total} if result.predictor == "merges" else {}),
            "predicted": round(proposal.predicted, 6),
            "predicted_at_equal_shares": round(proposal.at_equal, 6),
            "predicted_at_natural_shares": round(proposal.at_natural, 6),
            "unit": result.unit,
            "tested_on": [_tested(evidence) for evidence in result.evidence],
        },
        "interleave_datasets": {
            "rows_of_one_length": dict(shares),  # a copy, or YAML refers to the one above
            "documents": {name: round(value, 9) for name, value in row_probabilities(shares, rows).items()},
        },
        "megatron_data_path": megatron_blend(shares, files),
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=LINE)


def _tested(evidence: Evidence) -> dict[str, Any]:
    correlation = evidence.quality.spearman
    return {
        "predictor": evidence.predictor,
        "source": evidence.source,
        "tokens": evidence.tokens,
        "mixtures": evidence.quality.mixtures,
        "spearman": None if correlation is None else round(correlation.value, 4),
        "interval": None if correlation is None else _interval(correlation),
        "regret": round(evidence.quality.regret, 6),
    }


def _interval(correlation: Correlation) -> list[float] | None:
    low, high = correlation.low, correlation.high
    return None if low is None or high is None else [round(low, 4), round(high, 4)]


def _prefix(config: StudyConfig, name: str) -> str:
    """The training data's path without its endings, where Megatron's preprocessing may have put its output."""
    data = config.distributions[name].train
    assert data is not None
    first = data.paths[0]
    return str(first.parent.resolve() / first.name.partition(".")[0])


def _csv(result: MixtureProposal) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["distribution", "share", "low", "high", "natural", "tokens", "epochs", "windows", "documents"])
    for name, share in result.proposal.shares.items():
        low, high = result.proposal.region[name]
        size = result.sizes[name]
        numbers = (share, round(low, 6), round(high, 6), round(result.natural[name], 9))
        writer.writerow(
            [name, *numbers, round(share * result.tokens), round(result.epochs[name], 6), size.windows, size.documents]
        )
    return text.getvalue()


def merge_runs(trials: Sequence[TrialRecord]) -> list[MixtureRun]:
    """The completely scored merges as Olmix's runs: coefficients over their sum, and NLL on the search split."""
    runs = []
    for number, trial in enumerate(trials):
        weights = trial.coefficients.weights
        total = fsum(weights.values())
        if trial.objective is None or trial.is_partial or not total:
            continue
        runs.append(
            MixtureRun(
                run=f"merge-{number}",
                name=f"merge, sum of coefficients {total:g}",
                shares={name: weight / total for name, weight in weights.items()},
                metrics={f"nll.{name}": score.nll for name, score in trial.scores.items()},
            )
        )
    return runs


def trained_runs(trained: Sequence[TrainedMixture]) -> list[MixtureRun]:
    """The trained mixtures as Olmix's runs, with NLL on the held-out split."""
    return [
        MixtureRun(
            run=mixture.folder.name,
            name=f"{mixture.training.tokens} tokens from the {mixture.start}",
            shares=dict(mixture.shares),
            metrics={f"nll.{name}": score.nll for name, score in mixture.scores[HELD_OUT].items()},
        )
        for mixture in trained
    ]
