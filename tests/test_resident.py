"""Laws of a resident: it is what the checkpoints are, whatever it was before."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import worlds
from transformers import AutoModelForCausalLM

from dem_opt.checkpoints import content_hash
from dem_opt.config import load
from dem_opt.errors import EvaluationError, InputError
from dem_opt.records import Composite, Request
from dem_opt.resident import Resident
from dem_opt.simplex import UNIT
from dem_opt.sources import Sources, gather


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Sources:
    path = worlds.study(tmp_path_factory.mktemp("world"))
    return gather(load(path), path)


@pytest.fixture(scope="module")
def resident(sources) -> Resident:
    return Resident(sources.spec())


def keys(sources: Sources) -> tuple[str, ...]:
    return tuple(corpus.key for corpus in sources.corpora)


def composites(sources: Sources) -> list[Composite]:
    space, question = sources.config.space, sources.question()
    rng = np.random.default_rng(0)
    points = [*space.landmarks(), *(space.sample(rng) for _ in range(3))]
    return [Composite.single(question.base), *(question.composite(point) for point in points)]


def test_what_was_merged_before_changes_no_bit(sources, resident):
    answers = {}
    for composite in composites(sources) + composites(sources)[::-1]:
        scores = resident.evaluate(Request(0, composite, keys(sources))).scores
        assert answers.setdefault(composite, scores) == scores


def test_it_scores_as_the_checkpoint_itself_does(sources, resident):
    for model in (sources.base, *sources.experts.values()):
        loaded = AutoModelForCausalLM.from_pretrained(model.path).eval()
        answer = resident.evaluate(Request(0, Composite.single(model.content), keys(sources)))
        for corpus in sources.corpora:
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


def test_it_answers_what_was_asked_and_says_what_it_took(sources, resident):
    asked = keys(sources)[:2]
    answer = resident.evaluate(Request(7, composites(sources)[-1], asked))
    assert tuple(answer.scores) == asked
    assert answer.forward_tokens == sum(corpus.windows.ids_WT.size for corpus in sources.corpora if corpus.key in asked)
    assert answer.merge_seconds > 0 and answer.score_seconds > 0


def test_a_loss_that_is_not_finite_is_no_score(sources):
    resident = Resident(sources.spec())
    content = sources.experts["code"].content
    # Twice the largest float32 overflows in the merge: weights of inf, a loss of NaN.
    for segment in resident._arena._segments:
        segment.stored_NP[content].fill_(3e38)
    other = sources.experts["math"].content
    terms = Composite.of({content: 3 * UNIT, other: -2 * UNIT})
    with pytest.raises(EvaluationError, match="window"):
        resident.evaluate(Request(0, terms, keys(sources)))


def test_a_checkpoint_that_changed_since_it_was_hashed_is_refused(sources, tmp_path):
    shutil.copytree(Path(sources.base.path).parents[1], tmp_path / "world")
    path = tmp_path / "world/study.yaml"
    spec = gather(load(path), path).spec()
    worlds.save_model(tmp_path / "world/models/math", seed=77)
    assert content_hash(tmp_path / "world/models/math") not in {model.content for model in spec.experts}
    with pytest.raises(InputError, match="have changed"):
        Resident(spec)
