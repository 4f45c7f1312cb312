"""Laws of probes: parts make up the whole, the anchor corrects them, they are charged what they saw and never win."""

from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import in_process
import numpy as np
import optuna
import pytest
import worlds
from recorded import RecordedProgress

from dem_opt.errors import EvaluationError
from dem_opt.evaluation.parts import LEAST, PARTS, all_parts, part_count, part_windows
from dem_opt.evaluation.worker import Worker
from dem_opt.planning.inputs import load_inputs
from dem_opt.search.probes import corrected, probed
from dem_opt.search.runs import Runs
from dem_opt.search.trial_attributes import TrialAttributes
from dem_opt.storage.engine import connect
from dem_opt.storage.ledger import Ledger
from dem_opt.study import Study
from dem_opt.types import SEARCH, Evaluation, Request

WINDOWS = 16
NAMES = ("code", "math", "prose")


def make(folder: Path, progress=None, names=NAMES, **sections) -> Study:
    search = {"algorithm": "simplex-gp", "trials": 12, "lookahead": 0, "gradients": True} | sections.pop("search", {})
    evaluation = {"window": 32, "windows": WINDOWS, "held_out": 4} | sections.pop("evaluation", {})
    path = worlds.study(folder, names, search=search, evaluation=evaluation, **sections)
    return in_process.open_study(path, progress)


def of(study: Study):
    return load_inputs(study.config, "study.yaml").identity(), Ledger(connect(study.config.storage))


def probes_of(records):
    return [record for record in records if record.part is not None]


@pytest.mark.parametrize("windows", [1, 3, 4, 8, 15, 16, 17, 100])
def test_parts_have_each_window_once_and_two_at_least(windows):
    parts = part_count(windows)
    assert parts <= PARTS and (parts or windows < 2 * LEAST)
    if parts:
        (ranges,) = all_parts({"corpus": windows}, parts).values()
        assert [n for part in ranges for n in part] == list(range(windows))
        assert min(map(len, ranges)) >= LEAST
        assert [part_windows({"corpus": windows}, n, parts)["corpus"] for n in range(parts)] == list(ranges)


def test_a_worker_s_parts_make_up_its_whole(tmp_path):
    study = make(tmp_path)
    inputs = load_inputs(study.config, "study.yaml")
    identity, worker = inputs.identity(), Worker(inputs.spec())
    composite, keys = identity.composite(study.config.space.centroid()), identity.keys(SEARCH)
    parts = all_parts(identity.sizes(SEARCH), 8)
    whole = worker.evaluate(Request(ticket=0, composite=composite, corpora=keys, gradient=True))
    divided = worker.evaluate(Request(ticket=0, composite=composite, corpora=keys, gradient=True, parts=parts))
    one = worker.evaluate(
        Request(
            ticket=0, composite=composite, corpora=keys, gradient=True, parts={key: (parts[key][5],) for key in keys}
        )
    )
    assert one.scores == one.gradients == {}
    for key in keys:
        assert divided.scores[key].nats_W == pytest.approx(whole.scores[key].nats_W, rel=1e-6)
        assert divided.gradients[key] == pytest.approx(dict(whole.gradients[key]), rel=1e-4, abs=1e-4)
        assert one.part_gradients[key] == {parts[key][5]: divided.part_gradients[key][parts[key][5]]}
        for windows, measured in divided.part_gradients[key].items():
            assert measured.score.nats_W == divided.scores[key].nats_W[windows.start : windows.stop]
            assert measured.score.tokens_W == divided.scores[key].tokens_W[windows.start : windows.stop]


