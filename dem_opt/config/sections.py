"""Sections of a study file. The docstring below each field is its description in the reference of the study file."""

from collections.abc import Mapping
from datetime import date
from os.path import expanduser
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

PATTERNS: Mapping[str, str] = {
    r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$": "a name: letters, digits, `_`, `.` and `-`, at most 64, beginning with a "
    "letter or digit",
    r"^[\w.-]+(/[\w.-]+)?$": "an id of the Hugging Face Hub, `owner/name`",
    r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$": "an importable function, `package.module:name`",
    r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}(@([1-9][0-9]*|best))?$": "a name, or a step's, as in `code@20`: "
    "letters, digits, `_`, `.` and `-`, at most 64, beginning with a letter or digit",
}
"""Patterns of texts of a fixed form, and the form in words."""

_NAME, _HUB_ID, _FUNCTION, _FINE_TUNE_NAME = PATTERNS

Name = Annotated[str, Field(pattern=_NAME)]
FineTuneName = Annotated[str, Field(pattern=_FINE_TUNE_NAME)]
Positive = Annotated[int, Field(gt=0)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
StudyPath = Annotated[Path, Field(strict=False)]
Date = Annotated[date, Field(strict=False)]
Column = Annotated[str, Field(min_length=1)]
Range = Annotated[tuple[NotNegative, NotNegative], Field(strict=False)]
Shares = dict[Name, NotNegative]

CHAT_DATE = date(2025, 1, 1)
"""Today's date for chat templates, unless the study names another."""

RENAMED_KEYS: Mapping[str, str] = {
    "compute.residents": "compute.workers",
    "compute.gpus_per_resident": "compute.gpus_per_worker",
}
"""Keys of earlier releases and their present names, dotted from the root of the study file."""


def default_note(text: str) -> Any:
    """A field's default in words, for defaults that other fields decide."""
    return Field(json_schema_extra={"default_note": text})


class Section(BaseModel):
    """A part of the study file: frozen, strict about types, refusing unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def section_of(annotation: Any) -> type[Section] | None:
    """The first section class inside an annotation (`Section`, `dict[Name, Section]`, `Section | None`), if any."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def resolve_path(value: Path | str | None, info: ValidationInfo) -> Path | None:
    """A path of the study file; relative paths start at the file's folder, those that begin with `~/` at home."""
    if value is None or not isinstance(value, str | Path):
        return value
    folder: Path = (info.context or {}).get("folder", Path())
    return folder / (expanduser(value) if str(value).startswith("~/") else value)


_COLUMNS = {"text": ("text",), "prompt_completion": ("prompt", "completion"), "messages": ("messages",)}
_TASK_KEYS = {"task", "include", "split", "format"}


class DataFile(Section):
    """A file of documents or several, and the columns in which their format finds them; or the documents of a task.

    A path or a list of paths alone is of format `text`.  Only the columns of the format may be named.  A task of
    lm-evaluation-harness has documents of format `prompt_completion`.
    """

    path: Annotated[StudyPath | list[StudyPath] | None, default_note("required, unless `task` is given")] = None
    """Data file, folder of data files, or glob pattern such as `data/math-*.jsonl`; or a list of these. Files are JSON
    lines or an array of objects (`.jsonl`, `.json`), tables (`.csv`, `.tsv`, `.parquet`, `.arrow`) or one document each
    (`.txt`), compressed or not (`.gz`, `.zst`, `.bz2`, `.xz`, `.lz4`, `.zip`). A folder that `datasets` wrote with
    `save_to_disk` is read too.
    """

    format: Literal["text", "prompt_completion", "messages"] = "text"
    """Format of each document: running text, a prompt with the completion that is scored, or a conversation in which
    the assistant's messages are scored.
    """

    text: Column = "text"
    """Column of the text (format `text`); `data.text` is the `text` within a column `data`, here and below."""

    prompt: Column = "prompt"
    """Column of the prompt, which is read but not scored (format `prompt_completion`): a text or a list of messages."""

    completion: Column = "completion"
    """Column of the completion, which is scored (format `prompt_completion`): a text or a list of messages."""

    messages: Column = "messages"
    """Column of the list of messages, each with a `role` and a `content` or, as ShareGPT has them, with `from` and
    `value` (format `messages`). Unless named, it may also be called `conversations`.
    """

    tools: Column = "tools"
    """Column of the tool definitions that the chat template gets with a conversation; rows may lack it."""

    task: Annotated[str, Field(min_length=1)] | None = None
    """Task, group or tag of lm-evaluation-harness instead of a path, for validation and held-out data: its prompts,
    without worked examples, and its gold answers, which are scored as the harness scores them. Its data set must be on
    this machine.
    """

    include: StudyPath | None = None
    """Folder of task files of your own, with `task`."""

    split: Annotated[str | None, Field(min_length=1), default_note("by the task file")] = None
    """Split of the task's data set, by its name there. Unless given, validation data are of the task's validation,
    training or test split, the first that it has; held-out data of its test or validation split.
    """

    _include = field_validator("include", mode="before")(resolve_path)

    @field_validator("path", mode="before")
    @classmethod
    def _paths(cls, value: Any, info: ValidationInfo) -> Any:
        entries = value if isinstance(value, list) else [value]
        if not entries or not all(isinstance(entry, str | Path) and str(entry) for entry in entries):
            raise ValueError(f"must be a path or a list of paths, not {value!r}")
        paths = [resolve_path(entry, info) for entry in entries]
        return paths if isinstance(value, list) else paths[0]

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, data: Any) -> Any:
        if isinstance(data, str | Path | list):
            return {"path": data}
        if not isinstance(data, Mapping | cls):
            raise ValueError(f"must be a path, or a mapping with `path:` and `format:`, not {data!r}")
        if isinstance(data, Mapping) and "task" in data:
            return {"format": "prompt_completion", **data}
        return data

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if (self.path is None) == (self.task is None):
            raise ValueError("must have a `path:` or a `task:`, and not both")
        for field in ("include", "split") if self.task is None else sorted(self.model_fields_set - _TASK_KEYS):
            if field in self.model_fields_set:
                raise ValueError(f"{field}: {'belongs to' if self.task is None else 'is not for'} a `task:`")
        if self.task is not None and self.format != "prompt_completion":
            raise ValueError("format: of a `task:` is prompt_completion")
        return self

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        for column in sorted(set().union(*_COLUMNS.values()) & self.model_fields_set - set(self.columns)):
            raise ValueError(f"{column}: not a column of format {self.format}, which has {' and '.join(self.columns)}")
        if self.format == "text" and "tools" in self.model_fields_set:
            raise ValueError("tools: not a column of format text; conversations have tools")
        return self

    @model_serializer
    def _as_written(self) -> str | list[str] | dict[str, Any]:
        """The shortest form: paths alone where everything else is at its default."""
        if self.task is not None:
            places = {"task": self.task, "include": self.include and str(self.include), "split": self.split}
            return {key: value for key, value in places.items() if value is not None}
        path = [str(path) for path in self.path] if isinstance(self.path, list) else str(self.path)
        if self.columns == {"text": "text"}:
            return path
        return {"path": path, "format": self.format} | self.columns | self.named_tools

    @property
    def paths(self) -> list[Path]:
        """The paths, which may be folders and patterns; none of a task."""
        return self.path if isinstance(self.path, list) else [self.path] if self.path is not None else []

    @property
    def columns(self) -> dict[str, str]:
        """The name in the file of each column that the format has."""
        return {column: getattr(self, column) for column in _COLUMNS[self.format]}

    @property
    def named_tools(self) -> dict[str, str]:
        """The column of tools, where it has a name of its own."""
        return {"tools": self.tools} if self.tools != "tools" else {}

    def __str__(self) -> str:
        if self.task is not None:
            return f"task {self.task}" + (f", split {self.split}" if self.split else "")
        return ", ".join(str(path) for path in self.paths)


