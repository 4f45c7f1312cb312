"""Edits: what an adapter makes of one parameter of its base, in the form in which it stays in memory.

    LoRA    Delta W = s B A ,  s = alpha / r           Hu et al. 2021
    rsLoRA  Delta W = s B A ,  s = alpha / sqrt(r)     Kalajdzievski 2023
    DoRA    W' = m (W + Delta W) / ||W + Delta W||     Liu et al. 2024, the norm of each output's row

Shape suffixes: O outputs and I inputs of a linear map, R rank, E experts, T tokens, H hidden size.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Edit(Protocol):
    """An adapter's change of one parameter."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""

    def apply(self, base: Tensor) -> Tensor:
        """The fine-tuned parameter, computed in float32 and rounded once to the base's dtype."""


@dataclass(frozen=True, eq=False)
class Replaced:
    """A parameter that was trained as a whole: a bias, a module of `modules_to_save`."""

    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.values.nbytes

    def apply(self, base: Tensor) -> Tensor:
        """The values."""
        return self.values.to(base.dtype)


@dataclass(frozen=True, eq=False)
class ReplacedRows:
    """The embeddings of some tokens, which were trained as a whole (`trainable_token_indices`)."""

    rows_TH: Tensor
    indices: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.rows_TH.nbytes

    def apply(self, base: Tensor) -> Tensor:
        """Theta with these rows."""
        changed = base.clone()
        changed[list(self.indices)] = self.rows_TH.to(base.dtype)
        return changed


@dataclass(frozen=True, eq=False)
class Shifted:
    """A bias with that of B added:  b_i = b + s b_B  (`lora_bias`)."""

    shift: Tensor
    scale: float

    @property
    def nbytes(self) -> int:
        """Bytes of the shift."""
        return self.shift.nbytes

    def apply(self, base: Tensor) -> Tensor:
        """The fine-tuned bias."""
        return (base.float() + self.scale * self.shift.float()).to(base.dtype)


@dataclass(frozen=True, eq=False)
class LowRank:
    """Theta_i = Theta + s B A , with s = alpha / r (LoRA) or alpha / sqrt(r) (rsLoRA).

    With a magnitude m for each output (DoRA):  Theta_i = m V / ||V||,  V = Theta + s B A , the norm of each output's
    row.  `transposed`: Theta is stored as [I, O].
    """

    down_RI: Tensor
    up_OR: Tensor
    scale: float
    transposed: bool
    magnitude_O: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(x.nbytes for x in (self.down_RI, self.up_OR, self.magnitude_O) if x is not None)

    def apply(self, base: Tensor) -> Tensor:
        """Theta_i from Theta."""
        weight_OI = torch.mm(self.up_OR.float(), self.down_RI.float()).mul_(self.scale)
        weight_OI += (base.T if self.transposed else base).float()
        if self.magnitude_O is not None:
            weight_OI *= (self.magnitude_O.float() / torch.linalg.norm(weight_OI, dim=1))[:, None]
        return (weight_OI.T if self.transposed else weight_OI).to(base.dtype)


@dataclass(frozen=True, eq=False)
class ExpertsLowRank:
    """A LoRA of its own for each expert of a stack:  Theta_i[e] = Theta[e] + s B_e A_e .

    PEFT stores the factors of all experts side by side, A with the expert as the slower index of its rows, B with the
    expert as the faster index of its columns.  `transposed`: an expert is stored as [I, O].
    """

    down_ERxI: Tensor
    up_OxRE: Tensor
    scale: float
    transposed: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self.down_ERxI.nbytes + self.up_OxRE.nbytes

    def apply(self, base: Tensor) -> Tensor:
        """Theta_i from Theta, all experts."""
        experts = len(base)
        down_ERI = self.down_ERxI.float().reshape(experts, -1, self.down_ERxI.shape[1])
        up_EOR = self.up_OxRE.float().reshape(len(self.up_OxRE), -1, experts).permute(2, 0, 1)
        change_EOI = torch.bmm(up_EOR, down_ERI).mul_(self.scale)
        return (base.float() + (change_EOI.mT if self.transposed else change_EOI)).to(base.dtype)
