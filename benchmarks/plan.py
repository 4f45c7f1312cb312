"""How true the plan is: predicted against measured peak memory and seconds of a real worker, and the time of a check.

    python benchmarks/plan.py [--vocabulary 32000] [--stored float32] [--fine-tunes 2] [--window 512] [--windows 8]

Makes a random Llama of about a hundred million parameters and its fine-tunes in a temporary folder, loads them into a
worker in a process of its own, and scores three composites there.  Peak memory is VmHWM of that process minus its RSS
before anything is loaded (Linux), of loading and of scoring apart; on a GPU it is what the allocator reserved.  Then a
check of a study of six sharded checkpoints of 13 billion parameters, in sparse files.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from dem_opt.checkpoints.files import content_hash
from dem_opt.config import StudyConfig, load
from dem_opt.evaluation.worker import Worker
from dem_opt.planning.hardware import probe
from dem_opt.planning.inputs import CheckedHeaders, check_headers
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, Corpus, Request, StoredModel, Windows, WorkerSpec
from dem_opt.workflows.check import check

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import worlds

SMALL = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12, "num_attention_heads": 10}
DTYPES = ("float32", "bfloat16")


def make_study(folder: Path, names: list[str], **evaluation: object) -> Path:
    """A study file of these fine-tunes, beside their folders."""
    (folder / "texts.jsonl").write_text('{"text": "not read by the plan"}\n')
    distributions = {name: {"checkpoint": name, "validation": "texts.jsonl"} for name in names}
    study = {"name": "planned", "base": "base", "distributions": distributions, "evaluation": evaluation}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder / "study.yaml"


def make_small(folder: Path, names: list[str], vocabulary: int, stored: str) -> None:
    """Random models of about 100 million parameters."""
    for seed, name in enumerate(["base", *names]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **SMALL)).to(getattr(torch, stored))
        model.save_pretrained(folder / name)


def random_windows(count: int, window: int, vocabulary: int) -> Windows:
    """Windows of random tokens, each of two documents."""
    ids_WT = np.random.default_rng(0).integers(vocabulary, size=(count, window))
    positions_WT = np.tile(np.arange(window) % (window // 2), (count, 1))
    return Windows(ids_WT, positions_WT, positions_WT > 0)


def spec_of(files: CheckedHeaders, config: StudyConfig) -> WorkerSpec:
    """The contents of a worker of this study, over random texts."""
    plan, evaluation = files.plan(), config.evaluation
    models = [StoredModel(header.folder, content_hash(header.folder)) for header in files.headers.values()]
    counts = {"search": evaluation.windows, "held_out": evaluation.held_out}
    corpora = tuple(
        Corpus(
            distribution=name,
            split=split,
            key=f"{name}/{split}",
            windows=random_windows(count, evaluation.window, plan.widths.vocabulary),
        )
        for name in config.distributions
        for split, count in counts.items()
    )
    return WorkerSpec(
        base=models[0],
        fine_tunes=tuple(models[1:]),
        corpora=corpora,
        dtype=plan.calls.dtype,
        batch_tokens=plan.calls.batch_tokens,
    )


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) * 1024


def measure(study: Path) -> dict[str, float]:
    """In a process of its own: load a worker, score three composites."""
    config = load(study)
    spec = spec_of(check_headers(config, study), config)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = status("VmRSS"), perf_counter()
    worker = Worker(spec)
    loaded, after_loading = perf_counter() - began, status("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")
    contents = [spec.base.content, *(expert.content for expert in spec.fine_tunes)]
    share = UNIT // len(contents)
    units = dict.fromkeys(contents, share) | {contents[0]: UNIT - share * (len(contents) - 1)}
    keys = tuple(corpus.key for corpus in spec.corpora if corpus.split == "search")
    seconds = []
    for ticket in range(3):
        answer = worker.evaluate(Request(ticket=ticket, composite=Composite.of(units), corpora=keys))
        seconds.append(answer.merge_seconds + answer.score_seconds)
    cuda = torch.cuda.is_available()
    return {
        "before": before,
        "peak_of_loading": after_loading - before,
        "peak": torch.cuda.max_memory_reserved() if cuda else status("VmHWM") - before,
        "allocated": torch.cuda.max_memory_allocated() if cuda else 0,
        "loading_seconds": loaded,
        "evaluation_seconds": float(np.median(seconds)),
        "merge_seconds": answer.merge_seconds,
        "forward_tokens": answer.forward_tokens,
    }


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Print prediction, measurement and their ratio."""
    names = [f"tune{number}" for number in range(1, options.fine_tunes + 1)]
    make_small(folder, names, options.vocabulary, options.stored)
    study = make_study(folder, names, window=options.window, windows=options.windows, held_out=options.windows)
    checked = check_headers(load(study), study)
    plan = checked.plan()
    memory, work, dtype = plan.memory, plan.work, plan.calls.dtype
    speed = probe(plan.machine.device, dtype, plan.widths.hidden, plan.widths.intermediate)
    evaluation = replace(work, composites=1, reported=0)
    command = [sys.executable, __file__, "--measure", str(study)]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    parameters = sum(int(np.prod(shape)) for shape in checked.architecture.parameters.values())
    print(f"{parameters:,} parameters, {plan.checkpoints} checkpoints in {options.stored}, evaluated in {dtype}")
    parts = ("stored", "live", "scratch", "windows", "activations")
    print("predicted, MB:", {part: round(getattr(memory, part) / 1e6, 1) for part in parts})
    print(f"process before loading, MB: {measured['before'] / 1e6:.0f}, the plan's constant {memory.process / 1e6:.0f}")
    print_ratio("peak MB", (memory.peak - memory.process) / 1e6, measured["peak"] / 1e6)
    print(f"peak MB of loading, in which mapped files count: {measured['peak_of_loading'] / 1e6:,.1f}")
    print_ratio("seconds of an evaluation", evaluation.seconds(speed), measured["evaluation_seconds"])
    print_ratio("tokens of an evaluation", work.trial_tokens, measured["forward_tokens"])
    print(f"speed: {speed.flops / 1e9:.1f} GFLOP/s, {speed.bandwidth / 1e9:.1f} GB/s; measured: {measured}")


def print_ratio(quantity: str, predicted: float, measured: float) -> None:
    """Print one comparison."""
    print(f"{quantity}: predicted {predicted:,.1f}, measured {measured:,.1f}, ratio {predicted / measured:.3f}")


def time_check(folder: Path) -> None:
    """Print what a check of six checkpoints of 13 billion parameters takes beyond imports."""
    names = [f"tune{number}" for number in range(1, 6)]
    for name in ["base", *names]:
        worlds.save_sparse(folder / name)
    study = make_study(folder, names)
    began = perf_counter()
    report = check(load(study), study)
    spent = perf_counter() - began
    print(f"check of {len(report.checkpoints)} x {report.checkpoints[0].bytes / 1e9:.1f} GB: {spent:.2f} s")


def main() -> None:
    """Measure, or be measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--stored", choices=DTYPES, default="float32")
    parser.add_argument("--fine-tunes", type=int, default=2)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    with TemporaryDirectory() as folder:
        compare(arguments, Path(folder))
    with TemporaryDirectory() as folder:
        time_check(Path(folder))


if __name__ == "__main__":
    main()