Step = Literal["best"] | Positive


class ModelSource(Section):
    """A model or an adapter: a folder, a model of the Hugging Face Hub, or kept steps of a fine-tuning run.

    A path alone is a folder.
    """

    path: StudyPath | None = None
    """Folder in Hugging Face's format."""

    hub: Annotated[str, Field(pattern=_HUB_ID)] | None = None
    """Id on the Hugging Face Hub, `owner/name`, instead of a folder."""

    revision: Annotated[str | None, default_note("main")] = None
    """Branch, tag or commit of the hub id."""

    pickled: bool = False
    """Allow pickled weights (`pytorch_model.bin`, `adapter_model.bin`), from which only tensors are loaded."""

    run: StudyPath | None = None
    """Folder of a fine-tuning run that kept its steps (`fine_tuning.keep`), instead of a folder of weights."""

    step: Step | Annotated[list[Step], Field(min_length=1)] | None = None
    """Kept step of `run`: its number, or `best` for the lowest validation NLL. A list, `[20, 40, best]`, makes each
    step a fine-tune with a coefficient of its own, called `code@20` in a distribution `code`.
    """

    _paths = field_validator("path", "run", mode="before")(resolve_path)

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
        if isinstance(self.step, list) and len(set(self.step)) < len(self.step):
            raise ValueError(f"step: {self.step} names a step twice; two equal vectors can't be told apart")
        return self

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        """The shortest form: a path alone where nothing else is set."""
        if self.path is not None and not self.pickled:
            return str(self.path)
        places = {name: place and str(place) for name, place in (("path", self.path), ("run", self.run))}
        fields = {**places, "step": self.step, "hub": self.hub, "revision": self.revision}
        return {key: value for key, value in fields.items() if value} | ({"pickled": True} if self.pickled else {})

    @property
    def place(self) -> Path | None:
        """The folder that a fine-tuning of it writes; None for a hub id."""
        return self.run or self.path

    @property
    def models(self) -> "dict[str, ModelSource]":
        """The models by the ending of their names: one without an ending, or each of several steps as `@20`."""
        if not isinstance(self.step, list):
            return {"": self}
        return {f"@{step}": self.model_copy(update={"step": step}) for step in self.step}

    def __str__(self) -> str:
        if self.run is not None:
            return f"{self.run}, step {self.step}"
        return str(self.path) if self.hub is None else f"{self.hub}@{self.revision or 'main'}"


