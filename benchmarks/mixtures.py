"""Do merges predict which data mixture is best?  `python benchmarks/mixtures.py STUDY`.

Trains the mixtures of a study file (`data_mixing`) and runs the study, unless that is done.  Then it scores merges at
the shares s of every mixture.  There are several ways to make coefficients w of shares, of the tokens T of a mixture
and of those T_i of a fine-tune:

    shares           w = s
    equal norms      w = s / |v| , scaled to a sum of 1 at equal shares, as if all vectors had one length
    tokens seen      w = s T / T_i , as if every token moved the model equally far
    root of tokens   w = sqrt(s T / T_i) , as if it moved in a random walk
    gains of tokens  w = g(s T) / g(T_i) with the gain g of the training curve below; also divided by their sum

With `--long`, the base is also fine-tuned on each distribution with the tokens of all fine-tunes, and steps are kept:

    long             w = s with these longer fine-tunes
    kept steps       the sum of vectors, each at the step at which its fine-tune has seen s T tokens

Each is judged by the held-out loss of the trained models, by distribution and on the mean: Spearman's rank correlation,
with the 95% interval over mixtures, and the regret of the mixture that is put first, in nats per token.  Merges are
scored on the search split.  Controls that need no merge: the divergence from equal shares, and training curves,

    L_i(s) = a_i - b_i log(1 + n / m_i)  with  n = s_i T ,    fitted to the losses of the fine-tune's steps
    (`dem_opt.analysis.training_curves`), alone and with what fine-tunes have lost on the others' distributions
    (`dem_opt.analysis.data_shares.CurvePredictor`).

Last, regressions learn from k of the mixtures and predict the others: from shares, as RegMix does, from the losses of
the merges, and from both.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dem_opt import config as study_file
from dem_opt.analysis.data_shares import CurvePredictor, forgotten
from dem_opt.analysis.mixing_cost import MixingComparison, MixtureResult
from dem_opt.analysis.mixture_prediction import LeftOut, Quality, left_out, quality
from dem_opt.analysis.training_curves import TrainingCurve, fit_curve
from dem_opt.analysis.vector_geometry import vectors_of
from dem_opt.checkpoints.files import content_hash
from dem_opt.checkpoints.locate import locate
from dem_opt.checkpoints.training_record import JOURNAL, STEPS, read_journal
from dem_opt.compute import InProcessCompute
from dem_opt.config import StudyConfig
from dem_opt.evaluation.worker import build
from dem_opt.planning.inputs import Inputs, load_inputs
from dem_opt.progress import NullProgress
from dem_opt.search.loop import Driver
from dem_opt.search.trials import recall
from dem_opt.simplex import UNIT, Coefficients
from dem_opt.storage.engine import connect
from dem_opt.storage.ledger import Ledger
from dem_opt.study import Study
from dem_opt.training.fine_tune import FineTuneJob, fine_tune
from dem_opt.types import HELD_OUT, SEARCH, Composite, StoredModel, WorkerSpec
from dem_opt.workflows.data_mixing import single_fine_tunes
from dem_opt.workflows.fine_tuning import shared_settings

Array = NDArray[np.float64]

KEPT = 5
"""Steps between the kept ones of longer fine-tunes."""

TRAINED = (4, 6, 8, 10)
"""Numbers of mixtures that regressions learn from."""


@dataclass(frozen=True)
class Judged:
    """A predictor's judgement: on each distribution, and on the mean."""

    predictor: str
    by_name: Mapping[str, Quality]
    mean: Quality


class Telling(NullProgress):
    """Notes for people."""

    def note(self, message: str) -> None:
        """Print a line, at once."""
        print(f"  {message}", flush=True)


