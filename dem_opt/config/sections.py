"""Sections of a study file, but for those of models and data, which `sources` has.

The docstring below each field is its description in the reference of the study file.
"""

from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from dem_opt.config.section import (
    FUNCTION_PATTERN,
    Date,
    FineTuneName,
    Name,
    NotNegative,
    Positive,
    PositiveReal,
    Range,
    Section,
    Seed,
    Shares,
    StudyPath,
    default_note,
    resolve_path,
)

CHAT_DATE = date(2025, 1, 1)
"""Today's date for chat templates, unless the study names another."""

RENAMED_KEYS: Mapping[str, str] = {
    "compute.residents": "compute.workers",
    "compute.gpus_per_resident": "compute.gpus_per_worker",
}
"""Keys of earlier releases and their present names, dotted from the root of the study file."""


class SimplexSection(Section):
    """The coefficient space: coefficients of at least 0 that sum to `total`."""

    total: PositiveReal | Range = 1.0
    """Sum of the coefficients; the base has the rest, 1 - total. A pair `[0, 3]` lets the sum vary between the two: the
    number of distributions is a good upper end, since the sum of all vectors has it. `run` says where that pays.
    """

    bounds: dict[FineTuneName, Range] = Field(default_factory=dict)
    """Lowest and highest coefficient, by distribution: `{code: [0, 0.8]}`. Where a distribution names several steps,
    `code@20` is a coefficient, and `code` their sum.
    """

    fixed: dict[FineTuneName, NotNegative] = Field(default_factory=dict)
    """Coefficients that the search does not vary, by distribution: `{code: 0.3}`."""

    @property
    def sums(self) -> tuple[float, float]:
        """The lowest and the highest total."""
        return (self.total, self.total) if isinstance(self.total, float) else self.total

    @property
    def boxes(self) -> dict[str, tuple[float, float]]:
        """Bounds by distribution, those of fixed coefficients too."""
        return {**self.bounds, **{name: (value, value) for name, value in self.fixed.items()}}

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for field, (low, high) in {"total": self.sums, **{f"bounds.{k}": v for k, v in self.bounds.items()}}.items():
            if low > high:
                raise ValueError(f"{field}: [{low:g}, {high:g}] ends before it begins")
        if self.sums[1] == 0:
            raise ValueError("total: must be above 0, or there is nothing to choose")
        for name in self.bounds.keys() & self.fixed.keys():
            raise ValueError(f"fixed.{name}: has bounds too; give one of them")
        return self


DEPTH = "depth"
"""Key of `coefficients.groups` whose value is a number of parts."""

REST = "rest"
"""Group of the parameters that no pattern of a study matches."""

Pattern = Annotated[str, Field(min_length=1)]
Groups = Literal["global", "layers", "blocks", "tensors"] | dict[Name, Positive | Pattern | list[Pattern]]


class CoefficientsSection(Section):
    """Coefficients by group of parameters, which deviate from those of the whole model."""

    groups: Groups = "global"
    """Groups of parameters with coefficients of their own: `global`, one for the whole model; `layers`, one for each
    layer and one for the embedding; `blocks`, which divides each layer into queries and keys, values and outputs, MLP
    and norms; `tensors`, one for each tensor; `{depth: 4}`, four parts of consecutive layers; or your own,
    `{attention: "*.self_attn.*"}`, by shell patterns on parameter names, one or a list for each group (others are the
    group `rest`). The search finds the global coefficients first, then those of the groups, from gradients.
    """

    shrink: Literal["auto", "none"] | PositiveReal = "auto"
    """Strength of the penalty that draws the groups to the global coefficients: `auto` chooses it by two folds of the
    search documents; `none` is the unshrunk optimum; a number is the penalty's curvature, in the objective's unit for
    each squared unit of a coefficient.
    """

    forwards: PositiveReal = 40.0
    """Forward-equivalents that the groups may take beyond the global search; a gradient takes 3."""

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if not isinstance(self.groups, dict):
            return self
        if not self.groups:
            raise ValueError("groups: names no group; write global, layers, blocks, tensors, {depth: 4} or patterns")
        numbers = [name for name, value in self.groups.items() if isinstance(value, int)]
        if numbers and list(self.groups) != [DEPTH]:
            raise ValueError(f"groups.{numbers[0]}: must be a pattern on parameter names, or a list of patterns")
        if self.groups.get(DEPTH) == 1:
            raise ValueError("groups.depth: one part is the whole model; write global")
        if REST in self.groups:
            raise ValueError(f"groups.{REST}: is the group of what no pattern matches; choose another name")
        return self


