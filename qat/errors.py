"""The one exception for a user's mistake, and the one shape its text has.

`"{where}: {wanted}, got {value}. {fix}"`. Several mistakes are reported at once. The CLI turns it into exit code 2
when nothing has been done yet (`before_work`), else 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """One or more mistakes in what the user gave; `problems` holds one line for each.

    `told_elsewhere`: another process of the same job raises the same and says it; this one ends in silence.
    """

    def __init__(self, *problems: str, before_work: bool = True, told_elsewhere: bool = False):
        self.problems = tuple(problems)
        self.before_work, self.told_elsewhere = before_work, told_elsewhere
        super().__init__("\n".join(problems))


def problem(where: str, wanted: str, got: object, fix: str) -> str:
    """One line of the project's error form."""
    return f"{where}: {wanted}, got {got}. {fix}"


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint naming the closest known spelling, or the known words."""
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean '{close[0]}'?"
    shown = ", ".join(sorted(known)[:20])
    return f"Known: {shown}."


def collected(problems: list[str], make: Callable[..., T], *given: Any) -> T | None:
    """What `make` returns; None when it raises a UserError, whose lines are added to `problems`."""
    try:
        return make(*given)
    except UserError as error:
        problems.extend(error.problems)
        return None
