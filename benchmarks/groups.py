"""Coefficients by group of parameters against one simplex: `python benchmarks/groups.py FOLDER STUDY...`.

A study is a study file, or one of the kinds of `group_studies`, which is made in FOLDER.  For each, the global optimum
is searched, then coefficients by layer, by block of layers and by tensor, with a penalty that folds of the search
documents choose, and controls: the unshrunk optimum, three random groupings with as many groups as there are blocks,
one simplex with a sum of 0 to 2, and blocks over placebos of the vectors: random ones of equal norm for each tensor,
and the vectors with permuted layers.  All variants of a study share one database in FOLDER, so none of them measures a
composite again; what is finished is answered from there.

Printed is the gain over the global optimum on both splits, in the objective's unit, held out with a 95% interval over
documents, and in the part of what the global optimum gains over the uniform average; the gain that folds expected, and
the optimism that they tell of the gain on the search split; the forward-equivalents beyond the global search.  A
placebo's gain is over the global optimum of the placebo.

A study is for coefficients by group where blocks gain at least 25% of (uniform - global), the interval is above 0, and
no control gains half as much; it is against them where they gain less than 10%, or a control gains as much.  Controls
are the mean of the random groupings, the sum of 0 to 2, and the placebos.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from group_studies import KINDS, make

from dem_opt.analysis.bootstrap import Difference, difference
from dem_opt.analysis.sampling import documents_of
from dem_opt.checkpoints.parameter_groups import parameter_groups
from dem_opt.compute import InProcessCompute
from dem_opt.evaluation.objective import Objective
from dem_opt.export.placebo import Kind
from dem_opt.planning.inputs import check_headers, load_inputs
from dem_opt.progress import NullProgress
from dem_opt.storage.engine import connect
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.study import Study
from dem_opt.tracking import NullTracker
from dem_opt.types import HELD_OUT, SEARCH, Summary
from dem_opt.workflows.placebo import placebos_of

PATHS = ("path", "run", "validation", "held_out", "train", "checkpoint", "adapter", "base", "include")
"""Keys of a study file whose texts are paths, relative to the file."""

BLOCKS: Literal["blocks"] = "blocks"

PLACEBOS: dict[str, Kind] = {"blocks, random vectors": "random", "blocks, permuted layers": "permuted"}

RANDOM = ("random groups", "random groups, second", "random groups, third")

SUM = "one simplex, sum 0 to 2"

CONTROLS = (RANDOM, (SUM,), *((name,) for name in PLACEBOS))
"""Controls, each of one or more variants whose mean counts."""

VARIANTS = (BLOCKS, "layers", "tensors", *RANDOM, "blocks, unshrunk", SUM, *PLACEBOS)

CONFIRMED, REFUTED = 0.25, 0.1
"""Gain of blocks in the part of (uniform - global) from which on a study is for them, and below which against them."""


HEADERS = (
    *("study", "coefficients", "groups", "search", "held out [95%]", "of (uniform - global)"),
    *("folds", "optimism", "penalty", "FE"),
)


@dataclass(frozen=True)
class Row:
    """A variant of a study.

    Attributes:
        groups: Groups of parameters.
        search: Gain over the global optimum on the search split.
        held_out: The same held out, with its interval.
        share: The same in the part of what the global optimum gains over the uniform average; None if that is nothing.
        expected: Gain on the fold that did not choose; None without folds.
        optimism: Part of the gain on the search split that the choice on it has made; None without folds.
        shrink: The penalty that was chosen; None for the global coefficients.
        forwards: Forward-equivalents beyond the global search.
    """

    study: str
    variant: str
    groups: int
    search: float
    held_out: tuple[float, float, float]
    share: float | None
    expected: float | None
    optimism: float | None
    shrink: float | None
    forwards: float


class Telling(NullProgress):
    """Notes for people."""

    def note(self, message: str) -> None:
        """A line, at once."""
        print(f"  {message}", flush=True)


def sections_of(variant: str, study: Path, folder: Path) -> dict[str, Any]:
    """Sections of the study file in a variant; placebos of the vectors are written into the folder."""
    config = Study.load(study).config
    architecture = check_headers(config, study).architecture
    names = list(architecture.parameters)
    if variant == SUM:
        return {"simplex": {"total": [0.0, 2.0]}}
    if variant in PLACEBOS:
        distributions = yaml.safe_load(study.read_text(encoding="utf-8"))["distributions"]
        inputs = load_inputs(config, study, worker=False)
        for name, placebo in placebos_of(inputs, PLACEBOS[variant]).items():
            out = folder / "placebos" / f"{config.name}-{PLACEBOS[variant]}" / name
            placebo.write(out)
            distributions[name] = {**distributions[name], config.distributions[name].fine_tune[0]: str(out)}
        return {"distributions": distributions, "coefficients": {"groups": BLOCKS}}
    if variant in RANDOM:
        blocks = parameter_groups(BLOCKS, architecture)
        assert blocks is not None
        order = np.random.default_rng(RANDOM.index(variant)).permutation(len(names))
        parts = np.array_split(order, len(blocks))
        return {"coefficients": {"groups": {f"part-{n}": [names[k] for k in part] for n, part in enumerate(parts)}}}
    groups, _, shrink = variant.partition(", ")
    return {"coefficients": {"groups": groups} | ({"shrink": "none"} if shrink else {})}


def absolute(value: Any, folder: Path, key: str = "") -> Any:
    """A study file's content with absolute paths."""
    if isinstance(value, dict):
        return {name: absolute(item, folder, name if name in PATHS else key) for name, item in value.items()}
    if isinstance(value, str) and key in PATHS and not Path(value).is_absolute():
        return str(folder / value) if (folder / value).exists() else value
    return value


