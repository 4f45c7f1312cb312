"""What people and programs are told of the method held against others: data mixing, tasks."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dem_opt import terminal
from dem_opt.errors import InputError

if TYPE_CHECKING:
    from dem_opt.costs import Mixing


def of_mixing(found: "Mixing") -> dict[str, Any]:
    """Merging against mixing as plain data, with its units."""
    units = {
        "objective, nll": "nats per token",
        "tokens": "tokens through a model, padding included",
        "flops": "floating-point operations: 2 P T forward, 6 P T for training all parameters",
        "ratio, equal_ratio": "floating-point operations of the mixtures over those of the fine-tunes and the search",
    }
    return asdict(found) | {"against": [asdict(one) for one in found.against], "units": units}


def mix(given: Namespace) -> None:
    """`dem-opt compare --data-mixing GRID`: the winner against models trained on mixtures."""
    from dem_opt.study import Study

    if given.algorithms is not None or given.seeds is not None:
        mend = "holds what was found against mixtures; leave --algorithms and --seeds out"
        raise InputError(None, "--data-mixing", given.data_mixing, mend)
    with terminal.Progressing(quiet=given.json) as watching:
        study = Study.load(given.study, watching)
        found = study.mix(given.data_mixing)
    tell_mixing(found, study.config.output, given.json)


def tell_mixing(found: "Mixing", folder: Path, as_json: bool) -> None:
    """Write the comparison as a page and for programs, then tell it."""
    from dashboards.costs import BUDGETS, curve_table, quality_table, render_mixing, verdicts
    from dashboards.report import write

    page, data = folder / "mixing.html", folder / "mixing.json"
    write(render_mixing(found), page, "comparison")
    write(terminal.as_json(of_mixing(found)), data, "comparison")
    if as_json:
        terminal.say_json(of_mixing(found))
        return
    made = quality_table(found)
    terminal.table("Cost, and NLL in nats per token; by corpus held out", made.headers, made.rows, strong=0)
    for one in found.against:
        made = curve_table(found, one)
        title = f"What k of {one.mixtures} mixtures are expected to give, {BUDGETS[one.budget]}, held out"
        terminal.table(title, made.headers, made.rows)
    for line in verdicts(found):
        terminal.say(line)
    terminal.say(f"Written: {page} and {data}")
