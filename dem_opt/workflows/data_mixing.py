"""The way that the method replaces, as a baseline: one model trained for each mixture of the data, and its cost."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from typing import Any

from dem_opt.analysis.mixing_cost import (
    BaseScore,
    Cost,
    MergeResult,
    MixingComparison,
    MixtureResult,
    forward_cost,
    training_cost,
)
from dem_opt.checkpoints.files import content_hash
from dem_opt.checkpoints.locate import locate
from dem_opt.compute import Compute
from dem_opt.config import StudyConfig
from dem_opt.data.mixtures import Mixture, Part, lattice
from dem_opt.errors import InputError
from dem_opt.evaluation.worker import build
from dem_opt.planning.inputs import Inputs, check_headers, load_inputs
from dem_opt.progress import NullPhase, Progress
from dem_opt.search.loop import Driver
from dem_opt.search.trials import is_known, objectives, recall
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.tracking.job_runs import JobRun, Note
from dem_opt.training.fine_tune import FineTuned, FineTuneJob, job_identity, result_of
from dem_opt.types import SEARCH, SPLITS, Composite, ResultRow, StoredModel, Summary, WorkerSpec
from dem_opt.workflows.fine_tuning import settings, train

FOLDER = "mixing"
"""Where models of mixtures are written, in the study's output."""

STUDY = "study"
"""The grid that means the mixtures of the study file."""


def mix(
    config: StudyConfig,
    where: object,
    jobs: Sequence["MixtureJob"],
    ledger: Ledger,
    summary: Summary,
    compute: Compute,
    progress: Progress,
) -> MixingComparison:
    """Train and score a model for each job, and hold the winner against them."""
    files = load_inputs(config, where, worker=False).exact()
    train(config, [one.job for one in jobs], compute, _WithoutPhases(progress))
    with compute:
        sources = files.on(compute.device)
        composites = score_mixtures(sources, jobs, ledger, compute, progress)
    found = hold_against(config, where, sources, ledger, summary, jobs, composites)
    log_mixing(config, jobs, found, progress)
    return found


def planned(config: StudyConfig, where: object, grid: str) -> list["MixtureJob"]:
    """A job for each mixture of the grid and each budget.

    Raises InputError for a grid that is none, and for fine-tunes of which nobody knows what they took.
    """
    return mixture_jobs(config, mixtures(config, grid, where), singles(config, where))


class _WithoutPhases:
    """Progress without phases: a grid has too many trainings to draw a bar for each."""

    def __init__(self, progress: Progress) -> None:
        self.trial_finished = progress.trial_finished
        self.warning = progress.warning
        self.note = progress.note

    def phase(self, name: str, total: int | None = None, unit: str = "") -> NullPhase:
        """Begin work that reports nothing."""
        return NullPhase()


@dataclass(frozen=True)
class MixtureJob:
    """A model to be trained on a mixture: with which budget, of which shares."""

    budget: str
    shares: Mapping[str, float]
    job: FineTuneJob


def mixtures(config: StudyConfig, grid: str, where: object) -> list[dict[str, float]]:
    """The shares to be tried: those of the study file, or all multiples of 1 / grid.

    Raises InputError for a grid that is none, and for a study file without mixtures.
    """
    if grid == STUDY:
        if not config.data_mixing.mixtures:
            mend = "the study file has no mixtures: list some, or ask for a lattice, --data-mixing 3"
            raise InputError(where, "data_mixing.mixtures", None, mend)
        names = config.distributions
        return [{name: shares.get(name, 0.0) for name in names} for shares in config.data_mixing.mixtures]
    if not grid.isdecimal() or int(grid) < 1:
        mend = "is no grid: write `study` for the study file's mixtures, or 3 for all multiples of a third"
        raise InputError(None, "--data-mixing", grid, mend)
    return lattice(list(config.distributions), int(grid))


def singles(config: StudyConfig, where: object) -> dict[str, FineTuned]:
    """What each distribution's own fine-tuning gave.

    Raises InputError for a distribution without training data, or whose fine-tune `dem-opt train` did not make: then
    nobody knows what it took.
    """
    found = {}
    for name, one in config.distributions.items():
        kind, source = one.fine_tune
        if one.train is None:
            mend = "is needed to train on mixtures of it"
            raise InputError(where, f"distributions.{name}.train", None, mend)
        made = result_of(locate(source, f"distributions.{name}.{kind}"))
        if made is None:
            mend = "was not made by `dem-opt train`, so what it took is not known and mixtures can't be held against it"
            raise InputError(where, f"distributions.{name}.{kind}", str(source), mend)
        found[name] = made
    return found


