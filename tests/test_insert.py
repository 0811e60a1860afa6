"""Insertion: which layers get which scheme, what is refused, and a line with a reason for every parameter."""

from __future__ import annotations

import pytest
import torch
from quant_models import IDS, float_model, logits, plan, scheme_named
from torch import nn

from qat.config import ModelConfig
from qat.errors import UserError
from qat.insert import FakeQuantOptions, insert
from qat.models import meta_model
from qat.nn.quant import QuantConv1D, QuantEmbedding, QuantLinear, quantized_weights
from qat.scheme import PlanRule, QuantPlan, QuantScheme, QuantSpec

OPTIONS = FakeQuantOptions()
UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"


def lines(coverage) -> dict:
    return {layer.name: layer for layer in coverage.layers}


def test_coverage_counts_tiny_llama_by_hand(tiny_model_dir):
    model = float_model(tiny_model_dir)
    coverage = insert(model, plan("w4a16_g32", "w8a16"), OPTIONS)
    matrices = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    table, norms = 300 * 64, 5 * 64
    assert coverage.weights == matrices + table + norms == sum(p.numel() for p in model.parameters())
    assert coverage.quantized_weights == matrices + table
    assert coverage.coverage == pytest.approx((matrices + table) / (matrices + table + norms))
    assert coverage.bytes == matrices // 2 + 2 * matrices // 32 + table + 2 * 300 + 4 * norms
    assert coverage.bits_per_weight == pytest.approx(8 * coverage.bytes / coverage.weights)
    written = coverage.to_dict()
    assert written["float_bytes"] == 4 * coverage.weights
    assert sum(layer["bytes"] for layer in written["layers"]) == written["bytes"] == coverage.bytes


def test_every_parameter_has_one_line_with_a_reason(tiny_model_dir, tiny_gpt2_dir, tiny_mixtral_dir):
    for folder in (tiny_model_dir, tiny_gpt2_dir, tiny_mixtral_dir):
        model = float_model(folder)
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        coverage = insert(model, plan(), OPTIONS)
        assert sorted(layer.name for layer in coverage.layers) == sorted(names)
        assert all(layer.reason for layer in coverage.layers)
        assert coverage.weights == sum(parameter.numel() for parameter in model.parameters())


def test_first_rule_that_matches_decides(tiny_model_dir):
    model = float_model(tiny_model_dir)
    rules = {UP: None, "model.layers.1.*": "w8a8", "*_proj": "w4a16_g64"}
    coverage = insert(model, plan("w4a16_g32", "w8a16", rules), OPTIONS)
    found = lines(coverage)
    assert (found[f"{UP}.weight"].scheme, found[f"{UP}.weight"].reason) == (None, f"kept by rule '{UP}'")
    assert found["model.layers.1.mlp.down_proj.weight"].scheme == "w8a8"
    assert found[f"{DOWN}.weight"].scheme == "w4a16_g64"
    assert found["model.embed_tokens.weight"].scheme == "w8a16"
    assert type(model.get_submodule(UP)) is nn.Linear
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, QuantLinear) and layer.input_fake_quant is not None
    assert model.get_submodule(DOWN).weight_fake_quant.spec == scheme_named("w4a16_g64").weight


def test_rules_without_a_match_are_all_reported(tiny_model_dir):
    model = float_model(tiny_model_dir)
    with pytest.raises(UserError, match=r"plan rule 'model\.layers\.2\.\*': must match a layer") as caught:
        insert(model, plan(rules={"model.layers.2.*": None, "layers.0.*": "w8a16", "lm_head": "w8a16"}), OPTIONS)
    assert len(caught.value.problems) == 2
    assert not list(quantized_weights(model)), "nothing is changed before everything is right"


def test_indivisible_group_names_every_layer_and_sizes_that_work(tiny_model_dir):
    odd = QuantScheme("w4_g96", QuantSpec(4, granularity="group", group_size=96))
    with pytest.raises(UserError, match="in_features must be a multiple of group_size=96") as caught:
        insert(float_model(tiny_model_dir), QuantPlan((), odd, None), OPTIONS)
    text = str(caught.value)
    for layer in range(2):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert f"model.layers.{layer}.self_attn.{name}.weight" in text
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert f"model.layers.{layer}.mlp.{name}.weight" in text
    assert "got 64. Use group_size=64 or 32 or 16 or 8," in text and "got 128. Use group_size=128 or 64" in text


def test_tied_matrix_with_two_schemes_is_refused_with_the_other_mistakes(tiny_model_dir):
    with pytest.raises(UserError, match="a tied matrix has one scheme, got keep and w8a16") as caught:
        insert(float_model(tiny_model_dir), plan(rules={"lm_head": None, "nothing": None}), OPTIONS)
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "lm_head.weight = model.embed_tokens.weight",
        "plan rule 'nothing'",
    ]


def test_tied_head_says_that_its_inputs_stay_float(tiny_model_dir):
    model = float_model(tiny_model_dir)
    found = lines(insert(model, plan("w8a8", "w8a8"), OPTIONS))
    assert model.lm_head.input_fake_quant is None
    assert found["lm_head.weight"].tied_to == "model.embed_tokens.weight" and found["lm_head.weight"].bytes == 0
    assert "a tied head takes the scheme of its table, whose inputs stay float" in found["lm_head.weight"].reason
    assert "a table has no input to quantize" in found["model.embed_tokens.weight"].reason


