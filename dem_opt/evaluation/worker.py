"""The state of a device, or of several, for life (merged model, model, windows): Request -> Evaluation."""

from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from dem_opt.checkpoints.adapters import content_of
from dem_opt.checkpoints.architecture import empty_model
from dem_opt.errors import EvaluationError, InputError
from dem_opt.evaluation.interim_analyses import INTERIM_ANALYSES, interim_analyses, replay, seen, stops
from dem_opt.evaluation.lm_head import find_head
from dem_opt.evaluation.nll import prepare, reading, score
from dem_opt.merging.merged_model import MergedModel
from dem_opt.types import Composite, Evaluation, Gradient, Request, Score, StoredModel, WorkerSpec


class Worker:
    """Base, experts, live model and tokenized windows on its devices, loaded once.

    An evaluation merges in memory and calls the model once for each batch; it opens no file.  It knows no
    database and no tracker.  Raises InputError where a checkpoint is not what the spec says it is.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        devices = _devices(spec.devices)
        stored = list({model.content: model for model in (spec.base, *spec.fine_tunes)}.values())
        for model in stored:
            _refuse_changed(model)
        self._model = empty_model(spec.base.path, getattr(torch, spec.dtype))
        self._arena = MergedModel(self._model, stored, devices, spec.vectors, spec.streamed)
        self._arena.merge(Composite.single(spec.base.content))
        self._reading, self._head = reading(self._model), find_head(self._model)
        self._windows = {corpus.key: prepare(corpus.windows, devices[0]) for corpus in spec.corpora}
        self._batch_tokens, self._asked_tokens = spec.batch_tokens, spec.batch_tokens
        self._ended: float | None = None
        self._base, self._experts = spec.base.content, [expert.content for expert in spec.fine_tunes]

    def evaluate(self, request: Request) -> Evaluation:
        """Scores of a composite on the corpora asked for, and what it took.

        Known scores are continued where they end, look by look if the trial is raced.  A gradient needs all windows,
        whatever is known, and is not raced.  Where memory runs out all of it is done again with half the batch, now
        and from here on.  Raises EvaluationError where a loss is not finite, or one row at a time is too many.
        """
        began, batch = perf_counter(), self._batch_tokens
        wait = 0.0 if self._ended is None else began - self._ended
        while (answer := self._attempt(request)) is None:
            self._halve()
        self._ended = perf_counter()
        note = self._halved_words() if self._batch_tokens < batch else ""
        reduced = self._batch_tokens if self._batch_tokens < self._asked_tokens else 0
        return replace(answer, wait_seconds=wait, batch_tokens=reduced, note=note)

    def _attempt(self, request: Request) -> Evaluation | None:
        """An evaluation; None where memory ran out."""
        started, self._spent = perf_counter(), _Spent()
        try:
            self._arena.merge(request.composite)
            _synchronize()
            merged = perf_counter()
            scores, gradients = self._differentiate(request) if request.gradient else (self._measure(request), {})
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return None
        spent = self._spent
        return Evaluation(
            scores, spent.forward_tokens, merged - started, perf_counter() - merged, gradients, spent.scored_tokens
        )

    def _halve(self) -> None:
        """Half the tokens of the largest forward call there was; whatever is kept for larger ones is let go."""
        shapes = [(stops(len(one.tokens_W))[0], one.ids_WT.shape[1]) for one in self._windows.values()]
        largest = min(self._batch_tokens, max(rows * length for rows, length in shapes))
        if largest <= max(length for _, length in shapes):
            raise EvaluationError(f"there is not enough memory for a forward pass of {largest:,} tokens")
        self._batch_tokens = largest // 2
        for windows in self._windows.values():
            windows.batches.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _halved_words(self) -> str:
        return (
            f"a worker ran out of memory, and goes on with at most {self._batch_tokens:,} tokens in a forward call "
            f"for {self._asked_tokens:,}; nats may differ in their last digits from those before"
        )

    def _measure(self, request: Request) -> dict[str, Score]:
        """Scores at the look where the race ends, or of all windows."""
        windows = {key: len(self._windows[key].tokens_W) for key in request.corpora}
        known = dict(request.known)
        for number in range(1, interim_analyses(windows) + 1) if request.race else (INTERIM_ANALYSES,):
            for key, end in seen(windows, number).items():
                if key not in known or len(known[key].nats_W) < end:
                    known[key] = self._score(key, known=known.get(key), end=end)
            if (scores := replay(request.race, known, windows)) is not None:
                return scores
        raise AssertionError("a race ends at its last look")

    def _differentiate(self, request: Request) -> tuple[dict[str, Score], dict[str, Gradient]]:
        """Scores, and the gradient of each corpus's nats.

        The scores are of the same pass, except for architectures whose nats it may round otherwise (`score`).
        """
        scores: dict[str, Score] = {}
        gradients: dict[str, Gradient] = {}
        for key in dict.fromkeys(request.corpora):
            with self._arena.reducing(self._base, self._experts) as gradients[key]:
                scores[key] = self._score(key, gradient=True)
            if self._reading != "packed":
                scores[key] = self._score(key, known=request.known.get(key))
        return scores, gradients

    def _score(self, key: str, known: Score | None = None, **how: Any) -> Score:
        windows = self._windows[key]
        found, tokens = score(self._model, windows, self._batch_tokens, self._reading, known, head=self._head, **how)
        self._spent.forward_tokens += tokens
        self._spent.scored_tokens += max(found.tokens - (known.tokens if known else 0), 0)
        return found


@dataclass
class _Spent:
    """Tokens of an evaluation: that went forward through the model, and those of them that were scored."""

    forward_tokens: int = 0
    scored_tokens: int = 0


def build(spec: WorkerSpec) -> Worker:
    """A worker for a spec: what a pool ships to where the worker is to live."""
    return Worker(spec)


def _refuse_changed(model: StoredModel) -> None:
    if content_of(model) != model.content:
        raise InputError(model.path, None, None, "its weights have changed since the study began to load; run again")


def _is_out_of_memory(error: RuntimeError) -> bool:
    """A device's own error, or what torch's allocator on a CPU says."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _devices(count: int) -> list[torch.device]:
    """The GPUs that this process sees, as many as are asked for; without any the CPU, so many times."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")] * count
    return [torch.device("cuda", index) for index in range(count)]


def _synchronize() -> None:
    """Let the devices finish, so that merging and scoring are timed apart."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.synchronize(index)
