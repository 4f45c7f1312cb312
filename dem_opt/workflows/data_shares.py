"""`dem-opt mix`: propose shares of the training data from a study of merges, and write them for whoever trains."""

from collections.abc import Mapping, Sequence
from math import fsum, prod
from pathlib import Path

import numpy as np

from dem_opt.analysis.data_shares import allowed_shares, propose_shares
from dem_opt.analysis.mixing_cost import Cost, forward_cost, training_cost
from dem_opt.analysis.mixture_proposal import FEWEST, CorpusSize, Evidence, MixtureProposal, evidence_of
from dem_opt.analysis.power import Power
from dem_opt.checkpoints.architecture import silence_transformers
from dem_opt.checkpoints.files import read_header
from dem_opt.checkpoints.fit import check_base
from dem_opt.checkpoints.locate import locate
from dem_opt.config import StudyConfig
from dem_opt.data.documents import read_documents
from dem_opt.data.mixture_files import METRICS, MixtureRun, read_olmix
from dem_opt.data.packing import pack
from dem_opt.data.tokenize import load_tokenizer, without_pad_beyond
from dem_opt.errors import InputError
from dem_opt.planning.inputs import check_headers
from dem_opt.simplex import Space
from dem_opt.training.fine_tune import FineTuned
from dem_opt.types import HELD_OUT
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.data_mixing import single_fine_tunes
from dem_opt.workflows.mixture_file import FOLDER, write_mixture
from dem_opt.workflows.mixture_merges import has_sum, with_sum
from dem_opt.workflows.mixture_predictors import PREDICTORS, MixturePredictors
from dem_opt.workflows.summary import summarize_stored
from dem_opt.workflows.trained_mixtures import TrainedMixture, trained_mixtures

EPOCHS = 4.0
"""Most epochs unless asked otherwise: repeating data up to four times is nearly as good as new data (Muennighoff et al.
2023, arXiv:2305.16264)."""


def propose_mixture(
    context: StudyContext, tokens: str, kind: str, epochs: float, penalty: float, swarm: Path | None
) -> MixtureProposal:
    """Propose shares, and write them.

    Args:
        context: A study that has been run.
        tokens: Tokens of the training: a number, "all" for those of all fine-tunes together, "one" for those of one.
        kind: "curves" or "merges", which predict the objective of a mixture.
        epochs: Most passes over a distribution's data.
        penalty: Weight of the divergence from natural shares, in the objective's unit for each nat.
        swarm: Folder of Olmix's files with mixtures that were trained elsewhere, to judge the prediction by.

    Raises:
        InputError: An option or the study is unfit for it, or the budget is beyond the repetition limit.
    """
    config, path = context.config, context.path
    if kind not in PREDICTORS:
        raise InputError(None, "--by", kind, f"must be one of {', '.join(PREDICTORS)}")
    refuse_unfit(config, path)
    _check_number("--epochs", epochs, above=True)
    _check_number("--kl", penalty, above=False)
    fine_tunes = single_fine_tunes(config, path)
    steps = budget_steps(config, fine_tunes, tokens)
    elsewhere = [] if swarm is None else read_olmix(swarm, config.distributions)
    pairs = [] if swarm is None else _foreign_pairs(config, elsewhere, swarm)
    with context.stored() as stored:
        summary, identity = summarize_stored(context, stored), stored.identity
        trained = trained_mixtures(config, stored.ledger, identity)
    sizes = training_sizes(context)
    predictors = MixturePredictors(context, identity, summary, fine_tunes, sizes)
    windows = steps * config.fine_tuning.batch_size
    total, budget = predictors.total(steps), windows * config.evaluation.window
    space = config.space if has_sum(config.space, total) else with_sum(context, total).config.space
    allowed = allowed_shares(space, total, {name: epochs * size.windows / windows for name, size in sizes.items()})
    if allowed is None:
        raise _beyond(context, space, total, sizes, epochs, windows)
    natural = {name: size.windows / sum(each.windows for each in sizes.values()) for name, size in sizes.items()}
    if config.objective.protect:
        context.progress.warning(
            "objective.protect: no predictor of mixtures knows these constraints; they are ignored"
        )
    predictor = predictors.needed(kind, steps)
    detectable = Power.of(config, predictors.precision(kind, steps)).detectable(config.evaluation.windows)
    proposal = propose_shares(predictor, allowed, natural, penalty=penalty, detectable=detectable)
    parameters = sum(map(prod, check_headers(config, path).architecture.parameters.values()))
    result = MixtureProposal(
        study=config.name,
        unit=summary.unit_words,
        predictor=kind,
        total=total,
        proposal=proposal,
        steps=steps,
        tokens=budget,
        sizes=sizes,
        natural=natural,
        epochs={name: share * windows / sizes[name].windows for name, share in proposal.shares.items()},
        epochs_limit=epochs,
        penalty=penalty,
        evidence=(*_own_evidence(predictors, trained), *_evidence(predictors, pairs, steps, str(swarm), None)),
        probes=_probe_cost(fine_tunes, parameters),
        search=_search_cost(predictors, kind, steps, parameters),
        training=_training_ahead(fine_tunes, parameters, budget),
        folder=config.output / FOLDER,
    )
    write_mixture(config, result, predictors.trials(steps), trained)
    return result


