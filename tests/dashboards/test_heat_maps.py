"""Figures and pages of made-up studies."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from summaries import CASES, HOSTILE, a_summary, a_trial, of_trials

from dem_opt.analysis.regret import compare
from dem_opt.dashboards import figures, heat_maps, html_report, tables
from dem_opt.dashboards.regret_plots import FLOOR, FREE, best_so_far, comparison_figure
from dem_opt.dashboards.simplex_map import barycentric, simplex_map
from dem_opt.dashboards.style import ALGORITHM_COLORS, MAX_POINTS, color
from dem_opt.errors import InputError
from dem_opt.simplex import Space
from dem_opt.types import ResultRow, Score, Summary

Case = dict[str, object]
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Page(HTMLParser):
    """A page as a browser sees it: elements, their attributes, and text by element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def texts_of(value: object) -> list[str]:
    """Every string in a figure's JSON, but for its words in `meta`, which plotly does not draw."""
    if isinstance(value, dict):
        return [text for key, each in value.items() if key != "meta" for text in texts_of(each)]
    if isinstance(value, list):
        return [text for each in value for text in texts_of(each)]
    return [value] if isinstance(value, str) else []


@cases
def test_every_figure_builds_with_units_and_words(case: Case) -> None:
    summary = a_summary(**case)
    made = figures.all_figures(summary)
    assert ("comparison" in made) == (len(summary.trials) > 1)
    for name, figure in made.items():
        assert json.loads(figure.to_json())["data"] or figure.layout.annotations, name
        assert figure.layout.title.text
        assert figure.layout.meta["reading"] and figure.layout.meta["description"]
        for axis in (figure.layout.xaxis, figure.layout.yaxis):
            title = axis.title.text or ""
            assert "nats per token" in title or not re.search("NLL|regret", title)


@cases
def test_nothing_a_user_wrote_is_read_as_markup(case: Case) -> None:
    """plotly reads tags in every text, and %{...} in templates."""
    for figure in figures.all_figures(a_summary(**case)).values():
        for text in texts_of(json.loads(figure.to_json())):
            assert not re.search(r"<(?!br>|extra>|/extra>)", text), text
        for trace in json.loads(figure.to_json())["data"]:
            templates = [text for key, text in trace.items() if "template" in key]
            assert all("script" not in text and "$" not in text for text in templates)


PAGES: dict[str, Callable[[Summary], str]] = {
    "report": html_report.render,
    "comparison": lambda summary: html_report.render_comparison(summary, compare(summary)),
}


@pytest.mark.parametrize("kind", PAGES)
@cases
def test_a_page_is_whole_and_asks_the_network_for_nothing(case: Case, kind: str) -> None:
    summary = a_summary(**case)
    text = PAGES[kind](summary)
    assert len(text) < 6_000_000
    page = Page(text)
    assert not [attrs for _, attrs in page.tags if {"src", "href", "srcset", "action", "data"} & set(attrs)]
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not [tag for tag, _ in page.tags if tag in ("img", "b", "iframe", "link")]
    plots = [attrs for _, attrs in page.tags if attrs.get("role") == "img"]
    drawn = list(figures.all_figures(summary)) if kind == "report" else ["comparison"]
    assert sorted(str(plot["id"]) for plot in plots) == sorted(drawn)
    assert all(plot["aria-label"] for plot in plots)
    embedded = next(text for text in page.texts if text.startswith('{"'))
    assert set(json.loads(embedded)) == set(drawn)
    written = " ".join(page.texts)
    assert summary.study in written and all(reason in written for reason in summary.stopped.values())
    if kind == "report":
        assert all(name in written for name in summary.weights)
        assert all(row[1] in written for split in tables.SPLIT_NAMES for row in tables.final_table(summary, split).rows)
        assert all(row[1] in written and row[-1] in written for row in tables.top_table(summary).rows)


