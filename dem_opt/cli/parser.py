"""The command line's grammar: every command with its options, its help and an example."""

from argparse import SUPPRESS, Action, ArgumentError, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import shtab

from dem_opt import __version__
from dem_opt.cli import baselines, check, fronts, mixtures, models, new_study, optimize, quickstart, reports, studies
from dem_opt.cli.console import Terminal
from dem_opt.errors import InputError, nearest

_Help = partial(RawDescriptionHelpFormatter, max_help_position=22)
"""Keeps the line breaks of descriptions and examples."""

Command = Callable[[Namespace, Terminal], None]

SHELLS = ("bash", "zsh", "fish")

DESCRIPTION = """\
Find the best distribution-edited model: fine-tune a base model on each data
distribution, merge the fine-tunes, and search for the merging coefficients by
the loss of the merged model on validation data. The search trains nothing."""

EPILOG = """\
start here:
  dem-opt quickstart          a complete example on this machine, in minutes
  dem-opt init models data    write a study file from your folders
  dem-opt check study.yaml    what a study needs, before it runs
  dem-opt run study.yaml      find the coefficients

exit status:
  0    done
  1    a failure that is not your mistake
  2    a mistake in the command or the study file, named in one line
  130  interrupted"""


class Parser(ArgumentParser):
    """A parser whose errors are one line, and name the nearest command, option or choice."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parse; refuse an unknown option first, since argparse would complain of what is missing without it."""
        words = [] if args is None else list(args)
        # Options before the command are this parser's, those after it the command's.
        own = takewhile(lambda word: word.startswith("-"), words) if self._subparsers else words
        self._refuse_unknown_options(list(own))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Refuse a command line."""
        raise InputError(None, self._command, None, f"{message}; see {self.prog} --help")

    @property
    def _command(self) -> str | None:
        return self.prog.removeprefix("dem-opt").strip() or None

    def _refuse_unknown_options(self, words: Sequence[str]) -> None:
        options = self._option_string_actions  # argparse has no public list of a parser's options
        for word in words[: words.index("--") if "--" in words else None]:
            option = word.partition("=")[0]
            if option.startswith("--") and not any(known.startswith(option) for known in options):
                close = get_close_matches(option, options, n=1)
                hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
                raise InputError(None, self._command, None, f"no option {option}; {hint}")

    def _check_value(self, action: Action, value: object) -> None:  # argparse's only hook for a choice's message
        if action.choices is not None and value not in action.choices:
            raise ArgumentError(action, f"no such choice: {value!r}; {nearest(str(value), action.choices)}")


def parser() -> ArgumentParser:
    """The parser of `dem-opt`; it loads no heavy library."""
    return _parsers()[0]


def command_parsers() -> dict[str, ArgumentParser]:
    """The parser of each command by its name, in the order of the help."""
    return _parsers()[1]


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    top = Parser(prog="dem-opt", description=DESCRIPTION, epilog=EPILOG, formatter_class=_Help)
    top.add_argument("--version", action="version", version=f"dem-opt {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_preparation(commands)
    _add_search(commands)
    _add_models(commands)
    _add_results(commands)
    _add_database(commands)
    _add_completion(commands)
    return top, dict(commands.choices)


def _add(
    commands: Any,
    name: str,
    command: Command,
    *,
    summary: str,
    details: str = "",
    examples: str,
    study: bool = True,
    json: bool = True,
) -> ArgumentParser:
    """Add a command with the arguments that all commands share."""
    added: ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.{details and chr(10) * 2}{details}",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.splitlines()),
        formatter_class=_Help,
    )
    if study:
        _complete(added.add_argument("study", type=Path, metavar="STUDY", help="study file"), shtab.FILE)
    output = added.add_argument_group("output")
    if json:
        output.add_argument("--json", action="store_true", help="print the answer as JSON on standard output")
    output.add_argument("--quiet", action="store_true", help="print errors, and the answer of --json, but nothing else")
    log = output.add_argument("--log-file", type=Path, metavar="FILE", help="append progress, with times, to a file")
    _complete(log, shtab.FILE)
    added.set_defaults(command=command, **({} if json else {"json": False}))
    return added


def _complete(action: Action, kind: dict[str, Any]) -> Action:
    """Let shells complete the values of an option with files or directories."""
    action.complete = kind  # type: ignore[attr-defined]  # how shtab is told
    return action


def _add_preparation(commands: Any) -> None:
    added = _add(
        commands,
        "quickstart",
        quickstart.quickstart,
        summary="make a small base model, data and a study, and run all of it",
        details="Needs no network and no GPU. Runs the commands that you would run, and prints\neach of them.",
        examples="dem-opt quickstart\ndem-opt quickstart my-folder --files",
        study=False,
        json=False,
    )
    folder = added.add_argument(
        "folder", type=Path, nargs="?", default=Path("quickstart"), metavar="DIR", help="folder to fill (quickstart)"
    )
    _complete(folder, shtab.DIRECTORY)
    added.add_argument("--files", action="store_true", help="stop after data, tokenizer, base and study file")
    added.add_argument("--seed", type=int, default=0, help="seed of data, base, fine-tunes and search (0)")
    added = _add(
        commands,
        "init",
        new_study.init,
        summary="write a study file from folders of models and data",
        details=(
            "Finds the base, checkpoints, adapters and data files, and matches them by name:\n"
            "models/code or adapters/code with data/code.val.jsonl, for example. Overwrites\n"
            "nothing, and names what it did not use."
        ),
        examples="dem-opt init models data\ndem-opt init models adapters data --base models/llama --out study.yaml",
        study=False,
    )
    folders = added.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="folder to look into")
    _complete(folders, shtab.DIRECTORY)
    out = added.add_argument(
        "--out", type=Path, metavar="FILE", default=Path("study.yaml"), help="study file to write (study.yaml)"
    )
    _complete(out, shtab.FILE)
    _complete(added.add_argument("--base", type=Path, metavar="DIR", help="folder of the base"), shtab.DIRECTORY)
    added.add_argument("--name", metavar="NAME", help="name of the study (that of the file's folder)")
    checked = _add(
        commands,
        "check",
        check.check,
        summary="check a study's inputs, memory and time before it runs",
        details=(
            "Plans from the headers of checkpoints. Then reads each model once, to compare its forward\n"
            "pass with that of its vertex. Writes nothing but the cache."
        ),
        examples="dem-opt check study.yaml --overlap\ndem-opt check study.yaml --difference .002",
    )
    checked.add_argument(
        "--overlap",
        action="store_true",
        help="read all data too, and measure how much of the validation and held-out documents stands in the training "
        "data and in each other; kept in OUTPUT/overlap.json for the report",
    )
    checked.add_argument(
        "--difference",
        type=float,
        metavar="D",
        help="also tell how many windows detect D, in the objective's unit",
    )
    train = _add(
        commands,
        "train",
        models.train,
        summary="fine-tune the checkpoints that are missing, or train on a mixture",
        details=(
            "One for each distribution. Continues an interrupted training; leaves checkpoints\nmade elsewhere alone."
        ),
        examples=(
            "dem-opt train study.yaml\ndem-opt train study.yaml --mixture proposed\n"
            "dem-opt train study.yaml --mixture proposed --from composite"
        ),
    )
    _complete(mixtures.add_training_options(train), shtab.FILE)


def _add_search(commands: Any) -> None:
    run = _add(
        commands,
        "run",
        optimize.run,
        summary="find the best coefficients, or continue an earlier run",
        examples="dem-opt run study.yaml\ndem-opt run study.yaml --log-file run.log --json > results.json",
    )
    run.add_argument("--sync-only", action="store_true", help="upload missing trials to MLflow and exit")
    compare = _add(
        commands,
        "compare",
        optimize.compare,
        summary="compare search algorithms, data mixing, placebos, training or other weights",
        details=(
            "Algorithms share one ledger: a composite that one of them has measured costs the\n"
            "others nothing. Says first how many passes it takes; a grid of more points than\n"
            "search.grid_limit is refused."
        ),
        examples=(
            "dem-opt compare study.yaml --algorithms grid,simplex-gp --seeds 5\n"
            "dem-opt compare study.yaml --data-mixing 3\n"
            "dem-opt compare study.yaml --placebo\n"
            "dem-opt compare study.yaml --reweight code=2,math=1"
        ),
    )
    compare.add_argument("--algorithms", metavar="NAMES", help="separated by commas (grid,random,simplex-gp)")
    compare.add_argument("--seeds", type=int, metavar="N", help="runs of each algorithm, each with its own seed (1)")
    compare.add_argument(
        "--data-mixing",
        metavar="GRID",
        help="train a model on each mixture of the data and compare: `study` for the study file's mixtures, 3 for all "
        "multiples of a third",
    )
    compare.add_argument(
        "--placebo",
        action="store_true",
        help="repeat the search over random vectors of equal norm and over the vectors with permuted layers",
    )
    compare.add_argument(
        "--fine-tune-on-search",
        action="store_true",
        help="train the base and the uniform average on the search split, as a LoRA, at the cost of the search",
    )
    compare.add_argument(
        "--reweight",
        metavar="WEIGHTS",
        help="measure nothing: the best measured composite under other weights of the objective, such as code=2,math=1",
    )


def _add_models(commands: Any) -> None:
    score = _add(
        commands,
        "score",
        models.score,
        summary="score one composite, or any model, on the study's data",
        examples=(
            "dem-opt score study.yaml --coefficients code=.3,math=.7\ndem-opt score study.yaml --model path/to/model"
        ),
    )
    choice = score.add_mutually_exclusive_group(required=True)
    _add_coefficients(choice)
    _complete(choice.add_argument("--model", type=Path, metavar="DIR", help="folder of a model"), shtab.DIRECTORY)
    mix = _add(
        commands,
        "mix",
        mixtures.mix,
        summary="propose shares in which to mix the training data",
        details=(
            "From the fine-tunes' training curves, or from the losses of merges. Says how well\n"
            "that ranked mixtures that were trained. Trains nothing; writes the shares into\n"
            "OUTPUT/mixture, for `dem-opt train` and for other programs."
        ),
        examples=(
            "dem-opt mix study.yaml\ndem-opt mix study.yaml --by merges\n"
            "dem-opt mix study.yaml --tokens 20000000 --epochs 2 --kl .01\n"
            "dem-opt mix study.yaml --swarm olmix"
        ),
    )
    _complete(mixtures.add_mix_options(mix), shtab.DIRECTORY)
    evaluate = _add(
        commands,
        "evaluate",
        baselines.evaluate,
        summary="evaluate the best composites on the study's tasks",
        details=(
            "The base and the fine-tunes too, for comparison.\n"
            "Needs lm-evaluation-harness: pip install 'dem-opt[downstream]'."
        ),
        examples="dem-opt evaluate study.yaml\ndem-opt evaluate study.yaml --by hellaswag",
    )
    evaluate.add_argument("--by", metavar="TASK", help="rank by a task instead of the loss on the search split")
    merge = _add(
        commands,
        "merge",
        models.merge,
        summary="write the composite of given coefficients",
        examples="dem-opt merge study.yaml --coefficients code=.3,math=.7 --out merged",
    )
    _add_coefficients(merge, required=True)
    export = _add(
        commands,
        "export",
        models.export,
        summary="write the winner, verify it from disk, register it",
        examples=(
            "dem-opt export study.yaml --out best\ndem-opt export study.yaml --out best-16 --dtype bfloat16\n"
            "dem-opt export study.yaml --out best-lora --as-lora --rank 16"
        ),
    )
    for added in (merge, export):
        out = added.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to write")
        _complete(out, shtab.DIRECTORY)
        added.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype to write (the base's)")
        added.add_argument("--as-lora", action="store_true", help="write one PEFT LoRA of the base; ranks add up")
        added.add_argument("--rank", type=int, metavar="R", help="with --as-lora: largest rank, told with its cost")
    merge.add_argument("--overwrite", action="store_true", help="replace an earlier export that nobody has changed")


def _add_coefficients(added: Any, required: bool = False) -> None:
    added.add_argument(
        "--coefficients",
        metavar="NAME=NUMBER,...",
        help="coefficients by distribution, such as code=.3,math=.7, those left out being 0; or a JSON file with them, "
        "by group too",
        **({"required": True} if required else {}),
    )
    added.add_argument("--weights", action=_Renamed, dest=SUPPRESS, help=SUPPRESS)


class _Renamed(Action):
    """An option of earlier releases."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: object, option: object = None) -> NoReturn:
        """Name the new option."""
        raise InputError(None, str(option), values, "this option is now called --coefficients")


