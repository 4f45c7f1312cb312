"""The loop: ask, look up or score, record, tell, log."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from threading import Event
from time import sleep

from dem_opt.compute import Pool
from dem_opt.errors import EvaluationError
from dem_opt.evaluation.interim_analyses import replay
from dem_opt.evaluation.racing import CLEAR, Race
from dem_opt.progress import Progress
from dem_opt.search.optuna_study import Proposal, Search
from dem_opt.search.trials import attributes, race_for, trial_record
from dem_opt.signals import finishing
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.leases import Lease
from dem_opt.storage.ledger import Ledger
from dem_opt.tracking import SearchTracker
from dem_opt.types import SEARCH, Composite, Evaluation, Failure, Request, Score

PAUSE = 0.5
"""Seconds between two looks at the trials that other drivers have in hand."""


@dataclass(frozen=True)
class Flight:
    """A proposal under way: against which rival it races, and whether its gradient is measured."""

    proposal: Proposal
    race: Race | None
    gradient: bool


@dataclass(frozen=True)
class Driver:
    """One driver at work: the rooms it has opened, and the question they answer."""

    identity: StudyIdentity
    ledger: Ledger
    pool: Pool
    progress: Progress

    def optimize(self, search: Search, lookahead: int, tracker: SearchTracker, lease: Lease) -> None:
        """Ask, look up or score, record, tell, log, until the search ends.

        Trials that a dead driver left come first, under their own numbers.  What is written, in this order: the
        ledger, Optuna, the tracker; so a crash at any point loses no score and repeats none.  A score is recorded
        as it comes; trials are told in the order in which they were asked for, so what is proposed depends on the
        number of workers and never on which of them is faster.  While other drivers have trials in hand, it waits
        for them, since their end may leave room for more.  Raises KeyboardInterrupt where it was asked to stop, when
        what was being scored is written.
        """
        flying: deque[Flight] = deque()
        awaited = 0
        answers: dict[int, Evaluation | Failure] = {}
        with finishing(self._tell_stopping) as stop:
            while True:
                if stop.is_set():
                    withdrawn = self.pool.withdraw()
                    flying = deque(one for one in flying if one.proposal.number not in withdrawn)
                while not stop.is_set() and (flight := self._next_flight(search, lookahead, len(flying))):
                    flying.append(flight)
                    if request := self._request_of(flight):
                        self.pool.submit(request)
                    else:
                        answers[flight.proposal.number] = Evaluation(scores={})
                if flying:
                    self._collect(flying[0], answers, stop)
                    if answer := answers.pop(flying[0].proposal.number, None):
                        self._finish(flying.popleft(), answer, search, tracker)
                elif stop.is_set():
                    raise KeyboardInterrupt
                elif search.elsewhere:
                    awaited = self._await_others(search.elsewhere, awaited)
                else:
                    return
                lease.renew()

    def _tell_stopping(self) -> None:
        self.progress.note("stopping when what is being scored is written; once more to stop at once")

    def _next_flight(self, search: Search, lookahead: int, flying: int) -> Flight | None:
        """The next trial, where there is one, and room for it."""
        most = 1 if search.is_sequential else self.pool.capacity * (1 + lookahead)
        proposal = search.ask() if flying < most else None
        return None if proposal is None else self._plan(search, proposal, most)

    def _collect(self, oldest: Flight, answers: dict[int, Evaluation | Failure], stop: Event) -> None:
        """Record answers as they come, until that to the oldest trial has come, or a stop is newly asked for."""
        stopping = stop.is_set()
        while oldest.proposal.number not in answers and stop.is_set() == stopping:
            if done := self.pool.next_done():
                request, answer = done
                self._record(request, answer)
                answers[request.ticket] = answer

    def _await_others(self, trials: int, told: int) -> int:
        """Wait a moment for trials that other drivers have in hand; how many it told of."""
        if trials != told:
            self.progress.note(f"waiting for {trials} trials that other drivers have in hand")
        sleep(PAUSE)
        return trials

    def measure(self, composites: Iterable[Composite], split: str) -> None:
        """Score what the ledger lacks of these composites on a split.

        Raises EvaluationError where one can't be scored, and KeyboardInterrupt as `optimize` does.
        """
        requests = [self._request(ticket, one, split) for ticket, one in enumerate(dict.fromkeys(composites))]
        waiting = {request.ticket for request in requests if request is not None}
        for request in requests:
            if request is not None:
                self.pool.submit(request)
        with finishing(self._tell_stopping) as stop:
            while waiting:
                if stop.is_set():
                    waiting -= self.pool.withdraw()
                if waiting and (done := self.pool.next_done()):
                    request, answer = done
                    self._record(request, answer)
                    waiting.remove(request.ticket)
                    if isinstance(answer, Failure):
                        raise EvaluationError(f"{dict(request.composite.terms)} can't be scored: {answer.reason}")
            if stop.is_set():
                raise KeyboardInterrupt

    def score_afresh(self, composite: Composite, split: str) -> dict[str, Score]:
        """Scores of a composite by distribution, measured whatever the ledger has, and not recorded.

        Raises EvaluationError where it can't be scored.
        """
        self.pool.submit(Request(ticket=0, composite=composite, corpora=self.identity.keys(split)))
        while (done := self.pool.next_done()) is None:
            pass
        _, answer = done
        if isinstance(answer, Failure):
            raise EvaluationError(f"{dict(composite.terms)} can't be scored: {answer.reason}")
        return {name: answer.scores[key] for name, key in self.identity.corpora[split].items()}

    def _plan(self, search: Search, proposal: Proposal, most: int) -> Flight:
        """How a proposal is measured.

        It races against the trials that were told when it was proposed with `most` in flight: a driver that adopts it
        finds the same ones.  What completes a stopped trial does not race again.
        """
        race = None
        if search.races and not search.is_known(proposal.coefficients) and not proposal.charged:
            told, clear = search.whole(proposal.number - most + 1), CLEAR if search.completes else inf
            race = race_for(self.ledger, self.identity, proposal.coefficients, told, clear)
        return Flight(proposal, race, search.measures_gradient(proposal.coefficients))

    def _request_of(self, flight: Flight) -> Request | None:
        """What is to be asked of a worker for a trial; None where the ledger has all of it."""
        composite, keys = self.identity.composite(flight.proposal.coefficients), self.identity.keys(SEARCH)
        number, scoring = flight.proposal.number, self.identity.scoring
        if flight.gradient:
            known = self.ledger.gradients(composite, keys, self.identity.differentiation)
            fine_tunes = set(self.identity.fine_tunes.values())
            missing = tuple(key for key in keys if not fine_tunes <= known.get(key, {}).keys())
            return Request(ticket=number, composite=composite, corpora=missing, gradient=True) if missing else None
        if flight.race is None:
            return self._request(number, composite, SEARCH)
        seen = self.ledger.look_up(composite, keys, scoring)
        is_decided = replay(flight.race, seen, self.identity.sizes(SEARCH)) is not None
        return (
            None
            if is_decided
            else Request(ticket=number, composite=composite, corpora=keys, known=seen, race=flight.race)
        )

    def _request(self, ticket: int, composite: Composite, split: str) -> Request | None:
        """The scores that the ledger lacks of all windows; None where it has them all."""
        keys, windows = self.identity.keys(split), self.identity.windows(split)
        known = self.ledger.look_up(composite, keys, self.identity.scoring)
        missing = tuple(key for key in keys if key not in known or len(known[key].nats_W) < windows)
        return Request(ticket=ticket, composite=composite, corpora=missing, known=known) if missing else None

    def _record(self, request: Request, answer: Evaluation | Failure) -> None:
        if isinstance(answer, Evaluation):
            if answer.note:
                self.progress.warning(answer.note)
            seconds = answer.merge_seconds + answer.score_seconds
            self.ledger.record(
                request.composite,
                answer.scores,
                self.identity.scoring,
                answer.forward_tokens,
                seconds,
                answer.gradients,
                self.identity.differentiation,
            )

    def _finish(self, flight: Flight, answer: Evaluation | Failure, search: Search, tracker: SearchTracker) -> None:
        record = trial_record(
            self.ledger, self.identity, search.name, flight.proposal, answer, flight.race, flight.gradient
        )
        search.tell(record.number, record.penalized, attributes(record))
        tracker.trial_ended(record)
        self.progress.trial_finished(record, search.told, search.planned)
