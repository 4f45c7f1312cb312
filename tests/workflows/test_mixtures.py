"""Laws of proposed mixtures: from a study to shares, files and one training, and what is refused before any of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import in_process
import pytest
import worlds
import yaml
from mlflow.tracking import MlflowClient
from recorded import RecordedProgress

from dem_opt.analysis.data_shares import CurvePredictor, propose_shares
from dem_opt.analysis.mixing_cost import MixingComparison, proposed_name
from dem_opt.analysis.mixture_proposal import MixtureProposal
from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.config import load
from dem_opt.dashboards.mixing_plots import quality_table, verdicts
from dem_opt.data.mixture_files import read_olmix
from dem_opt.errors import InputError
from dem_opt.evaluation.worker import Worker
from dem_opt.simplex import UNIT, Coefficients
from dem_opt.study import Study
from dem_opt.tracking import NullTracker
from dem_opt.types import HELD_OUT, SEARCH, TrialRecord
from dem_opt.workflows.mixture_file import merge_runs, proposed_file, read_mixture

NAMES = ("code", "math")
STEPS, BATCH, WINDOW = 6, 4, 32
KL = 0.5
"""A penalty that keeps all shares above 0, whatever random models predict."""

MIXTURES = [{"code": share, "math": 1 - share} for share in (0.1, 0.25, 0.5, 0.75, 0.9)]


def mixture_study(folder: Path, **more: object) -> Path:
    """Two distributions, one with twice the other's training data, and five mixtures with the tokens of one."""
    path = worlds.study(folder, NAMES)
    content = yaml.safe_load(path.read_text())
    for number, name in enumerate(NAMES):
        data = worlds.write_documents(folder / f"data/{name}.train.jsonl", worlds.documents(number, 40 * (1 + number)))
        content["distributions"][name] |= {"checkpoint": f"trained/{name}", "train": str(data)}
    content["search"] = {"algorithm": "random", "trials": 12, "racing": False}
    content["fine_tuning"] = {"steps": STEPS, "batch_size": BATCH}
    content["data_mixing"] = {"mixtures": MIXTURES, "tokens": ["one"]}
    path.write_text(yaml.safe_dump(content | more, sort_keys=False))
    return path


