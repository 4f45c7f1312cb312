"""With what a study was run, and where it is written down: libraries, places, content."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version

from dem_opt.config import StudyConfig
from dem_opt.database import masked
from dem_opt.driver import Driver
from dem_opt.kernel import foretold
from dem_opt.question import SEARCH, Question
from dem_opt.records import TrialRecord
from dem_opt.search import Search
from dem_opt.standings import best_of
from dem_opt.tracking import Place
from dem_opt.trials import objectives, recall

LIBRARIES = ("torch", "transformers", "optuna", "mlflow", "ray", "dem-opt")


def libraries() -> dict[str, str]:
    """Versions by name."""
    return {library: version(library) for library in LIBRARIES}


def facts(config: StudyConfig, where: object, question: Question) -> dict[str, str]:
    """What reproduces the study: where its parts are, their content, and with what it was run."""
    folders = {name: one.expert[1] for name, one in config.distributions.items()}
    contents = {f"{name}: {folders.get(name, 'gone')}": content for name, content in question.experts.items()}
    return {
        "study file": str(where),
        "storage": masked(config.storage),
        "MLflow": masked(config.tracking.uri),
        f"base: {config.base}": question.base,
        **contents,
        **question.settings,
        **({"merging here": foretold(question.settings["device"])} if config.compute.ray == "local" else {}),
        **libraries(),
        "go on, or repeat": f"dem-opt run {where}",
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
    )


def tell_change(
    before: Mapping[str, str], now: Mapping[str, str], driver: Driver, found: Mapping[str, Sequence[TrialRecord]]
) -> str:
    """Which libraries have changed, and by how much the best composite scores otherwise with them."""
    changed = [f"{name} {before.get(name, 'none')} -> {new}" for name, new in now.items() if before.get(name) != new]
    told = f"since the last run: {', '.join(changed)}"
    best = best_of([trial for trials in found.values() for trial in trials])
    if best is None:
        return told
    composite = driver.question.composite(best.coefficients)
    known = recall(driver.ledger, driver.question, composite, SEARCH)
    again = driver.score_afresh(composite, SEARCH)
    if again == known:
        return f"{told}; the best composite scores the same to the bit"
    objective = objectives(driver.ledger, driver.question)[SEARCH]
    old, new = objective(known), objective(again)
    return f"warning: {told}; the best composite scores {new:.9f}, not {old:.9f}: {new - old:+.1e} nats per token"
