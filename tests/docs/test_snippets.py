"""Every shell and Python snippet of the pages runs, page by page, in a copy of a finished quickstart's folder.

`make docs` runs it on the folder that DEM_OPT_QUICKSTART names, ./quickstart unless it is set.  A page's snippets run
in order: shell in that folder, Python in one interpreter for the page.  A comment directly above a block says more:

    <!-- skip: why it cannot run here -->
    <!-- server -->     the command serves pages on loopback until Ctrl-C
    <!-- output -->     the next block is what the snippet before prints; `...` stands for any text
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

import pytest
from finished_quickstart import ROOT, copy_quickstart
from jupyter_client.manager import start_new_kernel

pytestmark = [pytest.mark.docs, pytest.mark.filterwarnings("default")]  # of jupyter_client and its event loop

PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *(ROOT / name for name in ("dashboards/README.md", "studies/README.md", "CONTRIBUTING.md")),
]
BLOCK = re.compile(r"(?:^<!-- (?P<mark>.*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
SECONDS = 900
"""Time limit of a snippet."""


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """A block of a page.

    Attributes:
        page: The page.
        line: Its first line in the page.
        language: "sh" or "python".
        text: The block.
        mark: The comment above it.
        output: The output that the page shows, where it shows one.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets_of(page: Path) -> list[Snippet]:
    """The shell and Python blocks of a page, with the outputs that it shows."""
    content, snippets = page.read_text(encoding="utf-8"), []
    for block in BLOCK.finditer(content):
        language, text, mark = block["language"], block["text"], block["mark"] or ""
        line = content[: block.start("text")].count("\n") + 1
        if mark == "output":
            snippets[-1] = replace(snippets[-1], output=text)
        elif language in ("sh", "python"):
            assert mark in ("", "server") or mark.startswith("skip: "), f"{page}:{line}: unknown comment {mark!r}"
            snippets.append(Snippet(page=page, line=line, language=language, text=text, mark=mark))
    return snippets


class Reader:
    """Somebody who tries the snippets of a page, one after another.

    Args:
        folder: A quickstart's folder, which the snippets may change.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        programs = [str(Path(sys.executable).parent), os.environ["PATH"]]
        self._environment = os.environ | {"PATH": os.pathsep.join(programs)}
        self._environment.setdefault("PYTHONPATH", str(ROOT))

    def run(self, snippet: Snippet) -> str:
        """Run a snippet and return its output."""
        if snippet.mark == "server":
            return self._visit(snippet)
        return self._type(snippet) if snippet.language == "sh" else self._evaluate(snippet)

    def _shell(self, snippet: Snippet) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", snippet.text],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _type(self, snippet: Snippet) -> str:
        with self._shell(snippet) as shell:
            try:
                output, _ = shell.communicate(timeout=SECONDS)
            finally:
                _end(shell)
        assert shell.returncode == 0, f"{snippet}: exit status {shell.returncode}\n{snippet.text}\n{output[-4000:]}"
        return output

    def _visit(self, snippet: Snippet) -> str:
        """Run a server until it says how to stop it, get every page that it names, and press Ctrl-C."""
        output = ""
        with self._shell(snippet) as shell:
            try:
                for line in shell.stdout or ():
                    output += line
                    if "Ctrl-C" in line:
                        break
                addresses = re.findall(r"http://127\.0\.0\.1:\d+\S*", output)
                assert addresses, f"{snippet}: no page is served\n{output}"
                for address in addresses:
                    with urlopen(address, timeout=30) as answer:
                        assert answer.status == 200, f"{snippet}: {address}"
                os.killpg(shell.pid, signal.SIGINT)
                shell.wait(timeout=60)
            finally:
                _end(shell)
        return output

    @cached_property
    def _kernel(self) -> Any:
        return start_new_kernel(kernel_name="python3", cwd=str(self._folder), env=self._environment)

    def _evaluate(self, snippet: Snippet) -> str:
        output: list[str] = []

        def keep(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                output.append(message["content"]["text"])

        _, client = self._kernel
        reply = client.execute_interactive(snippet.text, timeout=SECONDS, output_hook=keep)["content"]
        assert reply["status"] == "ok", f"{snippet}: {reply['ename']}: {reply['evalue']}\n{snippet.text}\n{output}"
        return "".join(output)

    def close(self) -> None:
        """End the interpreter."""
        if "_kernel" in self.__dict__:
            manager, client = self._kernel
            client.stop_channels()
            manager.shutdown_kernel(now=True)


def _end(shell: subprocess.Popen[str]) -> None:
    """Kill what a snippet has left running."""
    with suppress(ProcessLookupError):
        os.killpg(shell.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def reader(request: pytest.FixtureRequest) -> Iterator[Reader]:
    """A reader with a fresh copy of the quickstart for each page."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch, "quickstart")
        copy_quickstart(folder)
        reader = Reader(folder)
        yield reader
        reader.close()


SNIPPETS = [snippet for page in PAGES for snippet in snippets_of(page)]


@pytest.mark.parametrize(
    ("reader", "snippet"),
    [(snippet.page, snippet) for snippet in SNIPPETS],
    ids=map(str, SNIPPETS),
    indirect=["reader"],
    scope="module",  # one reader for a page
)
def test_snippet_runs(reader: Reader, snippet: Snippet) -> None:
    if snippet.mark.startswith("skip: "):
        pytest.skip(f"{snippet}: {snippet.mark.removeprefix('skip: ')}")
    output = reader.run(snippet)
    if snippet.output is not None:
        shown, printed = (re.sub("─+", "─", text) for text in (snippet.output, output))  # tables differ in width
        flags = ELLIPSIS | NORMALIZE_WHITESPACE
        assert OutputChecker().check_output(shown, printed, flags), f"{snippet} prints\n{output}"
