"""Laws of a worker: it is what the checkpoints are, whatever it was before."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import worlds
import zoo
from transformers import AutoModelForCausalLM

from dem_opt.checkpoints.files import content_hash
from dem_opt.config import load
from dem_opt.errors import EvaluationError, InputError
from dem_opt.evaluation.interim_analyses import first_windows, replay, windows_by_analysis
from dem_opt.evaluation.racing import MARGIN, Race
from dem_opt.evaluation.worker import Worker
from dem_opt.planning.inputs import Inputs, load_inputs
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, Corpus, Request, Score, StoredModel, Windows, WorkerSpec


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    path = worlds.study(tmp_path_factory.mktemp("world"))
    return load_inputs(load(path), path)


@pytest.fixture(scope="module")
def worker(inputs) -> Worker:
    return Worker(inputs.spec())


def keys(inputs: Inputs) -> tuple[str, ...]:
    return tuple(corpus.key for corpus in inputs.corpora)


def composites(inputs: Inputs) -> list[Composite]:
    space, identity = inputs.config.space, inputs.identity()
    rng = np.random.default_rng(0)
    points = [*space.landmarks(), *(space.sample(rng) for _ in range(3))]
    return [Composite.single(identity.base), *(identity.composite(point) for point in points)]


def test_what_was_merged_before_changes_no_bit(inputs, worker):
    answers = {}
    for composite in composites(inputs) + composites(inputs)[::-1]:
        scores = worker.evaluate(Request(ticket=0, composite=composite, corpora=keys(inputs))).scores
        assert answers.setdefault(composite, scores) == scores


def test_it_scores_as_the_checkpoint_itself_does(inputs, worker):
    for model in (inputs.base, *inputs.fine_tunes.values()):
        loaded = AutoModelForCausalLM.from_pretrained(model.path).eval()
        answer = worker.evaluate(Request(ticket=0, composite=Composite.single(model.content), corpora=keys(inputs)))
        for corpus in inputs.corpora:
            windows = corpus.windows
            with torch.inference_mode():
                logits = loaded(
                    torch.tensor(windows.ids_WT), position_ids=torch.tensor(windows.positions_WT), use_cache=False
                ).logits.double()
            logprobs_WTV = logits.log_softmax(-1).numpy()
            scored_WT = windows.scored_WT[:, 1:]
            nats_WT = -np.take_along_axis(logprobs_WTV[:, :-1], windows.ids_WT[:, 1:, None], axis=-1)[..., 0]
            expected_W = (nats_WT * scored_WT).sum(axis=1)
            assert answer.scores[corpus.key].nats_W == pytest.approx(expected_W, rel=1e-5)


def test_it_answers_what_was_asked_and_says_what_it_took(inputs, worker):
    corpora = keys(inputs)[:2]
    answer = worker.evaluate(Request(ticket=7, composite=composites(inputs)[-1], corpora=corpora))
    assert tuple(answer.scores) == corpora
    assert answer.forward_tokens == sum(
        corpus.windows.ids_WT.size for corpus in inputs.corpora if corpus.key in corpora
    )
    assert answer.merge_seconds > 0 and answer.score_seconds > 0


def test_a_corpus_named_twice_is_scored_once(inputs, worker):
    (first, second, *_), composite = keys(inputs), composites(inputs)[-1]
    answer = worker.evaluate(Request(ticket=0, composite=composite, corpora=(first, second, first, first)))
    assert answer == replace(
        worker.evaluate(Request(ticket=0, composite=composite, corpora=(first, second))), **seconds(answer)
    )


def seconds(answer):
    return {name: getattr(answer, name) for name in ("merge_seconds", "score_seconds", "wait_seconds")}


def tokens_of(inputs, count):
    """Tokens of so many windows of each corpus."""
    return sum(corpus.windows.ids_WT[:count].size for corpus in inputs.corpora)


@pytest.mark.parametrize("known", [0, 1, 2, 3, 4])
def test_known_scores_are_continued_and_not_measured_again(inputs, worker, known):
    composite = composites(inputs)[-1]
    whole = worker.evaluate(Request(ticket=0, composite=composite, corpora=keys(inputs))).scores
    marked = {key: Score((0.5,) * known, score.tokens_W[:known]) for key, score in whole.items() if known}
    answer = worker.evaluate(Request(ticket=0, composite=composite, corpora=keys(inputs), known=marked))
    assert {key: score.nats_W[:known] for key, score in answer.scores.items()} == {key: (0.5,) * known for key in whole}
    assert {key: score.nats_W[known:] for key, score in answer.scores.items()} == {
        key: score.nats_W[known:] for key, score in whole.items()
    }
    assert {key: score.tokens_W for key, score in answer.scores.items()} == {
        key: score.tokens_W for key, score in whole.items()
    }
    assert answer.forward_tokens == tokens_of(inputs, 4) - tokens_of(inputs, known)
    assert (
        worker.evaluate(Request(ticket=0, composite=composite, corpora=keys(inputs), known=whole)).forward_tokens == 0
    )


class LostAt:
    """A rule to whom a trial is lost once so many windows were seen of the corpus that has most of them."""

    def __init__(self, windows):
        self.windows = windows

    def is_over(self, scores):
        return max(len(score.nats_W) for score in scores.values()) >= self.windows


@pytest.mark.parametrize("known", [0, 1, 3, 4])
@pytest.mark.parametrize("lost", [1, 2, 3, 4, 5])
def test_a_race_ends_at_the_look_that_decides_it(inputs, worker, known, lost):
    """Of 4 windows there are 4 looks; the last one is the end whatever the rule says."""
    composite, windows = composites(inputs)[-1], dict.fromkeys(keys(inputs), 4)
    whole = worker.evaluate(Request(ticket=0, composite=composite, corpora=keys(inputs))).scores
    prefix = {key: first_windows(score, known) for key, score in whole.items() if known}
    answer = worker.evaluate(
        Request(ticket=0, composite=composite, corpora=keys(inputs), known=prefix, race=LostAt(lost))
    )
    end = min(lost, 4)
    assert answer.scores == {key: first_windows(score, end) for key, score in whole.items()}
    assert answer.forward_tokens == max(tokens_of(inputs, end) - tokens_of(inputs, known), 0)
    assert replay(LostAt(lost), whole, windows) == answer.scores


def test_a_race_may_know_more_of_one_corpus_than_of_another(inputs, worker):
    composite, (first, *others) = composites(inputs)[-1], keys(inputs)
    whole = worker.evaluate(Request(ticket=0, composite=composite, corpora=(first, *others))).scores
    answer = worker.evaluate(
        Request(
            ticket=0,
            composite=composite,
            corpora=(first, *others),
            known={first: first_windows(whole[first], 3)},
            race=LostAt(2),
        )
    )
    assert answer.scores == {key: first_windows(score, 2) for key, score in whole.items()}
    assert answer.forward_tokens == sum(corpus.windows.ids_WT[:2].size for corpus in inputs.corpora[1:])


def test_corpora_of_fewer_windows_are_through_earlier(inputs):
    spec = inputs.spec()
    short = replace(spec.corpora[0], windows=cut(spec.corpora[0].windows, 2))
    worker = Worker(replace(spec, corpora=(short, *spec.corpora[1:])))
    composite, corpora = composites(inputs)[-1], keys(inputs)[:2]
    ends = [
        worker.evaluate(Request(ticket=0, composite=composite, corpora=corpora, known={}, race=LostAt(count))).scores
        for count in (1, 2, 3, 4)
    ]
    assert [[len(score.nats_W) for score in scores.values()] for scores in ends] == [[1, 1], [2, 2], [2, 3], [2, 4]]


def cut(windows, count):
    return Windows(windows.ids_WT[:count], windows.positions_WT[:count], windows.scored_WT[:count])


def test_a_real_race_stops_the_worse_of_two_and_not_the_better(inputs):
    """The base's single fine-tunes are noise; against the better of the two, what is worse by far is stopped."""
    windows = {corpus.key: windows_of(corpus.windows, 40) for corpus in inputs.corpora}
    worker = Worker(
        replace(inputs.spec(), corpora=tuple(replace(corpus, windows=windows[corpus.key]) for corpus in inputs.corpora))
    )
    content = inputs.fine_tunes["code"].content
    far = Composite.of({content: 5 * UNIT, inputs.base.content: -4 * UNIT})
    corpora = keys(inputs)[:2]
    better, worse = (
        worker.evaluate(Request(ticket=0, composite=composite, corpora=corpora)).scores
        for composite in (Composite.single(content), far)
    )
    assert all(worse[key].nll > better[key].nll + MARGIN for key in corpora)
    hard, easy = (Race.against(rival, dict.fromkeys(corpora, 1.0)) for rival in (better, worse))
    lost = worker.evaluate(Request(ticket=0, composite=far, corpora=corpora, known={}, race=hard))
    won = worker.evaluate(Request(ticket=0, composite=Composite.single(content), corpora=corpora, known={}, race=easy))
    assert won.scores == better
    (seen,) = {len(score.nats_W) for score in lost.scores.values()}
    assert seen in windows_by_analysis(40)[:-1] and lost.scores == {
        key: first_windows(score, seen) for key, score in worse.items()
    }


