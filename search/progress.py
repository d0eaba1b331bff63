"""Telling the user how far a run has come."""

import logging
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tightrope.search.study import Study
    from tightrope.search.trial import Trial

log = logging.getLogger(__name__)


class Progress(Protocol):
    """What a run reports to."""

    def phase(self, name: str, total: int | None = None) -> None:
        """A new phase begins; `total` steps if they can be counted."""
        ...

    def step(self, done: int, total: int, note: str = "") -> None:
        """So many steps of the phase are done."""
        ...

    def trial(self, trial: "Trial", study: "Study") -> None:
        """A trial has finished."""
        ...

    def close(self) -> None:
        """No more phases."""
        ...


class Quiet:
    """Reports to the log only. `seconds` has the wall and CPU seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}
        self._name, self._since = "", (0.0, 0.0)

    def phase(self, name: str, total: int | None = None) -> None:
        self._end()
        self._name, self._since = name, (time.monotonic(), time.process_time())
        log.info("%s", name)

    def _end(self) -> None:
        if self._name:
            wall, cpu = time.monotonic() - self._since[0], time.process_time() - self._since[1]
            before = self.seconds.get(self._name, (0.0, 0.0))
            self.seconds[self._name] = (before[0] + wall, before[1] + cpu)
        self._name = ""

    def step(self, done: int, total: int, note: str = "") -> None: ...

    def trial(self, trial: "Trial", study: "Study") -> None:
        self.step(len(study.trials), study.header.trials, note_of(study))

    def close(self) -> None:
        self._end()


class Lines(Quiet):
    """Plain lines on stdout, for where there is no terminal: each phase, and now and then how far it has come."""

    EVERY_SECONDS = 15.0

    def __init__(self) -> None:
        super().__init__()
        self._began = self._last = time.monotonic()

    def _say(self, text: str) -> None:
        self._last = time.monotonic()
        sys.stdout.write(f"[{self._last - self._began:6.1f} s] {text}\n")
        sys.stdout.flush()

    def phase(self, name: str, total: int | None = None) -> None:
        super().phase(name, total)
        self._say(name)

    def step(self, done: int, total: int, note: str = "") -> None:
        if time.monotonic() - self._last > self.EVERY_SECONDS:
            self._say(f"  {done}/{total} {note}".rstrip())


class Bar(Quiet):
    """A rich progress bar on stderr: phase, trials, best under budget, time left."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        self.rich: Any = Rich(
            TextColumn("{task.description}", style="bold"), BarColumn(bar_width=28), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", style="green"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self.rich.start()
        self._task: Any = None

    def phase(self, name: str, total: int | None = None) -> None:
        super().phase(name, total)
        self._done()
        self._task = self.rich.add_task(name, total=total, note="")

    def _done(self) -> None:
        if self._task is not None:
            task = self.rich.tasks[self.rich.task_ids.index(self._task)]
            self.rich.update(self._task, total=task.total or 1, completed=task.total or 1)

    def step(self, done: int, total: int, note: str = "") -> None:
        if self._task is not None:
            self.rich.update(self._task, completed=done, total=total, note=note)

    def close(self) -> None:
        super().close()
        self._done()
        self.rich.stop()


def note_of(study: "Study") -> str:
    """The best under budget so far, in a few words."""
    best = study.best
    if best is None or best.score is None:
        return "none within budget yet"
    return f"best {best.score.value:.2f} at {study.price(best):.3f}x"


def default(*, lines: bool = False) -> Quiet:
    """A bar on a terminal; else plain lines where asked for and in a notebook, or only the log."""
    return Bar() if sys.stderr.isatty() else Lines() if lines or _in_notebook() else Quiet()


def _in_notebook() -> bool:
    """Whether this is a kernel of a notebook: someone looks on, but at no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None
