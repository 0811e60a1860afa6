"""Being asked to stop: SIGTERM, SIGUSR1 or SIGUSR2 from a cluster, Ctrl-C from a person.

A handler only notes the signal. Every loop of a run polls it, all processes of the job together, so that a signal to
one process stops all of them at the same place and nobody waits for a rank that is gone. A second Ctrl-C stops at once.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from qat import ranks

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
INTERRUPTED, PREEMPTED = 1, 2  # the larger one wins when processes disagree

_state = {"request": 0, "owner": 0}


class Stopped(Exception):
    """The run was asked to stop and can be resumed. `status` is what run_status.json says."""

    def __init__(self, request: int):
        self.status = "preempted" if request == PREEMPTED else "interrupted"
        self.exit_code = 75 if request == PREEMPTED else 130
        super().__init__(f"{self.status}; resume it with `qat resume`")


def listen() -> None:
    """Install the handlers in this process, over any that a library has put there since."""
    _state["owner"] = os.getpid()
    for number in REQUESTS:
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state["owner"]:  # a forked loader worker; its parent decides
        return
    if number == signal.SIGINT and _state["request"]:
        raise KeyboardInterrupt
    _state["request"] = max(_state["request"], INTERRUPTED if number == signal.SIGINT else PREEMPTED)


def forget() -> None:
    """A new run begins."""
    _state["request"] = 0


def requested() -> int:
    """0, INTERRUPTED or PREEMPTED: the same on every process of the job, which all must ask."""
    return ranks.largest(_state["request"])


def poll() -> None:
    """Raise Stopped on every process when any of them was asked to stop; all must call."""
    request = requested()
    if request:
        raise Stopped(request)
