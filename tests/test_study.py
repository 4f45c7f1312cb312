"""Laws of whole studies, in process over a tiny world: one ledger, one winner, nothing measured twice."""

import json
import sqlite3
from contextlib import closing
from math import inf
from pathlib import Path

import pyarrow
import pytest
import torch
import worlds
from in_process import (
    add_general,
    count_evaluations,
    edit,
    evaluated_on_the_simplex,
    open_study,
    open_tracked,
    search_keys,
)
from pyarrow import parquet
from recorded import RecordedProgress
from transformers import AutoModelForCausalLM

from dem_opt.config import load
from dem_opt.errors import EvaluationError, InputError
from dem_opt.evaluation.worker import Worker
from dem_opt.export import writer
from dem_opt.planning.inputs import check_window, load_inputs
from dem_opt.progress import NullProgress, current_progress
from dem_opt.search.optuna_storage import study_names
from dem_opt.search.optuna_study import Search
from dem_opt.study import Study
from dem_opt.types import SEARCH
from dem_opt.workflows import export as workflow

GRID = {"algorithm": "random", "trials": 5, "divisions": 4}


@pytest.fixture
def evaluated(monkeypatch):
    """Counts the evaluations of every (composite, corpus)."""
    return count_evaluations(monkeypatch)


def test_grid_and_search_share_every_measurement(tmp_path, evaluated):
    study = open_study(worlds.study(tmp_path, search=GRID))
    summary = study.compare(["grid", "random", "simplex-gp"]).summary
    assert evaluated and set(evaluated.values()) == {1}
    before = sum(evaluated.values())
    again = study.compare(["simplex-gp", "random", "grid"]).summary
    assert sum(evaluated.values()) == before
    assert [row.objective for row in again.results] == [row.objective for row in summary.results]
    assert len(summary.trials["grid"]) == 15


def test_the_winner_is_the_search_splits_best(tmp_path):
    study = open_study(worlds.study(tmp_path, search=GRID))
    winner = study.run().winner
    summary = study.compare(["grid"]).summary
    bests = [row for row in summary.results if row.role == "best"]
    assert summary.winner == min(bests, key=lambda row: row.objective["search"])
    trials = [record for records in summary.trials.values() for record in records]
    assert summary.winner.objective["search"] == min(record.objective for record in trials)
    assert winner.coefficients in [record.coefficients for record in summary.trials["random"]]


def test_the_order_of_the_study_file_changes_no_bit(tmp_path):
    search = {"algorithm": "simplex-gp", "trials": 6}
    winners = []
    for names in (("code", "math", "prose"), ("prose", "code", "math")):
        study = open_study(worlds.study(tmp_path / names[0], names, search=search))
        study.run()
        winners.append([(r.coefficients, r.objective) for r in study.summary().trials["simplex-gp"]])
    assert winners[0] == winners[1]


def renamed(study: dict) -> None:
    study["name"] = "another"


def test_a_renamed_study_takes_over_what_was_measured(tmp_path, evaluated):
    path = worlds.study(tmp_path, ("code", "math"), search=GRID)
    first = open_study(path).run()
    before = (tmp_path / "runs/tiny/study.db").read_bytes()
    evaluated.clear()
    watching = RecordedProgress()
    study = open_study(edit(path, renamed), watching)
    assert study.run().winner.objective == first.winner.objective
    assert not evaluated and len(watching.records) == GRID["trials"]
    assert [line for line in watching.notes if "runs/tiny/study.db" in line]
    assert (tmp_path / "runs/tiny/study.db").read_bytes() == before
    watching = RecordedProgress()
    open_study(path, watching).run()
    assert not [line for line in watching.notes if "taken over" in line]


@pytest.mark.parametrize("neighbour", ["no database", "another database", "an empty file"])
def test_a_neighbour_that_is_no_ledger_is_passed_over(tmp_path, neighbour):
    file = tmp_path / "runs/neighbour/study.db"
    file.parent.mkdir(parents=True)
    if neighbour == "another database":
        with closing(sqlite3.connect(file)) as other, other:
            other.execute("CREATE TABLE dem_score (something)")
    else:
        file.write_bytes(b"" if neighbour == "an empty file" else b"words" * 1000)
    before = file.read_bytes()
    open_study(worlds.study(tmp_path, ("code", "math"), search=GRID)).run()
    assert file.read_bytes() == before


