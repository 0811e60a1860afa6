"""Conversations: history, a full context, interrupts, and the terminal around them."""

from __future__ import annotations

import builtins
import signal

import pytest
from test_batching import Counter
from test_engine import packed_model

from qat.formats import FORMATS
from qat.serve.chat import Conversation
from qat.serve.generate import TextModel
from qat.serve.sampling import Sampling


@pytest.fixture
def talk(tiny_tokenizer) -> Conversation:
    """Answers of five tokens from a runner of 600 positions that counts on from the prompt's last token."""
    return Conversation(TextModel(Counter(), tiny_tokenizer, set(), "m"), Sampling(max_tokens=5), "Be brief.")


def contents(talk: Conversation) -> list[str]:
    return [turn["content"] for turn in talk.turns]


def test_turns_are_kept_and_forgotten(talk):
    heard: list[str] = []
    assert talk.ask("one", heard.append) == 5
    talk.ask("two", heard.append)
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 2
    assert contents(talk)[0::2] == ["one", "two"] and contents(talk)[1] in "".join(heard)
    talk.reset()
    assert talk.turns == []


def test_prompt_holds_system_message_and_all_turns(talk, tiny_tokenizer):
    talk.ask("one", lambda text: None)
    talk.turns.append({"role": "user", "content": "two"})
    text = tiny_tokenizer.decode(talk._prompt())
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none<|im_end|>")
    assert text.endswith("<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n")


def test_oldest_turns_are_dropped_and_it_is_said_when_the_context_is_full(talk, capsys):
    for number in range(6):
        talk.ask(f"{number} " + "the fox sees a lamp " * 8, lambda text: None)
    assert "the context is full: the oldest 1 question(s)" in capsys.readouterr().err
    assert contents(talk)[0][0] != "0" and contents(talk)[-2][0] == "5"


def test_question_that_never_fits_is_refused_and_forgotten(talk, capsys):
    assert talk.ask("fox lamp " * 400, lambda text: None) == 0
    assert "must fit into 600 tokens" in capsys.readouterr().err
    assert talk.turns == []
    assert talk.ask("one", lambda text: None) == 5


def test_interrupt_ends_the_answer_only(talk):
    talk.sampling = Sampling(max_tokens=20)
    run, calls = talk.model.runner.top, []

    def top(*rows):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return run(*rows)

    talk.model.runner.top = top
    assert talk.ask("one", lambda text: None) == 4
    assert len(talk.turns) == 2
    assert talk.ask("two", lambda text: None) == 20


def test_chat_verb_talks_until_exit(qat, tmp_path, tiny_model_dir, tiny_tokenizer, monkeypatch):
    FORMATS["compressed_tensors"].write(packed_model(tiny_model_dir, "w4a16_g32"), tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    lines = iter(["hello", "", "/reset", "hello", "/exit"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    code, out, error = qat("chat", tmp_path, "--max-new-tokens=6", "--positions=64")
    first, second = out.splitlines()[: len(out.splitlines()) // 2], out.splitlines()[len(out.splitlines()) // 2 :]
    assert code == 0 and first == second and first
    assert error.count("per second") == 2


def test_chat_verb_refuses_a_tokenizer_without_template(qat, tmp_path, tiny_model_dir, tiny_tokenizer):
    FORMATS["compressed_tensors"].write(packed_model(tiny_model_dir, "w4a16_g32"), tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    code, _, error = qat("chat", tmp_path)
    assert code == 2 and "must have a chat template" in error
