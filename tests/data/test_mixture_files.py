"""Laws of mixtures in the formats of other programs: round trips, shares of tokens, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, interleave_datasets

from dem_opt.data.mixture_files import (
    METRICS,
    RATIOS,
    MixtureRun,
    megatron_blend,
    olmix_tables,
    read_olmix,
    row_probabilities,
)
from dem_opt.errors import InputError

NAMES = ("code", "math", "prose")


def some_runs(count: int = 5) -> list[MixtureRun]:
    rng = np.random.default_rng(0)
    return [
        MixtureRun(
            run=f"r{number}",
            name=f'a, "b" {number}',
            shares=dict(zip(NAMES, rng.dirichlet(np.ones(3)).tolist(), strict=True)),
            metrics={f"nll.{name}": float(rng.exponential()) for name in NAMES},
        )
        for number in range(count)
    ]


def write(folder: Path, tables: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for file, text in tables.items():
        (folder / file).write_text(text, encoding="utf-8")
    return folder


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    runs = some_runs()
    read = read_olmix(write(tmp_path, olmix_tables(runs)), NAMES)
    assert read == runs
    assert olmix_tables(read) == {file: (tmp_path / file).read_text() for file in (RATIOS, METRICS)}


def test_files_as_olmix_documents_them_are_read(tmp_path: Path) -> None:
    """No `name`, `run_id` in one file, columns in another order, a run without metrics, a sum within 0.01."""
    folder = write(
        tmp_path,
        {
            RATIOS: "run_id,math,code,prose\na,0.5,0.3,0.2\nb,0.33,0.33,0.34\nc,0.33,0.33,0.33\n",
            METRICS: "run,arc_bpb\nc,1.5\na,1.25\n",
        },
    )
    a, c = read_olmix(folder, NAMES)
    assert (a.run, a.name, dict(a.shares), dict(a.metrics)) == (
        "a",
        "a",
        {"code": 0.3, "math": 0.5, "prose": 0.2},
        {"arc_bpb": 1.25},
    )
    assert (c.run, dict(c.metrics)) == ("c", {"arc_bpb": 1.5})


@pytest.mark.parametrize(
    ("file", "text", "field"),
    [
        (RATIOS, "id,code,math,prose\na,1,0,0\n", None),
        (RATIOS, "run,code,maths,prose\na,1,0,0\n", "maths"),
        (RATIOS, "run,code,math\na,1,0\n", "prose"),
        (RATIOS, "run,code,code,prose\na,1,0,0\n", None),
        (RATIOS, "run,code,math,prose\na,1,0\n", "a"),
        (RATIOS, "run,code,math,prose\na,1,0,0\na,1,0,0\n", "run"),
        (RATIOS, "run,code,math,prose\na,0.5,0.1,0.1\n", "a"),
        (RATIOS, "run,code,math,prose\na,1.5,-0.5,0\n", "a"),
        (RATIOS, "run,code,math,prose\na,much,0,0\n", "a, code"),
        (RATIOS, "run,code,math,prose\n", None),
        (RATIOS, "", None),
        (METRICS, "run,nll\nz,1\n", None),
        (METRICS, "run,nll\nr0,nan\n", "r0, nll"),
    ],
)
def test_other_tables_are_refused_in_one_line(tmp_path: Path, file: str, text: str, field: str | None) -> None:
    folder = write(tmp_path, olmix_tables(some_runs()) | {file: text})
    with pytest.raises(InputError) as refused:
        read_olmix(folder, NAMES)
    assert refused.value.field == field and str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        read_olmix(tmp_path, NAMES)
    assert refused.value.where == tmp_path / RATIOS


def test_a_blend_line_has_weights_and_prefixes_in_turn() -> None:
    shares = {"code": 0.25, "math": 0.75, "prose": 0.0}
    line = megatron_blend(shares, {"code": "data/my code", "math": "data/math", "prose": "data/prose"})
    assert line == "0.25 'data/my code' 0.75 data/math"


def test_rows_drawn_with_these_probabilities_have_the_shares_of_the_tokens() -> None:
    """Documents of 10, 20 and 40 tokens, interleaved by `datasets` itself."""
    shares, tokens = dict(zip(NAMES, (0.5, 0.3, 0.2), strict=True)), dict(zip(NAMES, (10, 20, 40), strict=True))
    probabilities = row_probabilities(shares, tokens)
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-12)
    rows = {name: Dataset.from_dict({"tokens": [tokens[name]] * 4000}) for name in NAMES}
    mixed = interleave_datasets(list(rows.values()), probabilities=list(probabilities.values()), seed=0)["tokens"]
    drawn = np.array([sum(size for size in mixed if size == tokens[name]) for name in NAMES]) / sum(mixed)
    assert drawn == pytest.approx(list(shares.values()), abs=0.02)
    equal = row_probabilities(shares, dict.fromkeys(NAMES, 7.0))
    assert equal == pytest.approx(shares)
