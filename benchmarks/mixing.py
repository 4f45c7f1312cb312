"""When merging keeps up with mixing: `python benchmarks/mixing.py FOLDER`.

Bases of the quickstart's shape, which have learnt for 240, 960 and 3,840 steps from seven times its text, are
fine-tuned on the four distributions with two learning rates.  For each, Bayesian optimization finds the best composite,
and models are trained on mixtures of the same data: equal parts, and twice as much of one as of each other.  They get
as many tokens as one fine-tune, and as all four together.  Printed are means over the four distributions on the
held-out split (nats per token), and the composite minus the best mixture of each budget, which is chosen on the search
split: below 0 where merging is ahead.  What is finished in FOLDER is not made again.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from dem_opt.compute import InProcessCompute
from dem_opt.progress import NullProgress
from dem_opt.study import Study
from dem_opt.types import HELD_OUT
from dem_opt.workflows.quickstart import DISTRIBUTIONS, QUICKSTART, make_assets

STEPS = (240, 960, 3840)
RATES = (1e-3, 3e-4)
TEXT = replace(QUICKSTART, characters=(3_000_000, 60_000, 90_000), base_characters=7 * QUICKSTART.base_characters)
AHEAD = ("math", "records")
"""Distributions that have their double share in a mixture, each in one."""


@dataclass(frozen=True)
class Found:
    """A case: the base's steps and the fine-tunes' learning rate; means on the held-out split in nats per token."""

    steps: int
    rate: float
    base: float
    composite: float
    mixtures: dict[str, float]


class Telling(NullProgress):
    """Notes for people."""

    def note(self, message: str) -> None:
        """A line, at once."""
        print(f"  {message}", flush=True)


def make_study(folder: Path, steps: int, rate: float) -> Path:
    """A study file beside a base of so many steps, which is made where it is missing."""
    world = folder / f"base-{steps}"
    make_assets(world, 0, Telling(), replace(TEXT, base_steps=steps))
    equal = dict.fromkeys(DISTRIBUTIONS, 1 / len(DISTRIBUTIONS))
    study = {
        "name": f"rate-{rate:g}",
        "base": "models/base",
        "distributions": {
            name: {
                "checkpoint": f"models/{name}-{rate:g}",
                "train": f"data/{name}.train.jsonl",
                "validation": f"data/{name}.val.jsonl",
                "held_out": f"data/{name}.held_out.jsonl",
            }
            for name in DISTRIBUTIONS
        },
        "evaluation": {"window": TEXT.window, "windows": TEXT.windows, "held_out": TEXT.held_out_windows, "seed": 0},
        "search": {"algorithm": "simplex-gp", "trials": TEXT.trials, "seed": 0},
        "fine_tuning": {"steps": TEXT.fine_tuning_steps, "learning_rate": rate, "batch_size": TEXT.batch_size},
        "data_mixing": {
            "mixtures": [equal, *({name: 0.4 if name == doubled else 0.2 for name in equal} for doubled in AHEAD)]
        },
    }
    path = world / f"rate-{rate:g}.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def measure(folder: Path, steps: int, rate: float) -> Found:
    """Train, search, mix."""
    study = Study.load(make_study(folder, steps, rate), compute=InProcessCompute(), progress=Telling())
    study.train()
    study.run()
    mixing = study.mix("study")
    return Found(
        steps,
        rate,
        mixing.base.objective[HELD_OUT],
        mixing.edited.objective[HELD_OUT],
        {mixture.budget: mixing.best(mixture.budget).objective[HELD_OUT] for mixture in mixing.against},
    )


def main() -> None:
    """Every base with every learning rate, as a table, and JSON last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    arguments = parser.parse_args()
    rows = []
    for steps in arguments.steps:
        for rate in RATES:
            print(f"a base of {steps} steps, fine-tuned with {rate:g}", flush=True)
            rows.append(measure(arguments.folder.resolve(), steps, rate))
    print("\n| base's steps | learning rate | base | composite | tokens of one | minus it | tokens of all | minus it |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        against = " | ".join(
            f"{nll:.4f} | {row.composite - nll:+.4f}" for nll in (row.mixtures["one"], row.mixtures["all"])
        )
        print(f"| {row.steps} | {row.rate:g} | {row.base:.4f} | {row.composite:.4f} | {against} |")
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
