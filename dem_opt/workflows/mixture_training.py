"""`dem-opt train --mixture`: train one model on a mixture, from the base or from the winner, and compare it."""

from hashlib import sha256
from pathlib import Path

from dem_opt.analysis.mixing_cost import MixingComparison
from dem_opt.checkpoints.files import content_hash
from dem_opt.config import StudyConfig
from dem_opt.errors import InputError
from dem_opt.export.writer import MARKER, write_composite
from dem_opt.manifest import read_description
from dem_opt.planning.inputs import Inputs
from dem_opt.training.fine_tune import FineTuneJob
from dem_opt.training.recipe import check_trainer
from dem_opt.types import Composite, Summary
from dem_opt.workflows.configurations import distinguish
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.data_mixing import (
    compare_costs,
    log_proposals,
    mixture_of,
    score_folders,
    single_fine_tunes,
    trained_jobs,
)
from dem_opt.workflows.data_shares import refuse_unfit
from dem_opt.workflows.fine_tuning import STATES, shared_settings, train
from dem_opt.workflows.mixture_file import PROPOSED, MixtureFile, proposed_file, read_mixture
from dem_opt.workflows.summary import summarize_stored
from dem_opt.workflows.trained_mixtures import FOLDER, FROM_COMPOSITE
from dem_opt.workflows.trained_mixtures import PROPOSED as PREFIX

STARTS = ("base", "composite")
"""Models that a training may begin with."""


def train_mixture(context: StudyContext, mixture: str, start: str) -> MixingComparison:
    """Train a model on a mixture, unless that is done, score it, and compare it with what the study knows.

    Args:
        context: A study that has been run.
        mixture: "proposed" for what `dem-opt mix` proposed, or a file of that form.
        start: "base", or "composite" for the study's winner.

    Raises:
        InputError: The study or the mixture is unfit, or the study has not been run or has changed since.
        TrainingError: The training failed.
    """
    config, path = context.config, context.path
    if start not in STARTS:
        raise InputError(None, "--from", start, f"must be one of {', '.join(STARTS)}")
    refuse_unfit(config, path)
    check_trainer(config.fine_tuning.trainer, path)
    file = proposed_file(config) if mixture == PROPOSED else Path(mixture)
    content = read_mixture(file, config.distributions)
    steps = mixture_steps(config, content)
    fine_tunes = single_fine_tunes(config, path)
    with context.stored() as stored:
        summary = summarize_stored(context, stored)
        inputs = context.load_inputs(for_workers=False).on(stored.identity.settings["device"])
        inputs = distinguish(inputs, stored.ledger, context.progress)
        context.refuse_changed(stored, inputs.identity())
        inputs = inputs.exact()
        job = mixture_job(context, inputs, summary, content, steps, start)
        train(context, [job])
        with context.compute:
            inputs = inputs.on(context.compute.device)
            score_folders(context, inputs, [job.out], FOLDER, stored.ledger)
        jobs = trained_jobs(config, stored.ledger, inputs, fine_tunes)
        composites = {each.job.out: Composite.single(content_hash(each.job.out, FOLDER)) for each in jobs}
        comparison = compare_costs(context, inputs, stored.ledger, summary, jobs, composites)
    if job.out.name not in {each.folder for each in comparison.proposed}:
        context.progress.warning(
            "fine_tuning: has changed since the fine-tunes were trained, so this model is not compared with the others"
        )
    log_proposals(context, comparison)
    return comparison


def mixture_steps(config: StudyConfig, content: MixtureFile) -> int:
    """Optimizer steps of a mixture's tokens; InputError where these are less than a step."""
    step_tokens = config.fine_tuning.batch_size * config.evaluation.window
    if content.tokens < step_tokens:
        mend = f"is less than one step, which takes {step_tokens:,}"
        raise InputError(content.path, "tokens", content.tokens, mend)
    return round(content.tokens / step_tokens)


def mixture_job(
    context: StudyContext, inputs: Inputs, summary: Summary, content: MixtureFile, steps: int, start: str
) -> FineTuneJob:
    """The training; the composite that it begins with is written first, unless it is there."""
    config = context.config
    base, key = inputs.base.path, ""
    if start == "composite":
        assert summary.winner.coefficients is not None
        composite = inputs.identity().composite(summary.winner.coefficients)
        base, key = _written(context, inputs, composite), composite.key
    mixture = mixture_of(config, content.shares)
    parts = [(part.name, part.share) for part in mixture.parts]
    digest = sha256(repr((parts, steps, key)).encode()).hexdigest()[:12]
    prefix = FROM_COMPOSITE if start == "composite" else PREFIX
    settings = shared_settings(config, base) | {"steps": steps, "save_every": max(steps // STATES, 1)}
    return FineTuneJob(
        name=f"mixture, from the {start}",
        train=mixture,
        out=config.output / FOLDER / f"{prefix}{digest}",
        **settings,
    )


def _written(context: StudyContext, inputs: Inputs, composite: Composite) -> Path:
    """The folder of the winner, which is written unless it is there."""
    folder = context.config.output / FOLDER / "composite"
    if read_description(folder / MARKER).get("composite") != composite.key:
        context.progress.note(f"writing the winner into {folder}")
        write_composite(inputs.base, inputs.models(), composite, folder, lambda _: {})
    return folder
