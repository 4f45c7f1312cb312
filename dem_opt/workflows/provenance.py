"""The provenance of a study: libraries, places, contents, hardware, and what a tracker is told of them."""

import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from dem_opt.analysis.results import best_of
from dem_opt.config import CHAT_DATE, StudyConfig
from dem_opt.export.model_card import resolved
from dem_opt.grouping import GroupResult
from dem_opt.merging.kernel import expected_backend
from dem_opt.planning.hardware import this_machine
from dem_opt.progress import Progress
from dem_opt.search.loop import Driver
from dem_opt.search.optuna_study import Search
from dem_opt.search.trials import objectives, recall
from dem_opt.storage.engine import masked
from dem_opt.storage.identity import StudyIdentity
from dem_opt.tracking import DataSource, SearchInfo, StudyDescription
from dem_opt.tracking.mlflow_runs import BEST, result_metrics
from dem_opt.tracking.urls import optuna_study, optuna_trial
from dem_opt.types import NATS_PER_TOKEN, SEARCH, SPLITS, UNITS, ResultRow, Summary, TotalPrice, TrialRecord
from dem_opt.workflows.libraries import libraries

GIT_SECONDS = 10
"""Seconds that a call of git may take."""


def facts(config: StudyConfig, path: Path, identity: StudyIdentity) -> dict[str, str]:
    """Return what reproduces a study, for people: places, contents, settings, versions, commands.

    Args:
        config: The study file's content.
        path: The study file.
        identity: What the study is about, by content.
    """
    folder = path.resolve().parent
    revision = git_revision(folder)
    folders = {name: fine_tune.source for name, fine_tune in config.fine_tunes.items()}
    contents = {f"{name}: {folders.get(name, 'gone')}": content for name, content in identity.fine_tunes.items()}
    return {
        "study file": str(path),
        "storage": masked(config.storage),
        "MLflow": masked(config.tracking.uri),
        f"base: {config.base}": identity.base,
        **contents,
        **identity.settings,
        **(
            {"merging here": expected_backend(identity.settings["device"]).description}
            if config.compute.ray == "local"
            else {}
        ),
        **libraries(),
        **({"git revision": revision} if revision else {}),
        "fingerprint": fingerprint(identity),
        "hardware": hardware(),
        "go on, or repeat": f"dem-opt run {path}",
        "the grid beside it": f"dem-opt compare --algorithms grid {path}",
        "the winner's weights": f"dem-opt export --out DIR {path}",
        "the study, resolved": resolved(config, folder),
    }


def search_info(config: StudyConfig, search: Search) -> SearchInfo:
    """Return a search as its tracker shows it."""
    unsaid = {"date"} if config.evaluation.date == CHAT_DATE else set()  # runs of earlier releases have no such entry
    parameters = {
        "base": str(config.base),
        **{f"base.{name}": value for name, value in config.base.choices.items()},
        "distributions": ", ".join(config.distributions),
        **(
            {"fine-tunes": ", ".join(names)} if (names := list(config.fine_tunes)) != list(config.distributions) else {}
        ),
        "total": str(config.simplex.total),
        "worst": str(config.objective.worst),
        **({"unit": config.objective.unit} if config.objective.unit != NATS_PER_TOKEN else {}),
        **({"pareto": ", ".join(config.objective.pareto)} if config.objective.pareto else {}),
        **{f"evaluation.{name}": str(value) for name, value in config.evaluation.model_dump(exclude=unsaid).items()},
        **libraries(),
    }
    return SearchInfo(
        model=config.name,
        study=search.name,
        uid=search.uid,
        parameters=parameters,
        trial_page=lambda number: optuna_trial(config.storage, search.id, number),
        page=optuna_study(config.storage, search.id),
    )


def study_description(config: StudyConfig, path: Path, identity: StudyIdentity) -> StudyDescription:
    """Return what is known of a study before it has trials: the resolved study file, fingerprint, hardware, data."""
    folder = path.resolve().parent
    revision = git_revision(folder)
    tags = {
        "dem_opt.fingerprint": fingerprint(identity),
        "dem_opt.hardware": hardware(),
        **({"mlflow.source.git.commit": revision} if revision else {}),
    }
    return StudyDescription(
        tags=tags, data=_data_sources(config, identity), files={"study.yaml": resolved(config, folder)}
    )


def study_descriptions(summary: Summary, note: str, files: Mapping[str, str | bytes]) -> dict[str, StudyDescription]:
    """Return what the results say of each search, by run; only the winner's has the files and the baselines.

    Args:
        summary: The results.
        note: Description in Markdown.
        files: Contents of files by path.
    """
    baselines = [row for row in summary.results if row.role != "best"] + list(summary.left_out)
    descriptions = {}
    for best in summary.results:
        if best.run:
            metrics = {f"{BEST}{key}": value for key, value in result_metrics(best)}
            trials = len(summary.trials.get(best.run, ()))
            descriptions[best.run] = StudyDescription(note=note, metrics=metrics, trials=trials)
            if best is summary.winner:
                metrics |= _price_metrics(summary.total_price) | _group_metrics(summary.groups)
                described = StudyDescription(note=note, metrics=metrics, trials=trials)
                descriptions[best.run] = replace(described, files=files, baselines=baselines)
    return descriptions


