"""Sampling against distributions worked out by hand, and every value that is refused."""

from __future__ import annotations

import math

import pytest
import torch

from qat.errors import UserError
from qat.serve.sampling import Sampling, TokenChooser, penalize, probabilities

# probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1
LOGITS = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()


def chances(*arguments, **options) -> list[float]:
    return [round(p, 6) for p in probabilities(LOGITS, *arguments, **options).tolist()]


def test_probabilities_are_the_softmax_at_a_temperature():
    assert chances(1.0) == [0.5, 0.25, 0.125, 0.125]
    # squares at 0.5: 16, 4, 1, 1 of 22
    assert chances(0.5) == [round(n / 22, 6) for n in (16, 4, 1, 1)]


def test_top_k_keeps_the_largest_and_shares_out_the_rest():
    assert chances(1.0, top_k=2) == [0.666667, 0.333333, 0, 0]
    assert chances(1.0, top_k=1) == [1, 0, 0, 0]
    assert chances(1.0, top_k=99) == chances(1.0)


def test_top_p_keeps_the_fewest_that_reach_it():
    assert chances(1.0, top_p=0.5) == [1, 0, 0, 0]
    assert chances(1.0, top_p=0.51) == [0.666667, 0.333333, 0, 0]
    assert chances(1.0, top_p=1e-9) == [1, 0, 0, 0]


def test_top_p_counts_shares_of_what_top_k_left():
    # after top_k=2 the first has 2/3
    assert chances(1.0, top_k=2, top_p=0.6) == [1, 0, 0, 0]


def test_top_p_is_right_when_more_tokens_are_needed_than_are_looked_at_first():
    found = probabilities(torch.zeros(2000), 1.0, top_p=0.75025)  # between 1500 and 1501 tokens
    assert int((found > 0).sum()) == 1501
    assert found.max().item() == pytest.approx(1 / 1501)


def test_tiny_temperature_gives_the_best_token_and_no_nan():
    assert chances(1e-300) == [1, 0, 0, 0]


def test_penalty_divides_positive_and_multiplies_negative_logits():
    found = penalize(torch.tensor([2.0, -1.0, 3.0, -4.0]), torch.tensor([0, 1]), 2.0)
    assert found.tolist() == [1.0, -2.0, 3.0, -4.0]


def test_penalty_counts_prompt_and_answer():
    chooser = TokenChooser(Sampling(repetition_penalty=10.0), [0])
    logits = torch.tensor([3.0, 2.0, 1.0])
    assert chooser.choose(logits) == 1
    chooser.saw([1])
    assert chooser.choose(logits) == 2


def test_draws_follow_their_probabilities_and_their_seed():
    def draws(seed: int) -> list[int]:
        chooser = TokenChooser(Sampling(temperature=1.0, seed=seed), [])
        return [chooser.choose(LOGITS) for _ in range(4000)]

    first = draws(1)
    assert first == draws(1) != draws(2)
    for token, chance in enumerate([0.5, 0.25, 0.125, 0.125]):
        # five standard deviations of a share of 4000 draws
        assert abs(first.count(token) / 4000 - chance) < 5 * math.sqrt(chance * (1 - chance) / 4000)


def test_answers_without_a_seed_differ():
    logits = torch.zeros(1000)
    draws = [TokenChooser(Sampling(temperature=1.0), []).choose(logits) for _ in range(8)]
    assert len(set(draws)) > 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 101, "1", True, None])
def test_impossible_temperatures_are_refused(value):
    with pytest.raises(UserError, match="temperature: must be a number from 0 to 100"):
        Sampling(temperature=value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("top_p", value) for value in (0, 1.5, math.nan, -1)),
        *(("top_k", value) for value in (-1, 1.5, True)),
        *(("max_tokens", value) for value in (0, -3, 2.0, "5")),
        *(("repetition_penalty", value) for value in (0, -1, math.nan, 1e9)),
        *(("seed", value) for value in (2**63, 1.5, "a")),
        *(("stop", value) for value in (("",), ("a",) * 17, ("a" * 1001,), (3,), "text")),
    ],
)
def test_other_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"^{field}: must be"):
        Sampling(**{field: value})


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(UserError, match="temperature") as caught:
        Sampling(temperature=-1, top_p=2, max_tokens=0)
    assert [line.partition(":")[0] for line in caught.value.problems] == ["max_tokens", "temperature", "top_p"]
