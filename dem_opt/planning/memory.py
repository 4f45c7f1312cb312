"""Bytes of one worker: the sum of what each part says that it allocates, and what stays in files if that is too much.

The counts themselves stand beside the allocations (`memory_bytes` of MergedModel, MergeKernel, StreamedCheckpoints,
PreparedWindows and the language-model head); here they are added up.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dem_opt.checkpoints.architecture import Architecture
from dem_opt.checkpoints.files import Header
from dem_opt.config import StudyConfig
from dem_opt.evaluation.nll import PreparedWindows
from dem_opt.merging.kernel import MergeKernel
from dem_opt.merging.merged_model import MergedModel, ModelBytes
from dem_opt.merging.streaming import StreamedCheckpoints
from dem_opt.planning.hardware import GPU_CONTEXT_BYTES, PROCESS_BYTES


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one worker on its device; of several GPUs, on the one that holds most.

    Attributes:
        stored: Base and fine-tunes as the merged model keeps them, also where no composite uses the base.
        live: The merged model, in the evaluation's dtype.
        scratch: Temporaries of a merge.
        windows: Tokens of all corpora, and the spec's own copy.
        activations: The most that a forward call and its loss hold at once.
        backward: The most that these and the backward pass hold at once, with the gradient of one parameter.
        process: The process itself: libraries on a CPU, the context on a GPU.
        streamed: Folders of the checkpoints that stay in their files.
    """

    stored: int
    live: int
    scratch: int
    windows: int
    activations: int
    backward: int
    process: int
    streamed: tuple[Path, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes of a worker at its peak, without gradients."""
        return self.stored + self.live + self.scratch + self.windows + self.activations + self.process

    @property
    def gradient_peak(self) -> int:
        """Bytes of a worker at its peak, with gradients."""
        return self.peak - self.activations + max(self.activations, self.backward)


@dataclass(frozen=True, kw_only=True)
class DeviceBytes:
    """Bytes that one device of a worker holds between forward calls."""

    model: ModelBytes
    scratch: int
    windows: int
    process: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.model.stored + self.model.live + self.scratch + self.windows + self.process


def device_bytes(
    architecture: Architecture,
    headers: Sequence[Header],
    names: Collection[str],
    study: StudyConfig,
    device: str,
    dtype: torch.dtype,
    stored_dtype: torch.dtype,
) -> DeviceBytes:
    """Count what the device of the parameters `names` holds.

    Windows are counted on every device of a worker, though only the first has them.

    Args:
        architecture: The base's.
        headers: Checkpoints and adapters with different contents, the base first.
        names: Parameters on this device.
        study: The study.
        device: "cpu" or "cuda".
        dtype: The evaluation's dtype.
        stored_dtype: The base's dtype, which merges are rounded to.
    """
    evaluation, adapters = study.evaluation, sum(header.adapter for header in headers)
    windows = PreparedWindows.memory_bytes(evaluation.windows + evaluation.held_out, evaluation.window)
    return DeviceBytes(
        model=MergedModel.memory_bytes(architecture, headers, dtype=dtype, vectors=evaluation.vectors, names=names),
        scratch=MergeKernel.memory_bytes(device, stored_dtype.itemsize)
        + MergedModel.adapter_scratch_bytes(architecture, names, adapters),
        windows=len(study.corpora) * windows,
        process=PROCESS_BYTES if device == "cpu" else GPU_CONTEXT_BYTES,
    )


def choose_streamed(
    architecture: Architecture, headers: Sequence[Header], sizes: Sequence[int], study: StudyConfig, free: int
) -> dict[Path, int]:
    """Choose the checkpoints that stay in their files so that the others fit; bytes saved, by folder.

    The base comes first where coefficients sum to 1, since then no composite but the base itself reads it, else last;
    fine-tunes from the last one on.  None where even all of them would not help.  Int8 vectors are never streamed
    (quantizing needs the base), nor adapters, which are small, nor checkpoints whose tensors are fused on loading.

    Args:
        architecture: The base's.
        headers: Checkpoints and adapters, the base first.
        sizes: Bytes of each on the device.
        study: The study.
        free: Bytes left beside all of them; negative where they do not fit.
    """
    if study.evaluation.vectors != "exact":
        return {}
    base, *fine_tunes = zip(headers, sizes, strict=True)
    always_sums_to_one = study.space.least is None and study.space.total == 1
    candidates = [base, *reversed(fine_tunes)] if always_sums_to_one else [*reversed(fine_tunes), base]
    saved: dict[Path, int] = {}
    for header, size in candidates:
        if free + sum(saved.values()) >= 0:
            break
        if not header.adapter and not architecture.layout(header).fused:
            saved[header.folder] = size
    return saved if free + sum(saved.values()) >= 0 else {}


def streaming_bytes(architecture: Architecture, headers: Sequence[Header]) -> int:
    """Bytes on a GPU of what is fetched of one streamed checkpoint."""
    base = headers[0]
    layout = architecture.layout(base)
    return StreamedCheckpoints.memory_bytes(
        largest=max(architecture.sizes.values()),
        itemsize=max(layout.dtype(base, name).itemsize for name in architecture.parameters),
        whole_parameters=any(header.adapter for header in headers),
    )
