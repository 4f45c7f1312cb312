"""Training on the search split: what else its tokens and the search's floating-point operations could buy.

A search of F forward-equivalents costs  2 P T F  operations for the T tokens of the search split and P parameters.  The
base, and the uniform average of the fine-tunes, are trained on the same windows for as many steps as that pays for,

    steps = floor( 2 P T F / ((4 P + 2 P_trained) B) )        B tokens of a step

(`mixing_cost`), each corpus with its share of the objective's weight.
"""

from math import prod
from pathlib import Path

from dem_opt.analysis.mixing_cost import forward_cost, training_cost
from dem_opt.analysis.rivals import RIVALS, RivalRecord, keep_record, made_from
from dem_opt.data.mixtures import Mixture, Part
from dem_opt.errors import InputError
from dem_opt.export.writer import MARKER, write_composite
from dem_opt.manifest import read_description
from dem_opt.planning.inputs import Inputs, check_headers
from dem_opt.training.fine_tune import FineTuneJob, result_of
from dem_opt.training.lora import check_lora, count_parameters
from dem_opt.training.recipe import check_trainer
from dem_opt.types import SEARCH, Composite, ResultRow, Rival
from dem_opt.workflows.configurations import distinguish
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.data_mixing import score_folders
from dem_opt.workflows.fine_tuning import STATES, shared_settings, train
from dem_opt.workflows.placebo import log_rivals
from dem_opt.workflows.summary import summarize_stored

FOLDER = "trained-on-search"
"""Folder in the study's output for the trained models, and for the uniform average that one of them begins with."""


def train_on_search_split(context: StudyContext) -> tuple[Rival, ...]:
    """Train the base and the uniform average on the search split at the search's cost, and compare them.

    Raises:
        InputError: The study has not been run or has changed since, peft is missing, or the search cost less than one
            step.
        TrainingError: A training failed.
    """
    config, path = context.config, context.path
    check_trainer(config.fine_tuning.trainer, path)
    if config.fine_tuning.on_search == "lora":
        check_lora(config.fine_tuning.lora, path)
    with context.stored() as stored:
        summary, identity = summarize_stored(context, stored), stored.identity
        inputs = context.load_inputs(for_workers=False).on(identity.settings["device"])
        inputs = distinguish(inputs, stored.ledger, context.progress)
        context.refuse_changed(stored, inputs.identity())
        inputs = inputs.exact()
        jobs = training_jobs(context, inputs, summary.global_winner)
        train(context, list(jobs.values()))
        with context.compute:
            folders = [job.out for job in jobs.values()]
            composites = score_folders(context, inputs.on(context.compute.device), folders, FOLDER, stored.ledger)
        for kind, job in jobs.items():
            keep_record(config, _record(job, composites[job.out], kind, made_from(config, identity, kind)))
        rivals = tuple(rival for rival in summarize_stored(context, stored).rivals if not rival.is_placebo)
    log_rivals(context, rivals, identity)
    return rivals


def training_jobs(context: StudyContext, inputs: Inputs, winner: ResultRow) -> dict[str, FineTuneJob]:
    """A job for each model that training begins with, by kind of rival.

    Raises:
        InputError: The search cost less than one step, or peft refuses a setting.
    """
    config, path = context.config, context.path
    settings, weights = config.fine_tuning, inputs.identity().weights
    is_lora = settings.on_search == "lora"
    parameters = sum(map(prod, check_headers(config, path).architecture.parameters.values()))
    trained = count_parameters(inputs.base.path, settings.lora)[1] if is_lora else parameters
    step = training_cost(parameters, trained, settings.batch_size * config.evaluation.window, 0.0).flops
    budget = forward_cost(parameters, winner.forward_tokens, 0.0).flops
    if budget < step:
        mend = f"a step of so many windows costs {step / budget:.1f} times what the search did; make it smaller"
        raise InputError(path, "fine_tuning.batch_size", settings.batch_size, mend)
    steps = int(budget // step)
    corpora = [corpus for corpus in inputs.corpora if corpus.split == SEARCH and weights[corpus.distribution]]
    total = sum(weights[corpus.distribution] for corpus in corpora)
    parts = (Part(corpus.distribution, corpus, weights[corpus.distribution] / total) for corpus in corpora)
    shared = shared_settings(config, inputs.base.path) | {
        "train": Mixture(tuple(parts)),
        "steps": steps,
        "save_every": max(steps // STATES, 1),
        "learning_rate": settings.on_search_rate or settings.learning_rate,
        **({"lora": settings.lora, "merged": True} if is_lora else {}),
    }
    folder = config.output / FOLDER
    return {
        kind: FineTuneJob(name=RIVALS[kind], out=folder / kind, **shared | {"base": start})
        for kind, start in starting_points(context, inputs).items()
    }


def starting_points(context: StudyContext, inputs: Inputs) -> dict[str, Path]:
    """Folders of the base and, of several fine-tunes, of their uniform average, which is written unless it is there."""
    identity = inputs.identity()
    starts = {"base": inputs.base.path}
    if identity.space.dimension > 1:
        composite = identity.composite(identity.space.centroid())
        starts["uniform"] = folder = context.config.output / FOLDER / "uniform-average"
        if read_description(folder / MARKER).get("composite") != composite.key:
            context.progress.note(f"writing the uniform average into {folder}")
            write_composite(inputs.base, inputs.models(), composite, folder, lambda _: {})
    return starts


def _record(job: FineTuneJob, composite: Composite, kind: str, digest: str) -> RivalRecord:
    result = result_of(job.out)
    assert result is not None, "trained just now"
    return RivalRecord(
        kind=kind,
        made_from=digest,
        composite=dict(composite.terms),
        flops=training_cost(result.parameters, result.trained, result.tokens, result.seconds).flops,
        coefficients={},
        steps=result.steps,
    )
