"""Proof, before a study spends anything, that each vertex computes what its fine-tune computes.

The NLL of a few tokens of each model as transformers or peft load it is compared with that of its vertex.  The result
is remembered by content in the user's cache, so that a model is compared once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version

import torch

from dem_opt.checkpoints import user_cache
from dem_opt.checkpoints.architecture import Architecture, empty_model
from dem_opt.checkpoints.files import Header
from dem_opt.errors import InputError, shorten
from dem_opt.evaluation.forward_check import TOKENS, Comparison, NotComparableError, compare_forward, refuse_acausal
from dem_opt.merging.merged_model import MergedModel
from dem_opt.planning.hardware import available_memory
from dem_opt.planning.plan import sized, stored_dtype
from dem_opt.progress import current_progress
from dem_opt.types import Composite, StoredModel

SAME_BITS = 1e-4
"""Largest difference of a checkpoint, whose vertex has its bits, in nats per token."""

VERTICES = "vertices"
"""Kind of the cache's entries that are comparisons: each the reason why it was not possible, or ""."""

ROUNDED = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2}
"""Largest difference of an adapter, by the base's dtype: a vertex is rounded to it, peft keeps factors in float32."""

_VERSIONS = ("dem-opt", "torch", "transformers", "peft")


@dataclass(frozen=True)
class _Vertex:
    """A model to compare: its files, the field that names it, and the largest difference."""

    model: StoredModel
    header: Header
    tolerance: float


@dataclass(frozen=True)
class VertexCheck:
    """A check of vertices: warnings of those that can't be compared, and the forward tokens that it took."""

    warnings: tuple[str, ...]
    tokens: int = 0


def check_vertices(
    base: StoredModel, fine_tunes: Mapping[str, StoredModel], headers: Mapping[str, Header]
) -> VertexCheck:
    """Compare base and fine-tunes with their libraries' own forward passes, as far as they were not compared before.

    Args:
        base: The base.
        fine_tunes: Checkpoints and adapters by distribution.
        headers: Headers by distribution; of the base as "base".

    Raises:
        InputError: A vertex is another model than its fine-tune, or the base is no causal model.
    """
    rounded = ROUNDED[stored_dtype(headers["base"])]
    vertices = {
        name: _Vertex(model, headers[name], rounded if model.base is not None else SAME_BITS)
        for name, model in {"base": base, **fine_tunes}.items()
    }
    keys = {name: _key(base, vertex.model) for name, vertex in vertices.items()}
    known = {name: user_cache.get(VERTICES, key, str) for name, key in keys.items()}
    new = [name for name, reason in known.items() if reason is None]
    with current_progress().phase("comparing with transformers", len(new), "models") as phase:
        for name in new:
            known[name] = _check(base, vertices[name])
            user_cache.put(VERTICES, keys[name], known[name])
            phase.advance()
    reasons = {name: reason for name, reason in known.items() if reason}
    warnings = (f"{name} is not compared with its own forward pass: {reason}" for name, reason in reasons.items())
    # Two passes for each comparison, two more for the base, which has to be causal.
    return VertexCheck(tuple(warnings), 2 * TOKENS * (len(new) + ("base" in new)))


def shortage(architecture: Architecture, headers: Mapping[str, Header]) -> str | None:
    """Say why there is no memory to compare forward passes; None where there is.

    The largest need is that of a live model in float32 beside a model's stored tensors, and the base's for an adapter.
    """
    base = headers["base"].nbytes
    stored = max(header.nbytes + (base if header.adapter else 0) for header in headers.values())
    needed, available = 4 * sum(architecture.sizes.values()) + stored, available_memory()
    if needed <= available:
        return None
    return f"{sized(needed)} of memory are needed, {sized(available)} are available"


def _check(base: StoredModel, vertex: _Vertex) -> str:
    """Compare one model; returns why it can't be compared, or ""."""
    model, field = vertex.model, vertex.header.field
    if model == base:
        live = empty_model(base.path, torch.float32)
        MergedModel(live, [base]).merge(Composite.single(base.content))
        refuse_acausal(live, base.path, field)
        del live
    try:
        comparison = compare_forward(base, model)
    except NotComparableError as error:
        return shorten(str(error), 200)
    if not comparison.difference <= vertex.tolerance:
        raise InputError(model.path, field, None, _explain(comparison, vertex))
    return ""


def _explain(comparison: Comparison, vertex: _Vertex) -> str:
    """The difference in words, and what to do."""
    library = "transformers loads" if vertex.model.base is None else "peft loads"
    return (
        f"can't be merged as it is stored: as {library} it, its NLL is {comparison.library:.4f} nats per token on "
        f"{TOKENS} random tokens, as a vertex {comparison.vertex:.4f}; they differ by {comparison.difference:.1e}, "
        f"rounding by {vertex.tolerance:.0e} at most; save it as a whole checkpoint of the base's architecture"
    )


def _key(base: StoredModel, model: StoredModel) -> str:
    """Key of a comparison: contents, configurations and versions that it depends on."""
    files = [base.path / "config.json", model.path / ("adapter_config.json" if model.base else "config.json")]
    digests = [sha256(file.read_bytes()).hexdigest() for file in files]
    return sha256(repr((base.content, model.content, digests, _versions())).encode()).hexdigest()


def _versions() -> list[str]:
    """Versions of the libraries that load models; "" for one that is not installed."""
    versions = []
    for name in _VERSIONS:
        try:
            versions.append(version(name))
        except PackageNotFoundError:
            versions.append("")
    return versions
