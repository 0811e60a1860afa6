"""Phases: the state at a step is a fold, and every FakeQuantize of a model follows it from whatever step."""

from __future__ import annotations

import pytest
import torch
from quant_models import IDS, float_model, logits, plan
from torch import Tensor

from qat import grid
from qat.errors import UserError
from qat.fake_quant import FakeQuantize
from qat.insert import FakeQuantOptions, insert
from qat.nn.quant import input_fake_quants, quantized_weights
from qat.train.calibrate import calibrate
from qat.train.phases import PhaseEntry, PhaseState, apply_phase, state_at

QUERY = "model.layers.0.self_attn.q_proj.weight"
TABLE = "model.embed_tokens.weight"
PROGRESSIVE = [
    PhaseEntry(0, "fake_quantize"),
    PhaseEntry(0, "bits", 8),
    PhaseEntry(10, "bits", 4),
    PhaseEntry(20, "bits", 2),
]
WATCH_FIRST = [PhaseEntry(0, "observe"), PhaseEntry(5, "fake_quantize")]
SCALES = {
    "dynamic": FakeQuantOptions(),
    "static": FakeQuantOptions("ste_clipped", "static", "mse"),
    "learned": FakeQuantOptions("lsq", "learned", "mse"),
}


@pytest.fixture
def model_with(tiny_model_dir):
    def make(scheme: str = "w4a16_g32", scale: str = "dynamic"):
        model = float_model(tiny_model_dir)
        insert(model, plan(scheme), SCALES[scale])
        calibrate(model, IDS, 2)
        return model

    return make


def at(model, step: int, schedule: list[PhaseEntry]) -> None:
    apply_phase(model, state_at(step, schedule))


def quants(model) -> dict[str, tuple[Tensor, FakeQuantize]]:
    return {name: (weight, fake_quant) for name, weight, fake_quant in quantized_weights(model)}


def move_weights(model, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight, _ in quants(model).values():
        weight.data.mul_(1.5).add_(0.02 * torch.randn(weight.shape, generator=generator))


def scales(model) -> dict[str, Tensor]:
    return {name: fake_quant.qparams(weight).scale.clone() for name, (weight, fake_quant) in quants(model).items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[bool]:
    return {torch.equal(one[name], other[name]) for name in one}


@pytest.mark.parametrize(
    ("step", "state"),
    [
        (0, PhaseState(observing=True)),
        (4, PhaseState(observing=True)),
        (5, PhaseState(quantizing=True)),
        (6, PhaseState(quantizing=True, bits=6)),
        (8, PhaseState(quantizing=True, bits=6)),
        (9, PhaseState(quantizing=True, bits=4, frozen=True)),
        (10**6, PhaseState(quantizing=True, bits=4, frozen=True)),
    ],
)
def test_state_is_the_fold_of_all_entries_up_to_the_step(step, state):
    schedule = [
        *WATCH_FIRST,
        PhaseEntry(6, "bits", 6),
        PhaseEntry(9, "bits", 4),
        PhaseEntry(9, "freeze_scales"),
    ]
    assert state_at(step, schedule) == state


def test_state_before_the_first_entry_watches():
    assert state_at(2, [PhaseEntry(3, "fake_quantize")]) == PhaseState(observing=True)


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (PhaseState(observing=True), "observe"),
        (PhaseState(quantizing=True), "fake_quantize"),
        (PhaseState(quantizing=True, bits=8), "fake_quantize@8"),
        (PhaseState(quantizing=True, frozen=True), "frozen"),
    ],
)
def test_state_has_a_name_for_the_log(state, name):
    assert state.name == name


@pytest.mark.parametrize("scale", SCALES)
def test_bits_narrow_step_by_step_to_the_schemes_own_width(model_with, scale):
    model = model_with(scale=scale)
    for step, query_bits in ((0, 8), (9, 8), (10, 4), (20, 4)):
        at(model, step, PROGRESSIVE)
        weight, fake_quant = quants(model)[QUERY]
        low, high = grid.code_range(fake_quant.current_spec)
        codes = fake_quant.codes(weight)
        assert fake_quant.now.bits == query_bits
        assert int(fake_quant.phase[3]) == query_bits
        assert low <= int(codes.min()) < low * 0.7, "the whole width is used"
        assert high * 0.7 < int(codes.max()) <= high
        assert quants(model)[TABLE][1].now.bits == 8


