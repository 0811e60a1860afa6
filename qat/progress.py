"""Progress for people: a bar on a terminal, plain lines elsewhere (log files, CI); rank 0 only; stderr.

`track` is also where a loop hears that the run was asked to stop.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from qat import signals

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process speaks for the job."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def say(text: str) -> None:
    """One line to stderr from rank 0."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


@contextmanager
def bar(title: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Yields `advance(note)`, to be called once per unit of work after the first `done`; `note` stands behind."""
    if not is_main():
        yield lambda note: None
        return
    if sys.stderr.isatty():
        yield from _terminal_bar(title, total, done)
        return
    every = max(1, total // 10)

    def advance(note: str) -> None:
        nonlocal done
        done += 1
        if done % every == 0 or done == total:
            print(f"{title}: {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance


def _terminal_bar(title: str, total: int, done: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")
        yield lambda note: progress.update(task, advance=1, note=note)


def track(items: Sequence[T], title: str) -> Iterator[T]:
    """Iterate with a progress bar; raises signals.Stopped between items. In a job, all processes go round together."""
    with bar(title, len(items)) as advance:
        for item in items:
            signals.poll()
            yield item
            advance("")