class ObjectiveSection(Section):
    """The objective of the search, and constraints on corpora that must not get worse."""

    weights: Annotated[dict[Name, NotNegative] | None, default_note("1 for each distribution")] = None
    """Weight of each NLL in the mean that is minimized, by distribution or general corpus. A name left out weighs 0: it
    is scored and shown, but the search does not care for it. `check` and `run` warn of distributions that are left out;
    name them with a weight of 0 where that is meant.
    """

    unit: Literal["nats_per_token", "bits_per_byte"] = "nats_per_token"
    """Unit of the NLL that is minimized. Bits per byte, over the UTF-8 bytes of the scored text, compare across
    tokenizers. Allowances of `protect` and `search.tolerance` are in this unit too.
    """

    worst: bool = False
    """Minimize the largest regret instead of the mean: NLL minus that of the distribution's own fine-tune, over the
    distributions that have a weight.
    """

    function: Annotated[str | None, Field(pattern=FUNCTION_PATTERN)] = None
    """Custom objective instead of the mean, as `package.module:name`: an importable function that maps the scores of a
    split, by distribution or general corpus (`score.nll` in nats per token, `score.perplexity`, `score.bits_per_byte`),
    to the number to minimize; `unit` names its unit. Modules beside the study file are found. Trials are then neither
    raced nor measured with gradients, and `weights` and `worst` do not apply.
    """

    pareto: Annotated[tuple[Name, Name] | None, Field(strict=False)] = None
    """Search for the front between two losses instead of one composite, as in `[code, general]`: distributions or
    general corpora, or `mean`, the weighted mean. The winner is then the point of the front with the lowest mean of
    both. Trials do not race. `weights` belong to `mean`; `worst`, `function`, `protect` and `search.patience` do not
    apply.
    """

    protect: dict[Name, NotNegative] = Field(default_factory=dict)
    """Constraints: NLL may exceed the base's by at most this allowance, in the objective's unit, by distribution or
    general corpus.
    """


class EvaluationSection(Section):
    """Scoring of composites."""

    window: Annotated[int, Field(ge=2)] = 1024
    """Window length in tokens."""

    windows: Positive = 64
    """Windows of the search split, for each distribution."""

    held_out: Positive = 64
    """Windows of the held-out split, for each distribution."""

    batch: Literal["auto"] | Positive = "auto"
    """Tokens in one forward call at most; `auto` is 4096, halved until a batch fits into memory."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the forward pass; `auto` is float32 on a CPU and the base's dtype on a GPU."""

    vectors: Literal["exact", "int8"] = "exact"
    """Storage of the fine-tunes in memory: `exact` keeps checkpoints as they are stored; `int8` keeps distribution
    vectors with one scale a row, in a quarter to a half of the memory, with an error that is measured and reported.
    """

    seed: Seed = 0
    """Seed that orders the documents and draws the windows."""

    date: Date = CHAT_DATE
    """Date that stands in for today's in chat templates that write it (`strftime_now`), so that a conversation has the
    same tokens on every day.
    """


Algorithm = Literal["simplex-gp", "grid", "random", "tpe", "cmaes", "gradient", "nsga2"]

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
"""All search algorithms."""

ONE_OBJECTIVE: tuple[Algorithm, ...] = ("cmaes", "gradient")
"""Those that cannot search for a front."""


TOP = 5
"""Best composites of the search split that results list."""


class SearchSection(Section):
    """Proposals of coefficients, and budgets of the search."""

    algorithm: Algorithm = "simplex-gp"
    """Search algorithm: a Gaussian process on the simplex, a grid, random points, TPE, CMA-ES, gradient descent, or
    NSGA-II. `objective.pareto` takes all but CMA-ES and gradient descent.
    """

    trials: Positive = 40
    """Trials at most."""

    forwards: PositiveReal | None = None
    """Budget in forward-equivalents: full forward passes over the search split. No limit unless given."""

    minutes: PositiveReal | None = None
    """Minutes after the start of the command in which trials may begin. No limit unless given."""

    patience: Literal["auto"] | Positive | None = "auto"
    """Stop when an improvement of less than `tolerance` is expected of each of the last so many proposals, and of all
    that are being scored. `auto` is 3 for `simplex-gp` on a weighted mean; other algorithms and objectives never stop
    so, and none does with `null`.
    """

    tolerance: PositiveReal = 1e-4
    """Expected improvement that counts for `patience`, in the objective's unit."""

    seed: Seed = 0
    """Seed of the proposals."""

    divisions: Positive = 10
    """Steps of the grid along each edge of the simplex: 10 makes steps of a tenth of the total, or of the
    greatest total. It has C(divisions + n - 1, n - 1) points for n distributions, whatever `trials` says: 286 for four,
    1,001 for five, 3,003 for six. A range of totals counts as one distribution more.
    """

    grid_limit: Positive = 500
    """Points that a grid of `dem-opt compare` may have, each a forward pass; a larger one is refused until this is
    raised. A study whose own `algorithm` is `grid` has no limit: `check` tells its points.
    """

    lookahead: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Proposals computed ahead for each worker while it scores. Each is made without the scores that are under way:
    `auto` makes one for `grid` and `random`, which ask for no scores, and none for others.
    """

    racing: bool = True
    """Stop scoring a trial early when it will not win. With `gradients`, measure most gradients on an eighth of the
    windows instead of all.
    """

    gradients: Literal["auto"] | bool = "auto"
    """Measure gradients, each of which costs as much as two more forward passes over its windows; `auto` does so from
    seven free coefficients on, where memory allows.
    """


class ComputeSection(Section):
    """Workers, which hold the models and score composites, and where they run."""

    workers: Literal["auto"] | Positive = "auto"
    """Number of workers; `auto` starts as many as there are GPUs for, and without GPUs one for each node."""

    gpus_per_worker: Positive = 1
    """GPUs that a worker's model is divided over, by layers."""

    ray: str = "local"
    """Ray cluster: `local` starts one for this command, `auto` joins the one of this machine; or its address."""

    patience: PositiveReal = 600.0
    """Seconds to wait for workers to be ready."""


