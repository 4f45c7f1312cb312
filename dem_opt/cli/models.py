"""`dem-opt train`, `score`, `merge` and `export`: commands whose subject is one model."""

from argparse import Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

from dem_opt.cli import json_output, mixtures
from dem_opt.cli.coefficients import read_coefficients
from dem_opt.cli.console import Terminal
from dem_opt.errors import InputError
from dem_opt.types import SPLITS, UNITS

if TYPE_CHECKING:
    from dem_opt.config import StudyConfig
    from dem_opt.export.writer import Export
    from dem_opt.types import Score
    from dem_opt.workflows.score import Scored


def train(arguments: Namespace, terminal: Terminal) -> None:
    """Fine-tune what is missing, or train on a mixture."""
    from dem_opt.study import Study

    if arguments.mixture is not None:
        mixtures.train(arguments, terminal)
        return
    if arguments.start is not None:
        raise InputError(None, "--from", arguments.start, "says what a mixture's training begins with; add --mixture")

    with terminal.progress() as progress:
        trained = Study.load(arguments.study, progress=progress).train()
    if arguments.json:
        terminal.json({name: asdict(result) for name, result in trained.items()})
    elif trained:
        terminal.line(f"{len(trained)} checkpoint{'s' if len(trained) > 1 else ''} trained: {', '.join(trained)}")
    else:
        terminal.line("Every distribution has its checkpoint.")


def score(arguments: Namespace, terminal: Terminal) -> None:
    """Score one composite or one model."""
    from dem_opt.study import Study

    with terminal.progress() as progress:
        study = Study.load(arguments.study, progress=progress)
        if arguments.model:
            scores, label = study.score_model(arguments.model), str(arguments.model)
        else:
            coefficients = read_coefficients(arguments.coefficients, "--coefficients")
            scores, label = study.score(coefficients), arguments.coefficients.replace("=", " ").replace(",", ", ")
    if arguments.json:
        beside = [{"label": row.label, "objective": dict(row.objective)} for row in scores.beside]
        terminal.json(json_output.of_scores(scores) | {"objective": dict(scores.objective), "beside": beside})
        return
    rows = [
        (name, split.replace("_", "-"), *_measurements(score))
        for split, by_name in scores.items()
        for name, score in by_name.items()
    ]
    headers = ("corpus", "split", "NLL (nats per token)", "perplexity", "bits per byte", "scored tokens", "bytes")
    terminal.table("Scores", headers, rows, words=2)
    _print_objective(label, scores, study.config, terminal)


def _measurements(score: "Score") -> tuple[str, ...]:
    """NLL, perplexity, bits per byte, tokens and bytes of a score; "-" where bytes are not known."""
    bits = score.bits_per_byte
    return (
        f"{score.nll:.4f}",
        f"{score.perplexity:.3f}",
        "-" if bits is None else f"{bits:.4f}",
        f"{score.tokens:,}",
        "-" if score.bytes is None else f"{score.bytes:,}",
    )


def _print_objective(label: str, scores: "Scored", config: "StudyConfig", terminal: Terminal) -> None:
    """Print the objective of what was scored beside that of base, uniform average and winner, as far as known."""
    from dem_opt.evaluation.objective import objective_words

    listed = [(label, scores.objective), *((row.label, row.objective) for row in reversed(scores.beside))]
    rows = [
        (name, *(f"{objective[split]:.4f}" if split in objective else "-" for split in SPLITS))
        for name, objective in listed
    ]
    objective = config.objective
    words = objective_words(config.weights, objective.worst, objective.function or "", objective.unit)
    headers = ("composite", *(split.replace("_", "-") for split in SPLITS))
    terminal.table(f"{words[0].upper()}{words[1:]}, {UNITS[objective.unit]}", headers, rows, strong=0)


def merge(arguments: Namespace, terminal: Terminal) -> None:
    """Write the composite of given coefficients."""
    from dem_opt.study import Study

    numbers = read_coefficients(arguments.coefficients, "--coefficients")
    with terminal.progress() as progress:
        study = Study.load(arguments.study, progress=progress)
        written = study.merge(
            numbers,
            arguments.out,
            arguments.dtype,
            overwrite=arguments.overwrite,
            as_lora=arguments.as_lora,
            rank=arguments.rank,
        )
    if arguments.json:
        coefficients = study.checked(numbers)
        terminal.json(json_output.of_export(arguments.out, arguments.dtype, written, coefficients))
        return
    if written.rank is None:
        terminal.line(f"Written and compared from disk: {arguments.out}")
    else:
        terminal.line(f"Written as {_lora(written)}, read from disk: {arguments.out}")


def export(arguments: Namespace, terminal: Terminal) -> None:
    """Write and register the winner."""
    from dem_opt.dashboards.words import winner_text
    from dem_opt.study import Study

    with terminal.progress() as progress:
        study = Study.load(arguments.study, progress=progress)
        champion = study.export(arguments.out, arguments.dtype, as_lora=arguments.as_lora, rank=arguments.rank)
    winner, exported = champion.result, champion.exported
    if arguments.json:
        assert winner.merged is not None
        written = json_output.of_export(arguments.out, arguments.dtype, champion.export, winner.merged)
        terminal.json(written | json_output.of_objective(exported) | {"version": champion.version})
        return
    terminal.line(f"{winner.label}: {winner_text(winner)}")
    if champion.export.rank is None:
        terminal.line(f"Written, compared from disk bit by bit, scored again: {arguments.out}")
    else:
        terminal.line(f"Written as {_lora(champion.export)}, read from disk, scored again: {arguments.out}")
    if exported != winner:
        for split, value in exported.objective.items():
            change = f"{winner.objective[split]:.6f} -> {value:.6f} {UNITS[study.config.objective.unit]}"
            terminal.line(f"Objective on {split}, {exported.label.removeprefix('exported ')}: {change}")
    if champion.version is not None:
        terminal.line(f"Registered in MLflow: version {champion.version}, alias champion")


def _lora(written: "Export") -> str:
    """Name the LoRA that was written."""
    return f"{'the nearest' if written.is_truncated else 'an exact'} LoRA of rank {written.rank}"
