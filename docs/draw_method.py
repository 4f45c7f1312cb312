"""Draw docs/images/method.svg: base, fine-tunes, the simplex with a study's trials, and the composite.

    python docs/draw_method.py

The points are the trials of the quickstart's study with their loss on the search split (docs/images/trials.csv). The
simplex has four corners; the drawing projects it onto a triangle by adding the coefficients of code and prose.
"""

import csv
from dataclasses import dataclass
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
TRIALS = HERE / "images/trials.csv"
PICTURE = HERE / "images/method.svg"

WIDTH, HEIGHT = 900, 330
NAMES = ("code", "math", "prose", "records")
COLORS = {"code": "#4269d0", "math": "#d1603d", "prose": "#3ca951", "records": "#a463f2"}
INK, FAINT = "#1f2328", "#6e7781"
FONT = "Helvetica, Arial, sans-serif"
ARROW_HEAD = (
    '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    f'<path d="M0,0 L8,4 L0,8 z" fill="{FAINT}"/></marker>'
)

TOP, LEFT, RIGHT = (470.0, 72.0), (345.0, 268.0), (595.0, 268.0)
"""Corners of the triangle: math, code + prose, records."""

LOW, HIGH = (253, 231, 37), (68, 1, 84)
"""Colors of the highest and the lowest loss."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial: its coefficients by name, its loss in nats per token, and whether it was stopped early."""

    coefficients: dict[str, float]
    nll: float
    stopped: bool


def read_trials(path: Path = TRIALS) -> list[Trial]:
    """Read the trials of a study in the order in which they ran."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Trial(
                coefficients={name: float(row[name]) for name in NAMES},
                nll=float(row["nll"]),
                stopped=row["state"] == "stopped",
            )
            for row in csv.DictReader(file)
        ]


def text(
    x: float, y: float, words: str, *, size: int = 13, color: str = INK, anchor: str = "middle", bold: bool = False
) -> str:
    """A line of text whose anchor lies at (x, y)."""
    style = f'font-size="{size}" fill="{color}" text-anchor="{anchor}"' + (' font-weight="600"' if bold else "")
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, color: str) -> str:
    """A tinted rectangle with round corners."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{color}" fill-opacity="0.12" '
        f'stroke="{color}" stroke-width="1.5"/>'
    )


def arrow(start: tuple[float, float], end: tuple[float, float], color: str = FAINT) -> str:
    """A line with a tip at its end."""
    ends = f'x1="{start[0]:g}" y1="{start[1]:g}" x2="{end[0]:g}" y2="{end[1]:g}"'
    return f'<line {ends} stroke="{color}" stroke-width="1.5" marker-end="url(#tip)"/>'


def place(coefficients: dict[str, float]) -> tuple[float, float]:
    """Project coefficients onto the triangle: the mean of its corners, weighted by the coefficients."""
    shares = (coefficients["math"], coefficients["code"] + coefficients["prose"], coefficients["records"])
    x, y = (
        sum(share * corner[axis] for share, corner in zip(shares, (TOP, LEFT, RIGHT), strict=True)) for axis in (0, 1)
    )
    return x, y


def shade(nll: float, best: float, worst: float) -> str:
    """A color between yellow (high loss) and violet (low loss), by the square root of the distance to the best."""
    part = ((nll - best) / (worst - best)) ** 0.5
    red, green, blue = (round(high + (low - high) * part) for low, high in zip(LOW, HIGH, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def draw_fine_tunes() -> list[str]:
    """The base, and an arrow to each of its fine-tunes."""
    parts = [box(24, 132, 76, 56, FAINT), text(62, 157, "base", bold=True), text(62, 176, "Θ")]
    for row, name in enumerate(NAMES):
        y = 62 + 58 * row
        parts += [
            arrow((102, 160), (166, y + 20), COLORS[name]),
            box(170, y, 104, 40, COLORS[name]),
            text(222, y + 18, name, bold=True),
            text(222, y + 34, f"Θ{'₁₂₃₄'[row]}", color=FAINT),
        ]
    return [*parts, arrow((280, 160), (350, 160))]


def draw_simplex(trials: list[Trial]) -> list[str]:
    """The triangle with all trials, the best on top."""
    losses = [trial.nll for trial in trials]
    corners = " ".join(f"{x:g},{y:g}" for x, y in (TOP, LEFT, RIGHT))
    parts = [
        f'<polygon points="{corners}" fill="none" stroke="{FAINT}" stroke-width="1.5"/>',
        text(TOP[0], TOP[1] - 9, "math", size=12),
        text(LEFT[0], LEFT[1] + 18, "code + prose", size=12),
        text(RIGHT[0], RIGHT[1] + 18, "records", size=12),
    ]
    for trial in sorted(trials, key=lambda trial: -trial.nll):
        x, y = place(trial.coefficients)
        color = shade(trial.nll, min(losses), max(losses))
        fill = "white" if trial.stopped else color
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{color}" stroke-width="1.8"/>')
    x, y = place(best_of(trials).coefficients)
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke="{COLORS["math"]}" stroke-width="2.2"/>')
    return parts


def best_of(trials: list[Trial]) -> Trial:
    """The completed trial with the lowest loss."""
    return min((trial for trial in trials if not trial.stopped), key=lambda trial: trial.nll)


def draw_composite(best: Trial) -> list[str]:
    """The composite's formula, coefficients and loss."""
    parts = [
        arrow((612, 160), (672, 160)),
        box(676, 62, 200, 214, INK),
        text(776, 88, "composite", bold=True),
        text(776, 110, "Θ + Σ wᵢ (Θᵢ − Θ)"),  # noqa: RUF001 a minus sign, as in the formula
    ]
    for row, name in enumerate(NAMES):
        y, share = 128 + 27 * row, best.coefficients[name]
        parts += [
            text(740, y + 12, name, size=12, anchor="end"),
            f'<rect x="746" y="{y:g}" width="{88 * share / 0.6:.1f}" height="14" rx="2" fill="{COLORS[name]}"/>',
            text(752 + 88 * share / 0.6, y + 12, f"{share:.2f}", size=12, anchor="start"),
        ]
    return [*parts, text(776, 262, f"{best.nll:.4f} nats per token", size=12)]


def draw(trials: list[Trial]) -> str:
    """The whole picture as SVG, on a white card so that it reads on dark pages too."""
    titles = (
        (62, "1  one base"),
        (222, "2  a fine-tune per distribution"),
        (470, "3  search the simplex"),
        (776, "4  merge the best"),
    )
    stopped = sum(trial.stopped for trial in trials)
    legend = (
        f"The quickstart's {len(trials)} trials. Dark: low loss on the search split. "
        f"Open: stopped early ({stopped}). Ring: the winner. Code and prose share a corner."
    )
    body = [
        *(text(x, 28, words, size=14, bold=True) for x, words in titles),
        *draw_fine_tunes(),
        *draw_simplex(trials),
        *draw_composite(best_of(trials)),
        text(WIDTH / 2, 318, legend, size=12, color=FAINT),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{FONT}">',
            f"<defs>{ARROW_HEAD}</defs>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(read_trials()), encoding="utf-8")
