"""The sections of a study file: data, models, coefficients, objective, evaluation, search, compute, tracking."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Positive = Annotated[int, Field(gt=0)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """A part of the study file: frozen, strict about types, refusing unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def from_here(value: Path | str | None, info: ValidationInfo) -> Path | None:
    """A path of the study file: relative paths start at the file's folder."""
    if value is None or not isinstance(value, str | Path):
        return value
    folder: Path = (info.context or {}).get("folder", Path())
    return folder / value


StudyPath = Annotated[Path, Field(strict=False)]
Column = Annotated[str, Field(min_length=1)]
BUDGETS: tuple[Literal["all", "one"], ...] = ("all", "one")
SHARES_TOLERANCE = 1e-6
_COLUMNS = {"text": ("text",), "prompt_completion": ("prompt", "completion"), "messages": ("messages",)}


class DataFile(Section):
    """A file of documents (.jsonl, .parquet or .txt), and in which columns its format finds them.

    A path alone is a file of format text.  Only the columns of the format may be named.
    """

    path: StudyPath
    format: Literal["text", "prompt_completion", "messages"] = "text"
    text: Column = "text"
    prompt: Column = "prompt"
    completion: Column = "completion"
    messages: Column = "messages"

    _paths = field_validator("path", mode="before")(from_here)

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, data: Any) -> Any:
        if isinstance(data, str | Path):
            return {"path": data}
        if not isinstance(data, Mapping | cls):
            raise ValueError(f"must be a path, or a mapping with `path:` and `format:`, not {data!r}")
        return data

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        for column in sorted(set().union(*_COLUMNS.values()) & self.model_fields_set - set(self.columns)):
            raise ValueError(f"{column}: not a column of format {self.format}, which has {' and '.join(self.columns)}")
        return self

    @model_serializer
    def _as_written(self) -> str | dict[str, str]:
        """A path alone where everything else is as it would be."""
        if self.columns == {"text": "text"}:
            return str(self.path)
        return {"path": str(self.path), "format": self.format} | self.columns

    @property
    def columns(self) -> dict[str, str]:
        """The name in the file of each column that the format has."""
        return {column: getattr(self, column) for column in _COLUMNS[self.format]}


class ModelSource(Section):
    """A model or an adapter: a folder, or a hub id and its revision.  A path alone is a folder.

    pickled   whether pickled weights may be read, of which only tensors are accepted
    run, step the folder of a fine-tuning that kept its steps, and one of them: a number, or the best by validation NLL
    """

    path: StudyPath | None = None
    hub: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")] | None = None
    revision: str | None = None
    pickled: bool = False
    run: StudyPath | None = None
    step: Literal["best"] | Positive | None = None

    _paths = field_validator("path", "run", mode="before")(from_here)

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str | Path) else data

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if (self.run is None) != (self.step is None):
            raise ValueError("run, step: belong together, as in {run: models/code, step: best}")
        if [self.path, self.hub, self.run].count(None) != 2:
            raise ValueError("must be a path, or a mapping with `hub:` and `revision:`, or with `run:` and `step:`")
        if self.hub is None and self.revision is not None:
            raise ValueError("revision: belongs to a `hub:`, a folder has none")
        return self

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        """A path alone where nothing else is said."""
        if self.path is not None and not self.pickled:
            return str(self.path)
        places = {name: place and str(place) for name, place in (("path", self.path), ("run", self.run))}
        given = {**places, "step": self.step, "hub": self.hub, "revision": self.revision}
        return {key: value for key, value in given.items() if value} | ({"pickled": True} if self.pickled else {})

    @property
    def place(self) -> Path | None:
        """The folder that a fine-tuning of it writes; None for a hub id."""
        return self.run or self.path

    def __str__(self) -> str:
        if self.run is not None:
            return f"{self.run}, step {self.step}"
        return str(self.path) if self.hub is None else f"{self.hub}@{self.revision or 'main'}"


class Distribution(Section):
    """One data distribution: its fine-tune, which is a checkpoint or an adapter of the base, and its data.

    train is for `dem-opt train` only.  Without held_out, the validation documents are divided in two.
    """

    checkpoint: ModelSource | None = None
    adapter: ModelSource | None = None
    train: DataFile | None = None
    validation: DataFile
    held_out: DataFile | None = None

    @model_validator(mode="after")
    def _check_expert(self) -> Self:
        if (self.checkpoint is None) == (self.adapter is None):
            raise ValueError("must have a `checkpoint:` or an `adapter:`, and not both")
        return self

    @property
    def expert(self) -> tuple[Literal["checkpoint", "adapter"], ModelSource]:
        """Which of the two it has, and where."""
        if self.checkpoint is not None:
            return "checkpoint", self.checkpoint
        assert self.adapter is not None
        return "adapter", self.adapter


class General(Section):
    """A corpus without a vector of its own; a data file alone is its validation."""

    validation: DataFile
    held_out: DataFile | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, data: Any) -> Any:
        alone = not isinstance(data, Mapping | cls) or (isinstance(data, Mapping) and "path" in data)
        return {"validation": data} if alone else data


Range = Annotated[tuple[NotNegative, NotNegative], Field(strict=False)]


class SimplexSection(Section):
    """The coefficient space: coefficients of at least 0 that sum to `total`.

    total   a number, or the least and the greatest that the sum may be
    bounds  the least and the greatest that a coefficient may be, by distribution
    fixed   coefficients that are given, by distribution
    """

    total: PositiveReal | Range = 1.0
    bounds: dict[Name, Range] = Field(default_factory=dict)
    fixed: dict[Name, NotNegative] = Field(default_factory=dict)

    @property
    def sums(self) -> tuple[float, float]:
        """The least and the greatest total."""
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