class OutagesSection(Section):
    """Patience with services that cannot be reached."""

    storage: PositiveReal = 600.0
    """Seconds to wait for the study's database."""

    tracking: PositiveReal = 180.0
    """Seconds to wait for MLflow at the end of the command."""


class TrackingSection(Section):
    """MLflow: where runs are logged."""

    uri: Annotated[str, default_note("sqlite:///OUTPUT/mlflow.db")]
    """MLflow's tracking URI; a relative SQLite file starts at the study file. Must differ from `storage`."""

    experiment: Annotated[str, default_note("NAME")]
    """MLflow experiment; the study's name unless given."""


class FineTuningSection(Section):
    """Settings with which `dem-opt train` fine-tunes the base on each distribution that has training data.

    A distribution with a `checkpoint:` has all weights trained, one with an `adapter:` a LoRA of the base.
    """

    steps: Positive = 60
    """Optimizer steps."""

    learning_rate: PositiveReal = 3e-4
    """Peak learning rate."""

    batch_size: Positive = 16
    """Windows in a step, each of `evaluation.window` tokens."""

    seed: Seed = 0
    """Seed of the order of windows and of a LoRA's first weights."""

    save_every: Literal["auto"] | Positive = "auto"
    """Steps between saved states, from the last of which a killed run resumes; `auto` is a tenth of `steps`."""

    keep: bool = False
    """Keep the weights of every saved state with its validation NLL, to be named as `{run: FOLDER, step: best}`."""

    dtype: Literal["auto", "float32", "bfloat16", "mixed"] = "auto"
    """Dtype of the weights in training; `auto` is the base's, `mixed` float32 with matrix products in bfloat16: nearly
    twice as fast where the device has instructions for that. Checkpoints are saved in the base's dtype."""

    gpus: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """GPUs of each fine-tuning; `auto` is one where there are any."""

    trainer: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of transformers' `TrainingArguments`, such as `{weight_decay: 0.1}`."""

    lora: dict[str, Any] = Field(default_factory=dict)
    """Arguments of peft's `LoraConfig`, for distributions with an `adapter`."""

    on_search: Literal["lora", "full"] = "lora"
    """Rivals of `dem-opt compare --fine-tune-on-search`: trained as a LoRA (arguments: `lora`), or with all weights."""

    on_search_rate: Annotated[PositiveReal | None, default_note("learning_rate")] = None
    """Peak learning rate of these rivals."""


BUDGETS: tuple[Literal["all", "one"], ...] = ("all", "one")
SHARES_TOLERANCE = 1e-6


class DataMixingSection(Section):
    """Data-mixing baselines of `dem-opt compare --data-mixing study`: one model for each mixture of training data."""

    mixtures: list[Shares] = Field(default_factory=list)
    """Mixtures: shares of the tokens by distribution, each summing to 1; a name left out has 0."""

    tokens: list[Literal["all", "one"]] = Field(default_factory=lambda: list(BUDGETS), min_length=1)
    """Training tokens of each mixture: `all`, as many as all fine-tunes together; `one`, as many as a single one."""

    @model_validator(mode="after")
    def _check_sums(self) -> Self:
        for number, shares in enumerate(self.mixtures, start=1):
            if abs((total := sum(shares.values())) - 1) > SHARES_TOLERANCE:
                raise ValueError(f"mixtures: no. {number} sums to {total:g}, not to 1: {shares}")
        return self


class ReportSection(Section):
    """Composites of the final table beside base, single fine-tunes, uniform average, winner and the best of each
    algorithm. Each costs a forward pass over the held-out split; `dem-opt report --full` measures all of them later.
    """

    top: Annotated[int, Field(ge=0, le=TOP)] = 0
    """Best composites of the search split that are scored on the held-out split too."""

    leave_one_out: bool = False
    """Score the winner without each of its distributions, on both splits: what each distribution's data is worth."""


class EvaluateSection(Section):
    """Tasks of lm-evaluation-harness that `dem-opt evaluate` scores models on."""

    tasks: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(min_length=1), default_note("required with `evaluate`")
    ]
    """Names of tasks."""

    include: StudyPath | None = None
    """Folder of task files of your own."""

    top: Annotated[int, Field(gt=0, le=TOP)] = TOP
    """Best composites to score, beside the base, the fine-tunes and the uniform average."""

    limit: Positive | None = None
    """Documents of each task at most. All unless given."""

    shots: Annotated[int, Field(ge=0)] | None = None
    """Worked examples before each question. The task's own number unless given."""

    batch: Positive = 8
    """Requests in one forward call."""

    _paths = field_validator("include", mode="before")(resolve_path)