@dataclass(frozen=True)
class Vectors:
    """Facts about the fine-tunes that rules use, by distribution.

    Attributes:
        factors: Mean inverse length of all vectors over it, which a vector is divided by its own length with.
        steps: Steps.
        curves: Training curves.
    """

    factors: Mapping[str, float]
    steps: Mapping[str, int]
    curves: Mapping[str, TrainingCurve]

    @classmethod
    def of(cls, config: StudyConfig, inputs: Inputs, path: Path) -> "Vectors":
        """Measure a study's fine-tunes."""
        norms = vectors_of(inputs.base, inputs.fine_tunes).norms
        mean = float(np.mean([1 / norm for norm in norms]))
        return cls(
            {name: 1 / norm / mean for name, norm in zip(inputs.fine_tunes, norms, strict=True)},
            {name: record.steps for name, record in single_fine_tunes(config, path).items()},
            training_curves(config),
        )

    def gain(self, name: str, steps: float) -> float:
        """The part of a fine-tune's gain on its own data that so many steps have."""
        scale = self.curves[name].scale
        return float(np.log1p(steps / scale) / np.log1p(self.steps[name] / scale))


Rule = Callable[[Vectors, str, float, float], float]
"""The coefficient of a distribution with a share, in a mixture of so many steps."""

RULES: Mapping[str, Rule] = {
    "shares": lambda vectors, name, share, steps: share,
    "equal norms": lambda vectors, name, share, steps: share * vectors.factors[name],
    "tokens seen": lambda vectors, name, share, steps: share * steps / vectors.steps[name],
    "root of tokens": lambda vectors, name, share, steps: (share * steps / vectors.steps[name]) ** 0.5,
    "gains of tokens": lambda vectors, name, share, steps: vectors.gain(name, share * steps),
}

UNIT_SUM = "gains of tokens, sum 1"
"""The last rule with coefficients divided by their sum."""


def coefficients(rule: str, vectors: Vectors, shares: Mapping[str, float], steps: float) -> Coefficients:
    """The coefficients that stand for a mixture of so many steps."""
    weight_of = RULES["gains of tokens" if rule == UNIT_SUM else rule]
    weights = {name: weight_of(vectors, name, share, steps) for name, share in shares.items()}
    total = sum(weights.values()) if rule == UNIT_SUM else 1
    return Coefficients(tuple(sorted((name, round(weight / total * UNIT)) for name, weight in weights.items())))


Losses = dict[str, dict[str, list[dict[str, float]]]]
"""NLL on the search split in nats per token: by budget, rule, mixture and distribution."""


def merge_losses(config: StudyConfig, path: Path, comparison: MixingComparison) -> Losses:
    """Score the merge of each mixture by every rule."""
    inputs = load_inputs(config, path)
    vectors, identity = Vectors.of(config, inputs, path), inputs.identity()
    step_tokens = config.fine_tuning.batch_size * config.evaluation.window
    wanted = {
        budget: {
            rule: [
                identity.composite(
                    coefficients(rule, vectors, mixture.shares, mixture.cost.trained_tokens / step_tokens)
                )
                for mixture in mixtures
            ]
            for rule in (*RULES, UNIT_SUM)
        }
        for budget, mixtures in by_budget(comparison).items()
    }
    return scored(config, inputs, inputs.spec(), wanted)


def scored(
    config: StudyConfig, inputs: Inputs, spec: WorkerSpec, wanted: Mapping[str, Mapping[str, Sequence[Composite]]]
) -> Losses:
    """Score composites on the search split, as far as the ledger lacks them."""
    identity, engine = inputs.identity(), connect(config.storage)
    ledger, losses = Ledger(engine), Losses()
    with closing(InProcessCompute().workers(build, spec, NullProgress())) as pool:
        driver = Driver(identity=identity, ledger=ledger, pool=pool, progress=NullProgress(), study=config.name)
        for budget, by_rule in wanted.items():
            for rule, composites in by_rule.items():
                driver.measure(composites, [SEARCH], "benchmark")
                losses.setdefault(budget, {})[rule] = [
                    {name: score.nll for name, score in recall(ledger, identity, composite, SEARCH).items()}
                    for composite in composites
                ]
    engine.dispose()
    return losses


