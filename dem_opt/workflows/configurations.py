"""The configuration under which the ledger keeps the scores of a study's models.

Contents are hashes of tensors, and the same tensors compute something else with another config.json.  The ledger keeps
the first configuration that each checkpoint was scored with, and its scores under the plain key; scores with another
have a key of their own, so that earlier ones stay and hold again where the file is restored.
"""

from collections.abc import Collection
from dataclasses import replace

from dem_opt.checkpoints.configuration import Configuration, describe
from dem_opt.planning.inputs import Inputs
from dem_opt.progress import Progress
from dem_opt.storage.ledger import Ledger
from dem_opt.types import StoredModel


def distinguish(inputs: Inputs, ledger: Ledger, progress: Progress) -> Inputs:
    """The inputs with the configuration of the study's identity; a change is reported."""
    fingerprint, changes = _compare([*inputs.models()], inputs.base, ledger)
    if changes:
        progress.warning(
            f"{inputs.base.path / 'config.json'} computes otherwise than when these models were first scored "
            f"({changes}): they are scored again, and the earlier scores are kept"
        )
    return replace(inputs, configuration=fingerprint)


def distinguish_model(inputs: Inputs, model: StoredModel, ledger: Ledger) -> Inputs:
    """The inputs with the configuration of another model, to be scored on the study's corpora."""
    fingerprint, _ = _compare([model.content], model, ledger)
    return replace(inputs, configuration=fingerprint)


def _compare(contents: Collection[str], model: StoredModel, ledger: Ledger) -> tuple[str, str]:
    """The model's fingerprint and the changes, where any content was first scored with another; else nothing."""
    own = Configuration.parse(model.configuration)
    for first in sorted(ledger.first_configurations(contents, model.configuration)):
        if differences := own.differences(Configuration.parse(first)):
            return own.fingerprint, describe(differences, "before")
    return "", ""
