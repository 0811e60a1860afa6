"""A run that ended worse than it began says so first, with the signs that its files hold; a good one says nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat.report.diagnosis import diagnosis
from qat.report.record import RunRecord


def record(validation: list[float], packed: float = 30.0, rtn: float = 40.0, flip: float = 0.01, drift: float = 0.1):
    results = {"perplexity": {"float": 20.0, "control": 20.0, "rtn_of_control": rtn, "packed": packed}}
    layers = [
        {"step": s, "layers": {"a": {"flip_rate": flip if s else None, "scale_drift": drift}}} for s in (0, 9, 19)
    ]
    return RunRecord(
        Path(),
        results=results,
        metrics={
            "validation": [{"step": 10 * i, "perplexity": value} for i, value in enumerate(validation)],
            "train": [{"step": step, "lr": 1e-4, "loss": 3.0 - 0.1 * step} for step in range(1, 20)],
            "layers": layers,
        },
    )


def test_run_that_is_better_than_its_start_and_than_rounding_says_nothing():
    assert diagnosis(record([35.0, 31.0, 30.0], flip=0.5, drift=2.0)) == []


def test_worse_than_the_start_is_said_before_the_signs():
    lines = diagnosis(record([25.0, 31.0, 30.0]))
    assert lines[0] == "Training made the model worse than it began: validation perplexity 25.00, then 30.00."
    assert "No sign of why" in lines[1]


@pytest.mark.parametrize(
    ("changed", "sign"),
    [
        ({"flip": 0.2}, "20.0% of the codes changed between two looks, at a peak rate of 0.0001: lower optim.lr"),
        ({"flip": 1e-6}, "only 0.0001% of the codes changed"),
        ({"drift": 0.8}, "scales ended 80% from where they began: lower optim.scale_lr"),
        ({"validation": [40.0, 30.0, 45.0]}, "validation fell to 30.00 and rose to 45.00 while the loss fell"),
    ],
)
def test_sign_is_told_when_rounding_was_better(changed, sign):
    lines = diagnosis(record(**{"validation": [50.0, 46.0, 45.0], "packed": 45.0, **changed}))
    assert any(sign in line for line in lines), lines


def test_text_seen_twice_or_held_out_text_in_it_are_signs():
    found = record([50.0, 45.0], packed=45.0)
    assert found.results is not None
    found.results |= {"notes": ["the training text (100 tokens) was seen 9.0 times"], "overlap": {"share": 0.3}}
    lines = " ".join(diagnosis(found))
    assert "seen 9.0 times" in lines and "30.0% of the held-out runs" in lines
