"""What a run of a study returns."""

from dataclasses import dataclass

from dem_opt.types import ResultRow, Summary


@dataclass(frozen=True)
class StudyResult:
    """The results of a study.

    Attributes:
        summary: Everything that tables, figures and the report are made from.
    """

    summary: Summary

    @property
    def winner(self) -> ResultRow:
        """The best composite of the search split."""
        return self.summary.winner
