"""Puts a study's figures and notes into Optuna Dashboard."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import optuna
import plotly.graph_objects as go
from optuna_dashboard import save_note, save_plotly_graph_object
from optuna_dashboard._note import note_str_key_prefix, note_ver_key

from dem_opt.errors import InputError


def publish(url: str, study_name: str, figures: Mapping[str, go.Figure], note: str) -> None:
    """Saves figures as the study's plots, each replacing the one of the same id, and the note (Markdown).

    Writes many small transactions, so it is for milestones, not for each trial.  Raises InputError where the
    database has no such study.
    """
    with _opened(url) as storage:
        try:
            study = optuna.load_study(study_name=study_name, storage=storage)
            for name, figure in figures.items():
                save_plotly_graph_object(study, figure, graph_object_id=name)
            save_note(study, note)
        except KeyError:
            raise InputError(None, "study", study_name, "not in the database; `dem-opt run` makes it") from None


class TrialNotes:
    """Writes notes of trials, over one connection to the study's database.

    Optuna Dashboard's own function reads all of a study's notes and figures at every call, so this writes the same
    two attributes of the study itself.
    """

    def __init__(self, url: str) -> None:
        self._storage = _storage(url)

    def add(self, study_name: str, notes: Mapping[int, str]) -> None:
        """Writes a note (Markdown, of less than 2000 characters) for each trial by number that has none."""
        study = self._storage.get_study_id_from_name(study_name)
        ids = {self._storage.get_trial_id_from_study_id_trial_number(study, number): number for number in notes}
        known = self._storage.get_study_system_attrs(study) if len(ids) > 1 else {}
        for trial, number in ids.items():
            if note_ver_key(trial) not in known:
                self._storage.set_study_system_attr(study, f"{note_str_key_prefix(trial)}0", notes[number])
                self._storage.set_study_system_attr(study, note_ver_key(trial), 1)

    def close(self) -> None:
        """Closes the connection."""
        self._storage.remove_session()
        self._storage.engine.dispose()


@contextmanager
def _opened(url: str) -> Iterator[optuna.storages.RDBStorage]:
    storage = _storage(url)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _storage(url: str) -> optuna.storages.RDBStorage:
    """Optuna's tables.  Optuna formats the URL, so braces are doubled to stay what they are; SQLite is waited for."""
    patient = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(url.replace("{", "{{").replace("}", "}}"), engine_kwargs=patient)
