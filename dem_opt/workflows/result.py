"""The result of a study, readable in a terminal and in a notebook."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dem_opt.dashboards.fronts import winner_lines
from dem_opt.dashboards.words import (
    cost_line,
    group_lines,
    margin_text,
    objective_name,
    rounding_lines,
    sampled_note,
    total_lines,
)
from dem_opt.types import HELD_OUT, SEARCH, Margin, ResultRow, Summary

ABSENT = "-"
"""Shown for a value that was not measured."""

_HEADERS = ("composite", "search", "held-out", "behind the winner (95%)", "FE", "seconds")

_STYLE = """
.dem-opt-result { font: 13px/1.45 system-ui, sans-serif; max-width: 60em }
.dem-opt-result h4 { margin: 0 0 .2em; font-size: 15px }
.dem-opt-result p { margin: .2em 0 }
.dem-opt-result table { border-collapse: collapse; margin: .6em 0 }
.dem-opt-result th, .dem-opt-result td { padding: .2em .8em; text-align: right; font-variant-numeric: tabular-nums }
.dem-opt-result th:first-child, .dem-opt-result td:first-child { text-align: left }
.dem-opt-result thead th { border-bottom: 1px solid #8888; font-weight: 600; vertical-align: bottom }
.dem-opt-result tr.winner td { font-weight: 600; background: #D55E0022 }
.dem-opt-result .bars { display: grid; grid-template-columns: max-content 14em max-content; gap: .15em .7em;
  margin: .5em 0 }
.dem-opt-result .bar { background: #8883; align-self: center; height: .7em }
.dem-opt-result .bar span { display: block; background: #D55E00; height: 100% }
.dem-opt-result .note { opacity: .75 }
"""


@dataclass(frozen=True, repr=False)
class StudyResult:
    """The results of a study.

    Shown as a table: each composite's objective on both splits in its unit, how far it is behind the winner,
    the forward-equivalents (FE) and seconds that finding it took.

    Attributes:
        summary: Everything that tables, figures and the report are made from.
    """

    summary: Summary

    @property
    def winner(self) -> ResultRow:
        """The best composite of the search split."""
        return self.summary.winner

    def __repr__(self) -> str:
        rows = [_HEADERS, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADERS))]
        lines = ["  ".join(_pad(row, widths)).rstrip() for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        coefficients = ", ".join(f"{name} {weight:.3f}" for name, weight in self._coefficients().items())
        if self.winner.groups is not None:
            coefficients += f", and up to {self.winner.groups.largest_deviation:.3f} apart by group"
        return "\n".join(
            [
                self._title(),
                f"Winner: {self.winner.label}: {coefficients}",
                "",
                *lines,
                "",
                self._legend(),
                *filter(None, [*self._findings(), cost_line(self.summary)]),
                self._hints(),
            ]
        )

    def _repr_html_(self) -> str:
        header = "".join(f"<th>{escape(text)}</th>" for text in _HEADERS)
        body = "".join(
            ('<tr class="winner">' if row is self.winner else "<tr>")
            + "".join(f"<td>{escape(text)}</td>" for text in texts)
            + "</tr>"
            for row, texts in zip(self.summary.results, self._rows(), strict=True)
        )
        return (
            f'<div class="dem-opt-result"><style>{_STYLE}</style><h4>{escape(self._title())}</h4>'
            f"<p>Winner: <strong>{escape(self.winner.label)}</strong></p>{self._bars()}"
            f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
            f'<p class="note">{escape(self._legend())}</p>'
            + "".join(f"<p>{escape(line)}</p>" for line in self._findings())
            + f'<p class="note">{escape(cost_line(self.summary))}</p>'
            f'<p class="note">{escape(self._hints())}</p></div>'
        )

    def _findings(self) -> list[str]:
        """Return what front, groups, sum of the coefficients and rounding say, a line each."""
        summary = self.summary
        groups, totals = group_lines(summary), total_lines(summary)
        return [*winner_lines(summary.front), *groups, *totals, *rounding_lines(summary)]

    def _title(self) -> str:
        trials = sum(len(records) for records in self.summary.trials.values())
        runs = ", ".join(self.summary.trials) or "no search"
        return f"Study {self.summary.study}: {trials} trials of {runs}"

    def _coefficients(self) -> dict[str, float]:
        """Return the winner's coefficients by distribution, in the study file's order."""
        coefficients = self.winner.coefficients
        weights = {} if coefficients is None else coefficients.weights
        return {name: weights.get(name, 0.0) for name in self.summary.distributions}

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                row.label + (" *" if row is self.winner else ""),
                _number(row.objective.get(SEARCH)),
                _number(row.objective.get(HELD_OUT)),
                ABSENT if row is self.winner else _interval(self._margin(row)),
                f"{row.forwards:.1f}",
                f"{row.seconds:.1f}",
            )
            for row in self.summary.results
        ]

    def _margin(self, row: ResultRow) -> Margin | None:
        """Return the row's distance to the winner on the held-out split, on the search split until it is scored."""
        margins = {margin.split: margin for margin in self.summary.margins if margin.rival == row.label}
        return margins.get(HELD_OUT, margins.get(SEARCH))

    def _legend(self) -> str:
        return (
            f"search, held-out: {objective_name(self.summary)} in {self.summary.unit_words} on each split, lower is "
            "better; FE: forward-equivalents, full passes over the search split; *: the winner, chosen on the search "
            f"split. {sampled_note(self.summary)}."
        )

    def _hints(self) -> str:
        path = self.summary.facts.get("study file", "STUDY")
        return f"More: study.plot.simplex(), study.results(), study.trials(); dem-opt dashboard {path}"

    def _bars(self) -> str:
        coefficients = self._coefficients()
        largest = max(coefficients.values(), default=0.0) or 1.0
        bars = (
            f"<span>{escape(name)}</span>"
            f'<span class="bar"><span style="width: {100 * weight / largest:.1f}%"></span></span>'
            f"<span>{weight:.3f}</span>"
            for name, weight in coefficients.items()
        )
        return f'<div class="bars">{"".join(bars)}</div>'


def _pad(texts: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Left-align the first text, right-align the others."""
    first, *others = texts
    return [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def _interval(margin: Margin | None) -> str:
    return ABSENT if margin is None else margin_text(margin)
