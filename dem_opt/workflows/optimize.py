"""Optimize the coefficients: run searches over one ledger, then score the results table."""

from collections.abc import Sequence
from contextlib import closing

from dem_opt.analysis.vector_geometry import measure_once
from dem_opt.config import sqlite_url
from dem_opt.planning.inputs import Inputs
from dem_opt.search.beginning import Beginning
from dem_opt.search.loop import Driver
from dem_opt.search.optuna_study import Search
from dem_opt.search.run_name import RunName
from dem_opt.search.runs import check_algorithms, run_names
from dem_opt.search.time_left import FinalTable, TimeLeft, plan_run, plan_search
from dem_opt.search.trials import missing, outlined
from dem_opt.search.warm_start import enter
from dem_opt.storage.engine import reading
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.leases import Lease
from dem_opt.storage.ledger import Ledger
from dem_opt.types import SEARCH, SPLITS, Composite, Expense, Summary
from dem_opt.workflows.configurations import distinguish
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.final_table import expect_final_table, expect_winner, measure_final_table
from dem_opt.workflows.finished import KnownInputs, find_finished, keep_inputs, stamp_of
from dem_opt.workflows.group_coefficients import refuse_groups, search_groups
from dem_opt.workflows.int8_error import measure_error
from dem_opt.workflows.provenance import compare_libraries, study_description
from dem_opt.workflows.rounding import rounding_warnings
from dem_opt.workflows.summary import outlines_by_run, read_summary, summarize_generation


def optimize(context: StudyContext, algorithms: Sequence[str], seeds: int = 1, *, winner_only: bool = False) -> Summary:
    """Search with each algorithm over one ledger, and score the composites of the results table on both splits.

    Each algorithm has the budget of the study file, and `seeds` runs, whose seeds count on from the study's.  With
    `winner_only` neither the winner's rivals nor other sums of its coefficients are scored.
    """
    check_algorithms(context.config, context.path, algorithms)
    runs = run_names(algorithms, seeds)
    if known := find_finished(context.config, runs, context.progress):
        return _answer(context, known)
    stamp = stamp_of(context.config)
    inputs = context.load_inputs(for_workers=True)
    refuse_groups(context, inputs)
    for warning in rounding_warnings(inputs.base, inputs.fine_tunes):
        context.progress.warning(warning)
    with context.driving() as (ledger, lease), context.compute:
        inputs = distinguish(inputs.on(context.compute.device), ledger, context.progress)
        identity = inputs.identity()
        ledger.enter_layouts(inputs.layouts())
        generation, beginning = _enter(context, identity, ledger, lease)
        _count_forward_check(context, inputs, ledger)
        with context.driver(inputs.spec(), identity, ledger) as driver:
            _measure_references(context, driver, generation, lease)
            searches = context.runs(generation, lease, context.retry)
            left = _expect(context, driver, generation, runs, inputs.gradients_fit, winner_only)
            for run in runs:
                with closing(searches.open(run, beginning, inputs.gradients_fit)) as search:
                    _search(context, driver, search, lease, left)
            search_groups(context, driver, inputs, generation, lease)
            report = None if winner_only else context.config.report
            measure_final_table(context, driver, generation, lease, report)
        measure_error(context, inputs, ledger)
        measure_once(inputs.base, inputs.fine_tunes, context.config.output, context.progress)
        if stamp is not None:
            warnings = [*inputs.left_out, *inputs.warnings()]
            known = KnownInputs(stamp=stamp, identity=identity.identity_fields(), warnings=warnings)
            keep_inputs(context.config, known)
        return summarize_generation(context, ledger, identity, generation)


def search_only(context: StudyContext) -> None:
    """Search with the study's own algorithm, and score no composite beside the trials: not even a final table."""
    run = run_names([context.config.search.algorithm], 1)[0]
    inputs = context.load_inputs(for_workers=True)
    with context.driving() as (ledger, lease), context.compute:
        inputs = distinguish(inputs.on(context.compute.device), ledger, context.progress)
        identity = inputs.identity()
        ledger.enter_layouts(inputs.layouts())
        generation, beginning = _enter(context, identity, ledger, lease)
        with context.driver(inputs.spec(), identity, ledger) as driver:
            _measure_references(context, driver, generation, lease)
            plan = plan_run(context.config, RunName.parse(run, generation))
            left = TimeLeft(driver.pool.capacity, [plan], FinalTable(requests=0, forwards=0.0))
            searches = context.runs(generation, lease, context.retry)
            with closing(searches.open(run, beginning, inputs.gradients_fit)) as search:
                _search(context, driver, search, lease, left)


