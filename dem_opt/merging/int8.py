"""Distribution vectors in int8, with a scale for each row.

Shape suffixes: P flat elements of a segment or of a part of it, R rows, C elements of a row.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

LEVELS = 127
"""The largest magnitude of q; -128 is not used."""

_BLOCK = 2**22
"""Elements quantized at once: what they take in float32 is small beside a model."""


@dataclass(frozen=True, eq=False)
class Int8Vector:
    """Values  s_r q  over flat memory: int8 q, and a float32 scale s for each row r.

    starts_R  where each row begins, ascending from 0; it ends where the next begins
    """

    values_P: Tensor
    scale_R: Tensor
    starts_R: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales; where rows begin is common to all vectors."""
        return self.values_P.nbytes + self.scale_R.nbytes

    def __len__(self) -> int:
        return len(self.values_P)

    def __getitem__(self, part: slice) -> Tensor:
        """s_r q  of a part, in float32."""
        values_P, scale_P = self.scaled(1.0, part)
        return values_P * scale_P

    def scaled(self, weight: Tensor | float, part: slice) -> tuple[Tensor, Tensor]:
        """q, and  weight s_r  for each of its elements, of a part."""
        positions_P = torch.arange(part.start, min(part.stop, len(self)), device=self.starts_R.device)
        rows_P = torch.searchsorted(self.starts_R, positions_P, right=True) - 1
        return self.values_P[part], (self.scale_R * weight)[rows_P]

    def within(self, part: slice) -> "Int8Vector":
        """Those of a part that begins where a row does."""
        bounds = torch.tensor([part.start, part.stop], device=self.starts_R.device)
        first, last = torch.searchsorted(self.starts_R, bounds).tolist()
        return Int8Vector(self.values_P[part], self.scale_R[first:last], self.starts_R[first:last] - part.start)


def row_length(shape: tuple[int, ...]) -> int:
    """Elements of a row: the last dimension of what is stored, which for one dimension is all of it."""
    return max(shape[-1] if shape else 1, 1)


def rows_of(shape: tuple[int, ...]) -> int:
    """Rows of a parameter."""
    return prod(shape) // row_length(shape)


def quantize(expert: Tensor, base: Tensor, into: Int8Vector) -> None:
    """Theta_i - Theta of one parameter:  s_r = max_r |Theta_i - Theta| / 127 ,  q = round((Theta_i - Theta) / s_r) .

    So what it stands for is at most s_r / 2 away from the vector, up to the rounding of float32.  Written to `into`.
    """
    length = row_length(tuple(expert.shape))
    expert_RC, base_RC = expert.reshape(-1, length), base.reshape(-1, length)
    values_RC = into.values_P[: expert.numel()].view(-1, length)
    step = max(_BLOCK // length, 1)
    for start in range(0, len(expert_RC), step):
        rows = slice(start, start + step)
        vector_RC = expert_RC[rows].to(base.device).float() - base_RC[rows].float()
        scale_R = vector_RC.abs().amax(1) / LEVELS
        into.scale_R[rows] = scale_R
        safe_R1 = torch.where(scale_R > 0, scale_R, 1.0)[:, None]
        values_RC[rows] = (vector_RC / safe_R1).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
