"""Measure the final table, and the price of the sum of coefficients, as far as their composites have no scores yet."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from time import monotonic

from dem_opt.analysis import total_price
from dem_opt.analysis.results import entries, final_entries, groups_of, winner_of
from dem_opt.config import TOP, ReportSection
from dem_opt.errors import EvaluationError
from dem_opt.planning.plan import left_out_count, price_count
from dem_opt.search.loop import Driver
from dem_opt.search.samplers.proposer import central_points, first_points
from dem_opt.search.time_left import FinalTable
from dem_opt.search.trials import is_known
from dem_opt.simplex import Coefficients
from dem_opt.storage.leases import Lease
from dem_opt.types import HELD_OUT, SEARCH, SPLITS, Composite, Summary
from dem_opt.workflows.configurations import distinguish
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.stored_study import StoredStudy
from dem_opt.workflows.summary import summarize_generation, summarize_stored, trials_by_run

FULL = ReportSection(top=TOP, leave_one_out=True)
"""A report with all the rows that it can have."""

PART = "final table"
"""The part of a study whose cost it is."""

PRICE = "price of the sum"
"""Likewise of the composites with other sums of coefficients (see `analysis.total_price`)."""


def measure_final_table(
    context: StudyContext, driver: Driver, generation: int, lease: Lease, report: ReportSection | None
) -> None:
    """Score the composites that the report asks for on both splits; tell the cost before, and count it after.

    Without a report it is the winner alone, and the price of the sum is not measured.
    """
    with lease.turn("measuring the final table"):
        trials = trials_by_run(context, driver.ledger, driver.identity, generation)
        groups = groups_of(driver.ledger, driver.identity, trials)
        if report is None:
            listed = entries(driver.identity, trials, groups)[-1:]
        else:
            _measure_price(context, driver, winner_of(driver.identity, trials), is_full=report == FULL)
            listed = final_entries(driver.identity, trials, report, groups)
        composites = [entry.composite for entry in listed]
        requests = driver.missing(composites, SPLITS)
        if not requests:
            return
        count, forwards = len({request.composite for request in requests}), driver.forwards(requests)
        context.progress.note(f"{PART}: {count} composites to score, {forwards:.1f} forward-equivalents")
        with _counting(context, driver, PART):
            driver.measure(composites, SPLITS, PART)


def _measure_price(context: StudyContext, driver: Driver, winner: Coefficients | None, is_full: bool) -> None:
    """Score the composites that show what the sum of coefficients costs the winner.

    Each follows from the scores of those before.  One that can't be scored, like a sum of long vectors, is left out.
    """
    if winner is None:
        return
    failed = set[tuple[Composite, str]]()

    def next_composite() -> tuple[Composite, str] | None:
        missing = total_price.unmeasured(driver.ledger, driver.identity, winner, is_full)
        return next((each for each in missing if each not in failed), None)

    if next_composite() is None:
        return
    # The sum of all vectors alone may be scored on the held-out split, too.
    most = total_price.MOST + driver.identity.windows(HELD_OUT) / driver.identity.windows(SEARCH)
    context.progress.note(f"{PRICE}: at most {total_price.MOST} composites, {most:.1f} forward-equivalents")
    with _counting(context, driver, PRICE):
        while wanted := next_composite():
            composite, split = wanted
            try:
                driver.measure([composite], [split], PRICE)
            except EvaluationError as error:
                failed.add(wanted)
                context.progress.warning(f"{PRICE}: left out, {error}")


@contextmanager
def _counting(context: StudyContext, driver: Driver, part: str) -> Iterator[None]:
    """Tell at the end what a part of the study has cost meanwhile."""
    began, before = monotonic(), _spent(context, driver, part)
    yield
    spent = _spent(context, driver, part) - before
    context.progress.note(f"{part}: took {spent:.1f} forward-equivalents and {monotonic() - began:.0f} s")


def _spent(context: StudyContext, driver: Driver, part: str) -> float:
    """Forward-equivalents that a part of the study has taken so far."""
    costs = driver.ledger.costs(context.config.name, driver.identity)
    return sum(cost.forwards for cost in costs if cost.part == part)


def complete_report(context: StudyContext) -> Summary:
    """Score all rows that a report can have, as far as they are missing; workers start only where some are.

    Raises:
        InputError: The study has not been run, or has changed since.
    """
    with context.stored() as stored:
        if _is_complete(context, stored):
            return summarize_stored(context, stored)
    inputs = context.load_inputs(for_workers=True)
    with context.driving() as (ledger, lease), context.compute:
        inputs = distinguish(inputs.on(context.compute.device), ledger, context.progress)
        identity = inputs.identity()
        context.refuse_changed(stored, identity)
        with context.driver(inputs.spec(), identity, ledger) as driver:
            measure_final_table(context, driver, stored.generation, lease, FULL)
        return summarize_generation(context, ledger, identity, stored.generation)


def _is_complete(context: StudyContext, stored: StoredStudy) -> bool:
    """True if all rows are scored."""
    identity, ledger = stored.identity, stored.ledger
    trials = trials_by_run(context, ledger, identity, stored.generation)
    winner = winner_of(identity, trials)
    if winner is None:
        raise context.not_run()
    if any(total_price.unmeasured(ledger, identity, winner, full=True)):
        return False
    listed = final_entries(identity, trials, FULL, groups_of(ledger, identity, trials))
    return all(is_known(ledger, identity, entry.composite, split) for entry in listed for split in SPLITS)


def expect_winner(driver: Driver) -> FinalTable:
    """Expect what scoring the winner alone will take."""
    return FinalTable(requests=1, forwards=driver.identity.windows(HELD_OUT) / driver.identity.windows(SEARCH))


def expect_final_table(
    context: StudyContext, driver: Driver, algorithms: Collection[str], gradients_fit: bool
) -> FinalTable:
    """Expect what the final table will take after searches with these algorithms: their winners are not known yet."""
    report, identity = context.config.report, driver.identity
    baselines = [entry.composite for entry in entries(identity, {})]
    # The first of the best composites is a winner.
    winners = len(algorithms) + max(report.top - 1, 0)
    without = left_out_count(context.config)
    # The Gaussian process scores the points that it begins with itself on the search split.
    first = first_points if not context.config.measures_gradients(gradients_fit) else central_points
    begun = first(identity.space, []) if "simplex-gp" in algorithms else []
    searched = {identity.composite(point) for point in begun}
    unsearched = [composite for composite in baselines if composite not in searched]
    missing = [*driver.missing(baselines, [HELD_OUT]), *driver.missing(unsearched, [SEARCH])]
    held_out = identity.windows(HELD_OUT) / identity.windows(SEARCH)
    price = price_count(context.config)
    return FinalTable(
        requests=len(missing) + winners + 2 * without + price,
        forwards=driver.forwards(missing) + winners * held_out + without * (1 + held_out) + price,
    )