def test_kept_tables_stay_tied_and_float(tiny_model_dir):
    model = float_model(tiny_model_dir)
    found = lines(insert(model, plan("w4a16_g32", None), OPTIONS))
    assert type(model.model.embed_tokens) is nn.Embedding and type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert found["model.embed_tokens.weight"].reason == "kept by plan.embedding"
    assert found["lm_head.weight"].weights == 0


def test_mixtral_quantizes_experts_and_says_why_the_router_is_float(tiny_mixtral_dir):
    model = float_model(tiny_mixtral_dir)
    found = lines(insert(model, plan("w8a8", "w8a8"), OPTIONS))
    experts = found["model.layers.0.mlp.experts.gate_up_proj"]
    assert (experts.kind, experts.shape, experts.scheme) == ("experts", (4, 128, 64), "w8a8")
    assert "inputs of fused experts stay float" in experts.reason
    router = found["model.layers.0.mlp.gate.weight"]
    assert router.scheme is None and router.reason == "MixtralTopKRouter is not a layer type with a grid"
    assert model.lm_head.input_fake_quant is not None  # not tied: a head of its own
    names = [name for name, _, _ in quantized_weights(model)]
    assert len(names) == 2 * (4 + 2) + 2 and "model.layers.1.mlp.experts.down_proj" in names


def test_gpt2_quantizes_conv1d_and_says_why_the_position_table_is_float(tiny_gpt2_dir):
    model = float_model(tiny_gpt2_dir)
    found = lines(insert(model, plan("w4a16_g32"), OPTIONS))
    attention = found["transformer.h.0.attn.c_attn.weight"]
    assert (attention.kind, attention.shape, attention.scheme) == ("conv1d", (192, 64), "w4a16_g32")
    assert isinstance(model.transformer.h[0].attn.c_attn, QuantConv1D)
    positions = found["transformer.wpe.weight"]
    assert (positions.scheme, positions.reason) == (None, "a position or type table, not a token table")
    assert isinstance(model.transformer.wte, QuantEmbedding) and type(model.transformer.wpe) is nn.Embedding


def test_position_table_is_quantized_when_a_rule_names_it(tiny_gpt2_dir):
    model = float_model(tiny_gpt2_dir)
    found = lines(insert(model, plan(rules={"*.wpe": "w8a16"}), OPTIONS))
    assert found["transformer.wpe.weight"].scheme == "w8a16" and isinstance(model.transformer.wpe, QuantEmbedding)


def test_transposed_experts_are_seen_with_inputs_last():
    class Experts(nn.Module):
        is_transposed = True

        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 48, 5))

    model = nn.ModuleDict({"experts": Experts()})
    group = QuantScheme("g16", QuantSpec(4, granularity="group", group_size=16))
    (layer,) = insert(model, QuantPlan((), group, None), OPTIONS).layers
    ((_, weight, fake_quant),) = quantized_weights(model)
    assert layer.shape == weight.shape == (3, 5, 48) and fake_quant.scale.shape == (3, 5, 3)


def test_unsupported_layers_are_refused_with_their_percentage():
    conv = nn.ModuleDict({"linear": nn.Linear(32, 24, bias=False), "norm": nn.Conv2d(4, 8, 2, bias=False)})
    with pytest.raises(UserError, match=r"at most 10% of the weights may be of layers without a grid, got 14\.3%") as e:
        insert(conv, plan("w4a16_g32"), OPTIONS, max_unsupported=0.1)
    assert "norm.weight (Conv2d is not a layer type with a grid)" in str(e.value)
    kept = QuantPlan((PlanRule("norm", None),), scheme_named("w4a16_g32"), None)
    coverage = insert(conv, kept, OPTIONS, max_unsupported=0.1)
    assert lines(coverage)["norm.weight"].reason == "kept by rule 'norm'"
    assert coverage.coverage == pytest.approx(768 / 896)


@pytest.mark.parametrize("estimator", ["ste_clipped", "lsq"])
@pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "w8a8_static"])
def test_plan_on_the_meta_device_says_the_same(tiny_model_dir, scheme, estimator):
    options = FakeQuantOptions(estimator, "learned" if estimator == "lsq" else "dynamic")
    empty, real = meta_model(ModelConfig(path=str(tiny_model_dir))), float_model(tiny_model_dir)
    coverage, wanted = (insert(model, plan(scheme), options).to_dict() for model in (empty, real))
    assert coverage == wanted
    shapes = {name: tensor.shape for name, tensor in real.state_dict().items()}
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in empty.state_dict().values())


def test_inserted_model_differs_from_the_float_one_only_by_the_grid(tiny_model_dir):
    model, floating = float_model(tiny_model_dir), float_model(tiny_model_dir)
    insert(model, plan("w4a16_g32"), OPTIONS)
    with torch.no_grad():
        for name, weight, fake_quant in quantized_weights(model):
            floating.get_parameter(name).copy_(fake_quant(weight))
    assert not torch.equal(logits(model, IDS), logits(float_model(tiny_model_dir)))
    assert torch.equal(logits(model, IDS), logits(floating))
