"""Draw docs/images/pretrained.svg: loss against cost on the pretrained model, of merges and of models of mixed data.

    python docs/draw_pretrained.py [STUDIES]

STUDIES is the folder of pretrained.yaml and its companions, ./studies unless given, after `make pretrained`.  The
longer fine-tunes of pretrained-long.yaml are drawn too where they were run and compared with mixed data.  Costs are
floating-point operations of training, and of the search where there was one.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from dem_opt.study import Study
from dem_opt.types import HELD_OUT

PICTURE = Path(__file__).parent / "images/pretrained.svg"
LENGTHS = ("pretrained", "pretrained-long")
"""Studies by the length of their fine-tunes; NAME-sums lets the sum of coefficients vary."""

UNIFORM, SIMPLEX, SUMS = "uniform average", "best merge, sum of 1", "best merge, any sum"
MIXED = "one model trained on equal parts"
LINES = {MIXED: ("#4269d0", "s"), UNIFORM: ("#9498a0", "^"), SIMPLEX: ("#d1603d", "o"), SUMS: ("#a463f2", "D")}
"""Colour and marker of a method."""

Point = tuple[float, float]
"""Cost, and held-out loss in nats per token."""


def points_of(folder: Path, name: str) -> tuple[dict[str, list[Point]], float]:
    """Points of one length of fine-tunes by method, and the base's loss."""
    study, sums = (Study.load(folder / f"{each}.yaml") for each in (name, f"{name}-sums"))
    comparison = json.loads((study.config.output / "mixing.json").read_text(encoding="utf-8"))
    summary = study.summary()
    loss = {row.role: row.objective[HELD_OUT] for row in summary.results if HELD_OUT in row.objective}
    training = comparison["edited"]["training"]["training_flops"]
    whole = training + comparison["edited"]["search"]["forward_flops"]
    points: dict[str, list[Point]] = {
        UNIFORM: [(training, loss["uniform"])],
        SIMPLEX: [(whole, summary.winner.objective[HELD_OUT])],
        MIXED: [
            (mixture["cost"]["training_flops"], mixture["objective"][HELD_OUT])
            for mixture in comparison["mixed"]
            if len(set(mixture["shares"].values())) == 1
        ],
    }
    any_sum = sums.summary().winner.objective[HELD_OUT]
    if any_sum < points[SIMPLEX][0][1]:  # else its search ended before it had found what a sum of 1 gives
        points[SUMS] = [(whole, any_sum)]
    return points, loss["base"]


def main() -> None:
    """Read the studies and draw."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "studies")
    points: dict[str, set[Point]] = defaultdict(set)
    base = 0.0
    for name in LENGTHS:
        if not (Study.load(folder / f"{name}.yaml").config.output / "mixing.json").is_file():
            continue
        found, base = points_of(folder, name)
        for method, those in found.items():
            points[method].update(those)
    mpl.rcParams.update({"svg.hashsalt": "dem_opt", "font.family": "sans-serif", "svg.fonttype": "none"})
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(base, color="#6e7781", linewidth=1, linestyle=":")
    axes.annotate("base", (1.0, base), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#6e7781")
    for method, (color, marker) in LINES.items():
        costs, losses = zip(*sorted(points[method]), strict=True)
        axes.plot(costs, losses, color=color, marker=marker, label=method)
    axes.set_xscale("log")
    axes.set_xlabel("floating-point operations of training and search (log scale)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.94))
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
