"""Figures and notes of a study in Optuna Dashboard."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna_dashboard import save_note, save_plotly_graph_object

# Private names, used by TrialNotes alone: the public `save_note` reads every note and figure of the study at each call,
# which is quadratic in the number of trials.  tests/dashboards/test_live_updates.py reads the notes back by the public
# `get_note` and fails if a release stores notes under other keys.
from optuna_dashboard._note import note_str_key_prefix, note_ver_key

from dem_opt.errors import InputError


def publish(url: str, study_name: str, figures: Mapping[str, go.Figure], note: str) -> None:
    """Save figures as plots of a study, each replacing the one of the same name, and its note in Markdown.

    Writes many small transactions: call it from time to time, not for each trial.

    Raises:
        InputError: The database has no such study.
    """
    with _open_storage(url) as storage:
        try:
            study = optuna.load_study(study_name=study_name, storage=storage)
            for name, figure in figures.items():
                save_plotly_graph_object(study, figure, graph_object_id=name)
            save_note(study, note)
        except KeyError:
            raise InputError(None, "study", study_name, "not in the database; `dem-opt run` makes it") from None


class TrialNotes:
    """Writes notes of trials over one connection to the study's database."""

    def __init__(self, url: str) -> None:
        self._storage = _storage(url)

    def add(self, study_name: str, notes: Mapping[int, str]) -> None:
        """Write a note (Markdown, below 2000 characters) for each trial, by number, that has none yet."""
        study = self._storage.get_study_id_from_name(study_name)
        ids = {self._storage.get_trial_id_from_study_id_trial_number(study, number): number for number in notes}
        # A single trial has just finished and cannot have a note, so the study's attributes need not be read.
        attributes = self._storage.get_study_system_attrs(study) if len(ids) > 1 else {}
        for trial, number in ids.items():
            if note_ver_key(trial) not in attributes:
                self._storage.set_study_system_attr(study, f"{note_str_key_prefix(trial)}0", notes[number])
                self._storage.set_study_system_attr(study, note_ver_key(trial), 1)

    def close(self) -> None:
        """Close the connection."""
        _close(self._storage)


class _ReadOnce(optuna.storages.RDBStorage):
    """Optuna's tables, of which a study's system attributes are read once.

    Saving one figure asks for all of them, among them two for each trial's note: seconds, for thousands of trials.
    """

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, **settings)
        self._known: dict[int, dict[str, Any]] = {}

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        if study_id not in self._known:
            self._known[study_id] = super().get_study_system_attrs(study_id)
        return self._known[study_id]

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        super().set_study_system_attr(study_id, key, value)
        self.get_study_system_attrs(study_id)[key] = value


@contextmanager
def _open_storage(url: str) -> Iterator[optuna.storages.RDBStorage]:
    storage = _storage(url, _ReadOnce)
    try:
        yield storage
    finally:
        _close(storage)


def _storage(
    url: str, kind: type[optuna.storages.RDBStorage] = optuna.storages.RDBStorage
) -> optuna.storages.RDBStorage:
    """Connect to Optuna's tables; a locked SQLite file is waited for."""
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    # Optuna applies str.format to the URL: doubled braces stay braces.
    escaped = url.replace("{", "{{").replace("}", "}}")
    return kind(escaped, engine_kwargs=options, skip_compatibility_check=True)  # the study's search has compared it


def _close(storage: optuna.storages.RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()
