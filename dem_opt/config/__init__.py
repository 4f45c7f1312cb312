"""The study file: strict, checked on load; every error names the file, the field, its value and the remedy.

`load` reads one as a `StudyConfig`; `sources` has the sections of models and data, `sections` the others, `reference`
describes every key.  Imports root modules only, and no torch.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from dem_opt.config.fine_tunes import FineTune, fine_tunes_of
from dem_opt.config.places import find_place
from dem_opt.config.section import Name, Section, StudyPath, default_note, resolve_path
from dem_opt.config.sections import (
    ALGORITHMS,
    BUDGETS,
    CHAT_DATE,
    DEPTH,
    ONE_OBJECTIVE,
    RENAMED_KEYS,
    REST,
    TOP,
    CoefficientsSection,
    ComputeSection,
    DataMixingSection,
    EvaluateSection,
    EvaluationSection,
    FineTuningSection,
    Groups,
    ObjectiveSection,
    OutagesSection,
    ReportSection,
    SearchSection,
    SimplexSection,
    TrackingSection,
)
from dem_opt.config.sources import (
    BaseSource,
    DataFile,
    DistributionSection,
    GeneralSection,
    ModelSource,
    VectorSection,
)
from dem_opt.config.yaml import read_yaml
from dem_opt.errors import InputError, nearest
from dem_opt.pareto import MEAN, Axes, joint_weights, make_axis
from dem_opt.simplex import TOLERANCE, UNIT, Family, Space

__all__ = [
    "ALGORITHMS",
    "BUDGETS",
    "CHAT_DATE",
    "DEPTH",
    "GRADIENTS_FROM",
    "ONE_OBJECTIVE",
    "PATIENCE",
    "REST",
    "TOP",
    "BaseSource",
    "CoefficientsSection",
    "ComputeSection",
    "DataFile",
    "DistributionSection",
    "EvaluateSection",
    "EvaluationSection",
    "FineTune",
    "FineTuningSection",
    "GeneralSection",
    "Groups",
    "ModelSource",
    "ReportSection",
    "SearchSection",
    "StudyConfig",
    "VectorSection",
    "load",
    "sqlite_url",
]

_LOCAL_SQLITE = "sqlite:///"

GRADIENTS_FROM = 7
"""Free shares from which on gradients are worth their cost, fine-tunes for the report included (docs/search.md)."""

PATIENCE = 3
"""Proposals in a row that promise little after which a search ends by itself (docs/search.md has what that costs)."""

_QUOTED = str.maketrans({character: f"%{ord(character):02X}" for character in "%?#{}"})
"""Characters of a path that mean something else in a database's URL."""


