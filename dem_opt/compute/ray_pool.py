"""Workers as Ray actors that come and go: those that die or hang are replaced, those that join are used."""

import socket
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from dem_opt.compute.placement import Resources, share
from dem_opt.compute.protocols import Build, Done, Evaluator, answer
from dem_opt.errors import InputError, OutageError
from dem_opt.progress import Progress
from dem_opt.types import Evaluation, Failure, Request, WorkerSpec

ATTEMPTS = 3
"""How often a request is sent out before the death of its worker counts as its failure."""

MOMENT = 1.0
"""Seconds after which `next_done` returns without an answer."""

GROWTH = 5.0
"""Seconds between two looks for nodes that have joined."""

HANGS_AFTER, HANGS_AT_LEAST, HANGS_FROM = 10.0, 60.0, 3
"""A request hangs when it takes so many times as long for each window as the slowest before, but never within so many
seconds, nor before so many have been answered."""


class _Actor:
    """One worker in a process of its own."""

    def __init__(self) -> None:
        self._worker: Evaluator | None = None

    def load(self, build: Build, spec: WorkerSpec) -> int:
        """Load; the number of CPU threads that torch uses here.

        Raises InputError for files that are not what they should be, with the node's name where there are several.
        """
        import torch

        try:
            self._worker = build(spec)
        except InputError as error:
            raise InputError(_on_this_node(error.where), error.field, error.value, error.mend) from None
        return torch.get_num_threads()

    def evaluate(self, request: Request) -> Evaluation | Failure:
        """An answer.  Bugs are exceptions."""
        assert self._worker is not None, "a worker is asked when it has loaded"
        return answer(self._worker, request)


@dataclass(frozen=True)
class _Sent:
    """A request on its way."""

    reference: Any
    request: Request
    attempt: int


@dataclass
class _Member:
    """A worker.

    loading  the reference of its loading, None when it is ready
    queue    what it was sent; it works on the first
    since    when it began with that
    deaths   how often its place was left in loading, one time after the other
    """

    actor: Any
    loading: Any
    queue: deque[_Sent] = field(default_factory=deque)
    since: float = 0.0
    deaths: int = 0

    @property
    def pending(self) -> Any:
        """The reference that comes next; None for one that has nothing to do."""
        return self.loading or (self.queue[0].reference if self.queue else None)


