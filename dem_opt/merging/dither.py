"""Stochastic rounding: each sum goes up or down with the probability of its place between two values of the dtype.

    round(x) = down + (up - down) [ u < (x - down) / (up - down) ] ,    E round(x) = x

A fine-tune often differs from its base by one step of a 16-bit dtype, or by none.  Rounded to the nearest, a
coefficient above one half gives such a step whole, and one below nothing of it; rounded at random, about the share of
the steps that is the coefficient.  The error is longer, and it is no bias.

u is no random number that is drawn, but a hash of the parameter's name and of the element's position in it: so a
composite has the same bits on every machine and in every file, values that the dtype has stay as they are, and an
element goes up at one coefficient as the coefficient grows, and not back and forth.

Shape suffixes: P flat elements, S stretches (a parameter or a part of one).
"""

import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_MASK = 2**32 - 1

# Found by a search for functions of 32 bits whose output bits each depend on all input bits (hash-prospector:
# 16 21f0aaad 15 735a2d97 15).
_FIRST, _SECOND = 0x21F0AAAD, 0x735A2D97

_LOST = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32's fraction that a dtype has not."""


def seed_of(parameter: str) -> int:
    """Hash of a parameter's name, below 2^32: the state of its first element."""
    return zlib.crc32(parameter.encode())


@dataclass(frozen=True)
class Dither:
    """States of flat elements, of which thresholds are hashed: (seed of the parameter + place in it) mod 2^32.

    Attributes:
        starts_S: First element of each stretch, ascending from 0; int64.
        shifts_S: What is added to an element's index for its state; int64.
    """

    starts_S: Tensor
    shifts_S: Tensor

    @classmethod
    def of(cls, stretches: Sequence[tuple[int, str, int]]) -> "Dither":
        """Each stretch's first flat element, its parameter, and its first element's place in the parameter."""
        shifts = [(seed_of(parameter) + place - start) & _MASK for start, parameter, place in stretches]
        return cls(torch.tensor([start for start, *_ in stretches]), torch.tensor(shifts))

    @cached_property
    def _stretches(self) -> tuple[list[int], list[int]]:
        return self.starts_S.tolist(), self.shifts_S.tolist()

    def within(self, part: slice) -> "Dither":
        """The states of a part of the elements."""
        starts, _ = self._stretches
        own = slice(bisect_right(starts, part.start) - 1, bisect_left(starts, part.stop))
        return Dither((self.starts_S[own] - part.start).clamp(min=0), (self.shifts_S[own] + part.start) & _MASK)

    def states_P(self, part: slice, device: torch.device) -> Tensor:
        """The states of a part, as int32, whose sign is the highest bit."""
        starts, shifts = self._stretches
        first, last = bisect_right(starts, part.start) - 1, bisect_left(starts, part.stop)
        ends = [*starts[first + 1 : last], part.stop]
        states_P, begin = torch.empty(part.stop - part.start, dtype=torch.int32, device=device), part.start
        for shift, end in zip(shifts[first:last], ends, strict=True):
            states_P[begin - part.start : end - part.start] = torch.arange(begin + shift, end + shift, device=device)
            begin = end
        return states_P


@dataclass(frozen=True)
class ScatteredDither:
    """States of elements that lie otherwise in their parameter than one after the other.

    Attributes:
        places_P: Each element's place in the parameter.
        seed: The parameter's.
    """

    places_P: Tensor
    seed: int

    def within(self, part: slice) -> "ScatteredDither":
        """The states of a part of the elements."""
        return ScatteredDither(self.places_P[part], self.seed)

    def states_P(self, part: slice, device: torch.device) -> Tensor:
        """The states of a part, as int32, whose sign is the highest bit."""
        return (self.places_P[part].to(device).long() + self.seed).int()


States = Dither | ScatteredDither


def thresholds(states_P: Tensor) -> Tensor:
    """Hash states, which lie in order, to 32 bits that look independent; `mix` in kernel.cpp.

    Products keep their lower 32 bits; a shift of int32 brings copies of the sign, which are masked out.
    """
    x_P = (states_P ^ ((states_P >> 16) & 0xFFFF)).mul_(_FIRST)
    x_P.bitwise_xor_((x_P >> 15) & 0x1FFFF).mul_(_SECOND)
    return x_P.bitwise_xor_((x_P >> 15) & 0x1FFFF)


def rounded_stochastically(x_P: Tensor, dtype: torch.dtype, states_P: Tensor) -> Tensor:
    """Round float32 values to values of a 16-bit dtype, returned in float32; NaN and infinity stay.

    A float32 has more bits of a fraction than the dtype.  An addition of as many random bits carries into the bits that
    stay with the probability that is wanted, and the rest is cut off.  Below 2^-14 float16 has multiples of 2^-24.
    """
    lost = _LOST[dtype]
    random_P = (thresholds(states_P) >> (32 - lost)) & (2**lost - 1)
    bits_P = x_P.view(torch.int32)
    rounded_P = ((bits_P + random_P) & -(2**lost)).view(torch.float32)
    if dtype == torch.float16:
        magnitude_P = x_P.abs()
        multiples_P = (magnitude_P * 2.0**24 + random_P * 2.0**-lost).floor() * 2.0**-24
        rounded_P = torch.where(magnitude_P < 2.0**-14, multiples_P.copysign(x_P), rounded_P)
    return torch.where(x_P.isnan(), x_P, rounded_P)
