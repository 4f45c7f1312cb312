"""Pages in a real browser: both dashboards on a finished and on a running study, and the report offline.

`make browser` runs it; it is skipped where there is no Chromium or no Playwright.  Screenshots are kept in the folder
that SCREENSHOTS names, build/screenshots unless it is given.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import worlds
from summaries import CASES, a_summary

from dem_opt.config import load
from dem_opt.dashboards import figures, html_report, servers
from dem_opt.study import Study
from dem_opt.tracking.urls import mlflow_run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning", "ignore::ResourceWarning"),
]

NAMES = ("code", "math", "prose")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PATIENCE = 60_000
"""Milliseconds that a page is waited for."""

TITLES = {
    "best-so-far": "Best so far",
    "simplex": "Trials on the simplex",
    "best-over-time": "Coefficients of the best trial over time",
    "price": "Price of sharing one model",
}
"""Of figures in Optuna Dashboard, by name."""

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SEEN = Path(os.environ.get("SCREENSHOTS", "build/screenshots"))

DRAWN = """ids => ids.map(id => {
  const plot = document.getElementById(id), box = plot.getBoundingClientRect();
  const marks = plot.querySelectorAll(
    '.barlayer path, .scatterlayer path, .heatmaplayer image, .hm image, .annotation, .ternarylayer path'
  );
  return [id, box.width > 100 && box.height > 100, marks.length];
})"""

OVERLAPS = """() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => {
  const kinds = '.xtick text, .ytick text, .annotation-text, .gtitle, .xtitle, .ytitle, .legendtext, .bartext';
  const isSlanted = text => /rotate\\((?!0[,)]|-?90|360)/.test(text.getAttribute('transform') || '');
  const texts = [...plot.querySelectorAll(kinds)].filter(text => text.textContent.trim() && !isSlanted(text));
  const boxes = texts.map(text => text.getBoundingClientRect());
  const apart = (a, b) =>
    a.right <= b.left + 1 || b.right <= a.left + 1 || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
  return boxes.flatMap((one, i) => boxes.slice(i + 1).flatMap((other, k) =>
    apart(one, other) ? [] : [`${plot.id}: ${texts[i].textContent} / ${texts[i + 1 + k].textContent}`]));
})"""
"""Texts of a figure that stand on each other; slanted ones are not asked, as their boxes are not their shapes."""


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system's."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make browser")
    path = next((program for name in BROWSERS if (program := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def finished(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three distributions that ended, with its champion exported; none without a browser."""
    folder = tmp_path_factory.mktemp("finished")
    path = worlds.racing_study(folder)
    for words in (["run"], ["export", "--out", str(folder / "best")]):
        subprocess.run(command(*words, str(path)), check=True, stdout=subprocess.DEVNULL)
    return path


@pytest.fixture(scope="session")
def dashboards(finished: Path) -> Iterator[tuple[Path, servers.Addresses]]:
    """The finished study and its dashboards."""
    config = load(finished)
    with servers.running(config.storage, config.tracking.uri, config.output / "artifacts") as addresses:
        yield finished, addresses


def command(*words: str) -> list[str]:
    return [sys.executable, str(Path(__file__).parents[1] / "browser_study.py"), *words]


