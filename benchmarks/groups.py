"""Coefficients by group of parameters against one simplex: `python benchmarks/groups.py FOLDER STUDY.yaml...`.

For each study, the global optimum is searched, then coefficients by layer and by block of layers, with a penalty that
folds of the search documents choose, and controls: the unshrunk optimum, a random grouping with as many groups as there
are blocks, one simplex with a sum of 0 to 2, and blocks over placebos of the vectors: random ones of equal norm for
each tensor, and the vectors with permuted layers.  All variants of a study share one database in FOLDER, so none of
them measures a composite again; what is finished is answered from there.

Printed is the gain over the global optimum on both splits, in the objective's unit, held out with a 95% interval over
documents, and in the part of what the global optimum gains over the uniform average; the gain that folds expected; the
forward-equivalents beyond the global search.  A placebo's gain is over the global optimum of the placebo.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dem_opt.analysis.bootstrap import difference
from dem_opt.analysis.sampling import documents_of
from dem_opt.checkpoints.parameter_groups import parameter_groups
from dem_opt.compute import InProcessCompute
from dem_opt.evaluation.objective import Objective
from dem_opt.planning.inputs import check_headers, load_inputs
from dem_opt.progress import NullProgress
from dem_opt.storage.engine import connect
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.study import Study
from dem_opt.tracking import NullTracker
from dem_opt.types import HELD_OUT, SEARCH, Score, Summary
from dem_opt.workflows.placebo import placebos_of

PATHS = ("path", "run", "validation", "held_out", "train", "checkpoint", "adapter", "base", "include")
"""Keys of a study file whose texts are paths, relative to the file."""

PLACEBOS = {"blocks, random vectors": "random", "blocks, permuted layers": "permuted"}


@dataclass(frozen=True)
class Row:
    """A variant of a study.

    Attributes:
        groups: Groups of parameters.
        search: Gain over the global optimum on the search split.
        held_out: The same held out, with its interval.
        share: Of that the part in the global optimum's gain over the uniform average.
        expected: Gain on the fold that did not choose; None without folds.
        shrink: The penalty that was chosen; None for the global coefficients.
        forwards: Forward-equivalents beyond the global search.
    """

    study: str
    variant: str
    groups: int
    search: float
    held_out: tuple[float, float, float]
    share: float
    expected: float | None
    shrink: float | None
    forwards: float


class Telling(NullProgress):
    """Notes for people."""

    def note(self, message: str) -> None:
        """A line, at once."""
        print(f"  {message}", flush=True)


def variants(study: Path, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sections of the study file by variant."""
    config = Study.load(study).config
    architecture = check_headers(config, study).architecture
    blocks = parameter_groups("blocks", architecture)
    assert blocks is not None
    yield "layers", {"coefficients": {"groups": "layers"}}
    yield "blocks", {"coefficients": {"groups": "blocks"}}
    yield "blocks, unshrunk", {"coefficients": {"groups": "blocks", "shrink": "none"}}
    names = list(architecture.parameters)
    order = np.random.default_rng(0).permutation(len(names))
    parts = np.array_split(order, len(blocks))
    yield (
        "random groups",
        {"coefficients": {"groups": {f"part-{n}": [names[k] for k in part] for n, part in enumerate(parts)}}},
    )
    yield "one simplex, sum 0 to 2", {"simplex": {"total": [0.0, 2.0]}}
    inputs = load_inputs(config, study, worker=False)
    for variant, kind in PLACEBOS.items():
        distributions = yaml.safe_load(study.read_text())["distributions"]
        for name, placebo in placebos_of(inputs, kind).items():
            out = folder / "placebos" / f"{config.name}-{kind}" / name
            placebo.write(out)
            distributions[name] = {**distributions[name], config.distributions[name].fine_tune[0]: str(out)}
        yield variant, {"distributions": distributions, "coefficients": {"groups": "blocks"}}


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


def measure(study: Path, folder: Path) -> Iterator[Row]:
    """Rows of all variants of a study; the first variant finds the global optimum that others compare with."""
    reference: Summary | None = None
    for variant, sections in variants(study, folder):
        print(f"{study.parent.name}/{study.name}: {variant}", flush=True)
        summary, documents = run(write_variant(study, folder, variant, sections))
        reference = reference or summary
        own = summary if variant in PLACEBOS else reference
        yield compare(f"{study.parent.name}/{study.stem}", variant, summary, own, documents)


def compare(study: str, variant: str, summary: Summary, reference: Summary, documents: Mapping[str, Any]) -> Row:
    """The winner of a variant beside the global optimum of the reference."""
    objective = Objective(summary.weights, unit=summary.unit)
    best, winner = reference.global_winner, summary.winner
    gap = difference(best.scores[HELD_OUT], winner.scores[HELD_OUT], objective, documents)
    uniform: Mapping[str, Score] = next(row for row in reference.results if row.role == "uniform").scores[HELD_OUT]
    groups = summary.groups
    return Row(
        study=study,
        variant=variant,
        groups=len(groups.coefficients) if groups else 1,
        search=best.objective[SEARCH] - winner.objective[SEARCH],
        held_out=(gap.mean, gap.low, gap.high),
        share=gap.mean / (objective(uniform) - best.objective[HELD_OUT]),
        expected=-groups.judged.other if groups and groups.judged else None,
        shrink=groups.shrink if groups and isfinite(groups.shrink) else None,
        forwards=groups.forwards if groups else winner.forwards - best.forwards,
    )


def line(row: Row) -> str:
    """A row as Markdown."""
    mean, low, high = row.held_out
    expected = "" if row.expected is None else f"{row.expected:+.4f}"
    shrink = "global" if row.groups > 1 and row.shrink is None else "" if row.shrink is None else f"{row.shrink:.2g}"
    return (
        f"| {row.study} | {row.variant} | {row.groups} | {row.search:+.4f} | {mean:+.4f} [{low:+.4f}, {high:+.4f}] | "
        f"{row.share:.0%} | {expected} | {shrink} | {row.forwards:.0f} |"
    )


def main() -> None:
    """Every study with every variant, as a table, and JSON last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("studies", type=Path, nargs="+")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for study in arguments.studies for row in measure(study.resolve(), folder)]
    print(
        "\n| study | coefficients | groups | search | held out [95%] | of (uniform - global) | folds | penalty | FE |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(map(line, rows)))
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
