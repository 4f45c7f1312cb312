"""Laws of bits per byte: nats over ln 2 times the bytes of the scored text, beside NLL and as the objective's unit."""

import json
from dataclasses import replace
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import worlds
import yaml
from in_process import open_study, replace_dependencies

from dem_opt.analysis.bootstrap import difference
from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.config import load
from dem_opt.dashboards.html_report import render
from dem_opt.dashboards.tables import final_table
from dem_opt.errors import EvaluationError, InputError
from dem_opt.evaluation.interim_analyses import first_windows
from dem_opt.evaluation.objective import Objective, mean_nll, objective_words, violation
from dem_opt.evaluation.racing import Race
from dem_opt.planning.inputs import load_inputs
from dem_opt.storage.engine import connect
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.study import Study
from dem_opt.tracking import NullTracker
from dem_opt.types import (
    BITS_PER_BYTE,
    NATS_PER_TOKEN,
    SEARCH,
    SPLITS,
    UNITS,
    Composite,
    CorpusLayout,
    Score,
    weighted_sum,
)

UNIT = {"unit": BITS_PER_BYTE}
NAMES = ("code", "math", "prose")


def random_scores(seed: int, windows: int = 16) -> dict[str, Score]:
    """Scores of two corpora on the same windows, whatever the seed."""
    nats, sizes = np.random.default_rng(seed), np.random.default_rng(0)
    return {
        name: Score(
            tuple(nats.uniform(200, 300, windows).tolist()),
            tuple(sizes.integers(90, 110, windows).tolist()),
            tuple(sizes.integers(300, 500, windows).tolist()),
        )
        for name in ("a", "b")
    }


def in_bytes(scores: dict[str, Score]) -> dict[str, Score]:
    """Scores whose NLL in nats "per token" is the loss in bits per byte."""
    return {name: Score(tuple(nats / log(2) for nats in score.nats_W), score.bytes_W) for name, score in scores.items()}


def test_bits_per_byte_by_hand() -> None:
    # 3 + 5 nats over 4 + 12 bytes.
    score = Score((3.0, 5.0), (2, 2), (4, 12))
    assert score.bits_per_byte == pytest.approx(0.5 / log(2)) and score.loss(BITS_PER_BYTE) == score.bits_per_byte
    assert (score.nll, score.loss(NATS_PER_TOKEN), score.bytes) == (2.0, 2.0, 16)
    assert first_windows(score, 1).bits_per_byte == pytest.approx(0.75 / log(2))
    assert weighted_sum([score, score], [0.5, 0.5]) == score


@pytest.mark.parametrize("bytes_W", [(), (0, 0)])
def test_without_bytes_there_are_no_bits_per_byte(bytes_W: tuple[int, ...]) -> None:
    score = Score((3.0, 5.0), (2, 2), bytes_W)
    assert score.bits_per_byte is None
    with pytest.raises(EvaluationError, match="bytes"):
        score.loss(BITS_PER_BYTE)


def test_objectives_in_bits_per_byte_are_those_of_scores_over_bytes() -> None:
    own, left, base = random_scores(1), random_scores(2), random_scores(3)
    weights, protect = {"a": 1.0, "b": 3.0}, {"a": 0.01, "b": 0.0}
    for reference in (None, own):
        converted = None if reference is None else in_bytes(reference)
        value = Objective(weights, reference, unit=BITS_PER_BYTE)(left)
        assert value == pytest.approx(Objective(weights, converted)(in_bytes(left)))
    assert violation(left, base, protect, BITS_PER_BYTE) == pytest.approx(
        violation(in_bytes(left), in_bytes(base), protect)
    )
    assert objective_words({"a": 1.0, "b": 1.0}, unit=BITS_PER_BYTE) == "mean BPB"


def test_a_race_in_bits_per_byte_is_that_of_scores_over_bytes() -> None:
    weights, incumbent = {"a": 1.0, "b": 3.0}, random_scores(1)
    race, converted = Race.against(incumbent, weights, BITS_PER_BYTE), Race.against(in_bytes(incumbent), weights)
    for seed in range(2, 6):
        seen = {name: first_windows(score, 6) for name, score in random_scores(seed).items()}
        estimate, expected = race.estimate(seen), converted.estimate(in_bytes(seen))
        assert (estimate.difference, estimate.error, estimate.freedom) == pytest.approx(
            (expected.difference, expected.error, expected.freedom)
        )
        assert race.loss("a", seen["a"]) == pytest.approx(converted.loss("a", in_bytes(seen)["a"]))


