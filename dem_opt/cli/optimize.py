"""`dem-opt run` and `dem-opt compare`."""

import shlex
from argparse import Namespace

from dem_opt.cli import baselines, json_output, published, reports
from dem_opt.cli.coefficients import format_coefficients, parse_numbers
from dem_opt.cli.console import Terminal
from dem_opt.errors import InputError, OutageError


def run(arguments: Namespace, terminal: Terminal) -> None:
    """Optimize, then print the results."""
    if arguments.sync_only:
        _sync(arguments, terminal)
        return
    if _answer_finished(arguments, terminal):
        return
    with reports.study_beside_dashboards(arguments.study, terminal) as (study, updates):
        study.run()
    summary = reports.publish(study, updates.pages, terminal)
    if arguments.json:
        terminal.json(json_output.of_summary(summary))
    else:
        reports.print_results(summary, terminal)


def _answer_finished(arguments: Namespace, terminal: Terminal) -> bool:
    """Print the results of a study that is finished and published; return whether it is.  Loads no torch."""
    from dem_opt.config import load
    from dem_opt.config.objective_function import import_from
    from dem_opt.workflows.finished import find_finished
    from dem_opt.workflows.stored_results import stored_results

    config = load(arguments.study)
    if config.objective.function is not None:
        import_from(arguments.study.resolve().parent)
    with terminal.progress() as progress:
        known = find_finished(config, [config.search.algorithm], progress)
    if known is None:
        return False
    summary = stored_results(config, arguments.study)
    if not published.is_published(config, summary):
        return False
    with terminal.progress() as progress:
        for warning in known.warnings:
            progress.warning(warning)
        progress.note(f"{config.name} is finished: answered from its database")
    if arguments.json:
        terminal.json(json_output.of_summary(summary))
    else:
        reports.print_results(summary, terminal)
    return True


def _sync(arguments: Namespace, terminal: Terminal) -> None:
    """Upload missing trials to MLflow."""
    from dem_opt.storage.engine import masked
    from dem_opt.study import Study

    if arguments.json:
        raise InputError(None, "--json", True, "--sync-only answers by its exit status; leave --json out")
    with terminal.progress() as progress:
        study = Study.load(arguments.study, progress=progress)
        is_complete = study.sync()
    uri = masked(study.config.tracking.uri)
    if not is_complete:
        raise OutageError(f"MLflow at {uri} still lacks trials")
    terminal.line(f"MLflow at {uri} has every finished trial.")


def compare(arguments: Namespace, terminal: Terminal) -> None:
    """Compare algorithms, or what an option asks for."""
    options = {
        "--reweight": (arguments.reweight, _reweight),
        "--data-mixing": (arguments.data_mixing, baselines.compare_with_mixing),
        "--placebo": (arguments.placebo or None, baselines.compare_with_placebo),
        "--fine-tune-on-search": (arguments.fine_tune_on_search or None, baselines.compare_with_training),
    }
    chosen = {option: (value, command) for option, (value, command) in options.items() if value is not None}
    has_runs = arguments.algorithms is not None or arguments.seeds is not None
    others = [*chosen, *(["--algorithms and --seeds"] if has_runs else [])]
    if len(others) > 1:
        option, (value, _) = next(iter(chosen.items()))
        raise InputError(None, option, value, f"is a comparison of its own; leave {' and '.join(others[1:])} out")
    command = next((command for _, command in chosen.values()), _compare_algorithms)
    command(arguments, terminal)


def _compare_algorithms(arguments: Namespace, terminal: Terminal) -> None:
    from dem_opt.config import load
    from dem_opt.workflows.check import COMPARED, comparison_plan

    named = COMPARED if arguments.algorithms is None else arguments.algorithms.split(",")
    algorithms = [name.strip() for name in named]
    seeds = 1 if arguments.seeds is None else arguments.seeds
    if seeds < 1:
        raise InputError(None, "--seeds", seeds, "must be 1 or more")
    with terminal.progress() as progress:
        progress.note(comparison_plan(load(arguments.study), arguments.study, algorithms, seeds))
    with reports.study_beside_dashboards(arguments.study, terminal) as (study, updates):
        study.compare(algorithms, seeds)
    reports.print_comparison(reports.publish(study, updates.pages, terminal), study.config.output, terminal)


def _reweight(arguments: Namespace, terminal: Terminal) -> None:
    """Print the best measured composite under other weights; nothing runs, nothing is written."""
    from dem_opt.study import Study

    summary = Study.load(arguments.study).reweighted(parse_numbers(arguments.reweight, "--reweight"))
    if arguments.json:
        terminal.json(json_output.of_summary(summary))
        return
    weights = ", ".join(f"{name} {weight:g}" for name, weight in summary.weights.items())
    terminal.line(f"With the weights {weights}; nothing was measured.")
    reports.print_results(summary, terminal)
    winner = summary.winner
    if "held_out" not in winner.objective and winner.coefficients is not None:
        coefficients = format_coefficients(winner.coefficients)
        command = shlex.join(["dem-opt", "score", str(arguments.study), "--coefficients", coefficients])
        terminal.line(f"It has no score on the held-out split yet. One pass over that split gives it: {command}")
