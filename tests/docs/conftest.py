"""Several processes divide the pages: each page's snippets run in one, in their order."""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling


class PageScheduling(LoadScopeScheduling):
    """Tests whose parameter is a line of a page, `test_snippet_runs[docs/python.md:8]`, stay together."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.rpartition(":")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> PageScheduling:
    return PageScheduling(config, log)
