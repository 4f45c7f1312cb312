"""The same figures for papers: every figure of every kind of study is drawn, with its texts, and nothing else is."""

import io
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from summaries import CASES, a_summary

from dem_opt.dashboards.figures import all_figures
from dem_opt.dashboards.static_export import FORMATS, RECORD, image, write_figures
from dem_opt.errors import InputError


@pytest.mark.parametrize("case", ["one", "two", "three", "twelve", "hostile", "one trial", "failures only"])
def test_every_figure_is_a_picture_that_is_not_blank(case: str) -> None:
    for name, figure in all_figures(a_summary(**CASES[case])).items():
        pixels = np.asarray(Image.open(io.BytesIO(image(figure, dots=40))).convert("RGB"))
        assert pixels.shape[1] >= 280 and pixels.shape[0] >= 70
        assert (pixels < 250).any(axis=2).mean() > 0.005, name


def test_an_svg_is_the_same_every_time_and_asks_nobody() -> None:
    figure = all_figures(a_summary(**CASES["four"]))["simplex"]
    first = image(figure, "svg")
    assert first == image(figure, "svg")
    ElementTree.fromstring(first)
    links = re.findall(rb'(?:href|src)="([^#][^"]*)"', first)
    assert not [link for link in links if not link.startswith(b"data:")]


def test_a_heat_map_has_the_colours_of_the_page() -> None:
    """The middle of the palette is light grey, which is what a change of 0 has."""
    figure = all_figures(a_summary(**CASES["three"]))["vectors"]
    pixels = np.asarray(Image.open(io.BytesIO(image(figure, dots=60))).convert("RGB")).reshape(-1, 3)
    assert (np.abs(pixels.astype(int) - (0x7C, 0xC4, 0xA4)).max(axis=1) <= 2).mean() > 0.05, "cosines of 1 are green"


def test_figures_are_written_in_both_formats(tmp_path: Path) -> None:
    made = all_figures(a_summary(**CASES["two"]))
    written = write_figures({name: made[name] for name in ("coefficients", "worth")}, tmp_path / "figures")
    assert [path.name for path in written] == [
        f"{name}.{kind}" for name in ("coefficients", "worth") for kind in FORMATS
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--figures: can't be written"):
        write_figures(made, tmp_path / "file")


FOREIGN = {
    "a figure of the user's": lambda folder: (folder / "worth.svg").write_text("mine"),
    "an edited figure": lambda folder: (folder / "coefficients.svg").write_text("mine"),
    "a link": lambda folder: (folder / "worth.png").symlink_to(folder / "note.txt"),
    "a folder": lambda folder: (folder / "worth.png").mkdir(),
    "another record": lambda folder: (folder / RECORD).write_text("mine"),
}


@pytest.mark.parametrize("kind", [None, *FOREIGN])
def test_only_figures_that_were_written_here_are_replaced(tmp_path: Path, kind: str | None) -> None:
    """Written twice into a folder with other files; the second time there is one figure more."""
    made = all_figures(a_summary(**CASES["two"]))
    (tmp_path / "note.txt").write_text("mine")
    write_figures({"coefficients": made["coefficients"]}, tmp_path)
    if kind is not None:
        FOREIGN[kind](tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    both = {name: made[name] for name in ("coefficients", "worth")}
    if kind is None:
        assert all(path.stat().st_size for path in write_figures(both, tmp_path))
        assert (tmp_path / "note.txt").read_text() == "mine"
        return
    with pytest.raises(InputError) as refusal:
        write_figures(both, tmp_path)
    assert refusal.value.field == "--figures" and refusal.value.where == tmp_path
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