def test_a_report_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.html"
    summary = a_summary(("a", "b"))
    html_report.write_report(summary, path)
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == html_report.render(summary)


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="report can't be written"):
        html_report.write_report(a_summary(("a", "b")), tmp_path / "file" / "report.html")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("text", ["", "<!doctype html>\n<title>mine</title>", None])
def test_a_report_replaces_a_report_and_nothing_else(tmp_path: Path, text: str | None) -> None:
    path, summary = tmp_path / "report.html", a_summary(("a", "b"))
    html_report.write_report(summary, path)
    html_report.write_report(summary, path)
    path.unlink()
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(InputError) as refused:
        html_report.write_report(summary, path)
    assert refused.value.where == path
    assert path.is_dir() if text is None else path.read_text() == text


def test_an_algorithm_has_one_colour_whatever_its_seed() -> None:
    assert len(set(ALGORITHM_COLORS.values())) == len(ALGORITHM_COLORS) == 7
    for algorithm, its in ALGORITHM_COLORS.items():
        assert color(algorithm) == color(f"{algorithm}@1") == color(f"{algorithm}@12") == its


def points(trace: Any) -> list[Any]:
    return [None if trace[axis] is None else list(trace[axis]) for axis in ("x", "y") if axis in trace]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_general_corpora_have_no_coefficients(count: int) -> None:
    summary = a_summary(("a", "b", "c", "d")[:count])
    general = replace(summary, weights={**summary.weights, "web": 0.0})
    plain, drawn = figures.all_figures(summary), figures.all_figures(general)
    for name in ("coefficients", "best-so-far", "simplex"):
        # The words of the objective differ: it is a weighted mean, in which the general corpus counts for nothing.
        assert [points(trace) for trace in drawn[name].data] == [points(trace) for trace in plain[name].data]
    assert len(drawn["change"].data[0].x) == count + 1


def test_best_so_far_counts_violations_with_their_penalty() -> None:
    summary = a_summary(("a", "b"))
    records = {name: tuple(replace(each, violation=0.1) for each in trials) for name, trials in summary.trials.items()}
    before, after = (best_so_far(each).data for each in (summary, replace(summary, trials=records)))
    for lower, higher in zip(before, after, strict=True):
        assert np.asarray(higher.y) == pytest.approx(np.asarray(lower.y) + 1.0, abs=1e-5)


def test_best_so_far_never_rises_and_ends_at_the_best_whole_trial() -> None:
    summary = a_summary(("a", "b", "c"), trials=1500)
    for trace, records in zip(best_so_far(summary).data, summary.trials.values(), strict=True):
        whole = [record.objective for record in records if record.objective is not None and not record.is_partial]
        assert len(trace.x) <= MAX_POINTS and trace.x[0] == 1
        assert trace.x[-1] == pytest.approx(sum(record.forwards for record in records), abs=1e-3)
        assert np.all(np.diff(trace.y) <= 0) and trace.y[-1] == pytest.approx(min(whole), abs=1e-6)


def test_what_costs_nothing_is_drawn_on_the_axis() -> None:
    """A logarithmic axis has no 0; the words say where known composites are.  Without them nothing is said."""
    known = [replace(a_trial(number, 4.0 - number), forwards=0.0) for number in range(2)]
    paid = [a_trial(2, 2.0), a_trial(3, 1.0)]
    changed, fresh = (of_trials({"tpe": trials}) for trials in ([*known, *paid], paid))
    assert best_so_far(changed).data[0].x == (FREE, FREE, 1.0, 2.0)
    assert comparison_figure(compare(changed)).data[0].x == (FREE, 1.0, 2.0)
    for draw in (best_so_far, lambda summary: comparison_figure(compare(summary))):
        assert draw(fresh).data[0].x == (1.0, 2.0)
        assert f"drawn at {FREE} FE" in str(draw(changed).layout.meta)
        assert "drawn at 0.1" not in str(draw(fresh).layout.meta)