def windows_of(windows, count):
    """So many windows of random tokens, of the same length."""
    ids_WT = np.random.default_rng(0).integers(3, worlds.VOCABULARY, (count, windows.ids_WT.shape[1]))
    positions_WT = np.tile(np.arange(ids_WT.shape[1]), (count, 1))
    return Windows(ids_WT, positions_WT, positions_WT > 0)


@pytest.mark.parametrize("name", ["code", "math"])
def test_a_gradient_is_that_of_the_nats_of_each_corpus(inputs, worker, name):
    """From the loss of transformers' model of the composite, whose gradient autograd keeps."""
    corpora, content = inputs.corpora[:2], inputs.fine_tunes[name].content
    corpus_keys = tuple(corpus.key for corpus in corpora)
    answer = worker.evaluate(Request(ticket=0, composite=Composite.single(content), corpora=corpus_keys, gradient=True))
    base = dict(AutoModelForCausalLM.from_pretrained(inputs.base.path).named_parameters())
    for corpus in corpora:
        loaded, windows = AutoModelForCausalLM.from_pretrained(inputs.fine_tunes[name].path).eval(), corpus.windows
        ids_WT, positions_WT = torch.tensor(windows.ids_WT), torch.tensor(windows.positions_WT)
        logits_WTV = loaded(ids_WT, position_ids=positions_WT, use_cache=False).logits[:, :-1]
        nats_WT = -logits_WTV.log_softmax(-1).gather(2, ids_WT[:, 1:, None])[..., 0]
        nats_WT[torch.tensor(windows.scored_WT[:, 1:])].sum().backward()
        gradient = answer.gradients[corpus.key]
        assert gradient.keys() == {expert.content for expert in inputs.fine_tunes.values()}
        for expert in inputs.fine_tunes.values():
            theirs = dict(AutoModelForCausalLM.from_pretrained(expert.path).named_parameters())
            parts = [
                ((theirs[x] - base[x]).double() * parameter.grad).sum() for x, parameter in loaded.named_parameters()
            ]
            assert gradient[expert.content] == pytest.approx(float(sum(parts).detach()), rel=1e-4)


