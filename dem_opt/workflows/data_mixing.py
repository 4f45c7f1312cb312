"""The data-mixing baseline: train a model for each mixture of the data, and compare the winner with them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path

from dem_opt.analysis.bootstrap import Difference, difference
from dem_opt.analysis.mixing_cost import (
    BaseScore,
    Cost,
    MergeResult,
    MixingComparison,
    MixtureResult,
    ProposedResult,
    forward_cost,
    proposed_name,
    training_cost,
)
from dem_opt.analysis.sampling import documents_of
from dem_opt.checkpoints.files import content_hash
from dem_opt.checkpoints.locate import locate
from dem_opt.config import StudyConfig
from dem_opt.data.mixtures import Mixture, Part, lattice
from dem_opt.errors import InputError
from dem_opt.evaluation.worker import build
from dem_opt.planning.inputs import Inputs, check_headers, refuse_several
from dem_opt.progress import NullPhase, Progress
from dem_opt.search.loop import Driver
from dem_opt.search.trials import is_known, objectives, recall
from dem_opt.storage.ledger import Ledger
from dem_opt.tracking import JobNote
from dem_opt.training.fine_tune import FineTuned, FineTuneJob, is_finished, job_identity, result_of
from dem_opt.types import HELD_OUT, SEARCH, SPLITS, Composite, ResultRow, Score, StoredModel, Summary, WorkerSpec
from dem_opt.workflows.configurations import distinguish
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.fine_tuning import shared_settings, train
from dem_opt.workflows.summary import summarize_stored
from dem_opt.workflows.trained_mixtures import FOLDER, TrainedMixture, trained_mixtures

STUDY = "study"
"""Name of the grid that stands for the mixtures of the study file."""


@dataclass(frozen=True, kw_only=True)
class MixtureJob:
    """A model to be trained on a data mixture.

    Attributes:
        budget: "all" for as many tokens as all single fine-tunes together, "one" for as many as they have on average.
        shares: Shares of the tokens by distribution.
        job: The training.
    """

    budget: str
    shares: Mapping[str, float]
    job: FineTuneJob


class _WithoutPhases:
    """Progress without phases: a grid has too many trainings to draw a bar for each."""

    def __init__(self, progress: Progress) -> None:
        self.search_continued = progress.search_continued
        self.trial_finished = progress.trial_finished
        self.time_left = progress.time_left
        self.warning = progress.warning
        self.note = progress.note

    def phase(self, name: str, total: int | None = None, unit: str = "") -> NullPhase:
        """Begin work that reports nothing."""
        return NullPhase()


def mix(context: StudyContext, grid: str) -> MixingComparison:
    """Train and score a model for each mixture and budget, and compare the winner with them.

    Args:
        context: A study that has been run.
        grid: "study" for the study file's mixtures, "3" for all multiples of a third.

    Raises:
        InputError: The grid is invalid, the study has not been run, or the cost of a fine-tune is unknown.
    """
    config, path = context.config, context.path
    shares = mixtures(config, grid, path)
    jobs = mixture_jobs(config, shares, single_fine_tunes(config, path))
    with context.stored() as stored:
        summary = summarize_stored(context, stored)
        inputs = context.load_inputs(for_workers=False)
        inputs = distinguish(inputs.on(stored.identity.settings["device"]), stored.ledger, context.progress)
        context.refuse_changed(stored, inputs.identity())
        inputs = inputs.exact()
        train(context, [mixture.job for mixture in jobs], _WithoutPhases(context.progress))
        with context.compute:
            inputs = inputs.on(context.compute.device)
            folders = [mixture.job.out for mixture in jobs]
            composites = score_folders(context, inputs, folders, FOLDER, stored.ledger)
        comparison = compare_costs(context, inputs, stored.ledger, summary, jobs, composites)
    log_mixtures(context, jobs, comparison)
    return comparison


def mixtures(config: StudyConfig, grid: str, path: Path) -> list[dict[str, float]]:
    """Return the shares of each mixture of a grid, by distribution.

    Raises:
        InputError: The grid is invalid, or the study file has no mixtures.
    """
    if grid == STUDY:
        if not config.data_mixing.mixtures:
            mend = "the study file has no mixtures: list some, or ask for a lattice, --data-mixing 3"
            raise InputError(path, "data_mixing.mixtures", None, mend)
        names = config.distributions
        return [{name: shares.get(name, 0.0) for name in names} for shares in config.data_mixing.mixtures]
    if not grid.isdecimal() or int(grid) < 1:
        mend = "is no grid: write `study` for the study file's mixtures, or 3 for all multiples of a third"
        raise InputError(None, "--data-mixing", grid, mend)
    return lattice(list(config.distributions), int(grid))


def single_fine_tunes(config: StudyConfig, path: Path) -> dict[str, FineTuned]:
    """Return the record of each distribution's own fine-tuning.

    Raises:
        InputError: A distribution has no training data or several fine-tunes, or its fine-tune was not made by `dem-opt
            train`.
    """
    refuse_several(config, path, "mixtures are compared with one fine-tune of each distribution: name one for each")
    records = {}
    for name, distribution in config.distributions.items():
        kind, source = distribution.fine_tune
        if distribution.train is None:
            mend = "is needed to train on mixtures of it"
            raise InputError(path, f"distributions.{name}.train", None, mend)
        record = result_of(locate(source, f"distributions.{name}.{kind}"))
        if record is None:
            mend = "was not made by `dem-opt train`, so its cost is not known and mixtures cannot be compared with it"
            raise InputError(path, f"distributions.{name}.{kind}", str(source), mend)
        records[name] = record
    return records


def mixture_jobs(
    config: StudyConfig, grid: Sequence[Mapping[str, float]], fine_tunes: Mapping[str, FineTuned]
) -> list[MixtureJob]:
    """Return a job for each budget and mixture, with the study's settings but for the number of steps.

    Args:
        config: The study file's content.
        grid: Shares of each mixture by distribution.
        fine_tunes: Records of the single fine-tunes, whose tokens are the budget.
    """
    step_tokens = config.fine_tuning.batch_size * config.evaluation.window
    total = sum(record.tokens for record in fine_tunes.values())
    steps = {"all": round(total / step_tokens), "one": round(total / len(fine_tunes) / step_tokens)}
    settings = shared_settings(config, locate(config.base, "base"))
    if any(distribution.adapter is not None for distribution in config.distributions.values()):
        settings |= {"lora": config.fine_tuning.lora, "merged": True}
    jobs = []
    for budget in dict.fromkeys(config.data_mixing.tokens):
        settings |= {"steps": steps[budget], "save_every": max(steps[budget] // 10, 1)}
        for number, shares in enumerate(grid, start=1):
            mixture = mixture_of(config, shares)
            # The folder is found again by this hash: a list of plain tuples, whatever `Part` becomes.
            digest = sha256(repr([(part.name, part.share) for part in mixture.parts]).encode()).hexdigest()[:12]
            job = FineTuneJob(
                name=f"mixture {number} of {len(grid)}, tokens of {budget}",
                train=mixture,
                out=config.output / FOLDER / f"{budget}-{digest}",
                **settings,
            )
            jobs.append(MixtureJob(budget=budget, shares=shares, job=job))
    return jobs


def mixture_of(config: StudyConfig, shares: Mapping[str, float]) -> Mixture:
    """The study's training data with these shares."""
    parts = (
        Part(name, distribution.train, shares[name])
        for name, distribution in config.distributions.items()
        if shares[name] and distribution.train is not None
    )
    return Mixture(tuple(parts))


