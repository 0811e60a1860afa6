"""Sampling against distributions worked out by hand, and every value that is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qat.errors import UserError
from qat.serve.sampling import Sampling, TokenChooser, largest, penalize, probabilities

# probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1
LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.125], dtype=np.float32))


def dense(logits, *arguments, **options) -> np.ndarray:
    """The probability of every token, [V]."""
    places, found = probabilities(logits, *arguments, **options)
    assert (np.diff(places) > 0).all()
    every = np.zeros(logits.size)
    every[places] = found
    return every


def chances(*arguments, **options) -> list[float]:
    return [round(p, 6) for p in dense(LOGITS, *arguments, **options).tolist()]


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


def test_top_p_keeps_the_lower_tokens_among_equals():
    found = dense(np.zeros(2000, dtype=np.float32), 1.0, top_p=0.75025)  # between 1500 and 1501 tokens
    assert found.nonzero()[0].tolist() == list(range(1501))
    assert found.max() == pytest.approx(1 / 1501)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99, 0.999999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 30.0])
def test_probabilities_are_those_of_sorting_every_token(spread, top_p):
    logits = (np.random.default_rng(1).standard_normal(5000) * spread).astype(np.float32)
    logits[100:200] = logits[7]  # equal ones
    for top_k in (0, 60, 3000):
        order = np.argsort(-logits, kind="stable")[: top_k or None]
        every = torch.from_numpy(logits[order]).double().div(0.7).softmax(0).numpy()
        kept = np.cumsum(every) - every < top_p
        wanted = np.zeros(5000)
        wanted[order[kept]] = every[kept] / every[kept].sum()
        found = dense(logits, 0.7, top_k=top_k, top_p=top_p)
        assert np.array_equal(found > 0, wanted > 0) and np.allclose(found, wanted, rtol=1e-9, atol=0)


def test_largest_are_the_lower_places_among_equals():
    values = np.array([3.0, 9.0, 3.0, -np.inf, 9.0, 3.0])
    wanted = [[1], [0, 1, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4, 5]]
    assert [largest(values, k).tolist() for k in (1, 3, 4, 6)] == wanted


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_k": 200, "top_p": 0.7}, {"top_k": 9999}, {"temperature": 0.0}])
def test_few_candidates_give_the_tokens_of_all_logits(options):
    sampling = Sampling(**{"temperature": 1.5, "seed": 11} | options)
    all_of_them, few = TokenChooser(sampling, []), TokenChooser(sampling, [])
    generator = np.random.default_rng(2)
    for _ in range(200):
        logits = generator.standard_normal(700).astype(np.float32).round(1)
        best = np.argsort(-logits, kind="stable")[: sampling.candidates or None]
        assert all_of_them.choose(logits) == few.choose_among(logits[best], best)


def test_tiny_temperature_gives_the_best_token_and_no_nan():
    assert chances(1e-300) == [1, 0, 0, 0]


def test_penalty_divides_positive_and_multiplies_negative_logits():
    found = penalize(np.array([2.0, -1.0, 3.0, -4.0]), np.array([0, 1]), 2.0)
    assert found.tolist() == [1.0, -2.0, 3.0, -4.0]


def test_penalty_counts_prompt_and_answer():
    chooser = TokenChooser(Sampling(repetition_penalty=10.0), [0])
    logits = np.array([3.0, 2.0, 1.0])
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
    logits = np.zeros(1000)
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