def test_a_general_corpus_is_scored_and_changes_no_objective(tmp_path, evaluated):
    path = worlds.study(tmp_path, search=GRID)
    before = open_study(path).compare(["grid"]).summary
    old = set(evaluated)
    evaluated.clear()
    watching = RecordedProgress()
    study = open_study(add_general(path), watching)
    after = study.compare(["grid"]).summary
    assert not old & set(evaluated)
    assert {key for _, key in evaluated} == set(load_inputs(load(path), path).identity().keys(SEARCH)) - {
        k for _, k in old
    } | {load_inputs(load(path), path).identity().corpora["held_out"]["web"]}, "only the new corpus is scored"
    assert any("general.web.validation is new" in line and "generation 2" in line for line in watching.notes)
    assert after.winner.objective == before.winner.objective and after.winner.coefficients == before.winner.coefficients
    assert all(set(result.scores[SEARCH]) == {"code", "math", "prose", "web"} for result in after.results)
    assert after.distributions == ("code", "math", "prose") and list(after.weights) == [*after.distributions, "web"]
    assert study.summary() == after and "merge kernel" in after.facts["merging here"]


def test_a_study_may_mix_kinds_of_files_and_formats(tmp_path):
    path = worlds.study(tmp_path, search=GRID | {"trials": 2})
    (tmp_path / "models/base/chat_template.jinja").write_text(
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    texts = [(text[:20], text[20:60]) for text in worlds.documents(9)]
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in texts]
    parquet.write_table(pyarrow.table({"chat": chats}), tmp_path / "data/chats.parquet")
    pairs = [json.dumps({"prompt": a, "completion": b}) for a, b in texts]
    (tmp_path / "data/pairs.jsonl").write_text("\n".join(pairs))

    def mix(study):
        by_name = study["distributions"]
        by_name["code"]["validation"] = {"path": "data/chats.parquet", "format": "messages", "messages": "chat"}
        by_name["math"]["validation"] = {"path": "data/pairs.jsonl", "format": "prompt_completion"}
        study["evaluation"]["window"] = 64

    winner = open_study(edit(path, mix)).run().winner
    tokens = {name: score.tokens for name, score in winner.scores[SEARCH].items()}
    assert tokens["prose"] > 3 * 63 and all(0 < tokens[name] < 4 * 63 for name in ("code", "math"))


def test_an_objective_may_name_a_general_corpus(tmp_path):
    path = add_general(worlds.study(tmp_path, search=GRID), weights={"web": 2.0})
    winner = open_study(path).run().winner
    assert winner.objective[SEARCH] == winner.scores[SEARCH]["web"].nll


@pytest.mark.parametrize(("algorithm", "name"), [("grid", "web"), ("simplex-gp", "code")])
def test_protection_changes_the_winner_to_the_best_that_keeps_it(tmp_path, evaluated, algorithm, name):
    """The allowance is the middle of what the free study's trials do to the corpus, so some keep it and some don't."""
    path = add_general(worlds.study(tmp_path, search=GRID | {"algorithm": algorithm}))
    free = open_study(path).compare([algorithm]).summary
    base = free.results[0].scores[SEARCH][name].nll
    excess = sorted(record.scores[name].nll - base for record in free.trials[algorithm])
    best = free.winner.scores[SEARCH][name].nll - base
    allowance = max((excess[0] + best) / 2, 0.0)
    evaluated.clear()
    study = open_study(add_general(path, protect={name: allowance}))
    kept = study.compare([algorithm]).summary
    trials = kept.trials[algorithm]
    whole = [record for record in trials if not record.is_partial]
    for record in whole:
        assert record.violation == pytest.approx(max(0.0, record.scores[name].nll - base - allowance), abs=1e-12)
        assert record.penalized == pytest.approx(record.objective + 10 * record.violation)
    feasible = [record for record in whole if record.violation == 0]
    best = min(feasible or whole, key=lambda record: (record.violation, record.objective))
    assert (kept.winner.coefficients, kept.winner.violation) == (best.coefficients, best.violation)
    if algorithm == "grid":
        assert not evaluated_on_the_simplex(evaluated, path), "every composite was measured already"
        assert feasible and kept.winner.coefficients != free.winner.coefficients
        assert kept.winner.algorithm == "grid", "in its second generation too"
        assert kept.winner.objective[SEARCH] > free.winner.objective[SEARCH]
    objectives = {trial.number: trial.objective for trial in optuna_trials(path, study, algorithm)}
    assert objectives == {record.number: record.penalized for record in trials}