def score_folders(
    context: StudyContext, inputs: Inputs, folders: Sequence[Path], field: str, ledger: Ledger
) -> dict[Path, Composite]:
    """Score every model on both splits, unless the ledger has its scores; return its composite by its folder.

    As many models are in memory at once as the study has fine-tunes, but only one where these are adapters or stay in
    their files.  `field` is what messages call the folders.
    """
    identity = inputs.identity()
    models = [StoredModel(folder, content_hash(folder, field), field=field) for folder in folders]
    composites = {model.path: Composite.single(model.content) for model in models}
    missing = [
        model
        for model in {model.content: model for model in models}.values()
        if not all(is_known(ledger, identity, composites[model.path], split) for split in SPLITS)
    ]
    are_whole = not inputs.streamed and all(model.base is None for model in inputs.fine_tunes.values())
    size = len(inputs.fine_tunes) if are_whole else 1
    for start in range(0, len(missing), size):
        first, *others = missing[start : start + size]
        spec = WorkerSpec(
            base=first,
            fine_tunes=tuple(others),
            corpora=inputs.corpora,
            dtype=inputs.dtype,
            batch_tokens=inputs.batch_tokens,
        )
        with closing(context.compute.workers(build, spec, context.progress)) as pool:
            driver = Driver(
                identity=identity, ledger=ledger, pool=pool, progress=context.progress, study=context.config.name
            )
            driver.measure([Composite.single(model.content) for model in (first, *others)], SPLITS, "data mixing")
    return composites


