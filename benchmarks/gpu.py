"""Figures of a device: merge bandwidth over copy bandwidth, and a trial over the bare forward pass.  Table and JSON.

    python benchmarks/gpu.py [--device cuda] [--most 13e9] [--seconds 480] [--json FILE]

Needs torch, transformers, safetensors, numpy and pydantic only.  Weights are made on the device: flat ones for the
merges, of 10 million to 13 billion parameters as memory allows, N checkpoints of 2, 4, 8; a Llama for the trials;
files are written and loaded at up to a billion parameters.  Measured side by side, in turn, the best of several; what
there is no time or memory for is left out and told.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from dem_opt.checkpoints.architecture import silence_transformers
from dem_opt.checkpoints.files import content_hash
from dem_opt.evaluation.lm_head import find_head
from dem_opt.evaluation.nll import prepare, score
from dem_opt.evaluation.worker import Worker
from dem_opt.merging.merged_model import MergeKernel
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, Corpus, Request, StoredModel, Windows, WorkerSpec

SIZES = (10e6, 100e6, 1e9, 3e9, 7e9, 13e9)
COUNTS = (2, 4, 8)
EXPERTS = 3
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROUNDS = 5
RESERVE = 0.1
"""The share of memory that is left alone."""

SHAPES = {
    2e6: {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4},
    100e6: {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12, "num_attention_heads": 10},
    1e9: {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 20, "num_attention_heads": 16},
    7e9: {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    13e9: {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
"""Llamas by about how many parameters they have with a vocabulary of 32,000."""


@dataclass(frozen=True)
class Merge:
    """One merge: of `count` checkpoints of so many parameters; bandwidths in GB/s."""

    parameters: int
    count: int
    dtype: str
    copy: float
    merge: float

    @property
    def ratio(self) -> float:
        """Merge over copy."""
        return self.merge / self.copy


@dataclass(frozen=True)
class Trial:
    """One trial's milliseconds: its merge, the scoring that it does, and the model's own forward pass and loss."""

    parameters: int
    count: int
    dtype: str
    tokens: int
    merge: float
    score: float
    bare: float

    @property
    def ratio(self) -> float:
        """Trial over merge and bare forward pass."""
        return (self.merge + self.score) / (self.merge + self.bare)


@dataclass(frozen=True)
class Load:
    """From files to the first score: seconds, and bytes read for each of them.

    merge, streamed  milliseconds of a merge of what is loaded, and of one whose experts stay in their files
    """

    parameters: int
    count: int
    dtype: str
    load: float
    first: float
    gigabytes: float
    merge: float
    streamed: float


class Clock:
    """Seconds that are left, and a device to wait for."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self._end = device, perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self._end - perf_counter()

    def wait(self) -> None:
        """Until the device has done all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, job: Callable[[], object]) -> float:
        """Seconds of a job, the device's work included."""
        self.wait()
        began = perf_counter()
        job()
        self.wait()
        return perf_counter() - began

    def best(self, *jobs: Callable[[], object]) -> list[float]:
        """The best of ROUNDS of each job, in turn, after one round that does not count."""
        rounds = [[self.seconds(job) for job in jobs] for _ in range(ROUNDS + 1)]
        return [min(times) for times in zip(*rounds[1:], strict=True)]


def free_bytes(device: torch.device) -> float:
    """Memory for weights."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] * (1 - RESERVE)
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024 * (1 - RESERVE)


def random_weights(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Flat weights like a model's."""
    return torch.empty(size, dtype=dtype, device=device).normal_(std=0.02)


