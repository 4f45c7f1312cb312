"""Write a composite as a checkpoint folder: merge any, or export the winner, proved from disk and registered."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from dem_opt.analysis.results import rescored
from dem_opt.dashboards.words import winner_text
from dem_opt.export.model_card import texts
from dem_opt.export.writer import (
    SAME_SCORE,
    Export,
    Scores,
    output_dtype,
    prove,
    prove_scores,
    refuse_place,
    write_composite,
)
from dem_opt.grouping import GroupedCoefficients
from dem_opt.planning.inputs import Inputs
from dem_opt.search.trials import objectives
from dem_opt.search.warm_start import find_generation
from dem_opt.simplex import Coefficients
from dem_opt.storage.identity import StudyIdentity
from dem_opt.types import SPLITS, Composite, ResultRow, Summary
from dem_opt.workflows.configurations import distinguish
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.int8_error import report_error
from dem_opt.workflows.libraries import libraries
from dem_opt.workflows.provenance import winner_metrics
from dem_opt.workflows.stored_study import StoredStudy
from dem_opt.workflows.summary import summarize_stored


@dataclass(frozen=True, kw_only=True)
class Champion:
    """The winner as it was exported.

    Attributes:
        result: The winner's row of the results table.
        exported: The row with the scores of the written folder; the same unless another dtype was written, or the
            study scores int8 vectors.
        export: The written folder.
        version: Version in the model registry, None where it could not be registered.
    """

    result: ResultRow
    exported: ResultRow
    export: Export
    version: str | None


def merge(
    context: StudyContext,
    coefficients: Coefficients | GroupedCoefficients,
    out: Path,
    dtype: str | None,
    overwrite: bool = False,
) -> Export:
    """Write a composite, and compare its bits from disk with a fresh merge.

    Args:
        context: The study.
        coefficients: The composite.
        out: Folder to write.
        dtype: Name of a torch dtype, "bfloat16" for example; None writes the base's.
        overwrite: Whether an earlier export may be replaced.  A folder with any other file is always refused.
    """
    refuse_place(out, model_folders(context), overwrite)
    inputs = context.load_inputs(for_workers=False)

    def approve(written: Export) -> Mapping[str, str]:
        prove(written)
        return describe(context, inputs, coefficients, dtype)

    return _write(inputs, coefficients, out, dtype, approve, overwrite)


def export(context: StudyContext, out: Path, dtype: str | None) -> Champion:
    """Write the winner, prove it from disk, and register it.

    The folder gets its name only after its bits were compared with a fresh merge, and its scores with the winner's.

    Args:
        context: A study that has been run.
        out: Folder to write.
        dtype: Name of a torch dtype, None for the base's.  In another dtype scores may differ from the winner's.

    Raises:
        InputError: The study has not been run, or has changed since, or `out` holds anything but an unchanged export.
        ExportError: The folder is not the winner.
    """
    refuse_place(out, model_folders(context), overwrite=True)
    inputs = context.load_inputs(for_workers=False)
    with context.stored() as stored, context.compute:
        inputs = distinguish(inputs.on(context.compute.device), stored.ledger, context.progress)
        stored = _generation_of(context, inputs.identity(), stored)
        summary = summarize_stored(context, stored)
        proof = _ExportProof(context, inputs, stored, summary, dtype)
        written = _write(inputs, proof.coefficients, out, dtype, proof)
        report_error(context, stored.ledger, proof.identity)
        version = _register(context, stored, proof.exported, written)
        return Champion(result=summary.winner, exported=proof.exported, export=written, version=version)


class _ExportProof:
    """Proves a written winner in three steps: compare its bits, measure its scores, describe it in a model card.

    Called by the writer before the folder gets its name.  `exported` is the winner's row until the scores of the
    folder are measured.
    """

    def __init__(
        self, context: StudyContext, inputs: Inputs, stored: StoredStudy, summary: Summary, dtype: str | None
    ) -> None:
        self._context, self._inputs, self._ledger = context, inputs, stored.ledger
        self._summary, self._dtype = summary, dtype
        self.identity, self.exported = inputs.identity(), summary.winner

    @property
    def coefficients(self) -> Coefficients | GroupedCoefficients:
        """The winner's coefficients."""
        assert self._summary.winner.merged is not None, "a winner that a search found has coefficients"
        return self._summary.winner.merged

    def __call__(self, written: Export) -> Mapping[str, str]:
        """Prove the folder; return the texts to write beside its weights, by file name."""
        prove(written)
        scores = self._measure(written.path)
        if self._dtype is None:
            prove_scores(scores, self._summary.winner.scores, SAME_SCORE[self.identity.vectors])
        if self._dtype is not None or self.identity.vectors != "exact":
            self.exported = self._rescored(scores)
        return self._describe()

    def _measure(self, folder: Path) -> Scores:
        """Score the folder on both splits, whatever the ledger has."""
        model = self._inputs.other(folder, "export")
        composite = Composite.single(model.content)
        with self._context.driver(self._inputs.spec_of(model), self.identity, self._ledger) as driver:
            return {split: driver.score_afresh(composite, split, "export") for split in SPLITS}

    def _rescored(self, scores: Scores) -> ResultRow:
        """Return the winner's row with the scores of a form that may differ from the one that was searched."""
        label = f"exported in {self._dtype}" if self._dtype else "exported from the checkpoints as they are"
        return rescored(self._summary.winner, label, scores, objectives(self._ledger, self.identity))

    def _describe(self) -> dict[str, str]:
        summary = self._summary
        if self.exported is not summary.winner:
            summary = replace(summary, results=(*summary.results, self.exported))
        return describe(self._context, self._inputs, self.coefficients, self._dtype, summary)