def compare_costs(
    context: StudyContext,
    inputs: Inputs,
    ledger: Ledger,
    summary: Summary,
    jobs: Sequence[MixtureJob],
    composites: Mapping[Path, Composite],
) -> MixingComparison:
    """Compare winner and mixtures by loss and cost, from the ledger and the checkpoints' records."""
    config, path = context.config, context.path
    parameters = sum(map(prod, check_headers(config, path).architecture.parameters.values()))
    winner = summary.winner
    assert winner.coefficients is not None
    objective, nll = _scores(winner)
    trainings = (_training_cost(record, parameters) for record in single_fine_tunes(config, path).values())
    merged = MergeResult(
        label=winner.label,
        coefficients=winner.coefficients.weights,
        objective=objective,
        nll=nll,
        training=sum(trainings, Cost()),
        search=forward_cost(parameters, winner.forward_tokens, winner.seconds),
    )
    minus_winner = _difference_to(winner, inputs, ledger)
    mixed = tuple(
        _mixture_result(mixture, composites[mixture.job.out], inputs, ledger, parameters, minus_winner)
        for mixture in jobs
    )
    base = BaseScore(*_scores(summary.results[0]), minus_winner(summary.results[0].scores[HELD_OUT]))
    proposed = [mixture for mixture in trained_mixtures(config, ledger, inputs.identity()) if mixture.is_proposed]
    proposed.sort(key=lambda mixture: (mixture.start, mixture.training.tokens))
    return MixingComparison(
        study=config.name,
        weights=inputs.identity().weights,
        parameters=parameters,
        edited=merged,
        mixed=mixed,
        base=base,
        unit=summary.unit_words,
        proposed=tuple(_proposed_result(mixture, inputs, ledger, parameters, minus_winner) for mixture in proposed),
    )


def _difference_to(winner: ResultRow, inputs: Inputs, ledger: Ledger) -> Callable[[Mapping[str, Score]], Difference]:
    """A function of a model's held-out scores: its objective minus the winner's, on the same windows."""
    identity = inputs.identity()
    objective, documents = objectives(ledger, identity)[HELD_OUT], documents_of(ledger, identity, HELD_OUT)
    return lambda scores: difference(scores, winner.scores[HELD_OUT], objective, documents)


def trained_jobs(
    config: StudyConfig, ledger: Ledger, inputs: Inputs, fine_tunes: Mapping[str, FineTuned]
) -> list[MixtureJob]:
    """The jobs of the study file's mixtures that are trained and scored already."""
    identity = inputs.identity()
    names = config.distributions
    grid = [{name: shares.get(name, 0.0) for name in names} for shares in config.data_mixing.mixtures]
    return [
        mixture
        for mixture in mixture_jobs(config, grid, fine_tunes)
        if is_finished(mixture.job)
        and all(
            is_known(ledger, identity, Composite.single(content_hash(mixture.job.out, FOLDER)), split)
            for split in SPLITS
        )
    ]


def _scores(row: ResultRow) -> tuple[Mapping[str, float], Mapping[str, Mapping[str, float]]]:
    """Return a row's objective by split, and its NLL by split and corpus."""
    nll = {split: {name: score.nll for name, score in scores.items()} for split, scores in row.scores.items()}
    return dict(row.objective), nll


