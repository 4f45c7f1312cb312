"""Laws of the database room: what is refused and how it is told, and what connections get."""

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from dem_opt.errors import InputError
from dem_opt.storage.engine import BUSY_SECONDS, connect, masked, tune

SECRET = "hush"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("sqlite:////a:b@c/d.db", "sqlite:////a:b@c/d.db"),
        (f"postgresql+psycopg://me:{SECRET}@host:5/db", "postgresql+psycopg://me:***@host:5/db"),
        (f"postgresql://me:{SECRET}/@:{SECRET}@host/db", "postgresql://me:***@host/db"),
        (f"postgresql://host/db?a=1&password={SECRET}&b=2", "postgresql://host/db?a=1&password=***&b=2"),
        (f"https://me:{SECRET}@host/path", "https://me:***@host/path"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("nonsense", "nonsense"),
    ],
)
def test_a_masked_url_keeps_all_but_the_password(url: str, shown: str) -> None:
    assert masked(url) == shown


@pytest.mark.parametrize(
    ("url", "mend"),
    [
        ("nonsense", "not a database URL"),
        ("", "not a database URL"),
        (f"postgresql://me:{SECRET}@host:port/db", "not a database URL"),
        (f"mysql://me:{SECRET}@host/db", "unknown kind of database"),
        (f"postgresql+psycopg2://me:{SECRET}@host/db", "unknown kind of database"),
        (f"postgresql://me:{SECRET}{{@host/db", "braces"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///{here}/file/below/study.db", "can't make {here}/file/below"),
        ("sqlite:///{here}/file", "not a database"),
        ("sqlite:///{here}", "unable to open"),
    ],
)
def test_a_url_that_cant_be_used_is_refused_in_one_line(url: str, mend: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("words, and more than a hundred bytes of them. " * 10)
    if "{here}" in url:
        url, mend = url.format(here=tmp_path), mend.format(here=tmp_path)
    with pytest.raises(InputError) as caught:
        connect(url, "tracking.uri")
    message = str(caught.value)
    assert caught.value.field == "tracking.uri"
    assert mend in message
    assert "\n" not in message
    assert SECRET not in message


def test_a_server_that_does_not_answer_is_refused_without_its_password() -> None:
    with pytest.raises(InputError, match="the server does not answer") as caught:
        connect(f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/db")
    assert SECRET not in str(caught.value)


def test_the_folder_of_a_new_file_is_made(tmp_path: Path) -> None:
    connect(f"sqlite:///{tmp_path}/a/b/study.db").dispose()
    assert (tmp_path / "a/b/study.db").is_file()


@pytest.mark.parametrize("own", [True, False])
def test_every_sqlite_connection_is_tuned(own: bool, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    engine = connect(url) if own else create_engine(url)
    if not own:
        with engine.connect():
            tune(engine)
    with engine.connect() as first, engine.connect() as second:
        for connection in (first, second):
            pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            values = [connection.execute(text(f"PRAGMA {pragma}")).scalar_one() for pragma in pragmas]
            assert values == ["wal", 1, 1, BUSY_SECONDS * 1000]
    engine.dispose()


def test_a_new_file_that_another_is_writing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite gives up at once where a file is to become WAL while another connection has reserved it."""
    path = tmp_path / "study.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            other.rollback()

    monkeypatch.setattr("time.sleep", pause)
    connect(f"sqlite:///{path}").dispose()
    other.close()
    assert len(pauses) == 3 and pauses == sorted(pauses)