def refuse_unfit(config: StudyConfig, path: Path) -> None:
    """Raise InputError for a study of adapters, or with a distribution that has no training data."""
    for name, distribution in config.distributions.items():
        if distribution.adapter is not None:
            mend = "an adapter, and mixtures are trained with all weights: give a checkpoint"
            raise InputError(path, f"distributions.{name}.adapter", str(distribution.adapter), mend)
        if distribution.train is None:
            raise InputError(path, f"distributions.{name}.train", None, "is needed to train on a mixture of it")


def budget_steps(config: StudyConfig, fine_tunes: Mapping[str, FineTuned], tokens: str) -> int:
    """Optimizer steps of a budget.

    Raises:
        InputError: It is no number and none of the words, or less than a step.
    """
    step_tokens = config.fine_tuning.batch_size * config.evaluation.window
    total = sum(record.tokens for record in fine_tunes.values())
    budgets = {"all": total, "one": total / len(fine_tunes)}
    if tokens not in budgets and not (tokens.isdecimal() and int(tokens)):
        mend = "must be a number of tokens, `all` for those of all fine-tunes together, or `one` for those of one"
        raise InputError(None, "--tokens", tokens, mend)
    budget = budgets[tokens] if tokens in budgets else int(tokens)
    if budget < step_tokens:
        raise InputError(None, "--tokens", tokens, f"is less than one step, which takes {step_tokens:,}")
    return round(budget / step_tokens)


def training_sizes(context: StudyContext) -> dict[str, CorpusSize]:
    """Pack each distribution's training data, to know how many windows it makes."""
    silence_transformers()
    config = context.config
    base = locate(config.base, "base")
    architecture = check_base(read_header(base, "base"))
    tokenizer = without_pad_beyond(load_tokenizer(base), architecture.parameters[architecture.embedding][0])
    sizes = {}
    with context.progress.phase("reading training data", len(config.distributions), "distributions") as phase:
        for name, distribution in config.distributions.items():
            assert distribution.train is not None
            documents = read_documents(distribution.train, f"distributions.{name}.train")
            packing = pack(documents, tokenizer, config.evaluation.window, today=config.evaluation.date)
            if not len(packing.windows):
                raise InputError(context.path, f"distributions.{name}.train", str(distribution.train), "has no text")
            tokens = sum(len(encoded.ids_L) for encoded in packing.encoded)
            sizes[name] = CorpusSize(windows=len(packing.windows), documents=len(documents), tokens=tokens)
            phase.advance(1)
    return sizes


def _check_number(option: str, value: float, *, above: bool) -> None:
    if not np.isfinite(value) or value < 0 or (above and not value):
        raise InputError(None, option, value, f"must be a number {'above' if above else 'of at least'} 0")


