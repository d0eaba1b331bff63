"""Work in a child process, which leaves nothing behind in this one."""

import os
import pickle
import traceback
from collections.abc import Callable
from typing import TypeVar

from tightrope.spaces.errors import DeviceError

T = TypeVar("T")


def apart(work: Callable[[], T]) -> T:
    """What `work` returns, done by a fork of this process where the system has forks, which ends before this returns.

    Raises:
        DeviceError: it failed there; the message holds the traceback.
    """
    if not hasattr(os, "fork"):
        return work()
    given, taken = os.pipe()
    child = os.fork()
    if child == 0:
        _child(work, taken)
    os.close(taken)
    with os.fdopen(given, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if not data:
        raise DeviceError(f"a process that timed ended without a result, with status {os.waitstatus_to_exitcode(status)}")
    done, value = pickle.loads(data)  # of our own making
    if not done:
        raise DeviceError(f"a process that timed failed: {value}")
    result: T = value
    return result


def _child(work: Callable[[], object], taken: int) -> None:
    """Do the work, hand over what comes of it, and end without running anybody's exit handlers."""
    try:
        try:
            answer = True, work()
        except Exception:  # whatever it is, the parent has to say it
            answer = False, traceback.format_exc()
        with os.fdopen(taken, "wb") as pipe:
            pickle.dump(answer, pipe)
    finally:
        os._exit(0)
