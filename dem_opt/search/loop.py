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
from dem_opt.search.optuna_study import PendingTrial, Search
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
class Assignment:
    """A pending trial with the way to measure it: the race that may stop it, and whether its gradient is needed."""

    trial: PendingTrial
    race: Race | None
    gradient: bool

    @property
    def number(self) -> int:
        """Number of the trial, and ticket of its request."""
        return self.trial.number


@dataclass(frozen=True, kw_only=True)
class Driver:
    """A process that drives a study: it proposes, and writes down what workers answer.

    Attributes:
        identity: The study's models, corpora and objective.
        ledger: Scores of all studies in the database.
        pool: Workers.
        progress: Where events are reported.
    """

    identity: StudyIdentity
    ledger: Ledger
    pool: Pool
    progress: Progress

    def optimize(self, search: Search, lookahead: int, tracker: SearchTracker, lease: Lease) -> None:
        """Ask, look up or score, record, tell, log, until the search ends.

        Trials that a dead driver left come first, under their own numbers.  The order of writing is the ledger, Optuna,
        the tracker; so a crash at any point loses no score and repeats none.  A score is recorded as it comes; trials
        are told in the order in which they were asked for, so proposals depend on the number of workers and never on
        which of them is faster.  While other drivers have trials in hand, this one waits for them, since their end may
        leave room for more.

        Raises:
            KeyboardInterrupt: Where a stop was requested, when the scores under way are written.
        """
        in_flight: deque[Assignment] = deque()
        answers: dict[int, Evaluation | Failure] = {}
        awaited = 0
        with finishing(self._announce_stop) as stop:
            while True:
                if stop.is_set():
                    withdrawn = self.pool.withdraw()
                    in_flight = deque(assignment for assignment in in_flight if assignment.number not in withdrawn)
                while not stop.is_set() and (assignment := self._next(search, lookahead, len(in_flight))):
                    in_flight.append(assignment)
                    if request := self._request_of(assignment):
                        self.pool.submit(request)
                    else:
                        answers[assignment.number] = Evaluation(scores={})
                if in_flight:
                    self._collect(in_flight[0], answers, stop)
                    if answer := answers.pop(in_flight[0].number, None):
                        self._finish(in_flight.popleft(), answer, search, tracker)
                elif stop.is_set():
                    raise KeyboardInterrupt
                elif search.elsewhere:
                    awaited = self._await_others(search.elsewhere, awaited)
                else:
                    return
                lease.renew()

    def _announce_stop(self) -> None:
        self.progress.note("stopping when what is being scored is written; once more to stop at once")

    def _next(self, search: Search, lookahead: int, in_flight: int) -> Assignment | None:
        """The next trial, where there is one, and room for it."""
        most = 1 if search.is_sequential else self.pool.capacity * (1 + lookahead)
        trial = search.ask() if in_flight < most else None
        return None if trial is None else self._assign(search, trial, most)

    def _collect(self, oldest: Assignment, answers: dict[int, Evaluation | Failure], stop: Event) -> None:
        """Record answers as they come, until the oldest trial's has come, or a stop is newly requested."""
        stopping = stop.is_set()
        while oldest.number not in answers and stop.is_set() == stopping:
            if done := self.pool.next_done():
                request, answer = done
                self._record(request, answer)
                answers[request.ticket] = answer

    def _await_others(self, trials: int, announced: int) -> int:
        """Wait a moment for trials that other drivers have in hand; returns the number that was announced."""
        if trials != announced:
            self.progress.note(f"waiting for {trials} trials that other drivers have in hand")
        sleep(PAUSE)
        return trials

    def measure(self, composites: Iterable[Composite], split: str) -> None:
        """Score composites on a split, as far as the ledger lacks their scores.

        Raises:
            EvaluationError: Where a composite can't be scored.
            KeyboardInterrupt: As `optimize` does.
        """
        distinct = enumerate(dict.fromkeys(composites))
        needed = (self._request(ticket, composite, split) for ticket, composite in distinct)
        requests = [request for request in needed if request is not None]
        waiting = {request.ticket for request in requests}
        for request in requests:
            self.pool.submit(request)
        scoring = self.progress.phase(f"scoring, {split.replace('_', '-')} split", len(requests), "composites")
        with finishing(self._announce_stop) as stop, scoring as phase:
            while waiting:
                if stop.is_set():
                    waiting -= self.pool.withdraw()
                if waiting and (done := self.pool.next_done()):
                    request, answer = done
                    self._record(request, answer)
                    waiting.remove(request.ticket)
                    phase.advance()
                    if isinstance(answer, Failure):
                        raise EvaluationError(f"{dict(request.composite.terms)} can't be scored: {answer.reason}")
            if stop.is_set():
                raise KeyboardInterrupt

    def score_afresh(self, composite: Composite, split: str) -> dict[str, Score]:
        """Scores of a composite by distribution, measured whatever the ledger has, and not recorded.

        Raises:
            EvaluationError: Where the composite can't be scored.
        """
        self.pool.submit(Request(ticket=0, composite=composite, corpora=self.identity.keys(split)))
        while (done := self.pool.next_done()) is None:
            pass
        _, answer = done
        if isinstance(answer, Failure):
            raise EvaluationError(f"{dict(composite.terms)} can't be scored: {answer.reason}")
        return {name: answer.scores[key] for name, key in self.identity.corpora[split].items()}

    def _assign(self, search: Search, trial: PendingTrial, most: int) -> Assignment:
        """Decide how a trial is measured.

        It races against the trials that were finished when it was proposed with `most` in flight: a driver that adopts
        it finds the same ones.  A trial that completes a stopped one does not race again.
        """
        race = None
        if search.races and not search.is_known(trial.coefficients) and not trial.charged:
            whole, clear = search.whole(trial.number - most + 1), CLEAR if search.completes else inf
            race = race_for(self.ledger, self.identity, trial.coefficients, whole, clear)
        return Assignment(trial, race, search.measures_gradient(trial.coefficients))

    def _request_of(self, assignment: Assignment) -> Request | None:
        """The request to a worker for a trial; None where the ledger has every score that it needs."""
        composite, keys = self.identity.composite(assignment.trial.coefficients), self.identity.keys(SEARCH)
        number, scoring = assignment.number, self.identity.scoring
        if assignment.gradient:
            known = self.ledger.gradients(composite, keys, self.identity.differentiation)
            fine_tunes = set(self.identity.fine_tunes.values())
            missing = tuple(key for key in keys if not fine_tunes <= known.get(key, {}).keys())
            return Request(ticket=number, composite=composite, corpora=missing, gradient=True) if missing else None
        if assignment.race is None:
            return self._request(number, composite, SEARCH)
        scores = self.ledger.look_up(composite, keys, scoring)
        if replay(assignment.race, scores, self.identity.sizes(SEARCH)) is not None:
            return None
        return Request(ticket=number, composite=composite, corpora=keys, known=scores, race=assignment.race)

    def _request(self, ticket: int, composite: Composite, split: str) -> Request | None:
        """A request for the corpora on which the ledger lacks windows; None where it has them all."""
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

    def _finish(
        self, assignment: Assignment, answer: Evaluation | Failure, search: Search, tracker: SearchTracker
    ) -> None:
        """Tell Optuna, the tracker and whoever watches, in this order, unless another driver took the trial over."""
        record = trial_record(
            self.ledger, self.identity, search.name, assignment.trial, answer, assignment.race, assignment.gradient
        )
        if search.tell(record.number, record.penalized, attributes(record)):
            tracker.trial_ended(record)
            self.progress.trial_finished(record, search.finished, search.planned)