class Objective(Section):
    """What is minimized, and what must not get worse.

    weights  by distribution or general corpus; equal for distributions where none are given, 0 for a name left out
    worst    minimize the largest regret: NLL minus that of a distribution's own fine-tune, over those with a weight
    protect  the most nats per token above the base, by distribution or general corpus
    """

    weights: dict[Name, NotNegative] | None = None
    worst: bool = False
    protect: dict[Name, NotNegative] = Field(default_factory=dict)


class EvaluationSection(Section):
    """How composites are scored.

    window    tokens in a window
    windows   windows of the search split, for each distribution
    held_out  windows of the held-out split, for each distribution
    batch     tokens in one forward call at most; auto: 4096, halved until they fit into memory
    dtype     auto: float32 on CPU, the base's dtype on a GPU
    vectors   exact: checkpoints as they are stored; int8: distribution vectors with a scale for each row
    seed      orders the documents and draws the windows
    """

    window: Annotated[int, Field(ge=2)] = 1024
    windows: Positive = 64
    held_out: Positive = 64
    batch: Literal["auto"] | Positive = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    vectors: Literal["exact", "int8"] = "exact"
    seed: Seed = 0


Algorithm = Literal["simplex-gp", "grid", "random", "tpe", "cmaes", "gradient"]

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
"""All ways of searching."""


class Search(Section):
    """How coefficients are proposed, and when that ends.

    trials     at most so many
    forwards   at most so many forward-equivalents: full forward passes over the search split
    minutes    no trial is begun after so many, from the start of the command: the only decision that reads a clock
    patience   stop after so many proposals in a row of which less than `tolerance` is expected
    tolerance  nats per token of expected improvement
    divisions  the grid's: 10 gives steps of a tenth of the total
    lookahead  proposals made ahead for each worker, while it scores
    racing     stop scoring a trial when it will not win
    gradients  measure a trial's gradient too; auto: where that is worth its three forward passes, and memory allows
    """

    algorithm: Algorithm = "simplex-gp"
    trials: Positive = 40
    forwards: PositiveReal | None = None
    minutes: PositiveReal | None = None
    patience: Positive | None = None
    tolerance: PositiveReal = 1e-4
    seed: Seed = 0
    divisions: Positive = 10
    lookahead: Annotated[int, Field(ge=0)] = 1
    racing: bool = True
    gradients: Literal["auto"] | bool = "auto"


class Compute(Section):
    """Workers and where they live.

    workers          auto: as many as there are GPUs for; without GPUs one with all the CPUs
    gpus_per_worker  GPUs that a worker's model is divided over, by layers
    ray                local: a Ray of its own; auto: the cluster that this machine belongs to; or an address
    patience           seconds to wait for workers to be ready
    """

    workers: Literal["auto"] | Positive = "auto"
    gpus_per_worker: Positive = 1
    ray: str = "local"
    patience: PositiveReal = 600.0


class Outages(Section):
    """How long a study waits for what is away, in seconds: for its database, and at the end for MLflow."""

    storage: PositiveReal = 600.0
    tracking: PositiveReal = 180.0


class Tracking(Section):
    """MLflow: where runs are logged, and under which experiment."""

    uri: str
    experiment: str


class FineTuning(Section):
    """What `dem-opt train` does for each distribution that has training data.

    One with a `checkpoint:` has all of its weights trained, one with an `adapter:` a LoRA of the base.

    batch_size  windows in a step
    save_every  steps between saved states, from the last of which a run goes on that was killed; auto: a tenth of all
    keep        whether the weights of saved states are kept, each with its validation NLL: `{run: ..., step: ...}`
    dtype       what weights are trained in; auto: the base's.  They are saved in the base's
    gpus        GPUs of each; auto: one where there are any
    trainer     any other argument of transformers' Trainer
    lora        any argument of peft's LoraConfig, for adapters
    """

    steps: Positive = 60
    learning_rate: PositiveReal = 3e-4
    batch_size: Positive = 16
    seed: Seed = 0
    save_every: Literal["auto"] | Positive = "auto"
    keep: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gpus: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    trainer: dict[str, Any] = Field(default_factory=dict)
    lora: dict[str, Any] = Field(default_factory=dict)


Shares = dict[Name, NotNegative]


class DataMixing(Section):
    """The models trained on mixed data that `dem-opt compare --data-mixing study` holds the composites against.

    mixtures  shares of the tokens by distribution, each summing to 1; what is left out has 0
    tokens    all: each is trained on as many tokens as all single fine-tunes together; one: on as many as one of them
    """

    mixtures: list[Shares] = Field(default_factory=list)
    tokens: list[Literal["all", "one"]] = Field(default_factory=lambda: list(BUDGETS), min_length=1)

    @model_validator(mode="after")
    def _check_sums(self) -> Self:
        for number, shares in enumerate(self.mixtures, start=1):
            if abs((total := sum(shares.values())) - 1) > SHARES_TOLERANCE:
                raise ValueError(f"mixtures: no. {number} sums to {total:g}, not to 1: {shares}")
        return self


class Evaluate(Section):
    """Tasks of lm-evaluation-harness that `dem-opt evaluate` scores models on.

    tasks    their names
    include  a folder of task files of your own
    top      how many of the best composites
    limit    documents of each task at most
    shots    worked examples before each question; what the task says unless given
    batch    requests in one forward call
    """

    tasks: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    include: StudyPath | None = None
    top: Annotated[int, Field(gt=0, le=5)] = 5
    limit: Positive | None = None
    shots: Annotated[int, Field(ge=0)] | None = None
    batch: Positive = 8

    _paths = field_validator("include", mode="before")(from_here)