def long_fine_tunes(config: StudyConfig, inputs: Inputs, path: Path) -> dict[str, Path]:
    """Runs with kept steps, by distribution: as many steps as all fine-tunes together have."""
    records = single_fine_tunes(config, path)
    steps = sum(record.steps for record in records.values())
    folders = {}
    for name, distribution in config.distributions.items():
        assert distribution.train is not None
        corpus = next(each for each in inputs.corpora if (each.distribution, each.split) == (name, SEARCH))
        settings = shared_settings(config, inputs.base.path) | {"steps": steps, "save_every": KEPT}
        job = FineTuneJob(
            name=name, train=distribution.train, out=config.output / "long" / name, validation=corpus, **settings
        )
        folders[name] = fine_tune(job).path
    return folders


def long_losses(config: StudyConfig, path: Path, comparison: MixingComparison) -> Losses:
    """Score the merges of longer fine-tunes, and of their kept steps."""
    inputs = load_inputs(config, path)
    runs, base = long_fine_tunes(config, inputs, path), inputs.base.content
    step_tokens = config.fine_tuning.batch_size * config.evaluation.window
    last = {name: max(int(step.name) for step in (run / STEPS).iterdir()) for name, run in runs.items()}
    stored: dict[Path, StoredModel] = {}

    def composite(terms: Mapping[str, tuple[float, float]]) -> Composite:
        """The sum of vectors at (step, coefficient) by distribution; the nearest kept step stands for a step."""
        units = dict[str, int]()
        for name, (step, weight) in terms.items():
            folder = runs[name] / STEPS / str(KEPT * round(step / KEPT))
            if step >= KEPT / 2:
                model = stored.setdefault(folder, StoredModel(folder, content_hash(folder)))
                units[model.content] = round(weight * UNIT)
        return Composite.of(units | {base: UNIT - sum(units.values())})

    wanted = {}
    for budget, mixtures in by_budget(comparison).items():
        steps = mixtures[0].cost.trained_tokens / step_tokens
        wanted[budget] = {
            "long": [composite({n: (last[n], share) for n, share in each.shares.items()}) for each in mixtures],
            "kept steps": [composite({n: (share * steps, 1) for n, share in each.shares.items()}) for each in mixtures],
        }
    return scored(config, inputs, replace(inputs.spec(), fine_tunes=tuple(stored.values())), wanted)


def by_budget(comparison: MixingComparison) -> dict[str, list[MixtureResult]]:
    """The mixtures of each budget."""
    budgets: dict[str, list[MixtureResult]] = {}
    for mixture in comparison.mixed:
        budgets.setdefault(mixture.budget, []).append(mixture)
    return budgets


def training_curves(config: StudyConfig) -> dict[str, TrainingCurve]:
    """The training curve of each fine-tune."""
    curves = {}
    for name, distribution in config.distributions.items():
        kind, source = distribution.fine_tune
        points = read_journal(locate(source, f"distributions.{name}.{kind}") / JOURNAL)
        curve = fit_curve([point.loss for point in points if point.loss is not None])
        assert curve is not None, f"{name}: too few steps"
        curves[name] = curve
    return curves


def judge(predictor: str, predicted_NL: Array, losses_NL: Array, names: Sequence[str]) -> Judged:
    """Judge predicted losses by those of the trained models; the mean is of equal weights."""
    by_name = {name: quality(predicted_NL[:, column], losses_NL[:, column]) for column, name in enumerate(names)}
    return Judged(predictor, by_name, quality(predicted_NL.mean(axis=1), losses_NL.mean(axis=1)))


def controls(study: Study, path: Path, mixtures: Sequence[MixtureResult], names: Sequence[str]) -> dict[str, Array]:
    """Predictions without a merge, [N, L]."""
    config = study_file.load(path)
    shares_NL = np.array([[mixture.shares[name] for name in names] for mixture in mixtures])
    step_tokens = config.fine_tuning.batch_size * config.evaluation.window
    curves = training_curves(config)
    steps_N = np.array([mixture.cost.trained_tokens / step_tokens for mixture in mixtures])
    [steps] = set(steps_N.tolist())
    trained = {name: record.steps for name, record in single_fine_tunes(config, path).items()}
    forgotten_LL = forgotten(study.summary().results, names)
    assert forgotten_LL is not None, "the study was run"
    own, both = (
        CurvePredictor(
            tuple(curves[name] for name in names),
            (1.0,) * len(names),
            steps,
            np.array([float(trained[name]) for name in names]),
            lost_LL,
        ).losses(shares_NL)
        for lost_LL in (np.zeros_like(forgotten_LL), forgotten_LL)
    )
    entropy_NL = shares_NL * np.log(np.where(shares_NL > 0, shares_NL, 1))
    return {"divergence from equal": entropy_NL, "training curves": own, "training curves, forgetting": both}


