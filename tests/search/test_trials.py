"""Laws of trials: what was seen is charged, what was stopped is an estimate, and all is read back as it was told."""

from dataclasses import replace
from pathlib import Path

import in_process
import numpy as np
import pytest
import worlds
import yaml
from recorded import RecordedProgress

from dem_opt.errors import InputError
from dem_opt.evaluation.racing import CLEAR, MARGIN
from dem_opt.evaluation.worker import Worker
from dem_opt.planning.inputs import load_inputs
from dem_opt.search.runs import Runs
from dem_opt.search.samplers.covariance import interpolate
from dem_opt.search.trials import base_scores, recall
from dem_opt.simplex import Coefficients
from dem_opt.storage.engine import connect
from dem_opt.storage.ledger import Ledger
from dem_opt.study import Study
from dem_opt.types import HELD_OUT, SEARCH, Composite, Evaluation, Request, TrialRecord

WINDOWS = 16
NAMES = ("code", "math", "prose")


def make(folder: Path, progress=None, names=NAMES, **sections) -> Study:
    """A study of 16 windows, so that races have eight looks."""
    search = {"algorithm": "simplex-gp", "trials": 12, "lookahead": 0} | sections.pop("search", {})
    evaluation = {"window": 32, "windows": WINDOWS, "held_out": 4}
    path = worlds.study(folder, names, search=search, evaluation=evaluation, **sections)
    return in_process.open_study(path, progress)


def of(study: Study):
    """The study's question and its ledger."""
    return load_inputs(study.config, "study.yaml").identity(), Ledger(connect(study.config.storage))


def comparable(record: TrialRecord) -> TrialRecord:
    """A record without the evaluation's own scores and seconds."""
    return replace(
        record, evaluation=Evaluation(scores={}, forward_tokens=record.evaluation.forward_tokens), propose_seconds=0.0
    )


def windows_of(record: TrialRecord) -> set[int]:
    return {len(score.nats_W) for score in record.scores.values()}


@pytest.mark.parametrize("algorithm", ["simplex-gp", "random", "tpe", "cmaes"])
def test_a_trial_that_loses_its_race_is_charged_for_what_it_was_shown(tmp_path, algorithm):
    watching = RecordedProgress()
    study = make(tmp_path, watching, search={"algorithm": algorithm, "trials": 14})
    study.run()
    identity, ledger = of(study)
    partial = [record for record in watching.records if record.is_partial]
    assert partial, "some lose"
    charged: dict[Coefficients, float] = {}
    for record in watching.records:
        (seen,) = windows_of(record)
        charged[record.coefficients] = charged.get(record.coefficients, 0.0) + record.forwards
        assert charged[record.coefficients] == seen / WINDOWS, "what completes a stopped trial is charged for the rest"
        assert record.is_partial == (seen < WINDOWS) == (record.error > 0)
        stored = recall(ledger, identity, identity.composite(record.coefficients), SEARCH, whole=False)
        assert all(stored[name].nats_W[:seen] == score.nats_W for name, score in record.scores.items())


def test_a_promising_trial_that_was_stopped_is_completed_and_may_win(tmp_path):
    """The windows scored before the stop are not scored again."""
    watching = RecordedProgress()
    study = make(tmp_path, watching, search={"trials": 16})
    winner = study.run().winner
    first: dict[Coefficients, TrialRecord] = {}
    completed = []
    for record in watching.records:
        before = first.setdefault(record.coefficients, record)
        if before is not record:
            assert before.is_partial and not record.is_partial
            assert record.evaluation.forward_tokens == 3 * 32 * WINDOWS * (1 - before.forwards)
            completed.append(record)
    assert completed and len({record.coefficients for record in completed}) == len(completed)
    assert winner.coefficients in {record.coefficients for record in completed}


def test_landmarks_and_the_grid_are_never_stopped(tmp_path):
    watching = RecordedProgress()
    study = make(tmp_path, watching, search={"divisions": 4})
    study.compare(["simplex-gp", "grid"])
    landmarks = set(study.config.space.landmarks())
    for record in watching.records:
        if record.study == "tiny/grid" or record.coefficients in landmarks:
            assert record.forwards == 1.0 and not record.is_partial


