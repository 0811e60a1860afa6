"""An export folder ready to write text, prompts as tokens, and answers to a list of prompts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qat.config import ModelConfig
from qat.errors import UserError, problem
from qat.formats.folder import read_json
from qat.formats.packed_model import PackedModel
from qat.models import load_tokenizer
from qat.serve.batching import Event, Sequence, run_to_end
from qat.serve.load import read_export
from qat.serve.runner import open_runner
from qat.serve.sampling import Sampling

Messages = list[dict[str, str]]


def end_tokens(packed: PackedModel, tokenizer: Any, folder: Path) -> set[int]:
    """Tokens that end an answer: those of the tokenizer, of config.json and of generation_config.json."""
    file = folder / "generation_config.json"
    held = [packed.config, read_json(file) if file.is_file() else {}, {"eos_token_id": tokenizer.eos_token_id}]
    ends: set[int] = set()
    for config in held:
        tokens = config.get("eos_token_id")
        ends.update(tokens if isinstance(tokens, list) else [] if tokens is None else [tokens])
    return ends


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that is to be gone on with, begun as the tokenizer begins texts."""
    return _encode(tokenizer, text, True)


def encode_chat(tokenizer: Any, messages: Messages) -> list[int]:
    """Tokens of a conversation (dicts of role and content) and of the beginning of the assistant's next turn.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        fix = "Complete a plain text instead: qat generate, or /v1/completions."
        raise UserError(problem("messages", "the tokenizer must have a chat template", "none", fix))
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is the model's own program, and raises what it likes
        fix = "Change roles or order of the messages."
        raise UserError(problem("messages", "must suit the model's chat template", error, fix)) from None
    return _encode(tokenizer, text, False)  # the template writes the special tokens


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(problem("prompt", "must be Unicode text", error, "Remove half surrogate pairs.")) from None
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt as the user's turn when the tokenizer has a chat template, else as plain text."""
    if tokenizer.chat_template:
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    return encode_text(tokenizer, prompt)


@dataclass
class TextModel:
    """A runner (see `runner.py`), its tokenizer, and the tokens that end an answer."""

    runner: Any
    tokenizer: Any
    ends: set[int]
    name: str


def open_model(folder: Path, positions: int, slots: int, backend: str = "auto") -> TextModel:
    """An export folder with `slots` sequences of up to `positions` tokens at a time."""
    packed = read_export(folder)
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    ends = end_tokens(packed, tokenizer, folder)
    return TextModel(open_runner(packed, positions, slots, backend), tokenizer, ends, folder.resolve().name)


def reply(
    folder: Path,
    prompts: list[str],
    sampling: Sampling,
    backend: str = "auto",
    listen: Callable[[str], None] | None = None,
) -> tuple[list[str], int, float]:
    """One answer per prompt of an export folder, all decoded together; tokens of all answers; seconds without loading.

    Args:
        sampling: prompt number n is sampled with its seed plus n.
        backend: auto (the engine if it can), or a kernel of `kernels.dispatch` under transformers.
        listen: called with each piece of text of the first answer.
    Raises:
        UserError: an answer failed; the text names its prompt.
    """
    packed = read_export(folder)
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    runner = open_runner(packed, max(map(len, ids)) + sampling.max_tokens, len(ids), backend)
    events: list[list[Event]] = [[] for _ in prompts]
    sequences = []
    for number, tokens in enumerate(ids):
        options = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number)
        hear = _ear(events[number], listen if number == 0 else None)
        sequences.append(Sequence(tokens, options, tokenizer, hear))
    started = time.perf_counter()
    run_to_end(runner, sequences, end_tokens(packed, tokenizer, folder))
    seconds = time.perf_counter() - started
    for prompt, heard in zip(prompts, events, strict=True):
        if heard[-1].error:
            fix = "Verify the export: qat verify FOLDER."
            raise UserError(problem(f"answer to {prompt[:40]!r}", "must be computable", heard[-1].error, fix))
    answers = ["".join(event.text for event in heard).strip() for heard in events]
    return answers, sum(len(sequence.answer) for sequence in sequences), seconds


def _ear(heard: list[Event], listen: Callable[[str], None] | None) -> Callable[[Event], None]:
    """Keeps events, and passes their text on."""

    def hear(event: Event) -> None:
        heard.append(event)
        if listen and event.text:
            listen(event.text)

    return hear
