"""Laws of fetching: the file's values, in turn, the next while one is used, on a CPU as on a GPU."""

import threading

import pytest
import torch
from safetensors.torch import save_file

from dem_opt.checkpoints.files import read_header, read_tensors
from dem_opt.merging.streaming import BUFFERS, Block, StreamedCheckpoints

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
SHAPES = {"a": (3, 5), "b": (64,), "empty": (0, 4), "c": (7, 11, 2)}


def mapped(folder, dtype=torch.float32, count=2):
    """Checkpoints over real files, and their values."""
    torch.manual_seed(0)
    values, parameters = {}, {}
    for content in map(str, range(count)):
        values[content] = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
        (folder / content).mkdir()
        save_file(values[content], folder / content / "model.safetensors")
        (folder / content / "config.json").write_text("{}")
        parameters[content] = dict(read_tensors(read_header(folder / content, "checkpoint"), list(SHAPES)))
    return StreamedCheckpoints(parameters), values


def blocks(device, size):
    """All elements, so many at a time; an empty parameter once."""
    for name, shape in SHAPES.items():
        count = torch.Size(shape).numel()
        for first in range(0, max(count, 1), size):
            yield Block(name, slice(first, min(first + size, count)), torch.device(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("contents", [[], ["1"], ["0", "1"]], ids=str)
@pytest.mark.parametrize("size", [1, 6, 1000])
def test_every_block_has_the_files_values_on_its_device(tmp_path, device, dtype, contents, size):
    models, values = mapped(tmp_path, dtype)
    wanted = list(blocks(device, size))
    seen = 0
    for block, fetched in zip(wanted, models.prefetch(contents, wanted), strict=True):
        assert list(fetched) == contents
        for content in contents:
            expected_P = values[content][block.name].reshape(-1)[block.part]
            assert fetched[content].device.type == device and torch.equal(fetched[content].cpu(), expected_P)
            assert torch.equal(models.values(content, block).cpu(), expected_P)
        seen += 1
    assert seen == len(wanted) and not list(models.prefetch(contents, []))


def test_the_next_block_is_fetched_while_one_is_used_and_no_other(tmp_path, monkeypatch):
    models, _ = mapped(tmp_path)
    begun, threads, done = [], set(), threading.Semaphore(0)
    fetch = models._fetch

    def counted(values_P, device):
        block = fetch(values_P, device)
        begun.append(len(values_P))
        threads.add(threading.get_ident())
        done.release()
        return block

    monkeypatch.setattr(models, "_fetch", counted)
    wanted = list(blocks("cpu", 1000))
    for number, _ in enumerate(models.prefetch(["0"], wanted)):
        for _ in range(BUFFERS if number == 0 else 1):
            assert number + 1 == len(wanted) or done.acquire(timeout=10)
        assert len(begun) == min(number + BUFFERS, len(wanted))
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_a_file_that_fails_stops_at_its_block_and_leaves_no_thread(tmp_path, monkeypatch):
    models, _ = mapped(tmp_path)
    fetch = models._fetch

    def failing(values_P, device):
        if len(values_P) == 64:
            raise OSError(5, "Input/output error")
        return fetch(values_P, device)

    monkeypatch.setattr(models, "_fetch", failing)
    before, seen = threading.active_count(), []
    with pytest.raises(OSError, match="Input/output"):
        seen.extend(models.prefetch(["0"], list(blocks("cpu", 1000))))
    assert len(seen) == 1 and threading.active_count() == before