def test_an_estimate_is_the_control_s_objective_and_the_mean_paired_difference(tmp_path):
    """By hand for equal weights: of each distribution, sums of nats over sums of tokens."""
    watching = RecordedProgress()
    study = make(tmp_path, watching)
    study.run()
    identity, ledger = of(study)
    space, whole = study.config.space, []
    for record in watching.records:
        if not record.is_partial:
            whole.append(record)
            continue
        shares = np.array([space.shares(trial.coefficients) for trial in whole])
        weights = interpolate(shares, space.shares(record.coefficients))
        (seen,) = windows_of(record)
        estimates = []
        for name, score in record.scores.items():
            stored = [recall(ledger, identity, identity.composite(trial.coefficients), SEARCH)[name] for trial in whole]
            control = weights @ np.array([known.nats_W for known in stored])
            gap = np.sum(score.nats_W - control[:seen]) / score.tokens
            estimates.append(control.sum() / stored[0].tokens + gap)
        assert record.objective == pytest.approx(np.mean(estimates), abs=1e-10)
        gain = min(trial.objective for trial in whole) - record.objective
        assert gain < MARGIN or gain > CLEAR * record.error, "it won't win, or it is clear that it is better"
    assert len(whole) < len(watching.records)


def test_a_partial_trial_never_wins(tmp_path):
    study = make(tmp_path, search={"trials": 20})
    summary = study.compare(["simplex-gp"]).summary
    whole = [record for record in summary.trials["simplex-gp"] if not record.is_partial]
    assert summary.winner.objective[SEARCH] == min(record.objective for record in whole)
    assert all(set(map(len, (s.nats_W for s in row.scores[SEARCH].values()))) == {WINDOWS} for row in summary.top)


@pytest.mark.parametrize("racing", [True, False])
def test_what_is_read_back_is_what_was_told(tmp_path, racing):
    watching = RecordedProgress()
    study = make(tmp_path, watching, search={"racing": racing})
    study.run()
    read = study.summary().trials["simplex-gp"]
    assert any(record.is_partial for record in read) is racing
    assert list(map(comparable, watching.records)) == list(map(comparable, read))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_study_proposes_the_same_whatever_the_ledger_has(tmp_path, gradients, monkeypatch):
    """A grid over the same ledger first, and one study of the same name twice in another database."""
    settings = {"search": {"gradients": gradients, "trials": 9}}
    alone, beside = RecordedProgress(), RecordedProgress()
    make(tmp_path / "alone", alone, **settings).run()
    study = make(tmp_path / "beside", beside, **settings)
    study.compare(["grid"])
    beside.records.clear()
    study.run()
    assert [(r.coefficients, r.objective, r.error, r.forwards) for r in alone.records] == [
        (r.coefficients, r.objective, r.error, r.forwards) for r in beside.records
    ]


def test_windows_that_were_measured_are_not_measured_again(tmp_path, monkeypatch):
    """A raced trial's composite, asked for whole: only the rest goes through the model."""
    watching = RecordedProgress()
    study = make(tmp_path, watching)
    study.run()
    partial = next(record for record in watching.records if record.is_partial)
    requests: list[Request] = []
    original = Worker.evaluate

    def watched(worker, request):
        answer = original(worker, request)
        requests.append(request)
        expected = sum(WINDOWS - len(request.known[key].nats_W) for key in request.corpora if key in request.known)
        if request.known:
            assert answer.forward_tokens == expected * 32
        return answer

    monkeypatch.setattr(Worker, "evaluate", watched)
    scores = study.score(partial.coefficients.weights)
    assert any(request.known for request in requests)
    for name, score in partial.scores.items():
        assert scores[SEARCH][name].nats_W[: len(score.nats_W)] == score.nats_W


def difference_of(study: Study, record: TrialRecord, name: str, step: float = 2e-3) -> float:
    """d objective / d (w_name - w_other) by central differences, the other being another coefficient above 0."""
    weights = record.coefficients.weights
    other = max((candidate for candidate in weights if candidate != name), key=lambda candidate: weights[candidate])
    values = []
    for sign in (1, -1):
        moved = weights | {name: weights[name] + sign * step, other: weights[other] - sign * step}
        scores = study.score(moved)[SEARCH]
        values.append(np.mean([score.nll for score in scores.values()]))
    return float(values[0] - values[1]) / (2 * step) + record.gradient[other]


def test_gradients_are_those_of_the_objective(tmp_path):
    watching = RecordedProgress()
    study = make(tmp_path, watching, search={"gradients": True, "racing": False, "trials": 7})
    study.compare(["simplex-gp", "gradient"])
    points = [record.coefficients for record in watching.records if record.study == "tiny/simplex-gp"]
    by_search = {
        algorithm: [record.forwards for record in watching.records if record.study == f"tiny/{algorithm}"]
        for algorithm in ("simplex-gp", "gradient")
    }
    vertices = study.config.space.vertices()
    expected = [1.0 if point in vertices else 3.0 for point in points]
    assert by_search == {"simplex-gp": expected, "gradient": [3.0] * 7}, "vertices have none"
    assert points[0] == study.config.space.centroid() and expected.count(3.0) > 3
    centroid = study.config.space.centroid()
    inner = next(record for record in watching.records if record.gradient and record.coefficients == centroid)
    for name in NAMES:
        assert inner.gradient[name] == pytest.approx(difference_of(study, inner, name), rel=2e-2, abs=2e-4)


