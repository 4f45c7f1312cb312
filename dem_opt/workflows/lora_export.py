"""Write a composite as one LoRA: merge any, or export the winner, proved from disk, with what a smaller rank costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dem_opt.analysis.results import rescored
from dem_opt.errors import InputError
from dem_opt.evaluation.objective import Objective
from dem_opt.export.lora_writer import OPTION, RANK, SAME_LORA_SCORE, prove_lora, write_lora
from dem_opt.export.writer import Export, Scores, prove_scores, refuse_place
from dem_opt.grouping import GroupedCoefficients
from dem_opt.planning.inputs import Inputs
from dem_opt.search.trials import objectives
from dem_opt.simplex import Coefficients
from dem_opt.storage.ledger import Ledger
from dem_opt.types import SPLITS, UNITS, Composite, ResultRow, StoredModel, Summary
from dem_opt.workflows.configurations import distinguish
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.export import Champion, describe, model_folders
from dem_opt.workflows.summary import summarize_stored


@dataclass(frozen=True)
class LoraForm:
    """A composite as a LoRA of its base.

    Attributes:
        rank: Largest rank of a product; None adds up the ranks of the adapters, exactly.
    """

    rank: int | None = None

    @classmethod
    def of(cls, as_lora: bool, rank: int | None, dtype: str | None) -> "LoraForm | None":
        """The form that options ask for; None for a whole checkpoint.

        Raises:
            InputError: The options contradict each other.
        """
        if rank is not None and not as_lora:
            raise InputError(None, RANK, rank, f"is of a LoRA: add {OPTION}")
        if rank is not None and rank < 1:
            raise InputError(None, RANK, rank, "must be 1 or more")
        if as_lora and dtype is not None:
            raise InputError(None, "--dtype", dtype, f"a LoRA has float32 factors: leave it out, or {OPTION}")
        return cls(rank) if as_lora else None


def merge_lora(
    context: StudyContext,
    coefficients: Coefficients | GroupedCoefficients,
    out: Path,
    form: LoraForm,
    overwrite: bool = False,
) -> Export:
    """Write a composite as a LoRA, and compare it from disk with a fresh merge; of a smaller rank tell what it costs.

    Args:
        context: The study.
        coefficients: The composite.
        out: Folder to write.
        form: The LoRA's rank.
        overwrite: Whether an earlier export may be replaced.  A folder with any other file is always refused.
    """
    refuse_place(out, model_folders(context), overwrite)
    coefficients = _refuse_groups(coefficients)
    inputs = context.load_inputs(for_workers=form.rank is not None)

    def approve(written: Export) -> Mapping[str, str]:
        prove_lora(written)
        if written.is_truncated:
            _tell_cost(context, inputs, written)
        return describe(context, inputs, coefficients, None, lora=written)

    return _write(inputs, coefficients, out, form, approve, overwrite)


def export_lora(context: StudyContext, out: Path, form: LoraForm) -> Champion:
    """Write the winner as a LoRA, prove it from disk, and score it; it is not registered.

    Args:
        context: A study that has been run.
        out: Folder to write.
        form: The LoRA's rank.

    Raises:
        InputError: The study has not been run, or has changed since; a fine-tune is no adapter, or `out` can't be used.
        ExportError: The folder is not the winner.
    """
    refuse_place(out, model_folders(context), overwrite=True)
    inputs = context.load_inputs(for_workers=False)
    with context.stored() as stored, context.compute:
        inputs = distinguish(inputs.on(context.compute.device), stored.ledger, context.progress)
        context.refuse_changed(stored, inputs.identity())
        summary = summarize_stored(context, stored)
        proof = _LoraProof(context, inputs, stored.ledger, summary)
        assert summary.winner.merged is not None, "a winner that a search found has coefficients"
        coefficients = _refuse_groups(summary.winner.merged)
        written = _write(inputs, coefficients, out, form, proof)
        return Champion(result=summary.winner, exported=proof.exported, export=written, version=None)


def _refuse_groups(coefficients: Coefficients | GroupedCoefficients) -> Coefficients:
    """Raise InputError for coefficients by group."""
    if isinstance(coefficients, GroupedCoefficients):
        raise InputError(
            None, OPTION, None, "writes one coefficient for each adapter, and these are by group; leave it out"
        )
    return coefficients


class _LoraProof:
    """Proves a written LoRA: compare it with a fresh merge, measure its scores, describe it in a model card."""

    def __init__(self, context: StudyContext, inputs: Inputs, ledger: Ledger, summary: Summary) -> None:
        self._context, self._inputs, self._ledger, self._summary = context, inputs, ledger, summary
        self.exported: ResultRow = summary.winner

    def __call__(self, written: Export) -> Mapping[str, str]:
        """Prove the folder; return the texts to write beside its weights, by file name."""
        prove_lora(written)
        winner = self._summary.winner
        scores, _ = _measure(self._context, self._inputs, self._ledger, written)
        if not written.is_truncated and self._inputs.identity().vectors == "exact":
            dtypes = (self._inputs.stored, self._inputs.dtype)
            prove_scores(scores, winner.scores, max(SAME_LORA_SCORE[dtype] for dtype in dtypes))
        label = f"exported as {'the nearest' if written.is_truncated else 'a'} LoRA of rank {written.rank}"
        self.exported = rescored(winner, label, scores, objectives(self._ledger, self._inputs.identity()))
        summary = replace(self._summary, results=(*self._summary.results, self.exported))
        assert winner.coefficients is not None
        return describe(self._context, self._inputs, winner.coefficients, None, summary, written)


def _write(
    inputs: Inputs,
    coefficients: Coefficients,
    out: Path,
    form: LoraForm,
    approve: Callable[[Export], Mapping[str, str]],
    overwrite: bool = True,
) -> Export:
    composite = inputs.identity().composite(coefficients)
    return write_lora(inputs.base, inputs.models(), composite, out, approve, form.rank, overwrite)


def _measure(
    context: StudyContext, inputs: Inputs, ledger: Ledger, written: Export, beside: Composite | None = None
) -> tuple[Scores, Scores]:
    """Score a written LoRA on both splits, and another composite; `compute` must have been entered."""
    exact, identity = inputs.exact(), inputs.identity()
    adapter = StoredModel(written.path, written.content, inputs.base.content, "export")
    fine_tunes = tuple(inputs.fine_tunes.values()) if beside else ()
    spec = replace(exact.spec(), fine_tunes=(*fine_tunes, adapter))
    with context.driver(spec, identity, ledger) as driver:
        composites = [Composite.single(adapter.content), *([beside] if beside else [])]
        scores = [{split: driver.score_afresh(each, split, "export") for split in SPLITS} for each in composites]
    return scores[0], scores[-1]


def _tell_cost(context: StudyContext, inputs: Inputs, written: Export) -> None:
    """Tell the mean NLL of a LoRA of a smaller rank beside that of its composite."""
    with context.database() as (_, ledger), context.compute:
        inputs = inputs.on(context.compute.device)
        scores, exact = _measure(context, inputs, ledger, written, written.composite)
        unit = inputs.identity().unit
        mean = Objective(inputs.identity().weights, unit=unit)
        for split in SPLITS:
            change = f"{mean(exact[split]):.6f} -> {mean(scores[split]):.6f} {UNITS[unit]}"
            form = f"as the nearest LoRA of rank {written.rank}"
            context.progress.note(f"Mean NLL on {split.replace('_', '-')} {form}: {change}")
