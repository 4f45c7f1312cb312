"""Pages: generated ones are current, links lead somewhere, YAML is a study file, the first page is short."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

from dem_opt.config import StudyConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/[!R]*.md")]
    if path.is_file()
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def load_script(name: str):
    spec = spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["study-file.md", "command-line.md"])
def test_generated_pages_are_current(name):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == load_script("generate").PAGES[name]()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT / "docs"], ids=name_of)
def test_yaml_is_a_part_of_a_study_file(page):
    """Every YAML block makes a valid study file together with the fields that it leaves out."""
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language != "yaml":
            continue
        study = {"name": "mine", "base": "base", "distributions": {}} | yaml.safe_load(block)
        distributions = {"code": {}, "math": {}} | study["distributions"]
        for name, fields in distributions.items():
            if not {"checkpoint", "adapter"} & fields.keys():
                fields["checkpoint"] = f"models/{name}"
            fields.setdefault("validation", f"data/{name}.jsonl")
        StudyConfig.model_validate(study | {"distributions": distributions}, context={"folder": ROOT})


def test_the_picture_is_what_its_script_draws():
    script = load_script("draw_method")
    assert script.PICTURE.read_text(encoding="utf-8") == script.draw(script.read_trials())


def test_first_page_is_short_and_begins_with_the_picture():
    page = (ROOT / "README.md").read_bytes()
    lines = page.decode().splitlines()
    assert len(page) <= 12_288
    assert len(lines) <= 150
    assert any(line.startswith("![") for line in lines[:20])
