"""Specs, schemes and plans: what is refused, and the few numbers they answer."""

from __future__ import annotations

import pytest

from qat.errors import UserError
from qat.scheme import PlanRule, QuantPlan, QuantScheme, QuantSpec, indivisible

W4, W8 = QuantScheme("w4", QuantSpec(4, granularity="group", group_size=32)), QuantScheme("w8", QuantSpec(8))


def test_spec_reports_every_mistake_at_once():
    with pytest.raises(UserError, match="bits") as caught:
        QuantSpec(9, granularity="chanel", group_size=4, scale_dtype="float16")
    fields = [line.split(":")[0] for line in caught.value.problems]
    assert fields == ["bits", "granularity", "group_size", "scale_dtype"]
    assert "Did you mean 'channel'?" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits: must be a whole number from 2 to 8, got 1"),
        ({"bits": True}, "bits: must be a whole number"),
        ({"bits": 4.0}, "bits: must be a whole number"),
        ({"bits": 4, "granularity": "group"}, "group_size: granularity=group needs a positive size, got None"),
        ({"bits": 4, "granularity": "group", "group_size": 0}, "needs a positive size, got 0"),
        ({"bits": 4, "group_size": 32}, "granularity=channel takes no group size, got 32"),
        ({"bits": 8, "granularity": "token"}, "dynamic: per-token scales exist only at run time"),
    ],
)
def test_spec_refuses_impossible_grids(fields, message):
    with pytest.raises(UserError, match=message):
        QuantSpec(**fields)


def test_scale_shape_follows_the_granularity():
    assert QuantSpec(4, granularity="tensor").scale_shape((3, 5, 64)) == (1, 1, 1)
    assert QuantSpec(4, granularity="channel").scale_shape((3, 5, 64)) == (3, 5, 1)
    assert QuantSpec(4, granularity="group", group_size=32).scale_shape((5, 64)) == (5, 2)


def test_packed_bytes_match_hand_counts():
    assert QuantSpec(4).packed_bytes((5, 33)) == 5 * 17 + 2 * 5
    assert QuantSpec(3, False, "group", 32).packed_bytes((5, 64)) == 5 * 24 + 2 * 10 + 4  # 10 zero points of 3 bits
    assert QuantSpec(8, False, "tensor").packed_bytes((2, 3, 7)) == 42 + 2 + 1


def test_describe_reads_as_the_field_says_it():
    assert QuantSpec(4, granularity="group", group_size=32).describe() == "int4 sym g32"
    assert QuantSpec(8, False, "token", dynamic=True).describe() == "int8 asym token"
    assert QuantSpec(8, True, "tensor", dynamic=True).describe() == "int8 sym tensor dynamic"


def test_scheme_refuses_per_token_weights_and_grouped_inputs():
    token = QuantSpec(8, granularity="token", dynamic=True)
    with pytest.raises(UserError, match="scheme x: weights have no tokens"):
        QuantScheme("x", token)
    with pytest.raises(UserError, match=r"scheme x\.input: inputs are quantized per token or per tensor, got channel"):
        QuantScheme("x", QuantSpec(8), QuantSpec(8, is_activation=True))


def test_plan_takes_the_first_rule_that_matches_the_whole_name():
    plan = QuantPlan((PlanRule("*.2.*", None), PlanRule("model.layers.*", W8)), W4, W8)
    assert plan.scheme_for("model.layers.2.q", False) == (None, "rule '*.2.*'")
    assert plan.scheme_for("model.layers.20.q", False) == (W8, "rule 'model.layers.*'")
    assert plan.scheme_for("other", False) == (W4, "scheme")
    assert plan.scheme_for("other", True) == (W8, "plan.embedding")


def test_plan_reports_each_rule_without_a_match_and_the_nearest_name():
    plan = QuantPlan((PlanRule("lm_haed", None), PlanRule("lm_head", None), PlanRule("head", None)), W4, None)
    problems = plan.check_rules(["lm_head", "model.layers.0.q_proj"])
    assert [line.split("'")[1] for line in problems] == ["lm_haed", "head"]
    assert "Did you mean 'lm_head'?" in problems[0]


def test_indivisible_lists_all_layers_with_sizes_that_work():
    problems = indivisible({"a": (48, W4.weight), "b": (64, W4.weight), "c": (33, W4.weight), "d": (33, W8.weight)})
    assert [line.split(":")[0] for line in problems] == ["a", "c"]
    assert "Use group_size=48 or 24 or 16 or 8," in problems[0]
    assert "Use granularity=channel," in problems[1]
