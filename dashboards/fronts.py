"""The front between two losses as a table and in words, for text and pages alike; loads no plotting library."""

from dem_opt.dashboards.tables import Table, number
from dem_opt.dashboards.words import coefficients_text
from dem_opt.pareto import Front, FrontPoint, Gap
from dem_opt.types import DOCUMENTS


def front_table(front: Front) -> Table:
    """List the front's points by the first loss: losses on both splits, and what each gives up to the front's ends."""
    headers = (
        *("coefficients", "note", *front.names),
        *(f"{name}\nabove the lowest" for name in front.names),
        *(f"{name}\nheld-out" for name in front.names),
    )
    rows = tuple(
        (
            coefficients_text(point.coefficients) + _violation(point),
            front.note(point),
            *map(number, point.search),
            *map(_gap, point.gaps),
            *map(number, point.held_out or (None, None)),
        )
        for point in front.points
    )
    return Table(headers, rows, words=2, groups=((2, 3), (6, 7), (4, 5)))


def front_title(front: Front) -> str:
    """Title of the table, with its units."""
    intervals = f"95% intervals over {_sampled(front)}"
    return (
        f"Front between {front.names[0]} and {front.names[1]}: losses in {front.unit} on the search split, {intervals}"
    )


def front_lines(front: Front) -> list[str]:
    """Say what the front is, what it dominates, which points on it are special, and how it holds up held out."""
    first, second = front.names
    count = len(front.points) + len(front.dominated)
    worst = ", ".join(front.baselines) or "all composites"
    return [
        f"{len(front.points)} of {count} composites are on the front between {first} and {second}: none is better in "
        "one without being worse in the other.",
        f"Hypervolume {front.hypervolume:.6g} ({front.unit}, squared) up to the reference point "
        f"{_losses(front, front.reference)}, the worst of {worst} on each.",
        f"Lowest mean of the two: {coefficients_text(front.lowest_mean.coefficients)}, "
        f"{_losses(front, front.lowest_mean.search)}.",
        _knee_line(front),
        _held_out_line(front),
    ]


def winner_lines(front: Front | None) -> list[str]:
    """Say what the winner of a study is that searches for a front; nothing for others."""
    if front is None:
        return []
    first, second = front.names
    return [
        f"The study searches for the front between {first} and {second}, on which no composite is the best: the winner "
        "is the one with the lowest mean of both.",
        *front_lines(front),
    ]


def _knee_line(front: Front) -> str:
    """Name the knee; it has no meaning beyond the scaling that defines it."""
    if front.knee is None:
        return "No knee: no point is below the straight line between the ends of the front."
    first, second = (f"{name} {_gap(gap)}" for name, gap in zip(front.names, front.knee.gaps, strict=True))
    return (
        f"Knee: {coefficients_text(front.knee.coefficients)}, {first} and {second} above the lowest. It is the "
        "point farthest below the line between the ends, both losses scaled to the front's range: with other ends, "
        "another knee."
    )


def _held_out_line(front: Front) -> str:
    """Say how many points are scored held out, and whether these are a front there too."""
    measured, others = len(front.held_out), len(front.points) - len(front.held_out)
    chosen = "The front is chosen on the search split, where its losses are a little too good"
    if not measured:
        return f"{chosen}; none of its points is scored on the held-out split."
    if measured == 1:
        return f"{chosen}; one of its points is scored on the held-out split."
    return (
        f"{chosen}; on the held-out split {measured} of its points are scored{f', {others} not' if others else ''}; "
        f"{front.confirmed} of these are on the front there too."
    )


def _losses(front: Front, losses: tuple[float, float]) -> str:
    return " and ".join(f"{name} {loss:.4f}" for name, loss in zip(front.names, losses, strict=True))


def _sampled(front: Front) -> str:
    """The unit of the intervals; windows where the documents of any are not known."""
    units = {gap.sampled for point in front.points for gap in point.gaps}
    return DOCUMENTS if units <= {DOCUMENTS} else "windows"


def _gap(gap: Gap) -> str:
    """A gap with its interval; the end of the front has none."""
    if gap.mean == 0:
        return "lowest"
    return f"{gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"


def _violation(point: FrontPoint) -> str:
    return f" (violates by {point.violation:.4f})" if point.violation else ""