def optuna_trials(path: Path, study: Study, algorithm: str) -> list:
    """Trials of the newest generation, as Optuna has them."""
    names = [name for name in study_names(study.config.storage) if name.startswith(f"tiny/{algorithm}")]
    settings = study.config.search.model_copy(update={"algorithm": algorithm})
    return Search(study.config.storage, max(names), study.config.space, settings).trials()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda study: study["evaluation"].update(window=16), "evaluation.window = '16'"),
        (lambda study: study["evaluation"].update(windows=3), "evaluation.windows = '3'"),
        (lambda study: study["evaluation"].update(seed=1), "evaluation.seed = '1'"),
        (lambda study: study["evaluation"].update(batch=64), "evaluation.batch = '64'"),
        (lambda study: study["evaluation"].update(dtype="bfloat16"), "evaluation.dtype = 'bfloat16'"),
        (
            lambda study: study["distributions"]["code"].update(validation="data/math.jsonl"),
            "distributions.code.held_out",
        ),
    ],
)
def test_a_change_of_scoring_is_refused_and_named(tmp_path, change, field):
    path = worlds.study(tmp_path, search=GRID | {"trials": 1})
    open_study(path).run()
    with pytest.raises(InputError) as refusal:
        open_study(edit(path, change)).run()
    assert field in str(refusal.value) and "would not compare" in str(refusal.value)


def test_a_trial_calls_forward_once_for_each_batch_and_opens_no_file(tmp_path, monkeypatch):
    # 3 distributions of 16 windows of 32 tokens, 8 blocks of 2 windows, 64 tokens to a batch: 3 x 8 calls.
    path = worlds.study(tmp_path, search=GRID | {"racing": False})
    edit(path, lambda study: study["evaluation"].update(batch=64, windows=16, held_out=16))
    calls, opened, original = [], [], Worker.evaluate

    def watched(worker, request):
        handle = worker.model.register_forward_hook(lambda *_: calls.append(request.ticket))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.open", lambda *arguments, **_: opened.append(arguments))
            patch.setattr("safetensors.safe_open", lambda *arguments, **_: opened.append(arguments))
            answer = original(worker, request)
        handle.remove()
        if len(request.corpora) == 3:
            assert calls.count(request.ticket) == 24
        calls.clear()
        return answer

    monkeypatch.setattr(Worker, "evaluate", watched)
    open_study(path).run()
    assert opened == []


def test_a_score_is_that_of_the_composite_and_of_a_model(tmp_path):
    study = open_study(worlds.study(tmp_path, search=GRID))
    study.merge({"code": 0.25, "math": 0.75}, tmp_path / "merged")
    composite = study.score({"code": 0.25, "math": 0.75})
    model = study.score_model(tmp_path / "merged")
    vertex, single = study.score({"code": 1}), study.score_model(tmp_path / "models/code")
    assert composite == model and vertex == single
    assert composite.keys() == {"search", "held_out"} and composite["search"].keys() == {"code", "math", "prose"}


def test_the_winner_is_exported_proved_and_registered(tmp_path):
    study = open_tracked(worlds.study(tmp_path, search=GRID))
    winner = study.run().winner
    champion = study.export(tmp_path / "best")
    assert champion.result == winner and champion.version == "1"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    weights = winner.coefficients.weights
    for name, parameter in model.named_parameters():
        terms = [
            weight * AutoModelForCausalLM.from_pretrained(tmp_path / "models" / source).get_parameter(name).double()
            for source, weight in weights.items()
        ]
        assert torch.allclose(parameter.double(), sum(terms), rtol=0, atol=1e-6)
    assert "coefficient" in (tmp_path / "best/README.md").read_text()
    assert study.export(tmp_path / "best").version == "1", "the same model is registered once"


