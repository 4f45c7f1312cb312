"""How fast a worker scores a study's windows, beside a bare forward pass and a matrix product; and what loading takes.

    python benchmarks/forward.py STUDY [--repeats 2]

In one process and one thread: the worker's load, its merge, its scoring of the search split at several batches, and in
turn transformers' own forward pass and loss over as many tokens at the same batches.  Floating-point operations are
counted as 2 for each parameter and token.  Seconds are of the processor, so other work on the machine disturbs them
less.  Memory is the process's, read from the kernel at each step; `check` predicts the last of these.
"""

import argparse
import resource
from collections.abc import Callable
from pathlib import Path
from time import process_time

import torch
from torch.nn import functional

from dem_opt.checkpoints.architecture import silence_transformers
from dem_opt.config import load
from dem_opt.evaluation.worker import Worker
from dem_opt.planning.inputs import load_inputs
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, Request, WorkerSpec

BATCHES = (256, 1024, 4096)
"""Tokens of a forward call."""


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of the processor."""
    began = process_time()
    work()
    return process_time() - began


def resident() -> tuple[float, float]:
    """Resident memory of this process now and at its peak, in GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def note(step: str, seconds: float) -> None:
    """Print a step with its seconds and the memory after it."""
    now, peak = resident()
    print(f"{step:45} {seconds:7.2f} s   resident {now:6.2f} GB   peak {peak:6.2f} GB", flush=True)


def product_rate(hidden: int, inner: int, rows: int = 1024) -> float:
    """Operations a second of a float32 matrix product of the model's widths."""
    left, right = torch.randn(rows, hidden), torch.randn(inner, hidden)
    return 20 * 2 * rows * hidden * inner / seconds_of(lambda: [left @ right.T for _ in range(20)])


@torch.inference_mode()
def bare(model: torch.nn.Module, ids_WT: torch.Tensor, batch_tokens: int) -> None:
    """Transformers' forward pass with all logits, and the loss, over all windows."""
    for ids_BT in ids_WT.split(max(batch_tokens // ids_WT.shape[1], 1)):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def scoring(spec: WorkerSpec, worker: Worker, batch_tokens: int) -> Callable[[], object]:
    """The worker's evaluation of the uniform average on the search split, at a batch."""
    contents = [model.content for model in spec.fine_tunes]
    share, rest = divmod(UNIT, len(contents))
    units = {content: share + (number < rest) for number, content in enumerate(contents)}
    corpora = tuple(corpus.key for corpus in spec.corpora if corpus.split == "search")
    request = Request(ticket=0, composite=Composite.of(units), corpora=corpora)

    def evaluate() -> object:
        worker._batch_tokens = batch_tokens
        return worker.evaluate(request)

    return evaluate


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    silence_transformers()
    torch.set_num_threads(1)
    note("libraries", process_time())
    spec = load_inputs(load(arguments.study), arguments.study).spec()
    note("study, hashes and windows", process_time())
    workers: list[Worker] = []
    note("worker: checkpoints, merged model, checks", seconds_of(lambda: workers.append(Worker(spec))))
    (worker,) = workers
    search = [corpus.windows for corpus in spec.corpora if corpus.split == "search"]
    ids_WT = torch.cat([torch.from_numpy(windows.ids_WT) for windows in search])
    parameters = sum(parameter.numel() for parameter in worker.model.parameters())
    operations = 2 * parameters * ids_WT.numel()
    note("first evaluation", seconds_of(scoring(spec, worker, spec.batch_tokens)))

    config = worker.model.config
    best: dict[tuple[str, int], float] = {}
    products: list[float] = []
    for _ in range(arguments.repeats):
        products.append(product_rate(config.hidden_size, config.intermediate_size))
        for batch in BATCHES:
            for name, work in (
                ("bare", lambda batch=batch: bare(worker.model, ids_WT, batch)),
                ("worker", scoring(spec, worker, batch)),
            ):
                best[name, batch] = min(best.get((name, batch), float("inf")), seconds_of(work))
    note("all of these", process_time())
    fastest = min(seconds for (name, _), seconds in best.items() if name == "bare")
    print(f"\n{parameters:,} parameters, {ids_WT.numel():,} tokens in windows of {ids_WT.shape[1]}; merge included")
    product, forward = max(products) / 1e9, operations / fastest / 1e9
    print(f"matrix product {product:.0f} GFLOP/s, best bare forward pass {forward:.0f} GFLOP/s")
    print("batch, tokens   bare, s   worker, s   worker's share of the best bare rate")
    for batch in BATCHES:
        plain, own = best["bare", batch], best["worker", batch]
        print(f"{batch:13,} {plain:9.2f} {own:11.2f} {fastest / own:12.2f}")


if __name__ == "__main__":
    main()
