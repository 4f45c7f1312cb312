"""Laws of a study that changes: what was measured stands and is free, and all searches begin with the same."""

import shutil

import pytest
import worlds
from in_process import add_general, count_evaluations, edit, evaluated_on_the_simplex, open_study, search_keys
from recorded import RecordedProgress

from dem_opt.checkpoints.files import content_hash
from dem_opt.config import load
from dem_opt.planning.inputs import load_inputs
from dem_opt.search.optuna_storage import study_names
from dem_opt.search.runs import Runs
from dem_opt.types import SEARCH

GRID = {"algorithm": "random", "trials": 5, "divisions": 4}


@pytest.fixture
def evaluated(monkeypatch):
    """Counts the evaluations of every (composite, corpus)."""
    return count_evaluations(monkeypatch)


def bounded(study: dict) -> None:
    study["simplex"] = {"bounds": {"code": [0, 0.5]}}


def test_a_study_that_grows_scores_only_the_new_corpus_on_what_it_carries_over(tmp_path, evaluated):
    path = worlds.study(tmp_path, search=GRID)
    open_study(path).compare(["random"])
    old = set(evaluated)
    old_composites, old_corpora = {composite for composite, _ in old}, {key for _, key in old}
    evaluated.clear()
    watching = RecordedProgress()
    grown = open_study(worlds.study(tmp_path, ("code", "math", "prose", "records"), search=GRID), watching)
    grown.compare(["simplex-gp"])
    assert not old & set(evaluated), "what was measured stands"
    for composite, key in evaluated:
        assert composite not in old_composites or key not in old_corpora
    carried = [record for record in watching.records[:10] if record.coefficients.units["records"] == 0]
    assert carried and all(record.scores["code"] for record in carried)
    assert any("distributions.records is new" in line and "generation 2" in line for line in watching.notes)


def test_another_weighting_needs_no_forward_pass_for_what_is_measured(tmp_path, evaluated):
    path = worlds.study(tmp_path, search=GRID)
    open_study(path).compare(["grid"])
    evaluated.clear()
    weighted = open_study(edit(path, lambda study: study.update(objective={"weights": {"code": 1}})))
    summary = weighted.compare(["grid"]).summary
    assert not evaluated_on_the_simplex(evaluated, path), "held-out reports on another winner"
    assert summary.winner.objective["search"] == summary.winner.scores["search"]["code"].nll


def test_a_study_file_that_goes_back_goes_on_with_the_generation_that_it_had(tmp_path, evaluated):
    path = worlds.study(tmp_path, ("code", "math"), search=GRID)
    original = path.read_text()
    first = open_study(path).run().summary
    second = open_study(edit(path, bounded)).run().summary
    path.write_text(original)
    exported = open_study(path).export(tmp_path / "before running again")
    evaluated.clear()
    watching = RecordedProgress()
    study = open_study(path, watching)
    again = study.run().summary
    assert not evaluated and not watching.records
    assert again.trials == first.trials and again.winner == first.winner == exported.result
    assert any("generation 1 goes on" in line for line in watching.notes)
    assert open_study(edit(path, bounded)).run().summary.trials == second.trials
    watching = RecordedProgress()
    open_study(edit(path, lambda study: study.update(simplex={"total": [0, 1]})), watching).run()
    assert any("generation 3 begins" in line for line in watching.notes)
    generations = {name.partition("#")[2] for name in study_names(study.config.storage)}
    assert generations == {"", "2", "3"}


def test_every_change_of_what_is_protected_begins_a_generation(tmp_path, evaluated):
    path = worlds.study(tmp_path, search=GRID)
    open_study(add_general(path, protect={"web": 0.1})).run()
    for generation, allowance in enumerate((0.2, 0.0), start=2):
        watching = RecordedProgress()
        open_study(add_general(path, protect={"web": allowance}), watching).run()
        assert any(
            "objective.protect.web has changed" in line and f"generation {generation} " in line
            for line in watching.notes
        )
    worlds.write_documents(tmp_path / "data/other.jsonl", worlds.documents(8))
    watching = RecordedProgress()
    edit(path, lambda study: study.update(general={"web": "data/other.jsonl"}))
    open_study(path, watching).run()
    assert any("general.web.validation has changed" in line for line in watching.notes), "it is not refused"


def test_a_checkpoint_that_changes_under_a_study_begins_a_generation(tmp_path):
    path = worlds.study(tmp_path, search=GRID)
    open_study(path).run()
    before = content_hash(tmp_path / "models/code")
    shutil.rmtree(tmp_path / "models/code")
    worlds.save_model(tmp_path / "models/code", seed=99)
    assert content_hash(tmp_path / "models/code") != before
    watching = RecordedProgress()
    study = open_study(path, watching)
    study.run()
    assert any("distributions.code has changed" in line for line in watching.notes)
    assert len(study.summary().trials["random"]) == 5


def test_what_is_reused_is_told_with_its_reason(tmp_path):
    path = worlds.study(tmp_path, search=GRID)
    open_study(path).compare(["random"])
    watching = RecordedProgress()
    grown = worlds.study(tmp_path, ("code", "math", "prose", "records"), search=GRID)
    open_study(grown, watching).compare(["random"])
    note = next(line for line in watching.notes if "generation 2" in line)
    assert "so scores on code, math, prose hold; of these only records is scored" in note
    shrunk = worlds.study(tmp_path, ("code", "prose"), search=GRID)
    open_study(shrunk, watching).compare(["random"])
    note = next(line for line in watching.notes if "generation 3" in line)
    assert "so scores on code, prose hold; none of these is scored again" in note
    assert "; the search learns from " in note and note.endswith(" more that were scored before")


