"""Continuous batching: sequences join and leave the slots of an engine between its steps.

`Batch` is one step after another, without threads: a step runs the next tokens of all decoding sequences and pieces of
waiting prompts in one call, so that a long prompt never stops the others for longer than one piece. `Service` is the
same behind a queue, with the one thread that owns the engine.

Pieces of a prompt are cut at the same places whatever else runs, and each sequence has its own random generator: its
tokens are those it would get alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qat.errors import UserError, problem
from qat.serve.sampling import Sampling, TokenChooser
from qat.serve.text_stream import TextStream

PIECE = 128  # prompt tokens of one step


@dataclass(frozen=True)
class Event:
    """What happened to a sequence: one more token with the text that is certain now, or its end.

    `finish` is stop, length, cancelled or error (then `text` of the last event says nothing and `error` says why).
    """

    text: str
    token: int | None = None
    finish: str | None = None
    error: str | None = None


class Sequence:
    """One prompt and its answer.

    Args:
        listen: called with every Event, in order, from the thread that steps.
    """

    def __init__(self, prompt: list[int], sampling: Sampling, tokenizer: Any, listen: Callable[[Event], None]):
        self.prompt, self.sampling, self.listen = prompt, sampling, listen
        self.answer: list[int] = []
        self.chooser = TokenChooser(sampling, prompt)
        self.stream = TextStream(tokenizer, sampling.stop)
        self.done = 0  # tokens of the prompt that are cached
        self.is_cancelled = False
        self.finish: str | None = None

    @property
    def is_decoding(self) -> bool:
        """Whether the whole prompt is cached."""
        return self.done == len(self.prompt)

    def rows(self) -> list[int]:
        """Tokens to run next: a piece of the prompt, or the latest token of the answer."""
        return self.answer[-1:] if self.is_decoding else self.prompt[self.done : self.done + PIECE]

    def position(self) -> int:
        """Where the first of `rows` stands."""
        return self.done + len(self.answer) - 1 if self.is_decoding else self.done


def check_fits(prompt: list[int], sampling: Sampling, runner: Any) -> None:
    """Raises UserError unless the prompt has tokens that exist, and fits into a slot together with its answer."""
    if not prompt:
        raise UserError(problem("prompt", "must have at least one token", "none", "Write something."))
    wrong = [token for token in prompt if not 0 <= token < runner.vocabulary]
    if wrong:
        fix = "Use the tokenizer of this model."
        raise UserError(problem("prompt", f"tokens must be from 0 to {runner.vocabulary - 1}", wrong[0], fix))
    if len(prompt) + sampling.max_tokens > runner.positions:
        given = f"a prompt of {len(prompt)} and an answer of up to {sampling.max_tokens}"
        wanted = f"prompt and answer must fit into {runner.positions} tokens"
        raise UserError(problem("context", wanted, given, "Shorten the prompt or lower max_tokens."))


class Batch:
    """The sequences in the slots of a runner (`Engine`, or another with its methods)."""

    def __init__(self, runner: Any, ends: Iterable[int]):
        self.runner, self.ends = runner, frozenset(ends)
        self.slots: dict[int, Sequence] = {}

    @property
    def free(self) -> int:
        """Slots without a sequence."""
        return self.runner.slots - len(self.slots)

    def add(self, sequence: Sequence) -> None:
        """Give a checked sequence a free slot."""
        slot = next(slot for slot in range(self.runner.slots) if slot not in self.slots)
        self.slots[slot] = sequence

    def step(self) -> None:
        """One call of the runner; its new tokens reach their listeners, and sequences that ended leave."""
        for slot, sequence in list(self.slots.items()):
            if sequence.is_cancelled:
                self._end(slot, "cancelled")
        chosen = self._chosen()
        if not chosen:
            return
        for slot, token in self._run(chosen):
            if token is None:
                self._end(slot, "error", "the model's logits are not finite numbers")
            else:
                self._take(slot, token)

    def fail(self, error: str) -> None:
        """End every sequence with an error."""
        for slot in list(self.slots):
            self._end(slot, "error", error)

    def _chosen(self) -> list[int]:
        """Slots of this step: all that decode, and prompts in their order of arrival while one piece has room."""
        decoding = [slot for slot, sequence in self.slots.items() if sequence.is_decoding]
        room, prompts = PIECE, []
        for slot, sequence in self.slots.items():
            if not sequence.is_decoding:
                room -= len(sequence.rows())
                if room < 0:
                    break
                prompts.append(slot)
        return [*decoding, *prompts]

    @torch.no_grad()
    def _run(self, chosen: list[int]) -> list[tuple[int, int | None]]:
        """Run the rows of the chosen slots; a token, or None for logits that are no numbers, where one was due."""
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        scored: list[int] = []
        due: list[int] = []
        for slot in chosen:
            sequence = self.slots[slot]
            rows, start = sequence.rows(), sequence.position()
            ids += rows
            slots += [slot] * len(rows)
            positions += range(start, start + len(rows))
            if not sequence.is_decoding:
                sequence.done += len(rows)
            if sequence.is_decoding:
                scored.append(len(ids) - 1)
                due.append(slot)
        rows_and_scored = [torch.tensor(numbers, dtype=torch.long) for numbers in (ids, slots, positions, scored)]
        choosers = [self.slots[slot].chooser for slot in due]
        counts = [chooser.sampling.candidates for chooser in choosers]
        if 0 in counts:
            logits = self.runner.forward(*rows_and_scored).numpy()
            tokens = [
                c.choose(row) if np.isfinite(row).all() else None for c, row in zip(choosers, logits, strict=True)
            ]
        else:
            most = min(self.runner.vocabulary, max(counts, default=1))
            values, best = (part.numpy() for part in self.runner.top(*rows_and_scored, most))
            tokens = [
                c.choose_among(row[:count], ids[:count]) if np.isfinite(row[:count]).all() else None
                for c, row, ids, count in zip(choosers, values, best, counts, strict=True)
            ]
        return list(zip(due, tokens, strict=True))

    def _take(self, slot: int, token: int) -> None:
        sequence = self.slots[slot]
        sequence.answer.append(token)
        sequence.chooser.saw([token])
        if token in self.ends:
            self._end(slot, "stop", token=token)
            return
        text = sequence.stream.push(token)
        if sequence.stream.is_stopped:
            self._end(slot, "stop", text=text, token=token)
        elif len(sequence.answer) >= sequence.sampling.max_tokens:
            self._end(slot, "length", text=text, token=token)
        else:
            self._tell(sequence, Event(text, token))

    def _end(self, slot: int, finish: str, error: str | None = None, text: str = "", token: int | None = None) -> None:
        sequence = self.slots.pop(slot)
        if finish in ("stop", "length"):
            text += sequence.stream.finish()
            # the rest may complete a stop string
            finish = "stop" if sequence.stream.is_stopped else finish
        end(sequence, Event(text, token, finish, error))

    def _tell(self, sequence: Sequence, event: Event) -> None:
        try:
            sequence.listen(event)
        except Exception:  # its listener is gone: that is the end of this sequence only
            sequence.is_cancelled = True


def end(sequence: Sequence, event: Event) -> None:
    """Tell a sequence that it is over."""
    sequence.finish = event.finish
    try:
        sequence.listen(event)
    except Exception:  # nobody is left to be told
        sequence.is_cancelled = True


def run_to_end(runner: Any, sequences: list[Sequence], ends: Iterable[int]) -> None:
    """Step until every sequence has ended; those without a slot wait for one."""
    for sequence in sequences:
        check_fits(sequence.prompt, sequence.sampling, runner)
    batch, waiting = Batch(runner, ends), deque(sequences)
    while waiting or batch.slots:
        while waiting and batch.free:
            batch.add(waiting.popleft())
        batch.step()


class QueueFull(Exception):
    """As many sequences wait as may."""


class Draining(Exception):
    """The service takes no more sequences."""


class Service:
    """A batch behind a bounded queue, with the thread that owns it.

    Args:
        ends: tokens that end an answer.
        queue: sequences that may wait while all slots are taken.
    """

    def __init__(self, runner: Any, tokenizer: Any, ends: Iterable[int], queue: int = 64):
        self.runner, self.tokenizer, self.queue = runner, tokenizer, queue
        self._batch = Batch(runner, ends)
        self._waiting: deque[Sequence] = deque()
        self._changed = threading.Condition()
        self._is_draining = self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Slots with a sequence."""
        return len(self._batch.slots)

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def is_draining(self) -> bool:
        """Whether new sequences are refused for good."""
        return self._is_draining

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, prompt: list[int], sampling: Sampling, listen: Callable[[Event], None]) -> Sequence:
        """Queue a prompt; `listen` is called from the service's thread and must not wait.

        Raises:
            UserError: it does not fit into a slot.
            QueueFull, Draining: it cannot be taken now, or not any more.
        """
        check_fits(prompt, sampling, self.runner)
        sequence = Sequence(prompt, sampling, self.tokenizer, listen)
        with self._changed:
            if self._is_draining:
                raise Draining
            if len(self._waiting) - self._batch.free >= self.queue:
                raise QueueFull
            self._waiting.append(sequence)
            self._changed.notify()
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence before its next token; one that has ended stays as it is."""
        with self._changed:
            sequence.is_cancelled = True
            self._changed.notify()

    def drain(self, seconds: float) -> bool:
        """Refuse new sequences and wait for those taken; whether all ended in time. The others are cancelled."""
        with self._changed:
            self._is_draining = True
        limit = time.monotonic() + seconds
        while (self.active or self.waiting) and time.monotonic() < limit:
            time.sleep(0.02)
        is_empty = not (self.active or self.waiting)
        self.close()
        return is_empty

    def cancel_all(self) -> None:
        """Cancel everything before its next token, for good: the thread ends soon, and so does a `drain`."""
        with self._changed:
            self._is_draining = self._is_closed = True
            self._changed.notify()

    def close(self) -> None:
        """Cancel everything and end the thread."""
        self.cancel_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._batch.slots or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    for sequence in [*self._waiting, *self._batch.slots.values()]:
                        sequence.is_cancelled = True
                self._admit()
                if self._is_closed and not self._batch.slots and not self._waiting:
                    return
            try:
                self._batch.step()
            except Exception as error:  # the kernels refused: these sequences fail, the service goes on
                self._batch.fail(f"{type(error).__name__}: {error}")

    def _admit(self) -> None:
        """Fill free slots in order of arrival; cancelled ones leave the queue wherever they stand."""
        for sequence in [sequence for sequence in self._waiting if sequence.is_cancelled]:
            self._waiting.remove(sequence)
            end(sequence, Event("", finish="cancelled"))
        while self._waiting and self._batch.free:
            self._batch.add(self._waiting.popleft())
