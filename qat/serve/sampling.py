"""How the next token is chosen from logits: greedy, or drawn after penalty, temperature, top-k and top-p in turn.

Every sequence has its own options, penalty and random generator, so that its tokens do not depend on what else is
decoded in the same step. Everything here runs on one thread: torch would share a vocabulary out among threads, and each
such region waits for a core that is busy. Letter: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qat.errors import UserError, problem

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 1000
SEEDS = 2**63
MOST_CANDIDATES = 1024  # what an engine gives at most


@dataclass(frozen=True)
class Sampling:
    """Options of one answer.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token. `repetition_penalty` divides the positive and
    multiplies the negative logits of tokens that prompt or answer hold already (Keskar et al., arXiv:1909.05858,
    sec. 4.1). Without a `seed` every answer is drawn anew. The answer ends before the first of the `stop` strings.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError with a line for every value out of its range; NaN is out of every range."""
        problems = [
            problem(name, wanted, repr(getattr(self, name)), "Leave it out for the default.")
            for name, wanted, is_right in self._checks()
            if not is_right
        ]
        if problems:
            raise UserError(*problems)

    def _checks(self) -> list[tuple[str, str, bool]]:
        stops = self.stop
        stop_is_right = isinstance(stops, tuple) and len(stops) <= MAX_STOPS
        stop_is_right = stop_is_right and all(
            isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops
        )
        stop_wanted = f"must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
        return [
            ("max_tokens", "must be a whole number of at least 1", _whole(self.max_tokens, 1, math.inf)),
            ("temperature", "must be a number from 0 to 100", _number(self.temperature, 0, 100)),
            ("top_k", "must be a whole number of at least 0", _whole(self.top_k, 0, math.inf)),
            ("top_p", "must be a number above 0 and at most 1", _number(self.top_p, 0, 1) and self.top_p > 0),
            ("repetition_penalty", "must be a number from 0.01 to 100", _number(self.repetition_penalty, 0.01, 100)),
            ("seed", "must be a whole number of 64 bits", self.seed is None or _whole(self.seed, -SEEDS, SEEDS - 1)),
            ("stop", stop_wanted, stop_is_right),
        ]

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    @property
    def candidates(self) -> int:
        """How many of the largest logits decide on a token; 0 when all of them do."""
        if self.repetition_penalty != 1 or not (self.is_greedy or 0 < self.top_k <= MOST_CANDIDATES):
            return 0
        return 1 if self.is_greedy else self.top_k


def _whole(value: object, low: float, high: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def penalize(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Logits [V] with those of the tokens `seen` [n] divided (positive) or multiplied (negative) by the penalty."""
    values = logits[seen]
    logits = logits.copy()
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """Places of the k largest of values [n] without NaN, in order of place, the lower one among equals: [k]."""
    if k >= values.size:
        return np.arange(values.size)
    return _from(values, np.partition(values, values.size - k)[values.size - k], k)


def _from(values: np.ndarray, least: float, k: int) -> np.ndarray:
    """Places of the k largest of values [n] when `least` is the smallest of them."""
    places = np.flatnonzero(values > least)
    return np.sort(np.concatenate([places, np.flatnonzero(values == least)[: k - places.size]]))


def probabilities(
    logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The places in logits [n] that can be drawn, in order [m], and the probability of each, [m] float64 with sum 1.

    The `top_k` largest logits stay, then the fewest of them, largest first, whose probabilities together reach `top_p`.
    Among equals the lower place comes first.
    """
    places = largest(logits, top_k or logits.size)
    kept = (logits if places.size == logits.size else logits[places]).astype(np.float64)
    # the largest first becomes 0: a tiny temperature then gives -inf for the others and never NaN
    with np.errstate(over="ignore"):
        chances = np.exp((kept - kept.max()) / temperature)
    chances /= chances.sum()
    if top_p == 1:
        return places, chances
    # tokens below this chance reach less than 1 - top_p together, so none of them is needed; few are above it
    values = np.sort(chances[chances >= (1 - top_p) / chances.size])[::-1]
    count = int(np.count_nonzero(values.cumsum() - values < top_p))
    needed = _from(chances, values[count - 1], count)
    return places[needed], chances[needed] / chances[needed].sum()


class TokenChooser:
    """The choices of one sequence: its options, what it has seen, and its random generator."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]):
        self.sampling = sampling
        self._seen: set[int] = set()
        self._seen_tokens = np.empty(0, dtype=np.int64)
        self.saw(prompt)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: np.ndarray) -> int:
        """The next token from finite logits [V]."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            logits = penalize(logits, self._seen_tokens, sampling.repetition_penalty)
        if sampling.is_greedy:
            return int(logits.argmax())
        return self._draw(*probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p))

    def choose_among(self, logits: np.ndarray, tokens: np.ndarray) -> int:
        """The same token from the `sampling.candidates` largest logits alone, and their tokens, both best first."""
        sampling = self.sampling
        if sampling.is_greedy:
            return int(tokens[0])
        order = np.argsort(tokens)
        places, chances = probabilities(logits[order], sampling.temperature, 0, sampling.top_p)
        return self._draw(tokens[order][places], chances)

    def _draw(self, tokens: np.ndarray, chances: np.ndarray) -> int:
        # the first token whose sum of chances is beyond one random number: a number per token would cost a millisecond
        sums = chances.cumsum()
        drawn = float(torch.rand(1, generator=self._generator, dtype=torch.float64)) * sums[-1]
        return int(tokens[np.searchsorted(sums, drawn, side="right")])

    def saw(self, tokens: Iterable[int]) -> None:
        """Count tokens of the answer among those to be penalized."""
        new = [token for token in dict.fromkeys(tokens) if token not in self._seen]
        if new:
            self._seen.update(new)
            self._seen_tokens = np.append(self._seen_tokens, new)
