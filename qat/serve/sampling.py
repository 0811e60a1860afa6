"""How the next token is chosen from logits: greedy, or drawn after penalty, temperature, top-k and top-p in turn.

Every sequence has its own options, penalty and random generator, so that its tokens do not depend on what else is
decoded in the same step. Letter: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import UserError, problem

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 1000
SEEDS = 2**63
ENOUGH = 512


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
    def needs_logits(self) -> bool:
        """Whether the token cannot be chosen by the engine itself."""
        return not self.is_greedy or self.repetition_penalty != 1


def _whole(value: object, low: float, high: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [V] with those of the tokens `seen` [n] divided (positive) or multiplied (negative) by the penalty."""
    values = logits[seen]
    return logits.index_put((seen,), torch.where(values > 0, values / penalty, values * penalty))


def probabilities(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities [V] of drawing each token from logits [V]; they sum to 1.

    The `top_k` largest logits stay, then the fewest of them, largest first, whose probabilities together reach `top_p`.
    """
    # the largest first becomes 0: a tiny temperature then gives -inf for the others and never NaN
    logits = (logits.double() - logits.max()) / temperature
    if top_k and top_k < logits.numel():
        values, order = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).index_put((order,), values)
    chances = logits.softmax(0)
    if top_p == 1:
        return chances
    # sorting a whole vocabulary takes longer than a step of a small model, and few tokens usually are enough
    values, order = chances.topk(min(ENOUGH, chances.numel()))
    if values.sum() < top_p:
        values, order = chances.sort(descending=True)
    kept = torch.where(values.cumsum(0) - values < top_p, values, 0.0)
    return torch.zeros_like(chances).index_put((order,), kept / kept.sum())


class TokenChooser:
    """The choices of one sequence: its options, what it has seen, and its random generator."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]):
        self.sampling = sampling
        self._seen = set(prompt)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """The next token from finite logits [V]."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            logits = penalize(logits, torch.tensor(sorted(self._seen)), sampling.repetition_penalty)
        if sampling.is_greedy:
            return int(logits.argmax())
        chances = probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)
        return int(torch.multinomial(chances, 1, generator=self._generator))

    def saw(self, tokens: Iterable[int]) -> None:
        """Count tokens of the answer among those to be penalized."""
        self._seen.update(tokens)