def test_a_model_that_can_not_be_proved_leaves_nothing(tmp_path, monkeypatch):
    study = open_study(worlds.study(tmp_path, search=GRID))
    study.run()

    def tampered(written):
        weights = next(written.path.glob("*.safetensors"))
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        writer.prove(written)

    monkeypatch.setattr(workflow, "prove", tampered)
    with pytest.raises(writer.ExportError):
        study.export(tmp_path / "best")
    assert not [path for path in tmp_path.iterdir() if "best" in path.name]


def test_a_composite_that_can_not_be_scored_fails_alone(tmp_path, monkeypatch):
    path, original = worlds.study(tmp_path, search=GRID), Worker.evaluate
    keys = search_keys(path)

    def failing(worker, request):
        if request.ticket == 2 and request.corpora == keys:
            raise EvaluationError("the loss of window 0 is nan")
        return original(worker, request)

    monkeypatch.setattr(Worker, "evaluate", failing)
    study = open_study(path)
    study.compare(["grid"])
    trials = study.summary().trials["grid"]
    assert [record.number for record in trials if record.objective is None] == [2]
    assert trials[2].reason == "the loss of window 0 is nan" and len(trials) == 15


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions"])
def test_a_window_longer_than_the_bases_positions_is_refused(tmp_path, key):
    path = worlds.study(tmp_path)
    edit(path, lambda study: study["evaluation"].update(window=65))
    with pytest.raises(InputError, match=r"evaluation.window = 65: the base has 64 positions"):
        load_inputs(load(path), path)
    config = tmp_path / "models/base/config.json"
    described = json.loads(config.read_text())
    del described["max_position_embeddings"]
    config.write_text(json.dumps(described))
    assert load_inputs(load(path), path).corpora, "no limit is named"
    config.write_text(json.dumps(described | {"n_positions": 64, "is_encoder_decoder": True}))
    assert _window_is_checked(path) is False
    config.write_text(json.dumps(described | {key: 64}))
    assert _window_is_checked(path) is True


def _window_is_checked(path: Path) -> bool:
    try:
        config = load(path)
        check_window(config.base.path, config.evaluation.window, path)
    except InputError:
        return True
    return False


def test_a_study_reports_the_phases_of_code_far_below_its_workflows(tmp_path):
    """Hashing and writing take minutes for large models; they report without a progress of their own."""
    progress = RecordedProgress()
    path = worlds.study(tmp_path)
    open_study(path, progress).merge({"code": 0.5, "math": 0.5}, tmp_path / "merged")
    assert {"hashing base", "merging and writing", "comparing from disk"} <= set(progress.phases)
    assert isinstance(current_progress(), NullProgress)


def test_an_unknown_algorithm_is_named(tmp_path):
    with pytest.raises(InputError, match=r"algorithm = 'gird': no such algorithm; did you mean 'grid'\?"):
        open_study(worlds.study(tmp_path)).compare(["gird"])


def test_a_report_of_nothing_says_what_to_do_first(tmp_path):
    with pytest.raises(InputError, match="dem-opt run"):
        open_study(worlds.study(tmp_path)).summary()


def test_intervals_are_over_documents_unless_the_database_does_not_name_them(tmp_path):
    """A document that all windows are cut from says nothing of others."""
    path = worlds.study(tmp_path, search=GRID)
    study = open_study(path)
    margins = study.run().summary.margins
    assert {margin.sampled for margin in margins} == {"documents"}
    with closing(sqlite3.connect(tmp_path / "runs/tiny/study.db")) as connection, connection:
        one = json.dumps([[[0, 1]]] * 4)
        connection.execute("UPDATE dem_corpus SET documents = ?", (one,))
    assert all(margin.low == -inf and margin.high == inf for margin in study.summary().margins)
    with closing(sqlite3.connect(tmp_path / "runs/tiny/study.db")) as connection, connection:
        connection.execute("DELETE FROM dem_corpus")
    unnamed = study.summary().margins
    assert {margin.sampled for margin in unnamed} == {"windows"}
    assert [margin.mean for margin in unnamed] == [margin.mean for margin in margins]
    assert all(margin.low < margin.mean < margin.high for margin in unnamed)


def test_the_power_is_a_default_before_trials_tell_it(tmp_path):
    path = worlds.study(tmp_path, search=GRID | {"trials": 2})
    study = open_study(path)
    with pytest.raises(InputError):
        study.power()
    study.run()
    power = study.power()
    assert power.windows == 4 and power.detectable(16) == pytest.approx(power.detectable(4) / 4)