def test_a_search_begins_with_the_anchor_and_each_probe_sees_the_next_part(tmp_path):
    watching = RecordedProgress()
    study = make(tmp_path, watching, search={"trials": 16})
    winner = study.run().winner
    first, probes = watching.records[0], probes_of(watching.records)
    assert first.coefficients == study.config.space.centroid() and first.forwards == 3.0 and first.part is None
    assert [record.part for record in probes] == [number % PARTS for number in range(len(probes))]
    assert len(probes) > 4
    for record in probes:
        assert record.forwards == 3 / PARTS and record.state == "probe" and record.error > 0 and record.gradient
        assert {len(score.nats_W) for score in record.scores.values()} == {WINDOWS // PARTS}
    whole = [record for record in watching.records if record.part is None]
    assert all(record.state == "complete" and not record.gradient for record in whole[1:])
    assert winner.objective[SEARCH] == min(record.objective for record in whole)
    assert watching.records[-1].part is None, "the last trial is one that may win"


def test_what_probes_cost_is_in_the_account(tmp_path):
    watching = RecordedProgress()
    study = make(tmp_path, watching)
    study.run()
    (cost,) = (cost for cost in study.summary().costs if cost.part == "simplex-gp")
    assert cost.forwards == pytest.approx(sum(record.forwards for record in watching.records))


def test_what_is_read_back_is_what_was_told(tmp_path):
    watching = RecordedProgress()
    study = make(tmp_path, watching)
    study.run()
    read = study.summary().trials["simplex-gp"]
    for told, stored in zip(watching.records, read, strict=True):
        evaluation = Evaluation(scores={}, forward_tokens=told.evaluation.forward_tokens)
        common = {"evaluation": evaluation, "propose_seconds": 0.0}
        stored = replace(stored, evaluation=replace(evaluation, forward_tokens=stored.evaluation.forward_tokens))
        assert replace(told, **common) == replace(stored, propose_seconds=0.0)


@pytest.mark.parametrize("unit", ["nats_per_token", "bits_per_byte"])
def test_an_estimated_gradient_is_exact_at_the_anchor_and_in_the_mean_of_all_parts(tmp_path, unit):
    """The mean over parts by their sizes: a loss is nats over the sum of sizes."""
    study = make(tmp_path, search={"trials": 3}, objective={"unit": unit})
    study.run()
    identity, ledger = of(study)
    worker, keys = Worker(load_inputs(study.config, "study.yaml").spec()), identity.keys(SEARCH)
    parts = part_count(WINDOWS)
    for shares in (np.full(3, 1 / 3), np.array([0.7, 0.1, 0.2])):
        composite = identity.composite(study.config.space.at(shares))
        request = Request(
            ticket=0,
            composite=composite,
            corpora=keys,
            gradient=True,
            parts=all_parts(identity.sizes(SEARCH), parts),
        )
        answer = worker.evaluate(request)
        ledger.record(
            composite,
            answer.scores,
            identity.scoring,
            gradients=answer.gradients,
            differentiation=identity.differentiation,
            part_gradients=answer.part_gradients,
        )
        estimates = [
            corrected(ledger, identity, probed(ledger, identity, composite, part, parts), part, parts)
            for part in range(parts)
        ]
        is_anchor = composite == identity.composite(study.config.space.centroid())
        for key in keys:
            loss = ledger.look_up(composite, keys, identity.scoring)[key]
            sizes_W = loss.sizes_W(identity.unit)
            sizes_P = [sum(sizes_W[n] for n in part) for part in request.parts[key]]
            for content in identity.fine_tunes.values():
                exact = answer.gradients[key][content] / sum(sizes_W)
                found_P = [estimate[key][content] for estimate in estimates]
                assert np.average(found_P, weights=sizes_P) == pytest.approx(exact, rel=1e-6, abs=1e-9)
                assert is_anchor == (found_P == pytest.approx([exact] * parts, rel=1e-6, abs=1e-9))


def test_the_anchor_s_correction_makes_gradients_more_exact(tmp_path):
    """Close to the anchor the same windows say nearly the same: the error that is left is a fraction."""
    study = make(tmp_path, search={"trials": 3})
    study.run()
    identity, ledger = of(study)
    worker, keys = Worker(load_inputs(study.config, "study.yaml").spec()), identity.keys(SEARCH)
    composite = identity.composite(study.config.space.at(np.array([0.38, 0.30, 0.32])))
    parts = all_parts(identity.sizes(SEARCH), 8)
    answer = worker.evaluate(Request(ticket=0, composite=composite, corpora=keys, gradient=True, parts=parts))
    ledger.record(
        composite,
        answer.scores,
        identity.scoring,
        0,
        0.0,
        answer.gradients,
        identity.differentiation,
        None,
        None,
        answer.part_gradients,
    )
    raw, better = [], []
    for part in range(8):
        measured = probed(ledger, identity, composite, part, 8)
        estimate = corrected(ledger, identity, measured, part, 8)
        for key in keys:
            for content in identity.fine_tunes.values():
                exact = answer.gradients[key][content] / answer.scores[key].tokens
                raw.append(measured[key].gradient[content] / measured[key].score.tokens - exact)
                better.append(estimate[key][content] - exact)
    assert np.std(better) < 0.3 * np.std(raw)


def test_a_corpus_that_was_not_probed_is_an_error(tmp_path):
    study = make(tmp_path, search={"trials": 2})
    study.run()
    identity, ledger = of(study)
    with pytest.raises(EvaluationError, match="lacks a corpus"):
        probed(ledger, identity, identity.composite(study.config.space.vertices()[0]), 0, 8)


def test_a_probe_that_was_left_is_taken_up_as_the_same_probe(tmp_path):
    study = make(tmp_path, search={"trials": 2})
    study.run()
    config = study.config.model_copy(update={"search": study.config.search.model_copy(update={"trials": 9})})
    with closing(Runs(config, 1).open("simplex-gp", gradients_fit=True)) as search:
        while (left := search.ask()).part is None:
            search.tell(left.number, 9.0, TrialAttributes())
    with closing(Runs(config, 1).open("simplex-gp", gradients_fit=True)) as search:
        adopted = search.ask()
    assert (adopted.number, adopted.coefficients, adopted.part) == (left.number, left.coefficients, left.part)


def test_a_study_goes_on_as_if_it_had_not_been_interrupted(tmp_path):
    """Four trials, then the others in another process, against all at once."""
    whole, parted = make(tmp_path / "a"), make(tmp_path / "b", search={"trials": 5})
    whole.run()
    parted.run()
    again = make(tmp_path / "b")
    again.run()
    first, second = (study.summary().trials["simplex-gp"] for study in (whole, again))
    # The budget's last trial is whole, so what comes after trial 4 differs; until then all is the same.
    assert [(r.coefficients, r.part) for r in first[:4]] == [(r.coefficients, r.part) for r in second[:4]]
    assert len(second) == 12 and any(r.part is not None for r in second[5:])


def test_a_study_that_was_begun_with_gradients_of_all_windows_goes_on_with_them(tmp_path):
    """As one of an earlier release was."""
    make(tmp_path, search={"racing": False, "trials": 4}).run()
    watching = RecordedProgress()
    study = make(tmp_path, watching, search={"trials": 8})
    study.run()
    assert len(study.summary().trials["simplex-gp"]) == 8 and not probes_of(watching.records)
    vertices = set(study.config.space.vertices())
    assert all(record.gradient for record in watching.records if record.coefficients not in vertices)
    assert any(record.gradient for record in watching.records)


def test_a_probe_that_was_left_is_given_up_where_gradients_are_of_all_windows_now(tmp_path):
    study = make(tmp_path, search={"trials": 2})
    study.run()
    config = study.config.model_copy(update={"search": study.config.search.model_copy(update={"trials": 9})})
    with closing(Runs(config, 1).open("simplex-gp", gradients_fit=True)) as search:
        while search.ask().part is None:
            pass
    again = make(tmp_path, search={"trials": 9, "racing": False})
    again.run()
    records = again.summary().trials["simplex-gp"]
    assert len(records) == 9 and sum(record.state == "failed" for record in records) == 1


def test_what_is_protected_pulls_on_a_probe_s_gradient(tmp_path):
    """No corpus may get worse, and the search minimizes one corpus alone: its probes away from the others violate."""
    watching = RecordedProgress()
    objective = {"weights": {"math": 1}, "protect": dict.fromkeys(NAMES, 0.0)}
    study = make(tmp_path, watching, search={"trials": 14}, objective=objective)
    study.run()
    identity, ledger = of(study)
    over = [record for record in probes_of(watching.records) if record.violation]
    assert over
    parts, corpora = part_count(WINDOWS), identity.corpora[SEARCH]
    for record in over:
        composite = identity.composite(record.coefficients)
        slopes = corrected(
            ledger, identity, probed(ledger, identity, composite, record.part, parts), record.part, parts
        )
        pulls = {
            fine_tune: (record.gradient[fine_tune] - slopes[corpora["math"]][content])
            for fine_tune, content in identity.fine_tunes.items()
        }
        possible = [
            {
                fine_tune: 10 * sum(slopes[corpora[name]][content] for name in chosen)
                for fine_tune, content in identity.fine_tunes.items()
            }
            for chosen in (NAMES[:1], NAMES[1:2], NAMES[2:], NAMES[:2], NAMES[1:], (NAMES[0], NAMES[2]), NAMES)
        ]
        assert any(pulls == pytest.approx(each, abs=1e-9) for each in possible)


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({}, 8),
        ({"evaluation": {"windows": 4}}, 2),
        ({"evaluation": {"windows": 3}}, 0),
        ({"search": {"racing": False}}, 0),
        ({"search": {"gradients": False}}, 0),
        ({"search": {"gradients": "auto"}}, 0),
    ],
)
def test_parts_are_for_gradients_that_may_be_of_few_windows(tmp_path, sections, wanted):
    study = make(tmp_path, **sections)
    study.config.output.mkdir(parents=True, exist_ok=True)
    with closing(Runs(study.config, 1).open("simplex-gp", gradients_fit=True)) as search:
        assert search.parts == wanted
    with closing(Runs(study.config, 1).open("gradient", gradients_fit=True)) as search:
        assert search.parts == 0