class Visit:
    """A page, with what its console complained of."""

    def __init__(self, browser: Any, size: str = "desktop", scheme: str = "light", offline: bool = False) -> None:
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=offline, reduced_motion="reduce"
        )
        self.page, self.errors, self.requests = context.new_page(), [], []
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def keep(self, name: str, whole: bool = False) -> None:
        """A screenshot, to be looked at."""
        SEEN.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SEEN / f"{name}.png", full_page=whole)

    def close(self) -> None:
        self.page.context.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens pages, and closes them at the end."""
    opened: list[Visit] = []

    def open_page(*words: Any, **how: Any) -> Visit:
        opened.append(Visit(browser, *words, **how))
        return opened[-1]

    yield open_page
    for view in opened:
        view.close()


def study_pages(address: str) -> str:
    return f"{address}dashboard/studies/1"


def see_study(seen: Visit, address: str, shot: str) -> None:
    """Optuna Dashboard shows the coefficients by name, and our plots are drawn."""
    seen.page.goto(study_pages(address))
    for title in (
        "Best so far",
        "Trials on the simplex",
        "Coefficients of the best trial over time",
        "Price of sharing one model",
    ):
        seen.page.get_by_text(title).first.wait_for()
    drawn = "() => document.querySelectorAll('.js-plotly-plot .scatterlayer path, .js-plotly-plot .hm image').length"
    seen.page.wait_for_function(f"({drawn})() > 5")
    assert all(seen.page.get_by_text(name, exact=True).count() for name in NAMES)
    seen.keep(shot, whole=True)
    seen.page.goto(f"{study_pages(address)}/note")
    seen.page.get_by_text("mean NLL over distributions").wait_for()
    assert seen.page.get_by_text("nats per token").count()


def test_optuna_dashboard_on_a_finished_study(dashboards: tuple[Path, servers.Addresses], visit: Any) -> None:
    path, addresses = dashboards
    seen = visit()
    see_study(seen, addresses.optuna, "optuna-finished")
    assert seen.page.get_by_text(f"ended after all {load(path).search.trials} planned trials").count()
    assert "/runs/" in seen.page.get_by_text("This search in MLflow").get_attribute("href")
    seen.keep("optuna-note")
    seen.page.goto(f"{study_pages(addresses.optuna)}/trials?numbers=7")
    link = seen.page.get_by_text("Trial 7 in MLflow")
    link.wait_for()
    seen.page.goto(link.get_attribute("href"))
    seen.page.get_by_text("trial-7").first.wait_for()
    assert seen.page.get_by_text("Trial 7 in Optuna Dashboard").count()


def test_mlflow_shows_parent_children_and_champion(dashboards: tuple[Path, servers.Addresses], visit: Any) -> None:
    import mlflow

    path, addresses = dashboards
    config = load(path)
    client = mlflow.MlflowClient(config.tracking.uri, config.tracking.uri)
    (parent,) = [
        run
        for run in client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
        if "dem_opt.study" in run.data.tags
    ]
    seen = visit()
    seen.page.goto(mlflow_run(addresses.mlflow, parent.info.experiment_id, parent.info.run_id))
    seen.page.get_by_role("button", name="Load more").first.click()  # ten child runs are shown before
    for words in ("trial-9", "winner without", "mean NLL over distributions", "This search in Optuna Dashboard"):
        seen.page.get_by_text(words).first.wait_for()
    seen.keep("mlflow-parent")
    seen.page.goto(f"{addresses.mlflow}#/experiments/{parent.info.experiment_id}/runs")
    seen.page.get_by_text("tiny/simplex-gp").first.wait_for()
    seen.keep("mlflow-runs")
    seen.page.goto(f"{addresses.mlflow}#/models/tiny")
    seen.page.get_by_text("@ champion").first.wait_for()
    seen.keep("mlflow-champion")


def test_every_page_names_one_winner(dashboards: tuple[Path, servers.Addresses], visit: Any) -> None:
    """Though the estimate of a trial that was stopped early is lower."""
    path, addresses = dashboards
    summary = Study.load(path).summary()
    (records,), winner = summary.trials.values(), summary.winner
    value = winner.objective["search"]
    assert min(record.objective for record in records if record.is_partial) < value
    (number,) = (r.number for r in records if r.coefficients == winner.coefficients and not r.is_partial)
    seen = visit()
    seen.page.goto(study_pages(addresses.optuna))
    seen.page.get_by_text(f"Best Trial (number={number})").wait_for()
    assert seen.page.get_by_text(str(value), exact=True).count()
    seen.keep("winner-optuna")
    experiment = addresses.mlflow + "#/experiments/1/runs"
    query = {
        "orderByKey": "metrics.`objective_nll`",
        "orderByAsc": "true",
        "searchFilter": "tags.`dem_opt.trial` LIKE '%'",
    }
    seen.page.goto(f"{experiment}?{urlencode(query)}")
    first = seen.page.locator(".ag-row[row-index='0']")
    first.get_by_text(f"trial-{number}", exact=True).first.wait_for()
    seen.keep("winner-mlflow")
    seen.page.goto(f"{addresses.mlflow}#/models/tiny/versions/1")
    seen.page.get_by_text(f"{value:.4f}").first.wait_for()
    seen.keep("winner-model")
    seen.page.goto(page_of(path).as_uri())
    assert f"{winner.label}" in seen.page.locator("main, body").first.inner_text()
    assert seen.page.get_by_text(f"{value:.4f}").count()


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_running_study_is_seen(tmp_path: Path, visit: Any, request: pytest.FixtureRequest, database: str) -> None:
    sections = {} if database == "sqlite" else {"storage": request.getfixturevalue("postgres_url")}
    search = {"algorithm": "simplex-gp", "trials": 200, "patience": None}
    path = worlds.study(tmp_path, NAMES, search=search, **sections)
    with subprocess.Popen(
        command("run", str(path)), env={**os.environ, "PAUSE": "0.2"}, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if " 20 of 200 trials" in line:
                break
        try:
            config = load(path)
            with servers.running(config.storage, config.tracking.uri) as addresses:
                seen = visit()
                see_study(seen, addresses.optuna, f"optuna-running-{database}")
                assert seen.page.get_by_text("trials, running").count()
                assert running.poll() is None, "the study was still running"
        finally:
            running.send_signal(signal.SIGINT)
            time.sleep(0.5)
            running.send_signal(signal.SIGINT)
            running.stdout.read()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_of_a_study_is_whole_offline(finished: Path, visit: Any, scheme: str, size: str) -> None:
    seen = visit(size, scheme, offline=True)
    see_report(seen, page_of(finished), f"report-{scheme}-{size}")
    ground = seen.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_on_paper_is_light_and_cuts_no_figure(finished: Path, visit: Any, scheme: str) -> None:
    seen = visit("desktop", scheme, offline=True)
    seen.page.goto(page_of(finished).as_uri())
    seen.page.wait_for_function("() => document.querySelectorAll('.main-svg').length > 3")
    seen.page.emulate_media(media="print")
    assert seen.page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    SEEN.mkdir(parents=True, exist_ok=True)
    seen.page.pdf(path=SEEN / f"report-{scheme}.pdf", format="A4", print_background=True)


def page_of(path: Path) -> Path:
    """A study's report, made once."""
    page = path.parent / "report.html"
    if not page.exists():
        subprocess.run(command("report", str(path), "--out", str(page)), check=True, stdout=subprocess.DEVNULL)
    return page


