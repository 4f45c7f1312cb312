"""How fast a candidate is made: the merge against copy bandwidth, mergekit and a plain loop, and loading with its peak.

    python benchmarks/merge.py [--parameters 10 100 400] [--rounds 7] [--json FILE]

Everything is a ratio of two things that ran in turns in one process, best of several rounds, since machines are noisy:

- merge over copy: bytes a second of a merge (N reads and a write) over those of  out.copy_(x)  (a read and a write)
  for millions of parameters as memory allows, compiled and without a compiler;
- candidates a second, random Llamas of about 100 million parameters: a merge over a plain loop over
  state dicts, and over mergekit writing to disk and `from_pretrained` (where mergekit is installed: the extra `bench`);
- loading, in a process of its own: seconds to the first merge from files in the page cache, and the peak of memory
  (VmHWM, Linux) over the bytes that are stored and live.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dem_opt.checkpoints.architecture import empty_model, read_architecture, silence_transformers
from dem_opt.checkpoints.files import content_hash, read_header
from dem_opt.checkpoints.parameter_groups import parameter_groups
from dem_opt.merging.kernel import MergeKernel, merge_backend
from dem_opt.merging.merged_model import MergedModel
from dem_opt.planning.hardware import this_machine
from dem_opt.simplex import UNIT, Coefficients
from dem_opt.types import Composite, StoredModel

COUNTS = (2, 4, 8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LLAMA = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12, "num_attention_heads": 10}


def best(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least seconds of each, in turns; the first round is not counted."""
    seconds = dict.fromkeys(works, float("inf"))
    for number in range(rounds + 1):
        for name, work in works.items():
            began = perf_counter()
            work()
            seconds[name] = min(seconds[name], perf_counter() - began) if number else float("inf")
    return seconds


def equal_units(count: int) -> list[int]:
    """Units of 1e-9 that sum to one."""
    return [UNIT - UNIT // count * (count - 1)] + [UNIT // count] * (count - 1)


def bandwidths(millions: Sequence[int], rounds: int) -> list[dict[str, object]]:
    """Merge over copy for each size, number of terms and dtype that fits into half of the memory that is free."""
    measurements = []
    kernels = {"compiled": MergeKernel(), "plain": MergeKernel(compiled=False)}
    for parameters in (10**6 * million for million in millions):
        for name, dtype in DTYPES.items():
            fitting = [n for n in COUNTS if (n + 2) * parameters * dtype.itemsize < this_machine().available / 2]
            stored = [torch.randn(10**6).to(dtype).repeat(parameters // 10**6) for _ in range(max(fitting, default=0))]
            for count in fitting:
                measurements.append(
                    bandwidth(stored[:count], kernels, rounds) | {"parameters": parameters, "dtype": name}
                )
                print(
                    f"  {parameters / 1e6:6,.0f} million  {name:8}  N = {count}  " + shown(measurements[-1]), flush=True
                )
    return measurements


def bandwidth(stored: Sequence[Tensor], kernels: dict[str, MergeKernel], rounds: int) -> dict[str, object]:
    """One line of the table."""
    dtype, count = stored[0].dtype, len(stored)
    out_P, terms = torch.zeros_like(stored[0]), list(zip(equal_units(count), stored, strict=True))
    works: dict[str, Callable[[], object]] = {"copy": lambda: out_P.copy_(stored[0])}
    for name, kernel in kernels.items():
        works[name] = lambda kernel=kernel: kernel.merge(out_P, terms, dtype)
    seconds = best(works, rounds)
    copy = 2 * out_P.nbytes / seconds.pop("copy")
    ratios = {name: (count + 1) * out_P.nbytes / spent / copy for name, spent in seconds.items()}
    return {"terms": count, "copy_bytes_a_second": copy, "merge_over_copy": ratios}


def shown(line: dict[str, object]) -> str:
    """A line for people."""
    ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in line["merge_over_copy"].items())
    return f"copy {line['copy_bytes_a_second'] / 1e9:5.1f} GB/s   merge over copy: {ratios}"


def make_models(folder: Path, count: int, dtype: torch.dtype) -> list[Path]:
    """Random Llamas of about 100 million parameters."""
    folders = [folder / f"model{number}" for number in range(count)]
    for seed, path in enumerate(folders):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(vocab_size=32000, **LLAMA)).to(dtype).save_pretrained(path)
    return folders


def candidates(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds to have a composite of base and three experts in memory, ready to be called."""
    folders = make_models(folder, 4, torch.float32)
    stored = [StoredModel(path, content_hash(path)) for path in folders]
    units = equal_units(4)
    merged_model = MergedModel(empty_model(folders[0], torch.float32), stored)
    composite = Composite.of({model.content: count for model, count in zip(stored, units, strict=True)})
    plain = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    states = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict() for path in folders]
    weights = [count / UNIT for count in units]

    def loop() -> None:
        merged = {name: sum(w * state[name] for w, state in zip(weights, states, strict=True)) for name in states[0]}
        plain.load_state_dict(merged)

    grouped = by_block(folders[0], stored)
    works = {"merged model": lambda: merged_model.merge(composite), "by block": lambda: merged_model.merge(grouped)}
    seconds = best(works | {"state dicts": loop}, rounds)
    if find_spec("mergekit") is not None:
        seconds |= best({"mergekit": lambda: by_mergekit(folder, folders, weights)}, 2)
    return seconds


def by_block(base: Path, stored: Sequence[StoredModel]) -> Composite:
    """A composite whose blocks of layers have coefficients of their own, no two alike."""
    grouping = parameter_groups("blocks", read_architecture(read_header(base, "base")))
    assert grouping is not None
    fine_tunes = {model.content: model.content for model in stored[1:]}
    names = sorted(fine_tunes)
    rows = {}
    for place, group in enumerate(grouping.names):
        units = [UNIT // 2 - 10**6 * place, UNIT // 4 + 10**6 * place, UNIT // 8]
        rows[group] = Coefficients(tuple(zip(names, units, strict=True)))
    return Composite.grouped(stored[0].content, fine_tunes, grouping, rows)


def by_mergekit(folder: Path, folders: Sequence[Path], weights: Sequence[float]) -> None:
    """The steps of mergekit-evolve for a candidate without vLLM's in-memory merge: write it, load it."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    models = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in zip(folders, weights, strict=True)
    ]
    recipe = yaml.safe_dump(
        {"merge_method": "linear", "parameters": {"normalize": False}, "models": models, "dtype": "float32"}
    )
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe))
    run_merge(config, str(folder / "merged"), MergeOptions(write_model_card=False, copy_tokenizer=False, quiet=True))
    AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) * 1024