class RayPool:
    """Workers as Ray actors, on GPUs of their own, or on CPUs (`share`).

    One that dies, with its node or alone, or that hangs, is replaced, and what it had is sent out again, up to
    ATTEMPTS times each.  Without a number of workers, nodes that join get some too.  Raises InputError where
    workers are not ready within `patience` seconds, and says what is missing.
    """

    def __init__(
        self, build: Build, spec: WorkerSpec, workers: int | None, patience: float, progress: Progress
    ) -> None:
        ray = self._ray = import_ray()
        self._asked, self._devices, self._patience, self._progress = workers, spec.devices, patience, progress
        self._content = (build, ray.put(spec))
        self._windows = {corpus.key: len(corpus.windows) for corpus in spec.corpora}
        self._waiting: deque[tuple[Request, int]] = deque()
        self._slowest, self._answered, self._refused = 0.0, 0, 0
        self._ready_at = self._grown_at = monotonic()
        count, self._resources = share(_nodes(ray), workers, spec.devices)
        self._members = [self._recruit() for _ in range(count)]
        self.threads: list[int] = []
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> int:
        """The number of workers that are ready."""
        return max(len(self._ready()), 1)

    def submit(self, request: Request) -> None:
        """Send a request to the worker that has the fewest."""
        self._send(request, attempt=1)

    def next_done(self) -> Done | None:
        """The next answer of any worker, the oldest request first where several are ready.

        Raises OutageError where no worker has been ready for `patience` seconds.
        """
        deadline = monotonic() + MOMENT
        while (left := deadline - monotonic()) > 0:
            self._grow()
            pending = {member.pending: member for member in self._by_age() if member.pending is not None}
            done, _ = self._ray.wait(list(pending), num_returns=1, timeout=left)
            if not done:
                return self._end_hanging()
            member = pending[done[0]]
            if member.loading is not None:
                self._loaded(member)
            elif found := self._answer_of(member):
                return found
        return None

    def withdraw(self) -> set[int]:
        """Take back what waits, and what is queued behind another request; a worker may still begin with it."""
        withdrawn = {request.ticket for request, _ in self._waiting}
        self._waiting.clear()
        for member in self._members:
            withdrawn |= {sent.request.ticket for sent in list(member.queue)[1:]}
            member.queue = deque(list(member.queue)[:1])
        return withdrawn

    def close(self) -> None:
        """End the actors."""
        for member in self._members:
            self._ray.kill(member.actor)

    def _ready(self) -> list[_Member]:
        return [member for member in self._members if member.loading is None]

    def _by_age(self) -> list[_Member]:
        """Those that load, then the others, the oldest request first."""
        return sorted(self._members, key=lambda one: one.queue[0].request.ticket if one.queue else -1)

    def _recruit(self) -> _Member:
        actor = self._ray.remote(_Actor).options(max_restarts=0, max_task_retries=0, **self._resources).remote()
        return _Member(actor, actor.load.remote(*self._content))

    def _send(self, request: Request, attempt: int) -> None:
        ready = self._ready()
        if not ready:
            self._waiting.append((request, attempt))
            return
        member = min(ready, key=lambda one: len(one.queue))
        if not member.queue:
            member.since = monotonic()
        member.queue.append(_Sent(member.actor.evaluate.remote(request), request, attempt))

    def _answer_of(self, member: _Member) -> Done | None:
        """What a worker has answered; None where it died and its request was sent to another."""
        sent = member.queue[0]
        try:
            found: Evaluation | Failure = _get(self._ray, sent.reference)
        except self._ray.exceptions.RayActorError as error:
            return self._lost(member, f"its worker died {ATTEMPTS} times: {first_line(error)}")
        member.queue.popleft()
        now = monotonic()
        rate = (now - member.since) / self._work(sent.request)
        self._slowest, self._answered, member.since = max(self._slowest, rate), self._answered + 1, now
        return sent.request, found

    def _lost(self, member: _Member, reason: str) -> Done | None:
        """Replace a worker; what it had is sent again.  The answer, where its request was sent often enough."""
        sent = list(member.queue)
        self._progress.warning("a worker was lost while it scored; it is replaced, and what it had is scored again")
        self._replace(member)
        first, *others = sent
        if not (is_failure := first.attempt == ATTEMPTS):
            self._send(first.request, first.attempt + 1)
        for one in others:
            self._send(one.request, one.attempt)
        return (first.request, Failure(reason)) if is_failure else None

    def _replace(self, member: _Member) -> None:
        self._ray.kill(member.actor)
        deaths = member.deaths + (member.loading is not None)
        self._members[self._members.index(member)] = new = self._recruit()
        new.deaths = deaths

    def _loaded(self, member: _Member) -> None:
        """A worker is ready, or it died before, or it was refused.

        Raises InputError for one that is refused and OutageError for one that died too often, while none has worked
        yet or none is left; else the others go on without it.
        """
        try:
            self.threads.append(_get(self._ray, member.loading))
        except self._ray.exceptions.RayActorError as error:
            if member.deaths + 1 < ATTEMPTS:
                self._replace(member)
            else:
                died = f"a worker died {ATTEMPTS} times while it loaded: {first_line(error)}"
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

    def _refuse(self, member: _Member, error: Exception) -> None:
        """Go on without a worker; raises the error where that can't be."""
        if not self._answered or not self._ready():
            raise error from None
        self._progress.warning(f"a worker is refused: {error}")
        self._members.remove(member)
        self._refused += 1

    def _end_hanging(self) -> Done | None:
        """End the workers that hang; an answer, where a request has hung often enough.

        Raises OutageError where nobody has been ready for too long.
        """
        now = monotonic()
        for member in self._ready():
            if member.queue and now - member.since > (limit := self._limit(member.queue[0].request)):
                reason = f"it took more than {limit:.0f} s, {HANGS_AFTER:g} times the slowest before, {ATTEMPTS} times"
                if found := self._lost(member, reason):
                    return found
        if self._ready():
            self._ready_at = now
        elif now - self._ready_at > self._patience:
            raise OutageError(f"no worker has been ready for {self._patience:g} s; {self._lacking()}")
        return None

    def _limit(self, request: Request) -> float:
        """Seconds that a request may take."""
        if self._answered < HANGS_FROM:
            return float("inf")
        return max(HANGS_AT_LEAST, HANGS_AFTER * self._slowest * self._work(request))

    def _work(self, request: Request) -> int:
        """How many windows a request asks for at most; a gradient costs three times as much."""
        return sum(self._windows.get(key, 1) for key in request.corpora) * (3 if request.gradient else 1) or 1

    def _grow(self) -> None:
        """Recruit for nodes that have joined, where the number of workers is not given."""
        if self._asked is not None or monotonic() - self._grown_at < GROWTH:
            return
        self._grown_at, count = monotonic(), 0
        with suppress(InputError):
            count, _ = share(_nodes(self._ray), None, self._devices)
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
    """Ray, whose own types don't know what its decorators make."""
    import ray

    return ray


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0]


def _get(ray: Any, reference: Any) -> Any:
    """The value of a Ray reference; an exception of our own code comes out as it was raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _nodes(ray: Any) -> list[Resources]:
    """The resources of the nodes that are alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _on_this_node(where: object) -> object:
    """A place, with the node's name where the cluster has several."""
    ray = import_ray()
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    if len(alive) < 2:
        return where
    node = alive[ray.get_runtime_context().get_node_id()]
    name = node.get("NodeName") or socket.gethostname()
    return f"{where or 'a file'} on node {name}"
