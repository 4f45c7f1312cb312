"""Compare a model's vertex with the forward pass of the library that it comes from, and prove that it is causal.

    difference = mean_t | nll_t - nll'_t |        nats per token, over a few tokens

nll is that of the model as transformers or peft load it, nll' that of its vertex as this package merges it, both in
float32 on the CPU.  The tokens are random, so that the result depends on the model alone.

Shape suffixes: T tokens, V vocabulary.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from dem_opt.checkpoints.architecture import CONFIG_ERRORS, empty_model, load_model, silent
from dem_opt.checkpoints.hf_config import read_config
from dem_opt.errors import InputError
from dem_opt.merging.merged_model import MergedModel
from dem_opt.types import Composite, StoredModel

TOKENS = 64
"""Tokens of a comparison, or as many as the model has positions."""

LEAK, NARROW_LEAK = 1e-5, 5e-2
"""Largest change of earlier logits, relative to that of the changed token's own, that can be rounding: experts are
computed in batches that the change regroups.  In float32, and in narrower dtypes.  Of masked language models that are
not trained at all it was 1e-4 and more, of causal models 0.
"""

_LOADING_ERRORS = (*CONFIG_ERRORS, SafetensorError)


class NotComparableError(Exception):
    """The library itself does not load the model, or not all of it: its forward pass says nothing."""


@dataclass(frozen=True)
class Comparison:
    """A model's NLL on a few random tokens, in nats per token.

    Attributes:
        library: As transformers or peft load it.
        vertex: As this package merges it.
        difference: Mean absolute difference over the tokens.
    """

    library: float
    vertex: float
    difference: float


def compare_forward(base: StoredModel, model: StoredModel) -> Comparison:
    """Compare the vertex of a base, checkpoint or adapter with the library's own forward pass.

    One model is in memory at a time.  Where a fine-tune has another number of tokens, both are compared on those that
    they share.

    Raises:
        NotComparableError: The library does not load the model.
    """
    vertex = empty_model(base.path, torch.float32)
    ids_T = random_tokens(vertex)
    if model.vocabulary is not None:
        ids_T %= read_config(model.path, model.field).get("vocab_size", len(ids_T))
    with torch.inference_mode(), silent():
        expected_TV = _library_logits(base, model, ids_T)
    is_whole = model.base is None and model.vocabulary is None
    MergedModel(vertex, [model] if is_whole else [base, model]).merge(Composite.single(model.content))
    with torch.inference_mode(), silent():
        logits_TV = _logits(vertex, ids_T, ids_T)
    vocabulary = min(expected_TV.shape[1], logits_TV.shape[1])
    library_T, vertex_T = (_losses(x_TV[:, :vocabulary], ids_T) for x_TV in (expected_TV, logits_TV))
    difference_T = (library_T - vertex_T).abs()
    return Comparison(library_T.mean().item(), vertex_T.mean().item(), difference_T.mean().item())


def refuse_acausal(model: PreTrainedModel, folder: Path, field: str | None = None) -> None:
    """Raise InputError for a model in which the last token changes what is predicted from those before it.

    The change of earlier logits is compared with that of the last token's own: rounding is far below, attention to
    later tokens far above, whether the weights are trained or not.
    """
    with torch.inference_mode(), silent():
        ids_T = random_tokens(model)
        other_T = ids_T.clone()
        other_T[-1] = (ids_T[-1] + 1) % _rows(model)
        change_TV = (_logits(model, other_T, ids_T) - _logits(model, ids_T, ids_T)).abs()
    earlier, own = change_TV[:-1].max().item(), change_TV[-1].max().item()
    if earlier > own * (LEAK if model.dtype.itemsize >= 4 else NARROW_LEAK):
        hint = " (config.json: is_decoder false)" if getattr(model.config, "is_decoder", True) is False else ""
        mend = (
            f"{type(model).__name__}{hint} is no causal language model: a later token changes the logits of an "
            f"earlier one, by {earlier:.1e}; name a base that predicts each token from those before it"
        )
        raise InputError(folder, field, None, mend)


def _losses(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """-ln p(x_t | x_<t) in nats for all tokens but the first."""
    return functional.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="none")


def _logits(model: PreTrainedModel, ids_T: Tensor, source_T: Tensor) -> Tensor:
    """Logits [T, V] in float32 on the CPU; an encoder-decoder's of its decoder."""
    ids_1T = ids_T[None].to(model.device)
    paired = {"input_ids": source_T[None].to(model.device), "decoder_input_ids": ids_1T}
    inputs = paired if model.config.is_encoder_decoder else {"input_ids": ids_1T}
    logits_1TV: Tensor = model(**inputs, use_cache=False).logits
    return logits_1TV[0].float().cpu()


def random_tokens(model: PreTrainedModel) -> Tensor:
    """Random ids [T] of a model's vocabulary."""
    config = model.config.get_text_config(decoder=True)
    positions = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    length = min([TOKENS, *(count for count in positions if isinstance(count, int) and count > 1)])
    return torch.randint(_rows(model), (length,), generator=torch.Generator().manual_seed(0))


def _rows(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


def _library_logits(base: StoredModel, model: StoredModel, ids_T: Tensor) -> Tensor:
    """Logits [T, V] of a model as the library loads it."""
    try:
        loaded = _load_checkpoint(model.path) if model.base is None else _load_adapter(base.path, model.path)
        return _logits(loaded, ids_T, ids_T)
    except _LOADING_ERRORS as error:
        raise NotComparableError(" ".join(str(error).split())) from error


def _load_checkpoint(folder: Path) -> PreTrainedModel:
    """A checkpoint as transformers loads it."""
    loaded: Any = load_model(folder, torch.float32, output_loading_info=True)
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise NotComparableError(f"transformers finds no {missing[0]} in it")
    return cast(PreTrainedModel, model.eval())


def _load_adapter(base: Path, folder: Path) -> PreTrainedModel:
    """A base with an adapter that peft keeps beside its weights."""
    try:
        peft: Any = import_module("peft")
    except ImportError:
        raise NotComparableError("peft is not installed") from None
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    model = peft.PeftModel(_load_checkpoint(base), config, "default")
    report = model.load_adapter(str(folder), "default", torch_device="cpu")
    if unread := sorted({*report.missing_keys, *report.unexpected_keys}):
        raise NotComparableError(f"peft does not find or know {unread[0]}")
    return cast(PreTrainedModel, model.eval().get_base_model())