def _count_forward_check(context: StudyContext, inputs: Inputs, ledger: Ledger) -> None:
    """Write down what comparing vertices with their fine-tunes has cost, where this run compared any."""
    if inputs.compared_tokens:
        windows = inputs.compared_tokens / context.config.evaluation.window
        ledger.spend(Expense(study=context.config.name, part="forward check", windows=windows, seconds=0.0))


def _answer(context: StudyContext, known: KnownInputs) -> Summary:
    """Answer a finished study from its database; trials that the tracker lacks are logged."""
    for warning in known.warnings:
        context.progress.warning(warning)
    sync(context)
    summary = read_summary(context)
    context.progress.note(f"{context.config.name} is finished: answered from its database")
    return summary


def sync(context: StudyContext) -> bool:
    """Log the finished trials that the tracker lacks, each once; nothing is scored.

    Returns:
        Whether the tracker has all of them now.

    Raises:
        InputError: The study has not been run.
    """
    with context.stored() as stored:
        generation, identity = stored.generation, stored.identity
    is_complete = True
    with context.driving() as (ledger, lease), context.runs(generation, lease).existing() as searches:
        for search in searches.values():
            tracker = context.track(search, lease)
            tracker.reconcile(missing(ledger, identity, search))
            is_complete &= tracker.close()
    return is_complete


def _enter(context: StudyContext, identity: StudyIdentity, ledger: Ledger, lease: Lease) -> tuple[int, Beginning]:
    """Return the study's generation and what its searches begin with."""

    def attempt() -> tuple[int, Beginning]:
        with lease.turn("beginning") as confirm:
            _take_over_scores(context, identity, ledger)
            return enter(context.config.name, identity, ledger, lease, confirm, context.path, context.progress)

    generation, beginning = context.retry(attempt)
    begun = context.runs(generation, None, context.retry).beginning() if generation > 1 else None
    return generation, begun or beginning


def _take_over_scores(context: StudyContext, identity: StudyIdentity, ledger: Ledger) -> None:
    """Copy scores of the same content out of the databases beside a new one: the study has been given another name.

    Only a database at its default place has such neighbours, `runs/NAME/study.db` of other names.
    """
    config, own = context.config, context.config.output / "study.db"
    if config.storage != sqlite_url(own) or ledger.count_scores():
        return
    corpora = [key for split in SPLITS for key in identity.keys(split)]
    for file in sorted(config.output.parent.glob(f"*/{own.name}")):
        if file.samefile(own):
            continue
        with reading(file) as source:
            copied = source and ledger.copy_scores(source, identity.scoring, corpora, identity.differentiation)
        if copied:
            context.progress.note(f"{copied} scores of the same models and windows taken over from {file}")


def _measure_references(context: StudyContext, driver: Driver, generation: int, lease: Lease) -> None:
    """Score the composites that trials are measured against; compare scores where libraries have changed."""
    identity = driver.identity
    fine_tunes = identity.fine_tunes.values() if identity.worst else []  # regrets are against single fine-tunes
    with lease.turn("measuring baselines"):
        driver.measure([Composite.single(content) for content in (identity.base, *fine_tunes)], [SEARCH], "baselines")
        compare_libraries(context.config.name, driver, lambda: outlines_by_run(context, generation), context.progress)


def _expect(
    context: StudyContext,
    driver: Driver,
    generation: int,
    runs: Sequence[str],
    gradients_fit: bool,
    winner_only: bool,
) -> TimeLeft:
    """Expect what these runs and the final table after them will take; the first run is planned anew as it begins."""
    with context.runs(generation).existing(runs[1:]) as present:
        plans = [
            plan_search(present[run]) if run in present else plan_run(context.config, RunName.parse(run, generation))
            for run in runs
        ]
    algorithms = {RunName.parse(run).algorithm for run in runs}
    table = expect_winner(driver) if winner_only else expect_final_table(context, driver, algorithms, gradients_fit)
    return TimeLeft(driver.pool.capacity, plans, table)


def _search(context: StudyContext, driver: Driver, search: Search, lease: Lease, left: TimeLeft) -> None:
    """Continue one run's Optuna study to its end."""
    ledger, identity = driver.ledger, driver.identity
    with closing(context.track(search, lease)) as tracker:
        tracker.describe(study_description(context.config, context.path, identity))
        tracker.reconcile(missing(ledger, identity, search))
        earlier = outlined(search, identity.unit)
        if earlier:
            context.progress.search_continued(earlier, search.planned)
        left.begin(plan_search(search), earlier, search.is_known)
        driver.optimize(search, context.config.lookahead(search.algorithm), tracker, lease, left)
        tracker.reconcile(missing(ledger, identity, search))
    context.progress.note(f"{search.name} ended after {search.stopped}")