class StudyConfig(Section):
    """A whole study file, resolved: absolute paths, defaults filled in."""

    name: Name
    """Name of the study, under which its trials are found again: letters, digits, `_`, `.` and `-`, at most 64."""

    base: BaseSource
    """Base model, of which the fine-tunes were trained."""

    distributions: Annotated[dict[Name, DistributionSection], Field(min_length=1)]
    """Data distributions by name, each with a fine-tune of the base."""

    vectors: dict[Name, VectorSection] = Field(default_factory=dict)
    """Further fine-tunes by name, without data of their own: other seeds, other steps, checkpoints of the base's own
    training.
    """

    general: dict[Name, GeneralSection] = Field(default_factory=dict)
    """General corpora by name, without a fine-tune of their own: a data file, or `validation` and `held_out`."""

    simplex: SimplexSection = SimplexSection()
    """Coefficient space."""

    coefficients: CoefficientsSection = CoefficientsSection()
    """Coefficients by group of parameters."""

    objective: ObjectiveSection = ObjectiveSection()
    """Objective and constraints."""

    evaluation: EvaluationSection = EvaluationSection()
    """Scoring of composites."""

    search: SearchSection = SearchSection()
    """Search algorithm and its budget."""

    compute: ComputeSection = ComputeSection()
    """Workers."""

    storage: Annotated[str, default_note("sqlite:///OUTPUT/study.db")]
    """Database of trials and scores, as an SQLAlchemy URL (SQLite or PostgreSQL); a relative SQLite file starts at the
    study file.
    """

    tracking: Annotated[TrackingSection, default_note("")]
    """MLflow."""

    outages: OutagesSection = OutagesSection()
    """Waiting for services that are away."""

    fine_tuning: FineTuningSection = FineTuningSection()
    """Fine-tuning by `dem-opt train`."""

    data_mixing: DataMixingSection = DataMixingSection()
    """Data-mixing baselines."""

    report: ReportSection = ReportSection()
    """Rows of the final table that are measured only where they are asked for."""

    evaluate: EvaluateSection | None = None
    """Downstream tasks of `dem-opt evaluate`."""

    output: Annotated[StudyPath, default_note("runs/NAME")]
    """Folder of databases, reports and artifacts."""

    _paths = field_validator("output", mode="before")(resolve_path)

    @model_validator(mode="before")
    @classmethod
    def _fill_places(cls, data: Any, info: ValidationInfo) -> Any:
        """Fill in defaults that follow from other fields; relative SQLite files start at the study file's folder."""
        if not isinstance(data, dict):
            return data
        folder: Path = (info.context or {}).get("folder", Path())
        data = dict(data)
        name = data.get("name")
        output = data.setdefault("output", f"runs/{name if isinstance(name, str) else ''}")
        place = sqlite_url(str(output))
        data["storage"] = _database(data.get("storage", f"{place}/study.db"), folder)
        tracking = data.get("tracking") or {}
        if isinstance(tracking, dict):
            uri = _database(tracking.get("uri", f"{place}/mlflow.db"), folder)
            data["tracking"] = {"experiment": name, **tracking, "uri": uri}
        return data

    @model_validator(mode="after")
    def _check_pareto(self) -> Self:
        """Refuse names that are no losses; runs first, since weights follow from them."""
        if self.objective.pareto is None:
            return self
        names = self.objective.pareto
        for name in names:
            if name not in (known := (*self.corpora, MEAN)):
                mend = f"no such distribution or general corpus, nor {MEAN!r}; {nearest(name, known)}"
                raise ValueError(f"objective.pareto: {name!r}: {mend}")
        if names[0] == names[1]:
            raise ValueError(f"objective.pareto: {names[0]!r} stands there twice; name two different losses")
        conflicts = {
            "objective.worst": self.objective.worst,
            "objective.function": self.objective.function is not None,
            "objective.protect": bool(self.objective.protect),
            f"objective.weights, which belong to {MEAN!r}": self.objective.weights is not None and MEAN not in names,
            "search.racing": "racing" in self.search.model_fields_set and self.search.racing,
            "search.gradients": self.search.gradients is True,
            "search.patience": self.search.patience not in ("auto", None),
            f"search.algorithm: {self.search.algorithm}": self.search.algorithm in ONE_OBJECTIVE,
        }
        for field, conflict in conflicts.items():
            if conflict:
                raise ValueError(f"objective.pareto: cannot be combined with {field}; leave one of them out")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for section, names in (("vectors", self.vectors), ("general", self.general)):
            for name in names:
                if name in self.distributions:
                    raise ValueError(f"{section}.{name}: a distribution has this name; choose another")
        for name in self.general.keys() & self.vectors.keys():
            raise ValueError(f"general.{name}: a vector has this name; choose another")
        for field in ("weights", "protect"):
            for name in getattr(self.objective, field) or ():
                if name not in self.corpora:
                    known = nearest(name, self.corpora)
                    raise ValueError(f"objective.{field}.{name}: no such distribution or general corpus; {known}")
        if not any(self.weights.values()):
            raise ValueError("objective.weights: at least one weight must be above 0")
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if isinstance(self.base.step, list):
            raise ValueError("base.step: the base is one model; name one step")
        if self.objective.worst:
            for name, distribution in self.distributions.items():
                kind, source = distribution.fine_tune
                if isinstance(source.step, list):
                    mend = "regrets are against a distribution's one fine-tune; name one step, and others as vectors"
                    raise ValueError(f"distributions.{name}.{kind}.step: {mend}")
        return self

    @model_validator(mode="after")
    def _check_training(self) -> Self:
        for name, distribution in self.distributions.items():
            kind, source = distribution.fine_tune
            if distribution.train is not None and source.run is not None and not self.fine_tuning.keep:
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
                if name not in self.fine_tunes and name not in self.families:
                    known = nearest(name, [*self.fine_tunes, *self.families])
                    raise ValueError(f"simplex.{field}.{name}: no such distribution; {known}")
        for name, steps in self.families.items():
            if name in boxes:
                self._check_family(name, steps)
        assert self.space.reach is not None, "families were checked"
        lowest, highest = (units / UNIT for units in self.space.reach)
        if lowest > total + TOLERANCE:
            raise ValueError(f"simplex: the least coefficients sum to {lowest:g}, more than the total of {total:g}")
        if highest < least - TOLERANCE:
            raise ValueError(f"simplex: the greatest coefficients sum to {highest:g}, less than the total of {least:g}")
        if self.search.algorithm == "grid" and not self.space.lattice_size(self.search.divisions):
            raise ValueError(
                f"search.divisions: no point of the lattice of {self.search.divisions} is within the bounds"
            )
        return self

    def _check_family(self, name: str, steps: Sequence[str]) -> None:
        """The bounds of a fine-tune's sum leave room for those of its steps."""
        boxes, (_, total) = self.simplex.boxes, self.simplex.sums
        field = "bounds" if name in self.simplex.bounds else "fixed"
        lowest = sum(boxes.get(step, (0.0, total))[0] for step in steps)
        highest = sum(boxes.get(step, (0.0, total))[1] for step in steps)
        low, high = boxes[name]
        if lowest > high + TOLERANCE or highest < low - TOLERANCE:
            reach = f"the bounds of {', '.join(steps)} allow sums from {lowest:g} to {highest:g} only"
            raise ValueError(f"simplex.{field}.{name}: {reach}; change one of them")

    @model_validator(mode="after")
    def _check_gradients(self) -> Self:
        needs_gradients = self.search.gradients is True or self.search.algorithm == "gradient"
        if self.objective.worst and not any(self.weights[name] for name in self.distributions):
            raise ValueError("objective.worst: no distribution has a weight, so none has a regret")
        if self.objective.worst and needs_gradients:
            raise ValueError("objective.worst: a largest regret has no gradient where two are largest; search without")
        return self

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.coefficients.groups == "global":
            return self
        if not self.has_gradients:
            mend = "needs an objective with a gradient: the mean, not a largest regret, a function or a front"
            raise ValueError(f"coefficients.groups: {mend}; leave one of them out")
        return self

    @model_validator(mode="after")
    def _check_function(self) -> Self:
        if self.objective.function is None:
            return self
        conflicts = {
            "objective.worst": self.objective.worst,
            "objective.weights": self.objective.weights is not None,
            "search.racing": "racing" in self.search.model_fields_set and self.search.racing,
            "search.gradients": self.search.gradients is True,
            "search.algorithm: gradient": self.search.algorithm == "gradient",
        }
        for field, conflict in conflicts.items():
            if conflict:
                raise ValueError(f"objective.function: cannot be combined with {field}; leave one of them out")
        return self

    @model_validator(mode="after")
    def _check_databases(self) -> Self:
        if self.storage == self.tracking.uri:
            raise ValueError(
                "tracking.uri: must be another database than storage: Optuna and MLflow claim the same tables"
            )
        return self

    @property
    def has_gradients(self) -> bool:
        """True if the objective is one number with a gradient: no largest regret, custom function or front."""
        return not self.objective.worst and self.objective.function is None and self.objective.pareto is None

    @property
    def space(self) -> Space:
        """The coefficient space."""
        (least, total), boxes = self.simplex.sums, self.simplex.boxes
        return Space(
            tuple(self.fine_tunes),
            total,
            least if least < total else None,
            tuple((name, *box) for name, box in boxes.items() if name in self.fine_tunes),
            tuple(Family(name, steps, *boxes[name]) for name, steps in self.families.items() if name in boxes),
        )

    @property
    def families(self) -> dict[str, tuple[str, ...]]:
        """Names of the coefficients of each distribution or vector whose steps are named in a list."""
        families: dict[str, tuple[str, ...]] = {}
        for name, fine_tune in self.fine_tunes.items():
            if fine_tune.family is not None:
                families[fine_tune.family] = (*families.get(fine_tune.family, ()), name)
        return families

    @property
    def fine_tunes(self) -> dict[str, FineTune]:
        """The fine-tunes by name, each with a coefficient: of the distributions, then the vectors."""
        return dict(fine_tunes_of(self.distributions, self.vectors))

    @property
    def corpora(self) -> dict[str, DistributionSection | GeneralSection]:
        """Everything that has validation data: the distributions, then the general corpora."""
        return {**self.distributions, **self.general}

    @property
    def weights(self) -> dict[str, float]:
        """The objective's weight of each distribution and general corpus; of a front, those of the two losses' mean."""
        return joint_weights(self.axes, list(self.corpora)) if self.axes else self._weights_of_mean

    @property
    def axes(self) -> Axes | None:
        """The two losses whose front is searched."""
        if self.objective.pareto is None:
            return None
        first, second = self.objective.pareto
        return make_axis(first, self._weights_of_mean), make_axis(second, self._weights_of_mean)

    @property
    def _weights_of_mean(self) -> dict[str, float]:
        weights = self.objective.weights
        if weights is None:
            weights = dict.fromkeys(self.distributions, 1.0)
        return {name: weights.get(name, 0.0) for name in self.corpora}

    def patience(self, algorithm: str) -> int | None:
        """Number of proposals in a row that promise little which end an algorithm's search; None where none do."""
        if self.search.patience != "auto":
            return self.search.patience
        is_mean = not self.objective.worst and self.objective.function is None and self.axes is None
        return PATIENCE if algorithm == "simplex-gp" and is_mean else None

    def lookahead(self, algorithm: str) -> int:
        """Number of proposals that an algorithm's search makes ahead for each worker."""
        if self.search.lookahead != "auto":
            return self.search.lookahead
        return 1 if algorithm in ("grid", "random") else 0

    def measures_gradients(self, fits: bool) -> bool:
        """True if trials of `simplex-gp` are measured with their gradient; `fits`: memory allows it."""
        if self.search.gradients != "auto":
            return self.search.gradients
        return fits and self.has_gradients and len(self.space.caps_F) >= GRADIENTS_FROM

    def planned_trials(self, algorithm: str) -> int:
        """Number of trials that a search has at most: a grid's whole lattice, else `search.trials`; one for a point."""
        if self.space.is_point:
            return 1
        return self.space.lattice_size(self.search.divisions) if algorithm == "grid" else self.search.trials

    @property
    def unweighted(self) -> tuple[str, ...]:
        """The distributions that `objective.weights` does not name, so that they weigh 0."""
        weights = self.objective.weights
        return () if weights is None else tuple(name for name in self.distributions if name not in weights)


