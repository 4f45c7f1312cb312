"""Laws of the price of the sum: exact where the loss is a parabola, silent where the optimum has the winner's sum."""

from collections.abc import Iterator
from math import log

import numpy as np
import pytest

from dem_opt.analysis.total_price import (
    MATTERS,
    SCALED,
    STEP,
    SUM,
    is_priced,
    price_line,
    scaled,
    sum_of_all,
    total_price,
    unmeasured,
)
from dem_opt.errors import EvaluationError
from dem_opt.simplex import UNIT, Coefficients, Space
from dem_opt.storage.engine import connect
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import BITS_PER_BYTE, HELD_OUT, NATS_PER_TOKEN, SEARCH, SPLITS, Composite, CorpusLayout, Score

NAMES = ("a", "b", "c")
WINDOWS, TOKENS = 16, 100
WINNER = {"a": 0.5, "b": 0.3, "c": 0.2}
GENERAL, FORGETTING = "general", 0.3
"""A corpus of weight 0, and the nats per token that it loses for each unit of the sum."""


def point(weights: dict[str, float], total: float = 1.0) -> Coefficients:
    return Coefficients(tuple((name, round(total * weights[name] * UNIT)) for name in NAMES))


class Bowl:
    """A study whose loss is a parabola in the total:  least + curvature (t - optimum)^2  nats per token.

    Windows differ in their level, and by `noise` in what they gain from a total, so differences of composites vary.
    """

    def __init__(
        self, ledger: Ledger, optimum: float, curvature: float = 0.2, noise: float = 0.0, total: float = 1.0, **fields
    ) -> None:
        corpora = {split: {name: f"{name} {split}" for name in (*NAMES, GENERAL)} for split in SPLITS}
        settings = {"evaluation.windows": str(WINDOWS), "evaluation.held_out": str(WINDOWS)}
        contents = {name: f"hash {name}" for name in NAMES}
        space = fields.pop("space", Space(NAMES, total))
        weights = dict.fromkeys(NAMES, 1.0) | {GENERAL: 0.0}
        self.ledger, self.optimum, self.curvature, self.noise = ledger, optimum, curvature, noise
        self.identity = StudyIdentity("hash base", contents, space, weights, corpora, settings, **fields)
        self.winner = point(WINNER, total)
        layout = CorpusLayout((4 * TOKENS,) * WINDOWS, tuple({window: TOKENS} for window in range(WINDOWS)))
        ledger.enter_layouts({key: layout for split in SPLITS for key in self.identity.keys(split)})
        self.put(Composite.single("hash base"))
        self.put(self.identity.composite(self.winner))

    def value(self, total: float) -> float:
        return 3.0 + self.curvature * (total - self.optimum) ** 2

    def put(self, composite: Composite, split: str = SEARCH, gradient: bool = False) -> None:
        rng = np.random.default_rng(0)
        level_W, gain_W = rng.normal(size=(2, WINDOWS))
        total = 1 - dict(composite.terms).get("hash base", 0) / UNIT
        nats_W = TOKENS * (self.value(total) + 0.3 * (level_W - level_W.mean()))
        nats_W += TOKENS * self.noise * total * (gain_W - gain_W.mean())
        score = Score(tuple(nats_W.tolist()), (TOKENS,) * WINDOWS)
        keys = self.identity.keys(split)
        general = Score((TOKENS * (3.0 + FORGETTING * total),) * WINDOWS, (TOKENS,) * WINDOWS)
        scores = dict.fromkeys(keys, score) | {self.identity.corpora[split][GENERAL]: general}
        slope = TOKENS * WINDOWS * 2 * self.curvature * (total - self.optimum)
        gradients = {key: {f"hash {name}": slope for name in NAMES} for key in keys} if gradient else None
        identity = self.identity
        self.ledger.record(
            composite,
            scores,
            identity.scoring,
            gradients=gradients,
            differentiation=identity.differentiation,
        )

    def measure(self, full: bool = False) -> list[tuple[Composite, str]]:
        """Score whatever the price asks for, one after the other."""
        done = []
        while wanted := next(unmeasured(self.ledger, self.identity, self.winner, full), None):
            self.put(*wanted)
            done.append(wanted)
        return done

    def price(self):
        return total_price(self.ledger, self.identity, self.winner)


