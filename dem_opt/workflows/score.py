"""Score one composite, or any model, on a study's corpora."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dem_opt.analysis.results import entries, finite_objectives, groups_of, known_rows
from dem_opt.export.writer import Scores
from dem_opt.grouping import GroupedCoefficients
from dem_opt.planning.inputs import Inputs
from dem_opt.search.trials import is_known, objectives, recall
from dem_opt.simplex import Coefficients
from dem_opt.storage.identity import StudyIdentity, refuse_other_scoring
from dem_opt.storage.ledger import Ledger
from dem_opt.types import SPLITS, Composite, ResultRow, Score, StoredModel
from dem_opt.workflows.configurations import distinguish, distinguish_model
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.summary import trials_by_run

BESIDE = ("base", "uniform", "best")
"""Roles of the composites that a scored one is shown beside."""


@dataclass(frozen=True, kw_only=True)
class Scored(Mapping[str, Mapping[str, Score]]):
    """The scores of a composite: a mapping of splits to scores by distribution or general corpus.

    Attributes:
        scores: The same as a plain mapping.
        objective: The study's objective by split, in its unit, where it is known.
        beside: Base, uniform average and the winner of each algorithm, as far as they have been scored.
    """

    scores: Scores
    objective: Mapping[str, float]
    beside: tuple[ResultRow, ...]

    def __getitem__(self, split: str) -> Mapping[str, Score]:
        return self.scores[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


def score_composite(context: StudyContext, coefficients: Coefficients | GroupedCoefficients) -> Scored:
    """Score the composite of these coefficients; what the ledger has is not measured again."""
    inputs = context.load_inputs(for_workers=True)
    return _score(context, inputs, inputs.identity().composite(coefficients))


def score_model(context: StudyContext, folder: Path) -> Scored:
    """Score a model folder; InputError where its tokenizer is not the base's."""
    inputs = context.load_inputs(for_workers=False)
    model = inputs.other(folder, "--model")
    return _score(context, inputs, Composite.single(model.content), model)


def _score(context: StudyContext, inputs: Inputs, composite: Composite, model: StoredModel | None = None) -> Scored:
    """Return scores by split and corpus; those that the ledger lacks are measured.

    Raises:
        InputError: The study has been run, and would not score as it did then.
    """
    with context.database() as (_, ledger), context.compute:
        inputs = inputs.on(context.compute.device)
        if row := ledger.study(context.config.name):
            refuse_other_scoring(context.path, row.scoring, inputs.identity().scoring_fields())
        inputs = distinguish(inputs if model is None else inputs.exact(), ledger, context.progress)
        ledger.enter_layouts(inputs.layouts())
        study = inputs.identity()
        identity = study if model is None else distinguish_model(inputs, model, ledger).identity()
        if not all(is_known(ledger, identity, composite, split) for split in SPLITS):
            spec = inputs.spec() if model is None else inputs.spec_of(model)
            with context.driver(spec, identity, ledger) as driver:
                driver.measure([composite], SPLITS, "score")
        scores = {split: recall(ledger, identity, composite, split) for split in SPLITS}
        objective = finite_objectives(objectives(ledger, identity), scores)
        return Scored(scores=scores, objective=objective, beside=_beside(context, ledger, study))


def _beside(context: StudyContext, ledger: Ledger, identity: StudyIdentity) -> tuple[ResultRow, ...]:
    """The base, the uniform average and the best of each algorithm, from the ledger."""
    row = ledger.study(context.config.name)
    was_run = row is not None and row.identity == identity.identity_fields()
    trials = trials_by_run(context, ledger, identity, row.generation) if row is not None and was_run else {}
    groups = groups_of(ledger, identity, trials)
    listed = [entry for entry in entries(identity, trials, groups) if entry.role in BESIDE]
    return known_rows(ledger, identity, listed)
