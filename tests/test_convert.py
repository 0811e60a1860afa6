"""Packing a trained model: the packed codes are those of training, and a comparison finds every one that is not."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from packed_models import assert_same
from quant_models import SCHEMES, trained

from qat import grid
from qat.convert import compare, digest, digests, pack_model
from qat.errors import UserError
from qat.fake_quant import FakeQuantize
from qat.nn.quant import input_fake_quants, quantized_weights

FOLDERS = ["tiny_model_dir", "tiny_gpt2_dir", "tiny_mixtral_dir"]
LEARNED = [("w4a16_g32", "lsq"), ("w4a16_g32_asym", "lsq_plus"), ("w3a16_g64", "lsq_plus")]
QUERY = "model.layers.0.self_attn.q_proj.weight"


def packed_of(model, coverage):
    packed = pack_model(model, coverage, model.config.to_dict(), None)
    packed.check()
    return packed


def assert_codes_of_training(model, packed) -> None:
    seen = set()
    for name, weight, fake_quant in quantized_weights(model):
        tensor, qparams = packed.tensors[name], fake_quant.qparams(weight)
        assert torch.equal(tensor.codes(), fake_quant.codes(weight)), name
        assert torch.equal(tensor.qparams.scale, qparams.scale.view(tensor.scale.shape)), name
        assert torch.equal(tensor.qparams.zero_point, qparams.zero_point.view(tensor.scale.shape)), name
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(tensor.dequantize(dtype), fake_quant(weight, dtype)), name
        seen.add(name)
    assert seen == set(packed.tensors) == set(packed.schemes) == set(packed.modules)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_packed_codes_are_those_of_training(folder, scheme, request):
    model, coverage = trained(request.getfixturevalue(folder), scheme)
    assert_codes_of_training(model, packed_of(model, coverage))


@pytest.mark.parametrize(("scheme", "estimator"), LEARNED, ids=[f"{s}-{e}" for s, e in LEARNED])
@pytest.mark.parametrize("folder", FOLDERS)
def test_packed_codes_are_those_of_training_with_learned_grids(folder, scheme, estimator, request):
    model, coverage = trained(request.getfixturevalue(folder), scheme, estimator, "learned")
    assert_codes_of_training(model, packed_of(model, coverage))


def test_packed_codes_stay_when_scales_are_frozen_before_the_weights_move(tiny_model_dir):
    model, coverage = trained(tiny_model_dir, "w4a16_g32_asym")
    for _, weight, fake_quant in quantized_weights(model):
        fake_quant.freeze(weight)
    scales = {name: tensor.scale for name, tensor in packed_of(model, coverage).tensors.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    packed = packed_of(model, coverage)
    assert_codes_of_training(model, packed)
    assert all(torch.equal(tensor.scale, scales[name]) for name, tensor in packed.tensors.items())


def test_layers_multiply_with_what_was_packed(tiny_model_dir):
    model, coverage = trained(tiny_model_dir, "w4a16_g32")
    packed = packed_of(model, coverage)
    for name, module in model.named_modules():
        if type(module).__name__ == "QuantLinear":
            tensor = packed.tensors[packed.tied.get(f"{name}.weight", f"{name}.weight")]
            assert torch.equal(module.fake_weight(), tensor.dequantize(torch.float32)), name


def test_pack_keeps_what_is_not_quantized_once(tiny_model_dir, tiny_mixtral_dir):
    model, coverage = trained(tiny_model_dir, "w4a16_g32", rules={"*.q_proj": None})
    packed = packed_of(model, coverage)
    kept = {name for name, _ in model.named_parameters() if "norm" in name or "q_proj" in name}
    assert set(packed.floats) == kept
    assert packed.floats[QUERY].data_ptr() == model.get_parameter(QUERY).data_ptr()
    assert packed.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    model, coverage = trained(tiny_mixtral_dir, "w4a16_g32")
    packed = packed_of(model, coverage)
    assert packed.tied == {} and "model.layers.0.mlp.gate.weight" in packed.floats
    assert packed.modules["model.layers.0.mlp.experts.down_proj"] == "experts"


def test_kept_tied_table_is_stored_once(tiny_model_dir):
    model, coverage = trained(tiny_model_dir, "w4a16_g32", embedding=None)
    packed = packed_of(model, coverage)
    assert packed.tied == {} and "lm_head.weight" not in packed.floats
    assert "model.embed_tokens.weight" in packed.floats


def test_static_inputs_are_packed_as_they_were_calibrated(tiny_model_dir):
    model, coverage = trained(tiny_model_dir, "w8a8_static")
    packed = packed_of(model, coverage)
    grids = dict(input_fake_quants(model))
    assert set(packed.input_qparams) == set(grids) and len(grids) == 14
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for name, qparams in packed.input_qparams.items():
        served = grid.fake_quantize(x, qparams, grids[name].spec, torch.float32)
        assert torch.equal(served, grids[name](x))


def test_weight_that_is_not_at_its_final_width_is_refused(tiny_model_dir):
    model, coverage = trained(tiny_model_dir, "w4a16_g32")
    fake_quant = model.get_submodule(QUERY.removesuffix(".weight")).weight_fake_quant
    fake_quant.set_phase(replace(fake_quant.now, bits=8))
    with pytest.raises(UserError, match=f"{QUERY}: must be at its final 4 bits, got 8 bits"):
        packed_of(model, coverage)


def test_packing_refuses_codes_that_forward_does_not_use(tiny_model_dir, monkeypatch):
    model, coverage = trained(tiny_model_dir, "w4a16_g32")
    fake_quant = model.get_submodule(QUERY.removesuffix(".weight")).weight_fake_quant
    right = FakeQuantize.codes

    def one_off(self, x):
        codes = right(self, x)
        if self is fake_quant:
            codes[3, 5] = codes[3, 5] - 1 if codes[3, 5] > 0 else codes[3, 5] + 1
        return codes

    monkeypatch.setattr(FakeQuantize, "codes", one_off)
    with pytest.raises(UserError, match=f"{QUERY}: packed codes must be those of training, got 1 of 4096 values"):
        packed_of(model, coverage)


def altered(model, name, **parts):
    return replace(model, tensors=model.tensors | {name: replace(model.tensors[name], **parts)})


def test_compare_finds_one_changed_code_and_names_its_tensor(tiny_model_dir):
    packed = packed_of(*trained(tiny_model_dir, "w4a16_g32_asym"))
    assert all(line["mismatched_codes"] == 0 and line["scales_equal"] and line["zero_points_equal"]
               for line in compare(packed, packed))  # fmt: skip
    tensor = packed.tensors[QUERY]
    wrong = tensor.packed.clone()
    wrong[3, 7] ^= 0x10
    found = compare(packed, altered(packed, QUERY, packed=wrong))
    assert [(line["name"], line["mismatched_codes"]) for line in found if line["mismatched_codes"]] == [(QUERY, 1)]
    found = compare(packed, altered(packed, QUERY, scale=tensor.scale * 2))
    assert [line["name"] for line in found if not line["scales_equal"]] == [QUERY]
    shifted = altered(packed, QUERY, zero_point=(tensor.zero_point + 1).clamp(-8, 7))
    assert [line["name"] for line in compare(packed, shifted) if not line["zero_points_equal"]] == [QUERY]
    missing = replace(packed, tensors={n: t for n, t in packed.tensors.items() if n != QUERY})
    assert [line["mismatched_codes"] for line in compare(packed, missing) if line["name"] == QUERY] == [64 * 64]


def test_digests_are_those_of_the_bytes_and_change_with_one_code(tiny_model_dir):
    codes = torch.tensor([[-8, 0], [1, 7]], dtype=torch.int8)
    assert digest(codes) == hashlib.sha256(bytes([248, 0, 1, 7])).hexdigest()
    assert digest(codes.t(), None) == hashlib.sha256(bytes([248, 1, 0, 7])).hexdigest()
    packed = packed_of(*trained(tiny_model_dir, "w4a16_g32"))
    again = packed_of(*trained(tiny_model_dir, "w4a16_g32"))
    assert_same(again, packed)
    assert digests(again) == digests(packed)
    wrong = packed.tensors[QUERY].packed.clone()
    wrong[0, 0] ^= 1
    changed = digests(altered(packed, QUERY, packed=wrong))
    assert {n for n, d in digests(packed).items() if changed[n] != d} == {QUERY}
    assert changed[QUERY]["qparams"] == digests(packed)[QUERY]["qparams"]