def test_a_gradient_along_fewer_experts_is_measured_again(tmp_path):
    """A study of two distributions, then one of three over the same ledger: scores stand, slopes are lacking."""
    search = {"algorithm": "gradient", "trials": 3}
    make(tmp_path, names=NAMES[:2], search=search).run()
    study = make(tmp_path, search=search, simplex={"fixed": {"prose": 0.0}})
    summary = study.compare(["gradient"]).summary
    assert all(set(record.gradient) == set(NAMES) for record in summary.trials["gradient"])


def test_what_is_protected_pulls_on_the_gradient(tmp_path):
    """No corpus may get worse: where one does, ten times its own slope is added."""
    watching = RecordedProgress()
    objective = {"weights": {"math": 1}, "protect": dict.fromkeys(NAMES, 0.0)}
    study = make(tmp_path, watching, search={"gradients": True, "racing": False, "trials": 8}, objective=objective)
    study.compare(["simplex-gp", "gradient"])
    identity, ledger = of(study)
    base = base_scores(ledger, identity)
    over = [record for record in watching.records if record.gradient and record.violation]
    assert over
    for record in over:
        composite = identity.composite(record.coefficients)
        gradients = ledger.gradients(composite, identity.keys(SEARCH), identity.differentiation)
        worse = [name for name in NAMES if record.scores[name].nll > base[name].nll]
        for name, content in identity.fine_tunes.items():
            slopes = {
                corpus: gradients[identity.corpora[SEARCH][corpus]][content] / record.scores[corpus].tokens
                for corpus in NAMES
            }
            pulled = slopes["math"] + 10 * sum(slopes[corpus] for corpus in worse)
            assert record.gradient[name] == pytest.approx(pulled)


@pytest.mark.parametrize("algorithm", ["simplex-gp", "random", "grid"])
def test_the_largest_regret_is_minimized_against_every_own_fine_tune(tmp_path, algorithm):
    watching = RecordedProgress()
    study = make(tmp_path, watching, objective={"worst": True}, search={"algorithm": algorithm, "divisions": 4})
    summary = study.compare([algorithm]).summary
    identity, ledger = of(study)
    for split in (SEARCH, HELD_OUT):
        own = {
            name: recall(ledger, identity, Composite.single(content), split)[name].nll
            for name, content in identity.fine_tunes.items()
        }
        for row in (row for row in summary.results if split in row.objective):
            regrets = [score.nll - own[name] for name, score in row.scores[split].items()]
            assert row.objective[split] == pytest.approx(max(regrets))
    assert not any(record.is_partial for record in watching.records)
    assert summary.winner.objective[SEARCH] == min(record.objective for record in watching.records)