def test_without_races_every_gradient_is_of_all_windows(tmp_path):
    watching = RecordedProgress()
    study = make(tmp_path, watching, search={"racing": False, "trials": 6})
    study.run()
    landmarks = set(study.config.space.vertices())
    assert not probes_of(watching.records)
    assert all(record.forwards == (1.0 if record.coefficients in landmarks else 3.0) for record in watching.records)


def test_a_study_with_probes_says_how_well_its_coefficients_are_known(tmp_path):
    """The intervals are those of a search that scored every trial whole, about."""
    probing = make(tmp_path / "a", search={"trials": 20})
    probing.run()
    plain = make(tmp_path / "b", search={"trials": 40, "gradients": False, "racing": False})
    plain.run()
    ours, theirs = probing.summary().precision, plain.summary().precision
    assert ours is not None and theirs is not None
    for name in NAMES:
        (low, high), (least, most) = ours.intervals[name], theirs.intervals[name]
        assert low < most and least < high, "they overlap"
    assert ours.regret == pytest.approx(theirs.regret, rel=2, abs=2e-3)


def test_every_probe_is_told_as_a_pruned_trial_whose_estimate_optuna_shows(tmp_path):
    study = make(tmp_path)
    study.run()
    stored = optuna.load_study(study_name="tiny/simplex-gp", storage=study.config.storage)
    probes = [trial for trial in stored.trials if "part" in trial.user_attrs]
    assert probes and all(trial.state == optuna.trial.TrialState.PRUNED for trial in probes)
    assert all(trial.intermediate_values.keys() == {WINDOWS // PARTS} for trial in probes)
    assert stored.best_trial.number not in {trial.number for trial in probes}
    assert study.trials()["state"].tolist().count("probe") == len(probes)
    assert all(a < b for a, b in pairwise(trial.number for trial in stored.trials))
