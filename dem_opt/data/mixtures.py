"""Several distributions' training windows in given shares, and the mixtures that are worth trying.

A mixture of T tokens has, of distribution i with share s_i,  n_i  windows with  sum n_i = T / window  and
|n_i - s_i T / window| < 1 ,  drawn without repetition as long as the distribution has windows.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dem_opt.config import DataFile
from dem_opt.types import Windows


@dataclass(frozen=True)
class Part:
    """A distribution's training data, and its share of the tokens."""

    name: str
    data: DataFile
    share: float


@dataclass(frozen=True)
class Mixture:
    """What a model is trained on instead of one distribution: shares sum to 1."""

    parts: tuple[Part, ...]


def counts(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in these proportions that sum to `total`: the largest remainders are rounded up."""
    exact = [share * total / sum(shares) for share in shares]
    floors = [int(one + 1e-9) for one in exact]
    order = sorted(range(len(exact)), key=lambda i: (floors[i] - exact[i], i))
    for i in order[: total - sum(floors)]:
        floors[i] += 1
    return floors


def blend(mixture: Mixture, packed: Mapping[str, Windows], total: int, seed: int) -> Windows:
    """`total` windows, of each part its share, drawn in an order of the seed and going round where they are few."""
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
    """All shares that are multiples of 1 / divisions, in an order drawn once, so that the first are as good as any."""
    points = _compositions(len(names), divisions)
    random.Random("mixtures").shuffle(points)
    return [{name: part / divisions for name, part in zip(names, point, strict=True)} for point in points]


def _compositions(places: int, total: int) -> list[tuple[int, ...]]:
    """All ways to write `total` as a sum of so many whole numbers."""
    if places == 1:
        return [(total,)]
    return [(first, *rest) for first in range(total + 1) for rest in _compositions(places - 1, total - first)]
