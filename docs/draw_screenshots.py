"""Take the screenshots in dashboards/images of a finished quickstart, in the system's Chromium.

    python docs/draw_screenshots.py [QUICKSTART]

QUICKSTART is its folder, ./quickstart unless given.  Needs the extra `browser`.  mixing.webp, which shows
`make headline`, is not among them.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import mlflow
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from dem_opt.config import load
from dem_opt.dashboards import servers
from dem_opt.tracking.urls import mlflow_run

IMAGES = Path(__file__).parents[1] / "dashboards/images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu"]
QUALITY = 82
"""Of WebP, from 0 to 100."""

DESKTOP, PHONE = {"width": 1000, "height": 1350}, {"width": 390, "height": 1200}


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    path = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


def shot(page: Page) -> Image.Image:
    """The visible part of a page."""
    return Image.open(BytesIO(page.screenshot())).convert("RGB")


def keep(image: Image.Image, name: str, width: int) -> None:
    """Save a picture as WebP of this width in pixels."""
    size = width, round(image.height * width / image.width)
    image.resize(size, Image.Resampling.LANCZOS).save(IMAGES / f"{name}.webp", quality=QUALITY)


def open_report(chromium: Any, report: Path, **options: Any) -> Page:
    """Open a report with all of its figures drawn."""
    page = chromium.new_page(reduced_motion="reduce", **options)
    page.goto(report.absolute().as_uri())
    page.wait_for_function("() => document.querySelectorAll('.main-svg').length > 3")
    page.wait_for_timeout(2000)
    return page


def scroll_to(page: Page, heading: str) -> None:
    """Bring a heading to the top of the window."""
    page.get_by_role("heading", name=heading, exact=True).evaluate("heading => heading.scrollIntoView()")
    page.wait_for_timeout(500)


def take_reports(chromium: Any, report: Path) -> None:
    """The report's first screen, its section on the search, and three screens of it on a phone in dark mode."""
    page = open_report(chromium, report, viewport=DESKTOP)
    keep(shot(page), "report", 900)
    page.set_viewport_size({"width": 900, "height": 2115})
    scroll_to(page, "Search")
    keep(shot(page), "report-search", 800)
    phone = open_report(chromium, report, viewport=PHONE, color_scheme="dark", device_scale_factor=2)
    screens = [shot(phone)]
    for heading in ("Search", "Distributions"):
        scroll_to(phone, heading)
        screens.append(shot(phone))
    keep(side_by_side(screens), "report-phone", 1000)


def side_by_side(screens: Sequence[Image.Image]) -> Image.Image:
    """Screens of one size in a row, with a gap between them."""
    width, height, gap = *screens[0].size, 24
    row = Image.new("RGB", (len(screens) * (width + gap) - gap, height), "gray")
    for place, screen in enumerate(screens):
        row.paste(screen, (place * (width + gap), 0))
    return row


def take_dashboards(chromium: Any, study: Path) -> None:
    """The study's figures and note in Optuna Dashboard, and its runs in MLflow."""
    config = load(study)
    client = mlflow.MlflowClient(config.tracking.uri, config.tracking.uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment).experiment_id
    with servers.running(config.storage, config.tracking.uri, config.output / "artifacts") as addresses:
        page = chromium.new_page(viewport={"width": 1400, "height": 2685}, reduced_motion="reduce")
        page.goto(f"{addresses.optuna}dashboard/studies/1")
        page.get_by_text("Trials on the simplex").first.wait_for()
        page.wait_for_timeout(5000)
        keep(shot(page), "optuna-dashboard", 1000)
        page.set_viewport_size({"width": 900, "height": 640})
        page.goto(f"{addresses.optuna}dashboard/studies/1/note")
        page.get_by_text("nats per token").first.wait_for()
        keep(shot(page), "study-note", 900)
        parents = client.search_runs([experiment], "tags.`dem_opt.study` = 'quickstart/simplex-gp'")
        page.set_viewport_size({"width": 1400, "height": 980})
        page.goto(mlflow_run(addresses.mlflow, experiment, parents[0].info.run_id))
        page.get_by_text("best of simplex-gp").first.wait_for()
        page.get_by_role("button", name="Close").first.click()  # MLflow's assistant
        page.wait_for_timeout(1000)
        keep(shot(page), "mlflow-study", 1000)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart")
    with browser() as chromium:
        take_reports(chromium, folder / "runs/quickstart/report.html")
        take_dashboards(chromium, folder / "study.yaml")