def test_a_legend_names_each_algorithm_once() -> None:
    """Three runs of one algorithm, one of another, and one that has nothing to show."""
    runs = {f"tpe@{seed}": [a_trial(0, 2.0 + seed)] for seed in (1, 2, 3)}
    summary = of_trials(runs | {"grid": [a_trial(0, 2.0)], "cmaes": [a_trial(0, None)]})
    for figure in (best_so_far(summary), comparison_figure(compare(summary))):
        named = [trace.name for trace in figure.data if trace.showlegend is not False]
        assert len(named) == 2 and named[0].startswith("tpe") and named[1] == "grid (mean over orders)"


def test_the_comparison_draws_medians_in_bands_of_quartiles_above_the_floor() -> None:
    """Regrets of three runs after one trial: 0, 1, 3; median 1, quartiles 0.5 and 2.  The grid alone has no band."""
    runs = {"tpe": [a_trial(0, 5.0)], "tpe@1": [a_trial(0, 6.0)], "tpe@2": [a_trial(0, 8.0)]}
    upper, lower, median, grid = comparison_figure(compare(of_trials(runs | {"grid": [a_trial(0, 5.0)]}))).data
    assert (upper.y[0], lower.y[0], median.y[0]) == (2.0, 0.5, 1.0)
    assert lower.fill == "tonexty" and median.line.color == color("tpe") == upper.line.color
    assert grid.y == (FLOOR,) and grid.line.dash == "dash"


def test_the_map_keeps_the_best_of_many_trials() -> None:
    summary = a_summary(("a", "b", "c", "d"), trials=1400)
    traces = simplex_map(summary).data
    drawn = {trace.legendgroup: trace.marker for trace in traces if trace.marker.coloraxis}
    for algorithm in ("grid", "new"):
        whole = sorted(
            record.objective
            for record in summary.trials[algorithm]
            if record.objective is not None and not record.is_partial
        )
        assert len(drawn[algorithm].color) == MAX_POINTS
        assert drawn[algorithm].color[-1] == pytest.approx(whole[0], abs=1e-6)
    assert drawn["grid"].color[0] == pytest.approx(whole_worst(summary, "grid"), abs=1e-6)


def whole_worst(summary: Summary, run: str) -> float:
    return max(record.objective for record in summary.trials[run] if record.objective is not None)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_map_opens_the_markers_of_trials_that_were_stopped(count: int) -> None:
    """Runs of one algorithm are drawn together; stopped trials lie below."""
    summary = a_summary(("a", "b", "c", "d")[:count], trials=20)
    stopped = sum(record.is_partial for run in ("simplex-gp", "simplex-gp@1") for record in summary.trials[run])
    drawn = [trace for trace in simplex_map(summary).data if trace.hovertext and trace.legendgroup == "simplex-gp"]
    (points,) = drawn
    assert stopped == 8 and len(points.hovertext) == 32
    assert list(points.marker.symbol) == ["circle-open"] * stopped + ["circle"] * (32 - stopped)
    assert ["some of the windows" in text for text in points.hovertext] == [True] * stopped + [False] * (32 - stopped)


def test_the_polygon_puts_vertices_on_its_corners_and_the_centroid_in_the_middle() -> None:
    names = ("a", "b", "c", "d")
    space = Space(names)
    corners = np.array([(-1.0, 1.0), (1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)])
    points = barycentric([*space.vertices(), space.centroid()], names, corners)
    assert points == pytest.approx(np.vstack([corners, [[0.0, 0.0]]]))


