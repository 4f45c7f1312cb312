"""Real merge losses to search on: bases of a million parameters, their fine-tunes, and study files over them.

A *world* is a base of one seed with fine-tunes of several lengths and seeds, made once in a folder.  A *landscape* is
a study over some of a world's fine-tunes with an objective of its own.  Those of eight distributions have two
fine-tunes on the same data as others (near-duplicates), one on scrambled text (harmful) and one on a corpus that nobody
asks for; the last two have objective weight 0, so the optimum lies on a face.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from dem_opt.config import DataFile
from dem_opt.training.fine_tune import FineTuneJob, fine_tune
from dem_opt.workflows.quickstart import QUICKSTART, make_assets

PRETRAINED = Path(__file__).parents[1] / "studies" / "pretrained.yaml"
FOUR = ("code", "math", "prose", "records")


@dataclass(frozen=True)
class Tune:
    """A fine-tune: on which data, how many steps, in which order of windows, at which learning rate."""

    data: str
    steps: int
    seed: int
    learning_rate: float = QUICKSTART.fine_tuning_learning_rate

    @property
    def folder(self) -> str:
        """Its name among the world's models."""
        rate = "" if self.learning_rate == QUICKSTART.fine_tuning_learning_rate else f"-{self.learning_rate:g}"
        return f"{self.data}-{self.steps}-{self.seed}{rate}"


@dataclass(frozen=True)
class Landscape:
    """A study: fine-tunes by distribution, and the objective's weights where they are not equal."""

    name: str
    base_seed: int
    tunes: dict[str, Tune]
    weights: dict[str, float] = field(default_factory=dict)


def four(steps: int, seed: int, learning_rate: float = QUICKSTART.fine_tuning_learning_rate) -> dict[str, Tune]:
    """One fine-tune on each of the quickstart's distributions."""
    return {data: Tune(data, steps, seed, learning_rate) for data in FOUR}


def eight(steps: int, seed: int) -> dict[str, Tune]:
    """Those, two near-duplicates, a harmful one, and one on a corpus that nobody asks for."""
    return four(steps, seed) | {
        "math-again": Tune("math", steps, seed + 10),
        "prose-short": Tune("prose", steps // 2, seed),
        "scrambled": Tune("scrambled", steps, seed),
        "shouted": Tune("shouted", steps, seed),
    }


def sixteen(seed: int) -> dict[str, Tune]:
    """Four fine-tunes on each: other orders of the windows, half of the steps and more than twice as many."""
    variants = {"": (50, seed), "-again": (50, seed + 10), "-short": (25, seed + 1), "-long": (120, seed + 2)}
    return {data + name: Tune(data, *variant) for data in FOUR for name, variant in variants.items()}


UNASKED = {"scrambled": 0.0, "shouted": 0.0}
SIX = dict.fromkeys((*FOUR, "math-again", "prose-short"), 1.0) | UNASKED

TUNED_ON = (
    Landscape("tuned-4", 0, four(50, 0)),
    Landscape("tuned-8", 0, eight(50, 0), SIX),
)
"""Landscapes on which the search's settings were chosen."""

REPORTED = (
    Landscape("four-50", 1, four(50, 1)),
    Landscape("four-25", 1, four(25, 2)),
    Landscape("four-120-weighted", 1, four(120, 3), {"code": 1.0, "math": 0.2, "prose": 3.0, "records": 0.2}),
    Landscape("eight-50", 1, eight(50, 1), SIX),
    Landscape("eight-120", 1, eight(120, 3), SIX),
    Landscape("eight-50-weighted", 1, eight(50, 1), SIX | {"code": 3.0, "prose": 2.0, "records": 0.0, "math": 0.5}),
    Landscape("sixteen", 1, sixteen(1)),
)
"""Landscapes of the reported figures; they had no part in choosing settings."""


def make_landscape(landscape: Landscape, folder: Path, say: Callable[[str], None], **sections: object) -> Path:
    """The study file of a landscape, its world made where it is missing; `sections` go into the study file."""
    world = folder / f"base-{landscape.base_seed}"
    make_assets(world, landscape.base_seed)
    _write_unasked(world)
    for tune in landscape.tunes.values():
        _train(world, tune, say)
    study = {
        "name": landscape.name,
        "base": "models/base",
        "distributions": {name: _distribution(tune) for name, tune in landscape.tunes.items()},
        "objective": {"weights": landscape.weights} if landscape.weights else {},
        "evaluation": {"window": QUICKSTART.window, "windows": QUICKSTART.windows, "held_out": 16, "seed": 0},
        "storage": "sqlite:///runs/landscapes.db",
        **sections,
    }
    (world / "runs").mkdir(exist_ok=True)
    path = world / f"{landscape.name}.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def pretrained_landscape(made: Path, folder: Path, rounding: str = "nearest") -> Path:
    """A study file over the fine-tunes that `make pretrained` left in `made`; half the window, nothing protected.

    Args:
        made: That folder.
        folder: Where the study file, its database and its results are.
        rounding: Of composites to the base's bfloat16, "nearest" or "stochastic"; each has a folder of its own.
    """
    study = yaml.safe_load(PRETRAINED.read_text(encoding="utf-8"))
    distributions = {
        name: {key: str(made / Path(value).relative_to("../pretrained")) for key, value in files.items()}
        for name, files in study["distributions"].items()
    }
    evaluation = study["evaluation"] | {"window": study["evaluation"]["window"] // 2}
    landscape = {
        "name": "pretrained",
        "base": {"path": str(made / "models" / "base"), "rounding": rounding},
        "distributions": distributions,
        "evaluation": evaluation,
        "storage": "sqlite:///pretrained.db",
        "output": "runs/pretrained",
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pretrained.yaml"
    path.write_text(yaml.safe_dump(landscape, sort_keys=False), encoding="utf-8")
    return path


def _distribution(tune: Tune) -> dict[str, str]:
    return {
        "checkpoint": f"models/{tune.folder}",
        "validation": f"data/{tune.data}.val.jsonl",
        "held_out": f"data/{tune.data}.held_out.jsonl",
    }


def _train(world: Path, tune: Tune, say: Callable[[str], None]) -> None:
    out = world / "models" / tune.folder
    if out.exists():
        return
    say(f"fine-tuning {tune.folder}")
    data = DataFile(path=world / "data" / f"{tune.data}.train.jsonl")
    settings = {"window": QUICKSTART.window, "steps": tune.steps, "batch_size": QUICKSTART.batch_size}
    fine_tune(
        FineTuneJob(
            name=tune.folder,
            base=world / "models" / "base",
            train=data,
            out=out,
            learning_rate=tune.learning_rate,
            seed=tune.seed,
            **settings,
        )
    )


def _write_unasked(world: Path) -> None:
    """Prose with the words of each document in another order, and prose in capitals, split as the prose is."""
    for split in ("train", "val", "held_out"):
        if (world / "data" / f"shouted.{split}.jsonl").exists():
            continue
        lines = (world / "data" / f"prose.{split}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        changed = {"scrambled": _scrambled(texts, split), "shouted": [text.upper() for text in texts]}
        for name, written in changed.items():
            content = "".join(json.dumps({"text": text}) + "\n" for text in written)
            (world / "data" / f"{name}.{split}.jsonl").write_text(content, encoding="utf-8")


def _scrambled(texts: list[str], split: str) -> list[str]:
    rng = random.Random(f"scrambled {split}")
    return [" ".join(rng.sample(words, len(words))) for words in map(str.split, texts)]
