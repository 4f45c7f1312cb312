"""Models and data of a study file: sources of weights and of documents, and the sections that name them.

The docstring below each field is its description in the reference of the study file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from dem_opt.config.section import HUB_ID_PATTERN, Column, Positive, Section, StudyPath, default_note, resolve_path

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

    hub: Annotated[str, Field(pattern=HUB_ID_PATTERN)] | None = None
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


class BaseSource(ModelSource):
    """The base: a model, the dtype in which it is used, and how composites are rounded to it.

    A path alone is a folder.
    """

    dtype: Literal["auto", "float32"] = "auto"
    """Dtype of the base, and so of composites: its own, or `float32`, to which 16-bit weights are widened in the cache,
    once. Composites are then not rounded to 16 bits, whose steps are often as large as those of a fine-tune.
    """

    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Rounding of composites of a 16-bit base, and of exports in 16 bits (`--dtype`): to the `nearest` value, or
    `stochastic`, up or down by a hash of the weight's place with the probability of the sum's place between two values,
    so that nothing is lost on average.
    """

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        written = ModelSource._as_written(self)
        if not self.choices:
            return written
        return ({"path": written} if isinstance(written, str) else written) | self.choices

    @property
    def choices(self) -> dict[str, str]:
        """Dtype and rounding, where they are not the defaults."""
        chosen = {"dtype": self.dtype, "rounding": self.rounding}
        return {name: value for name, value in chosen.items() if value != type(self).model_fields[name].default}


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