FineTuneKind = Literal["checkpoint", "adapter"]


class VectorSection(Section):
    """A fine-tune of the base without data of its own: it has a coefficient, which the corpora of others decide."""

    checkpoint: ModelSource | None = None
    """Fine-tuned checkpoint of the base. Each fine-tune is a `checkpoint` or an `adapter`."""

    adapter: ModelSource | None = None
    """LoRA adapter of the base (plain, rsLoRA or DoRA, as peft saves them)."""

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        _refuse_other_than_one(self.checkpoint, self.adapter)
        return self

    @property
    def fine_tune(self) -> tuple[FineTuneKind, ModelSource]:
        """The kind of the fine-tune and its source."""
        return _fine_tune(self.checkpoint, self.adapter)


def _refuse_other_than_one(checkpoint: ModelSource | None, adapter: ModelSource | None) -> None:
    if (checkpoint is None) == (adapter is None):
        raise ValueError("must have a `checkpoint:` or an `adapter:`, and not both")


def _fine_tune(checkpoint: ModelSource | None, adapter: ModelSource | None) -> tuple[FineTuneKind, ModelSource]:
    if checkpoint is not None:
        return "checkpoint", checkpoint
    assert adapter is not None
    return "adapter", adapter


class DistributionSection(Section):
    """One data distribution: its fine-tune, which is a checkpoint or an adapter of the base, and its data."""

    checkpoint: ModelSource | None = None
    """Fine-tuned checkpoint of the base. Each distribution has a `checkpoint` or an `adapter`."""

    adapter: ModelSource | None = None
    """LoRA adapter of the base (plain, rsLoRA or DoRA, as peft saves them)."""

    train: DataFile | None = None
    """Training data, from which `dem-opt train` makes the fine-tune."""

    validation: DataFile
    """Validation data, scored to choose the coefficients."""

    held_out: DataFile | None = None
    """Held-out data, scored only to report. Unless given, the validation documents are divided in two halves."""

    @model_validator(mode="after")
    def _check_fine_tune(self) -> Self:
        _refuse_other_than_one(self.checkpoint, self.adapter)
        if self.train is not None and self.train.task is not None:
            raise ValueError("train: must be files; a task's documents are for validation and held-out data")
        return self

    @property
    def fine_tune(self) -> tuple[FineTuneKind, ModelSource]:
        """The kind of the fine-tune and its source, which may be several steps."""
        return _fine_tune(self.checkpoint, self.adapter)


class GeneralSection(Section):
    """A general corpus, which is scored but has no fine-tune and no coefficient.

    A data file alone is its validation data.
    """

    validation: DataFile
    """Validation data, for `objective.weights`, `objective.protect` and reports."""

    held_out: DataFile | None = None
    """Held-out data. Unless given, the validation documents are divided in two halves."""

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, data: Any) -> Any:
        alone = not isinstance(data, Mapping | cls) or (
            isinstance(data, Mapping) and not {"path", "task"}.isdisjoint(data)
        )
        return {"validation": data} if alone else data


class SimplexSection(Section):
    """The coefficient space: coefficients of at least 0 that sum to `total`."""

    total: PositiveReal | Range = 1.0
    """Sum of the coefficients; the base has the rest, 1 - total. A pair `[0, 3]` lets the sum vary between the two: the
    number of distributions is a good upper end, since the sum of all vectors has it. `run` says where that pays.
    """

    bounds: dict[FineTuneName, Range] = Field(default_factory=dict)
    """Lowest and highest coefficient, by distribution: `{code: [0, 0.8]}`."""

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
Groups = Literal["global", "layers", "blocks"] | dict[Name, Positive | Pattern | list[Pattern]]


class CoefficientsSection(Section):
    """Coefficients by group of parameters, which deviate from those of the whole model."""

    groups: Groups = "global"
    """Groups of parameters with coefficients of their own: `global`, one for the whole model; `layers`, one for each
    layer and one for the embedding; `blocks`, which divides each layer into queries and keys, values and outputs, MLP
    and norms; `{depth: 4}`, four parts of consecutive layers; or your own, `{attention: "*.self_attn.*"}`, by shell
    patterns on parameter names, one or a list for each group (others are the group `rest`). The search finds the global
    coefficients first, then those of the groups, from gradients.
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
            raise ValueError("groups: names no group; write global, layers, blocks, {depth: 4} or patterns by group")
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

    function: Annotated[str | None, Field(pattern=_FUNCTION)] = None
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

    patience: Positive | None = None
    """Stop after this many proposals in a row with an expected improvement below `tolerance`. Never unless given."""

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

    lookahead: Annotated[int, Field(ge=0)] = 1
    """Proposals computed ahead for each worker while it scores."""

    racing: bool = True
    """Stop scoring a trial early when it will not win."""

    gradients: Literal["auto"] | bool = "auto"
    """Measure the gradient of each trial, which costs as much as two more forward passes; `auto` does so from seven
    free coefficients on, where memory allows.
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
