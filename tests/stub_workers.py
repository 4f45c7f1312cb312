"""Cheap stand-ins for workers, importable by Ray's workers: what a pool does is not about models."""

import os
from math import nan
from pathlib import Path
from time import sleep

from dem_opt.errors import InputError
from dem_opt.types import Evaluation, Request, Score, WorkerSpec


class Echo:
    """Answers with a score made of the ticket; some tickets fail."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.batch_tokens = spec.batch_tokens

    def evaluate(self, request: Request) -> Evaluation:
        nats = nan if request.ticket % 7 == 5 else float(request.ticket)
        return Evaluation(
            scores={key: Score((nats,), (1,)) for key in request.corpora}, forward_tokens=self.batch_tokens
        )


class Mortal(Echo):
    """Dies in the middle of ticket 3, once: the file in the spec's path tells that it has."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self.grave = Path(spec.base.path)

    def evaluate(self, request: Request) -> Evaluation:
        if request.ticket == 3 and not self.grave.exists():
            self.grave.write_text("died here")
            os._exit(1)
        return super().evaluate(request)


class Doomed(Echo):
    """Dies whenever it is asked for ticket 3."""

    def evaluate(self, request: Request) -> Evaluation:
        if request.ticket == 3:
            os._exit(1)
        return super().evaluate(request)


class Stuck(Echo):
    """Sleeps for ever at ticket 4, once: the file in the spec's path tells that it has."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self.mark = Path(spec.base.path)

    def evaluate(self, request: Request) -> Evaluation:
        if request.ticket == 4 and not self.mark.exists():
            self.mark.write_text("fell asleep here")
            sleep(10**6)
        return super().evaluate(request)


class Fragile(Echo):
    """Can't be loaded where its node says so."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        if "DEM_OPT_TEST_FRAGILE" in os.environ:
            raise InputError(spec.base.path, None, None, "its weights differ")


class Stillborn(Echo):
    """Dies while it loads, as often as the file "deaths" in the spec's folder says, and leaves a file each time."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        folder = Path(spec.base.path)
        if len(list(folder.iterdir())) <= int((folder / "deaths").read_text()):
            (folder / str(os.getpid())).touch()
            os._exit(1)


class Slow(Echo):
    """Tells on which node it loads by a file in the spec's folder, and waits there for a file "ready"."""

    def __init__(self, spec: WorkerSpec) -> None:
        import ray

        super().__init__(spec)
        (spec.base.path / ray.get_runtime_context().get_node_id()).touch()
        while not (spec.base.path / "ready").exists():
            sleep(0.1)


class Broken(Echo):
    """Has a bug."""

    def evaluate(self, request: Request) -> Evaluation:
        raise ZeroDivisionError("a bug")


def refuse(spec: WorkerSpec) -> Echo:
    raise InputError(spec.base.path, "base", None, "is no model")


def threads(spec: WorkerSpec) -> "Threads":
    return Threads(spec)


class Threads(Echo):
    """Tells how many threads torch has where it lives."""

    def evaluate(self, request: Request) -> Evaluation:
        import torch

        return Evaluation(scores={key: Score((float(torch.get_num_threads()),), (1,)) for key in request.corpora})


def double(job: int) -> int:
    if job == 13:
        raise InputError(None, "job", job, "unlucky")
    return 2 * job


def die(job: int) -> int:
    if job == 13:
        os._exit(1)
    return job


def count_threads(job: int) -> int:
    import torch

    return torch.get_num_threads()
