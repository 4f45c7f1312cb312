"""What a study file may say: strict, checked on load, every error names the field and the mend."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from dem_opt.config.sections import (
    ALGORITHMS,
    BUDGETS,
    Compute,
    DataFile,
    DataMixing,
    Distribution,
    Evaluate,
    EvaluationSection,
    FineTuning,
    General,
    ModelSource,
    Name,
    Objective,
    Outages,
    Search,
    Section,
    SimplexSection,
    StudyPath,
    Tracking,
    from_here,
)
from dem_opt.config.yaml import read_yaml
from dem_opt.errors import InputError, nearest
from dem_opt.simplex import TOLERANCE, Space

__all__ = [
    "ALGORITHMS",
    "BUDGETS",
    "Compute",
    "DataFile",
    "Distribution",
    "Evaluate",
    "EvaluationSection",
    "FineTuning",
    "General",
    "ModelSource",
    "Search",
    "StudyConfig",
    "load",
]

_LOCAL_SQLITE = "sqlite:///"


class StudyConfig(Section):
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
    outages: Outages = Outages()
    fine_tuning: FineTuning = FineTuning()
    data_mixing: DataMixing = DataMixing()
    evaluate: Evaluate | None = None
    output: StudyPath

    _paths = field_validator("output", mode="before")(from_here)

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
    def _check_training(self) -> Self:
        for name, one in self.distributions.items():
            kind, source = one.expert
            if one.train is not None and source.run is not None and not self.fine_tuning.keep:
                raise ValueError(f"distributions.{name}.{kind}.step: needs `fine_tuning: {{keep: true}}`")
        for number, shares in enumerate(self.data_mixing.mixtures, start=1):
            for name in shares.keys() - self.distributions.keys():
                known = nearest(name, self.distributions)
                raise ValueError(f"data_mixing.mixtures: no. {number}: {name!r} is no distribution; {known}")
        return self

    @model_validator(mode="after")
    def _check_simplex(self) -> Self:
        boxes, (least, total) = self.simplex.boxes, self.simplex.sums
        for field in ("bounds", "fixed"):
            for name in getattr(self.simplex, field):
                if name not in self.distributions:
                    raise ValueError(
                        f"simplex.{field}.{name}: no such distribution; {nearest(name, self.distributions)}"
                    )
        lowest = sum(low for low, _ in boxes.values())
        highest = sum(boxes.get(name, (0.0, total))[1] for name in self.distributions)
        if lowest > total + TOLERANCE:
            raise ValueError(f"simplex: the least coefficients sum to {lowest:g}, more than the total of {total:g}")
        if highest < least - TOLERANCE:
            raise ValueError(f"simplex: the greatest coefficients sum to {highest:g}, less than the total of {least:g}")
        if self.search.algorithm == "grid" and not self.space.lattice_size(self.search.divisions):
            raise ValueError(
                f"search.divisions: no point of the lattice of {self.search.divisions} is within the bounds"
            )
        return self

    @model_validator(mode="after")
    def _check_gradients(self) -> Self:
        asked = self.search.gradients is True or self.search.algorithm == "gradient"
        if self.objective.worst and not any(self.weights[name] for name in self.distributions):
            raise ValueError("objective.worst: no distribution has a weight, so none has a regret")
        if self.objective.worst and asked:
            raise ValueError("objective.worst: a largest regret has no gradient where two are largest; search without")
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
        least, total = self.simplex.sums
        boxes = tuple((name, *box) for name, box in self.simplex.boxes.items())
        return Space(tuple(self.distributions), total, least if least < total else None, boxes)

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