def shares(count: int) -> list[int]:
    """Coefficients in units of 1e-9 that sum to 1."""
    return [UNIT // count + (UNIT % count if place == 0 else 0) for place in range(count)]


def merges(clock: Clock, most: float) -> Iterator[Merge]:
    """Merges of all sizes that fit."""
    for size, name, count in ((int(size), name, count) for size in SIZES for name in DTYPES for count in COUNTS):
        if size <= most and (count + 1) * size * DTYPES[name].itemsize <= free_bytes(clock.device) and clock.left > 30:
            yield merge_once(clock, size, name, count)
            release(clock.device)


def merge_once(clock: Clock, size: int, name: str, count: int) -> Merge:
    """A merge over a copy of weights of the same number and dtype, on the same device."""
    dtype, kernel = DTYPES[name], MergeKernel(clock.device)
    stored_NP = [random_weights(size, dtype, clock.device) for _ in range(count)]
    out_P = torch.empty(size, dtype=dtype, device=clock.device)
    terms = list(zip(shares(count), stored_NP, strict=True))
    copied, merged = clock.best(lambda: out_P.copy_(stored_NP[0]), lambda: kernel.merge(out_P, terms, dtype))
    moved = size * dtype.itemsize / 1e9
    return Merge(size, count, name, 2 * moved / copied, (count + 1) * moved / merged)


def release(device: torch.device) -> None:
    """Give freed memory back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def random_windows(count: int, window: int, vocabulary: int) -> Windows:
    """Windows of random tokens, each of two documents."""
    ids_WT = np.random.default_rng(0).integers(vocabulary, size=(count, window))
    positions_WT = np.tile(np.arange(window) % (window // 2), (count, 1))
    return Windows(ids_WT, positions_WT, positions_WT > 0)


def make_model(shape: dict, dtype: torch.dtype, device: torch.device) -> tuple[LlamaForCausalLM, Tensor]:
    """A random Llama whose parameters are views of one flat tensor, which comes with it."""
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=True, **shape)
    with torch.device("meta"):
        sizes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    live_P = random_weights(sum(shape.numel() for shape in sizes.values()), dtype, device)
    with torch.device(device):
        standard, _ = torch.get_default_dtype(), torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        torch.set_default_dtype(standard)
    start = 0
    for name, parameter in model.named_parameters():
        parameter.data = live_P[start : start + parameter.numel()].view(sizes[name])
        start += parameter.numel()
    return model, live_P


def trials(clock: Clock, most: float, window: int, rows: int) -> Iterator[Trial]:
    """Trials of all Llamas that fit."""
    name = "float32" if clock.device.type == "cpu" else "bfloat16"
    for size, shape in SHAPES.items():
        needed = (EXPERTS + 2) * size * DTYPES[name].itemsize
        if size <= most and needed <= free_bytes(clock.device) and clock.left > 60:
            yield trial_once(clock, shape, name, window, rows)
            release(clock.device)


def trial_once(clock: Clock, shape: dict, name: str, window: int, rows: int) -> Trial:
    """Merge and score, over merge and the model's own logits and loss."""
    dtype = DTYPES[name]
    model, live_P = make_model(shape, dtype, clock.device)
    stored_NP = [random_weights(len(live_P), dtype, clock.device) for _ in range(EXPERTS)]
    kernel, head = MergeKernel(clock.device), find_head(model)
    windows = prepare(random_windows(8 * rows, window, 32000), clock.device)
    terms = list(zip(shares(EXPERTS), stored_NP, strict=True))

    def bare() -> None:
        with torch.inference_mode():
            for first in range(0, 8 * rows, rows):
                part = slice(first, first + rows)
                ids_BT, positions_BT = windows.ids_WT[part], windows.positions_WT[part]
                logits_BTV = model(ids_BT, position_ids=positions_BT, use_cache=False).logits
                functional.cross_entropy(logits_BTV.flatten(0, 1).float(), windows.targets_WT[part].flatten())

    merge, scored, plain = clock.best(
        lambda: kernel.merge(live_P, terms, dtype),
        lambda: score(model, windows, rows * window, "packed", head=head),
        bare,
    )
    return Trial(len(live_P), EXPERTS, name, windows.ids_WT.numel(), 1e3 * merge, 1e3 * scored, 1e3 * plain)


def loads(clock: Clock, most: float) -> Iterator[Load]:
    """From files of up to a billion parameters to a worker's first score; the files are in the page cache."""
    size = max((size for size in SHAPES if size <= min(most, 1e9)), default=min(SHAPES))
    name = "float32" if clock.device.type == "cpu" else "bfloat16"
    if clock.left < 60:
        return
    with TemporaryDirectory() as folder:
        stored = []
        for part in range(3):
            model, _ = make_model(SHAPES[size], DTYPES[name], clock.device)
            model.cpu().save_pretrained(Path(folder) / str(part))
            stored.append(StoredModel(Path(folder) / str(part), content_hash(Path(folder) / str(part))))
        del model
        release(clock.device)
        corpus = Corpus(distribution="a", split="search", key="key", windows=random_windows(8, 256, 32000))
        spec = WorkerSpec(base=stored[0], fine_tunes=tuple(stored[1:]), corpora=(corpus,), dtype=name)
        composite = Composite.of(dict(zip((model.content for model in stored), shares(3), strict=True)))
        request = Request(ticket=0, composite=composite, corpora=("key",))
        began = perf_counter()
        worker = Worker(spec)
        loaded = perf_counter() - began
        worker.evaluate(request)
        first = perf_counter() - began
        merge = min(worker.evaluate(request).merge_seconds for _ in range(3))
        del worker
        release(clock.device)
        worker = Worker(replace(spec, streamed=tuple(model.content for model in stored[1:])))
        streamed = min(worker.evaluate(request).merge_seconds for _ in range(3))
        gigabytes = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / 1e9
    yield Load(int(size), 3, name, loaded, first, gigabytes, 1e3 * merge, 1e3 * streamed)


def show(title: str, rows: list, columns: dict[str, str]) -> None:
    """A table of dataclasses: attributes, and how each is written."""
    if not rows:
        print(f"\n{title}\nleft out: no time or memory for it")
        return
    print(f"\n{title}\n" + "  ".join(f"{column:>13}" for column in columns))
    for row in rows:
        print("  ".join(f"{format(getattr(row, column), how):>13}" for column, how in columns.items()))


def main() -> None:
    """Measure, print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--most", type=float, default=13e9, help="parameters")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4, help="windows in a forward call")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    silence_transformers()
    device = torch.device(arguments.device)
    clock = Clock(device, arguments.seconds)
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{card}, torch {torch.__version__}")
    timed = list(trials(clock, arguments.most, arguments.window, arguments.rows))
    show(
        "Trials, milliseconds; ratio: merge + score over merge + bare forward",
        timed,
        {"parameters": ",", "count": "", "dtype": "", "merge": ".1f", "score": ".1f", "bare": ".1f", "ratio": ".3f"},
    )
    loaded = list(loads(clock, arguments.most))
    show(
        "From files: seconds to load and to the first score, milliseconds of a merge, and of one with experts in files",
        loaded,
        {
            "parameters": ",",
            "count": "",
            "dtype": "",
            "gigabytes": ".1f",
            "load": ".2f",
            "first": ".2f",
            "merge": ".1f",
            "streamed": ".1f",
        },
    )
    merged = list(merges(clock, arguments.most))
    show(
        "Merges, GB/s read and written; ratio: merge over copy",
        merged,
        {"parameters": ",", "count": "", "dtype": "", "copy": ".0f", "merge": ".0f", "ratio": ".3f"},
    )
    results = {
        "device": card,
        "torch": torch.__version__,
        "seconds": arguments.seconds - clock.left,
        "trials": [asdict(measurement) | {"ratio": measurement.ratio} for measurement in timed],
        "loads": [asdict(measurement) for measurement in loaded],
        "merges": [asdict(measurement) | {"ratio": measurement.ratio} for measurement in merged],
    }
    print("\n" + json.dumps(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