def _generation_of(context: StudyContext, identity: StudyIdentity, stored: StoredStudy) -> StoredStudy:
    """Return the generation that the study file asks for: the present one, or an earlier one that has been run.

    Raises:
        InputError: The study file asks for something else than was run.
    """
    fields, row = identity.identity_fields(), stored.ledger.study(context.config.name)
    generation = find_generation(stored.ledger, context.config.name, fields)
    if generation is not None and row is not None:
        earlier = StudyIdentity.recall(fields, row.scoring)
        stored = replace(stored, identity_fields=fields, identity=earlier, generation=generation)
    context.refuse_changed(stored, identity)
    return stored


def _write(
    inputs: Inputs,
    coefficients: Coefficients | GroupedCoefficients,
    out: Path,
    dtype: str | None,
    approve: Callable[[Export], Mapping[str, str]],
    overwrite: bool = True,
) -> Export:
    composite = inputs.identity().composite(coefficients)
    return write_composite(inputs.base, inputs.models(), composite, out, approve, output_dtype(dtype), overwrite)


def model_folders(context: StudyContext) -> list[Path]:
    """Return the folders that the study file names: weights that were converted lie elsewhere."""
    config = context.config
    sources = [config.base, *(fine_tune.source for fine_tune in config.fine_tunes.values())]
    return [source.place for source in sources if source.place is not None]


def describe(
    context: StudyContext,
    inputs: Inputs,
    coefficients: Coefficients | GroupedCoefficients,
    dtype: str | None,
    summary: Summary | None = None,
    lora: Export | None = None,
) -> dict[str, str]:
    """Return the files that stand beside an export's weights, by name: model card and recipe.

    Args:
        context: The study.
        inputs: Its models.
        coefficients: The composite.
        dtype: Dtype that was chosen.
        summary: Results and margins, where the study has been run.
        lora: The export, where it is a LoRA.
    """
    results, margins, price = (summary.results, summary.margins, summary.total_price) if summary else ((), (), None)
    folder = context.path.resolve().parent
    return texts(inputs, coefficients, folder, libraries(), dtype, results, margins, lora, price)


def _register(context: StudyContext, stored: StoredStudy, row: ResultRow, written: Export) -> str | None:
    """Register the winner under the run that found it; return its version."""
    objective = {f"{split}.objective_nll": f"{nll:.4f}" for split, nll in row.objective.items()}
    tags = {"composite": written.composite.key, "content": written.content, "coefficients": winner_text(row)}
    with (
        closing(context.runs(stored.generation).open(row.run)) as search,
        closing(context.track(search, context.visit(stored.ledger))) as tracker,
    ):
        return tracker.register(written.path, winner_metrics(row), tags | objective)