def _training_cost(record: FineTuned, parameters: int) -> Cost:
    """Return the cost of a training; records without a count of trained parameters are of full fine-tunings."""
    return training_cost(parameters, record.trained or parameters, record.tokens, record.seconds)


def _mixture_result(
    mixture: MixtureJob,
    composite: Composite,
    inputs: Inputs,
    ledger: Ledger,
    parameters: int,
    minus_winner: Callable[[Mapping[str, Score]], Difference],
) -> MixtureResult:
    record, identity = result_of(mixture.job.out), inputs.identity()
    assert record is not None, "trained just now"
    scores = {split: recall(ledger, identity, composite, split) for split in SPLITS}
    objective = objectives(ledger, identity)
    return MixtureResult(
        budget=mixture.budget,
        shares=mixture.shares,
        objective={split: objective[split](scores[split]) for split in SPLITS},
        nll={split: {name: score.nll for name, score in by_name.items()} for split, by_name in scores.items()},
        cost=_training_cost(record, parameters) + _scoring_cost(composite, inputs, ledger, parameters),
        difference=minus_winner(scores[HELD_OUT]),
    )


def _scoring_cost(composite: Composite, inputs: Inputs, ledger: Ledger, parameters: int) -> Cost:
    """Cost of scoring a model on the search split."""
    identity = inputs.identity()
    tokens = len(identity.keys(SEARCH)) * identity.windows(SEARCH) * inputs.config.evaluation.window
    return forward_cost(parameters, tokens, ledger.seconds(composite, identity.keys(SEARCH), identity.scoring))


def _proposed_result(
    mixture: TrainedMixture,
    inputs: Inputs,
    ledger: Ledger,
    parameters: int,
    minus_winner: Callable[[Mapping[str, Score]], Difference],
) -> ProposedResult:
    composite = Composite.single(content_hash(mixture.folder, FOLDER))
    return ProposedResult(
        folder=mixture.folder.name,
        start=mixture.start,
        shares=mixture.shares,
        objective=mixture.objective,
        nll={split: {name: score.nll for name, score in by_name.items()} for split, by_name in mixture.scores.items()},
        cost=_training_cost(mixture.training, parameters) + _scoring_cost(composite, inputs, ledger, parameters),
        difference=minus_winner(mixture.scores[HELD_OUT]),
    )


def log_mixtures(context: StudyContext, jobs: Sequence[MixtureJob], comparison: MixingComparison) -> None:
    """Log every model of a mixture as a run of its own."""
    with closing(context.track_jobs()) as tracker:
        for mixture, result in zip(jobs, comparison.mixed, strict=True):
            tracker.write(
                JobNote(
                    kind="data mixing",
                    name=mixture.job.name,
                    key=job_identity(mixture.job),
                    parameters=_shares(mixture.shares) | {"tokens": mixture.budget},
                    metrics=_metrics(result),
                )
            )


def log_proposals(context: StudyContext, comparison: MixingComparison) -> None:
    """Log every model that was trained on proposed shares as a run of its own."""
    with closing(context.track_jobs()) as tracker:
        for result in comparison.proposed:
            tracker.write(
                JobNote(
                    kind="data mixing",
                    name=proposed_name(comparison, result),
                    key=sha256(repr((result.folder, sorted(result.objective.items()))).encode()).hexdigest(),
                    parameters=_shares(result.shares)
                    | {"tokens": str(result.cost.trained_tokens), "start": result.start, "folder": result.folder},
                    metrics=_metrics(result),
                )
            )


def _shares(shares: Mapping[str, float]) -> dict[str, str]:
    return {f"share.{name}": f"{share:g}" for name, share in shares.items()}


def _metrics(result: MixtureResult | ProposedResult) -> dict[str, float]:
    metrics = {f"{split}.objective_nll": nll for split, nll in result.objective.items()}
    metrics |= {f"{split}.nll.{name}": nll for split, by_name in result.nll.items() for name, nll in by_name.items()}
    return metrics | {
        "trained_tokens": float(result.cost.trained_tokens),
        "training_flops": result.cost.training_flops,
        "seconds": result.cost.seconds,
    }
