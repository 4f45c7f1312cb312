"""Low-rank factors of a change of a matrix: the sum of several, and the best of a given rank.

Shape suffixes: O outputs and I inputs of a linear map, R rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dem_opt.checkpoints.adapter_edits import LowRank


class Factors(NamedTuple):
    """Delta W = B A , in float32."""

    down_RI: Tensor
    up_OR: Tensor

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return len(self.down_RI)


def sum_of(terms: Sequence[tuple[float, LowRank]]) -> Factors:
    """Factors of a weighted sum of changes, whose ranks add up:

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...] .
    """
    down_RI = torch.cat([edit.down_RI.float() for _, edit in terms])
    up_OR = torch.cat([edit.up_OR.float() * (weight * edit.scale) for weight, edit in terms], dim=1)
    return Factors(down_RI, up_OR)


def truncated(factors: Factors, rank: int) -> Factors:
    """The product of this rank that is nearest to B A in the Frobenius norm (Eckart and Young 1936).

    With B = Q_B R_B and A^T = Q_A R_A, the singular values of B A are those of the small matrix R_B R_A^T.
    """
    if factors.rank <= rank:
        return factors
    left_OR, small_B = torch.linalg.qr(factors.up_OR.double())
    right_IR, small_A = torch.linalg.qr(factors.down_RI.double().T)
    U, S, Vh = torch.linalg.svd(small_B @ small_A.T, full_matrices=False)
    return _balanced(left_OR @ U[:, :rank], S[:rank], Vh[:rank] @ right_IR.T)


def nearest(change_OI: Tensor, rank: int) -> Factors:
    """The product of this rank that is nearest to a matrix in the Frobenius norm."""
    U, S, Vh = torch.linalg.svd(change_OI.double(), full_matrices=False)
    return _balanced(U[:, :rank], S[:rank], Vh[:rank])


def _balanced(U_OR: Tensor, S_R: Tensor, Vh_RI: Tensor) -> Factors:
    """U S V^T as factors of like size:  B = U sqrt(S) ,  A = sqrt(S) V^T ."""
    root_R = S_R.sqrt()
    return Factors((root_R[:, None] * Vh_RI).float().contiguous(), (U_OR * root_R).float().contiguous())
