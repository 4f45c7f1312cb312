"""Laws of the user's cache: each entry has a file, under any key, and there is none where nothing can be written."""

import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from dem_opt.checkpoints.user_cache import cache_folder, entry_file, get, put

KEYS = ["/models/a", "", "größe %2F\n", "\udcff", "x" * 10_000]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@dataclass(frozen=True)
class Entry:
    number: int
    words: list[str]


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
def test_what_is_kept_is_found_and_nothing_else(key: str) -> None:
    assert get("numbers", key, Entry) is None
    for number in (1, 2):
        put("numbers", key, Entry(number, ["a"]))
        assert get("numbers", key, Entry) == Entry(number, ["a"])
    put("reasons", key, "")
    assert get("reasons", key, str) == ""
    assert get("numbers", key, str) is None, "of another schema"
    assert get("numbers", f"{key}.", Entry) is None


def test_entries_of_many_at_once_are_all_kept() -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: put("numbers", str(number), number), range(200)))
    assert [get("numbers", str(number), int) for number in range(200)] == list(range(200))


def test_the_folder_is_its_users_own() -> None:
    put("numbers", "a", 1)
    assert stat.S_IMODE(cache_folder().stat().st_mode) == 0o700
    assert entry_file("numbers", "a").parent.parent == cache_folder()


def test_where_nothing_can_be_written_nothing_is_kept(cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    put("numbers", "a", 1)
    assert get("numbers", "a", int) is None
