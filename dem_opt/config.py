"""What a study file may say: strict, checked on load, every error names the field and the mend."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from dem_opt.errors import InputError, nearest
from dem_opt.simplex import Space
from dem_opt.strict_yaml import read_yaml

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Positive = Annotated[int, Field(gt=0)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
_LOCAL_SQLITE = "sqlite:///"


class _Section(BaseModel):
    """A part of the study file: frozen, strict about types, refusing unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _from_here(value: Path | str | None, info: ValidationInfo) -> Path | None:
    """A path of the study file: relative paths start at the file's folder."""
    if value is None or not isinstance(value, str | Path):
        return value
    folder: Path = (info.context or {}).get("folder", Path())
    return folder / value


StudyPath = Annotated[Path, Field(strict=False)]
Column = Annotated[str, Field(min_length=1)]
_COLUMNS = {"text": ("text",), "prompt_completion": ("prompt", "completion"), "messages": ("messages",)}


class DataFile(_Section):
    """A file of documents (.jsonl, .parquet or .txt), and in which columns its format finds them.

    A path alone is a file of format text.  Only the columns of the format may be named.
    """

    path: StudyPath
    format: Literal["text", "prompt_completion", "messages"] = "text"
    text: Column = "text"
    prompt: Column = "prompt"
    completion: Column = "completion"
    messages: Column = "messages"

    _paths = field_validator("path", mode="before")(_from_here)

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


class ModelSource(_Section):
    """A model or an adapter: a folder, or a hub id and its revision.  A path alone is a folder.

    pickled  whether pickled weights may be read, of which only tensors are accepted
    """

    path: StudyPath | None = None
    hub: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")] | None = None
    revision: str | None = None
    pickled: bool = False

    _paths = field_validator("path", mode="before")(_from_here)

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str | Path) else data

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("must be a path, or a mapping with `hub:` and `revision:`")
        if self.path is not None and self.revision is not None:
            raise ValueError("revision: belongs to a `hub:`, a folder has none")
        return self

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        """A path alone where nothing else is said."""
        if self.hub is None and not self.pickled:
            return str(self.path)
        given = {"path": self.path and str(self.path), "hub": self.hub, "revision": self.revision}
        return {key: value for key, value in given.items() if value} | ({"pickled": True} if self.pickled else {})

    def __str__(self) -> str:
        return str(self.path) if self.hub is None else f"{self.hub}@{self.revision or 'main'}"


class Distribution(_Section):
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


class General(_Section):
    """A corpus without a vector of its own; a data file alone is its validation."""

    validation: DataFile
    held_out: DataFile | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, data: Any) -> Any:
        alone = not isinstance(data, Mapping | cls) or (isinstance(data, Mapping) and "path" in data)
        return {"validation": data} if alone else data


class SimplexSection(_Section):
    """The coefficient space: coefficients of at least 0 that sum to `total`."""

    total: PositiveReal = 1.0


class Objective(_Section):
    """What is minimized, and what must not get worse.

    weights  by distribution or general corpus; equal for distributions where none are given, 0 for a name left out
    protect  the most nats per token above the base, by distribution or general corpus
    """

    weights: dict[Name, NotNegative] | None = None
    protect: dict[Name, NotNegative] = Field(default_factory=dict)


class EvaluationSection(_Section):
    """How composites are scored.

    window    tokens in a window
    windows   windows of the search split, for each distribution
    held_out  windows of the held-out split, for each distribution
    batch     tokens in one forward call at most; auto: 4096, halved until they fit into memory
    dtype     auto: float32 on CPU, the base's dtype on a GPU
    seed      orders the documents and draws the windows
    """

    window: Annotated[int, Field(ge=2)] = 1024
    windows: Positive = 64
    held_out: Positive = 64
    batch: Literal["auto"] | Positive = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: Seed = 0


class Search(_Section):
    """How coefficients are proposed.  `divisions` is the grid's: 10 gives steps of a tenth of the total."""

    algorithm: Literal["simplex-gp", "grid", "random"] = "simplex-gp"
    trials: Positive = 40
    seed: Seed = 0
    divisions: Positive = 10
    lookahead: Annotated[int, Field(ge=0)] = 1


class Compute(_Section):
    """Residents and where they live.

    residents auto: one for each GPU; without GPUs one with all the CPUs
    ray       local: a Ray of its own; auto: the cluster that this machine belongs to; or an address
    patience  seconds to wait for residents to be ready
    """

    residents: Literal["auto"] | Positive = "auto"
    ray: str = "local"
    patience: PositiveReal = 600.0


class Tracking(_Section):
    """MLflow: where runs are logged, and under which experiment."""

    uri: str
    experiment: str


class FineTuning(_Section):
    """What `dem-opt train` does for each distribution: full fine-tuning of the base."""

    steps: Positive = 60
    learning_rate: PositiveReal = 3e-4
    batch_size: Positive = 16
    seed: Seed = 0


