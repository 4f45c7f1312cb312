"""One device's state for life (arena, model, windows): Request -> Evaluation."""

from time import perf_counter
from typing import Any

import torch

from dem_opt.adapters import content_of
from dem_opt.arena import Arena
from dem_opt.errors import InputError
from dem_opt.models import empty_model
from dem_opt.perplexity import prepare, reading, score
from dem_opt.racing import LOOKS, looks, replay, seen
from dem_opt.records import Composite, Evaluation, Gradient, Request, ResidentSpec, Score, StoredModel


class Resident:
    """Base, experts, live model and tokenized windows on one device, loaded once.

    An evaluation merges in memory and calls the model once for each batch; it opens no file.  It knows no
    database and no tracker.  Raises InputError where a checkpoint is not what the spec says it is.
    """

    def __init__(self, spec: ResidentSpec) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stored = list({model.content: model for model in (spec.base, *spec.experts)}.values())
        for model in stored:
            _refuse_changed(model)
        self._model = empty_model(spec.base.path, getattr(torch, spec.dtype))
        self._arena = Arena(self._model, stored, device, spec.vectors, spec.streamed)
        self._arena.merge(Composite.single(spec.base.content))
        self._reading = reading(self._model)
        self._windows = {corpus.key: prepare(corpus.windows, device) for corpus in spec.corpora}
        self._batch_tokens = spec.batch_tokens
        self._base, self._experts = spec.base.content, [expert.content for expert in spec.experts]

    def evaluate(self, request: Request) -> Evaluation:
        """Scores of a composite on the corpora asked for, and what it took.

        Known scores are continued where they end, look by look if the trial is raced.  A gradient needs all windows,
        whatever is known, and is not raced.  Raises EvaluationError where a loss is not finite.
        """
        started = perf_counter()
        self._arena.merge(request.composite)
        _synchronize()
        merged = perf_counter()
        if request.gradient:
            scores, forward_tokens, gradients = self._differentiate(request)
        else:
            scores, forward_tokens, gradients = *self._measure(request), {}
        return Evaluation(scores, forward_tokens, merged - started, perf_counter() - merged, gradients)

    def _measure(self, request: Request) -> tuple[dict[str, Score], int]:
        """Scores at the look where the race ends, or of all windows, and the tokens through the model."""
        windows = {key: len(self._windows[key].tokens_W) for key in request.corpora}
        known, forward_tokens = dict(request.known), 0
        for number in range(1, looks(windows) + 1) if request.race else (LOOKS,):
            for key, end in seen(windows, number).items():
                if key not in known or len(known[key].nats_W) < end:
                    known[key], tokens = self._score(key, known=known.get(key), end=end)
                    forward_tokens += tokens
            if (scores := replay(request.race, known, windows)) is not None:
                return scores, forward_tokens
        raise AssertionError("a race ends at its last look")

    def _differentiate(self, request: Request) -> tuple[dict[str, Score], int, dict[str, Gradient]]:
        """Scores, the tokens through the model, and the gradient of each corpus's nats.

        The scores are of the same pass, except for architectures whose nats it may round otherwise (`score`).
        """
        scores: dict[str, Score] = {}
        gradients: dict[str, Gradient] = {}
        forward_tokens = 0
        for key in dict.fromkeys(request.corpora):
            with self._arena.reducing(self._base, self._experts) as gradients[key]:
                scores[key], tokens = self._score(key, gradient=True)
            forward_tokens += tokens
            if self._reading != "packed":
                scores[key], tokens = self._score(key, known=request.known.get(key))
                forward_tokens += tokens
        return scores, forward_tokens, gradients

    def _score(self, key: str, **how: Any) -> tuple[Score, int]:
        return score(self._model, self._windows[key], self._batch_tokens, self._reading, **how)


def build(spec: ResidentSpec) -> Resident:
    """A resident for a spec: what a pool ships to where the resident is to live."""
    return Resident(spec)


def _refuse_changed(model: StoredModel) -> None:
    if content_of(model) != model.content:
        raise InputError(model.path, None, None, "its weights have changed since the study began to load; run again")


def _synchronize() -> None:
    """Let the device finish, so that merging and scoring are timed apart."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