def _beyond(
    context: StudyContext, space: Space, total: float, sizes: Mapping[str, CorpusSize], epochs: float, windows: int
) -> InputError:
    """The error for a budget that the limit, or the study's bounds, leave no shares for."""
    if allowed_shares(space, total, dict.fromkeys(sizes, 1.0)) is None:
        mend = f"leave no coefficients with the sum {total:g} of this budget"
        return InputError(context.path, "simplex.bounds", None, mend)
    batch, window = context.config.fine_tuning.batch_size, context.config.evaluation.window
    allowed, refused = 0, windows // batch  # steps; bisection, since more of them make the largest shares smaller
    while refused - allowed > 1:
        steps = (allowed + refused) // 2
        most = {name: epochs * size.windows / (steps * batch) for name, size in sizes.items()}
        allowed, refused = (steps, refused) if allowed_shares(space, total, most) else (allowed, steps)
    largest = f"at most {allowed * batch * window:,} tokens, or more --epochs" if allowed else "more --epochs"
    mend = f"needs more than {epochs:g} epochs of some distribution, whatever the shares; {largest}"
    return InputError(None, "--tokens", windows * window, mend)


def _probe_cost(fine_tunes: Mapping[str, FineTuned], parameters: int) -> Cost:
    costs = (
        training_cost(parameters, record.trained or parameters, record.tokens, record.seconds)
        for record in fine_tunes.values()
    )
    return sum(costs, Cost())


def _training_ahead(fine_tunes: Mapping[str, FineTuned], parameters: int, tokens: int) -> Cost:
    """Cost of a training at the fine-tunes' speed."""
    speed = sum(record.seconds for record in fine_tunes.values()) / sum(record.tokens for record in fine_tunes.values())
    return training_cost(parameters, parameters, tokens, speed * tokens)


def _search_cost(predictors: MixturePredictors, kind: str, steps: int, parameters: int) -> Cost:
    """Cost of the merges that a proposal rests on; for curves, of the base's and the fine-tunes' scores."""
    merges = predictors.merges(steps) if kind == "merges" else None
    if merges is None:
        rows = predictors.baselines
        return forward_cost(parameters, sum(row.forward_tokens for row in rows), sum(row.seconds for row in rows))
    tokens = sum(trial.evaluation.forward_tokens for trial in merges.trials)
    seconds = sum(trial.evaluation.merge_seconds + trial.evaluation.score_seconds for trial in merges.trials)
    return forward_cost(parameters, tokens, seconds)


def _own_evidence(predictors: MixturePredictors, trained: Sequence[TrainedMixture]) -> list[Evidence]:
    """Judge the predictors by the study's own trained mixtures, budget by budget."""
    by_steps: dict[int, list[TrainedMixture]] = {}
    for mixture in trained:
        if mixture.start == "base" and HELD_OUT in mixture.objective:
            by_steps.setdefault(mixture.training.steps, []).append(mixture)
    evidence = []
    for steps, mixtures in sorted(by_steps.items()):
        pairs = [(mixture.shares, mixture.objective[HELD_OUT]) for mixture in mixtures]
        evidence += _evidence(predictors, pairs, steps, "this study", mixtures[0].training.tokens)
    return evidence


def _evidence(
    predictors: MixturePredictors,
    pairs: Sequence[tuple[Mapping[str, float], float]],
    steps: int,
    source: str,
    tokens: int | None,
) -> list[Evidence]:
    """Judge every predictor that is known for these steps."""
    if len(pairs) < FEWEST:
        return []
    known = predictors.known(steps).items()
    return [each for kind, predictor in known for each in evidence_of(kind, predictor, pairs, source, tokens)]


def _foreign_pairs(
    config: StudyConfig, runs: Sequence[MixtureRun], swarm: Path
) -> list[tuple[Mapping[str, float], float]]:
    """Shares of mixtures that were trained elsewhere, with the weighted mean of their metrics `nll.NAME`."""
    weights = {name: weight for name, weight in config.weights.items() if weight}
    pairs = []
    for run in runs:
        for name in weights:
            if f"nll.{name}" not in run.metrics:
                mend = f"is no column; there are {', '.join(run.metrics)}"
                raise InputError(swarm / METRICS, f"nll.{name}", None, mend)
        mean = fsum(weight * run.metrics[f"nll.{name}"] for name, weight in weights.items()) / fsum(weights.values())
        pairs.append((run.shares, mean))
    return pairs
