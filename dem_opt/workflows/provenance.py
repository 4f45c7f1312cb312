"""With what a study was run, and where it is written down: libraries, places, content."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from dem_opt.analysis.results import best_of
from dem_opt.config import StudyConfig
from dem_opt.export.model_card import resolved
from dem_opt.merging.kernel import expected_backend
from dem_opt.planning.hardware import this_machine
from dem_opt.progress import Progress
from dem_opt.search.loop import Driver
from dem_opt.search.optuna_study import Search
from dem_opt.search.trials import objectives, recall
from dem_opt.storage.engine import masked
from dem_opt.storage.identity import StudyIdentity
from dem_opt.tracking.study_runs import Data, Place, StudyDescription, result_metrics
from dem_opt.tracking.urls import optuna_study, optuna_trial
from dem_opt.types import SEARCH, SPLITS, ResultRow, Summary, TrialRecord

LIBRARIES = ("torch", "transformers", "optuna", "mlflow", "ray", "dem-opt")


def libraries() -> dict[str, str]:
    """Versions by name."""
    return {library: version(library) for library in LIBRARIES}


def facts(config: StudyConfig, where: object, identity: StudyIdentity) -> dict[str, str]:
    """What reproduces the study: where its parts are, their content, and with what it was run."""
    folder = Path(str(where)).resolve().parent
    revision = git_revision(folder)
    folders = {name: one.fine_tune[1] for name, one in config.distributions.items()}
    contents = {f"{name}: {folders.get(name, 'gone')}": content for name, content in identity.fine_tunes.items()}
    return {
        "study file": str(where),
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
        "go on, or repeat": f"dem-opt run {where}",
        "the grid beside it": f"dem-opt compare --algorithms grid {where}",
        "the winner's weights": f"dem-opt export --out DIR {where}",
        "the study, resolved": resolved(config, folder),
    }


def place(config: StudyConfig, search: Search) -> Place:
    """Where and as what a search is written down in MLflow."""
    parameters = {
        "base": str(config.base),
        "distributions": ", ".join(config.distributions),
        "total": str(config.simplex.total),
        "worst": str(config.objective.worst),
        **{f"evaluation.{name}": str(value) for name, value in config.evaluation.model_dump().items()},
        **libraries(),
    }
    return Place(
        uri=config.tracking.uri,
        experiment=config.tracking.experiment,
        model=config.name,
        study=search.name,
        uid=search.uid,
        artifacts=config.output / "artifacts",
        parameters=parameters,
        patience=config.outages.tracking,
        board=lambda number: optuna_trial(config.storage, search.id, number),
        home=optuna_study(config.storage, search.id),
    )


def study_description(config: StudyConfig, where: object, identity: StudyIdentity) -> StudyDescription:
    """What MLflow is told of a study before there are trials: the study resolved, fingerprint, hardware, data."""
    folder = Path(str(where)).resolve().parent
    revision = git_revision(folder)
    tags = {
        "dem_opt.fingerprint": fingerprint(identity),
        "dem_opt.hardware": hardware(),
        **({"mlflow.source.git.commit": revision} if revision else {}),
    }
    return StudyDescription(tags=tags, data=_data(config, identity), files={"study.yaml": resolved(config, folder)})


def study_descriptions(summary: Summary, note: str, files: Mapping[str, str | bytes]) -> dict[str, StudyDescription]:
    """What MLflow is told of what was found, by search: files and baselines in the winner's alone."""
    baselines = [one for one in summary.results if one.role != "best"] + list(summary.left_out)
    made = {}
    for best in summary.results:
        if best.run:
            metrics = {f"best.{key}": value for key, value in result_metrics(best)}
            made[best.run] = StudyDescription(note=note, metrics=metrics)
            if best is summary.winner:
                made[best.run] = replace(made[best.run], files=files, baselines=baselines)
    return made


def fingerprint(identity: StudyIdentity) -> str:
    """SHA-256 of what the study asks and of what makes its scores comparable, all by content."""
    return sha256(repr(sorted((identity.asked() | identity.scored()).items())).encode()).hexdigest()


def hardware() -> str:
    """The driver's machine in words."""
    machine = this_machine()
    gpus = f", {machine.devices} GPU of {machine.total / 1e9:.0f} GB" if machine.device == "cuda" else ""
    memory = "" if gpus else f", {machine.total / 1e9:.0f} GB of memory"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs{memory}{gpus}"


def git_revision(folder: Path) -> str | None:
    """The commit that a folder is at, "+" behind it where files have changed since; None outside of git."""
    told = _git(folder, "rev-parse", "HEAD")
    return f"{told}+" if told and _git(folder, "status", "--porcelain", "--untracked-files=no") else told


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _data(config: StudyConfig, identity: StudyIdentity) -> list[Data]:
    """The corpora of both splits, and the files that they were cut from."""
    made = []
    for split in SPLITS:
        for name, key in identity.corpora[split].items():
            given = config.corpora[name]
            file = given.validation if split == SEARCH or given.held_out is None else given.held_out
            made.append(Data(name, split, str(file.path), key, identity.windows(split)))
    return made


def measures(winner: ResultRow) -> dict[str, float]:
    """What the registered winner is measured by, on both splits: nats per token and perplexities."""
    metrics = {f"{split}.objective_nll": nll for split, nll in winner.objective.items()}
    metrics |= {"search.protect_violation": winner.violation} if winner.violation else {}
    for split, scores in winner.scores.items():
        metrics |= {f"{split}.perplexity.{name}": score.perplexity for name, score in scores.items()}
    return metrics


def compare_libraries(
    study: str, driver: Driver, found: Mapping[str, Sequence[TrialRecord]], progress: Progress
) -> None:
    """Where libraries have changed since a study was last run, score the best of its trials again and report it."""
    before, now = driver.ledger.libraries(study), libraries()
    if before and before != now:
        _report_change(before, now, driver, found, progress)
    driver.ledger.enter_libraries(study, now)


def _report_change(
    before: Mapping[str, str],
    now: Mapping[str, str],
    driver: Driver,
    found: Mapping[str, Sequence[TrialRecord]],
    progress: Progress,
) -> None:
    """Report the libraries that changed; warn where the best composite scores otherwise with them."""
    changed = [f"{name} {before.get(name, 'none')} -> {new}" for name, new in now.items() if before.get(name) != new]
    change = f"since the last run: {', '.join(changed)}"
    best = best_of([trial for trials in found.values() for trial in trials])
    if best is None:
        progress.note(change)
        return
    composite = driver.identity.composite(best.coefficients)
    known = recall(driver.ledger, driver.identity, composite, SEARCH)
    again = driver.score_afresh(composite, SEARCH)
    if again == known:
        progress.note(f"{change}; the best composite scores the same to the bit")
        return
    objective = objectives(driver.ledger, driver.identity)[SEARCH]
    old, new = objective(known), objective(again)
    difference = f"{new:.9f}, not {old:.9f}: {new - old:+.1e} nats per token"
    progress.warning(f"{change}; the best composite scores {difference}")
