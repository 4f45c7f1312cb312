"""A finished study, which is answered from its database: no checkpoint is opened, no worker started, no torch loaded.

At the end of a run the stamp of its inputs is kept in the output folder.  A later run that finds the same stamp knows
that nothing has changed; where nothing is left to measure either, it has nothing to do.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from dem_opt.analysis.results import final_entries, groups_of
from dem_opt.analysis.stored_vectors import recall_vectors
from dem_opt.atomic import write_text
from dem_opt.config import StudyConfig
from dem_opt.json_files import find_json
from dem_opt.planning.input_stamp import stamp_inputs
from dem_opt.progress import Progress
from dem_opt.search.runs import Runs
from dem_opt.search.trials import finished, is_known
from dem_opt.storage.engine import is_there, masked
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.storage.retry import RetryPolicy
from dem_opt.types import SPLITS
from dem_opt.workflows.libraries import libraries
from dem_opt.workflows.stored_study import stored_study

FILE = "inputs.json"
"""The file in a study's output folder."""


@dataclass(frozen=True, kw_only=True)
class KnownInputs:
    """The last run's knowledge of its inputs.

    Attributes:
        stamp: Their stamp before they were read.
        identity: Identity fields of the study that they make.
        warnings: Warnings about them.
    """

    stamp: str
    identity: dict[str, str]
    warnings: list[str]


def stamp_of(config: StudyConfig) -> str | None:
    """Return the stamp of a study's inputs as they are now; None where they have none."""
    return stamp_inputs(config, libraries())


def keep_inputs(config: StudyConfig, known: KnownInputs) -> None:
    """Keep what a run knew of its inputs; a folder that can't be written stays without it."""
    with suppress(OSError):
        write_text(config.output / FILE, json.dumps(asdict(known)) + "\n")


def find_finished(config: StudyConfig, runs: Sequence[str], progress: Progress) -> KnownInputs | None:
    """Return what is known of a study's inputs where these runs, and all that follows them, are finished.

    Args:
        config: The study file.
        runs: Labels of the runs that are asked for.
        progress: Gets a note while a database that is away is waited for.

    Returns:
        None where an input may have changed, and where anything is left to do.
    """
    known = find_json(config.output / FILE, KnownInputs)
    if known is None or not is_there(config.storage) or stamp_of(config) != known.stamp:
        return None
    patience = RetryPolicy(f"the database {masked(config.storage)}", config.outages.storage, progress)
    with stored_study(config, patience) as stored:
        if stored is None or stored.identity_fields != known.identity:
            return None
        is_finished = _are_ended(config, stored.generation, runs) and _is_measured(
            config, stored.ledger, stored.identity, stored.generation
        )
    return known if is_finished else None


def _are_ended(config: StudyConfig, generation: int, runs: Sequence[str]) -> bool:
    """True if these runs have ended, by the budget that the study file gives them now."""
    with Runs(config, generation).existing() as searches:
        return all(run in searches and searches[run].stopped and not searches[run].unfinished for run in runs)


def _is_measured(config: StudyConfig, ledger: Ledger, identity: StudyIdentity, generation: int) -> bool:
    """True if all that a run measures beside its trials is known, with the libraries of today."""
    if ledger.libraries(config.name) != libraries():
        return False
    if recall_vectors(identity.base, identity.fine_tunes, config.output) is None:
        return False
    with Runs(config, generation).existing() as searches:
        trials = {run: finished(ledger, identity, search) for run, search in searches.items()}
    groups = groups_of(ledger, identity, trials)
    if identity.groups is not None and not identity.space.is_point and groups is None:
        return False
    listed = final_entries(identity, trials, config.report, groups)
    is_scored = all(is_known(ledger, identity, entry.composite, split) for entry in listed for split in SPLITS)
    return is_scored and _is_error_known(ledger, identity)


def _is_error_known(ledger: Ledger, identity: StudyIdentity) -> bool:
    """True if the error of compressed vectors is known, where the study uses them."""
    if identity.vectors == "exact":
        return True
    from dem_opt.workflows.int8_error import recall_error  # loads torch

    return recall_error(ledger, identity) is not None