@pytest.mark.parametrize("folds", [((0, 1), (2, 3)), ((0, 3), (1, 2)), ((2,), (0, 1, 3)), ((0, 1, 2, 3),)])
def test_gradients_of_folds_by_parameter_add_up_to_the_gradient(inputs, worker, folds):
    composite, corpora = composites(inputs)[-1], keys(inputs)
    plain = worker.evaluate(Request(ticket=0, composite=composite, corpora=corpora, gradient=True))
    request = Request(
        ticket=0, composite=composite, corpora=corpora, gradient=True, folds=dict.fromkeys(corpora, folds)
    )
    answer = worker.evaluate(request)
    names = {name for name, _ in worker.model.named_parameters()}
    for key in corpora:
        by_fold = answer.fold_gradients[key]
        assert tuple(by_fold) == folds and all(products.keys() == names for products in by_fold.values())
        assert answer.scores[key].nats_W == pytest.approx(plain.scores[key].nats_W, rel=1e-6)
        assert answer.scores[key].tokens_W == plain.scores[key].tokens_W
        for content, slope in plain.gradients[key].items():
            parts = [products[name][content] for products in by_fold.values() for name in names]
            assert sum(parts) == pytest.approx(slope, rel=1e-4, abs=1e-4)
    assert not answer.gradients and answer.forward_tokens == plain.forward_tokens


