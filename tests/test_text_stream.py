"""Text a piece at a time: the pieces make the whole, no half character, nothing of a stop string."""

from __future__ import annotations

import random

import pytest

from qat.serve.text_stream import TextStream

TEXT = "The miller sees 三 apples, l’été 🦊🦊 at dawn. "


def pieces(tokenizer, ids, stops=()) -> list[str]:
    stream = TextStream(tokenizer, stops)
    found = []
    for token in ids:
        found.append(stream.push(token))
        if stream.is_stopped:
            return found
    return [*found, stream.finish()]


def test_pieces_are_whole_characters_and_make_the_text(tiny_tokenizer):
    ids = tiny_tokenizer(TEXT * 3)["input_ids"]
    found = pieces(tiny_tokenizer, ids)
    assert "".join(found) == TEXT * 3
    assert not any("\ufffd" in piece for piece in found)
    # the fox has four bytes, and this tokenizer no token for it
    assert found.count("") >= 3 * 6


def test_pieces_of_random_bytes_make_what_decoding_at_once_makes(tiny_tokenizer):
    rng = random.Random(0)
    for length in (1, 7, 200):
        ids = [rng.randrange(3, 300) for _ in range(length)]
        assert "".join(pieces(tiny_tokenizer, ids)) == tiny_tokenizer.decode(ids)


def test_text_that_never_is_text_is_passed_on_in_time(tiny_tokenizer):
    lead_byte = tiny_tokenizer.convert_tokens_to_ids("ð")  # byte 0xF0 begins a character of four bytes
    found = pieces(tiny_tokenizer, [lead_byte] * 100)
    assert "".join(found) == tiny_tokenizer.decode([lead_byte] * 100) == "\ufffd" * 100
    assert found[15]


def test_answer_cut_inside_a_character_ends_with_a_replacement(tiny_tokenizer):
    ids = tiny_tokenizer("ab 🦊")["input_ids"][:-1]
    assert "".join(pieces(tiny_tokenizer, ids)) == "ab \ufffd"


@pytest.mark.parametrize("stop", ["apples", "🦊 at", "The", "dawn. The mill", " "])
def test_text_ends_before_a_stop_string_wherever_tokens_end(tiny_tokenizer, stop):
    found = pieces(tiny_tokenizer, tiny_tokenizer(TEXT * 2)["input_ids"], [stop])
    assert "".join(found) == (TEXT * 2).partition(stop)[0]


def test_first_stop_string_of_several_ends_the_text(tiny_tokenizer):
    found = pieces(tiny_tokenizer, tiny_tokenizer(TEXT)["input_ids"], ["zebra", "sees", "miller"])
    assert "".join(found) == "The "


def test_begin_of_a_stop_string_is_given_back_when_the_rest_does_not_come(tiny_tokenizer):
    ids = tiny_tokenizer("the old king and the old")["input_ids"]
    found = pieces(tiny_tokenizer, ids, ["the old fox"])
    assert "".join(found) == "the old king and the old"
    assert found[-1].endswith("the old")


def test_special_tokens_are_no_text(tiny_tokenizer):
    ids = [tiny_tokenizer.eos_token_id, *tiny_tokenizer("a fox")["input_ids"], tiny_tokenizer.pad_token_id]
    assert "".join(pieces(tiny_tokenizer, ids)) == "a fox"