def _add_results(commands: Any) -> None:
    _add(
        commands,
        "show",
        studies.show,
        summary="print the winner, its margins and the results",
        details="From the study's database, in a second: no checkpoint is read, nothing is scored.",
        examples="dem-opt show study.yaml\ndem-opt show study.yaml --json",
    )
    pareto = _add(
        commands,
        "pareto",
        fronts.pareto,
        summary="print the front between two losses",
        details=(
            "The composites of which none is better in one loss without being worse in the other, with\n"
            "their hypervolume. From the study's database: no checkpoint is read, nothing is scored."
        ),
        examples=(
            "dem-opt pareto study.yaml --between code math\n"
            "dem-opt pareto study.yaml --between mean general --out front.html --figures figures"
        ),
    )
    pareto.add_argument(
        "--between",
        nargs=2,
        metavar=("A", "B"),
        help="two distributions or general corpora; `mean` is the weighted mean of the objective (objective.pareto)",
    )
    pareto.add_argument("--csv", action="store_true", help="print comma-separated values")
    page = pareto.add_argument(
        "--out", type=Path, metavar="FILE", help="also write figure and table as an offline page"
    )
    _complete(page, shtab.FILE)
    folder = pareto.add_argument(
        "--figures", type=Path, metavar="DIR", help="also write the figure as PNG and SVG into this folder"
    )
    _complete(folder, shtab.DIRECTORY)
    report = _add(
        commands,
        "report",
        reports.report,
        summary="write the results as one offline HTML page",
        examples=(
            "dem-opt report study.yaml\ndem-opt report study.yaml --out report.html --figures figures\n"
            "dem-opt report study.yaml --full"
        ),
    )
    report.add_argument(
        "--full",
        action="store_true",
        help="first score what the final table lacks: the best five on the held-out split, and the winner without "
        "each of its distributions",
    )
    _complete(
        report.add_argument("--out", type=Path, metavar="FILE", help="page to write (OUTPUT/report.html)"), shtab.FILE
    )
    figures = report.add_argument(
        "--figures", type=Path, metavar="DIR", help="also write every figure as PNG and SVG into this folder"
    )
    _complete(figures, shtab.DIRECTORY)
    dashboard = _add(
        commands,
        "dashboard",
        reports.dashboard,
        summary="serve Optuna Dashboard and MLflow on this machine",
        examples="dem-opt dashboard study.yaml --open",
        json=False,
    )
    dashboard.add_argument("--open", action="store_true", help="open both in a browser")


