"""Mixtures of several distributions' training windows, and the lattice of mixtures to compare with.

A mixture of T tokens has  n_i  windows of distribution i with share s_i , where  sum_i n_i = T / window  and
|n_i - s_i T / window| < 1 ,  drawn without repetition as long as the distribution has windows.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dem_opt.config import DataFile
from dem_opt.simplex import compositions
from dem_opt.types import Corpus, Windows


@dataclass(frozen=True)
class Part:
    """A distribution's training data, a file or windows, and its share of the tokens."""

    name: str
    data: DataFile | Corpus
    share: float


@dataclass(frozen=True)
class Mixture:
    """Training data of one model from several distributions, whose shares sum to 1."""

    parts: tuple[Part, ...]


def counts(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in these proportions that sum to `total`: the largest remainders are rounded up."""
    exact = [share * total / sum(shares) for share in shares]
    # 1e-9 keeps a count that is whole but for rounding, such as 2.9999999999, from losing one.
    floors = [int(count + 1e-9) for count in exact]
    order = sorted(range(len(exact)), key=lambda i: (floors[i] - exact[i], i))
    for i in order[: total - sum(floors)]:
        floors[i] += 1
    return floors


def blend(mixture: Mixture, packed: Mapping[str, Windows], total: int, seed: int) -> Windows:
    """Draw `total` windows, of each part its share, in a seeded order; a part with too few windows repeats them."""
    chosen = []
    for part, count in zip(mixture.parts, counts([part.share for part in mixture.parts], total), strict=True):
        windows = packed[part.name]
        rng = np.random.default_rng([seed, *part.name.encode()])
        rounds = -(-count // len(windows)) if count else 0
        order = [rng.permutation(len(windows)) for _ in range(rounds)]
        drawn = np.concatenate(order)[:count] if order else np.empty(0, dtype=np.int64)
        chosen.append((windows, drawn))
    return Windows(
        np.concatenate([windows.ids_WT[drawn] for windows, drawn in chosen]),
        np.concatenate([windows.positions_WT[drawn] for windows, drawn in chosen]),
        np.concatenate([windows.scored_WT[drawn] for windows, drawn in chosen]),
    )


def lattice(names: Sequence[str], divisions: int) -> list[dict[str, float]]:
    """All shares that are multiples of 1 / divisions, shuffled once, so that any first few are a random sample."""
    points = list(compositions(divisions, len(names)))
    random.Random("mixtures").shuffle(points)
    return [{name: part / divisions for name, part in zip(names, point, strict=True)} for point in points]
