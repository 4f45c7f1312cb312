"""Score one composite, or any model, on a study's corpora."""

from pathlib import Path

from dem_opt.export.writer import Scores
from dem_opt.planning.inputs import Inputs
from dem_opt.search.trials import is_known, recall
from dem_opt.simplex import Coefficients
from dem_opt.types import SPLITS, Composite, StoredModel
from dem_opt.workflows.context import StudyContext


def score_composite(context: StudyContext, coefficients: Coefficients) -> Scores:
    """Score the composite of these coefficients; what the ledger has is not measured again."""
    inputs = context.load_inputs(for_workers=True)
    return _score(context, inputs, inputs.identity().composite(coefficients))


def score_model(context: StudyContext, folder: Path) -> Scores:
    """Score a model folder; InputError where its tokenizer is not the base's."""
    inputs = context.load_inputs(for_workers=False)
    model = inputs.other(folder, "--model")
    return _score(context, inputs.exact(), Composite.single(model.content), model)


def _score(context: StudyContext, inputs: Inputs, composite: Composite, model: StoredModel | None = None) -> Scores:
    """Return scores by split and corpus; those that the ledger lacks are measured."""
    with context.database() as (_, ledger), context.compute:
        inputs = inputs.on(context.compute.device)
        identity = inputs.identity()
        if not all(is_known(ledger, identity, composite, split) for split in SPLITS):
            spec = inputs.spec() if model is None else inputs.spec_of(model)
            with context.driver(spec, identity, ledger) as driver:
                for split in SPLITS:
                    driver.measure([composite], split)
        return {split: recall(ledger, identity, composite, split) for split in SPLITS}