def _add_database(commands: Any) -> None:
    _add(
        commands,
        "list",
        studies.list_studies,
        summary="list the studies in the study's database",
        examples="dem-opt list study.yaml\ndem-opt list study.yaml --json",
    )
    trials = _add(
        commands,
        "trials",
        studies.trials,
        summary="print every trial: coefficients, loss and cost",
        examples="dem-opt trials study.yaml\ndem-opt trials study.yaml --csv > trials.csv",
    )
    trials.add_argument("--csv", action="store_true", help="print comma-separated values")
    reset = _add(
        commands,
        "reset",
        studies.reset,
        summary="remove the study's trials, and keep its measured scores",
        details=(
            "Says what it removes and what it keeps, and asks first. The next run starts a new\n"
            "search; it does not measure again what was measured before."
        ),
        examples="dem-opt reset study.yaml\ndem-opt reset study.yaml --yes",
    )
    reset.add_argument("--yes", action="store_true", help="do not ask")


def _add_completion(commands: Any) -> None:
    added = _add(
        commands,
        "completion",
        _print_completion,
        summary="print a completion script for a shell",
        examples=(
            'eval "$(dem-opt completion bash)"                    # in ~/.bashrc\n'
            "dem-opt completion zsh > ~/.zfunc/_dem-opt           # a folder of $fpath\n"
            "dem-opt completion fish > ~/.config/fish/completions/dem-opt.fish"
        ),
        study=False,
        json=False,
    )
    added.add_argument("shell", choices=SHELLS, help="the shell")


def _print_completion(arguments: Namespace, terminal: Terminal) -> None:
    terminal.raw(shtab.complete(parser(), shell=arguments.shell) + "\n")
