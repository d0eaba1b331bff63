"""Where trials run: in this process, or on Ray actors that share what was prepared, read-only."""

from __future__ import annotations

import logging
import math
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from tightrope.search.stopping import Rival
from tightrope.spaces.cost import Score
from tightrope.spaces.errors import RunError
from tightrope.spaces.policy import Policy

if TYPE_CHECKING:
    from ray.actor import ActorHandle

Payload = Mapping[str, NDArray[Any]]
Job = tuple[int, Policy, Rival | None]
PATIENCE_SECONDS = 180.0
BEGINNING_SECONDS = 5.0  # in which workers that are being built may get ready before they are let go
_log = logging.getLogger(__name__)


class Evaluator(Protocol):
    """Scores policies of one network on the search split.

    One that can give up a hopeless policy also has `compare(policy, rival) -> Scored` (`search/stopping.py`).
    """

    def evaluate(self, policy: Policy) -> Score:
        """The score of the model under this policy; the same policy always has the same score."""
        ...


Factory = Callable[[Payload], Evaluator]
"""Builds an evaluator in the process where it will work; it is sent there, the arrays are not: they are shared, read-only.

`torch.from_numpy(a).add_(1)` writes through the read-only flag into what all workers share, so an evaluator works on copies.
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one submitted policy: a score, or the reason why there is none. `cpu_seconds` of the worker's process.

    `right` as in `stopping.Scored`.
    """

    number: int
    score: Score | None
    failed: str | None
    cpu_seconds: float
    right: bytes | None = None


class Executor(Protocol):
    """Scores policies, `slots` of them at a time."""

    slots: int

    def submit(self, number: int, policy: Policy, rival: Rival | None = None) -> None:
        """Hand over a policy, and what it is held against; at most `slots` may be unfinished."""
        ...

    def next(self) -> Outcome:
        """Wait for one of the submitted policies."""
        ...

    def release(self) -> None:
        """Give back the workers' cores; nothing can be submitted from then on."""
        ...

    def close(self) -> None:
        """Let go of all that was started."""
        ...


def score(evaluator: Evaluator, number: int, policy: Policy, rival: Rival | None = None) -> Outcome:
    """Evaluate one policy; whatever it raises, running out of memory included, becomes the reason of a failure."""
    start, compare = time.process_time(), getattr(evaluator, "compare", None)
    failed: str | None
    right: bytes | None = None
    try:
        found, right = (evaluator.evaluate(policy), None) if compare is None else compare(policy, rival)
        failed = None if math.isfinite(found.value) else f"the score is {found.value}, which cannot be compared"
    except Exception as error:
        failed = _reason(error)
    return Outcome(number, None if failed else found, failed, time.process_time() - start, right)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text[:500]


class Inline:
    """Scores in this process, one policy at a time, in the order of submission."""

    slots = 1

    def __init__(self, factory: Factory, payload: Payload | None = None) -> None:
        self._evaluator = factory({name: _read_only(array) for name, array in (payload or {}).items()})
        self._waiting: deque[Job] = deque()

    def submit(self, number: int, policy: Policy, rival: Rival | None = None) -> None:
        self._waiting.append((number, policy, rival))

    def next(self) -> Outcome:
        return score(self._evaluator, *self._waiting.popleft())

    def release(self) -> None:
        self._waiting.clear()

    def close(self) -> None:
        self.release()


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


class Worker:
    """What a Ray actor runs: one evaluator, built once."""

    def build(self, path: list[str], shared: list[Any]) -> None:
        """Build the evaluator from references to the factory and the arrays, which are mapped and not copied.

        `path` is where the driver finds its modules, so that a user's own are found here too.
        """
        import ray

        sys.path += [p for p in path if p not in sys.path]
        factory, arrays = ray.get(shared)
        self._evaluator: Evaluator = factory(arrays)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)

    def run(self, number: int, policy: Policy, rival: Rival | None) -> Outcome:
        return score(self._evaluator, number, policy, rival)

    def answer(self) -> None:
        """Raises in the driver where this worker is no more."""


