"""Groups of a model's parameters, and coefficients for each group.

A group p has coefficients w_p of its own:  Theta_D,p = Theta_p + sum_i w_p,i (Theta_i,p - Theta_p) .  They are the
global coefficients plus the group's deviation, and a point of the same space.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from dem_opt.simplex import UNIT, Coefficients


@dataclass(frozen=True)
class Grouping:
    """A partition of a model's parameters into named groups.

    Attributes:
        groups: Names of groups with the parameters of each, in the order of the model.
    """

    groups: tuple[tuple[str, tuple[str, ...]], ...]

    def __post_init__(self) -> None:
        parameters = [parameter for _, members in self.groups for parameter in members]
        assert self.groups and all(members for _, members in self.groups), "a group has parameters"
        assert len(set(parameters)) == len(parameters), "a parameter is in one group"
        assert len(set(self.names)) == len(self.groups), "a group has a name of its own"

    @classmethod
    def of(cls, group_of: Mapping[str, str]) -> "Grouping":
        """The grouping of group names by parameter."""
        groups: dict[str, list[str]] = {}
        for parameter, name in group_of.items():
            groups.setdefault(name, []).append(parameter)
        return cls(tuple((name, tuple(members)) for name, members in groups.items()))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups."""
        return tuple(name for name, _ in self.groups)

    @cached_property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        """Parameters by group."""
        return dict(self.groups)

    def __len__(self) -> int:
        return len(self.groups)


@dataclass(frozen=True, repr=False)
class GroupedCoefficients(Mapping[str, Coefficients]):
    """Coefficients of the distribution vectors by group.

    Attributes:
        rows: Names of groups with their coefficients, in the order of the grouping.
    """

    rows: tuple[tuple[str, Coefficients], ...]

    @classmethod
    def of(cls, names: Sequence[str], coefficients: Sequence[Coefficients]) -> "GroupedCoefficients":
        """Coefficients of groups in their order."""
        return cls(tuple(zip(names, coefficients, strict=True)))

    @cached_property
    def _by_group(self) -> dict[str, Coefficients]:
        return dict(self.rows)

    def __getitem__(self, group: str) -> Coefficients:
        return self._by_group[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_group)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def weights(self) -> dict[str, dict[str, float]]:
        """The coefficients as floats by group, then by distribution, in dictionaries."""
        return {group: coefficients.weights for group, coefficients in self.rows}

    @property
    def mean(self) -> Coefficients:
        """The mean over groups, which is a point of their space but for rounding."""
        names = [name for name, _ in self.rows[0][1].pairs]
        sums = [sum(row.units[name] for _, row in self.rows) for name in names]
        return Coefficients(tuple((name, round(total / len(self))) for name, total in zip(names, sums, strict=True)))

    @property
    def largest_deviation(self) -> float:
        """Largest difference of a coefficient between two groups."""
        names = [name for name, _ in self.rows[0][1].pairs]
        units = [[row.units[name] for _, row in self.rows] for name in names]
        return max(max(of_name) - min(of_name) for of_name in units) / UNIT

    def __repr__(self) -> str:
        return f"GroupedCoefficients({self.weights})"


_FIELDS = "coefficients.groups", "coefficients.shrink", "coefficients.forwards"


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """The groups of a study, and how their coefficients are searched.

    Attributes:
        grouping: The groups.
        shrink: Curvature of the penalty, in the objective's unit for each squared unit of a coefficient; 0 for the
            unshrunk optimum, None to choose it by folds.
        forwards: Forward-equivalents that the search may take.
    """

    grouping: Grouping
    shrink: float | None = None
    forwards: float = 40.0

    def fields(self) -> dict[str, str]:
        """The settings as identity fields of a study."""
        return dict(
            zip(_FIELDS, (json.dumps(self.grouping.groups), json.dumps(self.shrink), repr(self.forwards)), strict=True)
        )

    @classmethod
    def parse(cls, fields: Mapping[str, str]) -> "GroupSettings | None":
        """The inverse of `fields`; None for a study without groups."""
        groups, shrink, forwards = (fields.get(name) for name in _FIELDS)
        if groups is None or shrink is None or forwards is None:
            return None
        grouping = Grouping(tuple((name, tuple(members)) for name, members in json.loads(groups)))
        return cls(grouping=grouping, shrink=json.loads(shrink), forwards=float(forwards))


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A strength of the penalty, judged by folds of the search documents.

    Attributes:
        shrink: The strength; infinite for the global coefficients.
        own: Objective beside that of the global coefficients on the folds that chose, on average.
        other: The same on the folds that did not: an honest gain where it is below 0.
    """

    shrink: float
    own: float
    other: float


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """The result of a search of coefficients by group.

    Attributes:
        coefficients: By group; the global ones everywhere, where folds found no deviation that helps.
        centre: The global coefficients.
        shrink: Curvature of the penalty; infinite for the global coefficients.
        judgements: The strengths that folds have judged.
        forwards: Forward-equivalents of its trials.
        gradients: Its trials with gradients.
        seconds: Seconds of measuring them.
    """

    coefficients: GroupedCoefficients
    centre: Coefficients
    shrink: float
    judgements: tuple[Judgement, ...]
    forwards: float
    gradients: int
    seconds: float

    @property
    def is_global(self) -> bool:
        """True if all groups have the global coefficients."""
        return all(coefficients == self.centre for coefficients in self.coefficients.values())

    @property
    def judged(self) -> Judgement | None:
        """The strength that is best on the other fold; None where folds were not asked."""
        return min(self.judgements, key=lambda each: each.other, default=None)

    @property
    def optimism(self) -> float | None:
        """The part of the gain on the search split that the choice of coefficients on it has made.

        On folds it is the difference between those that did not choose and those that did; all documents, twice as
        many, have half of it (as Akaike's, it falls with their number).  None where folds were not asked.
        """
        return None if self.judged is None else (self.judged.other - self.judged.own) / 2


def same_search(left: Mapping[str, str], right: Mapping[str, str]) -> bool:
    """True if studies of these identity fields have the same search of global coefficients, whatever their groups."""
    names = (left.keys() | right.keys()) - set(_FIELDS)
    return all(left.get(name) == right.get(name) for name in names)
