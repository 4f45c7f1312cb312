"""One device's state for life (arena, model, windows): Request -> Evaluation."""

from time import perf_counter

import torch

from dem_opt.adapters import content_of
from dem_opt.arena import Arena
from dem_opt.errors import InputError
from dem_opt.models import empty_model
from dem_opt.perplexity import prepare, reading, score
from dem_opt.records import Composite, Evaluation, Request, ResidentSpec, Score, StoredModel


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
        self._arena = Arena(self._model, stored, device)
        self._arena.merge(Composite.single(spec.base.content))
        self._reading = reading(self._model)
        self._windows = {corpus.key: prepare(corpus.windows, device) for corpus in spec.corpora}
        self._batch_tokens = spec.batch_tokens

    def evaluate(self, request: Request) -> Evaluation:
        """Scores of a composite on the corpora asked for, and what it took.

        Raises EvaluationError where a loss is not finite.
        """
        started = perf_counter()
        self._arena.merge(request.composite)
        _synchronize()
        merged = perf_counter()
        scores: dict[str, Score] = {}
        forward_tokens = 0
        for key in request.corpora:
            scores[key], tokens = score(self._model, self._windows[key], self._batch_tokens, self._reading)
            forward_tokens += tokens
        return Evaluation(scores, forward_tokens, merged - started, perf_counter() - merged)


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
