"""Parts of the search split: the windows on which a probe measures its gradient.

The order of a corpus's windows was drawn at random once, so any part of all corpora is a stratified sample.
"""

from collections.abc import Iterable, Mapping

PARTS = 8
"""Most parts: a gradient of one costs 3/8 of a pass over the search split."""

LEAST = 2
"""Windows of a part at least: one says nothing about how much windows differ."""


def part_count(windows: int) -> int:
    """Parts of corpora with so many windows each; 0 where there are too few for two parts."""
    count = min(PARTS, windows // LEAST)
    return count if count > 1 else 0


def part_windows(windows: Mapping[str, int], part: int, parts: int) -> dict[str, range]:
    """Windows of one part by corpus, of corpora with so many windows each:  W p / P  to  W (p + 1) / P ."""
    return {key: range(count * part // parts, count * (part + 1) // parts) for key, count in windows.items()}


def all_parts(windows: Mapping[str, int], parts: int) -> dict[str, tuple[range, ...]]:
    """Windows of each part by corpus: together all, each once."""
    by_part = [part_windows(windows, part, parts) for part in range(parts)]
    return {key: tuple(ranges[key] for ranges in by_part) for key in windows}


def one_each(windows: Mapping[str, range]) -> dict[str, tuple[range, ...]]:
    """One part by corpus, as a request names parts."""
    return {key: (own,) for key, own in windows.items()}


def counted(ranges: Iterable[range]) -> int:
    """Windows of some parts together."""
    return sum(map(len, ranges))