@pytest.mark.parametrize("scale", SCALES)
def test_narrow_scheme_passes_through_every_width(model_with, scale):
    model = model_with("w3a16_g64", scale)
    errors = []
    for step in (0, 10, 20):
        at(model, step, PROGRESSIVE)
        weight, fake_quant = quants(model)[QUERY]
        errors.append(float((fake_quant(weight) - weight).detach().square().mean()))
    assert quants(model)[QUERY][1].now.bits == 3
    assert errors[0] < errors[1] / 30, "4 bits less: 16 times the step"
    assert errors[1] < errors[2] / 2


@pytest.mark.parametrize("scale", SCALES)
def test_freeze_holds_scales_while_weights_move(model_with, scale):
    model = model_with(scale=scale)
    schedule = [PhaseEntry(0, "fake_quantize"), PhaseEntry(3, "freeze_scales")]
    at(model, 2, schedule)
    if scale == "learned":
        quants(model)[QUERY][1].scale_shift.data += 0.1
    before = scales(model)
    at(model, 3, schedule)
    assert equal(scales(model), before) == {True}, "freezing changes nothing by itself"
    move_weights(model)
    # an optimizer's momentum may move a learned parameter once more
    for _, fake_quant in quants(model).values():
        if fake_quant.scale_shift is not None:
            fake_quant.scale_shift.data += 0.1
    at(model, 4, schedule)
    assert equal(scales(model), before) == {True}


def test_dynamic_scales_follow_the_weights_until_they_are_frozen(model_with):
    model = model_with()
    at(model, 0, [PhaseEntry(0, "fake_quantize")])
    before = scales(model)
    move_weights(model)
    assert equal(scales(model), before) == {False}


@pytest.mark.parametrize("scale", SCALES)
def test_frozen_scale_is_taken_again_when_the_width_changes(model_with, scale):
    model = model_with(scale=scale)
    schedule = [
        PhaseEntry(0, "fake_quantize"),
        PhaseEntry(0, "bits", 8),
        PhaseEntry(0, "freeze_scales"),
        PhaseEntry(5, "bits", 4),
    ]
    at(model, 0, schedule)
    wide = scales(model)[QUERY]
    at(model, 5, schedule)
    weight, fake_quant = quants(model)[QUERY]
    assert fake_quant.now.frozen
    # 255 steps become 15
    torch.testing.assert_close(scales(model)[QUERY] / wide, torch.full_like(wide, 17.0), rtol=0.5, atol=0)
    assert float((fake_quant(weight) - weight).detach().abs().max()) <= float(scales(model)[QUERY].max())


@pytest.mark.parametrize("scale", SCALES)
def test_observing_model_computes_in_float(model_with, tiny_model_dir, scale):
    model = model_with("w8a8_static", scale)
    at(model, 0, WATCH_FIRST)
    assert torch.equal(logits(model), logits(float_model(tiny_model_dir)))
    at(model, 5, WATCH_FIRST)
    assert not torch.equal(logits(model), logits(float_model(tiny_model_dir)))


def test_inputs_adopt_what_was_observed_when_quantization_sets_in(model_with):
    model = model_with("w8a8_static")
    before = {name: fq.scale.clone() for name, fq in input_fake_quants(model)}
    at(model, 0, WATCH_FIRST)
    move_weights(model)
    for _ in range(4):
        logits(model)
    held = {name: fq.scale.clone() for name, fq in input_fake_quants(model)}
    assert equal(held, before) == {True}, "nothing is adopted while watching"
    at(model, 5, WATCH_FIRST)
    after = {name: fq.scale.clone() for name, fq in input_fake_quants(model)}
    for name, fake_quant in input_fake_quants(model):
        assert torch.equal(after[name], fake_quant.observer.qparams(fake_quant.spec).scale.view(1))
    assert False in equal(after, before)
    count = [int(fq.observer.count) for _, fq in input_fake_quants(model)]
    logits(model)
    assert [int(fq.observer.count) for _, fq in input_fake_quants(model)] == count, "nobody watches any more"