@pytest.mark.parametrize("known", [0, 2, 4])
def test_with_a_gradient_all_windows_are_gone_through_and_scored_to_the_same_bits(inputs, worker, known):
    composite = composites(inputs)[-1]
    plain = worker.evaluate(Request(ticket=0, composite=composite, corpora=keys(inputs)))
    prefix = {key: first_windows(score, known) for key, score in plain.scores.items() if known}
    answer = worker.evaluate(
        Request(ticket=0, composite=composite, corpora=keys(inputs), known=prefix, race=LostAt(1), gradient=True)
    )
    assert answer.scores == plain.scores and answer.forward_tokens == plain.forward_tokens
    assert set(answer.gradients) == set(keys(inputs)) and not plain.gradients
    again = worker.evaluate(Request(ticket=0, composite=composite, corpora=keys(inputs)))
    assert again.scores == plain.scores and not again.gradients


@pytest.mark.parametrize("name", ["base", "code"])
@pytest.mark.parametrize("fault", ["missing", "changed", "truncated"])
def test_what_a_worker_cannot_load_is_named_as_in_the_study_file(tmp_path, name, fault):
    path = worlds.study(tmp_path)
    inputs = load_inputs(load(path), path)
    folder = tmp_path / "models" / name
    if fault == "missing":
        shutil.rmtree(folder)
    elif fault == "changed":
        shutil.copytree(tmp_path / "models/math", folder, dirs_exist_ok=True)
    else:
        (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError) as refused:
        Worker(inputs.spec())
    assert refused.value.field == {"base": "base", "code": "distributions.code.checkpoint"}[name]


