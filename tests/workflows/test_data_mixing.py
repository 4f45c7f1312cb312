"""Laws of data mixing as a baseline: what is trained, what it costs, what a curve and a ratio say."""

import json
import math
from itertools import permutations
from pathlib import Path

import in_process
import numpy as np
import pytest
import worlds
import yaml
from mlflow.tracking import MlflowClient

from dem_opt.analysis.mixing_cost import (
    HELD_OUT,
    SEARCH,
    BaseScore,
    Cost,
    MergeResult,
    MixingComparison,
    MixtureResult,
    curve,
    forward_cost,
    training_cost,
    verdict,
)
from dem_opt.analysis.order_statistics import expected_best
from dem_opt.cli.main import main
from dem_opt.config import load
from dem_opt.dashboards.mixing_plots import MINUS, mixing_figure, quality_table
from dem_opt.dashboards.words import ABSENT
from dem_opt.data.mixtures import Mixture, Part, blend, counts, lattice
from dem_opt.errors import InputError
from dem_opt.evaluation.worker import Worker
from dem_opt.study import Study
from dem_opt.types import DOCUMENTS, Windows

NAMES = ("code", "math")
MIXTURES = [{"code": 0.5, "math": 0.5}, {"code": 0.25, "math": 0.75}, {"math": 1.0}]


def mixing_study(folder: Path, **more: object) -> Path:
    """Two distributions to be trained in a few steps, and three mixtures."""
    path = worlds.study(folder, NAMES)
    content = yaml.safe_load(path.read_text())
    for number, name in enumerate(NAMES):
        data = worlds.write_documents(folder / f"data/{name}.train.jsonl", worlds.documents(number, 40))
        content["distributions"][name] |= {"checkpoint": f"trained/{name}", "train": str(data)}
    content["search"] = {"algorithm": "random", "trials": 4}
    content["fine_tuning"] = {"steps": 4, "batch_size": 4}
    content["data_mixing"] = {"mixtures": MIXTURES}
    path.write_text(yaml.safe_dump(content | more, sort_keys=False))
    return path


def opened(path: Path) -> Study:
    return in_process.open_tracked(path)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MixingComparison]:
    """A study that was run, and what was found of its mixtures."""
    path = mixing_study(tmp_path_factory.mktemp("mixing"))
    study = opened(path)
    study.train()
    study.run()
    return path, study.mix("study")


def test_mixtures_have_the_tokens_of_all_fine_tunes_or_of_one(mixed: tuple[Path, MixingComparison]) -> None:
    _, comparison = mixed
    single = 4 * 4 * 32
    assert comparison.edited.training.trained_tokens == 2 * single
    assert [(mixture.budget, mixture.cost.trained_tokens) for mixture in comparison.mixed] == (
        [("all", 2 * single)] * 3 + [("one", single)] * 3
    )
    assert [mixture.shares for mixture in comparison.mixed][:3] == [*MIXTURES[:2], {"code": 0.0, "math": 1.0}]


def test_costs_are_six_and_two_operations_a_parameter_and_token(mixed: tuple[Path, MixingComparison]) -> None:
    path, comparison = mixed
    P, single, search_pass = comparison.parameters, 4 * 4 * 32, 2 * 4 * 32
    assert comparison.edited.training.training_flops == 6 * P * 2 * single
    winner = opened(path).summary().winner
    assert comparison.edited.search.forward_flops == 2 * P * winner.forward_tokens
    assert winner.forward_tokens == round(winner.forwards * search_pass)
    for mixture in comparison.mixed:
        tokens = single * (2 if mixture.budget == "all" else 1)
        assert mixture.cost.flops == 6 * P * tokens + 2 * P * search_pass
    all_of_them = comparison.against[0]
    assert all_of_them.ratio == pytest.approx(
        sum(mixture.cost.flops for mixture in comparison.mixed if mixture.budget == "all")
        / comparison.edited.cost.flops
    )


def test_a_mixture_scores_as_its_folder_does(mixed: tuple[Path, MixingComparison]) -> None:
    path, comparison = mixed
    folders = sorted((load(path).output / "mixing").iterdir())
    assert len(folders) == 6
    scores = [opened(path).score_model(folder) for folder in folders]
    expected = sorted((mixture.nll[SEARCH]["code"], mixture.nll[HELD_OUT]["math"]) for mixture in comparison.mixed)
    assert sorted((by_split[SEARCH]["code"].nll, by_split[HELD_OUT]["math"].nll) for by_split in scores) == expected


