"""A study that is killed, at whichever boundary, ends as one that was not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BOUNDARIES = ["asked", "scored", "ledger written", "told", "MLflow run created"]
TRIALS = 8


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Outcomes of a study by kind of kill, and without one."""
    script = Path(__file__).with_name("killed.py")
    root = tmp_path_factory.mktemp("killed")
    done = subprocess.run([sys.executable, script, root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_an_interrupted_study_equals_an_uninterrupted_one(outcomes, boundary):
    whole, killed = outcomes["None"], outcomes[boundary]
    assert whole["exits"] == [0] and killed["exits"] == [9, 0], "it was killed, and went on"
    assert killed["trials"] == whole["trials"]
    assert killed["states"] == whole["states"] and len(whole["states"]) == TRIALS
    assert set(whole["states"]) <= {"COMPLETE", "PRUNED"}
    assert killed["running"] == []


@pytest.mark.parametrize("boundary", ["None", *BOUNDARIES])
def test_every_trial_is_logged_once(outcomes, boundary):
    outcome = outcomes[boundary]
    assert outcome["logged"] == outcome["numbers"]
    assert outcome["statuses"] == ["FINISHED"]
    assert outcome["parents"] == 1


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_no_finished_evaluation_is_repeated(outcomes, boundary):
    # Only what was scored and not yet in the ledger when the driver died is scored again.
    lost = 1 if boundary == "scored" else 0
    assert outcomes[boundary]["evaluations"] == outcomes["None"]["evaluations"] + lost
