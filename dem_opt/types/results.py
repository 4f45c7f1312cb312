"""Results of a study: rows of tables, margins, and what follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from dem_opt.grouping import GroupedCoefficients, GroupResult
from dem_opt.pareto import Front
from dem_opt.simplex import Coefficients
from dem_opt.types.evaluations import PENALTY
from dem_opt.types.scores import Score
from dem_opt.types.trials import Cost, TrialRecord
from dem_opt.types.units import DOCUMENTS, HELD_OUT, NATS_PER_TOKEN, UNITS


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """A row of the results table: a composite with its scores, and the cost of finding it.

    Attributes:
        label: Name of the row.
        role: "base", "single" (a fine-tune as it is), "uniform" (the centroid), "sum" (of all vectors, each with the
            coefficient 1), "best" (of an algorithm), "top", or "without" (the winner without one distribution).
        algorithm: Algorithm whose best this is; "" for baselines.
        coefficients: None for the base.
        scores: By split, then by distribution.
        objective: By split, in the study's unit.
        evaluations: Composites evaluated, each counted once, also where the ledger had its scores.
        forwards: Forward-equivalents of these evaluations.
        forward_tokens: Tokens through the model of these evaluations.
        seconds: Wall time of these evaluations.
        violation: Amount by which protected corpora exceed their allowance, on the search split, in the study's unit.
        run: Search whose best this is; "" for baselines.
        groups: Coefficients by group of parameters; `coefficients` are the global ones then.
    """

    label: str
    role: str
    algorithm: str
    coefficients: Coefficients | None
    scores: Mapping[str, Mapping[str, Score]]
    objective: Mapping[str, float]
    evaluations: int
    forward_tokens: int
    seconds: float
    violation: float = 0.0
    forwards: float = 1.0
    run: str = ""
    groups: GroupedCoefficients | None = None

    @property
    def merged(self) -> Coefficients | GroupedCoefficients | None:
        """Coefficients that the composite is merged with; None for the base."""
        return self.coefficients if self.groups is None else self.groups


@dataclass(frozen=True, kw_only=True)
class Margin:
    """Rival minus winner in the objective, in its unit (positive: the winner is better), with a 95% interval.

    Attributes:
        rival: Label of the rival's row.
        split: Split.
        mean: The margin.
        low: Lower end; infinite, as the upper one, where all windows of a distribution are of one document.
        high: Upper end.
        sampled: Unit that the interval takes to be sampled: "documents", or "windows" where documents are unknown.
        violation: Excess of protected corpora over their allowances, beyond the winner's, where it is compared.
    """

    rival: str
    split: str
    mean: float
    low: float
    high: float
    sampled: str = DOCUMENTS
    violation: float = 0.0

    @property
    def penalized(self) -> float:
        """The margin in what a search minimizes."""
        return self.mean + PENALTY * self.violation

    @property
    def is_better(self) -> bool:
        """True if the rival is better than the winner beyond its interval, the violation counted."""
        return self.high + PENALTY * self.violation < 0


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Another use of the search's windows and compute, which the winner is compared with.

    Attributes:
        kind: "random" or "permuted": the winner of the same search over placebos of the distribution vectors; "base" or
            "uniform": the base or the uniform average, trained on the search split.
        objective: By split, in nats per token.
        margins: Rival minus winner, of the splits on which both are scored.
        coefficients: Of a placebo's winner, by distribution.
        trials: Trials of a placebo's search.
        steps: Optimizer steps of a training.
        flops: Floating-point operations of the search or the training.
    """

    kind: str
    objective: Mapping[str, float]
    margins: tuple[Margin, ...]
    coefficients: Mapping[str, float]
    trials: int
    steps: int
    flops: float

    @property
    def is_placebo(self) -> bool:
        """The rival was searched for, not trained."""
        return self.steps == 0

    @property
    def held_out(self) -> Margin | None:
        """The margin on the held-out split."""
        return next((margin for margin in self.margins if margin.split == HELD_OUT), None)


@dataclass(frozen=True, kw_only=True)
class TotalPrice:
    """Cost of the constraint on the sum of coefficients, on the search split (see `analysis.total_price`).

    Attributes:
        total: Sum of the winner's coefficients.
        slope: Derivative of the objective by the total at the winner, the constraint's multiplier, in the objective's
            unit for each unit of the total; below 0, a greater total is better.
        low: Lower end of its 95% interval; None of a gradient.
        high: Upper end.
        basis: "step" (a composite with a total a tenth greater was scored) or "gradient".
        optimum: Total at which the winner, scaled, is expected to be best; that of the step where this proved better.
        rivals: Composites of other totals minus the winner: "scaled", the winner scaled to `optimum`, and "sum", the
            sum of all vectors, as far as they are scored; below 0 and without violation, the winner is worse.
        mend: Range of totals to search, where one of them is clearly better than the winner.
    """

    total: float
    slope: float
    low: float | None
    high: float | None
    basis: str
    optimum: float
    rivals: tuple[Margin, ...]
    mend: tuple[float, float] | None

    @property
    def best(self) -> Margin | None:
        """The better of the rivals."""
        return min(self.rivals, key=lambda margin: margin.penalized, default=None)


