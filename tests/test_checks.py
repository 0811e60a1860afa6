"""check, and what turns chosen values into schemes, a plan and a KV grid: on the schema alone, no YAML composed."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from qat import checks
from qat.checks import check
from qat.config import (
    DataConfig,
    KvConfig,
    ModelConfig,
    RuleConfig,
    RunConfig,
    SchemeConfig,
    SpecConfig,
    kv_spec,
    load_scheme,
    plan_from,
    scheme_from,
)
from qat.errors import UserError
from qat.scheme import KvSpec, QuantSpec
from qat.stage_config import PhaseConfig


def valid() -> RunConfig:
    """A run that `check` accepts, to be spoiled by one test each."""
    return RunConfig(
        model=ModelConfig("m"), data=DataConfig(path="d"), scheme=SchemeConfig("w4a16_row", SpecConfig(bits=4))
    )


def spoil(key: str, value: object) -> RunConfig:
    config = valid()
    parent, _, name = key.rpartition(".")
    setattr(checks.value_at(config, parent) if parent else config, name, value)
    return config


def test_choices_name_every_entry_of_the_tables():
    from qat.data import JOINS, KINDS
    from qat.estimators import ESTIMATORS
    from qat.formats import FORMATS
    from qat.observers import OBSERVERS

    assert set(checks.CHOICES["data.kind"]) == set(KINDS)
    assert set(checks.CHOICES["data.join"]) == set(JOINS)
    assert set(checks.CHOICES["export.format"]) == set(FORMATS)
    assert set(checks.CHOICES["fake_quant.estimator"]) == set(ESTIMATORS)
    assert set(checks.LEARNED) == {name for name, estimator in ESTIMATORS.items() if estimator.learns_scale}
    for key in ("fake_quant.weight_observer", "fake_quant.input_observer"):
        assert set(checks.CHOICES[key]) == set(OBSERVERS)


def test_ranges_cover_every_number_of_the_schema():
    elsewhere = {"scheme.weight.bits"}  # QuantSpec
    bounded = {*checks.AT_LEAST, *checks.ABOVE_ZERO, *checks.FRACTIONS} | elsewhere

    def numbers(config: Any, prefix: str):
        for field in fields(config):
            value = getattr(config, field.name)
            if is_dataclass(value):
                yield from numbers(value, f"{prefix}{field.name}.")
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield prefix + field.name

    assert set(numbers(RunConfig(), "")) <= bounded


REFUSED = [
    *(("name", name, "plain folder name") for name in ("", "..", "a/b", " a", "a\\b")),
    ("runs_dir", " ", "must be a folder"),
    *((key, "no_such", f"^{key}: must be one of ") for key in checks.CHOICES),
    ("logger.wandb", "False", "Put 'off' in quotes"),
    *((key, least - 1, f"^{key}: must be at least {least}") for key, least in checks.AT_LEAST.items()),
    *((key, bad, f"^{key}: must be finite and above 0") for key in checks.ABOVE_ZERO for bad in (0.0, float("nan"))),
    *((key, bad, f"^{key}: must be a share") for key in checks.FRACTIONS for bad in (-0.1, 1.1, float("nan"))),
    ("optim.weight_decay", float("inf"), "^optim.weight_decay: must be at least 0"),
    ("optim.betas", [0.9], "^optim.betas: must be two numbers"),
    ("optim.betas", [0.9, 1.0], "^optim.betas: must be two numbers"),
    ("data.chat", True, "^data.chat: plain text holds no conversations"),
    ("data.eval_fraction", 1.0, "^data.eval_fraction: without data.eval_path"),
    ("data.subset", "en", "^data.subset: data.kind=text has no subsets"),
    ("model", ModelConfig("a.gguf", revision="main"), "^model.revision: 'a.gguf' has no revisions"),
    ("model", ModelConfig("package:a/b", trust_remote_code=True), "^model.trust_remote_code: .*brings no code"),
    ("scheme.weight.bits", 9, "^scheme.weight.bits: must be a whole number from 2 to 8, got 9"),
    ("scheme.weight.group_size", 32, "^scheme.weight.group_size: granularity=channel takes no group size"),
    ("scheme.weight.dynamic", True, "^scheme.weight.dynamic: only inputs have it"),
    ("scheme.weight.granularity", "token", "weights have no tokens|only at run time"),
    ("scheme.input", SpecConfig(), "inputs are quantized per token or per tensor"),
    ("kv.bits", 1, "^kv.bits: must be a whole number from 2 to 8"),
    ("kv.bits", 9, "^kv.bits: must be a whole number from 2 to 8"),
    ("kv.recent_tokens", 32, "^kv.recent_tokens: a float cache has no grid, got 32. Set kv.bits=4"),
    ("kv", KvConfig(4, key_axis="channel"), "^kv.group_size: key_axis=channel needs at least 2 tokens"),
    ("plan.embedding", "w8a17", r"^plan.embedding: must be a file in conf/scheme, got 'w8a17'. Did you mean 'w8a16'\?"),
    ("plan.rules", [RuleConfig("*", "../train")], "^plan.rules.0.scheme: must be a file in conf/scheme"),
    ("fake_quant.estimator", "lsq", "^fake_quant: weight_scale=learned goes with"),
    ("fake_quant.weight_scale", "learned", "^fake_quant: weight_scale=learned goes with"),
    ("fake_quant.weight_observer", "mse", "^fake_quant.weight_observer: weight_scale=dynamic takes"),
    ("fake_quant.estimator", "lsq_plus", "zero points, which a symmetric scheme has not"),
    ("phases.schedule", [], "^phases.schedule: must hold a fake_quantize entry"),
    ("phases.schedule", [PhaseConfig(0, "observe")], "^phases.schedule: must hold a fake_quantize entry"),
    ("trainer.strategy", "sinlge", r"Did you mean 'single'\?"),
    ("trainer.devices", 2, "^trainer.strategy: single is one process, got devices=2 nodes=1"),
    ("trainer.nodes", 2, "^trainer.strategy: single is one process, got devices=1 nodes=2"),
    ("distill.kl_weight", 0.0, "^distill: kl_weight or ce_weight must be above 0"),
    ("distill.jsd_beta", 1.0, "^distill.jsd_beta: must be below 1"),
]


@pytest.mark.parametrize(("key", "value", "match"), REFUSED)
def test_check_refuses(key, value, match):
    assert check(valid()) == []
    assert any(re.search(match, line) for line in check(spoil(key, value)))


START = PhaseConfig(0, "fake_quantize")
BAD_ENTRIES = [
    ([START, PhaseConfig(1, "freeze")], r"^phases.schedule.1.do: must be one of .*Did you mean 'freeze_scales'\?"),
    (
        [START, PhaseConfig(100, "freeze_scales")],
        "^phases.schedule.1.at: must be a step of every end_to_end stage, from 0 to 99",
    ),
    ([PhaseConfig(-1, "fake_quantize")], "^phases.schedule.0.at: must be a step of every end_to_end stage"),
    ([PhaseConfig(9, "fake_quantize"), PhaseConfig(3, "freeze_scales")], "^phases.schedule.1.at: entries are sorted"),
    ([START, PhaseConfig(1, "bits")], "^phases.schedule.1: bits stands with do: bits"),
    ([PhaseConfig(0, "fake_quantize", 4)], "^phases.schedule.0: bits stands with do: bits"),
    ([START, PhaseConfig(1, "bits", 1)], "^phases.schedule.1.bits: must be a whole number from 2 to 8"),
    ([START, PhaseConfig(1, "bits", 5)], "^phases.schedule: training must end at the 4 bits of scheme w4a16_row"),
]


@pytest.mark.parametrize(("schedule", "match"), BAD_ENTRIES)
def test_check_refuses_a_schedule(schedule, match):
    assert any(re.search(match, line) for line in check(spoil("phases.schedule", schedule)))


def test_check_holds_the_last_width_to_the_narrowest_scheme_of_the_plan():
    config = spoil("phases.schedule", [START, PhaseConfig(0, "bits", 8), PhaseConfig(9, "bits", 4)])
    assert check(config) == []
    config.plan.rules = [RuleConfig("*.down_proj", "w2a16_g32")]
    assert any("the 2 bits of scheme w2a16_g32" in line for line in check(config))


def test_check_wants_data_for_static_inputs():
    config = spoil("scheme.input", SpecConfig(granularity="tensor"))
    assert check(config) == []
    config.fake_quant.calibration_batches = 0
    assert any("the static inputs of scheme w4a16_row" in line for line in check(config))
    config.phases.schedule = [PhaseConfig(0, "observe"), PhaseConfig(5, "fake_quantize")]
    assert check(config) == []


def test_check_reports_all_problems_at_once():
    config = spoil("optim.lr", -1.0)
    config.name, config.scheme.weight.bits, config.plan.embedding = "..", 9, "w9"
    assert len(check(config)) == 4


def test_plan_keeps_the_order_and_reads_keep_and_same():
    config = spoil("plan.rules", [RuleConfig("*.down_proj", "w8a8"), RuleConfig("*.0.*", "keep")])
    plan = plan_from(config)
    assert [(rule.match, rule.scheme) for rule in plan.rules] == [("*.down_proj", load_scheme("w8a8")), ("*.0.*", None)]
    assert (plan.default, plan.embedding) == (load_scheme("w4a16_row"), load_scheme("w8a16"))
    config.plan.embedding = "keep"
    assert plan_from(config).embedding is None
    config.plan.embedding = "same"
    assert plan_from(config).embedding == load_scheme("w4a16_row")


def test_load_scheme_refuses_an_unknown_name():
    with pytest.raises(UserError, match=r"^scheme: must be a file in conf/scheme, got 'w4a16_g23'. Did you mean"):
        load_scheme("w4a16_g23")


def test_scheme_from_names_the_fields_of_both_grids():
    with pytest.raises(UserError, match=r"scheme.weight.bits: .*\nscheme.input.bits: "):
        scheme_from(SchemeConfig("x", SpecConfig(bits=1), SpecConfig(bits=9, granularity="tensor")))


def test_kv_spec_is_per_token_and_dynamic():
    assert kv_spec(KvConfig()) is None
    for bits, symmetric in ((8, True), (4, False)):
        expected = QuantSpec(bits, symmetric, "token", dynamic=True, scale_dtype="float32", is_activation=True)
        assert kv_spec(KvConfig(bits, symmetric)) == KvSpec(expected)
