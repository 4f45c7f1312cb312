"""The loop: ask, look up or score, record, tell, log."""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from time import sleep

from dem_opt.compute import Pool
from dem_opt.errors import EvaluationError
from dem_opt.evaluation.interim_analyses import replay
from dem_opt.evaluation.parts import all_parts, counted
from dem_opt.evaluation.racing import CLEAR, Race
from dem_opt.progress import Progress
from dem_opt.search.optuna_study import PendingTrial, Search
from dem_opt.search.run_name import RunName
from dem_opt.search.time_left import FinalTable, TimeLeft, plan_search
from dem_opt.search.trials import attributes, race_for, trial_record
from dem_opt.signals import Stop, finishing
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.leases import Lease
from dem_opt.storage.ledger import Ledger
from dem_opt.tracking import SearchTracker
from dem_opt.types import (
    GRADIENT_FORWARDS,
    HELD_OUT,
    SEARCH,
    Composite,
    Evaluation,
    Expense,
    Failure,
    Folds,
    Request,
    Score,
)

PAUSE = 0.5
"""Seconds between two looks at the trials that other drivers have in hand."""


@dataclass(frozen=True)
class Assignment:
    """A pending trial with the way to measure it.

    Attributes:
        trial: The trial.
        race: The race that may stop it; of a probe the one that estimates its objective.
        gradient: Whether its gradient is needed.
        parts: Parts of the search split, where gradients are measured by part.
    """

    trial: PendingTrial
    race: Race | None
    gradient: bool
    parts: int = 0

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
        study: Name of the study whose costs evaluations are.
    """

    identity: StudyIdentity
    ledger: Ledger
    pool: Pool
    progress: Progress
    study: str

    def optimize(
        self, search: Search, lookahead: int, tracker: SearchTracker, lease: Lease, left: TimeLeft | None = None
    ) -> None:
        """Ask, look up or score, record, tell, log, until the search ends.

        Trials that a dead driver left come first, under their own numbers.  The order of writing is the ledger, Optuna,
        the tracker; so a crash at any point loses no score and repeats none.  A score is recorded as it comes; trials
        are told in the order in which they were asked for, so proposals depend on the number of workers and never on
        which of them is faster.  While other drivers have trials in hand, this one waits for them, since their end may
        leave room for more.

        Args:
            search: The search.
            lookahead: Proposals computed ahead for each worker.
            tracker: Its log.
            lease: The right to drive the study.
            left: The time left of the command; of this search alone unless given.

        Raises:
            KeyboardInterrupt: Where a stop was requested, when the scores under way are written.
        """
        left = left or TimeLeft(self.pool.capacity, [plan_search(search)], FinalTable(requests=0, forwards=0.0))
        run = RunName.from_optuna(search.name, self.study)
        part = search.name if run is None else run.label
        in_flight: deque[Assignment] = deque()
        answers: dict[int, Evaluation | Failure] = {}
        awaited = 0
        with finishing(self._announce_stop) as stop:
            while True:
                stop.check()
                if stop.is_set():
                    withdrawn = self.pool.withdraw()
                    in_flight = deque(assignment for assignment in in_flight if assignment.number not in withdrawn)
                while not stop.is_set() and (assignment := self._next(search, lookahead, len(in_flight), left)):
                    in_flight.append(assignment)
                    if request := self._request_of(assignment):
                        self.pool.submit(request)
                    else:
                        answers[assignment.number] = Evaluation(scores={})
                if in_flight:
                    with left.waiting(search.name):
                        self._collect(in_flight[0], answers, stop, part)
                    if answer := answers.pop(in_flight[0].number, None):
                        self._finish(in_flight.popleft(), answer, search, tracker, left)
                elif stop.is_set():
                    raise KeyboardInterrupt
                elif search.elsewhere:
                    awaited = self._await_others(search.elsewhere, awaited)
                else:
                    return
                lease.renew()

    def _announce_stop(self) -> None:
        self.progress.note("stopping when what is being scored is written; once more to stop at once")

    def _next(self, search: Search, lookahead: int, in_flight: int, left: TimeLeft) -> Assignment | None:
        """The next trial, where there is one, and room for it."""
        most = 1 if search.is_sequential else self.pool.capacity * (1 + lookahead)
        trial = search.ask() if in_flight < most else None
        if trial is None:
            return None
        left.proposed(search.name, trial.propose_seconds, search.is_known(trial.coefficients))
        return self._assign(search, trial, most)

    def _collect(self, oldest: Assignment, answers: dict[int, Evaluation | Failure], stop: Stop, part: str) -> None:
        """Record answers as they come, until the oldest trial's has come, or a stop is newly requested."""
        stopping = stop.is_set()
        while oldest.number not in answers and stop.is_set() == stopping:
            stop.check()
            if done := self.pool.next_done():
                request, answer = done
                self._record(request, answer, part)
                answers[request.ticket] = answer

    def _await_others(self, trials: int, announced: int) -> int:
        """Wait a moment for trials that other drivers have in hand; returns the number that was announced."""
        if trials != announced:
            self.progress.note(f"waiting for {trials} trials that other drivers have in hand")
        sleep(PAUSE)
        return trials

    def measure(self, composites: Iterable[Composite], splits: Collection[str], part: str) -> None:
        """Score composites on some splits, as far as the ledger lacks their scores.

        Args:
            composites: The composites.
            splits: The splits.
            part: The part of the study whose cost it is, for people.

        Raises:
            EvaluationError: Where a composite can't be scored.
            KeyboardInterrupt: As `optimize` does.
        """
        requests = self.missing(composites, splits)
        windows = {request.ticket: self._missing_windows(request) for request in requests}
        failed: list[str] = []
        with self.progress.phase(f"scoring, {part}", sum(windows.values()), "windows") as phase:
            for request, answer in self._answers(requests, part):
                phase.advance(windows[request.ticket])
                if isinstance(answer, Failure):
                    failed.append(f"{dict(request.composite.terms)} can't be scored: {answer.reason}")
        if failed:
            raise EvaluationError(failed[0])

    def differentiate(self, composite: Composite, folds: Mapping[str, Folds], part: str) -> None:
        """Measure scores and gradients by parameter on each fold of the search split, as far as the ledger lacks them.

        Corpora are divided over the workers.

        Args:
            composite: The composite.
            folds: Folds by corpus key.
            part: The part of the study whose cost it is, for people.

        Raises:
            EvaluationError: The composite can't be scored.
        """
        known = self.ledger.fold_gradients(composite, folds, self.identity.differentiation)
        missing = [key for key in folds if key not in known]
        count = min(self.pool.capacity, len(missing))
        requests = []
        for ticket in range(count):
            own = {key: folds[key] for key in missing[ticket::count]}
            requests.append(Request(ticket=ticket, composite=composite, corpora=tuple(own), gradient=True, folds=own))
        failed = [answer.reason for _, answer in self._answers(requests, part) if isinstance(answer, Failure)]
        if failed:
            raise EvaluationError(f"a composite by group can't be scored: {failed[0]}")

    def _answers(self, requests: Sequence[Request], part: str) -> Iterator[tuple[Request, Evaluation | Failure]]:
        """Submit requests, and yield each with its answer, which is recorded.

        Raises:
            KeyboardInterrupt: Where a stop was requested, when those that are under way are written.
        """
        for request in requests:
            self.pool.submit(request)
        pending = {request.ticket for request in requests}
        with finishing(self._announce_stop) as stop:
            while pending:
                stop.check()
                if stop.is_set():
                    pending -= self.pool.withdraw()
                if pending and (done := self.pool.next_done()):
                    request, answer = done
                    self._record(request, answer, part)
                    pending.remove(request.ticket)
                    yield request, answer
            if stop.is_set():
                raise KeyboardInterrupt

    def missing(self, composites: Iterable[Composite], splits: Collection[str]) -> list[Request]:
        """The requests that would score composites on some splits, as far as the ledger lacks their scores."""
        wanted = [(composite, split) for split in splits for composite in dict.fromkeys(composites)]
        requests = (self._request(ticket, *each) for ticket, each in enumerate(wanted))
        return [request for request in requests if request is not None]

    def forwards(self, requests: Iterable[Request]) -> float:
        """Forward-equivalents that requests will take."""
        full_pass = sum(self.identity.sizes(SEARCH).values())
        return sum(map(self._missing_windows, requests)) / full_pass

    def _missing_windows(self, request: Request) -> int:
        """Windows that a request asks for beyond those that are known."""
        sizes = {**self.identity.sizes(HELD_OUT), **self.identity.sizes(SEARCH)}
        known = (len(request.known[key].nats_W) if key in request.known else 0 for key in request.corpora)
        return sum(sizes[key] for key in request.corpora) - sum(known)

    def score_afresh(self, composite: Composite, split: str, part: str) -> dict[str, Score]:
        """Scores of a composite by distribution, measured whatever the ledger has, and not recorded.

        Args:
            composite: The composite.
            split: The split.
            part: The part of the study whose cost it is, for people.

        Raises:
            EvaluationError: Where the composite can't be scored.
        """
        request = Request(ticket=0, composite=composite, corpora=self.identity.keys(split))
        self.pool.submit(request)
        while (done := self.pool.next_done()) is None:
            pass
        _, answer = done
        if isinstance(answer, Failure):
            raise EvaluationError(f"{dict(composite.terms)} can't be scored: {answer.reason}")
        self.ledger.spend(self._expense(request, answer, part))
        return {name: answer.scores[key] for name, key in self.identity.corpora[split].items()}

    def _assign(self, search: Search, trial: PendingTrial, most: int) -> Assignment:
        """Decide how a trial is measured.

        It races against the trials that were finished when it was proposed with `most` in flight: a driver that adopts
        it finds the same ones.  A trial that completes a stopped one does not race again.
        """
        race, is_probe = None, trial.part is not None
        if is_probe or (search.races and not search.is_known(trial.coefficients) and not trial.spared):
            whole, clear = search.whole(trial.number - most + 1), CLEAR if search.completes else inf
            if is_probe:
                whole = search.with_anchor(whole)
            race = race_for(self.ledger, self.identity, trial.coefficients, whole, clear, any_goal=is_probe)
        gradient = is_probe or search.measures_gradient(trial.coefficients)
        return Assignment(trial, race, gradient, search.parts if gradient else 0)

    def _request_of(self, assignment: Assignment) -> Request | None:
        """The request to a worker for a trial; None where the ledger has every score that it needs."""
        composite, keys = self.identity.composite(assignment.trial.coefficients), self.identity.keys(SEARCH)
        number, scoring = assignment.number, self.identity.scoring
        if assignment.parts:
            return self._request_parts(assignment, composite)
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

    def _request_parts(self, assignment: Assignment, composite: Composite) -> Request | None:
        """The request for a probe's part, or for all parts of the anchor; None where the ledger has them."""
        sizes, part = self.identity.sizes(SEARCH), assignment.trial.part
        windows = all_parts(sizes, assignment.parts)
        if part is not None:
            windows = {key: (parts[part],) for key, parts in windows.items()}
        known = self.ledger.part_gradients(composite, windows, self.identity.differentiation)
        fine_tunes = set(self.identity.fine_tunes.values())
        missing = {
            key: parts
            for key, parts in windows.items()
            if key not in known or not all(fine_tunes <= known[key][own].gradient.keys() for own in parts)
        }
        if not missing:
            return None
        return Request(
            ticket=assignment.number, composite=composite, corpora=tuple(missing), gradient=True, parts=missing
        )

    def _request(self, ticket: int, composite: Composite, split: str) -> Request | None:
        """A request for the corpora on which the ledger lacks windows; None where it has them all."""
        keys, windows = self.identity.keys(split), self.identity.windows(split)
        known = self.ledger.look_up(composite, keys, self.identity.scoring)
        missing = tuple(key for key in keys if key not in known or len(known[key].nats_W) < windows)
        return Request(ticket=ticket, composite=composite, corpora=missing, known=known) if missing else None

    def _record(self, request: Request, answer: Evaluation | Failure, part: str) -> None:
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
                self._expense(request, answer, part),
                answer.fold_gradients,
                answer.part_gradients,
            )

    def _expense(self, request: Request, answer: Evaluation, part: str) -> Expense:
        """The cost of an answer: its windows beyond those that the request knew, all of them where it has gradients."""
        known = {} if request.gradient else {key: len(score.nats_W) for key, score in request.known.items()}
        if request.parts:
            windows = sum(counted(parts) for parts in request.parts.values())
        else:
            # A race ends at what it needs to know, which may be less than was known.
            windows = sum(max(len(answer.scores[key].nats_W) - known.get(key, 0), 0) for key in request.corpora)
        passes = GRADIENT_FORWARDS if request.gradient else 1.0
        seconds = answer.merge_seconds + answer.score_seconds
        return Expense(study=self.study, part=part, windows=windows * passes, seconds=seconds)

    def _finish(
        self,
        assignment: Assignment,
        answer: Evaluation | Failure,
        search: Search,
        tracker: SearchTracker,
        left: TimeLeft,
    ) -> None:
        """Tell Optuna, the tracker and whoever watches, in this order, unless another driver took the trial over."""
        record = trial_record(
            self.ledger,
            self.identity,
            search.name,
            assignment.trial,
            answer,
            assignment.race,
            assignment.gradient,
            assignment.parts,
        )
        losses = tuple(record.losses.values())
        if search.tell(record.number, record.penalized, attributes(record), record.estimates, losses):
            tracker.trial_ended(record)
            left.finished(record, assignment.race is not None)
            if (seconds := left.seconds()) is not None:
                self.progress.time_left(seconds)
            self.progress.trial_finished(record, search.finished, search.planned)