def _price_metrics(price: TotalPrice | None) -> dict[str, float]:
    """Return the slope by the sum of coefficients and what other sums gain, in the objective's unit.

    A sum that breaks a constraint gains nothing that can be had.
    """
    if price is None:
        return {}
    gains = {f"{BEST}gain_of.{margin.rival}": -margin.mean for margin in price.rivals if margin.violation <= 0}
    return {f"{BEST}total_slope": price.slope, **gains}


def _group_metrics(groups: GroupResult | None) -> dict[str, float]:
    """Return the number of groups, what they gain on the fold that did not choose, and the optimism of that choice."""
    if groups is None:
        return {}
    metrics = {f"{BEST}groups": float(len(groups.coefficients))}
    if groups.judged is not None and groups.optimism is not None:
        metrics |= {f"{BEST}groups_gain": -groups.judged.other, f"{BEST}groups_optimism": groups.optimism}
    return metrics


def fingerprint(identity: StudyIdentity) -> str:
    """Return the SHA-256 of everything that identifies a study and of its scoring, all by content."""
    return sha256(repr(sorted((identity.identity_fields() | identity.scoring_fields()).items())).encode()).hexdigest()


def hardware() -> str:
    """Describe the driver's machine."""
    machine = this_machine()
    gpus = f", {machine.devices} GPU of {machine.total / 1e9:.0f} GB" if machine.device == "cuda" else ""
    memory = "" if gpus else f", {machine.total / 1e9:.0f} GB of memory"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs{memory}{gpus}"


def git_revision(folder: Path) -> str | None:
    """Return the commit of a folder, with a "+" where files have changed since; None outside of git."""
    commit = _git(folder, "rev-parse", "HEAD")
    return f"{commit}+" if commit and _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None if process.returncode == 0 else None


def _data_sources(config: StudyConfig, identity: StudyIdentity) -> list[DataSource]:
    """Return the corpora of both splits, with the files that they were cut from."""
    sources = []
    for split in SPLITS:
        for name, digest in identity.corpora[split].items():
            data = config.corpora[name]
            file = data.validation if split == SEARCH or data.held_out is None else data.held_out
            sources.append(
                DataSource(name=name, split=split, source=str(file), digest=digest, windows=identity.windows(split))
            )
    return sources


def winner_metrics(winner: ResultRow) -> dict[str, float]:
    """Return the metrics of a registered winner: objective, perplexities and bits per byte on both splits."""
    metrics = {f"{split}.objective_nll": nll for split, nll in winner.objective.items()}
    metrics |= {"search.protect_violation": winner.violation} if winner.violation else {}
    for split, scores in winner.scores.items():
        metrics |= {f"{split}.perplexity.{name}": score.perplexity for name, score in scores.items()}
        bits = {name: score.bits_per_byte for name, score in scores.items()}
        metrics |= {f"{split}.bpb.{name}": value for name, value in bits.items() if value is not None}
    return metrics


def compare_libraries(
    study: str, driver: Driver, trials: Callable[[], Mapping[str, Sequence[TrialRecord]]], progress: Progress
) -> None:
    """Record the library versions; where they have changed since the last run, score the best trial again.

    Args:
        study: Name of the study.
        driver: Scores the trial.
        trials: Gives the finished trials by run, where it asks for them.
        progress: Receives the change, as a warning where the best composite scores otherwise with it.
    """
    before, now = driver.ledger.libraries(study), libraries()
    if before and before != now:
        _report_change(before, now, driver, trials(), progress)
    driver.ledger.enter_libraries(study, now)


def _report_change(
    before: Mapping[str, str],
    now: Mapping[str, str],
    driver: Driver,
    trials: Mapping[str, Sequence[TrialRecord]],
    progress: Progress,
) -> None:
    changed = [f"{name} {before.get(name, 'none')} -> {new}" for name, new in now.items() if before.get(name) != new]
    change = f"since the last run: {', '.join(changed)}"
    best = best_of([trial for records in trials.values() for trial in records])
    if best is None:
        progress.note(change)
        return
    composite = driver.identity.composite(best.coefficients)
    known = recall(driver.ledger, driver.identity, composite, SEARCH)
    again = driver.score_afresh(composite, SEARCH, "changed libraries")
    if again == known:
        progress.note(f"{change}; the best composite scores the same to the bit")
        return
    objective = objectives(driver.ledger, driver.identity)[SEARCH]
    old, new = objective(known), objective(again)
    difference = f"{new:.9f}, not {old:.9f}: {new - old:+.1e} {UNITS[objective.unit]}"
    progress.warning(f"{change}; the best composite scores {difference}")
