"""A pool of workers as Ray actors: those that die or hang are replaced, and nodes that join get workers."""

import gc
import socket
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from dem_opt.compute.protocols import Build, Done, Evaluator, answer
from dem_opt.compute.ray_placement import Resources, share
from dem_opt.errors import InputError, OutageError
from dem_opt.progress import Progress
from dem_opt.types import Evaluation, Failure, Request, WorkerSpec

ATTEMPTS = 3
"""Attempts of a request, or of loading a worker, before the death of the worker counts as its failure."""

WAIT_SECONDS = 1.0
"""Time after which `next_done` returns without an answer."""

GROWTH_SECONDS = 5.0
"""Time between two checks for nodes that have joined."""

# A request hangs when it takes HANG_FACTOR times as long for each window as the slowest so far; requests shorter than
# HANG_SECONDS, and those before HANG_ANSWERS answers, which have nothing to be compared with, never hang.
HANG_FACTOR, HANG_SECONDS, HANG_ANSWERS = 10.0, 60.0, 3


class _Actor:
    """A worker in its own process.

    While torch and transformers are imported, with the arguments of `load`, no garbage is looked for in what they make.
    """

    def __init__(self) -> None:
        self._worker: Evaluator | None = None
        gc.disable()

    def load(self, build: Build, spec: WorkerSpec) -> int:
        """Build the worker, and return the number of CPU threads that torch uses here.

        Raises:
            InputError: A file is missing or has changed; names the node where there are several.
        """
        import torch

        gc.enable()
        try:
            self._worker = build(spec)
        except InputError as error:
            raise InputError(_on_this_node(error.where), error.field, error.value, error.mend) from None
        return torch.get_num_threads()

    def evaluate(self, request: Request) -> Evaluation | Failure:
        """Answer a request; other errors than EvaluationError are bugs, and raised."""
        assert self._worker is not None, "requests are sent after loading"
        return answer(self._worker, request)


@dataclass(frozen=True)
class _Sent:
    """A request that was sent to a worker."""

    reference: Any
    request: Request
    attempt: int


@dataclass(kw_only=True)
class _Member:
    """A worker of the pool.

    Attributes:
        actor: Its Ray actor.
        loading: Reference of its loading; None when it is ready.
        queue: Requests sent to it; it works on the first one.
        since: When it began with that one, by the monotonic clock.
        nodes: Ids of the nodes that were alive when it was started.
        deaths: Consecutive deaths of workers in this place while they loaded, but for those that lost their node.
    """

    actor: Any
    loading: Any
    nodes: frozenset[str]
    queue: deque[_Sent] = field(default_factory=deque)
    since: float = 0.0
    deaths: int = 0

    @property
    def pending(self) -> Any:
        """The reference that will be ready next; None if the worker is idle."""
        return self.loading or (self.queue[0].reference if self.queue else None)

    @property
    def oldest(self) -> int:
        """Ticket of the request it works on; below all tickets if it has none."""
        return self.queue[0].request.ticket if self.queue else -1


