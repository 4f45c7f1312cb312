"""What a study file may say: strict, checked on load, every error names the field and the mend."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from dem_opt.errors import InputError, nearest
from dem_opt.simplex import Space

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Positive = Annotated[int, Field(gt=0)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
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


class Distribution(_Section):
    """One data distribution: its fine-tuned checkpoint and its data.

    train is for `dem-opt train` only.  Without held_out, the validation documents are divided in two.
    """

    checkpoint: StudyPath
    train: StudyPath | None = None
    validation: StudyPath
    held_out: StudyPath | None = None

    _paths = field_validator("checkpoint", "train", "validation", "held_out", mode="before")(_from_here)


class SimplexSection(_Section):
    """The coefficient space: coefficients of at least 0 that sum to `total`."""

    total: PositiveReal = 1.0


class Objective(_Section):
    """The objective's weights by distribution; equal where none are given, 0 for a name left out."""

    weights: dict[Name, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None


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
    base: StudyPath
    distributions: Annotated[dict[Name, Distribution], Field(min_length=1)]
    simplex: SimplexSection = SimplexSection()
    objective: Objective = Objective()
    evaluation: EvaluationSection = EvaluationSection()
    search: Search = Search()
    compute: Compute = Compute()
    storage: str
    tracking: Tracking
    fine_tuning: FineTuning = FineTuning()
    output: StudyPath

    _paths = field_validator("base", "output", mode="before")(_from_here)

    @model_validator(mode="before")
    @classmethod
    def _fill_places(cls, data: Any, info: ValidationInfo) -> Any:
        """Defaults that follow from other fields, and database URLs whose files start at the study file."""
        if not isinstance(data, dict):
            return data
        folder: Path = (info.context or {}).get("folder", Path())
        data = dict(data)
        name = data.get("name")
        output = data.setdefault("output", f"runs/{name}")
        data["storage"] = _database(data.get("storage", f"{_LOCAL_SQLITE}{output}/study.db"), folder)
        tracking = data.get("tracking") or {}
        if isinstance(tracking, dict):
            uri = _database(tracking.get("uri", f"{_LOCAL_SQLITE}{output}/mlflow.db"), folder)
            data["tracking"] = {"experiment": name, **tracking, "uri": uri}
        return data

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        weights = self.objective.weights
        if weights is not None:
            for name in weights:
                if name not in self.distributions:
                    raise ValueError(
                        f"objective.weights.{name}: no such distribution; {nearest(name, self.distributions)}"
                    )
            if not any(weights.values()):
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
    def weights(self) -> dict[str, float]:
        """The objective's weight of each distribution."""
        given = self.objective.weights
        return {name: 1.0 if given is None else given.get(name, 0.0) for name in self.distributions}


def load(path: Path) -> StudyConfig:
    """The study in a YAML file.

    Raises InputError, in one line that names the field, for anything that the file may not say.
    """
    data = _read_yaml(path)
    try:
        return StudyConfig.model_validate(data, context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise _in_the_users_words(path, error) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping; a key given twice is an error."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise InputError(path, None, None, "no such study file") from None
    except OSError as error:
        raise InputError(path, None, None, f"the study file can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(path, None, None, "the study file must be UTF-8 text") from None
    except yaml.YAMLError as error:
        raise InputError(path, None, None, f"not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise InputError(path, None, data, "a study file is a mapping that begins with `name:`")
    return data


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 that refuses repeated keys and reads 3e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _database(url: Any, folder: Path) -> Any:
    """A database URL; a relative SQLite file starts at `folder`."""
    if isinstance(url, str) and url.startswith(_LOCAL_SQLITE) and not url.startswith(_LOCAL_SQLITE + "/"):
        return f"{_LOCAL_SQLITE}{folder / url.removeprefix(_LOCAL_SQLITE)}"
    return url


def _in_the_users_words(path: Path, error: ValidationError) -> InputError:
    """The first of pydantic's findings as one line."""
    finding = error.errors()[0]
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


def _known_keys(section: Any, loc: tuple[int | str, ...]) -> Mapping[str, Any]:
    """The keys of the section at `loc`."""
    for part in loc:
        if isinstance(section, type) and issubclass(section, BaseModel) and part in section.model_fields:
            section = section.model_fields[str(part)].annotation
        else:
            section = Distribution
    return section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
