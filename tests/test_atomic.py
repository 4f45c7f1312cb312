"""Laws of atomic writes: a place has the old content or the new, and permissions follow the umask."""

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dem_opt.atomic import link_or_copy, publish_folder, publish_new, staged_file, staged_folder, write_text
from dem_opt.errors import InputError


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request) -> Iterator[int]:
    former = os.umask(request.param)
    yield request.param
    os.umask(former)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def make(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text(text)


def test_a_file_is_made_in_a_folder_that_was_missing(tmp_path, umask):
    write_text(tmp_path / "a" / "file", "new")
    assert (tmp_path / "a" / "file").read_text() == "new" and names(tmp_path / "a") == {"file"}
    assert mode(tmp_path / "a" / "file") == 0o666 & ~umask


def test_a_file_that_fails_half_way_leaves_the_old_one_alone(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), staged_file(tmp_path / "file") as partial:
        partial.write_text("ne")
        assert (tmp_path / "file").read_text() == "old"
        raise ZeroDivisionError
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == {"file"}


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    texts = [str(number) * 10_000 for number in range(8)]
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda text: write_text(tmp_path / "file", text), texts))
    assert (tmp_path / "file").read_text() in texts and names(tmp_path) == {"file"}


def test_the_first_of_several_new_files_stays(tmp_path):
    for text in ("first", "second"):
        (tmp_path / text).write_text(text)
        publish_new(tmp_path / text, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "first"


def test_a_folder_takes_the_place_of_another(tmp_path):
    make(tmp_path / "out", "old")
    with staged_folder(tmp_path / "out") as partial:
        make(partial, "new")
        assert (tmp_path / "out" / "file").read_text() == "old"
        publish_folder(partial, tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "new" and names(tmp_path) == {"out"}


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_fails_leaves_what_was_there(tmp_path, there):
    if there:
        make(tmp_path / "out", "old")
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "out") as partial:
        make(partial, "new")
        raise ZeroDivisionError
    assert names(tmp_path) == ({"out"} if there else set())


def test_a_process_killed_between_the_two_renames_loses_nothing(tmp_path):
    make(tmp_path / ".out.former", "old")
    make(tmp_path / ".out.partial", "new")
    with staged_folder(tmp_path / "out") as partial:
        assert names(partial) == set() and (tmp_path / "out" / "file").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_the_files_of_a_folder_follow_the_umask_whoever_wrote_them(tmp_path, umask):
    with staged_folder(tmp_path / "out") as partial:
        (partial / "inner").mkdir()
        save_file({"x": torch.zeros(2)}, partial / "inner" / "model.safetensors")
        (partial / "private").touch(mode=0o600)
        publish_folder(partial, tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name: mode(path) for path in files} == dict.fromkeys(("model.safetensors", "private"), 0o666 & ~umask)


def test_a_link_is_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    link_or_copy(tmp_path / "file", tmp_path / "linked")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError))
    link_or_copy(tmp_path / "file", tmp_path / "copied")
    assert (tmp_path / "linked").samefile(tmp_path / "file") and not (tmp_path / "copied").samefile(tmp_path / "file")
    assert (tmp_path / "copied").read_text() == "text"


def test_links_stay_and_what_they_point_to_is_replaced(tmp_path):
    make(tmp_path / "disk" / "folder", "old")
    (tmp_path / "folder").symlink_to(tmp_path / "disk" / "folder")
    (tmp_path / "file").symlink_to(tmp_path / "disk" / "text")
    write_text(tmp_path / "file", "new")
    with staged_folder(tmp_path / "folder") as partial:
        make(partial, "new")
        publish_folder(partial, tmp_path / "folder")
    assert (tmp_path / "file").is_symlink() and (tmp_path / "folder").is_symlink()
    assert (tmp_path / "disk" / "text").read_text() == (tmp_path / "disk" / "folder" / "file").read_text() == "new"
    assert names(tmp_path / "disk") == {"folder", "text"}


def test_a_process_that_writes_nothing_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("dem_opt.atomic.PATIENCE", 0.3)
    monkeypatch.setattr("dem_opt.atomic.POLL", 0.02)
    with staged_folder(tmp_path / "out") as partial:
        make(partial, "new")
        with pytest.raises(InputError, match="written nothing"), staged_folder(tmp_path / "out", wait=True):
            pass
        assert (partial / "file").read_text() == "new"


def test_a_folder_is_made_by_one_process_at_a_time(tmp_path):
    with staged_folder(tmp_path / "out") as partial:
        make(partial, "new")
        with pytest.raises(InputError), staged_folder(tmp_path / "out"):
            pass
        assert (partial / "file").read_text() == "new"


def test_a_process_that_waits_finds_what_the_other_made(tmp_path):
    def wait() -> str:
        with staged_folder(tmp_path / "out", wait=True) as own:
            assert names(own) == set()
            return (tmp_path / "out" / "file").read_text()

    with ThreadPoolExecutor() as threads:
        with staged_folder(tmp_path / "out") as partial:
            waiting = threads.submit(wait)
            make(partial, "new")
            publish_folder(partial, tmp_path / "out")
        assert waiting.result(timeout=60) == "new"
    assert names(tmp_path) == {"out"}