@pytest.mark.parametrize("name", ["mamba", "t5"])
def test_of_models_with_other_kernels_scores_are_those_of_a_pass_without_gradients(tmp_path, name):
    stored = [zoo.save(tmp_path / part, name, seed) for seed, part in enumerate(("base", "a"))]
    base, expert = (StoredModel(path, content_hash(path)) for path in stored)
    ids_WT = np.random.default_rng(0).integers(3, zoo.VOCABULARY, (5, 12))
    positions_WT = np.tile(np.arange(12), (5, 1))
    corpus = Corpus(
        distribution="a", split="search", key="key", windows=Windows(ids_WT, positions_WT, positions_WT > 3)
    )
    worker = Worker(WorkerSpec(base=base, fine_tunes=(expert,), corpora=(corpus,)))
    composite = Composite.of({base.content: UNIT // 2, expert.content: UNIT // 2})
    plain = worker.evaluate(Request(ticket=0, composite=composite, corpora=("key",)))
    answer = worker.evaluate(Request(ticket=0, composite=composite, corpora=("key",), gradient=True))
    known = worker.evaluate(Request(ticket=0, composite=composite, corpora=("key",), known=plain.scores, gradient=True))
    assert plain.scores == answer.scores == known.scores and answer.gradients == known.gradients
    assert answer.forward_tokens == 2 * known.forward_tokens == 2 * plain.forward_tokens


def starve(worker, most):
    """Let forward calls of more than so many tokens ask the allocator for what no machine has."""
    worker.model.register_forward_pre_hook(
        lambda _, __, named: torch.empty(2**46) if named["input_ids"].numel() > most else None, with_kwargs=True
    )


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("most", "left"), [(100, 80), (63, 40)])
def test_where_memory_runs_out_batches_are_halved_and_that_is_told(inputs, most, left, gradient):
    """40 windows of 32 tokens are scored 5 at a time: 160 tokens, 80 (2 windows), 40 (1)."""
    corpora = tuple(replace(corpus, windows=windows_of(corpus.windows, 40)) for corpus in inputs.corpora)
    spec, composite = replace(inputs.spec(), corpora=corpora), composites(inputs)[-1]
    short, plain = Worker(spec), Worker(replace(spec, batch_tokens=left))
    starve(short, most)
    request = Request(ticket=0, composite=composite, corpora=keys(inputs)[:2], gradient=gradient)
    expected = plain.evaluate(request)
    for is_first in (True, False):
        answer = short.evaluate(request)
        assert answer.scores == expected.scores and answer.gradients == expected.gradients
        assert answer.forward_tokens == expected.forward_tokens
        assert (answer.batch_tokens, expected.batch_tokens) == (left, 0)
        assert (f"at most {left} tokens" in answer.note) == is_first and not expected.note


def test_where_one_window_is_too_large_there_is_no_score(inputs):
    worker = Worker(inputs.spec())
    starve(worker, 31)
    with pytest.raises(EvaluationError, match="not enough memory for a forward pass of 32 tokens"):
        worker.evaluate(Request(ticket=0, composite=composites(inputs)[-1], corpora=keys(inputs)))


def test_other_errors_are_not_taken_for_a_lack_of_memory(inputs):
    worker = Worker(inputs.spec())
    worker.model.register_forward_pre_hook(lambda *_: torch.zeros(2, 3) @ torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="shapes"):
        worker.evaluate(Request(ticket=0, composite=composites(inputs)[-1], corpora=keys(inputs)))


def test_scored_tokens_are_those_that_were_measured(inputs, worker):
    composite = composites(inputs)[-1]
    whole = worker.evaluate(Request(ticket=0, composite=composite, corpora=keys(inputs)))
    assert whole.scored_tokens == sum(score.tokens for score in whole.scores.values()) < whole.forward_tokens
    prefix = {key: first_windows(score, 3) for key, score in whole.scores.items()}
    rest = worker.evaluate(Request(ticket=0, composite=composite, corpora=keys(inputs), known=prefix))
    assert rest.scored_tokens == whole.scored_tokens - sum(score.tokens for score in prefix.values())


def test_a_worker_says_how_long_it_was_idle(inputs):
    worker, request = (
        Worker(inputs.spec()),
        Request(ticket=0, composite=composites(inputs)[-1], corpora=keys(inputs)),
    )
    assert worker.evaluate(request).wait_seconds == 0.0
    assert worker.evaluate(request).wait_seconds > 0.0


def test_an_expert_that_is_the_base_has_no_slope(inputs):
    spec = inputs.spec()
    worker = Worker(replace(spec, fine_tunes=(*spec.fine_tunes, spec.base)))
    answer = worker.evaluate(
        Request(ticket=0, composite=composites(inputs)[-1], corpora=keys(inputs)[:1], gradient=True)
    )
    (gradient,) = answer.gradients.values()
    assert len(gradient) == 4 and [content for content, slope in gradient.items() if not slope] == [spec.base.content]


def test_a_loss_that_is_not_finite_is_no_score(inputs):
    worker = Worker(inputs.spec())
    content = inputs.fine_tunes["code"].content
    # Twice the largest float32 overflows in the merge: weights of inf, a loss of NaN.
    for segment in worker.merged_model._segments:
        segment.stored_NP[content].fill_(3e38)
    other = inputs.fine_tunes["math"].content
    terms = Composite.of({content: 3 * UNIT, other: -2 * UNIT})
    with pytest.raises(EvaluationError, match="window"):
        worker.evaluate(Request(ticket=0, composite=terms, corpora=keys(inputs)))


def test_a_checkpoint_that_changed_since_it_was_hashed_is_refused(inputs, tmp_path):
    shutil.copytree(Path(inputs.base.path).parents[1], tmp_path / "world")
    path = tmp_path / "world/study.yaml"
    spec = load_inputs(load(path), path).spec()
    worlds.save_model(tmp_path / "world/models/math", seed=77)
    assert content_hash(tmp_path / "world/models/math") not in {model.content for model in spec.fine_tunes}
    with pytest.raises(InputError, match="have changed"):
        Worker(spec)
