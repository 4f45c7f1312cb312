"""Figures for papers: plotly figures as PNG and SVG, drawn by matplotlib.

Plotly's own export (kaleido) needs a Chrome on every machine that runs a study; `dem-opt run` attaches PNGs to MLflow
and must not.  So this module translates the parts of plotly's figure description that `figures` uses, and only these:
bars, heat maps with numbers, lines (steps, fills, stacks), markers and ternary plots.  Data, texts and colours come
from the plotly figure; nothing is computed twice.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from html import unescape
from math import sqrt
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba
from matplotlib.figure import Figure

from dem_opt.atomic import staged_file, write_text
from dem_opt.errors import InputError
from dem_opt.manifest import FILES, listed, manifest_of, refuse_others

Part = Mapping[str, Any]

FORMATS = ("png", "svg")
RECORD = "dem_opt_figures.json"
"""File with the manifest of the figures in a folder."""

INK = "#222222"
PIXELS = 100
"""Of plotly's in an inch of paper."""

_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "cross": "P",
    "hexagon": "h",
    "star": "*",
}
_DASHES = {"dash": "--", "dot": ":"}


def write_figures(figures: Mapping[str, go.Figure], folder: Path) -> list[Path]:
    """Each figure as NAME.png (200 dots an inch) and NAME.svg, with a record of these files.

    Figures of these names that this function wrote before are replaced; other files in the folder are left alone.

    Raises:
        InputError: The folder can't be written, or a file of these names was not written here or has changed since.
    """
    images = {f"{name}.{kind}": image(figure, kind) for name, figure in figures.items() for kind in FORMATS}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_others(folder, RECORD, images, "--figures")
        for name, content in images.items():
            with staged_file(folder / name) as partial:
                partial.write_bytes(content)
        written = [folder / name for name in images]
        earlier = [folder / name for name in listed(folder, RECORD)]
        write_text(folder / RECORD, json.dumps({FILES: manifest_of(folder, [*earlier, *written])}, indent=2) + "\n")
    except OSError as error:
        raise InputError(folder, "--figures", None, f"can't be written ({error.strerror})") from None
    return written


def image(figure: go.Figure, kind: str = "png", dots: int = 200) -> bytes:
    """One figure as a PNG or an SVG."""
    from io import BytesIO

    made = figure.to_plotly_json()
    layout: Part = made["layout"]
    width = max(720, layout["meta"].get("width", 0))
    paper = Figure(figsize=(width / PIXELS, layout["height"] / PIXELS), layout="constrained")
    axes = paper.add_subplot()
    _draw(axes, made["data"], layout)
    pad = 24 if "ternary" in layout else 6
    axes.set_title(_text(layout["title"]["text"]), loc="left", fontsize=12, color=INK, pad=pad)
    stream = BytesIO()
    with warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": "dem_opt"}):
        warnings.simplefilter("ignore")
        paper.savefig(stream, format=kind, dpi=dots, metadata={"Date": None} if kind == "svg" else None)
    return stream.getvalue()


def _draw(axes: Axes, traces: Sequence[Part], layout: Part) -> None:
    colors = _colors(layout)
    if "ternary" in layout:
        _frame(axes, layout["ternary"])
    second = axes.twinx() if "yaxis2" in layout else None
    stacked: dict[str, Any] = {}
    for place, trace in enumerate(traces):
        on = second if second is not None and trace.get("yaxis") == "y2" else axes
        if trace["type"] == "bar":
            _draw_bars(on, trace, stacked)
        elif trace["type"] == "heatmap":
            _draw_heat_map(on, trace)
        elif trace["type"] == "scatterternary":
            _draw_ternary(on, trace, layout["ternary"], colors)
        else:
            _draw_lines(on, trace, traces[place - 1] if place else None, colors, stacked)
    for note in layout.get("annotations", ()):
        _annotate(axes, note)
    if "ternary" not in layout:
        _set_axes(axes, layout)
    if second is not None:
        second.set_ylabel(_title(layout["yaxis2"]))
        second.set_ylim(*layout["yaxis2"]["range"])
    _add_keys(axes, second, colors, layout)


def _colors(layout: Part) -> tuple[LinearSegmentedColormap, Normalize] | None:
    """The shared colour axis, where the figure has one."""
    if "coloraxis" not in layout:
        return None
    axis = layout["coloraxis"]
    return _map(axis["colorscale"]), Normalize(axis["cmin"], axis["cmax"], clip=True)


def _map(scale: Sequence[Sequence[Any]]) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("scale", [(float(place), str(color)) for place, color in scale])