def regressions(
    merges: Mapping[str, Array], shares_NL: Array, losses_NL: Array, weights: Sequence[float]
) -> dict[str, list[LeftOut]]:
    """Left-out judgements by features, one for each number of mixtures that are learnt from."""
    features = {"shares": shares_NL, "log shares": np.log(shares_NL + 0.01)}
    for rule, merge_NL in merges.items():
        features[f"merges ({rule})"] = merge_NL
        features[f"shares and merges ({rule})"] = np.concatenate([shares_NL, merge_NL], axis=1)
    return {
        name: [left_out(feature_NF, losses_NL, weights, k) for k in TRAINED if k + 2 <= len(losses_NL)]
        for name, feature_NF in features.items()
    }


def rank(quality: Quality) -> str:
    """A correlation with its interval and the regret."""
    correlation = quality.spearman
    if correlation is None:
        return f"- | {quality.regret:.4f}"
    ends = "" if correlation.low is None else f" [{correlation.low:+.2f}, {correlation.high:+.2f}]"
    return f"{correlation.value:+.2f}{ends} | {quality.regret:.4f}"


def report(budget: str, judged: Sequence[Judged], learnt: Mapping[str, Sequence[LeftOut]], count: int) -> None:
    """Print a budget's tables."""
    names = list(judged[0].by_name)
    print(f"\n{count} mixtures, tokens of {budget}\n")
    print(f"| predictor | mean: Spearman [95%] | regret | {' | '.join(names)} |")
    print("|---" * (3 + len(names)) + "|")
    for row in judged:
        cells = [(q.spearman and f"{q.spearman.value:+.2f}") or "-" for q in row.by_name.values()]
        print(f"| {row.predictor} | {rank(row.mean)} | {' | '.join(cells)} |")
    print("\n| regression on | " + " | ".join(f"k = {each.trained}" for each in next(iter(learnt.values()))) + " |")
    print("|---" * (1 + len(next(iter(learnt.values())))) + "|")
    for name, row in learnt.items():
        cells = [f"{each.spearman:+.2f} ({each.low:+.2f}), {each.regret:.4f}" for each in row]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Print the tables of every budget, and JSON last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--long", action="store_true")
    arguments = parser.parse_args()
    path = arguments.study
    study = Study.load(path, compute=InProcessCompute(), progress=Telling())
    study.train()
    study.run()
    comparison = study.mix("study")
    config = study_file.load(path)
    names = [name for name, weight in comparison.weights.items() if weight]
    merges, answer = merge_losses(config, path, comparison), {}
    for budget, rows in (long_losses(config, path, comparison) if arguments.long else {}).items():
        merges[budget] |= rows
    for budget, mixtures in by_budget(comparison).items():
        losses_NL = np.array([[mixture.nll[HELD_OUT][name] for name in names] for mixture in mixtures])
        shares_NL = np.array([[mixture.shares[name] for name in names] for mixture in mixtures])
        predicted = {
            rule: np.array([[nll[name] for name in names] for nll in rows]) for rule, rows in merges[budget].items()
        }
        judged = [
            judge(name, values_NL, losses_NL, names)
            for name, values_NL in (predicted | controls(study, path, mixtures, names)).items()
        ]
        learnt = regressions(predicted, shares_NL, losses_NL, [1.0] * len(names))
        report(budget, judged, learnt, len(mixtures))
        answer[budget] = {
            "shares": shares_NL.tolist(),
            "losses": losses_NL.tolist(),
            "predicted": {name: values_NL.tolist() for name, values_NL in predicted.items()},
            "judged": [asdict(each) for each in judged],
            "regressions": {name: [asdict(each) for each in row] for name, row in learnt.items()},
        }
    print(json.dumps({"names": names, **answer}))


if __name__ == "__main__":
    main()
