"""Puts a study's figures and note into Optuna Dashboard."""

from collections.abc import Mapping

import optuna
import plotly.graph_objects as go
from optuna_dashboard import save_note, save_plotly_graph_object

from dem_opt.errors import InputError


def publish(url: str, study_name: str, figures: Mapping[str, go.Figure], note: str) -> None:
    """Saves figures as the study's plots, each replacing the one of the same id, and the note (Markdown).

    Writes many small transactions, so it is for milestones, not for each trial.  Raises InputError where the
    database has no such study.
    """
    storage = optuna.storages.RDBStorage(url)
    try:
        study = optuna.load_study(study_name=study_name, storage=storage)
        for name, figure in figures.items():
            save_plotly_graph_object(study, figure, graph_object_id=name)
        save_note(study, note)
    except KeyError:
        raise InputError(None, "study", study_name, "not in the database; `dem-opt run` makes it") from None
    finally:
        storage.remove_session()
        storage.engine.dispose()
