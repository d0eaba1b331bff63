"""A study: all trials of one search, in memory and, with a folder, on disk after every trial."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightrope.estimators.device import Device
from tightrope.estimators.threads import one_blas_thread
from tightrope.search import journal
from tightrope.search.agent import Agent, Problem, make
from tightrope.search.agents.repair import fit
from tightrope.search.distribute import Executor
from tightrope.search.journal import Control, Final, Header, Journal, Record
from tightrope.search.results import Results
from tightrope.search.stopping import Rival, Scored
from tightrope.search.trial import Trial
from tightrope.spaces.budget import Budget, Limits
from tightrope.spaces.cost import Cost, Score
from tightrope.spaces.errors import DataError, RunError
from tightrope.spaces.policy import Policy
from tightrope.spaces.space import Space

if TYPE_CHECKING:
    import pandas as pd

Answer = tuple[Score | None, str | None, bytes | None]  # score, reason of failure, what is right
SLACK = 1.05
"""A policy is held against the best trial that costs at most this many times as much: what such a trial dominates is hopeless."""
OnTrial = Callable[[Trial, "Study"], None]
_log = logging.getLogger(__name__)


class Study(Results):
    """Drives one agent and the workers that score its policies.

    The k-th ask sees the trials told from 0 to k-W in order, where W trials are under way at once (`Executor.slots`, a little more
    than there are workers), whoever finishes first; so the same seed and the same number of workers give the same trials.
    Make one with `start` or `resume`, then `run` it. To look only, `journal.read` the folder and take its `Results`.
    """

    def __init__(self, header: Header, problem: Problem, agent: Agent, book: Journal | None = None, record: Record | None = None):
        super().__init__(header, ())
        self.problem, self.agent = problem, agent
        self.controls: list[Control] = list(record.controls if record else ())
        self.finals: list[Final] = list(record.finals if record else ())
        self._book = book
        self._kept: dict[int, Trial] = {t.number: t for t in (record.trials if record else ())}  # finished
        self._names: dict[int, str] = {}  # who asked for a trial, where the agent has parts
        self._told: list[Trial] = []  # and told to the agent, in order
        self._answers: dict[Policy, Answer] = {header.dense: (header.dense_score, None, header.right)}
        self._answers.update({t.policy: (t.score, t.failed, t.right) for t in self._kept.values()})

    @staticmethod
    @one_blas_thread()
    def start(
        space: Space,
        device: Device,
        budget: Budget,
        executor: Executor,
        *,
        folder: Path | None = None,
        name: str = "search",
        agent: str = "tpe",
        settings: Mapping[str, Any] | None = None,
        trials: int = 100,
        seed: int = 0,
        metric: str = "top1",
        stopping: float = 0.0,
        hold: Callable[[Problem], Limits] | None = None,
    ) -> Study:
        """Begin a search: score the dense model, resolve the budget against its cost, and open the journal.

        Args:
            hold: called once; the limits that it returns stand in for those of the budget.
            stopping: probability with which a trial that is no worse than the best so far may be given up early; 0 scores every
                trial on the whole split. Only `top1` gives up trials.

        Raises:
            BudgetError: the device cannot cost the budget, or no policy found meets it (the cheapest is named).
            DataError: the dense model cannot be scored.
            RunError: the folder already holds a search, or another process is using it.
        """
        book = None if folder is None else Journal(folder)
        try:
            if book is not None:
                book.mend()
                if not book.empty:
                    raise RunError(f"{folder} already holds a search; resume it or choose another folder")
            whole = space.dense
            cost = device.estimate_many(space.network, [whole])[0]
            limits = allowed(budget, device, cost)
            problem = Problem(space, device, limits, Score(0.0, 0.0, 0), budget.floor, seed, trials)
            problem.check()
            if hold is not None:
                problem = replace(problem, limits=hold(problem))
                problem.check()
            score, right = _score_dense(executor, whole)
            limits = problem.limits
            header = Header(
                name, space.network.fingerprint, device.name, device.simulated, budget.text, limits.top, budget.floor, agent, seed,
                metric, whole, score, cost, executor.slots, trials, dict(settings or {}), time.time(), stopping,
                right if stopping else None,
            )  # fmt: skip
            study = Study._make(header, space, device, book, None)
            if book is not None:
                book.append(header)
            return study
        except BaseException:
            if book is not None:
                book.close()
            raise

    @staticmethod
    def resume(folder: Path, space: Space, device: Device) -> Study:
        """Go on with the search of a folder: the agent is made anew and told what the journal holds.

        `run` then needs an executor of as many slots as the search began with.
        """
        record = journal.read(folder)
        book = Journal(folder)
        try:
            torn = book.mend()
            if torn:
                _log.warning("%s ended in the middle of a line; its last %d bytes were dropped", book.path, torn)
            record = journal.read(folder)
            found = (record.header.network, record.header.device)
            if found != (space.network.fingerprint, device.name):
                raise RunError(
                    f"{folder} is a search of network {found[0]} on {found[1]!r}, but what is given is "
                    f"{space.network.fingerprint} on {device.name!r}"
                )
            return Study._make(record.header, space, device, book, record)
        except BaseException:
            book.close()
            raise

    @staticmethod
    def _make(header: Header, space: Space, device: Device, book: Journal | None, record: Record | None) -> Study:
        limits = Limits(header.limits)
        problem = Problem(space, device, limits, header.dense_score, header.floor, header.seed, header.trials)
        return Study(header, problem, make(header.agent, problem, header.settings), book, record)

    # --- running ----------------------------------------------------------------------------------------------------

    @one_blas_thread()
    def run(self, executor: Executor, trials: int | None = None, *, on_trial: Sequence[OnTrial] = ()) -> None:
        """Go on until `trials` trials are told (those planned, if None); `on_trial` is called after each that is new.

        What a trial raises becomes its reason of failure; the search goes on. Call it again for more trials. Linear algebra
        runs on one thread meanwhile, that of agents and of trials in this process.
        """
        total = self.header.trials if trials is None else trials
        if executor.slots != self.header.workers:
            raise RunError(
                f"this search began with {self.header.workers} trials under way at once and goes on with as many, got "
                f"{executor.slots}; give it as many workers as before"
            )
        old, queue = set(self._kept), _Queue(self, executor)
        while len(self._told) < total:
            while queue.asked < min(len(self._told) + executor.slots, total):
                queue.ask()
            trial = queue.wait(len(self._told))
            self.agent.tell(trial)
            self._told.append(trial)
            if trial.number not in old:
                for call in on_trial:
                    call(trial, self)
        if self._book is not None:
            self._book.sync()

    def rival(self, policy: Policy) -> Rival | None:
        """What a policy asked now is held against while it is scored, so that it can be given up early; None to score it whole.

        It follows from the trials told so far alone, so that the same seed and workers give the same trials. Under an accuracy
        to be kept it is the dense model, less the points that may be lost.
        """
        error, right = self.header.stopping, self.header.right
        if not error or right is None:
            return None
        if self.header.floor is not None:
            return Rival(right, -self.header.floor, error)
        price = self.problem.price
        most = SLACK * price(self.problem.cost(policy))
        able = [t for t in self._told if t.right is not None and t.feasible and price(t.cost) <= most]
        best = max(able, key=lambda t: (t.score.value if t.score else 0.0, -t.number), default=None)
        return None if best is None or best.right is None else Rival(best.right, 0.0, error)

    def _finish(self, number: int, policy: Policy, answer: Answer, cpu_seconds: float) -> None:
        """Record a trial, before anyone is told of it."""
        cost, (score, failed, right) = self.problem.cost(policy), answer
        feasible, right = self.problem.meets(score, cost), right if self.header.stopping else None
        name = self._names.pop(number, self.header.agent)
        trial = Trial(number, name, policy, cost, score, feasible, failed, cpu_seconds, time.time(), right)
        if self._book is not None:
            self._book.append(trial)
        self._kept[number] = trial
        self._answers[policy] = answer

    def close(self) -> None:
        """Let others open the run folder."""
        if self._book is not None:
            self._book.close()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, line: Control | Final) -> None:
        """Record a control, or what became of a trial of the front."""
        if isinstance(line, Control):
            self.controls.append(line)
        else:
            self.finals.append(line)
        if self._book is not None:
            self._book.append(line)

    # --- results ----------------------------------------------------------------------------------------------------

    @property
    def trials(self) -> Sequence[Trial]:
        """Every trial that is known, by number: those told, and those that finished ahead of their turn."""
        return [self._kept[number] for number in sorted(self._kept)]

    def to_pandas(self) -> pd.DataFrame:
        """One row a trial; see `Results.frame`."""
        return self.frame(self.problem.network)


class _Queue:
    """The trials between ask and tell: waiting for a worker, for a repeat of theirs to finish, or for their turn."""

    def __init__(self, study: Study, executor: Executor) -> None:
        self._study, self._executor = study, executor
        self._flying: dict[Policy, list[int]] = {}  # policies at the workers, and the trials that wait for each
        missing = next(k for k in range(len(study._kept) + 1) if k not in study._kept)
        self._settled = missing - executor.slots + 1  # no ask to come sees a trial below this one as running
        self.asked = len(study._told)

    def ask(self) -> None:
        """Get the policy of the next trial and see to its score: from the journal, from memory, or from a worker."""
        study, number = self._study, self.asked
        self.asked += 1
        kept = study._kept.get(number)
        if kept is not None and number < self._settled:
            return
        policy = study.agent.ask(number)
        part = getattr(study.agent, "part", None)
        if part is not None and kept is None:
            study._names[number] = part(number)
        if not study.problem.limits.met(study.problem.cost(policy)):
            policy = fit(study.problem, study.problem.space.encode(policy))
        if kept is not None:
            if kept.policy != policy:
                _log.warning("the agent asks for another policy in trial %d than before; costs or code have changed since", number)
        elif policy in study._answers:
            study._finish(number, policy, study._answers[policy], 0.0)
        elif policy in self._flying:
            self._flying[policy].append(number)
        else:
            self._flying[policy] = [number]
            self._executor.submit(number, policy, study.rival(policy))

    def wait(self, number: int) -> Trial:
        """The finished trial of this number."""
        study = self._study
        while number not in study._kept:
            outcome = self._executor.next()
            policy = next((p for p, numbers in self._flying.items() if numbers[0] == outcome.number), None)
            if policy is None:
                continue  # asked before a run that was broken off
            for k in self._flying.pop(policy):
                seconds = outcome.cpu_seconds if k == outcome.number else 0.0
                study._finish(k, policy, (outcome.score, outcome.failed, outcome.right), seconds)
        return study._kept[number]


def allowed(budget: Budget, device: Device, dense: Cost) -> Limits:
    """What a policy may cost: the budget, and what the device has room for (flash, RAM) where the dense model comes near it.

    Raises:
        BudgetError: the device cannot cost the budget.
    """
    own: Limits = getattr(device, "limits", Limits())
    room = Limits(tuple((metric, most) for metric, most in own.top if (dense.metric(metric) or 0.0) > most / 2))
    return budget.resolve(dense, device.metrics, device.name).within(room)


def _score_dense(executor: Executor, policy: Policy) -> Scored:
    executor.submit(-1, policy)
    outcome = executor.next()
    if outcome.score is None:
        raise DataError(f"the model cannot be scored before compression: {outcome.failed}")
    return outcome.score, outcome.right
