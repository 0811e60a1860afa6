"""Training layers: the float layer's arithmetic on grid values, its Parameters, and one grid for a shared matrix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quant_models import IDS, float_model, logits, plan, trained
from tolerances import FLOAT32_SUM
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from qat import grid
from qat.estimators import ESTIMATORS
from qat.fake_quant import FakeQuantize, Phase
from qat.insert import FakeQuantOptions, insert
from qat.nn.quant import (
    QuantConv1D,
    QuantEmbedding,
    QuantLinear,
    input_fake_quants,
    quantize_experts,
    quantized_weights,
    weight_health,
)
from qat.scheme import QuantSpec

SPECS = {
    "tensor": QuantSpec(8, False, "tensor"),
    "channel": QuantSpec(4, False, "channel"),
    "group": QuantSpec(4, True, "group", 16),
}
TOKEN = QuantSpec(8, granularity="token", dynamic=True, scale_dtype="float32", is_activation=True)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid_for(spec: QuantSpec, shape: tuple[int, ...], mode: str = "dynamic") -> FakeQuantize:
    scale_shape = (1,) if spec.granularity == "token" else spec.scale_shape(shape)
    return FakeQuantize(spec, scale_shape, ESTIMATORS["ste_clipped"], mode)


def held_grid(spec: QuantSpec, shape: tuple[int, ...]) -> FakeQuantize:
    """Frozen at a step of 0.5. A dynamic symmetric scale has no weight that it leaves alone: no code is 7.5."""
    fake_quant = grid_for(spec, shape)
    fake_quant.freeze(torch.zeros(shape))
    fake_quant.scale.fill_(0.5), fake_quant.zero_point.zero_()
    return fake_quant


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 16), (5, 48), (33, 16)], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_linear_is_the_float_layer_on_the_grid_values(spec, shape, bias):
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    with torch.no_grad():
        linear.weight.copy_(normal(*shape))
    weight, x = linear.weight, normal(2, 3, shape[1], seed=1)
    layer = QuantLinear(linear, grid_for(spec, shape), grid_for(TOKEN, (1,)))
    assert layer.weight is weight and layer.bias is linear.bias
    qparams = grid.choose_qparams(*grid.min_max(weight, spec), spec)
    inputs = grid.choose_qparams(*grid.min_max(x, TOKEN), TOKEN)
    served = grid.dequantize(grid.quantize(weight, qparams, spec), qparams, spec)
    seen = grid.dequantize(grid.quantize(x, inputs, TOKEN), inputs, TOKEN)
    wanted = nn.functional.linear(seen, served, linear.bias)
    # integers on a CPU with the C++ kernels, floats elsewhere: the same numbers, summed in another order
    size = nn.functional.linear(seen.abs(), served.abs()).max()
    assert (layer(x) - wanted).abs().max() <= FLOAT32_SUM * size
    layer.input_fake_quant = None
    assert torch.equal(layer(x), nn.functional.linear(x, served, linear.bias))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_layers_equal_the_float_layer_when_the_weight_is_on_the_grid(spec):
    weight = normal(5, 48).mul(4).round().clamp(-8, 7) / 2
    linear, conv, embedding = nn.Linear(48, 5), Conv1D(5, 48), nn.Embedding(5, 48)
    with torch.no_grad():
        linear.weight.copy_(weight), embedding.weight.copy_(weight), conv.weight.copy_(weight.t())
        conv.bias.copy_(normal(5, seed=2))
    x, ids = normal(3, 48, seed=1), torch.tensor([[4, 0, 0, 2]])
    assert torch.equal(QuantLinear(linear, held_grid(spec, (5, 48)), None)(x), linear(x))
    assert torch.equal(QuantEmbedding(embedding, held_grid(spec, (5, 48)))(ids), embedding(ids))
    conv_layer = QuantConv1D(conv, held_grid(spec, (5, 48)), None)
    assert torch.equal(conv_layer(x), nn.functional.linear(x, conv.weight.t().contiguous(), conv.bias))
    torch.testing.assert_close(conv_layer(x), conv(x), rtol=FLOAT32_SUM, atol=FLOAT32_SUM * 10)
    assert conv_layer.weight is conv.weight and conv_layer.quantized_weights()["weight"][0].shape == (5, 48)


def test_conv1d_groups_run_along_the_inputs():
    spec, conv = SPECS["group"], Conv1D(5, 48)
    (weight, _) = QuantConv1D(conv, grid_for(spec, (5, 48)), None).quantized_weights()["weight"]
    wanted = grid.min_max(conv.weight.t().contiguous(), spec)[0]
    assert torch.equal(grid.min_max(weight, spec)[0], wanted) and wanted.shape == (5, 3)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_embedding_rows_equal_rows_of_the_whole_table(spec):
    embedding = nn.Embedding(7, 48, padding_idx=0)
    layer = QuantEmbedding(embedding, grid_for(spec, (7, 48)))
    ids = torch.tensor([[6, 0, 3], [3, 3, 1]])
    for bits in (8, spec.bits):
        layer.weight_fake_quant.set_phase(Phase(bits=bits))
        table = layer.weight_fake_quant(layer.weight)
        assert torch.equal(layer(ids), table[ids])
    layer.weight_fake_quant.freeze(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(1.3)
    assert torch.equal(layer(ids), layer.weight_fake_quant(layer.weight)[ids])


def test_embedding_answers_float32_under_autocast_as_the_float_layer_does():
    embedding = nn.Embedding(7, 48)
    layer, ids = QuantEmbedding(embedding, grid_for(SPECS["channel"], (7, 48))), torch.tensor([1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(ids).dtype == embedding(ids).dtype == torch.float32


def test_embedding_gradient_reaches_only_the_rows_looked_up():
    layer = QuantEmbedding(nn.Embedding(7, 48), grid_for(SPECS["channel"], (7, 48)))
    layer(torch.tensor([2, 5, 5])).sum().backward()
    assert layer.weight.grad.any(-1).nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize("scale", ["dynamic", "static"])
def test_tied_matrix_keeps_one_parameter_and_one_grid(tiny_model_dir, scale):
    model, _ = trained(tiny_model_dir, "w4a16_g32", scale=scale)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, QuantEmbedding) and isinstance(head, QuantLinear)
    assert table.weight is head.weight and table.weight_fake_quant is head.weight_fake_quant
    names = [name for name, _, _ in quantized_weights(model)]
    assert names[0] == "model.embed_tokens.weight" and "lm_head.weight" not in names
    assert len(names) == len(set(names)) == 1 + 2 * 7
    table.weight_fake_quant.set_phase(replace(table.weight_fake_quant.now, bits=8))
    assert torch.equal(table(torch.arange(300)), head.fake_weight())


class Experts(nn.Module):
    """Three experts that look at their weight once each, as those of Hugging Face models do."""

    def __init__(self, is_transposed: bool):
        super().__init__()
        self.is_transposed = is_transposed
        weight_ENK = normal(3, 5, 48)
        self.up = nn.Parameter(weight_ENK.transpose(1, 2).contiguous() if is_transposed else weight_ENK)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (self.up[e] if self.is_transposed else self.up[e].t() for e in range(3))
        return torch.stack([x @ weight for weight in weights])


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_experts_compute_on_grid_values_once_per_forward(spec, is_transposed):
    experts, x = Experts(is_transposed), normal(4, 48, seed=1)
    weight_ENK = normal(3, 5, 48)
    quantize_experts(experts, "up", grid_for(spec, (3, 5, 48)), is_transposed)
    calls = []
    experts.parametrizations.up[0].register_forward_hook(lambda *_: calls.append(1))
    y = experts(x)
    assert len(calls) == 1
    qparams = grid.choose_qparams(*grid.min_max(weight_ENK, spec), spec)
    expected = torch.stack([x @ w.t() for w in grid.fake_quantize(weight_ENK, qparams, spec, torch.float32)])
    assert torch.equal(y, expected)
    y.square().sum().backward()
    assert experts.parametrizations.up.original.grad.flatten(1).any(1).all()
    with torch.no_grad():
        experts.parametrizations.up.original.mul_(2)
    assert not torch.equal(experts(x), y)  # nothing cached is left over
    assert len(calls) == 2
    ((name, seen, _),) = quantized_weights(nn.ModuleDict({"mlp": experts}))
    assert name == "mlp.up" and torch.equal(seen, 2 * weight_ENK)


def test_experts_leave_no_cache_behind_when_forward_fails():
    experts = Experts(False)
    quantize_experts(experts, "up", grid_for(SPECS["channel"], (3, 5, 48)), False)
    with pytest.raises(RuntimeError, match="shape"):
        experts(normal(4, 47))
    assert not parametrize._cache_enabled


def test_mixtral_computes_each_expert_weight_once_and_trains_it(tiny_mixtral_dir):
    model, _ = trained(tiny_mixtral_dir, "w4a16_g32")
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "FakeQuantizedParameter":
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(calls) == 4 and set(calls.values()) == {1}
    gradients = [p.grad for name, p in model.named_parameters() if name.endswith("original")]
    assert len(gradients) == 4 and all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "w8a8_static"])
def test_every_weight_of_a_model_gets_a_gradient(tiny_gpt2_dir, scheme):
    model, _ = trained(tiny_gpt2_dir, scheme)
    model(input_ids=IDS, labels=IDS).loss.backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []
    assert len(list(input_fake_quants(model))) == (8 if scheme == "w8a8_static" else 0)


def test_model_is_unchanged_while_nothing_quantizes(tiny_model_dir):
    model, _ = trained(tiny_model_dir, "w8a8")
    fake_quants = [fq for _, _, fq in quantized_weights(model)] + [fq for _, fq in input_fake_quants(model)]
    for fake_quant in fake_quants:
        fake_quant.set_phase(Phase(quantizing=False, bits=fake_quant.spec.bits))
    assert torch.equal(logits(model), logits(float_model(tiny_model_dir)))


def test_bfloat16_autocast_runs_every_matmul_on_the_rounded_grid_values(tiny_model_dir):
    model = float_model(tiny_model_dir)
    insert(model, plan("w4a16_g32"), FakeQuantOptions())
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.fake_weight(), layer.weight_fake_quant(layer.weight, torch.float32).bfloat16())


def test_weight_health_gives_hand_values():
    weight = torch.tensor([[-7.5, 7.0, 0.25, 0.0], [15.0, -2.0, 0.5, 2.0]])
    health = weight_health(weight, grid_for(QuantSpec(4), (2, 4)))
    assert health["codes"].tolist() == [[-8, 7, 0, 0], [7, -1, 0, 1]]
    assert health["scale"].flatten().tolist() == [1.0, 2.0]
    noise = 0.5**2 + 0.25**2 + 1.0**2 + 0.5**2
    signal = float(weight.square().sum())
    assert health["sqnr_db"] == pytest.approx(10 * torch.tensor(signal / noise).log10().item(), abs=1e-4)
    assert health["clip_share"] == 0.0
    frozen = grid_for(QuantSpec(4), (2, 4))
    frozen.freeze(weight)
    assert weight_health(2 * weight, frozen)["clip_share"] == 3 / 8