def test_a_margin_in_bits_per_byte_is_that_of_scores_over_bytes() -> None:
    objective, left, right = Objective({"a": 1.0, "b": 3.0}), random_scores(1), random_scores(2)
    margin = difference(left, right, replace(objective, unit=BITS_PER_BYTE))
    expected = difference(in_bytes(left), in_bytes(right), objective)
    assert (margin.mean, margin.low, margin.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_the_ledger_gives_scores_the_bytes_of_their_windows(tmp_path: Path) -> None:
    ledger, composite = Ledger(connect(f"sqlite:///{tmp_path}/study.db")), Composite.single("a")
    ledger.record(composite, {"one": Score((1.0, 2.0), (3, 4)), "two": Score((1.0,), (3,))}, "scoring")
    ledger.enter_layouts({"one": CorpusLayout((5, 6, 7), ({0: 3}, {0: 4}, {1: 2}))})
    scores = ledger.look_up(composite, ["one", "two"], "scoring")
    assert scores == {"one": Score((1.0, 2.0), (3, 4), (5, 6)), "two": Score((1.0,), (3,))}
    ledger.engine.dispose()


def run_study(folder: Path, **sections: object) -> Study:
    search = {"algorithm": "simplex-gp", "trials": 8, "gradients": True}
    study = open_study(worlds.study(folder, NAMES, **{"objective": UNIT, "search": search} | sections))
    study.run()
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study that has minimized bits per byte, with gradients."""
    return run_study(tmp_path_factory.mktemp("bits"))


def file_of(study: Study) -> Path:
    return Path(study.summary().facts["study file"])


def test_the_unit_is_what_is_minimized(study: Study) -> None:
    summary = study.summary()
    assert summary.unit == BITS_PER_BYTE
    for record in summary.trials["simplex-gp"]:
        bits = [score.bits_per_byte for score in record.scores.values()]
        assert record.objective == pytest.approx(sum(bits) / 3) and record.unit == BITS_PER_BYTE
    best = min(record.objective for record in summary.trials["simplex-gp"] if not record.is_partial)
    assert summary.winner.objective[SEARCH] == best
    for margin in summary.margins:
        rival = next(row for row in summary.results if row.label == margin.rival)
        assert margin.mean == pytest.approx(rival.objective[margin.split] - summary.winner.objective[margin.split])


def test_gradients_are_in_the_unit(study: Study, tmp_path: Path) -> None:
    """By corpus d BPB = d NLL tokens / (ln 2 bytes) ; the same study in nats has the NLL's."""
    in_nats = run_study(tmp_path, objective={})
    (first, *_), (other, *_) = (each.summary().trials["simplex-gp"] for each in (study, in_nats))
    assert first.coefficients == other.coefficients and first.gradient.keys() == other.gradient.keys()
    factors = [score.tokens / (log(2) * score.bytes) for score in first.scores.values()]
    for name, slope in first.gradient.items():
        low, high = sorted((min(factors) * other.gradient[name], max(factors) * other.gradient[name]))
        assert low - abs(low) * 0.1 <= slope <= high + abs(high) * 0.1


def test_a_race_in_bits_per_byte_stops_trials_whose_estimates_are_in_it(tmp_path: Path) -> None:
    search = {"algorithm": "simplex-gp", "trials": 12, "gradients": False}
    evaluation = {"window": 16, "windows": 16, "held_out": 4}
    stopped = [
        record
        for record in run_study(tmp_path, search=search, evaluation=evaluation).summary().trials["simplex-gp"]
        if record.is_partial
    ]
    for record in stopped:
        assert record.objective == pytest.approx(mean_nll(record.scores, dict.fromkeys(NAMES, 1.0), BITS_PER_BYTE), 0.2)


def test_bits_per_byte_stand_beside_nll_and_perplexity(study: Study) -> None:
    summary, results, trials = study.summary(), study.results(), study.trials()
    for split in SPLITS:
        for row, result in enumerate(summary.results):
            if split in result.scores:
                score = result.scores[split]["math"]
                assert results["label"][row] == result.label
                assert results[f"{split}.bpb.math"][row] == score.bits_per_byte
        table = final_table(summary, split)
        values = dict(zip(table.headers, table.rows[-1], strict=True))
        scores = summary.winner.scores[split]
        nll = mean_nll(scores, summary.weights)
        assert values["mean"] == f"{summary.winner.objective[split]:.4f}"
        assert (values["NLL"], values["perplexity"]) == (f"{nll:.4f}", f"{exp(nll):.3f}")
        assert values["math"] == f"{scores['math'].bits_per_byte:.4f}"
    assert trials["bpb.code"].tolist() == [
        record.scores["code"].bits_per_byte for record in summary.trials["simplex-gp"]
    ]
    page = render(summary)
    assert "mean BPB" in page and UNITS[BITS_PER_BYTE] in page


def test_screens_of_a_study_in_nats_show_bits_per_byte_too(tmp_path: Path) -> None:
    study = run_study(tmp_path, objective={}, search={"algorithm": "random", "trials": 2})
    summary = study.summary()
    table = final_table(summary, SEARCH)
    values = dict(zip(table.headers, table.rows[-1], strict=True))
    expected = mean_nll(summary.winner.scores[SEARCH], summary.weights, BITS_PER_BYTE)
    assert values["bits per\nbyte"] == f"{expected:.4f}"
    study.export(tmp_path / "out")
    assert f"{summary.winner.scores[SEARCH]['math'].bits_per_byte:.4f}" in (tmp_path / "out/README.md").read_text()


def test_commands_answer_in_bits_per_byte(
    study: Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_dependencies(monkeypatch, tracker=NullTracker(), compute=InProcessCompute())
    path = str(file_of(study))
    assert main(["show", "--json", path]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["unit"] == "bits per byte"
    of_winner = shown["results"][-1]["scores"][SEARCH]["code"]
    assert of_winner["bits_per_byte"] == study.summary().winner.scores[SEARCH]["code"].bits_per_byte
    assert main(["score", "--json", "--coefficients", "code=0.2,math=0.3,prose=0.5", path]) == 0
    scores = json.loads(capsys.readouterr().out)[SEARCH]["code"]
    assert scores["bits_per_byte"] == pytest.approx(scores["nll"] * scores["tokens"] / scores["bytes"] / log(2))
    for command in (["show", path], ["trials", path]):
        assert main(command) == 0
        shown = capsys.readouterr().out
        assert "bits per byte" in shown and "nats per token" not in shown


def test_a_custom_objective_sees_bits_per_byte(tmp_path: Path) -> None:
    source = "def most(scores):\n    return max(score.bits_per_byte for score in scores.values())\n"
    (tmp_path / "of_most_bits.py").write_text(source, encoding="utf-8")
    search = {"algorithm": "random", "trials": 2}
    study = run_study(tmp_path, objective={"function": "of_most_bits:most"} | UNIT, search=search)
    summary = study.summary()
    winner = summary.winner
    assert winner.objective[SEARCH] == max(score.bits_per_byte for score in winner.scores[SEARCH].values())
    for margin in summary.margins:
        assert margin.low <= margin.mean <= margin.high


def test_the_unit_is_part_of_the_identity_where_it_is_not_the_default(study: Study) -> None:
    identity = load_inputs(load(file_of(study)), file_of(study)).identity()
    fields = identity.identity_fields()
    assert fields["objective.unit"] == BITS_PER_BYTE
    assert StudyIdentity.recall(fields, identity.scoring_fields()).unit == BITS_PER_BYTE
    plain = replace(identity, unit=NATS_PER_TOKEN)
    assert "objective.unit" not in plain.identity_fields() and plain.scoring == identity.scoring


def test_an_unknown_unit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"objective.unit = 'bits'"):
        load(worlds.study(tmp_path, NAMES, objective={"unit": "bits"}))


def test_a_corpus_whose_text_is_never_scored_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of one byte: what is scored of each is its end."""
    path = worlds.study(tmp_path, NAMES, objective=UNIT, evaluation={"window": 4, "windows": 2, "held_out": 2})
    worlds.write_documents(tmp_path / "data/math.jsonl", [chr(code) for code in range(33, 127)])
    replace_dependencies(monkeypatch, tracker=NullTracker(), compute=InProcessCompute())
    assert main(["run", "--quiet", str(path)]) == 2
    assert "objective.unit" in capsys.readouterr().err.strip().splitlines()[-1]
    with pytest.raises(InputError) as caught:
        load_inputs(load(path), path)
    assert (caught.value.field, caught.value.value) == ("objective.unit", BITS_PER_BYTE)
    assert "math" in str(caught.value) and "\n" not in str(caught.value)
    content = yaml.safe_load(path.read_text()) | {"objective": {}}
    path.write_text(yaml.safe_dump(content))
    assert load_inputs(load(path), path).identity().unit == NATS_PER_TOKEN
