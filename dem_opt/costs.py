"""What a study costs: forward passes, counted in windows where they are measured and in passes where they are read."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Expense:
    """The cost of one evaluation.

    Attributes:
        study: The study that asked for it.
        part: The part of the study, see `Cost`.
        windows: Windows that went through a model, each GRADIENT_FORWARDS times where gradients were measured.
        seconds: Seconds of merging and scoring, in a worker.
    """

    study: str
    part: str
    windows: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a part of a study.

    Attributes:
        part: A run of its search, by its label, or "baselines", "final table", "export" ...
        evaluations: Evaluations that went through a model.
        forwards: Their forward-equivalents.
        seconds: Seconds of merging and scoring, in workers.
    """

    part: str
    evaluations: int
    forwards: float
    seconds: float