@dataclass(frozen=True)
class VectorGeometry:
    """The distribution vectors  v_i = Theta_i - Theta , by their inner products over all stored parameters.

    Attributes:
        names: Distributions.
        inner: < v_i , v_j > , a row for each of `names`.
        rounding: Length of the error that rounding to the nearest value of the base's dtype makes in the uniform
            average, by that average's distance from the base; None where it was not measured, or where composites are
            rounded otherwise.
    """

    names: tuple[str, ...]
    inner: tuple[tuple[float, ...], ...]
    rounding: float | None = None

    @property
    def norms(self) -> tuple[float, ...]:
        """|v_i|."""
        return tuple(sqrt(max(row[place], 0.0)) for place, row in enumerate(self.inner))

    def cosine(self, i: int, j: int) -> float | None:
        """< v_i , v_j > / (|v_i| |v_j|), within -1 and 1; None where a vector is zero."""
        norms = self.norms
        if not norms[i] or not norms[j]:
            return None
        # Rounding of the three sums can carry the quotient of parallel vectors past 1.
        return min(1.0, max(-1.0, self.inner[i][j] / (norms[i] * norms[j])))


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """What Gaussian processes fitted to the trials of all searches expect of the penalized objective.

    Attributes:
        optimum: Coefficients at which its mean is lowest.
        mean: Mean at the optimum, in the objective's unit.
        deviation: Standard deviation of the objective without penalties at the optimum, in its unit.
        names: Distributions that vary over `points`: all of up to three, else the three with the largest coefficients
            at the optimum, while the others keep theirs.
        points: A lattice over `names`.
        means: Mean at each point, in the objective's unit.
        trials: Number of trials it was fitted to.
    """

    optimum: Coefficients
    mean: float
    deviation: float
    names: tuple[str, ...]
    points: tuple[Coefficients, ...]
    means: tuple[float, ...]
    trials: int


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How well a study's windows determine its coefficients.

    Attributes:
        windows: Windows of each corpus of the search split.
        composites: Composites scored on all of them that the estimate rests on.
        regret: Nats per token by which coefficients chosen on other windows would miss the optimum, on average.
        high: 95% quantile of that regret.
        intervals: 95% interval of each coefficient, by distribution.
        noise: (standard error of the difference between the best composite and another)^2 / that difference, paired,
            median over the others, in the objective's unit (see `dem_opt.analysis.power`).
        sampled: Unit that is taken to be sampled: "documents", or "windows" where documents are unknown.
    """

    windows: int
    composites: int
    regret: float
    high: float
    intervals: Mapping[str, tuple[float, float]]
    noise: float
    sampled: str = DOCUMENTS

    def regret_with(self, factor: float) -> float:
        """The expected regret with so many times the windows, in the objective's unit: it falls with their number."""
        return self.regret / factor


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Results of a study: everything that figures, tables and the report are made from.

    Attributes:
        weights: The objective's weight of each distribution and general corpus, in the study file's order.
        results: Results table, the base first, the winner last.
        margins: Of the winner over every other row, on both splits.
        trials: By search, in the order of their numbers: NAME of an algorithm, NAME@SEED of one with another seed.
        facts: Labels and values to reproduce the study: hashes, versions, commands.
        top: Best composites of the search split, the best first.
        stopped: By search, why it ended.
        worst: The objective is the largest regret, not the weighted mean.
        function: Name of the custom objective; empty where there is none.
        unit: Unit of the objective, a key of `UNITS`.
        left_out: The winner without one of its distributions, the others scaled up to its total; named by the
            distribution that is left out.
        costs: What the study has spent since it began, by part.
        rivals: Placebos and models trained on the search split, as far as they have been compared.
        total_price: What the constraint on the sum of coefficients costs, where it was measured.
        front: The front between the two losses of a study that searches for one.
        groups: The search of coefficients by group, where the study asks for it and it has ended.
    """

    study: str
    weights: Mapping[str, float]
    results: tuple[ResultRow, ...]
    margins: tuple[Margin, ...]
    trials: Mapping[str, tuple[TrialRecord, ...]]
    facts: Mapping[str, str]
    top: tuple[ResultRow, ...] = ()
    stopped: Mapping[str, str] | None = None
    worst: bool = False
    function: str = ""
    unit: str = NATS_PER_TOKEN
    left_out: tuple[ResultRow, ...] = ()
    vectors: VectorGeometry | None = None
    surrogate: Surrogate | None = None
    precision: Precision | None = None
    rivals: tuple[Rival, ...] = ()
    costs: tuple[Cost, ...] = ()
    total_price: TotalPrice | None = None
    front: Front | None = None
    groups: GroupResult | None = None

    @property
    def forwards(self) -> float:
        """Forward-equivalents of the whole study, everything included."""
        return sum(cost.forwards for cost in self.costs)

    @property
    def is_mean(self) -> bool:
        """True if the objective is the weighted mean of NLL, in either unit."""
        return not self.worst and not self.function

    @property
    def unit_words(self) -> str:
        """The objective's unit in words."""
        return UNITS[self.unit]

    @property
    def distributions(self) -> tuple[str, ...]:
        """The names that have a coefficient, in the study file's order; all corpora where no row has coefficients."""
        return tuple(
            next((row.coefficients.weights for row in self.results if row.coefficients is not None), self.weights)
        )

    @property
    def winner(self) -> ResultRow:
        """The best composite of the search split."""
        return self.results[-1]

    @property
    def global_winner(self) -> ResultRow:
        """The best composite with one coefficient for each distribution."""
        return next((row for row in reversed(self.results) if row.groups is None), self.winner)
