"""The cost of a trial beside its merge and its forward pass, and how a study's own work grows with it.

    python benchmarks/trial.py [--marks 10,100,1000] [--only trials|growth]

Trials: random Llamas (the quickstart's shape, and one whose forward pass takes a second or more) go through a study
with `random`, its workers Ray actors of one thread, SQLite and MLflow behind it.  A trial's wall time is what its
worker spent and was idle before it; the same merge and the model's own logits and loss are timed before and after the
study, and in turn with a worker's evaluation in one process.  Growth: ask, tell, ledger and MLflow for workers that
answer at once, as trials add up.  Seconds of a busy machine say little, ratios within a run more.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

import numpy as np
import torch
import yaml
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from dem_opt.analysis.utilization import usage_of
from dem_opt.checkpoints.architecture import silence_transformers
from dem_opt.compute import SETTINGS, InProcessPool, RayCompute
from dem_opt.config import load
from dem_opt.evaluation.worker import Worker
from dem_opt.planning.inputs import load_inputs
from dem_opt.progress import NullProgress
from dem_opt.search.loop import Driver
from dem_opt.search.optuna_study import Search
from dem_opt.simplex import UNIT
from dem_opt.storage.engine import connect
from dem_opt.storage.leases import holding
from dem_opt.storage.ledger import Ledger
from dem_opt.study import Study
from dem_opt.tracking import NoPeers, SearchInfo
from dem_opt.tracking.mlflow_client import MlflowStore
from dem_opt.tracking.mlflow_runs import MlflowRuns
from dem_opt.types import Composite, Evaluation, Request, Score, TrialRecord, WorkerSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import worlds

NAMES = ("code", "math", "prose", "records")
SHAPES = {
    "quickstart": {"hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 3, "num_attention_heads": 4},
    "a second": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6, "num_attention_heads": 5},
}
WINDOWS = 16
"""Of 128 tokens, for each of four distributions."""

LAST = 20
"""So many trials up to a mark are timed."""


def make_study(folder: Path, shape: Mapping[str, int], trials: int, algorithm: str = "random") -> Path:
    """Random checkpoints, random texts, and a study of them."""
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=256, tie_word_embeddings=True, **shape)
    for seed, name in enumerate(("base", *NAMES)):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        worlds.tokenizer().save_pretrained(folder / name)
        worlds.write_documents(folder / f"{name}.jsonl", worlds.documents(seed, 400))
    study = {
        "name": "timed",
        "base": "base",
        "distributions": {name: {"checkpoint": name, "validation": f"{name}.jsonl"} for name in NAMES},
        "evaluation": {"window": 128, "windows": WINDOWS, "held_out": 8},
        "search": {"algorithm": algorithm, "trials": trials, "racing": False, "patience": None},
        "compute": {"workers": 1},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / "study.yaml"


class Bare:
    """The same merge and forward passes with nothing around them."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._worker = Worker(spec)
        self._model, self._merged_model = self._worker.model, self._worker.merged_model
        self._corpora = [self._worker._windows[corpus.key] for corpus in spec.corpora if corpus.split == "search"]
        contents = [model.content for model in (spec.base, *spec.fine_tunes)]
        self._request = Request(
            ticket=0,
            composite=Composite.of(dict.fromkeys(contents, UNIT // len(contents))),
            corpora=tuple(corpus.key for corpus in spec.corpora if corpus.split == "search"),
        )

    def evaluation_seconds(self) -> float:
        """Seconds of a worker's evaluation here."""
        began = perf_counter()
        self._worker.evaluate(self._request)
        return perf_counter() - began

    @torch.inference_mode()
    def seconds(self) -> float:
        """One merge, and the logits and loss of every window, as many in a call as a trial has."""
        began = perf_counter()
        self._merged_model.merge(self._request.composite)
        for windows in self._corpora:
            rows = max(len(windows.tokens_W) // 8, 1)
            for first in range(0, len(windows.tokens_W), rows):
                part = slice(first, first + rows)
                ids_BT, positions_BT = windows.ids_WT[part], windows.positions_WT[part]
                logits_BTV = self._model(ids_BT, position_ids=positions_BT, use_cache=False).logits
                functional.cross_entropy(logits_BTV.flatten(0, 1), windows.targets_WT[part].flatten())
        return perf_counter() - began


@dataclass
class Watch(NullProgress):
    """Progress that keeps records, and when they came."""

    records: list[TrialRecord]
    times: list[float]

    def trial_finished(self, record: TrialRecord, done: int, planned: int) -> None:
        """Keep it."""
        self.records.append(record)
        self.times.append(perf_counter())


def run_study(path: Path, workers: int) -> Watch:
    """A study from its first trial to its last, its workers of one thread each."""
    import ray

    os.environ.update(SETTINGS)
    ray.init(address="local", num_cpus=workers, include_dashboard=False, logging_level=logging.ERROR)
    written = yaml.safe_load(path.read_text()) | {"compute": {"workers": workers}, "output": f"runs/{workers}"}
    path.write_text(yaml.safe_dump(written, sort_keys=False))
    watch = Watch([], [])
    try:
        config = load(path)
        Study(config, path, compute=RayCompute(config.compute), progress=watch).run()
    finally:
        ray.shutdown()
    return watch


def walls(records: Sequence[TrialRecord]) -> list[float]:
    """Seconds of a worker for each trial from the second on, the idle ones before it included."""
    made = [record.evaluation for record in records[1:]]
    return [evaluation.merge_seconds + evaluation.score_seconds + evaluation.wait_seconds for evaluation in made]


def time_trials(name: str, trials: int, algorithm: str) -> dict[str, float | str]:
    """A trial over its merge and bare forward pass; utilisation; trials a minute of one worker and of two."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        path = make_study(Path(folder), SHAPES[name], trials, algorithm)
        bare = Bare(load_inputs(load(path), path).spec())
        bare.seconds()
        before, evaluated = zip(*((bare.seconds(), bare.evaluation_seconds()) for _ in range(6)), strict=True)
        single = run_study(path, 1)
        after = [bare.seconds() for _ in range(4)]
        double = run_study(path, 2)
    spent, plain = walls(single.records), [*before, *after]
    minutes = [60 * (len(watch.times) - 1) / (watch.times[-1] - watch.times[0]) for watch in (single, double)]
    return {
        "model": name,
        "bare ms": 1e3 * min(plain),
        "trial ms": 1e3 * min(spent),
        "evaluation over bare, in turn": min(evaluated) / min(before),
        "ratio of best": min(spent) / min(plain),
        "ratio of medians": median(spent) / median(plain),
        "above ms, best": 1e3 * (min(spent) - min(plain)),
        "above ms, median": 1e3 * (median(spent) - median(plain)),
        "ask ms, median": 1e3 * median(record.propose_seconds for record in single.records[1:]),
        "idle ms, median": 1e3 * median(record.evaluation.wait_seconds for record in single.records[1:]),
        "utilisation, 1": usage_of(single.records).utilisation or 0.0,
        "utilisation, 2": usage_of(double.records).utilisation or 0.0,
        "trials a minute, 1": minutes[0],
        "trials a minute, 2": minutes[1],
        "2 over 1": minutes[1] / minutes[0],
    }


class Instant:
    """Answers at once, with nats of the right number of windows."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._tokens = {corpus.key: corpus.windows.tokens_W for corpus in spec.corpora}
        self._rng = np.random.default_rng(0)

    def evaluate(self, request: Request) -> Evaluation:
        """Random nats, about 3.5 a token."""
        nats = {key: np.array(self._tokens[key]) * (3 + self._rng.random()) for key in request.corpora}
        return Evaluation(
            scores={key: Score(tuple(nats_W.tolist()), self._tokens[key]) for key, nats_W in nats.items()},
            forward_tokens=1,
        )


class Ended(Exception):
    """The last mark was reached."""


class InTurn:
    """A tracker that writes at once and not behind, and knows what that took; a clock of the whole loop."""

    def __init__(self, store: MlflowStore, search: SearchInfo, last: int) -> None:
        self._runs, self._last = MlflowRuns(store, search, NoPeers()), last
        self.rows: list[tuple[float, float, float, float]] = []
        self._began = perf_counter(), process_time()

    def trial_ended(self, record: TrialRecord) -> None:
        """Seconds of a trial: all of it, of the processor, of MLflow, of Optuna's ask."""
        before = perf_counter()
        self._runs.log(record)
        now = perf_counter(), process_time()
        whole, processor = (end - begin for end, begin in zip(now, self._began, strict=True))
        self.rows.append((whole, processor, now[0] - before, record.propose_seconds))
        self._began = now
        if len(self.rows) == self._last:
            raise Ended


def time_growth(marks: Sequence[int], algorithm: str) -> list[dict[str, float]]:
    """Milliseconds of a trial's own work, the median of the last trials before each mark."""
    with TemporaryDirectory() as folder:
        search = {"algorithm": algorithm, "trials": marks[-1] + 1, "racing": False, "patience": None}
        path = worlds.study(Path(folder), NAMES, search=search)
        config = load(path)
        sources = load_inputs(config, path)
        identity, pool = sources.identity(), InProcessPool(Instant, sources.spec())
        engine = connect(config.storage)
        searched = Search(config.storage, "growing", config.space, config.search)
        store = MlflowStore(uri=config.tracking.uri, experiment="e", artifacts=Path(folder) / "artifacts")
        info = SearchInfo(model="m", study="growing", uid=searched.uid, parameters={})
        driver = Driver(identity=identity, ledger=Ledger(engine), pool=pool, progress=NullProgress(), study="benchmark")
        tracker = InTurn(store, info, marks[-1])
        driver.measure([Composite.single(identity.base)], ["search"], "baselines")
        with holding(engine, "growing") as lease, suppress(Ended):
            driver.optimize(searched, 1, tracker, lease)
        engine.dispose()
    columns = ("whole", "processor", "MLflow", "ask")
    return [
        {"trial": mark}
        | {
            column: 1e3 * median(values)
            for column, values in zip(columns, zip(*tracker.rows[max(mark - LAST, 0) : mark], strict=True), strict=True)
        }
        for mark in marks
    ]


def show(title: str, rows: Iterable[Mapping[str, float | str]]) -> None:
    """Rows of like keys as a table."""
    print(f"\n{title}")
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )


def main() -> None:
    """Measure and print, JSON last."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--marks", default="10,100,1000")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--algorithm", default="random")
    parser.add_argument("--only", choices=("trials", "growth"))
    arguments = parser.parse_args()
    silence_transformers()
    results: dict[str, object] = {}
    if arguments.only != "growth":
        results["trials"] = [time_trials(name, arguments.trials, arguments.algorithm) for name in SHAPES]
        show("Trials", results["trials"])
    if arguments.only != "trials":
        results["growth"] = time_growth([int(mark) for mark in arguments.marks.split(",")], arguments.algorithm)
        show("A trial's own work, ms", results["growth"])
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
