"""Which question a study asks: a change begins a new generation, which starts from what the ledger has."""

from collections.abc import Callable

from dem_opt.analysis.results import carried_over, told_reuse
from dem_opt.errors import InputError
from dem_opt.simplex import Coefficients
from dem_opt.storage.identity import Question, changes, refuse_other_scoring
from dem_opt.storage.leases import Lease
from dem_opt.storage.ledger import Ledger, StudyRow


def enter(
    name: str, question: Question, ledger: Ledger, lease: Lease, where: object, tell: Callable[[str], None]
) -> tuple[int, list[Coefficients]]:
    """A study's generation and the points that it begins with; a first run, or a change, is written down.

    Raises InputError where its scores would not compare with those that the study has, and where other drivers are at
    work on the question that it asked before.
    """
    asked, scored = question.asked(), question.scored()
    row = ledger.study(name)
    if row is None:
        ledger.enter_study(StudyRow(name, 1, scored, asked))
        return 1, []
    refuse_other_scoring(where, row.scoring, scored)
    change = changes(row.question, asked)
    if change and (others := lease.others()):
        mend = f"{change}, while it is driven by {' and '.join(others.values())}; stop them first"
        raise InputError(where, "name", name, mend)
    generation = row.generation + bool(change)
    ledger.enter_study(StudyRow(name, generation, row.scoring | scored, asked))
    start = carried_over(ledger, question) if generation > 1 else []
    if change:
        reuse = told_reuse(ledger, question, start)
        tell(f"{name} now asks another question ({change}): generation {generation} begins {reuse}")
    return generation, start
