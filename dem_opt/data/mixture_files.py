"""Data mixtures in the formats of other programs.

**Olmix** (github.com/allenai/olmix, README, "Input format") reads two CSV files with a row for each trained model,
which are joined on a column `run` or `run_id`.  Beside that and an optional `name`, every column of `ratios.csv` is a
domain, whose rows sum to 1 within 0.01, and every column of `metrics.csv` a metric of which less is better.

**Megatron-Core** (`get_blend_from_list`) takes `--data-path WEIGHT PREFIX WEIGHT PREFIX ...`.  Its weights are shares
of samples of one length, so of tokens.

**datasets.interleave_datasets** takes probabilities of *rows*.  They are shares of tokens where all rows are of one
length.  Where the rows of distribution i have l_i tokens on average, its probability is

    p_i = (s_i / l_i) / sum_j (s_j / l_j)
"""

import csv
import io
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite
from pathlib import Path

from dem_opt.errors import InputError, nearest

IDS = ("run", "run_id")
"""Names of the column that joins the two files."""

NAME = "name"
"""Column with a label for people."""

RATIOS, METRICS = "ratios.csv", "metrics.csv"
"""Names of the two files in a folder."""

SUM_TOLERANCE = 0.01 + 1e-5
"""Largest distance from 1 at which Olmix accepts a sum of ratios: `numpy.allclose` with `atol=0.01`."""


@dataclass(frozen=True, kw_only=True)
class MixtureRun:
    """A row of Olmix's files: a model with its mixture and its measurements.

    Attributes:
        run: What joins the rows of both files.
        name: Label for people.
        shares: Shares of the tokens by domain, which sum to 1.
        metrics: Measurements by name; less is better.
    """

    run: str
    name: str
    shares: Mapping[str, float]
    metrics: Mapping[str, float]


def olmix_tables(runs: Sequence[MixtureRun]) -> dict[str, str]:
    """The text of both files by file name; numbers are written so that reading them gives the same floats."""
    tables = {}
    for file, values in ((RATIOS, [run.shares for run in runs]), (METRICS, [run.metrics for run in runs])):
        columns = list(dict.fromkeys(name for row in values for name in row))
        rows = [[run.run, run.name, *map(repr, row.values())] for run, row in zip(runs, values, strict=True)]
        assert all(list(row) == columns for row in values), "rows of one table have the same columns"
        tables[file] = _table([IDS[0], NAME, *columns], rows)
    return tables


def read_olmix(folder: Path, domains: Iterable[str]) -> list[MixtureRun]:
    """Read `ratios.csv` and `metrics.csv` of a folder, in the order of the ratios; runs in one file only are left out.

    Args:
        folder: Folder of both files.
        domains: Names that the columns of the ratios must have, in any order.

    Raises:
        InputError: A file is missing, its columns are others, a number is none, or a row does not sum to 1.
    """
    ratios, metrics = _read(folder / RATIOS), _read(folder / METRICS)
    names = list(domains)
    _check_domains(folder / RATIOS, ratios, names)
    runs = []
    for run, (label, row) in ratios.items():
        shares = {name: _number(folder / RATIOS, run, name, row[name]) for name in names}
        total = fsum(shares.values())
        if min(shares.values()) < 0 or abs(total - 1) > SUM_TOLERANCE:
            mend = f"sums to {total:g}; shares are at least 0 and sum to 1"
            raise InputError(folder / RATIOS, run, shares, mend)
        if run in metrics:
            values = {name: _number(folder / METRICS, run, name, value) for name, value in metrics[run][1].items()}
            runs.append(MixtureRun(run=run, name=label, shares=shares, metrics=values))
    if not runs:
        raise InputError(folder, None, None, f"{RATIOS} and {METRICS} have no run in common")
    return runs


def megatron_blend(shares: Mapping[str, float], prefixes: Mapping[str, str]) -> str:
    """The arguments of `--data-path`, quoted for a shell; distributions without a share are left out."""
    return " ".join(f"{share:.9g} {shlex.quote(prefixes[name])}" for name, share in shares.items() if share)


def row_probabilities(shares: Mapping[str, float], row_tokens: Mapping[str, float]) -> dict[str, float]:
    """Probabilities of rows with so many tokens on average, which give shares of tokens."""
    rates = {name: share / row_tokens[name] for name, share in shares.items()}
    total = fsum(rates.values())
    return {name: rate / total for name, rate in rates.items()}


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def _read(path: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Label and other columns of each row, by run."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(path, None, None, f"can't be read ({reason})") from None
    reader = csv.DictReader(lines)
    columns = reader.fieldnames or []
    key = next((column for column in IDS if column in columns), None)
    if key is None:
        mend = f"has no column `run` or `run_id`, as Olmix's files do; its columns: {', '.join(columns)}"
        raise InputError(path, None, None, mend)
    if len(set(columns)) < len(columns):
        raise InputError(path, None, None, f"has a column twice: {', '.join(columns)}")
    rows: dict[str, tuple[str, dict[str, str]]] = {}
    for row in reader:
        run = row.pop(key)
        if None in row or None in row.values():
            raise InputError(path, run, None, f"has not the {len(columns)} cells of the first line")
        if run in rows:
            raise InputError(path, key, run, "is there twice")
        label = row.pop(NAME, run)
        rows[run] = label, row
    return rows


def _check_domains(path: Path, rows: Mapping[str, tuple[str, Mapping[str, str]]], names: Sequence[str]) -> None:
    if not rows:
        raise InputError(path, None, None, "has no rows")
    columns = next(iter(rows.values()))[1].keys()
    for column in columns:
        if column not in names:
            raise InputError(path, column, None, f"is a column of no distribution; {nearest(column, names)}")
    for name in names:
        if name not in columns:
            raise InputError(path, name, None, f"is no column; there are {', '.join(columns)}")


def _number(path: Path, run: str, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise InputError(path, f"{run}, {column}", text, "must be a number")
    return value
