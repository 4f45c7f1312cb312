"""The identity of a study by content: base, fine-tunes and corpora as hashes, space, objective and scoring settings.

Two sets of fields guard a study in the ledger.  A change of the *identity fields* begins a new generation of it, seeded
from the ledger; a change of the *scoring fields* is refused, since scores would no longer compare.  Keys and values of
both are stored, and hashed: they must not change.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from dem_opt.config.objective_function import ObjectiveFunction
from dem_opt.errors import InputError
from dem_opt.grouping import GroupedCoefficients, GroupSettings
from dem_opt.pareto import Axes, Axis
from dem_opt.simplex import Coefficients, Family, Space
from dem_opt.types import HELD_OUT, NATS_PER_TOKEN, SEARCH, Composite

_VECTORS = ("evaluation.vectors", "exact")
_ROUNDING = ("base.rounding", "nearest")
"""Settings that not every study has, and their values for the others."""

_FIELDS = {SEARCH: "validation", HELD_OUT: "held_out"}
_WINDOWS = {SEARCH: "windows", HELD_OUT: "held_out"}


@dataclass(frozen=True)
class StudyIdentity:
    """A study with every path replaced by the hash of its content.

    Attributes:
        base: Content hash of the base.
        fine_tunes: Content hashes of the K fine-tunes by name, each with a coefficient; one that has the name of a
            corpus is that distribution's own.
        space: Coefficient space.
        weights: The objective's weights, by distribution or general corpus.
        corpora: Keys of the M corpora by split, then by distribution or general corpus.
        settings: Settings of the evaluation as text, by their name in the study file; `device` is cpu or cuda, `looks`
            the number of interim analyses, at which a corpus is scored in parts.
        protect: Allowance above the base in the objective's unit, by distribution or general corpus.
        worst: The largest regret is minimized, not the mean.
        unit: Unit of the objective.
        pareto: The two losses whose front is searched; the weights are then those of their mean.
        configuration: Fingerprint of the config.json that computes, where the ledger has scores of these models that
            were measured with another; "" for the configuration that the ledger met first.
        groups: Groups of parameters that have coefficients of their own.
    """

    base: str
    fine_tunes: Mapping[str, str]
    space: Space
    weights: Mapping[str, float]
    corpora: Mapping[str, Mapping[str, str]]
    settings: Mapping[str, str]
    protect: Mapping[str, float] = field(default_factory=dict)
    worst: bool = False
    function: ObjectiveFunction | None = None
    unit: str = NATS_PER_TOKEN
    pareto: Axes | None = None
    configuration: str = ""
    groups: GroupSettings | None = None

    def composite(self, coefficients: Coefficients | GroupedCoefficients) -> Composite:
        """The composite of coefficients, by content."""
        if isinstance(coefficients, Coefficients):
            return Composite.edited(self.base, self.fine_tunes, coefficients)
        assert self.groups is not None, "a study without groups has no coefficients by group"
        return Composite.grouped(self.base, self.fine_tunes, self.groups.grouping, coefficients)

    @property
    def scoring(self) -> str:
        """The ledger's scoring key: a hash of the settings that change a window's nats; windows are hashed apart.

        The configuration is no part of it for the models' first one, which databases of early releases do not name.
        Vectors in int8 are differences to the base, which is one of the settings then.  So is rounding where it is
        stochastic.
        """
        fields = ("evaluation.dtype", "evaluation.batch", "looks", "device")
        settings = [(field, self.settings.get(field)) for field in fields]
        if self.vectors != "exact":
            settings += [("evaluation.vectors", self.vectors), ("base", self.base)]
        if self.rounding != "nearest":
            settings += [("base.rounding", self.rounding)]
        if self.configuration:
            settings += [("configuration", self.configuration)]
        return sha256(repr(settings).encode()).hexdigest()

    @property
    def vectors(self) -> str:
        """Storage of the fine-tunes in memory: "exact" or "int8"."""
        return self.settings.get(*_VECTORS)

    @property
    def rounding(self) -> str:
        """Rounding of composites to the base's dtypes: "nearest" or "stochastic"."""
        return self.settings.get(*_ROUNDING)

    def exact(self) -> "StudyIdentity":
        """The same study with exact vectors."""
        return replace(self, settings={**self.settings, "evaluation.vectors": "exact"})

    @property
    def differentiation(self) -> str:
        """The ledger's key of gradients: a hash of the scoring and of the base, where distribution vectors begin."""
        return sha256(repr([self.scoring, self.base]).encode()).hexdigest()

    def keys(self, split: str) -> tuple[str, ...]:
        """Corpus keys of a split, in ascending order of names; a corpus with several names once."""
        return tuple(dict.fromkeys(self.corpora[split][name] for name in sorted(self.corpora[split])))

    def sizes(self, split: str) -> dict[str, int]:
        """Windows by corpus key of a split."""
        return dict.fromkeys(self.keys(split), self.windows(split))

    def windows(self, split: str) -> int:
        """Windows of each corpus of a split."""
        return int(self.settings[f"evaluation.{_WINDOWS[split]}"])

    def identity_fields(self) -> dict[str, str]:
        """The fields whose change begins a new generation."""
        return {
            "base": self.base,
            **({"configuration": self.configuration} if self.configuration else {}),
            **{f"distributions.{name}": content for name, content in self.fine_tunes.items()},
            **_written(self.space),
            **{f"objective.weights.{name}": repr(weight) for name, weight in self.weights.items()},
            **{f"objective.protect.{name}": repr(allowance) for name, allowance in self.protect.items()},
            **({"objective.worst": repr(True)} if self.worst else {}),
            **({"objective.function": str(self.function)} if self.function else {}),
            **({"objective.unit": self.unit} if self.unit != NATS_PER_TOKEN else {}),
            **({"objective.pareto": _written_axes(self.pareto)} if self.pareto else {}),
            **{field: key for field, key in self._files().items() if field.startswith("general.")},
            **(self.groups.fields() if self.groups else {}),
        }

    def scoring_fields(self) -> dict[str, str]:
        """The fields that make scores comparable, whose change is refused."""
        distributions = {field: key for field, key in self._files().items() if field.startswith("distributions.")}
        return {**self.settings, **distributions}

    def _files(self) -> dict[str, str]:
        """Corpus keys by the study file's fields."""
        return {
            f"{'distributions' if name in self.fine_tunes else 'general'}.{name}.{_FIELDS[split]}": key
            for split, by_name in self.corpora.items()
            for name, key in by_name.items()
        }

    @classmethod
    def recall(cls, identity: Mapping[str, str], scoring: Mapping[str, str]) -> "StudyIdentity":
        """The study that `identity_fields` and `scoring_fields` were written of."""
        fine_tunes, weights = _under("distributions.", identity), _under("objective.weights.", identity)
        distributions, general = _under("distributions.", scoring), _under("general.", identity)
        return cls(
            base=identity["base"],
            fine_tunes=fine_tunes,
            space=_read_space(tuple(fine_tunes), identity),
            weights={name: float(weight) for name, weight in weights.items()},
            corpora={
                split: {
                    **{name: distributions[key] for name in fine_tunes if (key := f"{name}.{field}") in distributions},
                    **{name: general[f"{name}.{field}"] for name in _without(f".{field}", general)},
                }
                for split, field in _FIELDS.items()
            },
            settings={key: value for key, value in scoring.items() if not key.startswith("distributions.")},
            protect={name: float(nats) for name, nats in _under("objective.protect.", identity).items()},
            worst="objective.worst" in identity,
            function=ObjectiveFunction.parse(identity["objective.function"])
            if "objective.function" in identity
            else None,
            unit=identity.get("objective.unit", NATS_PER_TOKEN),
            pareto=_read_axes(identity["objective.pareto"]) if "objective.pareto" in identity else None,
            configuration=identity.get("configuration", ""),
            groups=GroupSettings.parse(identity),
        )


