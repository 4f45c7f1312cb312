"""`dem-opt quickstart`: make a small study, then run on it the commands that any user would."""

import shlex
from argparse import Namespace
from time import perf_counter

from dem_opt.cli.console import Terminal


def quickstart(arguments: Namespace, terminal: Terminal) -> None:
    """Make the files of a study and run all of it."""
    from dem_opt.cli.parser import parser
    from dem_opt.compute import RayCompute
    from dem_opt.config import load
    from dem_opt.workflows.quickstart import make_assets

    began = perf_counter()
    seconds: dict[str, float] = {}
    with terminal.progress() as progress:
        path = make_assets(arguments.folder, arguments.seed, progress)
    if arguments.files:
        return
    seconds["data, tokenizer and base"] = perf_counter() - began
    best = arguments.folder / "best"
    commands = (["train"], ["run"], ["compare", "--algorithms", "grid"], ["export", "--out", str(best)], ["report"])
    with RayCompute(load(path).compute):
        for words in commands:
            terminal.line(f"\n$ {shlex.join(['dem-opt', *words, str(path)])}")
            started = perf_counter()
            parsed = parser().parse_args([*words, str(path)])
            parsed.command(parsed, terminal)
            seconds[words[0]] = perf_counter() - started
    rows = [(part, f"{spent:.0f}") for part, spent in [*seconds.items(), ("in all", perf_counter() - began)]]
    terminal.table("Where the time went", ("part", "seconds"), rows, strong=len(rows) - 1)
    terminal.line(f"Look at it:            dem-opt dashboard {path}")
    terminal.line(f"Read it:               {load(path).output / 'report.html'}")
    terminal.line(f"Use the winner:        AutoModelForCausalLM.from_pretrained({str(best)!r})")