def opened(path: Path) -> Study:
    return in_process.open_study(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was run, and whose mixtures are trained."""
    path = mixture_study(tmp_path_factory.mktemp("mixtures"))
    study = opened(path)
    study.train()
    study.run()
    study.mix("study")
    return path


@pytest.fixture(scope="module")
def proposed(run: Path) -> MixtureProposal:
    return opened(run).propose_mixture("one", kl_penalty=KL)


@pytest.fixture(scope="module")
def trained(run: Path, proposed: MixtureProposal) -> dict[str, MixingComparison]:
    """The proposed mixture, trained from either start."""
    study = in_process.open_tracked(run)
    return {start: study.train_mixture(start=start) for start in ("base", "composite")}


def test_a_proposal_adds_up(run: Path, proposed: MixtureProposal) -> None:
    assert sum(round(share * 10**9) for share in proposed.proposal.shares.values()) == 10**9
    assert proposed.steps == STEPS and proposed.tokens == STEPS * BATCH * WINDOW
    sizes = {name: size.windows for name, size in proposed.sizes.items()}
    assert sizes["math"] > 1.5 * sizes["code"]
    for name, share in proposed.proposal.shares.items():
        low, high = proposed.proposal.region[name]
        assert low <= share <= high
        assert proposed.natural[name] == sizes[name] / sum(sizes.values())
        assert proposed.epochs[name] == pytest.approx(share * STEPS * BATCH / sizes[name])
    assert proposed.cost.trained_tokens == 3 * proposed.tokens
    # Two fine-tunes and one training, and the scores of the base and the fine-tunes.
    rows = [row for row in opened(run).summary().results if row.role in ("base", "single")]
    assert len(rows) == 3 and proposed.predictor == "curves"
    assert proposed.search.forward_tokens == sum(row.forward_tokens for row in rows)
    assert proposed.cost_ratio(3) == pytest.approx(1 + proposed.search.flops / (3 * proposed.training.flops))


def test_what_is_forgotten_is_what_fine_tunes_lose_on_the_others_search_windows(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[CurvePredictor] = []

    def keep(predictor: CurvePredictor, *others: Any, **more: Any) -> Any:
        known.append(predictor)
        return propose_shares(predictor, *others, **more)

    monkeypatch.setattr("dem_opt.workflows.data_shares.propose_shares", keep)
    study = opened(run)
    study.propose_mixture("one", kl_penalty=KL)
    rows = {row.label: row.scores["search"] for row in study.summary().results}
    code_by_math = rows["math"]["code"].nll - rows["base"]["code"].nll
    math_by_code = rows["code"]["math"].nll - rows["base"]["math"].nll
    assert abs(code_by_math - math_by_code) > 1e-6
    assert known[0].forgotten_KK[0, 1] == code_by_math and known[0].forgotten_KK[1, 0] == math_by_code
    assert known[0].trained_K.tolist() == [STEPS, STEPS]


def test_it_is_judged_by_the_mixtures_that_are_trained(run: Path, proposed: MixtureProposal) -> None:
    assert [evidence.predictor for evidence in proposed.evidence] == ["curves", "merges"]
    evidence = proposed.evidence[1]
    assert (evidence.tokens, evidence.quality.mixtures) == (STEPS * BATCH * WINDOW, len(MIXTURES))
    comparison = opened(run).mix("study")
    losses = {mixture.shares["code"]: mixture.objective[HELD_OUT] for mixture in comparison.mixed}
    assert losses[evidence.best.shares["code"]] == evidence.best.measured == min(losses.values())
    assert 0 <= evidence.quality.regret <= max(losses.values()) - min(losses.values())


def test_the_files_say_what_the_proposal_says(run: Path, proposed: MixtureProposal) -> None:
    content = yaml.safe_load(proposed_file(load(run)).read_text())
    assert content["shares"] == dict(proposed.proposal.shares) and content["tokens"] == proposed.tokens
    lines = proposed_file(load(run)).read_text().splitlines()
    assert f"megatron_data_path: {content['megatron_data_path']}" in lines  # whole, on one line
    probabilities = content["interleave_datasets"]
    assert probabilities["rows_of_one_length"] == content["shares"]
    assert sum(probabilities["documents"].values()) == pytest.approx(1, abs=1e-8)
    blend = content["megatron_data_path"].split()
    assert [float(weight) for weight in blend[::2]] == pytest.approx(list(proposed.proposal.shares.values()))
    assert [Path(prefix).name for prefix in blend[1::2]] == list(NAMES)
    read = read_mixture(proposed_file(load(run)), NAMES)
    assert (read.shares, read.tokens) == (dict(proposed.proposal.shares), proposed.tokens)
    rows = (proposed.folder / "mixture.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["distribution", *NAMES]


def test_olmix_reads_merges_and_trained_mixtures(run: Path, proposed: MixtureProposal) -> None:
    merges = read_olmix(proposed.folder / "olmix/merges", NAMES)
    assert [dict(each.metrics) for each in merges] == [
        {f"nll.{name}": score.nll for name, score in record.scores.items()}
        for record in opened(run).summary().trials["random"]
    ]
    mixtures = read_olmix(proposed.folder / "olmix/trained", NAMES)
    assert sorted(each.shares["code"] for each in mixtures) == [mixture["code"] for mixture in MIXTURES]
    curves, elsewhere = (
        opened(run).propose_mixture("one", kl_penalty=KL, swarm=proposed.folder / "olmix/trained").evidence[-2:]
    )
    assert (curves.tokens, curves.quality) == (None, proposed.evidence[0].quality)
    assert (elsewhere.tokens, elsewhere.quality) == (None, proposed.evidence[1].quality)


def test_merges_that_are_no_mixture_are_left_out() -> None:
    """Those that were stopped early lack windows, those that failed a loss, and the base has no shares."""
    weights = Coefficients((("code", UNIT // 2), ("math", 3 * UNIT // 2)))
    scored = TrialRecord(study="s", number=0, coefficients=weights, objective=2.0)
    others = [
        replace(scored, number=1, error=0.1),
        replace(scored, number=2, objective=None),
        replace(scored, number=3, coefficients=Coefficients((("code", 0), ("math", 0)))),
    ]
    (merge,) = merge_runs([*others, scored])
    assert merge.shares == {"code": 0.25, "math": 0.75}


def test_merges_of_another_budget_are_searched_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges for twice the tokens of one fine-tune have twice the sum; the study's own trials stay as they are."""
    before = opened(run).summary()
    result = opened(run).propose_mixture(2 * STEPS * BATCH * WINDOW, by="merges", kl_penalty=KL)
    assert (result.predictor, result.total) == ("merges", 2.0) and result.search.flops > 0
    merges = read_olmix(result.folder / "olmix/merges", NAMES)
    assert len(merges) == 12 and all("sum of coefficients 2" in merge.name for merge in merges)
    assert opened(run).summary().trials == before.trials
    monkeypatch.setattr(Worker, "evaluate", None)
    again = opened(run).propose_mixture(2 * STEPS * BATCH * WINDOW, by="merges", kl_penalty=KL)
    assert again.proposal == result.proposal
    opened(run).propose_mixture("one", kl_penalty=KL)  # the file that the other tests train on


def test_merges_of_the_study_s_own_sum_need_no_search(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "evaluate", None)
    result = opened(run).propose_mixture("one", by="merges", kl_penalty=KL)
    assert result.total == 1.0 and result.search.flops > 0
    opened(run).propose_mixture("one", kl_penalty=KL)


@pytest.mark.parametrize("start", ["base", "composite"])
def test_a_proposed_mixture_is_trained_once_and_compared(
    run: Path, proposed: MixtureProposal, trained: dict[str, MixingComparison], start: str
) -> None:
    comparison = trained["composite"]
    (result,) = (each for each in comparison.proposed if each.start == start)
    assert result.shares == pytest.approx(dict(proposed.proposal.shares))
    assert result.cost.trained_tokens == proposed.tokens
    assert comparison.total_cost(result).flops == comparison.edited.cost.flops + result.cost.flops
    assert len(comparison.rivals_of(result)) == len(MIXTURES) == len(comparison.mixed)
    scores = opened(run).score_model(load(run).output / "mixing" / result.folder)
    assert dict(scores.objective) == dict(result.objective)


def test_the_two_starts_give_two_models(trained: dict[str, MixingComparison]) -> None:
    assert [each.start for each in trained["base"].proposed] == ["base"]
    assert len({each.objective[SEARCH] for each in trained["composite"].proposed}) == 2


@pytest.mark.parametrize(("setting", "value", "is_compared"), [("seed", 1, True), ("learning_rate", 0.02, False)])
def test_a_model_of_another_seed_is_compared_and_one_of_other_settings_is_told(
    run: Path, trained: dict[str, MixingComparison], tmp_path: Path, setting: str, value: float, is_compared: bool
) -> None:
    content = yaml.safe_load(run.read_text())
    content["fine_tuning"][setting] = value
    content |= {"output": str(tmp_path / "other"), "storage": f"sqlite:///{load(run).output}/study.db"}
    path = run.with_name(f"other-{setting}.yaml")
    path.write_text(yaml.safe_dump(content))
    progress = RecordedProgress()
    comparison = in_process.open_study(path, progress=progress).train_mixture(
        str(load(run).output / "mixture/mixture.yaml")
    )
    assert [each.start for each in comparison.proposed] == ["base"] * is_compared
    assert any("not compared" in warning for warning in progress.warnings) is not is_compared


def test_what_is_trained_is_not_trained_again(
    run: Path, trained: dict[str, MixingComparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dem_opt.workflows.fine_tuning.fine_tune", None)
    again = opened(run).train_mixture(start="composite")
    assert again.proposed == trained["composite"].proposed
    assert opened(run).mix("study").proposed == again.proposed


def test_a_proposed_mixture_has_runs_in_mlflow(run: Path, trained: dict[str, MixingComparison]) -> None:
    client = MlflowClient(load(run).tracking.uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    runs = client.search_runs([experiment], "tags.`dem_opt.kind` = 'data mixing'")
    logged = {each.data.params["start"]: each.data.metrics["held_out.objective_nll"] for each in runs}
    assert logged == {each.start: each.objective[HELD_OUT] for each in trained["composite"].proposed}
    curves = client.search_runs([experiment], "tags.`dem_opt.kind` = 'fine-tuning'")
    assert {each.data.params["steps"] for each in curves} == {str(STEPS)} and len(curves) == 2


def test_the_commands_print_shares_evidence_and_the_curve(
    run: Path,
    trained: dict[str, MixingComparison],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    in_process.replace_dependencies(monkeypatch, compute=InProcessCompute(), tracker=NullTracker())
    command = ["mix", str(run), "--tokens", "one", "--kl", str(KL)]
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["proposal"]["shares"] == pytest.approx(dict(trained["base"].proposed[0].shares))
    assert answer["evidence"][0]["quality"]["mixtures"] == len(MIXTURES) + 1  # and the proposed one
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "Spearman" in shown and "% of those of 16 trainings" in shown
    assert "Mixtures on the simplex" in (load(run).output / "mixture/mixture.html").read_text(encoding="utf-8")
    assert main(["train", str(run), "--mixture", "proposed", "--from", "composite", "--json"]) == 0
    assert [each["start"] for each in json.loads(capsys.readouterr().out)["proposed"]] == ["base", "composite"]
    assert "proposed mixture from the composite" in (load(run).output / "mixing.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("missing", ["base", "code"])
def test_a_study_that_was_killed_before_its_fine_tunes_were_scored_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    whole = opened(run).summary()
    part = replace(whole, results=tuple(row for row in whole.results if row.label != missing))
    monkeypatch.setattr("dem_opt.workflows.data_shares.summarize_stored", lambda *_: part)
    with pytest.raises(InputError, match="not all fine-tunes are scored yet; first: dem-opt run"):
        opened(run).propose_mixture("one")


def test_proposals_of_one_start_and_budget_are_told_apart_by_their_shares(trained: dict[str, MixingComparison]) -> None:
    comparison = trained["composite"]
    first, second = comparison.proposed
    other = replace(first, shares={"code": 0.75, "math": 0.25})
    several = replace(comparison, proposed=(first, other, second))
    tokens = f"{STEPS * BATCH * WINDOW:,} tokens"
    assert proposed_name(comparison, first) == f"proposed mixture from the base, {tokens}"
    assert proposed_name(several, other) == f"proposed mixture from the base, {tokens} (code 0.75, math 0.25)"
    assert proposed_name(several, second) == f"proposed mixture from the composite, {tokens}"
    for told in (verdicts(several)[-3:], [row[0] for row in quality_table(several).rows][-3:]):
        assert len(set(told)) == 3 and "(code 0.75, math 0.25)" in told[1] and "(" not in told[2].partition(":")[0]


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no number of tokens": ({"tokens": "many"}, "--tokens"),
    "no tokens": ({"tokens": 0}, "--tokens"),
    "less than a step": ({"tokens": 100}, "--tokens"),
    "no predictor": ({"by": "hope"}, "--by"),
    "no epochs": ({"epochs": 0.0}, "--epochs"),
    "epochs without end": ({"epochs": float("inf")}, "--epochs"),
    "a negative penalty": ({"kl_penalty": -1.0}, "--kl"),
    "beyond the limit": ({"tokens": 10**9}, "--tokens"),
}


@pytest.mark.parametrize(("options", "field"), OPTIONS.values(), ids=OPTIONS)
def test_an_option_that_is_none(run: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as refused:
        opened(run).propose_mixture(**({"tokens": "one"} | options))
    assert refused.value.field == field


def test_a_budget_beyond_the_limit_is_told_with_the_largest(run: Path, proposed: MixtureProposal) -> None:
    """Two epochs of every window are the most, at natural shares; a training has whole steps."""
    most = 2 * sum(size.windows for size in proposed.sizes.values()) // BATCH * BATCH * WINDOW
    for tokens in (2 * most, most + BATCH * WINDOW):
        with pytest.raises(InputError) as refused:
            opened(run).propose_mixture(tokens, epochs=2.0)
        assert (refused.value.field, refused.value.value) == ("--tokens", tokens) and f"{most:,}" in refused.value.mend
    allowed = opened(run).propose_mixture(most, epochs=2.0)
    assert allowed.proposal.shares == pytest.approx(dict(allowed.natural), abs=0.02)
    assert max(allowed.epochs.values()) <= 2 + 1e-6
    opened(run).propose_mixture("one", kl_penalty=KL)  # the file that the other tests train on


FILES: dict[str, tuple[Callable[[dict[str, Any]], object], str | None]] = {
    "a sum of 0.9": (lambda content: content["shares"].update(code=0.4, math=0.5), "shares"),
    "a stranger": (lambda content: content["shares"].update(maths=0.0), "shares.maths"),
    "a negative share": (lambda content: content["shares"].update(code=-0.5, math=1.5), "shares.code"),
    "a word": (lambda content: content["shares"].update(code="half"), "shares.code"),
    "no shares": (lambda content: content.pop("shares"), "shares"),
    "no tokens": (lambda content: content.pop("tokens"), "tokens"),
    "tokens of less than a step": (lambda content: content.update(tokens=10), "tokens"),
    "tokens that are none": (lambda content: content.update(tokens=-4), "tokens"),
}


@pytest.mark.parametrize(("spoil", "field"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_mixture(
    run: Path,
    proposed: MixtureProposal,
    tmp_path: Path,
    spoil: Callable[[dict[str, Any]], object],
    field: str | None,
) -> None:
    content = yaml.safe_load(proposed_file(load(run)).read_text())
    spoil(content)
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError) as refused:
        opened(run).train_mixture(file)
    assert (refused.value.where, refused.value.field) == (file, field)
    assert main(["train", str(run), "--mixture", str(file)]) == 2


def test_studies_that_cannot_be_mixed(tmp_path: Path) -> None:
    path = mixture_study(tmp_path)
    content = yaml.safe_load(path.read_text())
    spoilt = {
        "distributions.code.adapter": {"checkpoint": None, "adapter": "trained/code"},
        "distributions.code.train": {"train": None},
    }
    for field, change in spoilt.items():
        code = {key: value for key, value in (content["distributions"]["code"] | change).items() if value is not None}
        path.write_text(yaml.safe_dump(content | {"distributions": content["distributions"] | {"code": code}}))
        for refused_by in (lambda study: study.propose_mixture(), lambda study: study.train_mixture()):
            with pytest.raises(InputError) as refused:
                refused_by(opened(path))
            assert refused.value.field == field


def test_curves_need_a_mean_of_distributions(run: Path, proposed: MixtureProposal) -> None:
    """Curves refuse other objectives, which are left to merges."""
    content = yaml.safe_load(run.read_text())
    other = run.with_name("worst.yaml")
    other.write_text(yaml.safe_dump(content | {"objective": {"worst": True}}))
    study = opened(other)
    study.run()
    with pytest.raises(InputError) as refused:
        study.propose_mixture("one")
    assert refused.value.field == "objective"
    by_merges = study.propose_mixture("one", by="merges")
    assert {evidence.predictor for evidence in by_merges.evidence} == {"merges"}
    opened(run).run()
    opened(run).propose_mixture("one", kl_penalty=KL)


def test_what_has_to_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = mixture_study(tmp_path)
    for command in (
        ["mix", str(path)],
        ["train", str(path), "--mixture", "proposed"],
        ["train", str(path), "--from", "base"],
    ):
        assert main(command) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
