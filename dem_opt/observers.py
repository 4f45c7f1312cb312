"""Who watches a study: figures and progress bars know the study, the study does not know them."""

from typing import Protocol

from dem_opt.types import TrialRecord


class Observer(Protocol):
    """Is told what happens while a study is at work."""

    def trial_ended(self, record: TrialRecord, done: int, planned: int) -> None:
        """A trial was told, `done` of `planned`."""

    def milestone(self, message: str) -> None:
        """Something worth a line happened."""

    def training(self, name: str, step: int, steps: int, loss: float) -> None:
        """A fine-tuning is at `step` of `steps`; its training loss there, in nats per token."""


class NullProgress:
    """An observer that does nothing."""

    def trial_ended(self, record: TrialRecord, done: int, planned: int) -> None:
        """Nothing."""

    def milestone(self, message: str) -> None:
        """Nothing."""

    def training(self, name: str, step: int, steps: int, loss: float) -> None:
        """Nothing."""