class RayPool:
    """Workers as Ray actors, on GPUs of their own or sharing CPUs (see `share`).

    A worker that dies, alone or with its node, or hangs is replaced, and its requests are sent again, each up to
    ATTEMPTS times.
    """

    def __init__(
        self, build: Build, spec: WorkerSpec, workers: int | None, patience: float, progress: Progress
    ) -> None:
        """Start workers and wait until they are ready.

        Args:
            build: Builds a worker in its actor.
            spec: What every worker holds.
            workers: Number of workers; None for as many as the cluster holds, also on nodes that join later.
            patience: Seconds to wait for workers, now and if all of them are lost later.
            progress: Receives loading, warnings and notes.

        Raises:
            InputError: Workers are not ready in time; names the resources that are missing.
        """
        ray = self._ray = import_ray()
        self._fixed_count, self._devices, self._patience, self._progress = workers, spec.devices, patience, progress
        self._build = (build, ray.put(spec))
        self._windows = {corpus.key: len(corpus.windows) for corpus in spec.corpora}
        self._waiting: deque[tuple[Request, int]] = deque()
        self._slowest, self._answered, self._refused = 0.0, 0, 0  # seconds a window; requests; workers
        self._ready_at = self._grown_at = monotonic()
        count, self._resources = share(alive_nodes(ray), workers, spec.devices)
        self._members = [self._recruit() for _ in range(count)]
        self.threads: list[int] = []
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> int:
        """Number of workers that are ready, at least 1."""
        return max(len(self._ready()), 1)

    def submit(self, request: Request) -> None:
        """Send a request to the worker with the shortest queue."""
        self._send(request, attempt=1)

    def next_done(self) -> Done | None:
        """Wait for the next answer of any worker, the oldest request first if several are ready.

        Raises:
            OutageError: No worker has been ready for `patience` seconds.
        """
        deadline = monotonic() + WAIT_SECONDS
        while (left := deadline - monotonic()) > 0:
            self._grow()
            pending = {member.pending: member for member in self._by_age() if member.pending is not None}
            references, _ = self._ray.wait(list(pending), num_returns=1, timeout=left)
            if not references:
                return self._end_hanging()
            member = pending[references[0]]
            if member.loading is not None:
                self._loaded(member)
            elif done := self._answer_of(member):
                return done
        return None

    def withdraw(self) -> set[int]:
        """Take back requests that wait for a worker or are queued behind another; a worker may still begin them."""
        withdrawn = {request.ticket for request, _ in self._waiting}
        self._waiting.clear()
        for member in self._members:
            withdrawn |= {sent.request.ticket for sent in list(member.queue)[1:]}
            member.queue = deque(list(member.queue)[:1])
        return withdrawn

    def close(self) -> None:
        """Kill the actors."""
        for member in self._members:
            self._ray.kill(member.actor)

    def _ready(self) -> list[_Member]:
        return [member for member in self._members if member.loading is None]

    def _by_age(self) -> list[_Member]:
        """Members that load, then the others, the oldest request first: `ray.wait` prefers the first references."""
        return sorted(self._members, key=lambda member: member.oldest)

    def _recruit(self) -> _Member:
        actor = self._ray.remote(_Actor).options(max_restarts=0, max_task_retries=0, **self._resources).remote()
        return _Member(actor=actor, loading=actor.load.remote(*self._build), nodes=node_ids(self._ray))

    def _send(self, request: Request, attempt: int) -> None:
        ready = self._ready()
        if not ready:
            self._waiting.append((request, attempt))
            return
        member = min(ready, key=lambda ready_member: len(ready_member.queue))
        if not member.queue:
            member.since = monotonic()
        member.queue.append(_Sent(member.actor.evaluate.remote(request), request, attempt))

    def _answer_of(self, member: _Member) -> Done | None:
        """A worker's answer; None if it died, and its request was sent to another."""
        sent = member.queue[0]
        try:
            evaluation: Evaluation | Failure = _get(self._ray, sent.reference)
        except self._ray.exceptions.RayActorError as error:
            counted = 0 if self._has_lost_its_node(member, error) else 1
            return self._lost(member, f"its worker died {ATTEMPTS} times: {first_line(error)}", counted)
        member.queue.popleft()
        now = monotonic()
        rate = (now - member.since) / self._work(sent.request)
        self._slowest, self._answered, member.since = max(self._slowest, rate), self._answered + 1, now
        return sent.request, evaluation

    def _lost(self, member: _Member, reason: str, counted: int = 1) -> Done | None:
        """Replace a worker and send its requests again; a Failure if the first one has used up its attempts.

        Args:
            member: The worker.
            reason: Reason of the failure.
            counted: 0 if this is no attempt of the request, since the node was lost.
        """
        sent = list(member.queue)
        self._progress.warning("a worker was lost while scoring; it is replaced, and its requests are scored again")
        self._replace(member)
        first, *others = sent
        if not (is_failure := first.attempt + counted > ATTEMPTS):
            self._send(first.request, first.attempt + counted)
        for queued in others:  # never begun, so their attempts do not count
            self._send(queued.request, queued.attempt)
        return (first.request, Failure(reason)) if is_failure else None

    def _replace(self, member: _Member, deaths: int = 0) -> None:
        self._ray.kill(member.actor)
        self._members[self._members.index(member)] = new = self._recruit()
        new.deaths = deaths

    def _loaded(self, member: _Member) -> None:
        """Take a worker that is ready into use, replace one that died while loading, or drop one that can't load.

        Raises:
            InputError, OutageError: It can't load, or died too often, and no other worker can do the work.
        """
        try:
            self.threads.append(_get(self._ray, member.loading))
        except self._ray.exceptions.RayActorError as error:
            deaths = member.deaths + (not self._has_lost_its_node(member, error))
            if deaths < ATTEMPTS:
                self._replace(member, deaths)
            else:
                died = f"a worker died {ATTEMPTS} times while loading: {first_line(error)}"
                self._refuse(member, OutageError(died))
            return
        except InputError as error:
            self._refuse(member, error)
            return
        member.loading, member.deaths = None, 0
        self._ready_at = monotonic()
        waiting, self._waiting = self._waiting, deque()
        for request, attempt in waiting:
            self._send(request, attempt)

    def _has_lost_its_node(self, member: _Member, error: Exception) -> bool:
        """True if a worker's node died, and not its process alone.

        Ray knows of a dead process at once.  A dead node it finds out after seconds: till then the worker is only
        unavailable, and others may be started there, which are reported dead when Ray knows.
        """
        is_unavailable = isinstance(error, self._ray.exceptions.ActorUnavailableError)
        return is_unavailable or not member.nodes <= node_ids(self._ray)

    def _refuse(self, member: _Member, error: Exception) -> None:
        """Continue without a worker; raise the error if no other one has proved to work."""
        if not self._answered or not self._ready():
            raise error from None
        self._progress.warning(f"a worker could not load and is left out: {error}")
        self._members.remove(member)
        self._refused += 1

    def _end_hanging(self) -> Done | None:
        """Replace workers that hang; a Failure if a request has used up its attempts.

        Raises:
            OutageError: No worker has been ready for `patience` seconds.
        """
        now = monotonic()
        for member in self._ready():
            if member.queue and now - member.since > (limit := self._limit(member.queue[0].request)):
                reason = f"it took more than {limit:.0f} s, {HANG_FACTOR:g} times the slowest before, {ATTEMPTS} times"
                if failure := self._lost(member, reason):
                    return failure
        if self._ready():
            self._ready_at = now
        elif now - self._ready_at > self._patience:
            raise OutageError(f"no worker has been ready for {self._patience:g} s; {self._lacking()}")
        return None

    def _limit(self, request: Request) -> float:
        """Seconds after which a request hangs."""
        if self._answered < HANG_ANSWERS:
            return float("inf")
        return max(HANG_SECONDS, HANG_FACTOR * self._slowest * self._work(request))

    def _work(self, request: Request) -> int:
        """Windows of a request at most; with a gradient three times as many (a backward pass is two forward passes)."""
        return sum(self._windows.get(key, 1) for key in request.corpora) * (3 if request.gradient else 1) or 1

    def _grow(self) -> None:
        """Start workers on nodes that have joined, unless their number is fixed."""
        if self._fixed_count is not None or monotonic() - self._grown_at < GROWTH_SECONDS:
            return
        self._grown_at, count = monotonic(), 0
        with suppress(InputError):
            count, _ = share(alive_nodes(self._ray), None, self._devices)
        for _ in range(count - self._refused - len(self._members)):
            self._progress.note("a node has joined; it gets a worker")
            self._members.append(self._recruit())

    def _wait_until_ready(self) -> None:
        deadline = monotonic() + self._patience
        with self._progress.phase("loading", len(self._members), "workers") as phase:
            while loading := [member for member in self._members if member.loading is not None]:
                references = {member.loading: member for member in loading}
                done, _ = self._ray.wait(list(references), num_returns=1, timeout=max(deadline - monotonic(), 0.0))
                if not done:
                    late = f"{len(loading)} of {len(self._members)} workers were not ready in this many seconds"
                    raise InputError(None, "compute.patience", self._patience, f"{late}; {self._lacking()}")
                member = references[done[0]]
                self._loaded(member)
                phase.advance(int(member.loading is None))

    def _lacking(self) -> str:
        return f"each needs {self._resources}, free now: {self._ray.available_resources()}"


def import_ray() -> Any:
    """Import ray on first use, untyped: its types do not describe what `ray.remote` returns."""
    import ray

    return ray


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]


def _get(ray: Any, reference: Any) -> Any:
    """The value of a Ray reference; an exception of the actor's code is raised as it was there."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def alive_nodes(ray: Any) -> list[Resources]:
    """Resources of the nodes that are alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def node_ids(ray: Any) -> frozenset[str]:
    """Ids of the nodes that are alive."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def _on_this_node(path: Path | str | None) -> Path | str | None:
    """Add this node's name to a path if the cluster has several nodes."""
    ray = import_ray()
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    if len(alive) < 2:
        return path
    node = alive[ray.get_runtime_context().get_node_id()]
    name = node.get("NodeName") or socket.gethostname()
    return f"{path or 'a file'} on node {name}"
