"""Forward compute of a study that changes, against fresh searches: `python benchmarks/growing.py`.

The losses are made up, as those of `rivals.py`.  A study of four distributions changes five times in a row: a fifth is
added, one is dropped, one is retrained (another vector for the same corpus), one is split in two, another is added.
What was scored stays known: a composite costs only the corpora on which it was not scored.  Each generation begins with
composites of the earlier ones and learns from others, both chosen as a study does (`dem_opt.search.warm_start`), and
ends by itself.  Beside it a search of the same distributions that knows nothing.

Printed are forward-equivalents (FE) of the present corpora to each regret, by change, median over landscapes; then the
ratio of both, median [quartiles] over changes and landscapes where the fresh search reaches it.
`benchmarks/incremental.py` adds one distribution to studies of real merges.
"""

import argparse
from collections.abc import Sequence
from math import inf

import numpy as np
from rivals import KINDS, LEVELS, REPORTED, Landscape, has_ended, searched

from dem_opt.config import GRADIENTS_FROM
from dem_opt.search.beginning import Beginning
from dem_opt.search.samplers.history import Trial
from dem_opt.search.warm_start import Scored, beginning_of
from dem_opt.simplex import UNIT, Coefficients
from dem_opt.storage.identity import StudyIdentity

SIZE = 9
"""Vectors and corpora of a landscape, of which a study has some."""

RETRAINED, TRAINED = 5, 2
"""A vector that is another training's: 0.95 of the earlier one, and 0.3 of a direction of its own."""

DIRECTIONS_NN = np.eye(SIZE)
DIRECTIONS_NN[:, RETRAINED] = 0.95 * DIRECTIONS_NN[:, TRAINED] + 0.3 * DIRECTIONS_NN[:, RETRAINED]
"""The vectors: each its own direction, but the other training's."""

Members = tuple[tuple[int, int], ...]
"""Vector and corpus of each distribution of a study."""

FIRST: Members = ((0, 0), (1, 1), (2, 2), (3, 3))
CHANGES: dict[str, Members] = {
    "one added": ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4)),
    "one dropped": ((0, 0), (2, 2), (3, 3), (4, 4)),
    "one retrained": ((0, 0), (RETRAINED, TRAINED), (3, 3), (4, 4)),
    "one split in two": ((0, 0), (RETRAINED, TRAINED), (6, 6), (7, 7), (4, 4)),
    "another added": ((0, 0), (RETRAINED, TRAINED), (6, 6), (7, 7), (4, 4), (8, 8)),
}

Terms = frozenset[tuple[int, int]]
"""A composite: vectors with their units."""


def part_of(landscape: Landscape, members: Members) -> Landscape:
    """The losses of some corpora over the shares of some vectors."""
    vectors, corpora = map(list, zip(*members, strict=True))
    weights_C = landscape.weights_C[corpora]
    map_NK = DIRECTIONS_NN[:, vectors]
    values = {
        "kind": landscape.kind,
        "size": len(members),
        "seed": landscape.seed,
        "constant_CW": landscape.constant_CW[corpora],
        "slope_CWN": landscape.slope_CWN[corpora] @ map_NK,
        "form_CWNN": map_NK.T @ landscape.form_CWNN[corpora] @ map_NK,
        "weights_C": weights_C / weights_C.sum() if weights_C.any() else np.full(len(members), 1 / len(members)),
        "waves_3N": landscape.waves_3N @ map_NK,
    }
    part = object.__new__(Landscape)
    for name, value in values.items():
        object.__setattr__(part, name, value)
    return part


