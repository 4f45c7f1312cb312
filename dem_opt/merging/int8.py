"""Distribution vectors quantized to int8, symmetrically, with a float32 scale for each row.

    s_r = max_c |v_rc| / 127 ,    q_rc = round(v_rc / s_r) ,    v_rc ~ s_r q_rc ,    |v_rc - s_r q_rc| <= s_r / 2

Shape suffixes: P flat elements of a segment or of a part of it, R rows, C elements of a row.
"""

from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor

LEVELS = 127
"""Largest magnitude of q.  -128 is not used, so that positive and negative values have the same levels."""

# Elements quantized at once: their float32 copies take 16 MB each, little beside a model.
_BLOCK = 2**22


@dataclass(frozen=True, eq=False)
class Int8Vector:
    """A flat vector  s_r q_p , where r is the row that element p belongs to.

    Attributes:
        values_P: q, int8.
        scale_R: s, float32.
        starts_R: First element of each row, ascending from 0; a row ends where the next one begins.  Shared by all
            vectors of a segment.
    """

    values_P: Tensor
    scale_R: Tensor
    starts_R: Tensor

    @classmethod
    def zeros(cls, elements: int, starts_R: Tensor) -> Self:
        """Allocate a vector of zeros on the device of `starts_R`."""
        device = starts_R.device
        return cls(
            torch.zeros(elements, dtype=torch.int8, device=device),
            torch.zeros(len(starts_R), dtype=torch.float32, device=device),
            starts_R,
        )

    @staticmethod
    def memory_bytes(elements: int, rows: int) -> int:
        """Bytes that `zeros` allocates: an int8 for each element, a float32 scale for each row."""
        return elements + 4 * rows

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales, without the shared `starts_R`."""
        return self.values_P.nbytes + self.scale_R.nbytes

    def __len__(self) -> int:
        return len(self.values_P)

    def __getitem__(self, part: slice) -> Tensor:
        """Dequantize a part:  s_r q_p  in float32."""
        values_P, scale_P = self.scaled(1.0, part)
        return values_P * scale_P

    def scaled(self, weight: Tensor | float, part: slice) -> tuple[Tensor, Tensor]:
        """Return q_p and the factor  weight s_r  of each element of a part."""
        positions_P = torch.arange(part.start, min(part.stop, len(self)), device=self.starts_R.device)
        rows_P = torch.searchsorted(self.starts_R, positions_P, right=True) - 1
        return self.values_P[part], (self.scale_R * weight)[rows_P]

    def within(self, part: slice) -> "Int8Vector":
        """Return a view of a part that begins at a row's start."""
        bounds = torch.tensor([part.start, part.stop], device=self.starts_R.device)
        first, last = torch.searchsorted(self.starts_R, bounds).tolist()
        return Int8Vector(self.values_P[part], self.scale_R[first:last], self.starts_R[first:last] - part.start)


def row_starts_bytes(rows: int) -> int:
    """Bytes of `starts_R`, an int64 for each row, which all vectors of a segment share."""
    return 8 * rows


def row_length(shape: tuple[int, ...]) -> int:
    """Elements of a row: the last dimension of a stored tensor, which for one dimension is the whole tensor."""
    return max(shape[-1] if shape else 1, 1)


def row_count(shape: tuple[int, ...]) -> int:
    """Rows of a parameter."""
    return prod(shape) // row_length(shape)


def quantize(fine_tune: Tensor, base: Tensor, into: Int8Vector) -> None:
    """Quantize the vector  v = Theta_i - Theta  of one parameter into the beginning of `into`.

    The difference is formed in float32, so that the error bound  s_r / 2  holds up to float32's rounding.
    """
    length = row_length(tuple(fine_tune.shape))
    fine_tune_RC, base_RC = fine_tune.reshape(-1, length), base.reshape(-1, length)
    values_RC = into.values_P[: fine_tune.numel()].view(-1, length)
    step = max(_BLOCK // length, 1)
    for start in range(0, len(fine_tune_RC), step):
        rows = slice(start, start + step)
        vector_RC = fine_tune_RC[rows].to(base.device).float() - base_RC[rows].float()
        scale_R = vector_RC.abs().amax(1) / LEVELS
        into.scale_R[rows] = scale_R
        nonzero_R1 = torch.where(scale_R > 0, scale_R, 1.0)[:, None]  # a row of zeros would divide by zero
        values_RC[rows] = (vector_RC / nonzero_R1).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