def write_variant(study: Path, folder: Path, variant: str, sections: Mapping[str, Any]) -> Path:
    """Write the study file of a variant into the folder."""
    content = yaml.safe_load(study.read_text(encoding="utf-8"))
    for key in ("tracking", "output", "fine_tuning", "data_mixing", "evaluate"):
        content.pop(key, None)
    name = f"{content['name']}-{variant}".replace(",", "").replace(" ", "-")
    storage = {"storage": f"sqlite:///{content['name']}.db", "name": name}
    content = absolute(content | dict(sections), study.parent) | storage
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def run(path: Path) -> tuple[Summary, Mapping[str, Any]]:
    """Run a variant; its summary, and the documents of its held-out windows."""
    study = Study.load(path, tracker=NullTracker(), compute=InProcessCompute(), progress=Telling())
    summary = study.run().summary
    engine = connect(study.config.storage)
    ledger = Ledger(engine)
    row = ledger.study(study.config.name)
    assert row is not None
    documents = documents_of(ledger, StudyIdentity.recall(row.identity, row.scoring), HELD_OUT)
    engine.dispose()
    return summary, documents


def measure(study: Path, folder: Path, name: str, variants: Sequence[str] = VARIANTS) -> Iterator[Row]:
    """Rows of variants of a study; the first variant finds the global optimum that others compare with."""
    reference: Summary | None = None
    folder.mkdir(parents=True, exist_ok=True)
    for variant in variants:
        print(f"{name}: {variant}", flush=True)
        summary, documents = run(write_variant(study, folder, variant, sections_of(variant, study, folder)))
        reference = reference or summary
        own = summary if variant in PLACEBOS else reference
        gap, groups = gain(summary, own, documents), summary.groups
        yield Row(
            study=name,
            variant=variant,
            groups=len(groups.coefficients) if groups else 1,
            search=own.global_winner.objective[SEARCH] - summary.winner.objective[SEARCH],
            held_out=(gap.mean, gap.low, gap.high),
            share=gap.mean / gained if (gained := gain_of_search(reference)) > 0 else None,
            expected=-groups.judged.other if groups and groups.judged else None,
            optimism=groups.optimism if groups else None,
            shrink=groups.shrink if groups and isfinite(groups.shrink) else None,
            forwards=groups.forwards if groups else summary.winner.forwards - own.global_winner.forwards,
        )


def gain(summary: Summary, reference: Summary, documents: Mapping[str, Any]) -> Difference:
    """The winner's held-out gain over the global optimum of the reference."""
    objective = Objective(summary.weights, unit=summary.unit)
    return difference(reference.global_winner.scores[HELD_OUT], summary.winner.scores[HELD_OUT], objective, documents)


def gain_of_search(summary: Summary) -> float:
    """The global optimum's held-out gain over the uniform average."""
    uniform = next(row for row in summary.results if row.role == "uniform")
    return uniform.objective[HELD_OUT] - summary.global_winner.objective[HELD_OUT]


def line(row: Row) -> str:
    """A row as Markdown."""
    mean, low, high = row.held_out
    expected, optimism = ("" if gain is None else f"{gain:+.4f}" for gain in (row.expected, row.optimism))
    share = "" if row.share is None else f"{row.share:.0%}"
    shrink = "global" if row.groups > 1 and row.shrink is None else "" if row.shrink is None else f"{row.shrink:.2g}"
    return (
        f"| {row.study} | {row.variant} | {row.groups} | {row.search:+.4f} | {mean:+.4f} [{low:+.4f}, {high:+.4f}] | "
        f"{share} | {expected} | {optimism} | {shrink} | {row.forwards:.0f} |"
    )


def verdict(rows: Sequence[Row]) -> str:
    """Verdict of one study's rows: "for", "against" or "neither"."""
    by_variant = {row.variant: row for row in rows}
    blocks = by_variant[BLOCKS]
    gain, low, _ = blocks.held_out
    controls = [[by_variant[name].held_out[0] for name in names if name in by_variant] for names in CONTROLS]
    best_control = max((float(np.mean(gains)) for gains in controls if gains), default=-np.inf)
    if best_control >= gain or (blocks.share is not None and blocks.share < REFUTED):
        return "against"
    is_large = blocks.share is not None and blocks.share >= CONFIRMED
    return "for" if is_large and low > 0 and best_control < gain / 2 else "neither"


def main() -> None:
    """Every study with every variant, as a table, and JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("studies", nargs="+", help=f"study files, or of {', '.join(KINDS)}")
    parser.add_argument("--leave-out", nargs="*", default=[], choices=VARIANTS[1:], help="variants not to measure")
    parser.add_argument("--threads", type=int, default=1, help="threads of the worker (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    variants = [name for name in VARIANTS if name not in arguments.leave_out]
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    by_study = {}
    for study in arguments.studies:
        path = make(study, folder) if study in KINDS else Path(study).resolve()
        by_study[study] = list(measure(path, folder / "groups" / f"{path.parent.name}-{path.stem}", study, variants))
    print(f"\n| {' | '.join(HEADERS)} |")
    print("|---" * len(HEADERS) + "|")
    print("\n".join(line(row) for rows in by_study.values() for row in rows))
    for study, rows in by_study.items():
        print(f"{study}: {verdict(rows)}")
    print(json.dumps([asdict(row) for rows in by_study.values() for row in rows]))


if __name__ == "__main__":
    main()