@pytest.fixture
def ledger(tmp_path) -> Iterator[Ledger]:
    engine = connect(f"sqlite:///{tmp_path}/ledger.db")
    yield Ledger(engine)
    engine.dispose()


@pytest.mark.parametrize("unit", [NATS_PER_TOKEN, BITS_PER_BYTE])
@pytest.mark.parametrize("total", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("ratio", [0.6, 0.9, 1.3, 1.9])
def test_of_a_parabola_slope_optimum_and_gain_are_exact(ledger, ratio, total, unit):
    """One composite a tenth farther than the winner gives  f'(s) = 2 b (s - t*) ; the gain is  b (s - t*)^2 ."""
    scale = 1.0 if unit == NATS_PER_TOKEN else 1 / (4 * log(2))
    bowl = Bowl(ledger, ratio * total, total=total, unit=unit)
    bowl.measure()
    price = bowl.price()
    assert price.slope == pytest.approx(scale * 0.4 * (total - bowl.optimum)) and price.basis == "step"
    assert price.low - 1e-9 <= price.slope <= price.high + 1e-9
    assert price.optimum == pytest.approx(bowl.optimum) and price.total == total
    gains = {margin.rival: -margin.mean for margin in price.rivals}
    assert gains[SCALED] == pytest.approx(scale * 0.2 * (total - bowl.optimum) ** 2, rel=1e-6)
    assert gains[SUM] == pytest.approx(scale * (bowl.value(total) - bowl.value(3.0)))


@pytest.mark.parametrize("ratio", [0.6, 1.3])
def test_a_gradient_in_the_ledger_takes_the_steps_place(ledger, ratio):
    bowl = Bowl(ledger, ratio)
    bowl.put(bowl.identity.composite(bowl.winner), gradient=True)
    composites = [composite for composite, _ in bowl.measure()]
    assert bowl.identity.composite(scaled(bowl.winner, STEP)) not in composites
    price = bowl.price()
    assert (price.basis, price.low, price.high) == ("gradient", None, None)
    assert price.slope == pytest.approx(0.4 * (1 - ratio)) and price.optimum == pytest.approx(ratio)


@pytest.mark.parametrize(("optimum", "mend"), [(1.6, (0.0, 3.0)), (1.3, (0.0, 3.0)), (0.6, (0.0, 1.0))])
def test_a_price_that_matters_has_its_mend(ledger, optimum, mend):
    """The range has the better total; its line has the key of the study file."""
    bowl = Bowl(ledger, optimum, noise=1e-4)
    bowl.measure()
    assert bowl.price().mend == mend
    assert f"total: [{mend[0]:g}, {mend[1]:g}]" in price_line(bowl.price(), "nats per token")


class Cliff(Bowl):
    """A loss that falls fast beyond a sum of 1 and then rises slowly, as that of a pretrained model was seen to do."""

    def value(self, total: float) -> float:
        return 3.3 - 0.3 * total if total <= 1 else max(3.0 - 0.5 * (total - 1), 2.945 + 0.045 * (total - 1))


def test_the_step_is_told_where_it_is_better_than_the_parabolas_optimum(ledger):
    bowl = Cliff(ledger, 1.0)
    bowl.measure()
    price = bowl.price()
    assert price.optimum == pytest.approx(STEP) and price.best.rival == SCALED
    assert price.best.mean == pytest.approx(-0.05, abs=1e-3) and price.mend == (0.0, 3.0)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3])
def test_an_optimum_at_the_winners_sum_is_quiet(ledger, noise):
    """Nothing is scored but step and sum of all vectors, and no other range is proposed."""
    bowl = Bowl(ledger, 1.0, noise=noise)
    assert len(bowl.measure()) == 2
    assert bowl.price().mend is None and "\n" not in price_line(bowl.price(), "nats per token")


def test_a_small_gain_is_quiet_however_clear(ledger):
    """Of the winner's gain over the base,  b (t*^2 - (1 - t*)^2) , it has a part below MATTERS."""
    optimum = 1.1
    assert (1 - optimum) ** 2 < MATTERS * (optimum**2 - (1 - optimum) ** 2)
    bowl = Bowl(ledger, optimum)
    bowl.measure()
    price = bowl.price()
    assert price.slope < 0 and price.high < 0 and price.best.high < 0 and price.mend is None