DRAWN_CASES = [(case, "desktop") for case in ("one", "two", "four", "failures only", "one trial")]
DRAWN_CASES += [("hostile", "phone"), ("twelve", "phone"), ("twelve", "desktop")]


@pytest.mark.parametrize(("case", "size"), DRAWN_CASES)
def test_the_report_of_any_study_is_drawn(tmp_path: Path, visit: Any, case: str, size: str) -> None:
    summary = a_summary(**CASES[case])  # type: ignore[arg-type]
    html_report.write_report(summary, tmp_path / "report.html")
    seen = visit(size, offline=True)
    see_report(
        seen, tmp_path / "report.html", f"report-{case.replace(' ', '-')}-{size}", list(figures.all_figures(summary))
    )


def see_report(seen: Visit, page: Path, shot: str, wanted: list[str] | None = None) -> None:
    """No request but for the file, no complaint, nothing wider than the window, every figure drawn, no text on text."""
    seen.page.goto(page.as_uri())
    seen.page.wait_for_function("() => document.querySelectorAll('.main-svg').length > 3")
    ids = seen.page.evaluate("() => Object.keys(figures)")
    assert ids == (wanted or ids)
    for name, has_size, marks in seen.page.evaluate(DRAWN, ids):
        assert has_size and marks, name
    seen.keep(shot, whole=True)
    assert [url for url in seen.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert seen.errors == []
    assert seen.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert seen.page.evaluate(OVERLAPS) == []
    assert seen.page.evaluate("() => [...document.querySelectorAll('[role=img]')].every(one => one.ariaLabel)")
