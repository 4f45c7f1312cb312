"""The name of a run, one search of a study: parsed and formatted here and nowhere else."""

from dataclasses import dataclass
from typing import Self

from dem_opt.config import ALGORITHMS


@dataclass(frozen=True)
class RunName:
    """An algorithm, the offset of its seed from the study's, and the study's generation.

    The *label* ALGORITHM or ALGORITHM@SEED names a run within a generation: in summaries, tables and figures.  The
    *Optuna name* STUDY/LABEL or STUDY/LABEL#GENERATION names its study in Optuna.
    """

    algorithm: str
    seed: int = 0
    generation: int = 1

    @classmethod
    def parse(cls, label: str, generation: int = 1) -> Self:
        """The run of a label."""
        algorithm, _, seed = label.partition("@")
        return cls(algorithm, int(seed or 0), generation)

    @classmethod
    def from_optuna(cls, name: str, study: str) -> Self | None:
        """The run of `study` that an Optuna study is; None where it is none."""
        label, _, generation = name.removeprefix(f"{study}/").partition("#")
        algorithm, _, seed = label.partition("@")
        if not name.startswith(f"{study}/") or algorithm not in ALGORITHMS:
            return None
        if not (seed or "0").isdecimal() or not (generation or "1").isdecimal():
            return None
        return cls(algorithm, int(seed or 0), int(generation or 1))

    @property
    def label(self) -> str:
        """ALGORITHM, or ALGORITHM@SEED where the seed is not the study's own."""
        return f"{self.algorithm}@{self.seed}" if self.seed else self.algorithm

    def optuna_name(self, study: str) -> str:
        """Name of the run's Optuna study."""
        return f"{study}/{self.label}" + (f"#{self.generation}" if self.generation > 1 else "")