@pytest.mark.parametrize("count", [3, 4])
def test_the_base_stands_in_the_middle_of_the_map(count: int) -> None:
    """It has no proportions."""
    figure = simplex_map(a_summary(("a", "b", "c", "d")[:count], total=(0, 2), runs=("random",)))
    (points,) = [trace for trace in figure.data if trace.hovertext and trace.legendgroup == "random"]
    place = ["base only" in text for text in points.hovertext].index(True)
    at = [values[place] for values in ((points.a, points.b, points.c) if count == 3 else (points.x, points.y))]
    assert at == pytest.approx([1 / 3] * 3 if count == 3 else [0, 0])
    assert "in the middle" in figure.layout.meta["reading"]


def test_the_heat_map_shows_the_change_against_the_base() -> None:
    """Base 2.5 on both, the composite 2.5 and 1.5: changes 0 and -1; colours saturate at the gain of 1."""
    high, low = Score((25.0,), (10,)), Score((15.0,), (10,))
    results = (
        ResultRow(
            label="base",
            role="base",
            algorithm="",
            coefficients=None,
            scores={"held_out": {"a": high, "b": high}},
            objective={},
            evaluations=1,
            forward_tokens=1,
            seconds=0.0,
        ),
        ResultRow(
            label="best",
            role="best",
            algorithm="grid",
            coefficients=None,
            scores={"held_out": {"a": high, "b": low}},
            objective={},
            evaluations=1,
            forward_tokens=1,
            seconds=0.0,
        ),
    )
    heat = heat_maps.change_heat_map(
        Summary(study="s", weights={"a": 1.0, "b": 1.0}, results=results, margins=(), trials={}, facts={})
    ).data[0]
    assert [list(row) for row in heat.z] == [[0.0, -1.0]] and [list(row) for row in heat.text] == [["+0.000", "-1.000"]]
    assert (heat.zmin, heat.zmax) == (-1.0, 1.0)


def test_while_a_study_runs_heat_maps_show_the_search_split_and_none_is_blank() -> None:
    """Before the end only the search split is scored, and nothing without a distribution."""
    whole = a_summary(("code", "math", "prose"))
    known = tuple(replace(row, scores={"search": row.scores["search"]}) for row in whole.results)
    running = replace(whole, results=known, left_out=tuple(replace(row, scores={}) for row in whole.left_out))
    drawn = figures.all_figures(running)
    assert whole.left_out and "worth" in figures.all_figures(whole) and "worth" not in drawn
    for name in ("change", "price"):
        assert "search split" in drawn[name].layout.title.text
        assert all(any(value is not None for value in row) for row in drawn[name].data[0].z) and drawn[name].data[0].z


def test_hostile_names_stay_text_in_both_pages() -> None:
    """A study, a distribution, a label and a failure's reason that would be elements."""
    summary = a_summary(HOSTILE, study=HOSTILE[1], label=HOSTILE[0])
    for render in PAGES.values():
        text = render(summary)
        body = text[: text.index('<script type="application/json"')]
        assert HOSTILE[0] not in text and HOSTILE[1] not in text and "&lt;script&gt;alert(1)" in body


@pytest.mark.parametrize("count", [1, 24, 25, 80, 81, 300])
def test_rows_of_a_heat_map_have_numbers_where_these_have_room_and_names_that_do_not_overlap(count: int) -> None:
    values = [[0.1 * number, -0.2] for number in range(count)]
    names = [f"layers.{number}.post_attention_layernorm" for number in range(count)]
    texts = {"title": "title", "reading": "reading", "if_empty": "empty"}
    table = heat_maps.HeatMap(rows=names, columns=["code", "math"], values=values, limit=1.0, length=40, **texts)
    figure = heat_maps.draw(table)
    (trace,) = figure.data
    row = (figure.layout.height - heat_maps.FRAME) / count
    has_numbers = trace.text is not None
    assert has_numbers == (trace.texttemplate is not None) == (not trace.showscale) == (row >= 16)
    shown = figure.layout.yaxis.tickvals
    assert shown[0] == 0 and all((after - before) * row >= 16 for before, after in pairwise(shown))
    assert figure.layout.yaxis.ticktext[0] == "layers.0.post_attention_layernorm"