class RayPool:
    """Scores on Ray actors, one core each.

    The payload is put into Ray's object store once; every worker maps it, on other machines a copy of it there. A policy whose
    worker dies (killed, out of memory, or gone with its machine) is tried again on another that has answered since, `retries`
    times, then failed; the dead one is replaced as soon as there is a core for it, and until then those that are left go on.
    `slots` is above the number of workers, so that a policy waits for whoever is free while the agent thinks and while an earlier
    trial is still to be told; with one worker it is not.

    Args:
        address: of a running cluster, `host:port` or `auto`; None or `local` starts Ray here, unless it already runs in this
            process.
        patience_seconds: how long to wait for the workers to be ready, and later on for one where none is left.

    Raises:
        RunError: Ray cannot be started or reached, or the workers are not ready in time. What the factory raises is raised.
    """

    def __init__(
        self,
        factory: Factory,
        payload: Payload | None = None,
        *,
        workers: int,
        address: str | None = None,
        retries: int = 2,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        import ray

        if workers < 1:
            raise RunError(f"a pool needs at least 1 worker, got {workers}")
        self.slots = workers + (max(2, workers // 4) if workers > 1 else 0)
        self._ray, self._retries, self._patience = ray, retries, patience_seconds
        arrays = dict(payload or {})
        self._owned = not ray.is_initialized()
        if self._owned:
            _start(workers, address, sum(a.nbytes for a in arrays.values()))
        self._idle: list[ActorHandle[Any]] = []
        # with a policy, or being built or asked whether they live; and how often that was tried
        self._busy: dict[Any, tuple[ActorHandle[Any], Job | None, int]] = {}
        self._waiting: deque[tuple[Job, int]] = deque()
        self._events: SimpleQueue[Job | Future[Any] | None] = SimpleQueue()  # policies handed over and futures done
        self._outcomes: SimpleQueue[Outcome | BaseException] = SimpleQueue()
        self._feeder = Thread(target=self._feed, name="feeder", daemon=True)
        try:
            # in a list, so that Ray hands on the references and each worker resolves them when it can
            self._shared = [ray.put(factory), ray.put(arrays)]
            self._path = [str(Path(p).absolute()) for p in sys.path]
            for _ in range(workers):
                self._hire(0)
            self._gather(workers)
            self._feeder.start()
        except BaseException:
            self.close()
            raise

    def _hire(self, tries: int) -> None:
        """Ask for a new worker, whose evaluator is built as soon as there is a core for it."""
        actor = self._ray.remote(Worker).options(num_cpus=1, max_restarts=0).remote()
        self._watch(actor.build.remote(self._path, self._shared), actor, None, tries)

    def _gather(self, count: int) -> None:
        """Wait until all workers are ready; what the factory raises is raised here."""
        end = time.monotonic() + self._patience
        while len(self._idle) < count:
            try:
                event = self._events.get(timeout=max(0.0, end - time.monotonic()))
            except Empty:
                cpus = self._ray.cluster_resources().get("CPU", 0)
                raise RunError(
                    f"{count} workers were not ready within {self._patience:g} s, {len(self._idle)} were; Ray sees {cpus:g} CPUs: "
                    "ask for fewer workers, free some, or give it more time (`patience_seconds`)"
                ) from None
            assert isinstance(event, Future)
            self._settle(event)

    def submit(self, number: int, policy: Policy, rival: Rival | None = None) -> None:
        self._events.put((number, policy, rival))

    def next(self) -> Outcome:
        found = self._outcomes.get()
        if isinstance(found, BaseException):
            self._outcomes.put(found)  # for whoever asks again: there will be no other
            raise found
        return found

    def _feed(self) -> None:
        """Hand what waits to whoever is free, in a thread of its own; the workers need not wait for the driver."""
        try:
            while (event := self._event()) is not None:
                if isinstance(event, Future):
                    self._settle(event)
                else:
                    self._waiting.append((event, 0))
                while self._waiting and self._idle:
                    self._send(self._idle.pop(), *self._waiting.popleft())
        except BaseException as error:
            self._outcomes.put(error)

    def _event(self) -> Job | Future[Any] | None:
        """The next thing that happens; there must be one in time where a policy waits and no worker is left."""
        stuck = self._waiting and not any(job for _, job, _ in self._busy.values())
        try:
            return self._events.get(timeout=self._patience if stuck else None)
        except Empty:
            raise RunError(
                f"no worker is left, and there was no core for another within {self._patience:g} s; what was told is kept, and "
                "the search can be resumed"
            ) from None

    def _send(self, actor: ActorHandle[Any], job: Job, tries: int) -> None:
        self._watch(actor.run.remote(*job), actor, job, tries)

    def _watch(self, reference: Any, actor: ActorHandle[Any], job: Job | None, tries: int) -> None:
        future = reference.future()
        self._busy[future] = (actor, job, tries)
        future.add_done_callback(self._events.put)

    def _settle(self, future: Future[Any]) -> None:
        """See what has become of a policy, or of a worker that was being built."""
        actor, job, tries = self._busy.pop(future)
        error = future.exception()
        if error is None:
            self._idle.append(actor)
            if job is not None:
                self._outcomes.put(future.result())
            return
        self._ray.kill(actor)
        last = tries >= self._retries
        if job is None:
            cause = getattr(error, "cause", None)  # what the factory has raised, which it would do again
            if isinstance(cause, Exception):
                raise cause
            if last or not isinstance(error, self._ray.exceptions.RayActorError):
                raise RunError(f"a worker died before its first trial: {_reason(error)}")
            self._hire(tries + 1)
            return
        self._hire(0)
        if last:
            reason = f"its worker died {tries + 1} times, the last time with {_reason(error)}"
            self._outcomes.put(Outcome(job[0], None, reason, 0.0))
        else:
            _log.warning("the worker of trial %d died and the trial is tried again: %s", job[0], _reason(error))
            self._waiting.appendleft((job, tries + 1))
        for other in self._idle:  # gone with the same machine, it would cost the policy a try
            self._watch(other.answer.remote(), other, None, -1)
        self._idle = []

    def release(self) -> None:
        if self._feeder.is_alive():
            self._events.put(None)
            self._feeder.join()
        beginning = [future for future, (_, job, _) in self._busy.items() if job is None]
        wait(beginning, BEGINNING_SECONDS)  # Ray may keep the core of a worker that is killed while it starts
        for actor in [*self._idle, *(entry[0] for entry in self._busy.values())]:
            self._ray.kill(actor)
        self._idle, self._busy = [], {}

    def close(self) -> None:
        self.release()
        if self._owned:
            self._ray.shutdown()


def _start(workers: int, address: str | None, payload_bytes: int) -> None:
    """Start or join Ray, quietly, with room for the payload."""
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    local = address in (None, "local")
    silent: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    try:
        if local:  # and does not join whatever RAY_ADDRESS or an earlier `ray start` names
            room = max(2**28, 2 * payload_bytes)
            ray.init("local", num_cpus=workers, include_dashboard=False, object_store_memory=room, **silent)
        else:
            _reach(str(address))
            ray.init(address=address, **silent)
    except Exception as error:  # Ray raises whatever it met: no memory, no port, no room in its folder
        where, instead = ("started", "workers=0 searches in this process") if local else (
            f"reached at {address!r}", "without an address it is started here"
        )  # fmt: skip
        raise RunError(f"Ray cannot be {where}: {_reason(error)}; {instead}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Ray's own messages below errors are left out."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reach(address: str) -> None:
    """Raise `OSError` unless something listens at `host:port`; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def pool(
    factory: Factory, payload: Payload | None = None, *, workers: int = 0, address: str | None = None,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Executor:  # fmt: skip
    """An executor: in this process for 0 workers, else on Ray actors."""
    if workers == 0:
        return Inline(factory, payload)
    return RayPool(factory, payload, workers=workers, address=address, patience_seconds=patience_seconds)
