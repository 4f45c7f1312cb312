"""Laws of usage: what workers were idle for and what they scored, each counted once."""

from dataclasses import replace

import pytest
from summaries import a_trial

from dem_opt.analysis.utilization import usage_of
from dem_opt.types import Evaluation


def trial(number, merge=0.5, score=2.5, wait=1.0, **changed):
    made = Evaluation(
        scores={}, forward_tokens=100, merge_seconds=merge, score_seconds=score, scored_tokens=80, wait_seconds=wait
    )
    return replace(a_trial(number, 2.0, seconds=0.25), evaluation=replace(made, **changed))


def test_utilisation_is_the_busy_share_from_the_second_trial_on():
    """By hand: (3 + 3) / (3 + 3 + 1 + 1); the first trial's wait is not the search's."""
    used = usage_of([trial(0, wait=100.0), trial(1), trial(2)])
    assert used.utilisation == pytest.approx(6 / 8)
    assert (used.trials, used.merging, used.scoring, used.waiting, used.proposing) == (3, 1.5, 7.5, 102.0, 0.75)


def test_what_the_ledger_had_is_no_work():
    known = a_trial(1, 2.0, seconds=0.25)
    assert usage_of([trial(0), known, trial(2), known]) == usage_of([trial(0), trial(2)])
    empty = usage_of([known])
    assert (empty.trials, empty.utilisation, empty.unscored, empty.batch) == (0, None, None, 0)


def test_what_is_not_scored_is_a_share_of_the_tokens_of_trials_that_say_so():
    """100 tokens of which 80, and 60 of which 60 are scored; an earlier version did not count them."""
    older = trial(2, scored_tokens=0, forward_tokens=10**6)
    used = usage_of([trial(0), trial(1, forward_tokens=60, scored_tokens=60), older])
    assert used.unscored == pytest.approx(20 / 160)


def test_the_smallest_batch_is_told():
    assert usage_of([trial(0), trial(1, batch_tokens=1024), trial(2, batch_tokens=512)]).batch == 512
