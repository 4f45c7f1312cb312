"""What compressed vectors cost: NLL of fine-tunes and uniform average against the same of vectors as they are."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean

from dem_opt.analysis.results import entries
from dem_opt.planning.inputs import Inputs, memory_shortage
from dem_opt.search.loop import Driver
from dem_opt.search.trials import is_known, recall
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import SEARCH, Composite, WorkerSpec


@dataclass(frozen=True)
class Fidelity:
    """|NLL of compressed vectors - NLL| in nats per token, over composites and corpora of the search split."""

    vectors: str
    mean: float
    largest: float
    composites: int

    def __str__(self) -> str:
        return (
            f"{self.vectors} vectors change the NLL by {self.mean:.1e} nats per token on average and at most by "
            f"{self.largest:.1e}, over fine-tunes, uniform average ({self.composites}) and corpora of the search split"
        )


def tell_cost(
    sources: Inputs,
    ledger: Ledger,
    driving: Callable[[WorkerSpec, StudyIdentity, Ledger], AbstractContextManager[Driver]],
    where: object,
) -> list[str]:
    """Measure what compressed vectors cost, if there are any and memory allows vectors as they are; a line of it."""
    identity, exact = sources.identity(), sources.exact()
    if identity.vectors == "exact":
        return []
    if shortage := memory_shortage(exact.config, where):
        return [f"what {identity.vectors} vectors cost is not measured: {shortage}"]
    with driving(exact.spec(), identity.exact(), ledger) as driver:
        driver.measure(_yardsticks(identity), SEARCH)
    return [str(cost) for cost in known_cost(ledger, identity)]


def known_cost(ledger: Ledger, identity: StudyIdentity) -> list[Fidelity]:
    """The error by the ledger, of what it has in both forms; nothing where it has none in both."""
    exact = identity.exact()
    if identity.vectors == "exact":
        return []
    both = [
        composite
        for composite in _yardsticks(identity)
        if is_known(ledger, identity, composite, SEARCH) and is_known(ledger, exact, composite, SEARCH)
    ]
    errors = [
        abs(score.nll - recall(ledger, exact, composite, SEARCH)[name].nll)
        for composite in both
        for name, score in recall(ledger, identity, composite, SEARCH).items()
    ]
    return [Fidelity(identity.vectors, fmean(errors), max(errors), len(both))] if errors else []


def _yardsticks(identity: StudyIdentity) -> Sequence[Composite]:
    """The single fine-tunes and the uniform average; the base is exact in every form."""
    baselines = [entry.composite for entry in entries(identity, {})]
    return [composite for composite in baselines if composite != Composite.single(identity.base)]