def _written(space: Space) -> dict[str, str]:
    """A space as identity fields, named as in the study file."""
    total = space.total if space.least is None else [space.least, space.total]
    families = [(family.name, family.lower, family.upper) for family in space.families]
    return {"simplex.total": repr(total)} | {
        f"simplex.bounds.{name}": repr(box) for name, *box in (*space.bounds, *families)
    }


def _read_space(names: tuple[str, ...], identity: Mapping[str, str]) -> Space:
    """The inverse of `_written`."""
    total = json.loads(identity["simplex.total"])
    least, most = total if isinstance(total, list) else (None, total)
    boxes = {name: json.loads(box) for name, box in _under("simplex.bounds.", identity).items()}
    families = (
        Family(name, tuple(step for step in names if step.startswith(f"{name}@")), *box)
        for name, box in boxes.items()
        if name not in names
    )
    return Space(
        names, most, least, tuple((name, *box) for name, box in boxes.items() if name in names), tuple(families)
    )


def _written_axes(axes: Axes) -> str:
    """Two axes as an identity field."""
    return json.dumps([[axis.name, dict(axis.weights)] for axis in axes])


def _read_axes(text: str) -> Axes:
    """The inverse of `_written_axes`."""
    (first, of_first), (second, of_second) = json.loads(text)
    return Axis(first, of_first), Axis(second, of_second)


def _under(prefix: str, fields: Mapping[str, str]) -> dict[str, str]:
    """The fields that begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}


def _without(suffix: str, fields: Iterable[str]) -> list[str]:
    """The fields that end with a suffix, without it."""
    return [field.removesuffix(suffix) for field in fields if field.endswith(suffix)]


def refuse_other_scoring(where: Path | None, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    """Raise InputError where a scoring field that both have has changed: scores would not compare."""
    others = dict([_VECTORS, _ROUNDING])
    old, new = others | dict(old), others | dict(new)
    changed = [field for field in new if field in old and old[field] != new[field]]
    if not changed:
        return
    # Settings are named before corpora, since a changed window changes every corpus.
    field = min(changed, key=lambda name: (name.startswith("distributions."), name))
    hashed = field.startswith(("distributions.", "tokenizer"))
    was = "another content" if hashed else repr(old[field])
    raise InputError(
        where,
        field,
        None if hashed else new[field],
        f"the study began with {was}, so its scores would not compare; restore it, or give the study another name",
    )


def refuse_other_space(where: Path, study: StudyIdentity, space: Space) -> None:
    """Raise InputError where a study file names other distributions or bounds than the study that has been run."""
    if space != study.space:
        mend = f"distributions or simplex have changed since the study was run; first: dem-opt run {where}"
        raise InputError(where, None, None, mend)


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The identity fields in which two studies differ, in words."""
    fields = sorted(field for field in old.keys() | new.keys() if old.get(field) != new.get(field))
    kinds = [(field, "new" if field not in old else "gone" if field not in new else "changed") for field in fields]
    return ", ".join(f"{field} is {kind}" if kind == "new" else f"{field} has {kind}" for field, kind in kinds)