class StudyConfig(_Section):
    """A whole study file, resolved: absolute paths, defaults filled in."""

    name: Name
    base: ModelSource
    distributions: Annotated[dict[Name, Distribution], Field(min_length=1)]
    general: dict[Name, General] = Field(default_factory=dict)
    simplex: SimplexSection = SimplexSection()
    objective: Objective = Objective()
    evaluation: EvaluationSection = EvaluationSection()
    search: Search = Search()
    compute: Compute = Compute()
    storage: str
    tracking: Tracking
    fine_tuning: FineTuning = FineTuning()
    output: StudyPath

    _paths = field_validator("output", mode="before")(_from_here)

    @model_validator(mode="before")
    @classmethod
    def _fill_places(cls, data: Any, info: ValidationInfo) -> Any:
        """Defaults that follow from other fields, and database URLs whose files start at the study file."""
        if not isinstance(data, dict):
            return data
        folder: Path = (info.context or {}).get("folder", Path())
        data = dict(data)
        name = data.get("name")
        output = data.setdefault("output", f"runs/{name if isinstance(name, str) else ''}")
        if not isinstance(output, str):
            return data
        data["storage"] = _database(data.get("storage", f"{_LOCAL_SQLITE}{output}/study.db"), folder)
        tracking = data.get("tracking") or {}
        if isinstance(tracking, dict):
            uri = _database(tracking.get("uri", f"{_LOCAL_SQLITE}{output}/mlflow.db"), folder)
            data["tracking"] = {"experiment": name, **tracking, "uri": uri}
        return data

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in self.general:
            if name in self.distributions:
                raise ValueError(f"general.{name}: a distribution has this name; choose another")
        for field in ("weights", "protect"):
            for name in getattr(self.objective, field) or ():
                if name not in self.corpora:
                    known = nearest(name, self.corpora)
                    raise ValueError(f"objective.{field}.{name}: no such distribution or general corpus; {known}")
        if not any(self.weights.values()):
            raise ValueError("objective.weights: at least one weight must be above 0")
        return self

    @model_validator(mode="after")
    def _check_databases(self) -> Self:
        if self.storage == self.tracking.uri:
            raise ValueError(
                "tracking.uri: must be another database than storage: Optuna and MLflow claim the same tables"
            )
        return self

    @property
    def space(self) -> Space:
        """The coefficient space."""
        return Space(tuple(self.distributions), self.simplex.total)

    @property
    def corpora(self) -> dict[str, Distribution | General]:
        """Whatever has validation data: the distributions, then the general corpora."""
        return {**self.distributions, **self.general}

    @property
    def weights(self) -> dict[str, float]:
        """The objective's weight of each distribution and general corpus."""
        given = self.objective.weights
        if given is None:
            given = dict.fromkeys(self.distributions, 1.0)
        return {name: given.get(name, 0.0) for name in self.corpora}


def load(path: Path) -> StudyConfig:
    """The study in a YAML file.

    Raises InputError, in one line that names the field, for anything that the file may not say.
    """
    data = read_yaml(path)
    try:
        return StudyConfig.model_validate(data, context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise _in_the_users_words(path, error) from None


def _database(url: Any, folder: Path) -> Any:
    """A database URL; a relative SQLite file starts at `folder`."""
    if isinstance(url, str) and url.startswith(_LOCAL_SQLITE) and not url.startswith(_LOCAL_SQLITE + "/"):
        return f"{_LOCAL_SQLITE}{folder / url.removeprefix(_LOCAL_SQLITE)}"
    return url


def _in_the_users_words(path: Path, error: ValidationError) -> InputError:
    """One of pydantic's findings as one line: an unknown key, which is often why another is missing, or the first."""
    findings = error.errors()
    finding = next((one for one in findings if one["type"] == "extra_forbidden"), findings[0])
    field = ".".join(
        str(part) for part in finding["loc"] if not str(part).startswith(("literal", "constrained", "function"))
    )
    value, kind = finding["input"], finding["type"]
    if kind == "extra_forbidden":
        known = _known_keys(StudyConfig, finding["loc"][:-1])
        return InputError(path, field, value, f"unknown key; {nearest(str(finding['loc'][-1]), known)}")
    if kind == "missing":
        return InputError(path, field, None, "is required")
    if kind == "value_error":
        return InputError(path, field or None, None, str(finding["ctx"]["error"]))
    return InputError(path, field, value, finding["msg"])


def _known_keys(section: type[BaseModel], loc: tuple[int | str, ...]) -> Mapping[str, Any]:
    """The keys of the section at `loc`, in which a field of named sections is followed by a name."""
    parts = iter(loc)
    for part in parts:
        annotation = section.model_fields[str(part)].annotation
        if get_origin(annotation) is dict:
            next(parts, None)
        section = _section(annotation) or section
    return section.model_fields


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation is, holds by name, or may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)
