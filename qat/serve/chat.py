"""A conversation of several turns with one model; its oldest turns are dropped when the context is full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qat.errors import UserError, problem
from qat.progress import say
from qat.serve.batching import Batch, Event, Sequence, check_fits
from qat.serve.generate import Messages, TextModel, encode_chat
from qat.serve.sampling import Sampling


class Conversation:
    """Turns so far, the system message first if there is one.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(self, model: TextModel, sampling: Sampling, system: str | None = None):
        self.model, self.sampling = model, sampling
        self._begin: Messages = [{"role": "system", "content": system}] if system else []
        self.turns: Messages = []
        encode_chat(model.tokenizer, [*self._begin, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Forget every turn."""
        self.turns = []

    def ask(self, question: str, listen: Callable[[str], None]) -> int:
        """Answer a question, `listen` being called with each piece of text; how many tokens the answer has.

        An interrupt (Ctrl-C) ends the answer, which stays in the conversation as far as it came. A question that can
        not be answered is said to be so, and forgotten.
        """
        self.turns.append({"role": "user", "content": question})
        heard: list[Event] = []

        def hear(event: Event) -> None:
            heard.append(event)
            listen(event.text)

        try:
            sequence = Sequence(self._prompt(), self._options(), self.model.tokenizer, hear)
            check_fits(sequence.prompt, sequence.sampling, self.model.runner)
        except UserError as error:
            self.turns.pop()
            say(f"error: {error}")
            return 0
        self._run(sequence)
        if heard[-1].error:
            self.turns.pop()
            say(f"error: {problem('answer', 'must be computable', heard[-1].error, 'Verify the export.')}")
            return 0
        self.turns.append({"role": "assistant", "content": "".join(event.text for event in heard).strip()})
        return len(sequence.answer)

    def _run(self, sequence: Sequence) -> None:
        batch = Batch(self.model.runner, self.model.ends)
        batch.add(sequence)
        while batch.slots:
            try:
                batch.step()
            except KeyboardInterrupt:
                sequence.is_cancelled = True

    def _options(self) -> Sampling:
        """Each turn is drawn with a seed of its own."""
        seed = self.sampling.seed
        return self.sampling if seed is None else replace(self.sampling, seed=seed + len(self.turns))

    def _prompt(self) -> list[int]:
        """Tokens of the conversation, without the oldest turns if all of them leave no room for an answer."""
        dropped = 0
        while True:
            ids = encode_chat(self.model.tokenizer, [*self._begin, *self.turns])
            if len(ids) + self.sampling.max_tokens <= self.model.runner.positions or len(self.turns) == 1:
                break
            self.turns, dropped = self.turns[2:], dropped + 1
        if dropped:
            say(f"the context is full: the oldest {dropped} question(s) with their answers are forgotten")
        return ids
