"""The worker: holds stored checkpoints, a merged model and token windows on its devices, and answers requests.

Request -> merge -> score (or differentiate) -> Evaluation
"""

from dataclasses import dataclass, replace
from math import fsum
from time import perf_counter
from typing import Any

import torch

from dem_opt.checkpoints.adapters import content_of
from dem_opt.checkpoints.architecture import empty_model
from dem_opt.checkpoints.configuration import read_configuration
from dem_opt.errors import EvaluationError, InputError
from dem_opt.evaluation.forward_check import refuse_acausal
from dem_opt.evaluation.interim_analyses import (
    INTERIM_ANALYSES,
    analysis_count,
    replay,
    windows_at,
    windows_by_analysis,
)
from dem_opt.evaluation.lm_head import find_head
from dem_opt.evaluation.nll import PreparedWindows, document_layout, prepare, score
from dem_opt.merging.merged_model import MergedModel, total_gradient
from dem_opt.types import (
    Composite,
    Evaluation,
    Gradient,
    ParameterGradient,
    PartGradient,
    Request,
    Score,
    StoredModel,
    WorkerSpec,
)


class Worker:
    """Loads everything once; an evaluation then opens no file and knows neither database nor tracker.

    Attributes:
        model: The merged model, whose parameters are those of the composite merged last.
        merged_model: Stored checkpoints and the live parameters.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        """Load checkpoints and windows onto this process's devices.

        Raises:
            InputError: A checkpoint's content is not the one that the spec names, or the base is no causal model.
        """
        devices = _devices(spec.devices)
        stored = list({model.content: model for model in (spec.base, *spec.fine_tunes)}.values())
        for model in stored:
            _check_content(model)
        _check_configuration(spec.base)
        self.model = empty_model(spec.base.path, getattr(torch, spec.dtype))
        self.merged_model = MergedModel(self.model, stored, devices, spec.vectors, spec.streamed)
        # Causality, layout and head are found by running the model, so it needs real weights first.
        self.merged_model.merge(Composite.single(spec.base.content))
        refuse_acausal(self.model, spec.base.path, spec.base.field)
        self._layout, self._head = document_layout(self.model), find_head(self.model)
        self._corpora = {corpus.key: corpus.windows for corpus in spec.corpora}
        self._windows = {key: prepare(windows, devices[0]) for key, windows in self._corpora.items()}
        self._folds: dict[tuple[str, tuple[int, ...]], PreparedWindows] = {}
        self._base, self._fine_tunes = spec.base.content, [model.content for model in spec.fine_tunes]
        self._spec_batch_tokens = self._batch_tokens = spec.batch_tokens
        self._finished: float | None = None

    def evaluate(self, request: Request) -> Evaluation:
        """Merge a composite and score it on the requested corpora.

        Known scores are continued where they end; a raced trial is scored from one interim analysis to the next.  A
        gradient needs all windows, whatever is known, and is not raced.  If memory runs out, the whole evaluation is
        done again with half the batch, which then stays.

        Raises:
            EvaluationError: A loss is not finite, or memory does not suffice for one window at a time.
        """
        started, batch_tokens = perf_counter(), self._batch_tokens
        wait_seconds = 0.0 if self._finished is None else started - self._finished
        while (evaluation := self._try_evaluate(request)) is None:
            self._halve_batch()
        self._finished = perf_counter()
        return replace(
            evaluation,
            wait_seconds=wait_seconds,
            batch_tokens=self._batch_tokens if self._batch_tokens < self._spec_batch_tokens else 0,
            note=self._reduced_batch_note() if self._batch_tokens < batch_tokens else "",
        )

    def _try_evaluate(self, request: Request) -> Evaluation | None:
        """Evaluate with the present batch; None if memory ran out."""
        started, tokens = perf_counter(), _TokenCount()
        try:
            self.merged_model.merge(request.composite)
            _synchronize()
            merged = perf_counter()
            gradients: dict[str, Gradient] = {}
            fold_gradients: dict[str, dict[tuple[int, ...], ParameterGradient]] = {}
            part_gradients: dict[str, dict[range, PartGradient]] = {}
            if request.parts:
                scores, gradients, part_gradients = self._differentiate_parts(request, tokens)
            elif request.folds:
                scores, fold_gradients = self._differentiate_folds(request, tokens)
            elif request.gradient:
                scores, gradients = self._differentiate(request, tokens)
            else:
                scores = self._measure(request, tokens)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return None
        return Evaluation(
            scores=scores,
            forward_tokens=tokens.forward,
            merge_seconds=merged - started,
            score_seconds=perf_counter() - merged,
            gradients=gradients,
            fold_gradients=fold_gradients,
            part_gradients=part_gradients,
            scored_tokens=tokens.scored,
        )

    def _measure(self, request: Request, tokens: "_TokenCount") -> dict[str, Score]:
        """Score up to the interim analysis where the race ends, or all windows."""
        windows = {key: len(self._windows[key].tokens_W) for key in request.corpora}
        scores = dict(request.known)
        for analysis in range(1, analysis_count(windows) + 1) if request.race else (INTERIM_ANALYSES,):
            for key, end in windows_at(windows, analysis).items():
                if key not in scores or len(scores[key].nats_W) < end:
                    scores[key] = self._score(self._windows[key], tokens, known=scores.get(key), end=end)
            if (final := replay(request.race, scores, windows)) is not None:
                return final
        raise AssertionError("a race ends at its final analysis")

    def _differentiate(self, request: Request, tokens: "_TokenCount") -> tuple[dict[str, Score], dict[str, Gradient]]:
        """Score all windows, and differentiate each corpus's nats.

        Packed scores come from the same pass; other layouts may round otherwise with gradients (see `score`), so they
        are scored by a pass of their own.
        """
        scores: dict[str, Score] = {}
        gradients: dict[str, Gradient] = {}
        for key in dict.fromkeys(request.corpora):
            with self.merged_model.reduce_gradients(self._base, self._fine_tunes) as products:
                scores[key] = self._score(self._windows[key], tokens, gradient=True)
            gradients[key] = total_gradient(products, self._fine_tunes)
            if self._layout != "packed":
                scores[key] = self._score(self._windows[key], tokens, known=request.known.get(key))
        return scores, gradients

    def _differentiate_folds(
        self, request: Request, tokens: "_TokenCount"
    ) -> tuple[dict[str, Score], dict[str, dict[tuple[int, ...], ParameterGradient]]]:
        """Score all windows, and differentiate the nats of each fold of each corpus by parameter.

        Folds are scored one after the other, so that one backward pass gives the gradient of each.
        """
        scores: dict[str, Score] = {}
        gradients: dict[str, dict[tuple[int, ...], ParameterGradient]] = {}
        for key, folds in request.folds.items():
            nats: dict[int, float] = {}
            for fold in folds:
                windows = self._fold(key, fold)
                with self.merged_model.reduce_gradients(self._base, self._fine_tunes) as products:
                    result = self._score(windows, tokens, gradient=True)
                nats |= dict(zip(fold, result.nats_W, strict=True))
                gradients.setdefault(key, {})[fold] = products
            whole = self._windows[key]
            if self._layout == "packed":
                scores[key] = Score(tuple(nats[n] for n in range(len(nats))), whole.tokens_W, whole.bytes_W)
            else:
                scores[key] = self._score(whole, tokens, known=request.known.get(key))
        return scores, gradients

    def _differentiate_parts(
        self, request: Request, tokens: "_TokenCount"
    ) -> tuple[dict[str, Score], dict[str, Gradient], dict[str, dict[range, PartGradient]]]:
        """Score and differentiate parts of corpora, one backward pass each.

        Where they are all windows of a corpus, their sum is its gradient, and it has a score (`_differentiate`).
        """
        scores: dict[str, Score] = {}
        gradients: dict[str, Gradient] = {}
        measured: dict[str, dict[range, PartGradient]] = {}
        for key, parts in request.parts.items():
            whole, by_part = self._windows[key], dict[range, PartGradient]()
            for part in parts:
                with self.merged_model.reduce_gradients(self._base, self._fine_tunes) as products:
                    score = self._score(self._fold(key, tuple(part)), tokens, gradient=True)
                by_part[part] = PartGradient(score, total_gradient(products, self._fine_tunes))
            measured[key] = by_part
            if sum(map(len, parts)) < len(whole.tokens_W):
                continue
            gradients[key] = {
                content: fsum(part.gradient[content] for part in by_part.values()) for content in self._fine_tunes
            }
            if self._layout == "packed":
                nats = {n: nats for part in parts for n, nats in zip(part, by_part[part].score.nats_W, strict=True)}
                scores[key] = Score(tuple(nats[n] for n in range(len(nats))), whole.tokens_W, whole.bytes_W)
            else:
                scores[key] = self._score(whole, tokens, known=request.known.get(key))
        return scores, gradients, measured

    def _fold(self, key: str, fold: tuple[int, ...]) -> PreparedWindows:
        """The windows of a fold, prepared on first use."""
        if (key, fold) not in self._folds:
            self._folds[key, fold] = prepare(self._corpora[key].take(fold), self._windows[key].ids_WT.device)
        return self._folds[key, fold]

    def _score(
        self, windows: PreparedWindows, tokens: "_TokenCount", known: Score | None = None, **options: Any
    ) -> Score:
        """Score windows and count their tokens."""
        result, forward_tokens = score(
            self.model, windows, self._batch_tokens, self._layout, known, head=self._head, **options
        )
        tokens.forward += forward_tokens
        tokens.scored += max(result.tokens - (known.tokens if known else 0), 0)
        return result

    def _halve_batch(self) -> None:
        """Halve the tokens of the largest forward call so far, and free the batches that were kept for larger ones."""
        shapes = [(windows_by_analysis(len(w.tokens_W))[0], w.ids_WT.shape[1]) for w in self._windows.values()]
        largest = min(self._batch_tokens, max(rows * length for rows, length in shapes))
        if largest <= max(length for _, length in shapes):
            raise EvaluationError(f"there is not enough memory for a forward pass of {largest:,} tokens")
        self._batch_tokens = largest // 2
        for windows in (*self._windows.values(), *self._folds.values()):
            windows.batches.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _reduced_batch_note(self) -> str:
        return (
            f"a worker ran out of memory and continues with at most {self._batch_tokens:,} tokens in a forward call "
            f"instead of {self._spec_batch_tokens:,}; nats may differ from earlier ones in their last digits"
        )


@dataclass
class _TokenCount:
    """Tokens of one evaluation: all that went through the model, and those whose nats count."""

    forward: int = 0
    scored: int = 0


def build(spec: WorkerSpec) -> Worker:
    """Build a worker: the importable function that a pool calls in the worker's process."""
    return Worker(spec)


def _check_content(model: StoredModel) -> None:
    if content_of(model) != model.content:
        raise InputError(
            model.path, model.field, None, "its weights have changed since the study began to load; run again"
        )


def _check_configuration(base: StoredModel) -> None:
    if base.configuration and read_configuration(base.path, base.field).text != base.configuration:
        where = base.path / "config.json"
        raise InputError(where, base.field, None, "has changed since the study began to load; run again")


def _is_out_of_memory(error: RuntimeError) -> bool:
    # A GPU raises a class of its own; torch's allocator on a CPU raises RuntimeError and names itself in the message.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _devices(count: int) -> list[torch.device]:
    """The first `count` GPUs of this process; without a GPU the CPU, repeated."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")] * count
    return [torch.device("cuda", index) for index in range(count)]


def _synchronize() -> None:
    """Wait for all GPUs, so that merging and scoring are timed apart."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.synchronize(index)