@pytest.mark.parametrize(
    ("simplex", "inside"),
    [
        ({"total": [0, 2]}, lambda w: sum(w.values()) <= 2),
        ({"bounds": {"code": [0.1, 0.4]}}, lambda w: 0.1 <= w["code"] <= 0.4),
        ({"fixed": {"math": 0.3}}, lambda w: w["math"] == 0.3),
    ],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_every_space_is_searched_scored_and_compared(tmp_path, simplex, inside, gradients):
    study = make(tmp_path, simplex=simplex, search={"trials": 10, "gradients": gradients, "divisions": 4})
    summary = study.compare(["simplex-gp", "grid"]).summary
    for records in summary.trials.values():
        assert all(inside(record.coefficients.weights) and record.objective for record in records)
    labels = [row.label for row in summary.results]
    assert {"base", *NAMES, "uniform"} <= set(labels), "the fine-tunes as they are, in the space or not"
    assert study.summary() == summary


def test_the_best_five_are_reported_on_the_held_out_split(tmp_path):
    study = make(tmp_path, search={"algorithm": "grid", "divisions": 4}, report={"top": 5})
    summary = study.compare(["grid"]).summary
    ranked = sorted({record.objective for record in summary.trials["grid"]})
    assert [row.objective[SEARCH] for row in summary.top] == ranked[:5]
    assert all(HELD_OUT in row.objective for row in summary.top)
    assert summary.top[0].coefficients == summary.winner.coefficients


BUDGETS = [
    ({"trials": 9}, "all 9 planned trials", lambda records: len(records) == 9),
    ({"forwards": 6.5}, "of 6.5 forward-equivalents", lambda records: 6.5 <= sum(r.forwards for r in records) < 8),
    ({"forwards": 12, "gradients": True}, "12", lambda records: 12 <= sum(r.forwards for r in records) < 15),
    ({"minutes": 1e-9}, "minutes", lambda records: not records),
    ({"patience": 2, "tolerance": 1e9, "trials": 30}, "the last 2 proposals", lambda records: len(records) == 6),
    ({}, "less than 0.0001 nats per token expected of each of the last 3", lambda records: 7 < len(records) < 100),
    ({"patience": None, "trials": 60}, "all 60 planned trials", lambda records: len(records) == 60),
]


@pytest.mark.parametrize(("search", "said", "spent"), BUDGETS)
def test_a_search_says_why_it_stopped(tmp_path, search, said, spent):
    watching = RecordedProgress()
    study = make(tmp_path, watching, search={"trials": 100} | search)
    if "minutes" in search:
        study.compare(["grid"])
        watching.records.clear()
    summary = study.compare(["simplex-gp"]).summary
    assert spent([record for record in watching.records if record.study == "tiny/simplex-gp"])
    assert said in summary.stopped["simplex-gp"] or not summary.trials.get("simplex-gp")
    assert any("tiny/simplex-gp ended after" in line and said in line for line in watching.notes)


@pytest.mark.parametrize("racing", [True, False])
def test_a_larger_budget_goes_on_where_a_smaller_one_ended(tmp_path, racing):
    """To the same trials, unless the smaller budget's last one completed another."""
    whole, parts = RecordedProgress(), RecordedProgress()
    make(tmp_path / "whole", whole, search={"trials": 10, "racing": racing}).run()
    make(tmp_path / "parts", parts, search={"trials": 6, "racing": racing}).run()
    make(tmp_path / "parts", parts, search={"trials": 10, "racing": racing}).run()
    same = 5 if racing else 10
    assert list(map(comparable, whole.records))[:same] == list(map(comparable, parts.records))[:same]
    assert len(parts.records) == len({record.number for record in parts.records}) == 10


@pytest.mark.parametrize("algorithm", ["simplex-gp", "tpe"])
def test_by_default_one_worker_s_proposals_know_all_scores(tmp_path, algorithm):
    """As a search of no proposals ahead, and otherwise than one of several."""
    auto, none, several = (
        make(tmp_path / str(ahead), search={"algorithm": algorithm, "trials": 9, "lookahead": ahead}).run().summary
        for ahead in ("auto", 0, 3)
    )
    first, second, third = (
        [(record.coefficients, record.objective) for record in summary.trials[algorithm]]
        for summary in (auto, none, several)
    )
    assert first == second != third


def test_several_seeds_are_several_searches_over_one_ledger(tmp_path):
    study = make(tmp_path, search={"algorithm": "random", "trials": 4, "divisions": 2})
    summary = study.compare(["random", "grid"], seeds=3).summary
    assert list(summary.trials) == ["grid", "random", "random@1", "random@2"]
    points = [tuple(record.coefficients for record in records) for records in summary.trials.values()]
    assert len(set(points)) == 4
    assert [row.label for row in summary.results if row.role == "best"].count("best of random") == 1
    alone = make(tmp_path / "alone", search={"algorithm": "random", "trials": 4, "seed": 2}).compare(["random"]).summary
    assert points[-1] == tuple(record.coefficients for record in alone.trials["random"])
    with Runs(study.config, 1).existing() as searches:
        assert list(searches) == list(summary.trials)


def test_gradients_are_automatic_where_they_are_worth_it(tmp_path, monkeypatch):
    few, many = ("a", "b", "c"), tuple("abcdefg")
    for names, expected in ((few, False), (many, True)):
        config = make(tmp_path / str(len(names)), names=names).config
        config.output.mkdir(parents=True)
        assert Runs(config, 1).open("simplex-gp", gradients_fit=True).gradients is expected
        assert not Runs(config, 1).open("simplex-gp", gradients_fit=False).gradients
        with pytest.raises(InputError, match=r"search.algorithm = 'gradient': the activations"):
            Runs(config, 1).open("gradient", gradients_fit=False)
        assert Runs(config, 1).open("gradient").gradients and not Runs(config, 1).open("tpe").gradients
    path = tmp_path / "7" / "study.yaml"
    content = yaml.safe_load(path.read_text()) | {"objective": {"worst": True}}
    path.write_text(yaml.safe_dump(content))
    assert not Runs(Study.load(path).config, 1).open("simplex-gp", gradients_fit=True).gradients
