"""dem-opt: quickstart | check | train | run | compare | score | merge | export | report | dashboard."""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from dem_opt import __version__, terminal
from dem_opt.errors import EvaluationError, InputError

if TYPE_CHECKING:
    from dem_opt.study import Study

DONE, OTHER, MISTAKE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status: 0 done, 2 the user's mistake, 130 interrupted, 1 anything else."""
    given = _parser().parse_args(arguments)
    try:
        given.command(given)
    except InputError as error:
        terminal.complain(f"dem-opt: {error}")
        return MISTAKE
    except EvaluationError as error:
        terminal.complain(f"dem-opt: {error}")
        return OTHER
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        resume = shlex.join(["dem-opt", *(sys.argv[1:] if arguments is None else arguments)])
        terminal.complain(f"dem-opt: interrupted; every finished evaluation is kept. To go on: {resume}")
        return INTERRUPTED
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dem-opt", description="Finds the best distribution-edited model.")
    parser.add_argument("--version", action="version", version=f"dem-opt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=command)
        if name != "quickstart":
            sub.add_argument("study", type=Path, metavar="STUDY", help="the study file")
        return sub

    quickstart = add("quickstart", _quickstart, "make a small base, data and a study here, and do the whole main job")
    quickstart.add_argument("folder", type=Path, nargs="?", default=Path("quickstart"), metavar="DIR")
    quickstart.add_argument("--seed", type=int, default=0, help="seeds data, base, fine-tunes and search")
    add("check", _check, "read headers only: do the checkpoints fit together, is the data there")
    add("train", _train, "fine-tune the checkpoints that are missing, one for each distribution")
    add("run", _run, "optimize; run again, it goes on where it stopped")
    compare = add("compare", _compare, "run several algorithms over one ledger, and print one table")
    compare.add_argument("--algorithms", default="grid,random,simplex-gp", help="separated by commas")
    score = add("score", _score, "perplexities of one composite, or of any model, on the study's corpora")
    which = score.add_mutually_exclusive_group(required=True)
    which.add_argument("--weights", help="coefficients, such as code=.3,math=.7")
    which.add_argument("--model", type=Path, help="a model folder")
    merge = add("merge", _merge, "write the composite of given coefficients")
    merge.add_argument("--weights", required=True, help="coefficients, such as code=.3,math=.7")
    merge.add_argument("--out", type=Path, required=True, help="the folder to write")
    export = add("export", _export, "write the winner, prove it from disk, register it as champion")
    export.add_argument("--out", type=Path, required=True, help="the folder to write")
    report = add("report", _report, "write one offline HTML page")
    report.add_argument("--out", type=Path, help="the page to write (OUTPUT/report.html)")
    dashboard = add("dashboard", _dashboard, "serve Optuna Dashboard and MLflow for this study on loopback")
    dashboard.add_argument("--open", action="store_true", help="open both in a browser")
    for sub in (check_like for name, check_like in commands.choices.items() if name in ("run", "compare", "score", "report")):
        sub.add_argument("--json", action="store_true", help="print the answer as JSON")
    return parser
