"""dem-opt: quickstart | check | train | run | compare | score | evaluate | merge | export | report | dashboard."""

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from dem_opt import __version__
from dem_opt.cli import baselines, console, json_output, reports
from dem_opt.cli.options import weights_of
from dem_opt.errors import EvaluationError, InputError, OutageError, TrainingError
from dem_opt.signals import sigterm_as_ctrl_c

if TYPE_CHECKING:
    from dem_opt.planning.plan import Plan
    from dem_opt.study import Study
    from dem_opt.workflows.check import Findings

DONE, OTHER, MISTAKE, INTERRUPTED = 0, 1, 2, 130

ALGORITHMS = "grid,random,simplex-gp"
"""What is compared unless algorithms are named."""

Command = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status: 0 done, 2 the user's mistake, 130 interrupted, 1 anything else."""
    given = _parser().parse_args(arguments)
    console.hush(given.quiet)
    resume = shlex.join(["dem-opt", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        with sigterm_as_ctrl_c():
            given.command(given)
    except InputError as error:
        console.complain(f"dem-opt: {error}")
        return MISTAKE
    except (EvaluationError, TrainingError) as error:
        console.complain(f"dem-opt: {error}")
        return OTHER
    except OutageError as error:
        console.complain(f"dem-opt: {error}. Every finished evaluation is kept. To go on: {resume}")
        return OTHER
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        console.complain(f"dem-opt: interrupted; every finished evaluation is kept. To go on: {resume}")
        return INTERRUPTED
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dem-opt", description="Finds the best distribution-edited model.")
    parser.add_argument("--version", action="version", version=f"dem-opt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, words: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=words, description=words)
        sub.set_defaults(command=command)
        return sub

    quickstart = add("quickstart", _quickstart, "make a small base, data and a study, and do the whole main job")
    quickstart.add_argument("folder", type=Path, nargs="?", default=Path("quickstart"), metavar="DIR")
    quickstart.add_argument("--files", action="store_true", help="make data, tokenizer, base and study file, no more")
    quickstart.add_argument("--seed", type=int, default=0, help="seeds data, base, fine-tunes and search")
    check = add(
        "check",
        _check,
        "read headers only: do the checkpoints fit together, does it fit in memory, how long will it take",
    )
    train = add("train", _train, "fine-tune the checkpoints that are missing, one for each distribution")
    run = add("run", _run, "optimize; run again, it goes on where it stopped")
    run.add_argument("--sync-only", action="store_true", help="score nothing: log in MLflow what it lacks")
    compare = add(
        "compare",
        _compare,
        "run several algorithms over one ledger: one table and one figure; or weigh anew what it has",
    )
    compare.add_argument("--algorithms", help="separated by commas; grid,random,simplex-gp unless given")
    compare.add_argument("--seeds", type=int, help="runs of each algorithm; 1 unless given")
    compare.add_argument(
        "--data-mixing",
        metavar="GRID",
        help="train a model for each mixture of the data, `study` for the study file's or 3 for thirds, and compare",
    )
    compare.add_argument(
        "--reweight", metavar="WEIGHTS", help="run nothing: the best of what is measured, with code=2,math=1, say"
    )
    score = add("score", _score, "perplexities of one composite, or of any model, on the study's corpora")
    which = score.add_mutually_exclusive_group(required=True)
    which.add_argument("--weights", help="coefficients, such as code=.3,math=.7")
    which.add_argument("--model", type=Path, metavar="DIR", help="a model's folder")
    evaluate = add(
        "evaluate", baselines.evaluate, "score the best composites, base and fine-tunes on the study's tasks"
    )
    evaluate.add_argument("--by", metavar="TASK", help="rank by a task, not by the loss on the search split")
    merge = add("merge", _merge, "write the composite of given coefficients")
    merge.add_argument("--weights", required=True, help="coefficients, such as code=.3,math=.7")
    export = add("export", _export, "write the winner, prove it from disk, register it as champion")
    report = add("report", _report, "write one offline HTML page")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page; OUTPUT/report.html unless given")
    report.add_argument("--figures", type=Path, metavar="DIR", help="the same figures as PNG and SVG, for papers")
    dashboard = add("dashboard", _dashboard, "serve Optuna Dashboard and MLflow for this study, on loopback")
    dashboard.add_argument("--open", action="store_true", help="open both in a browser")
    for sub in (merge, export):
        sub.add_argument("--out", type=Path, metavar="DIR", required=True, help="the folder to write")
        sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="what to write, not the base's")
    for sub in (check, train, run, compare, score, evaluate, merge, export, report):
        sub.add_argument("--json", action="store_true", help="print the answer as JSON")
    for sub in (quickstart, check, train, run, compare, score, evaluate, merge, export, report, dashboard):
        sub.add_argument("--quiet", action="store_true", help="print nothing but the answer of --json, and errors")
    for sub in (check, train, run, compare, score, evaluate, merge, export, report, dashboard):
        sub.add_argument("study", type=Path, metavar="STUDY", help="the study file")
    return parser


def _check(given: argparse.Namespace) -> None:
    from dem_opt.config import load
    from dem_opt.workflows.check import check, refuse

    config = load(given.study)
    found = check(config, given.study)
    if given.json:
        console.say_json(json_output.of_findings(found))
    else:
        _print_findings(found)
    refuse(found, config, given.study)


def _print_findings(found: "Findings") -> None:
    """A screen: what is on disk, what a worker holds, what the study takes, where it writes."""
    from dem_opt.planning.plan import sized

    headers = ("checkpoint", "tensors", "parameters", "dtypes", "size", "hashed")
    rows = [
        (one.name, f"{one.tensors:,}", f"{one.parameters:,}", " ".join(one.dtypes), sized(one.bytes), _yes(one.hashed))
        for one in found.checkpoints
    ]
    console.table(f"The checkpoints fit together: {found.architecture}", headers, rows)
    _print_memory(found.plan)
    _print_passes(found.plan)
    for line in found.lines():
        console.say(line)


def _print_memory(plan: "Plan") -> None:
    from dem_opt.planning.plan import sized

    parts = [
        (_stored(plan), plan.memory.stored),
        (f"the live model in {plan.calls.dtype}", plan.memory.live),
        (f"activations and logits of {plan.calls.call_tokens:,} tokens", plan.memory.activations),
        ("a merge's scratch, the windows", plan.memory.scratch + plan.memory.windows),
        ("the process and its libraries", plan.memory.process),
        (
            "one worker" if plan.gpus_per_worker == 1 else f"one worker, on each of its {plan.gpus_per_worker} GPUs",
            plan.memory.peak,
        ),
    ]
    console.table(
        "Memory at the peak (1 GB = 1e9 bytes)", ("part", "size"), [(part, sized(size)) for part, size in parts], 5
    )


def _stored(plan: "Plan") -> str:
    """What a worker keeps of the checkpoints, in words."""
    if plan.calls.vectors != "exact":
        return f"the base as it is stored, {plan.checkpoints - 1} vectors in {plan.calls.vectors}"
    kept, files = plan.checkpoints - len(plan.memory.streamed), len(plan.memory.streamed)
    return f"{kept} checkpoints as they are stored" + (f", {files} read from files at every merge" if files else "")


def _print_passes(plan: "Plan") -> None:
    rows = [
        ("one composite on the search split", 1, plan.work.trial_tokens),
        (
            f"base, {plan.work.trials} trials, baselines",
            plan.work.composites,
            plan.work.composites * plan.work.trial_tokens,
        ),
        ("the final table on the held-out split", plan.work.reported, plan.work.reported * plan.work.report_tokens),
        ("the whole study", plan.work.composites + plan.work.reported, plan.work.tokens),
    ]
    shown = [(part, f"{passes:,}", f"{tokens:,}") for part, passes, tokens in rows]
    console.table("Forward passes at most", ("part", "composites", "forward tokens"), shown, 3)


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "not yet"


def _train(given: argparse.Namespace) -> None:
    with console.ConsoleProgress(quiet=given.json) as watching:
        made = _study(given, watching).train()
    if given.json:
        console.say_json({name: asdict(one) for name, one in made.items()})
        return
    trained = f"{len(made)} checkpoint{'s' if len(made) > 1 else ''} trained."
    console.say(trained if made else "Every distribution has its checkpoint.")


def _run(given: argparse.Namespace) -> None:
    if given.sync_only:
        _sync(given)
        return
    with reports.watched(given.study, given.json) as (study, board):
        study.run()
    summary = reports.publish(study, board.pages)
    if given.json:
        console.say_json(json_output.of_summary(summary))
    else:
        reports.print_tables(summary)


def _sync(given: argparse.Namespace) -> None:
    from dem_opt.storage.engine import masked

    if given.json:
        raise InputError(None, "--json", True, "--sync-only answers by its exit status; leave --json out")
    with console.ConsoleProgress() as watching:
        study = _study(given, watching)
        synced = study.sync()
    uri = masked(study.config.tracking.uri)
    if not synced:
        raise OutageError(f"MLflow at {uri} still lacks trials")
    console.say(f"MLflow at {uri} has every finished trial.")


def _compare(given: argparse.Namespace) -> None:
    if given.reweight is not None:
        _reweight(given)
        return
    if given.data_mixing is not None:
        baselines.mix(given)
        return
    algorithms = ALGORITHMS if given.algorithms is None else given.algorithms
    seeds = 1 if given.seeds is None else given.seeds
    if seeds < 1:
        raise InputError(None, "--seeds", seeds, "an algorithm is run at least once")
    with reports.watched(given.study, given.json) as (study, board):
        study.compare([name.strip() for name in algorithms.split(",")], seeds)
    reports.tell_comparison(reports.publish(study, board.pages), study.config.output, given.json)


def _reweight(given: argparse.Namespace) -> None:
    """The best of what is measured under another weighting: nothing runs, nothing is written."""
    if given.algorithms is not None or given.seeds is not None:
        raise InputError(None, "--reweight", given.reweight, "runs nothing; leave --algorithms and --seeds out")
    study = _study(given)
    summary = study.reweighted(weights_of(given.reweight, "--reweight"))
    winner = summary.winner
    if given.json:
        console.say_json(json_output.of_summary(summary))
        return
    told = ", ".join(f"{name} {weight:g}" for name, weight in summary.weights.items())
    console.say(f"With the weights {told}; nothing was measured.")
    reports.print_tables(summary)
    if "held_out" not in winner.objective and winner.coefficients is not None:
        weights = json_output.as_weights(winner.coefficients)
        command = shlex.join(["dem-opt", "score", str(given.study), "--weights", weights])
        console.say(f"It has no score on the held-out split yet. That costs one pass over it: {command}")


def _score(given: argparse.Namespace) -> None:
    with console.ConsoleProgress(quiet=given.json) as watching:
        study = _study(given, watching)
        scores = study.score_model(given.model) if given.model else study.score(weights_of(given.weights))
    told = {
        split: {name: json_output.of_score(one) for name, one in by_name.items()} for split, by_name in scores.items()
    }
    if given.json:
        console.say_json(told)
        return
    rows = [
        (f"{name}, {split}", f"{one['nll']:.4f}", f"{one['perplexity']:.3f}", f"{one['tokens']:,}")
        for split, by_name in told.items()
        for name, one in by_name.items()
    ]
    console.table("Scores", ("corpus", "NLL in nats per token", "perplexity", "scored tokens"), rows)


def _merge(given: argparse.Namespace) -> None:
    weights = weights_of(given.weights)
    study = _study(given)
    written = study.merge(weights, given.out, given.dtype)
    if given.json:
        coefficients = study.config.space.check(weights, given.study, "--weights")
        console.say_json(json_output.of_export(given.out, given.dtype, written, coefficients))
        return
    console.say(f"Written and compared from disk: {given.out}")


def _export(given: argparse.Namespace) -> None:
    with console.ConsoleProgress(quiet=given.json) as watching:
        champion = _study(given, watching).export(given.out, given.dtype)
    winner, exported = champion.result, champion.exported
    if given.json:
        assert winner.coefficients is not None
        written = json_output.of_export(given.out, given.dtype, champion.export, winner.coefficients)
        console.say_json(written | json_output.of_scores(exported) | {"version": champion.version})
        return
    console.say(f"{winner.label}: {winner.coefficients}")
    console.say(f"Written, compared from disk bit by bit, scored again: {given.out}")
    if exported != winner:
        for split, nll in exported.objective.items():
            change = f"{winner.objective[split]:.6f} -> {nll:.6f} nats per token"
            console.say(f"Mean NLL on {split} {exported.label.removeprefix('exported ')}: {change}")
    if champion.version is not None:
        console.say(f"Registered in MLflow: version {champion.version}, alias champion")


def _report(given: argparse.Namespace) -> None:
    study = _study(given)
    out = given.out or study.config.output / "report.html"
    written = reports.write_report(study.summary(), out, given.figures)
    if given.json:
        console.say_json({"report": str(out), "figures": [str(path) for path in written]})
        return
    console.say(f"Written: {out}")
    if given.figures:
        console.say(f"Written: {len(written)} figures in {given.figures}")


def _dashboard(given: argparse.Namespace) -> None:
    from dem_opt.config import load
    from dem_opt.dashboards.servers import serve

    config = load(given.study)
    serve(config.storage, config.tracking.uri, config.output / "artifacts", console.say, given.open)


def _quickstart(given: argparse.Namespace) -> None:
    """Make the assets, then do with the study what any user would, by the same commands."""
    from dem_opt.compute import RayCompute
    from dem_opt.config import load
    from dem_opt.workflows.quickstart import make_assets

    began = perf_counter()
    seconds: dict[str, float] = {}
    with console.ConsoleProgress() as progress:
        path = make_assets(given.folder, given.seed, progress)
    if given.files:
        return
    seconds["data, tokenizer and base"] = perf_counter() - began
    with RayCompute(load(path).compute):
        for words in ("train", "run", "compare --algorithms grid", f"export --out {given.folder / 'best'}", "report"):
            console.say(f"\n$ dem-opt {words} {path}")
            started = perf_counter()
            part = _parser().parse_args([*shlex.split(words), str(path)])
            part.command(part)
            seconds[words.split()[0]] = perf_counter() - started
    rows = [(name, f"{spent:.0f}") for name, spent in seconds.items()]
    console.table("Where the time went", ("part", "seconds"), [*rows, ("in all", f"{perf_counter() - began:.0f}")])
    console.say(f"Look at it:            dem-opt dashboard {path}")
    console.say(f"Read it:               {load(path).output / 'report.html'}")
    console.say(f"Use the winner:        AutoModelForCausalLM.from_pretrained({str(given.folder / 'best')!r})")


def _study(given: argparse.Namespace, watching: console.ConsoleProgress | None = None) -> "Study":
    from dem_opt.study import Study

    return Study.load(given.study, progress=watching)