def test_what_is_trained_and_scored_is_not_done_again(
    mixed: tuple[Path, MixingComparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, comparison = mixed
    monkeypatch.setattr(Worker, "evaluate", None)
    monkeypatch.setattr("dem_opt.workflows.fine_tuning.fine_tune", None)
    again = opened(path).mix("study")
    assert again.mixed == comparison.mixed and again.edited == comparison.edited


def test_every_mixture_is_a_baseline_run_with_its_curve(mixed: tuple[Path, MixingComparison]) -> None:
    path, comparison = mixed
    client = MlflowClient(load(path).tracking.uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    runs = client.search_runs([experiment], "tags.`dem_opt.kind` = 'data mixing'")
    objectives = {run.data.metrics["held_out.objective_nll"] for run in runs}
    assert len(runs) == 6 and objectives == {mixture.objective[HELD_OUT] for mixture in comparison.mixed}
    trained = client.search_runs([experiment], "tags.`dem_opt.kind` = 'fine-tuning'")
    assert len(trained) == 8
    for run in trained:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "train.loss")]
        assert steps == list(range(1, int(run.data.params["steps"]) + 1)) and run.info.status == "FINISHED"


def test_the_command_prints_every_ratio_with_its_number_of_mixtures(
    mixed: tuple[Path, MixingComparison], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, comparison = mixed
    monkeypatch.setattr(Study, "mix", lambda study, grid: comparison)
    assert main(["compare", "--data-mixing", "study", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "All 3 mixtures take" in shown and "At equal cost" in shown
    assert main(["compare", "--data-mixing", "study", "--json", str(path)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["against"][0]["ratio"] == comparison.against[0].ratio
    page = (load(path).output / "mixing.html").read_text(encoding="utf-8")
    assert "Quality against cost" in page


def test_each_model_is_compared_with_the_winner_over_documents(mixed: tuple[Path, MixingComparison]) -> None:
    _, comparison = mixed
    for model in (comparison.base, *comparison.mixed):
        apart = model.difference
        assert apart is not None and apart.sampled == DOCUMENTS and apart.low < apart.mean < apart.high
        expected = model.objective[HELD_OUT] - comparison.edited.objective[HELD_OUT]
        assert apart.mean == pytest.approx(expected)
    shown = [row[quality_table(comparison).headers.index(MINUS)] for row in quality_table(comparison).rows]
    assert shown[0].startswith(f"{comparison.base.difference.mean:+.4f} [") and shown[1] == ABSENT


def test_the_base_costs_nothing_and_is_drawn(mixed: tuple[Path, MixingComparison]) -> None:
    _, comparison = mixed
    objectives = [f"{comparison.base.objective[split]:.4f}" for split in (SEARCH, HELD_OUT)]
    each = [f"{comparison.base.nll[HELD_OUT][name]:.4f}" for name in comparison.weights]
    apart = quality_table(comparison).rows[0][6]
    assert quality_table(comparison).rows[0] == ("base", "0", "0", "0", *objectives, apart, *each)
    (line,) = mixing_figure(comparison).layout.shapes
    assert line.y0 == line.y1 == pytest.approx(comparison.base.objective[HELD_OUT], abs=1e-6)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("0", r"--data-mixing = '0': is no grid"),
        ("lots", r"--data-mixing = 'lots': is no grid"),
    ],
)
def test_a_grid_that_is_none(mixed: tuple[Path, MixingComparison], grid: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened(mixed[0]).mix(grid)


@pytest.mark.parametrize(
    ("mixtures", "message"),
    [
        ([{"code": 0.5, "math": 0.4}], r"data_mixing: mixtures: no. 1 sums to 0.9, not to 1"),
        (
            [{"code": 1.0}, {"maths": 1.0}],
            r"data_mixing.mixtures: no. 2: 'maths' is no distribution; did you mean 'math'",
        ),
        ([], r"data_mixing.mixtures: the study file has no mixtures"),
    ],
)
def test_mixtures_that_are_none(tmp_path: Path, mixtures: list[dict[str, float]], message: str) -> None:
    path = mixing_study(tmp_path, data_mixing={"mixtures": mixtures})
    with pytest.raises(InputError, match=message):
        opened(path).mix("study")


def test_a_fine_tune_of_another_origin_has_no_known_cost(tmp_path: Path) -> None:
    path = mixing_study(tmp_path)
    worlds.save_model(tmp_path / "trained/code", 1)
    with pytest.raises(InputError, match=r"distributions.code.checkpoint = .*was not made by `dem-opt train`"):
        opened(path).mix("study")


def test_shares_become_whole_windows_that_sum_to_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        shares, total = rng.dirichlet(np.ones(5)).tolist(), int(rng.integers(5, 500))
        windows = counts(shares, total)
        assert sum(windows) == total
        assert all(abs(count - share * total) < 1 for count, share in zip(windows, shares, strict=True))
    assert counts([0.3, 0.7], 10) == [3, 7]


def windows_of(count: int, token: int) -> Windows:
    ids = np.full((count, 4), token) * 100 + np.arange(count)[:, None]
    return Windows(ids, np.tile(np.arange(4), (count, 1)), np.ones((count, 4), dtype=np.bool_))


def test_a_blend_repeats_no_window_before_all_were_seen() -> None:
    parts = (Part("few", None, 0.5), Part("many", None, 0.5))  # type: ignore[arg-type]
    packed = {"few": windows_of(3, 1), "many": windows_of(50, 2)}
    made = blend(Mixture(parts), packed, 16, seed=0)
    few = [int(ids[0]) for ids in made.ids_WT if ids[0] < 200]
    many = [int(ids[0]) for ids in made.ids_WT if ids[0] >= 200]
    assert len(few) == len(many) == len(set(many)) == 8
    assert set(few[:3]) == set(few[3:6]) == {100, 101, 102}
    again = blend(Mixture(parts), packed, 16, seed=0)
    other = blend(Mixture(parts), packed, 16, seed=1)
    assert np.array_equal(made.ids_WT, again.ids_WT) and not np.array_equal(made.ids_WT, other.ids_WT)


def test_a_lattice_has_every_mixture_of_its_parts_once() -> None:
    mixtures = lattice(["a", "b", "c", "d"], 3)
    assert len(mixtures) == math.comb(3 + 3, 3) == len({tuple(mixture.values()) for mixture in mixtures})
    assert all(sum(mixture.values()) == pytest.approx(1) for mixture in mixtures)


def test_the_expected_best_is_the_mean_over_all_orders() -> None:
    ranked = [1.0, 2.5, 2.0, 7.0]  # by another split than they are told on
    expected = expected_best(ranked, np.arange(1, 5))
    for tried in range(1, 5):
        orders = [min(order[:tried]) for order in permutations(range(4))]
        assert expected[tried - 1] == pytest.approx(np.mean([ranked[first] for first in orders]))


def model(search: float, held_out: float, flops: float, budget: str = "all") -> MixtureResult:
    objective, cost = {SEARCH: search, HELD_OUT: held_out}, Cost(training_flops=flops)
    return MixtureResult(budget=budget, shares={"a": 1.0}, objective=objective, nll={}, cost=cost)


def edited(held_out: float, flops: float) -> MergeResult:
    return MergeResult(
        label="best",
        coefficients={"a": 1.0},
        objective={SEARCH: 0.0, HELD_OUT: held_out},
        nll={},
        training=Cost(training_flops=flops),
        search=Cost(),
    )


def against(composite: MergeResult, models: tuple[MixtureResult, ...], base: float = 5.0) -> MixingComparison:
    return MixingComparison(
        study="s",
        weights={"a": 1.0},
        parameters=1,
        edited=composite,
        mixed=models,
        base=BaseScore({SEARCH: base, HELD_OUT: base}, {}),
    )


def test_what_a_composite_keeps_is_its_gain_over_the_best_mixture_s() -> None:
    """A base of 5 nats, a composite of 4, a best mixture of 3; beside one that gains nothing it keeps nothing."""
    models = (model(3.0, 3.0, 1.0), model(4.0, 4.0, 1.0))
    comparison = against(edited(4.0, 1.0), models)
    assert comparison.kept("all") == pytest.approx(0.5)
    assert "gain over the base is 50% of that mixture's" in " ".join(verdict(comparison, *comparison.against))
    worse = against(edited(4.0, 1.0), models, base=2.0)
    assert math.isnan(worse.kept("all")) and "gain over" not in " ".join(verdict(worse, *worse.against))


def test_of_a_single_mixture_no_numbers_of_mixtures_are_told() -> None:
    comparison = against(edited(4.0, 1.0), (model(3.0, 3.0, 1.0),))
    outcome, _ = verdict(comparison, *comparison.against)
    assert outcome.startswith("The mixture takes 1.00 times") and "1.0000 nats per token better" in outcome


def test_equal_quality_and_equal_cost_are_read_off_the_curve() -> None:
    """Three mixtures of 10 operations: the best is expected at 3, 2 1/3 and 2 nats.

    E[1] = (2 + 3 + 4) / 3 ,  E[2] = (2 + 2 + 3) / 3 ,  E[3] = 2 .
    """
    models = tuple(model(nll, nll, 10.0) for nll in (3.0, 2.0, 4.0))
    assert [expected.objective[HELD_OUT] for expected in curve(models)] == pytest.approx([3, 7 / 3, 2])
    (budget,) = against(edited(2.5, 20.0), models).against
    assert (budget.ratio, budget.equal_quality, budget.equal_ratio, budget.equal_cost) == (1.5, 2, 1.0, 2)
    (never,) = (whole := against(edited(1.0, 5.0), models)).against
    assert (never.equal_quality, never.equal_ratio, never.equal_cost) == (None, None, 0)
    text = " ".join(verdict(whole, never))
    assert "All 3 mixtures take 6.00 times" in text and "1.0000 nats per token worse" in text
    assert "no number of them" in text and "not one mixture" in text


def test_frozen_parameters_need_no_gradient_of_their_own() -> None:
    assert training_cost(10, 10, 7, 0).flops == 6 * 10 * 7
    assert training_cost(10, 1, 7, 0).flops == (4 * 10 + 2) * 7
    assert forward_cost(10, 7, 0).flops == 2 * 10 * 7
    total = training_cost(10, 10, 7, 1.0) + forward_cost(10, 7, 2.0)
    assert (total.flops, total.seconds, total.trained_tokens, total.forward_tokens) == (8 * 10 * 7, 3.0, 7, 7)