def _draw_bars(axes: Axes, trace: Part, stacked: dict[str, Any]) -> None:
    color = trace["marker"]["color"]
    if trace.get("orientation") == "h":
        axes.barh(list(trace["y"]), list(trace["x"]), color=list(color))
        for y, x, text in zip(trace["y"], trace["x"], trace["text"], strict=True):
            axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
        return
    heights = np.array(trace["y"], dtype=float)
    below = stacked.get("bars", np.zeros_like(heights))
    places = np.array(trace["x"], dtype=float)
    gap = float(np.min(np.diff(places))) if len(places) > 1 else 1.0
    axes.bar(places, heights, 0.8 * gap, below, color=color, label=_text(trace["name"]))
    stacked["bars"] = below + heights


def _draw_heat_map(axes: Axes, trace: Part) -> None:
    values = np.array([[np.nan if value is None else value for value in row] for row in trace["z"]], dtype=float)
    if not values.size:
        return
    scale = Normalize(trace["zmin"], trace["zmax"], clip=True)
    axes.imshow(values, cmap=_map(trace["colorscale"]), norm=scale, aspect="auto")
    for y, row in enumerate(trace["text"]):
        for x, text in enumerate(row):
            axes.text(x, y, _text(text), ha="center", va="center", fontsize=8, color="#111111")


def _draw_lines(axes: Axes, trace: Part, before: Part | None, colors: Any, stacked: dict[str, Any]) -> None:
    known = [(x, y) for x, y in zip(trace["x"], trace["y"], strict=True) if x is not None and y is not None]
    x, y = np.array(known, dtype=float).reshape(-1, 2).T
    line, mode = trace.get("line") or {}, trace.get("mode") or ""
    step = "post" if line.get("shape") == "hv" else None
    label = _label(trace)
    if trace.get("stackgroup"):
        below = stacked.get("areas", np.zeros_like(y))
        axes.fill_between(x, below, below + y, step="post", color=trace["fillcolor"], label=label, linewidth=0)
        stacked["areas"] = below + y
        return
    if trace.get("fill") == "tonexty" and before is not None:
        upper = np.array(before["y"], dtype=float)
        axes.fill_between(x, y, upper, step=step, color=_paint(trace["fillcolor"]), linewidth=0)  # type: ignore[arg-type]
    if "lines" in mode and line.get("width", 1):
        style = {"color": _paint(line["color"]), "linestyle": _DASHES.get(line.get("dash", ""), "-")}
        axes.plot(x, y, drawstyle="steps-post" if step else "default", linewidth=line.get("width", 1.5), **style)
        if label:
            axes.plot([], [], label=label, linewidth=line.get("width", 1.5), **style)
    if "markers" in mode and "marker" in trace:
        _draw_markers(axes, x, y, trace["marker"], colors, "" if "lines" in mode else label)


def _draw_ternary(axes: Axes, trace: Part, frame: Part, colors: Any) -> None:
    known = [point for point in zip(trace["a"], trace["b"], trace["c"], strict=True) if None not in point]
    x, y = _flat(np.array(known, dtype=float).reshape(-1, 3), float(frame["sum"])).T
    _draw_markers(axes, x, y, trace["marker"], colors, _label(trace))


def _draw_markers(axes: Axes, x: Any, y: Any, marker: Part, colors: Any, label: str) -> None:
    """Markers, those of one symbol at a time; open ones have an edge alone."""
    symbols = marker.get("symbol", "circle")
    symbols = np.array([symbols] * len(x) if isinstance(symbols, str) else list(symbols), dtype=object)
    paints = _paints(marker, len(x), colors)
    edge = (marker.get("line") or {}).get("color")
    size = (0.75 * float(marker.get("size", 6))) ** 2
    for symbol in dict.fromkeys(symbols):
        chosen = symbols == symbol
        is_open = str(symbol).endswith("-open")
        shape = _MARKERS[str(symbol).removesuffix("-open")]
        faces = "none" if is_open else paints[chosen]
        edges = paints[chosen] if is_open or edge is None else edge
        axes.scatter(
            x[chosen],
            y[chosen],
            size,
            marker=shape,
            facecolors=faces,
            edgecolors=edges,
            linewidths=1.4 if is_open else 0.7,
            zorder=3,
            clip_on=False,
            alpha=marker.get("opacity"),
        )
    if label:
        first = marker["color"] if isinstance(marker["color"], str) else INK
        symbol = symbols[0] if len(symbols) else marker.get("symbol", "circle")
        axes.scatter([], [], 40, marker=_MARKERS[str(symbol).removesuffix("-open")], color=first, label=label)


def _paints(marker: Part, count: int, colors: Any) -> Any:
    """A colour for each marker."""
    if isinstance(marker["color"], str):
        return np.array([to_rgba(marker["color"])] * count).reshape(-1, 4)
    scale, norm = colors
    return scale(norm(np.array(marker["color"], dtype=float))).reshape(-1, 4)