def test_all_searches_of_a_generation_begin_with_the_same(tmp_path):
    """The second learns nothing from the first, which it is compared with; and one that is resumed what it had."""
    open_study(worlds.study(tmp_path, search=GRID)).compare(["random"])
    study = open_study(worlds.study(tmp_path, ("code", "math"), search=GRID))
    study.compare(["grid"])
    study.compare(["grid", "simplex-gp", "random"])
    with Runs(study.config, 2).existing() as searches:
        grid, other, third = (searches[name] for name in ("grid", "simplex-gp", "random"))
        assert grid.beginning == other.beginning == third.beginning
        earlier = grid.beginning.earlier.composites
        others = {name for each in earlier for name in each.units} - {"code", "math"}
        assert len(others) == 1, "the vector of prose"
        assert not {trial.coefficients for trial in grid.trials()} <= {each.coefficients for each in earlier}


def test_a_study_that_grows_looks_first_at_few_points_and_the_new_vertex(tmp_path, evaluated):
    """Six composites, spread over those that are known, on the new corpus alone; then the new fine-tune whole."""
    path = worlds.study(tmp_path, search=GRID)
    open_study(path).compare(["grid"])
    evaluated.clear()
    grown = worlds.study(tmp_path, ("code", "math", "prose", "records"), search={"trials": 7})
    study = open_study(grown)
    study.compare(["simplex-gp"])
    first = [record.coefficients for record in study.summary().trials["simplex-gp"]]
    assert [point.weights["records"] for point in first] == [0.0] * 6 + [1.0]
    seen = [point.weights for point in first[:6]]
    gaps = [max(abs(a[name] - b[name]) for name in a) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(gaps) >= 0.5, "of the lattice's points, a quarter apart, no two are neighbors"
    new = load_inputs(load(grown), grown).identity().corpora[SEARCH]["records"]
    for point in first[:6]:
        composite = load_inputs(load(grown), grown).identity().composite(point)
        assert [key for known, key in evaluated if known == composite and key in search_keys(grown)] == [new]


SIMPLEX_GP = {"algorithm": "simplex-gp", "trials": 8, "gradients": False, "divisions": 4}


def passes(study):
    """Passes over one corpus that the searches have really taken since the study began."""
    summary = study.summary()
    return sum(cost.forwards for cost in summary.costs if cost.part == "simplex-gp") * len(summary.distributions)


@pytest.mark.parametrize(
    ("names", "racing", "gradients"),
    [
        (("code", "prose"), True, False),
        (("code", "math", "prose", "records"), False, False),
        (("code", "math", "prose", "records"), True, True),
    ],
)
def test_starting_points_cost_what_the_database_lacks(tmp_path, names, racing, gradients):
    """A quarter of a pass where one corpus of four is new, nothing where none is: the trials sum up to the account."""
    search = SIMPLEX_GP | {"racing": racing, "gradients": gradients}
    first = open_study(worlds.study(tmp_path, search=search))
    first.run()
    before = passes(first)
    study = open_study(worlds.study(tmp_path, names, search=search))
    study.run()
    trials = study.summary().trials["simplex-gp"]
    with Runs(study.config, 2).existing() as searches:
        start = searches["simplex-gp"].beginning.start
    carried = [record.forwards for record in trials if record.coefficients in start and not record.gradient]
    assert carried and carried == [0.25 if "records" in names else 0.0] * len(carried)
    assert sum(record.forwards for record in trials) * len(names) == pytest.approx(passes(study) - before)


def test_a_later_search_is_charged_as_the_first_was(tmp_path):
    """By then the database has its starting points too; a grid's points cost one each, whatever is known."""
    open_study(worlds.study(tmp_path, search=SIMPLEX_GP)).run()
    study = open_study(worlds.study(tmp_path, ("code", "math", "prose", "records"), search=SIMPLEX_GP))
    study.compare(["simplex-gp"])
    study.compare(["simplex-gp", "tpe", "grid"])
    with Runs(study.config, 2).existing() as searches:
        for name in ("simplex-gp", "tpe"):
            start = set(searches[name].beginning.start)
            charged = [trial.forwards for trial in searches[name].trials() if trial.coefficients in start]
            assert charged == [0.25] * 6
        assert {trial.forwards for trial in searches["grid"].trials()} == {1.0}


def test_a_budget_is_not_spent_on_what_is_known(tmp_path):
    """Another weighting starts from composites that cost nothing, so all of the budget is for new ones."""
    path = worlds.study(tmp_path, search=SIMPLEX_GP | {"forwards": 5})
    first = open_study(path)
    first.run()
    before = passes(first)
    study = open_study(edit(path, lambda study: study.update(objective={"weights": {"code": 3, "math": 1}})))
    study.run()
    free = [record for record in study.summary().trials["simplex-gp"] if not record.forwards]
    assert len(free) >= 5 and 0 < (passes(study) - before) / 3 <= 5


def test_gradients_that_are_known_cost_nothing_again(tmp_path, evaluated):
    """Another weighting needs no pass at the centroid, whose gradients by corpus are in the database."""
    path = worlds.study(tmp_path, search=SIMPLEX_GP | {"gradients": True, "trials": 4})
    first = open_study(path)
    first.run()
    [anchor] = [record for record in first.summary().trials["simplex-gp"] if record.gradient and record.part is None]
    study = open_study(edit(path, lambda study: study.update(objective={"weights": {"code": 3, "math": 1}})))
    study.run()
    again = next(r for r in study.summary().trials["simplex-gp"] if r.coefficients == anchor.coefficients)
    assert anchor.forwards == 3 and again.gradient and again.forwards == 0
