"""Stored models, and composites of them by content."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from dem_opt.grouping import Grouping
from dem_opt.simplex import UNIT, Coefficients

Terms = tuple[tuple[str, int], ...]
"""Content hashes of checkpoints with their coefficients in units of 1e-9, which sum to 1; sorted, without zeros."""


@dataclass(frozen=True)
class Composite:
    """A composite model by content: {content hash of a checkpoint: its coefficient in units of 1e-9}.

    The right-hand form of  Theta_D = (1 - sum w) Theta + sum_i w_i Theta_i : the base is one term among the
    others, zero terms are left out, and terms are sorted by content hash.  So the base is {Theta: 1}, a single
    fine-tune {Theta_i: 1}, and names and order of the distributions change nothing.

    Where groups of parameters have coefficients of their own, those with the same terms are one part, and the terms of
    most parameters are those of the composite: so names of groups change nothing, and groups that all have the same
    coefficients make the composite of these coefficients.

    Attributes:
        terms: Terms of all parameters that no part has.
        parts: Parameters in ascending order with their terms; in ascending order themselves.
    """

    terms: Terms
    parts: tuple[tuple[tuple[str, ...], Terms], ...] = ()

    @classmethod
    def of(cls, contents: Mapping[str, int]) -> "Composite":
        """The composite of units by content hash."""
        assert sum(contents.values()) == UNIT, f"a right-hand form sums to 1: {contents}"
        return cls(tuple(sorted((content, units) for content, units in contents.items() if units != 0)))

    @classmethod
    def edited(cls, base: str, fine_tunes: Mapping[str, str], coefficients: Coefficients) -> "Composite":
        """The composite of coefficients by distribution, from content hashes of the base and the fine-tunes by name."""
        contents = {base: coefficients.base_units}
        for name, units in coefficients.pairs:
            contents[fine_tunes[name]] = contents.get(fine_tunes[name], 0) + units
        return cls.of(contents)

    @classmethod
    def grouped(
        cls, base: str, fine_tunes: Mapping[str, str], grouping: Grouping, coefficients: Mapping[str, Coefficients]
    ) -> "Composite":
        """The composite of coefficients by group, then by distribution."""
        parameters: dict[Terms, list[str]] = {}
        for group, members in grouping.groups:
            terms = cls.edited(base, fine_tunes, coefficients[group]).terms
            parameters.setdefault(terms, []).extend(members)
        rest = min(parameters, key=lambda terms: (-len(parameters[terms]), terms))
        parts = ((tuple(sorted(members)), terms) for terms, members in parameters.items() if terms != rest)
        return cls(rest, tuple(sorted(parts)))

    @classmethod
    def single(cls, content: str) -> "Composite":
        """One checkpoint as it is."""
        return cls.of({content: UNIT})

    @property
    def is_single(self) -> bool:
        """True if the composite is one checkpoint as it is."""
        return len(self.contents) == 1

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """Content hashes of all checkpoints that it takes, in ascending order."""
        terms = (self.terms, *(terms for _, terms in self.parts))
        return tuple(sorted({content for row in terms for content, _ in row}))

    @cached_property
    def _terms_by_parameter(self) -> dict[str, Terms]:
        return {parameter: terms for parameters, terms in self.parts for parameter in parameters}

    def terms_of(self, parameter: str) -> Terms:
        """Terms of a parameter."""
        return self._terms_by_parameter.get(parameter, self.terms)

    @property
    def key(self) -> str:
        """Key in the ledger: SHA-256 of the terms, and of the parts where there are any."""
        return sha256(repr((self.terms, self.parts) if self.parts else self.terms).encode()).hexdigest()


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint or adapter folder and the hash of its content.

    Attributes:
        content: Hash of its tensors.
        base: For an adapter, the content of its base.
        field: Field of the study file that named the folder, for messages.
        configuration: Fields of its config.json that compute, as JSON, where composites take theirs from it.
        vocabulary: For a checkpoint with another number of tokens, the content of the base whose rows it gets.
        rounding: How composites of this base are rounded to its dtypes, "nearest" or "stochastic".
    """

    path: Path
    content: str
    base: str | None = None
    field: str = dataclass_field(default="checkpoint", compare=False)
    configuration: str = ""
    vocabulary: str | None = None
    rounding: str = "nearest"