def _flat(points_N3: Any, total: float) -> Any:
    """Ternary coordinates a (top), b (left), c (right) in the plane."""
    corners_32 = np.array([(0.5, sqrt(3) / 2), (0.0, 0.0), (1.0, 0.0)])
    return points_N3 / max(total, 1e-12) @ corners_32


def _frame(axes: Axes, frame: Part) -> None:
    """The triangle, its grid of quarters, and its corners' names."""
    total = float(frame["sum"])
    corners = np.eye(3) * total
    for share in (0.25, 0.5, 0.75):
        for left, right, apex in ((1, 2, 0), (0, 2, 1), (0, 1, 2)):
            ends = [corners[left] * (1 - share) + corners[apex] * share, corners[right] * (1 - share)]
            ends[1] = ends[1] + corners[apex] * share
            axes.plot(*_flat(np.array(ends), total).T, color="#DDDDDD", linewidth=0.7, zorder=0)
    axes.plot(*_flat(corners[[0, 1, 2, 0]], total).T, color="#9A9A9A", linewidth=1, zorder=1)
    for corner, (axis, align, lift) in enumerate((("a", "center", 8), ("b", "center", -16), ("c", "center", -16))):
        place = tuple(_flat(corners[corner : corner + 1], total)[0])
        name = f"{_title(frame[f'{axis}axis'])}: {total:.3g}"
        axes.annotate(name, place, (0, lift), textcoords="offset points", ha=align, fontsize=10)
    axes.set_aspect("equal")
    axes.set_axis_off()


def _annotate(axes: Axes, note: Part) -> None:
    """Words at a place of the figure, or of its axes."""
    place = axes.transAxes if note.get("xref") == "paper" else axes.transData
    sides = {"left": "left", "right": "right"}
    heights = {"bottom": "bottom", "top": "top"}
    axes.text(
        note["x"],
        note["y"],
        _text(note["text"]),
        transform=place,
        ha=sides.get(note.get("xanchor", ""), "center"),
        va=heights.get(note.get("yanchor", ""), "center"),
        fontsize=10,
    )


def _set_axes(axes: Axes, layout: Part) -> None:
    for name, axis in (("x", layout.get("xaxis", {})), ("y", layout.get("yaxis", {}))):
        if axis.get("visible") is False:
            axes.set_axis_off()
        axes.set(**{f"{name}label": _title(axis)})
        if axis.get("type") == "log":
            axes.set(**{f"{name}scale": "log"})
        elif "range" in axis:
            axes.set(**{f"{name}lim": tuple(axis["range"])})
        elif axis.get("rangemode") == "tozero":
            axes.set(**{f"{name}lim": (0, None)})
        if "ticktext" in axis:
            turn = axis.get("tickangle") or 0
            texts = [_text(text) for text in axis["ticktext"]]
            place = {"rotation": -turn, "ha": "right", "rotation_mode": "anchor"} if name == "x" and turn else {}
            getattr(axes, f"set_{name}ticks")(list(axis["tickvals"]), texts, **place)
        if axis.get("autorange") == "reversed" and not axes.images:
            axes.invert_yaxis()
        if axis.get("scaleanchor"):
            axes.set_aspect("equal")
    if not axes.images:
        axes.grid(color="#E3E3E3", linewidth=0.6, zorder=0)
        axes.set_axisbelow(True)


def _add_keys(axes: Axes, second: Axes | None, colors: Any, layout: Part) -> None:
    """The legend, and the bar of the shared colours."""
    legends = [side.get_legend_handles_labels() for side in (axes, second) if side is not None]
    handles = [handle for handles, _ in legends for handle in handles]
    labels = [label for _, labels in legends for label in labels]
    if labels:
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
    if colors is not None:
        scale, norm = colors
        title = _text(layout["coloraxis"]["colorbar"]["title"]["text"])
        axes.figure.colorbar(mpl.cm.ScalarMappable(norm, scale), ax=axes, label=title, shrink=0.7)


def _label(trace: Part) -> str:
    return _text(trace["name"]) if trace.get("name") and trace.get("showlegend") is not False else ""


def _title(axis: Part) -> str:
    title = axis.get("title") or {}
    return _text(title if isinstance(title, str) else title.get("text") or "")


def _text(text: str) -> str:
    """Plotly's text as matplotlib's, which reads $TeX$."""
    return unescape(text.replace("<br>", "\n")).replace("$", r"\$")


def _paint(color: str) -> Any:
    """A colour; plotly writes rgba(1,2,3,0.5)."""
    if match := re.match(r"rgba\((\d+),(\d+),(\d+),([\d.]+)\)", color):
        red, green, blue, opacity = map(float, match.groups())
        return red / 255, green / 255, blue / 255, opacity
    return color
