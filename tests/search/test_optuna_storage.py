"""Laws of Optuna's tables: compared with this Optuna once, made wherever they are missing."""

from pathlib import Path

import optuna
import pytest
from sqlalchemy import text

from dem_opt.errors import InputError
from dem_opt.search.optuna_storage import close_storage, open_storage, opened_storage, study_names


def test_tables_are_compared_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, version = [], optuna.storages.RDBStorage.get_head_version
    monkeypatch.setattr(
        optuna.storages.RDBStorage, "get_head_version", lambda self: (compared.append(1), version(self))[1]
    )
    for name in ("a", "b"):
        with opened_storage(url) as storage:
            optuna.create_study(storage=storage, study_name=name)
    assert study_names(url) == {"a", "b"} and len(compared) == 1


@pytest.mark.parametrize(
    ("version", "mend"), [("v9.9.0.a", "a newer Optuna than"), ("v3.0.0.a", "optuna storage upgrade")]
)
def test_tables_of_another_optuna_are_refused_in_a_line_each_time(url: str, version: str, mend: str) -> None:
    storage = optuna.storages.RDBStorage(url)
    with storage.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :version"), {"version": version})
    close_storage(storage)
    for _ in range(2):
        with pytest.raises(InputError, match=mend) as refusal:
            open_storage(url)
        assert refusal.value.field == "storage"


def test_a_file_that_was_removed_is_made_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    for _ in range(2):
        assert study_names(url) == set()
        with opened_storage(url) as storage:
            optuna.create_study(storage=storage, study_name="a")
        assert study_names(url) == {"a"}
        for file in tmp_path.iterdir():
            file.unlink()