def mixture_jobs(
    config: StudyConfig, tried: Sequence[Mapping[str, float]], made: Mapping[str, FineTuned]
) -> list[MixtureJob]:
    """A job for each budget and mixture, of the study's own settings but for the number of steps.

    all: steps for as many tokens as the single fine-tunes together; one: for as many as they have on average.
    """
    base, given = locate(config.base, "base"), config.fine_tuning
    step = given.batch_size * config.evaluation.window
    total = sum(one.tokens for one in made.values())
    steps = {"all": round(total / step), "one": round(total / len(made) / step)}
    shared = settings(config, base)
    if any(one.adapter is not None for one in config.distributions.values()):
        shared |= {"lora": given.lora, "merged": True}
    jobs = []
    for budget in dict.fromkeys(config.data_mixing.tokens):
        for number, shares in enumerate(tried, start=1):
            parts = tuple(
                Part(name, one.train, shares[name])
                for name, one in config.distributions.items()
                if shares[name] and one.train is not None
            )
            folder = f"{budget}-{sha256(repr([(part.name, part.share) for part in parts]).encode()).hexdigest()[:12]}"
            more: dict[str, Any] = {"steps": steps[budget], "save_every": max(steps[budget] // 10, 1)}
            job = FineTuneJob(
                **(shared | more),
                name=f"mixture {number} of {len(tried)}, tokens of {budget}",
                train=Mixture(parts),
                out=config.output / FOLDER / folder,
            )
            jobs.append(MixtureJob(budget, shares, job))
    return jobs


def score_mixtures(
    sources: Inputs, jobs: Sequence[MixtureJob], ledger: Ledger, compute: Compute, progress: Progress
) -> dict[str, Composite]:
    """Score every model on both splits, what the ledger has not; by the folder of each its composite.

    As many of them are in memory at once as the study has fine-tunes; one, where these are adapters or stay in files.
    """
    identity = sources.identity()
    models = [StoredModel(one.job.out, content_hash(one.job.out, FOLDER)) for one in jobs]
    composites = {model.path.name: Composite.single(model.content) for model in models}
    missing = [
        model
        for model in {one.content: one for one in models}.values()
        if not all(is_known(ledger, identity, composites[model.path.name], split) for split in SPLITS)
    ]
    whole = not sources.streamed and all(one.base is None for one in sources.fine_tunes.values())
    size = len(sources.fine_tunes) if whole else 1
    for start in range(0, len(missing), size):
        some = tuple(missing[start : start + size])
        spec = WorkerSpec(
            base=some[0],
            fine_tunes=some[1:],
            corpora=sources.corpora,
            dtype=sources.dtype,
            batch_tokens=sources.batch_tokens,
        )
        with closing(compute.workers(build, spec, progress)) as pool:
            driver = Driver(identity, ledger, pool, progress)
            for split in SPLITS:
                driver.measure([Composite.single(model.content) for model in some], split)
    return composites


def hold_against(
    config: StudyConfig,
    where: object,
    sources: Inputs,
    ledger: Ledger,
    summary: Summary,
    jobs: Sequence[MixtureJob],
    composites: Mapping[str, Composite],
) -> MixingComparison:
    """The comparison, from what the ledger and the checkpoints' records have."""
    identity, made = sources.identity(), singles(config, where)
    parameters = sum(map(prod, check_headers(config, where).architecture.parameters.values()))
    winner = summary.winner
    assert winner.coefficients is not None
    trained = sum((_training(one, parameters) for one in made.values()), Cost())
    edited = MergeResult(
        winner.label,
        winner.coefficients.weights,
        *_scored(winner),
        trained,
        forward_cost(parameters, winner.forward_tokens, winner.seconds),
    )
    mixed = tuple(_mixed(one, composites[one.job.out.name], identity, ledger, parameters) for one in jobs)
    return MixingComparison(
        config.name, identity.weights, parameters, edited, mixed, BaseScore(*_scored(summary.results[0]))
    )


def _scored(one: ResultRow) -> tuple[Mapping[str, float], Mapping[str, Mapping[str, float]]]:
    """A composite's objective by split, and its NLL by split and corpus."""
    nll = {split: {name: score.nll for name, score in scores.items()} for split, scores in one.scores.items()}
    return dict(one.objective), nll


def _training(made: FineTuned, parameters: int) -> Cost:
    """What a fine-tuning took; records of earlier versions are of full fine-tunings."""
    return training_cost(parameters, made.trained or parameters, made.tokens, made.seconds)


def _mixed(
    one: MixtureJob, composite: Composite, identity: StudyIdentity, ledger: Ledger, parameters: int
) -> MixtureResult:
    made = result_of(one.job.out)
    assert made is not None, "trained just now"
    scores = {split: recall(ledger, identity, composite, split) for split in SPLITS}
    minimized = objectives(ledger, identity)
    tokens = len(identity.keys(SEARCH)) * identity.windows(SEARCH) * one.job.window
    seconds = ledger.seconds(composite, identity.keys(SEARCH), identity.scoring)
    return MixtureResult(
        one.budget,
        one.shares,
        {split: minimized[split](scores[split]) for split in SPLITS},
        {split: {name: score.nll for name, score in by_name.items()} for split, by_name in scores.items()},
        _training(made, parameters) + forward_cost(parameters, tokens, seconds),
    )


def log_mixing(config: StudyConfig, jobs: Sequence[MixtureJob], found: MixingComparison, progress: Progress) -> None:
    """Every model of a mixture as a baseline run in MLflow."""
    curves = JobRun(config.tracking.uri, config.tracking.experiment, config.output / "artifacts", progress.warning)
    for one, mixed in zip(jobs, found.mixed, strict=True):
        parameters = {f"share.{name}": f"{share:g}" for name, share in one.shares.items()} | {"tokens": one.budget}
        metrics = {f"{split}.objective_nll": nll for split, nll in mixed.objective.items()}
        metrics |= {f"{split}.nll.{name}": nll for split, by_name in mixed.nll.items() for name, nll in by_name.items()}
        metrics |= {
            "trained_tokens": float(mixed.cost.trained_tokens),
            "training_flops": mixed.cost.training_flops,
            "seconds": mixed.cost.seconds,
        }
        curves.write(Note("data mixing", one.job.name, job_identity(one.job), parameters, metrics))
    curves.close()
