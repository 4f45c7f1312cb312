"""Stream checkpoints from memory-mapped files: fetch a block of each while the block before it is merged."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2**24
"""Elements of a parameter fetched at once, except where an adapter needs the whole parameter."""

BUFFERS = 2
"""Blocks of a checkpoint on a device at a time: the one that is merged, and the next one on its way."""

# Bytes of a mapped file that are read together, at least.
_PAGE = 4096


class Block(NamedTuple):
    """Flat elements of one parameter, and the device they are needed on."""

    name: str
    part: slice
    device: torch.device


class StreamedCheckpoints:
    """Parameters of checkpoints in mapped files, by the checkpoint's content hash."""

    def __init__(self, parameters: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keep mapped tensors by content and parameter name; nothing is read yet."""
        self._parameters = parameters
        self._copiers: dict[torch.device, _PinnedCopier] = {}

    @staticmethod
    def memory_bytes(largest: int, itemsize: int, whole_parameters: bool) -> int:
        """Bytes on a GPU of what is fetched of one checkpoint; on a CPU blocks are views of the mapped file.

        A merge has BUFFERS blocks at a time, or BUFFERS whole parameters for adapters; the reduction of a gradient has
        all of its parameter.

        Args:
            largest: Elements of the largest parameter.
            itemsize: Bytes of a stored element.
            whole_parameters: Whether merges need whole parameters.
        """
        merged = BUFFERS * (largest if whole_parameters else min(BLOCK, largest))
        return max(merged, largest) * itemsize

    def __contains__(self, content: str) -> bool:
        return content in self._parameters

    def values(self, content: str, block: Block) -> Tensor:
        """Return a block's values; on a CPU as a view of the mapped file, which is read when the view is used."""
        return self._mapped(content, block).to(block.device)

    def prefetch(self, contents: Sequence[str], blocks: Sequence[Block]) -> Iterator[dict[str, Tensor]]:
        """Yield the values of each block in turn, by content, while a thread fetches the next block.

        For a CPU the thread reads from the file what is not in memory.  For a GPU it copies to page-locked memory, from
        where the GPU's copy engine transfers beside the kernels that merge.
        """

        def fetch(block: Block) -> list[_Fetched]:
            return [self._fetch(self._mapped(content, block), block.device) for content in contents]

        if not contents:
            yield from ({} for _ in blocks)
            return
        with ThreadPoolExecutor(1) as thread:
            pending = [thread.submit(fetch, block) for block in blocks[:1]]
            for number in range(len(blocks)):
                fetched = pending.pop().result()
                pending += [thread.submit(fetch, block) for block in blocks[number + 1 : number + 2]]
                yield {content: copy.wait() for content, copy in zip(contents, fetched, strict=True)}

    def _mapped(self, content: str, block: Block) -> Tensor:
        """A block's values as a view of the mapped file."""
        return self._parameters[content][block.name].reshape(-1)[block.part]

    def _fetch(self, values_P: Tensor, device: torch.device) -> "_Fetched":
        """Read mapped values into memory, or start copying them to a GPU."""
        if device.type == "cpu":
            values_P.view(torch.uint8).numpy()[::_PAGE].sum()  # touches every page, so that the system reads it now
            return _Fetched(values_P, None)
        if device not in self._copiers:
            self._copiers[device] = _PinnedCopier(device)
        return self._copiers[device].send(values_P)


class _Fetched(NamedTuple):
    """Values on their device, valid once `copied` has happened there (at once where it is None)."""

    values_P: Tensor
    copied: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """Return the values after making the device's current stream wait for the copy."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.values_P.device)
            stream.wait_event(self.copied)
            # Memory is owned by the copying stream: without this it could be reused while `stream` still reads it.
            self.values_P.record_stream(stream)
        return self.values_P


class _PinnedCopier:
    """Copies to one GPU on a stream of their own, from page-locked buffers used in turn."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * BUFFERS
        self._copied: list[torch.cuda.Event | None] = [None] * BUFFERS

    def send(self, values_P: Tensor) -> _Fetched:
        """Start a copy, after the one that used the same buffer has ended."""
        buffer, copied = self._buffers.pop(0), self._copied.pop(0)
        if copied is not None:
            copied.synchronize()
        if buffer.nbytes < values_P.nbytes:
            buffer = torch.empty(values_P.nbytes, dtype=torch.uint8, pin_memory=True)
        staged_P = buffer[: values_P.nbytes].view(values_P.dtype).copy_(values_P)
        with torch.cuda.stream(self._stream):
            sent_P = staged_P.to(self._device, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        self._buffers.append(buffer)
        self._copied.append(copied)
        return _Fetched(sent_P, copied)
