"""Fine-tunes of a study: K of them, each with a coefficient, beside M corpora that are scored.

A distribution is the short form for one of both.  Where it names several steps of a run, each is a fine-tune of its
own, and its corpus is scored, and counted, once; `vectors` are fine-tunes without a corpus, `general` corpora without a
fine-tune.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dem_opt.config.sources import DistributionSection, FineTuneKind, ModelSource, VectorSection


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """A fine-tune of the base.

    Attributes:
        field: Its field in the study file, as in "distributions.code.checkpoint".
        kind: "checkpoint" or "adapter".
        source: The one model that it is.
        train_field: Field of the data that it can be trained on; None for vectors.
        is_trained: True if there are such data, so that `dem-opt train` makes it.
        family: The distribution or vector of which it is one of several steps, or of a list with one.
    """

    field: str
    kind: FineTuneKind
    source: ModelSource
    train_field: str | None = None
    is_trained: bool = False
    family: str | None = None


def fine_tunes_of(
    distributions: Mapping[str, DistributionSection], vectors: Mapping[str, VectorSection]
) -> Iterator[tuple[str, FineTune]]:
    """Names and fine-tunes in the study file's order, the distributions' first."""
    for name, distribution in distributions.items():
        kind, source = distribution.fine_tune
        for ending, model in source.models.items():
            yield (
                f"{name}{ending}",
                FineTune(
                    field=f"distributions.{name}.{kind}",
                    kind=kind,
                    source=model,
                    train_field=f"distributions.{name}.train",
                    is_trained=distribution.train is not None,
                    family=name if ending else None,
                ),
            )
    for name, vector in vectors.items():
        kind, source = vector.fine_tune
        for ending, model in source.models.items():
            fine_tune = FineTune(
                field=f"vectors.{name}.{kind}", kind=kind, source=model, family=name if ending else None
            )
            yield f"{name}{ending}", fine_tune
