"""The cost of a fifth distribution once a study of four has been run, and of dropping one of five.

`python benchmarks/incremental.py FOLDER`

Makes the worlds of `landscapes` in FOLDER where they are missing.  In each of five cases (two bases, three lengths of
fine-tunes, three distributions that come last) a study of four distributions is run to its end, as the case's seed has
it; then a fifth is added to its file, with a corpus of its own, and it is run again.  Beside it a study of the five
runs over an empty ledger; then its fifth is taken out of its file, and it is run again.  Counted is what goes forward
through the model on the search split, the base included, in forward-equivalents (FE) of the study as it is then; regret
is above the best that was found of the same distributions, by a longer search too.  What is finished is not run again,
but for the studies that change.
"""

import argparse
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from landscapes import Landscape, Tune, make_landscape

from dem_opt.compute import InProcessCompute
from dem_opt.progress import NullProgress
from dem_opt.study import Study
from dem_opt.tracking import NullTracker

LEVELS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
TRIALS, LONG = 40, 60
FIVE = ("code", "math", "prose", "records", "shouted")
CASES = ((0, 50, 0, "shouted"), (1, 50, 1, "shouted"), (1, 120, 3, "shouted"), (0, 50, 0, "code"), (1, 50, 1, "math"))
"""Seed of the base, steps and seed of the fine-tunes, the distribution that comes last."""


class Telling(NullProgress):
    """Notes for people."""

    def note(self, message: str) -> None:
        """A line."""
        say(message)


def landscapes(number: int) -> tuple[Landscape, Landscape]:
    """Of four distributions, and of the same with the fifth."""
    base, steps, seed, added = CASES[number]
    tunes = {data: Tune(data, steps, seed) for data in FIVE if data != added}
    grown = tunes | {added: Tune(added, steps, seed)}
    return Landscape(f"grown-{number}", base, tunes), Landscape(f"grown-{number}", base, grown)


def measure(
    landscape: Landscape, folder: Path, storage: Path, seed: int, known: float = 0.0, trials: int = TRIALS
) -> tuple[list[float], list[float]]:
    """Forward-equivalents newly spent after each trial, and the best objective of a whole trial until then.

    known  the share of the base's forward pass that was measured before
    """
    study = make_landscape(
        landscape,
        folder,
        lambda line: None,
        storage=f"sqlite:///{storage}",
        search={"algorithm": "simplex-gp", "trials": trials, "seed": seed, "lookahead": 0, "patience": None},
    )
    done = Study.load(study, tracker=NullTracker(), compute=InProcessCompute(), progress=Telling())
    records = done.compare(["simplex-gp"]).summary.trials["simplex-gp"][:TRIALS]
    one_pass = len(landscape.tunes) * 16 * 128
    spent = 1 - known + np.cumsum([record.evaluation.forward_tokens for record in records]) / one_pass
    whole = [np.inf if trial.is_partial or trial.objective is None else trial.objective for trial in records]
    return spent.tolist(), np.minimum.accumulate(whole).tolist()


def copy(source: Path, target: Path) -> None:
    """A database with all that is committed, in the place of an earlier copy."""
    for path in target.parent.glob(f"{target.name}*"):
        path.unlink()
    with closing(sqlite3.connect(source)) as original, closing(sqlite3.connect(target)) as copy:
        original.backup(copy)


def until(spent: Sequence[float], best: Sequence[float], objective: float) -> float:
    """Forward-equivalents after which the best is at most so high; infinite where it never is."""
    return min(
        (cost for cost, value in zip(spent, best, strict=True) if value <= objective),
        default=np.inf,
    )


def say(text: str) -> None:
    """A line for people, at once."""
    print(text, flush=True)


def main() -> None:
    """Five cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder.resolve()
    torch.set_num_threads(1)
    began, ratios = perf_counter(), {(name, level): list[float]() for name in ("added", "dropped") for level in LEVELS}
    for number in range(len(CASES)):
        books = folder / "incremental" / str(number)
        books.mkdir(parents=True, exist_ok=True)
        before, after = landscapes(number)
        fresh = measure(after, folder, books / "fresh.db", number)
        long = measure(after, folder, books / "long.db", number + 100, trials=LONG)
        four = measure(before, folder, books / "four.db", number)
        copy(books / "four.db", books / "grown.db")
        grown = measure(after, folder, books / "grown.db", number, known=1 - 1 / len(after.tunes))
        copy(books / "fresh.db", books / "shrunk.db")
        shrunk = measure(before, folder, books / "shrunk.db", number, known=1)
        for name, changed, new, others in (("added", grown, fresh, [long]), ("dropped", shrunk, four, [])):
            reference = min(curve[1][-1] for curve in (changed, new, *others))
            lines = []
            for level in LEVELS:
                costs = [until(*curve, reference + level) for curve in (changed, new)]
                ratios[name, level].append(costs[0] / costs[1])
                lines.append(f"{level:g}: {costs[0]:.1f} / {costs[1]:.1f}")
            say(f"case {number}, {name}: FE, changed / fresh: {', '.join(lines)}; {perf_counter() - began:.0f} s")
    for (name, level), shares in ratios.items():
        middle, least, most = np.median(shares), min(shares), max(shares)
        say(f"{name}, regret {level:g}: {middle:.2f} of a fresh search's FE [{least:.2f}, {most:.2f}]")


if __name__ == "__main__":
    main()
