"""Checkpoints that stay in their files: blocks of them on their devices, fetched while the one before is merged."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2**24
"""Elements of a parameter that are fetched at once, unless an adapter needs all of it."""

AHEAD = 2
"""Blocks of a checkpoint on a device at a time: one is merged, the next is fetched."""

_PAGE = 4096
"""Bytes of a mapped file that are read together, at least."""


class Block(NamedTuple):
    """Elements of one parameter, flat, and the device that they are wanted on."""

    name: str
    part: slice
    device: torch.device


class Mapped:
    """Parameters of checkpoints over mapped files, by content."""

    def __init__(self, parameters: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Nothing is read yet."""
        self._parameters = parameters
        self._lanes: dict[torch.device, _Lane] = {}

    def __contains__(self, content: str) -> bool:
        return content in self._parameters

    def values(self, content: str, block: Block) -> Tensor:
        """A block's values; for a CPU they are the file's own, read where and when they are used."""
        return self._of_file(content, block).to(block.device)

    def ahead(self, contents: Sequence[str], blocks: Sequence[Block]) -> Iterator[dict[str, Tensor]]:
        """The values of each block in turn, by content; while one is used, a thread fetches the next.

        For a CPU it reads from the file what is not in memory.  For a GPU it copies to page-locked memory, which the
        GPU's copy engine reads beside the kernels that merge.
        """

        def fetch(block: Block) -> list[_Fetched]:
            return [self._fetch(self._of_file(content, block), block.device) for content in contents]

        if not contents:
            yield from ({} for _ in blocks)
            return
        with ThreadPoolExecutor(1) as thread:
            coming = [thread.submit(fetch, block) for block in blocks[:1]]
            for number in range(len(blocks)):
                fetched = coming.pop().result()
                coming += [thread.submit(fetch, block) for block in blocks[number + 1 : number + 2]]
                yield {content: one.received() for content, one in zip(contents, fetched, strict=True)}

    def _of_file(self, content: str, block: Block) -> Tensor:
        """A block's values over the mapped file."""
        return self._parameters[content][block.name].reshape(-1)[block.part]

    def _fetch(self, values_P: Tensor, device: torch.device) -> "_Fetched":
        """Bring values of a file near to a device."""
        if device.type == "cpu":
            values_P.view(torch.uint8).numpy()[::_PAGE].sum()
            return _Fetched(values_P, None)
        if device not in self._lanes:
            self._lanes[device] = _Lane(device)
        return self._lanes[device].send(values_P)


class _Fetched(NamedTuple):
    """Values on their device, once what was recorded there has happened."""

    values_P: Tensor
    copied: torch.cuda.Event | None

    def received(self) -> Tensor:
        """The values, for the device's current stream."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.values_P.device)
            stream.wait_event(self.copied)
            self.values_P.record_stream(stream)
        return self.values_P


class _Lane:
    """Copies to one GPU, in a stream of their own, from two page-locked buffers in turn."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * AHEAD
        self._copied: list[torch.cuda.Event | None] = [None] * AHEAD

    def send(self, values_P: Tensor) -> _Fetched:
        """Values on their way; waits until the buffer's last ones have left it."""
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
