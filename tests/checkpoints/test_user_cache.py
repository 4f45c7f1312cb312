"""Laws of the user's cache: each finding is kept by itself, under any key, and none where nothing can be written."""

import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from dem_opt.checkpoints.user_cache import cache_folder, find, finding_file, keep

KEYS = ["/models/a", "", "größe %2F\n", "\udcff", "x" * 10_000]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@dataclass(frozen=True)
class Finding:
    number: int
    words: list[str]


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
def test_what_is_kept_is_found_and_nothing_else(key: str) -> None:
    assert find("numbers", key, Finding) is None
    for number in (1, 2):
        keep("numbers", key, Finding(number, ["a"]))
        assert find("numbers", key, Finding) == Finding(number, ["a"])
    keep("reasons", key, "")
    assert find("reasons", key, str) == ""
    assert find("numbers", key, str) is None, "of another schema"
    assert find("numbers", f"{key}.", Finding) is None


def test_findings_of_many_at_once_are_all_kept() -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: keep("numbers", str(number), number), range(200)))
    assert [find("numbers", str(number), int) for number in range(200)] == list(range(200))


def test_the_folder_is_its_users_own() -> None:
    keep("numbers", "a", 1)
    assert stat.S_IMODE(cache_folder().stat().st_mode) == 0o700
    assert finding_file("numbers", "a").parent.parent == cache_folder()


def test_where_nothing_can_be_written_nothing_is_kept(cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    keep("numbers", "a", 1)
    assert find("numbers", "a", int) is None
