"""Tokens -> text, a piece at a time: whole characters only, and nothing of a stop string.

A character may lie in several tokens and a stop string may begin in one and end in another. So text is held back while
it ends with an incomplete character, or with what may become a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
# A character has at most four bytes. Text whose last 16 tokens never ended with a whole character is not text at all,
# and is passed on with replacement characters.
PATIENCE = 16


class TextStream:
    """The text of one answer.

    Args:
        stops: strings before which the answer ends; the first to be complete wins.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._window: list[int] = []  # decoding starts here: tokens passed on last, for what they say about spaces
        self._passed = ""  # the text of the window that was passed on
        self._waiting = 0
        self._held = ""  # whole characters that may begin a stop string
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Text that is certain after one more token; `is_stopped` says whether a stop string was completed."""
        self._window.append(token)
        self._waiting += 1
        text = self._decode(self._window)
        if text.endswith(INCOMPLETE):
            if self._waiting < PATIENCE:
                return ""
            new = text[len(self._passed) : -1]
            self._window = self._window[-PATIENCE:]
            self._passed = self._decode(self._window)[:-1]
        else:
            new = text[len(self._passed) :]
            if new:
                self._window = self._window[-self._waiting :]
                self._passed = self._decode(self._window)
        if new:
            self._waiting = 0
        return self._until_stop(new)

    def finish(self) -> str:
        """What was held back, when no token follows; an incomplete character becomes a replacement character."""
        if self.is_stopped:
            return ""
        rest = self._until_stop(self._decode(self._window)[len(self._passed) :])
        if self.is_stopped:
            return rest
        rest, self._held = rest + self._held, ""
        return rest

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _until_stop(self, new: str) -> str:
        """Add text; give back what cannot be part of a stop string."""
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
