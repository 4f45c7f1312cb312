"""What a study asks, by content: base, experts and corpora as hashes, and what guards their comparison."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256

from dem_opt.errors import InputError
from dem_opt.simplex import Coefficients, Space
from dem_opt.types import HELD_OUT, SEARCH, Composite

_BEFORE = ("evaluation.vectors", "exact")
"""What scores were of before there was another form of the vectors."""

_FIELDS = {SEARCH: "validation", HELD_OUT: "held_out"}
_WINDOWS = {SEARCH: "windows", HELD_OUT: "held_out"}


@dataclass(frozen=True)
class StudyIdentity:
    """A study with every path replaced by the hash of its content.

    base, experts  content hashes of the checkpoints
    space          the coefficient space
    weights        the objective's weights, by distribution or general corpus
    corpora        by split, then by distribution or general corpus: corpus keys
    settings       the evaluation's settings, as text by their name in the study file; `device` is cpu or cuda, `looks`
                   the parts of a corpus that are scored apart
    protect        the most nats per token above the base, by distribution or general corpus
    worst          whether the largest regret is minimized, and not the mean
    """

    base: str
    fine_tunes: Mapping[str, str]
    space: Space
    weights: Mapping[str, float]
    corpora: Mapping[str, Mapping[str, str]]
    settings: Mapping[str, str]
    protect: Mapping[str, float] = field(default_factory=dict)
    worst: bool = False

    def composite(self, coefficients: Coefficients) -> Composite:
        """The composite of coefficients, by content."""
        return Composite.edited(self.base, self.fine_tunes, coefficients)

    @property
    def scoring(self) -> str:
        """The ledger's scoring key: a hash of the settings that change a window's nats; windows hash themselves.

        Compressed vectors begin from the base, so there it is one of the settings.
        """
        fields = ("evaluation.dtype", "evaluation.batch", "looks", "device")
        settings = [(field, self.settings.get(field)) for field in fields]
        if self.vectors != "exact":
            settings += [("evaluation.vectors", self.vectors), ("base", self.base)]
        return sha256(repr(settings).encode()).hexdigest()

    @property
    def vectors(self) -> str:
        """The stored form of the vectors."""
        return self.settings.get(*_BEFORE)

    def exact(self) -> "StudyIdentity":
        """The same of vectors as they are."""
        return replace(self, settings={**self.settings, "evaluation.vectors": "exact"})

    @property
    def differentiation(self) -> str:
        """The ledger's key of gradients: of the scoring, and of the base, from which distribution vectors begin."""
        return sha256(repr([self.scoring, self.base]).encode()).hexdigest()

    def keys(self, split: str) -> tuple[str, ...]:
        """Corpus keys of a split, in ascending order of names; one that has several names once."""
        return tuple(dict.fromkeys(self.corpora[split][name] for name in sorted(self.corpora[split])))

    def sizes(self, split: str) -> dict[str, int]:
        """Windows by corpus key of a split."""
        return dict.fromkeys(self.keys(split), self.windows(split))

    def windows(self, split: str) -> int:
        """Windows of each corpus of a split."""
        return int(self.settings[f"evaluation.{_WINDOWS[split]}"])

    def asked(self) -> dict[str, str]:
        """What makes this question another than the last: a change begins a new generation."""
        return {
            "base": self.base,
            **{f"distributions.{name}": content for name, content in self.fine_tunes.items()},
            **_written(self.space),
            **{f"objective.weights.{name}": repr(weight) for name, weight in self.weights.items()},
            **{f"objective.protect.{name}": repr(allowance) for name, allowance in self.protect.items()},
            **({"objective.worst": repr(True)} if self.worst else {}),
            **{field: key for field, key in self._files().items() if field.startswith("general.")},
        }

    def scored(self) -> dict[str, str]:
        """What makes scores comparable: a change is refused."""
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
    def recall(cls, asked: Mapping[str, str], scored: Mapping[str, str]) -> "StudyIdentity":
        """The question that `asked` and `scored` describe."""
        fine_tunes, weights = _under("distributions.", asked), _under("objective.weights.", asked)
        distributions, general = _under("distributions.", scored), _under("general.", asked)
        return cls(
            base=asked["base"],
            fine_tunes=fine_tunes,
            space=_read_space(tuple(fine_tunes), asked),
            weights={name: float(weight) for name, weight in weights.items()},
            corpora={
                split: {
                    name: (distributions if name in fine_tunes else general)[f"{name}.{field}"]
                    for name in (*fine_tunes, *_without(f".{field}", general))
                }
                for split, field in _FIELDS.items()
            },
            settings={key: value for key, value in scored.items() if not key.startswith("distributions.")},
            protect={name: float(nats) for name, nats in _under("objective.protect.", asked).items()},
            worst="objective.worst" in asked,
        )


def _written(space: Space) -> dict[str, str]:
    """A space by the study file's fields."""
    total = space.total if space.least is None else [space.least, space.total]
    return {"simplex.total": repr(total)} | {f"simplex.bounds.{name}": repr(box) for name, *box in space.bounds}


def _read_space(names: tuple[str, ...], asked: Mapping[str, str]) -> Space:
    """The space that `_written` wrote."""
    total = json.loads(asked["simplex.total"])
    least, most = total if isinstance(total, list) else (None, total)
    boxes = tuple((name, *json.loads(box)) for name, box in _under("simplex.bounds.", asked).items())
    return Space(names, most, least, boxes)


def _under(prefix: str, fields: Mapping[str, str]) -> dict[str, str]:
    """Those fields that begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}


def _without(suffix: str, fields: Iterable[str]) -> list[str]:
    """Those fields that end with a suffix, without it."""
    return [field.removesuffix(suffix) for field in fields if field.endswith(suffix)]


def refuse_other_scoring(where: object, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    """Raise InputError where a setting or a corpus that both know has changed: scores would not compare.

    Settings are named before corpora, since a changed window changes every corpus.
    """
    old = dict([_BEFORE]) | dict(old)
    changed = [field for field in new if field in old and old[field] != new[field]]
    if not changed:
        return
    field = min(changed, key=lambda name: (name.startswith("distributions."), name))
    hashed = field.startswith(("distributions.", "tokenizer"))
    was = "another content" if hashed else repr(old[field])
    raise InputError(
        where,
        field,
        None if hashed else new[field],
        f"the study was begun with {was}, so its scores would not compare; restore it, or give the study another name",
    )


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The fields in which two questions differ, for people."""
    fields = sorted(field for field in old.keys() | new.keys() if old.get(field) != new.get(field))
    kinds = [(field, "new" if field not in old else "gone" if field not in new else "changed") for field in fields]
    return ", ".join(f"{field} is {kind}" if kind == "new" else f"{field} has {kind}" for field, kind in kinds)
