"""The error of int8 vectors: NLL of fine-tunes and uniform average, against the same with vectors as stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from dem_opt.analysis.results import entries
from dem_opt.planning.inputs import Inputs, memory_shortage
from dem_opt.search.trials import is_known, recall
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import SEARCH, Composite
from dem_opt.workflows.context import StudyContext


@dataclass(frozen=True, kw_only=True)
class Int8Error:
    """|NLL of int8 vectors - NLL| over composites and corpora of the search split.

    Attributes:
        vectors: The compressed form, "int8".
        mean: Mean difference, nats per token.
        largest: Largest difference, nats per token.
        composites: Number of composites.
    """

    vectors: str
    mean: float
    largest: float
    composites: int

    def __str__(self) -> str:
        return (
            f"{self.vectors} vectors change the NLL by {self.mean:.1e} nats per token on average and at most by "
            f"{self.largest:.1e}, over fine-tunes, uniform average ({self.composites}) and corpora of the search split"
        )


def measure_error(context: StudyContext, inputs: Inputs, ledger: Ledger) -> None:
    """Measure and report the error of compressed vectors, where the study uses them and both forms fit into memory."""
    identity, exact = inputs.identity(), inputs.exact()
    if identity.vectors == "exact":
        return
    if shortage := memory_shortage(exact.config, context.path):
        context.progress.note(f"the error of {identity.vectors} vectors is not measured: {shortage}")
        return
    with context.driver(exact.spec(), identity.exact(), ledger) as driver:
        driver.measure(_references(identity), [SEARCH], "exact vectors")
    report_error(context, ledger, identity)


def report_error(context: StudyContext, ledger: Ledger, identity: StudyIdentity) -> None:
    """Report the error of compressed vectors, where it was measured."""
    error = recall_error(ledger, identity)
    if error is not None:
        context.progress.note(str(error))


def recall_error(ledger: Ledger, identity: StudyIdentity) -> Int8Error | None:
    """Return the error over the composites that the ledger has in both forms; None where there is none."""
    exact = identity.exact()
    if identity.vectors == "exact":
        return None
    both = [
        composite
        for composite in _references(identity)
        if is_known(ledger, identity, composite, SEARCH) and is_known(ledger, exact, composite, SEARCH)
    ]
    errors = [
        abs(score.nll - recall(ledger, exact, composite, SEARCH)[name].nll)
        for composite in both
        for name, score in recall(ledger, identity, composite, SEARCH).items()
    ]
    if not errors:
        return None
    return Int8Error(vectors=identity.vectors, mean=fmean(errors), largest=max(errors), composites=len(both))


def _references(identity: StudyIdentity) -> Sequence[Composite]:
    """Single fine-tunes and uniform average; the base has no vector, so no error."""
    baselines = [entry.composite for entry in entries(identity, {})]
    return [composite for composite in baselines if composite != Composite.single(identity.base)]