def load(path: Path) -> StudyConfig:
    """Read and check a study file.

    Raises:
        InputError: The file can't be read, or a field is unknown, missing or out of its range.
    """
    data = read_yaml(path)
    try:
        return StudyConfig.model_validate(data, context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise _input_error(path, data, error) from None


def sqlite_url(path: Path | str, rest: str = "") -> str:
    """The URL of an SQLite file.

    Args:
        path: The file, or a folder that `rest` starts at.
        rest: A relative path in a URL, where `path` is a folder.
    """
    quoted = str(Path(str(path).translate(_QUOTED)) / rest)
    # Given `sqlite:///`, MLflow would make the folder of the path as it stands in the URL, quoted.
    return f"{'sqlite+pysqlite:///' if '%' in quoted else _LOCAL_SQLITE}{quoted}"


def _database(url: Any, folder: Path) -> Any:
    """A database URL; a relative SQLite file starts at `folder`."""
    scheme, _, path = url.partition("///") if isinstance(url, str) else ("", "", "")
    relative = scheme in ("sqlite:", "sqlite+pysqlite:") and not path.startswith("/")
    return sqlite_url(folder, path) if relative else url


def _input_error(path: Path, data: object, error: ValidationError) -> InputError:
    """The InputError for pydantic's findings: the first unknown key if there is any, else the first finding.

    A misspelt key is often the reason why another one is missing, so unknown keys come first.
    """
    findings = error.errors(include_url=False)
    finding = next((finding for finding in findings if finding["type"] == "extra_forbidden"), findings[0])
    place = find_place(StudyConfig, finding["loc"])
    kind, value = finding["type"], place.value(data, finding["input"])
    if kind == "extra_forbidden":
        if present := RENAMED_KEYS.get(place.field):
            return InputError(path, place.field, value, f"this key has been renamed; write {present}")
        mend = f"unknown key; {nearest(str(finding['loc'][-1]), place.known_keys)}"
        return InputError(path, place.field, value, mend)
    if kind == "missing":
        if place.is_key:
            return InputError(path, place.field, None, "is required")
        place = find_place(StudyConfig, finding["loc"][:-1])  # a list with too few entries, not the one that it lacks
        value = place.value(data, finding["input"])
    if kind == "value_error":
        return InputError(path, place.field or None, None, str(finding["ctx"]["error"]))
    if place.is_name:
        return InputError(path, place.field, None, place.requirement)
    if value is None:
        return InputError(path, place.field, None, f"is empty; {place.requirement}")
    close = isinstance(value, str) and get_close_matches(value, place.choices, n=1)
    return InputError(path, place.field, value, place.requirement + (f"; did you mean {close[0]!r}?" if close else ""))
