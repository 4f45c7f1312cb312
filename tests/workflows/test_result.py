"""Laws of how a result is shown: every row and number, escaped, in text and in HTML."""

from dataclasses import replace
from html.parser import HTMLParser

import summaries

from dem_opt.types import HELD_OUT, SEARCH
from dem_opt.workflows.result import StudyResult

NAMES = ("code", "math", "prose")
HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_text_and_page_have_every_row_with_its_objective() -> None:
    result = StudyResult(summaries.a_summary(NAMES))
    page = Page(result._repr_html_())
    for row in result.summary.results:
        for split in (SEARCH, HELD_OUT):
            if split in row.objective:
                number = f"{row.objective[split]:.4f}"
                assert number in repr(result) and number in page.text
        assert row.label in repr(result) and row.label in page.text
    assert page.tags.count("tr") == 1 + len(result.summary.results)


def test_the_columns_of_the_text_are_aligned() -> None:
    lines = repr(StudyResult(summaries.a_summary(NAMES))).splitlines()
    rule = next(number for number, line in enumerate(lines) if line and set(line) == {"-"})
    table = [lines[rule - 1], *lines[rule + 1 : lines.index("", rule)]]
    assert len({len(line) for line in table}) == 1


def test_names_are_escaped_and_nothing_is_fetched() -> None:
    summary = summaries.a_summary(NAMES)
    results = tuple(replace(row, label=HOSTILE) for row in summary.results)
    page = StudyResult(replace(summary, study=HOSTILE, results=results, facts={"study file": HOSTILE}))._repr_html_()
    assert not {"script", "img", "link"} & set(Page(page).tags)
    assert "http" not in page and HOSTILE not in page