class Books:
    """Corpora on which each composite was scored, over the generations of a study."""

    def __init__(self) -> None:
        self._scored: dict[Terms, set[int]] = {}

    @staticmethod
    def _terms(point: Coefficients, members: Members) -> Terms:
        units = zip((vector for vector, _ in members), (units for _, units in point.pairs), strict=True)
        return frozenset((vector, count) for vector, count in units if count)

    def cost(self, point: Coefficients, members: Members) -> float:
        """Part of the corpora that a composite was not scored on."""
        corpora = {corpus for _, corpus in members}
        return len(corpora - self._scored.get(self._terms(point, members), set())) / len(corpora)

    def add(self, trials: Sequence[Trial], members: Members) -> None:
        """Write down the trials that were scored on all windows."""
        for trial in trials:
            if trial.is_whole:
                terms = self._terms(trial.coefficients, members)
                self._scored.setdefault(terms, set()).update(corpus for _, corpus in members)

    def beginning(self, landscape: Landscape, whole: Landscape, members: Members) -> Beginning:
        """Starting points and earlier observations of a generation, chosen as a study does."""
        names = {vector: name for (vector, _), name in zip(members, landscape.space.names, strict=True)}
        weights = dict(zip(landscape.space.names, landscape.weights_C.tolist(), strict=True))
        ranked = []
        for terms, scored in self._scored.items():
            known = [
                place for place, (_, corpus) in enumerate(members) if corpus in scored and landscape.weights_C[place]
            ]
            if not known:
                continue
            losses = {landscape.space.names[place]: loss(whole, terms, members[place][1]) for place in known}
            units = {names.get(vector, f"vector {vector}"): count for vector, count in terms}
            composite = Scored(
                missing=len({corpus for _, corpus in members} - scored),
                violation=0.0,
                objective=float(np.average(list(losses.values()), weights=[weights[name] for name in losses])),
                key=str(sorted(terms)),
                units=dict.fromkeys(landscape.space.names, 0) | units,
                losses=losses,
            )
            ranked.append(composite)
        identity = StudyIdentity("", {}, landscape.space, weights, {}, {})
        return beginning_of(identity, sorted(ranked))


def loss(whole: Landscape, terms: Terms, corpus: int) -> float:
    """Mean loss of a composite on a corpus."""
    x_N = np.zeros(whole.size)
    for vector, count in terms:
        x_N += DIRECTIONS_NN[:, vector] * (count / UNIT)
    return float(whole.nats(x_N)[corpus].mean())


def search(whole: Landscape, members: Members, books: Books, probes: bool) -> list[float]:
    """Forward-equivalents to each regret; what was scored is added to the books."""
    landscape = part_of(whole, members)
    beginning = books.beginning(landscape, whole, members)
    trials, spent, best, reached = list[Trial](), 0.0, inf, dict.fromkeys(LEVELS, inf)
    gradients = probes or landscape.size >= GRADIENTS_FROM
    steps = searched(
        landscape,
        "simplex-gp",
        gradients,
        True,
        trials,
        beginning.start,
        lambda point: books.cost(point, members),
        beginning.earlier,
    )
    for cost, value in steps:
        spent, best = spent + cost, min(best, value - landscape.lowest)
        reached |= {level: spent for level in LEVELS if best <= level and reached[level] == inf}
        if has_ended(trials):
            break
    books.add(trials, members)
    return [reached[level] for level in LEVELS]


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tuned", action="store_true", help="the landscapes that settings were chosen on")
    parser.add_argument("--probes", action="store_true", help="gradients of parts of the windows at any size")
    arguments = parser.parse_args()
    first = 0 if arguments.tuned else REPORTED
    spent = []
    for seed in range(first, first + arguments.seeds):
        for kind in KINDS:
            landscape, books = Landscape(kind, SIZE, seed), Books()
            search(landscape, FIRST, books, arguments.probes)
            rows = []
            for members in CHANGES.values():
                grown, fresh = (search(landscape, members, each, arguments.probes) for each in (books, Books()))
                rows.append((grown, fresh))
            spent.append(rows)
    spent_LKCR = np.array(spent).transpose(0, 2, 1, 3)  # landscapes, grown and fresh, changes, regrets
    print(f"| change | {' | '.join(f'{level:g}: grown, fresh' for level in LEVELS)} |")
    print("|---" * (len(LEVELS) + 1) + "|")
    for place, name in enumerate(CHANGES):
        cells = [
            ", ".join(f"{np.median(spent_LKCR[:, kind, place, level]):.3g}" for kind in (0, 1)) for level in range(3)
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    for place, level in enumerate(LEVELS):
        grown_L, fresh_L = (spent_LKCR[:, kind, :, place].ravel() for kind in (0, 1))
        ratio_L = np.sort(grown_L[np.isfinite(fresh_L)] / fresh_L[np.isfinite(fresh_L)])
        low, middle, high = np.quantile(ratio_L, [0.25, 0.5, 0.75], method="inverted_cdf")
        text = (
            f"{middle:.2f} [{low:.2f}, {high:.2f}] of a fresh search's FE in {len(ratio_L)} of {len(grown_L)} changes"
        )
        print(f"regret {level:g}: {text}; not reached in {np.isinf(grown_L).sum()}, fresh in {np.isinf(fresh_L).sum()}")


if __name__ == "__main__":
    main()