def measure_loading(folders: Sequence[Path]) -> dict[str, float]:
    """In a process of its own: from files to the first composite."""
    stored = [StoredModel(path, content_hash(path)) for path in folders]
    MergeKernel()
    model = empty_model(folders[0], torch.float32)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = status("VmRSS"), perf_counter()
    merged_model = MergedModel(model, stored)
    loaded = perf_counter() - began
    merged_model.merge(
        Composite.of({model.content: count for model, count in zip(stored, equal_units(len(stored)), strict=True)})
    )
    merged = perf_counter() - began
    return {
        "bytes": merged_model.nbytes,
        "load_seconds": loaded,
        "first_merge_seconds": merged - loaded,
        "peak_over_bytes": (status("VmHWM") - before) / merged_model.nbytes,
    }


def loading(folder: Path, dtype: str) -> dict[str, float]:
    """Loading of four checkpoints, measured; their files are read once before, so that they are in the page cache."""
    folders = make_models(folder, 4, DTYPES[dtype])
    for folder in folders:
        content_hash(folder)
    command = [sys.executable, __file__, "--measure", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    """Measure, or be measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=int, nargs="+", default=[10, 100, 400], metavar="MILLIONS")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, nargs="+", help=argparse.SUPPRESS)
    silence_transformers()
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_loading(arguments.measure)))
        return
    backend = merge_backend("cpu")
    print(f"{torch.get_num_threads()} threads; {backend.description}, {backend.seconds:.1f} s in this process")
    results: dict[str, object] = {"kernel": backend.description, "kernel_seconds": backend.seconds}
    results["merge_over_copy"] = bandwidths(arguments.parameters, arguments.rounds)
    with TemporaryDirectory() as folder:
        results["candidate_seconds"] = spent = candidates(Path(folder), arguments.rounds)
    print("a candidate of 100 million parameters from four checkpoints in float32")
    for name, seconds in spent.items():
        print(f"  {name:12} {seconds * 1e3:8.1f} ms   {seconds / spent['merged model']:6.1f} times the merged model's")
    if "mergekit" not in spent:
        print("  mergekit is not installed (the extra `bench`): skipped")
    for dtype in DTYPES:
        with TemporaryDirectory() as folder:
            results[f"loading_{dtype}"] = loaded = loading(Path(folder), dtype)
        print(
            f"four checkpoints in {dtype}, live in float32: {loaded['bytes'] / 1e9:.2f} GB loaded in "
            f"{loaded['load_seconds']:.2f} s, first merge {loaded['first_merge_seconds'] * 1e3:.0f} ms, "
            f"peak {loaded['peak_over_bytes']:.3f} of these bytes"
        )
    print(json.dumps(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