def test_inputs_adopt_what_was_observed_when_scales_are_frozen_first(model_with):
    model = model_with("w8a8_static")
    schedule = [PhaseEntry(0, "observe"), PhaseEntry(3, "freeze_scales"), PhaseEntry(5, "fake_quantize")]
    before = {name: fq.scale.clone() for name, fq in input_fake_quants(model)}
    at(model, 0, schedule)
    move_weights(model)
    logits(model)
    for step in (3, 5):
        at(model, step, schedule)
        assert False in equal({name: fq.scale for name, fq in input_fake_quants(model)}, before)


@pytest.mark.parametrize("scale", ["static", "learned"])
def test_stored_weight_scales_are_of_the_weights_at_the_moment_quantization_sets_in(model_with, scale):
    model = model_with(scale=scale)
    at(model, 0, WATCH_FIRST)
    move_weights(model)
    at(model, 5, WATCH_FIRST)
    after = scales(model)
    fresh = model_with(scale=scale)
    move_weights(fresh)
    calibrated = quants(fresh)
    for name, (weight, fake_quant) in calibrated.items():
        fake_quant.observer.count.zero_()
        fake_quant.observer.observe(weight)
        fake_quant.adopt_observed()
        assert torch.equal(after[name], fake_quant.scale), name


def test_learned_scales_are_not_reset_while_the_phase_stays(model_with):
    model = model_with(scale="learned")
    for step in (0, 1):
        at(model, step, [PhaseEntry(0, "fake_quantize")])
        shift = quants(model)[QUERY][1].scale_shift
        assert bool(shift.any()) == (step == 1)
        shift.data += 0.25


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("stop", [3, 5, 7, 10, 12])
def test_model_loaded_in_the_middle_goes_on_as_the_one_that_never_stopped(model_with, scale, stop):
    schedule = [
        *WATCH_FIRST,
        PhaseEntry(5, "bits", 8),
        PhaseEntry(10, "bits", 4),
        PhaseEntry(12, "freeze_scales"),
    ]
    going = model_with("w8a8_static" if stop == 3 else "w4a16_g32", scale)
    for step in range(stop):
        at(going, step, schedule)
        move_weights(going, step)
        logits(going)
    resumed = model_with("w8a8_static" if stop == 3 else "w4a16_g32", scale)
    resumed.load_state_dict(going.state_dict())
    for step in range(stop, 15):
        for model in (going, resumed):
            at(model, step, schedule)
            move_weights(model, step)
        assert torch.equal(logits(going), logits(resumed)), step
    assert equal(scales(going), scales(resumed)) == {True}


def test_static_inputs_that_no_token_came_to_are_named(tiny_model_dir):
    """Calibration, and the end of a watching phase, say which layers saw nothing."""
    model = float_model(tiny_model_dir)
    insert(model, plan("w8a8_static"), SCALES["static"])
    observers = {name: fq.observer for name, fq in input_fake_quants(model)}
    for observer in observers.values():
        observer.observe = lambda *args, **options: None
    with pytest.raises(UserError, match=r"calibration: every static input must see data, got nothing at ") as caught:
        calibrate(model, IDS, 2)
    assert "model.layers.0.self_attn.q_proj, " in str(caught.value) and " and 4 more. Raise" in str(caught.value)
    assert not caught.value.before_work
    for name, observer in observers.items():
        if name != "model.layers.1.mlp.down_proj":
            del observer.observe
    at(model, 0, WATCH_FIRST)
    model(IDS)
    with pytest.raises(UserError, match=r"got nothing at model\.layers\.1\.mlp\.down_proj\. Raise"):
        at(model, 5, WATCH_FIRST)


def test_watching_phase_needs_no_calibration_before(tiny_model_dir):
    model = float_model(tiny_model_dir)
    insert(model, plan("w8a8_static"), SCALES["static"])
    calibrate(model, IDS[:0], 2)
    at(model, 0, WATCH_FIRST)
    model(IDS)
    at(model, 5, WATCH_FIRST)
    for _, fake_quant in input_fake_quants(model):
        assert torch.equal(fake_quant.scale, fake_quant.observer.qparams(fake_quant.spec).scale)
        assert float(fake_quant.scale) != 1