def test_a_gain_within_the_noise_is_quiet(ledger):
    bowl = Bowl(ledger, 1.6, noise=3.0)
    bowl.measure()
    assert bowl.price().mend is None


@pytest.mark.parametrize(("optimum", "held_out"), [(2.5, True), (1.0, False)])
@pytest.mark.parametrize("full", [False, True])
def test_the_sum_is_held_out_where_it_is_better_or_asked_for(ledger, optimum, held_out, full):
    bowl = Bowl(ledger, optimum)
    everything = bowl.identity.composite(sum_of_all(bowl.identity))
    assert ((everything, HELD_OUT) in bowl.measure(full)) == (held_out or full)
    assert not bowl.measure(full), "nothing is asked for twice"


@pytest.mark.parametrize(("allowance", "mend"), [(1.0, (0.0, 3.0)), (FORGETTING, None)])
def test_another_sum_that_breaks_a_constraint_is_not_proposed(ledger, allowance, mend):
    """The general corpus loses FORGETTING for each unit of the sum: the winner just keeps the second allowance."""
    bowl = Bowl(ledger, 1.6, protect={GENERAL: allowance})
    bowl.measure()
    assert bowl.price().mend == mend and (bowl.price().slope > 0) == (mend is None)


@pytest.mark.parametrize(("allowance", "best"), [(1.0, SUM), (0.7, SCALED)])
def test_a_sum_of_all_that_breaks_a_constraint_is_no_evidence(ledger, allowance, best):
    """At a sum of 3 the general corpus has lost 0.9, at 2, the farthest that the winner is scaled to, 0.6."""
    bowl = Bowl(ledger, 2.9, protect={GENERAL: allowance})
    bowl.measure()
    price = bowl.price()
    assert price.best.rival == best and price.mend == (0.0, 3.0)
    margins = {margin.rival: margin for margin in price.rivals}
    assert margins[SUM].violation == pytest.approx(max(3 * FORGETTING - allowance, 0), abs=1e-9)
    assert margins[SUM].mean == pytest.approx(bowl.value(3) - bowl.value(1), abs=1e-6), "without the penalty"


def test_a_custom_objective_that_is_not_finite_beside_the_winner_has_no_price(ledger):
    """Everything that can be asked for is measured, and nothing is asked for again and again."""

    def function(scores):
        if scores[GENERAL].nll > 3.0 + FORGETTING:
            raise EvaluationError("objective: nan")
        return scores["a"].nll

    bowl = Bowl(ledger, 1.6, function=function)
    assert len(bowl.measure()) == 2
    with pytest.raises(EvaluationError):
        bowl.price()


def test_bounds_of_the_study_say_what_is_priced(ledger):
    """Inside a range the sum is no constraint; at its end it is.  One distribution has nothing to sum."""
    for total, low, expected in [(1.4, 0.0, False), (2.0, 0.0, True), (0.5, 0.5, True)]:
        space = Space(NAMES, 2.0, low)
        bowl = Bowl(ledger, 1.6, total=total, space=space)
        assert is_priced(bowl.identity, bowl.winner) == expected
        bowl.measure()
        assert (bowl.price() is not None) == expected
    fixed = Space(NAMES, 1.0, None, tuple((name, weight, weight) for name, weight in WINNER.items()))
    assert not is_priced(Bowl(ledger, 1.6, space=fixed).identity, point(WINNER))
    assert not is_priced(Bowl(ledger, 1.6).identity, Coefficients(tuple((name, 0) for name in NAMES)))


def test_without_scores_there_is_no_price(ledger):
    bowl = Bowl(ledger, 1.6)
    assert bowl.price() is None
    other = point({"a": 1.0, "b": 0.0, "c": 0.0})
    assert total_price(ledger, bowl.identity, other) is None


@pytest.mark.parametrize("total", [0.37, 1.1, 2.0])
def test_scaling_keeps_proportions_and_meets_the_total(total):
    grown = scaled(point(WINNER), total)
    assert sum(grown.values()) == pytest.approx(total, abs=3e-9)
    assert all(grown[name] == pytest.approx(total * WINNER[name], abs=1e-9) for name in NAMES)
