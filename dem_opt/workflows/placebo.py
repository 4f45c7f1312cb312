"""The placebo comparison: the study's own search again, over vectors that carry nothing that was learnt."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from math import prod
from pathlib import Path

from dem_opt.analysis.mixing_cost import forward_cost
from dem_opt.analysis.rivals import RIVALS, RivalRecord, find_records, keep_record, made_from
from dem_opt.config import StudyConfig
from dem_opt.config.sections import CoefficientsSection, ReportSection
from dem_opt.config.sources import ModelSource
from dem_opt.errors import EvaluationError, InputError
from dem_opt.export.placebo import KINDS, Kind, Placebo, remove_placebos
from dem_opt.export.writer import refuse_full
from dem_opt.planning.inputs import Inputs, check_headers, refuse_several
from dem_opt.storage.identity import StudyIdentity
from dem_opt.tracking import JobNote, NullTracker
from dem_opt.types import Rival
from dem_opt.workflows.configurations import distinguish
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.optimize import optimize
from dem_opt.workflows.summary import summarize_stored

FOLDER = "placebo"
"""Folder in the study's output for the placebos and what their studies write."""


def compare_with_placebo(context: StudyContext) -> tuple[Rival, ...]:
    """Search over each kind of placebo as the study did, unless that is done, and compare the winners.

    Each kind is a study of its own in the database, NAME+KIND, with the same windows, search and budget.  Its
    checkpoints are written for the search and removed after it; its scores stay in the ledger.

    Raises:
        InputError: The study has not been run or has changed since, minimizes a largest regret, or has adapters that
            are more than plain LoRA.
    """
    config, path = context.config, context.path
    if config.objective.worst:
        mend = "regrets are against the fine-tunes themselves, which a placebo has none of: minimize a mean"
        raise InputError(path, "objective.worst", True, mend)
    refuse_several(config, path, "a placebo stands in for the one fine-tune of a distribution: name one for each")
    with context.stored() as stored:
        summarize_stored(context, stored)
        identity = stored.identity
        missing = [kind for kind in KINDS if kind not in find_records(config, identity)]
        if missing:
            inputs = context.load_inputs(for_workers=False).on(identity.settings["device"])
            inputs = distinguish(inputs, stored.ledger, context.progress)
            context.refuse_changed(stored, inputs.identity())
    for kind in KINDS:
        if kind in missing and _can_be_made(context, placebos := placebos_of(inputs, kind), kind):
            keep_record(config, _search(context, placebos, kind, made_from(config, identity, kind)))
        remove_placebos(_models(config, kind))
    with context.stored() as stored:
        rivals = tuple(rival for rival in summarize_stored(context, stored).rivals if rival.is_placebo)
    log_rivals(context, rivals, identity)
    return rivals


def placebos_of(inputs: Inputs, kind: Kind) -> dict[str, Placebo]:
    """The placebo of each fine-tune, by distribution."""
    seed = inputs.config.search.seed
    return {
        name: Placebo(kind=kind, base=inputs.base, fine_tune=model, seed=seed)
        for name, model in inputs.fine_tunes.items()
    }


def _can_be_made(context: StudyContext, placebos: Mapping[str, Placebo], kind: Kind) -> bool:
    """Check the fine-tunes; without two layers alike there is only the random placebo, and a warning."""
    try:
        for placebo in placebos.values():
            placebo.check()
    except InputError as error:
        if kind == "random":
            raise
        context.progress.warning(f"{RIVALS[kind]}: no such placebo: {error}")
        return False
    return True


def _search(context: StudyContext, placebos: Mapping[str, Placebo], kind: Kind, digest: str) -> RivalRecord:
    """Write the placebos of a kind and search over them."""
    config = context.config
    _write(context, placebos, kind)
    placebo_context = replace(context, config=placebo_config(config, placebos, kind), tracker=NullTracker())
    summary = optimize(placebo_context, [config.search.algorithm], winner_only=True)
    row = summary.winner
    if row.coefficients is None:
        raise EvaluationError(f"{RIVALS[kind]}: no composite of them could be scored")
    with placebo_context.stored() as stored:
        composite = stored.identity.composite(row.coefficients)
    parameters = sum(map(prod, check_headers(config, context.path).architecture.parameters.values()))
    return RivalRecord(
        kind=kind,
        made_from=digest,
        composite=dict(composite.terms),
        flops=forward_cost(parameters, row.forward_tokens, row.seconds).flops,
        coefficients=row.coefficients.weights,
        trials=len(summary.trials[row.run]),
    )


def _write(context: StudyContext, placebos: Mapping[str, Placebo], kind: Kind) -> None:
    """Write the placebos that are not there; their bytes are told, and room for them is checked, before the first."""
    folder = _models(context.config, kind)
    missing = {name: placebo for name, placebo in placebos.items() if not placebo.is_written(folder / name)}
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(placebo.nbytes for placebo in missing.values())
    refuse_full(folder, folder, size)
    context.progress.note(
        f"placebo, {RIVALS[kind]}: writing {len(missing)} checkpoints of {size / 1e9:.2g} GB in all into {folder}; "
        "they are removed after the search"
    )
    for name, placebo in missing.items():
        placebo.write(folder / name)


def placebo_config(config: StudyConfig, placebos: Mapping[str, Placebo], kind: Kind) -> StudyConfig:
    """The study over placebos: the same but for its name, its fine-tunes, and the folder for files beside the database.

    A name of a study file has no "+", so none of them is this one's.
    """
    folder = _models(config, kind)
    distributions = {
        name: config.distributions[name].model_copy(
            update={config.distributions[name].fine_tune[0]: ModelSource(path=folder / name), "train": None}
        )
        for name in placebos
    }
    output = folder.parent
    return config.model_copy(
        update={
            "name": f"{config.name}+{kind}",
            "distributions": distributions,
            "output": output,
            "report": ReportSection(),
            "coefficients": CoefficientsSection(),
        }
    )


def _models(config: StudyConfig, kind: Kind) -> Path:
    return config.output / FOLDER / kind / "models"


def log_rivals(context: StudyContext, rivals: tuple[Rival, ...], identity: StudyIdentity) -> None:
    """Log each rival as a run of its own, with its margin over the winner."""
    with closing(context.track_jobs()) as tracker:
        for rival in rivals:
            metrics = {f"{split}.objective_nll": nll for split, nll in rival.objective.items()}
            for margin in rival.margins:
                bounds = {"margin": margin.mean, "margin_low": margin.low, "margin_high": margin.high}
                metrics |= {f"{margin.split}.{name}": value for name, value in bounds.items()}
            costs = {"trials": rival.trials, "steps": rival.steps, "flops": rival.flops}
            metrics |= {name: float(value) for name, value in costs.items()}
            # Another winner gives other margins: a run of their own, since MLflow mixes values of one step.
            facts = made_from(context.config, identity, rival.kind), sorted(metrics.items())
            tracker.write(
                JobNote(
                    kind="placebo" if rival.is_placebo else "trained on the search split",
                    name=RIVALS[rival.kind],
                    key=sha256(repr(facts).encode()).hexdigest(),
                    parameters={f"w.{name}": f"{weight:.9g}" for name, weight in rival.coefficients.items()},
                    metrics=metrics,
                )
            )
