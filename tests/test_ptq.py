"""qat/ptq: every method beats round-to-nearest, its codes are what is packed, and bad input is refused before work."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from quant_models import float_model, plan

from qat import grid
from qat.config import DataConfig
from qat.convert import pack_model
from qat.data import load_windows
from qat.errors import UserError
from qat.grid import QParams
from qat.insert import FakeQuantOptions, insert
from qat.nn.quant import quantized_weights
from qat.ptq import PTQ_METHODS, awq, gptq
from qat.ptq.apply import apply, check
from qat.ptq.blocks import enter, find_blocks
from qat.ptq.options import PtqOptions
from qat.ptq.ranges import from_extremes, search
from qat.ptq.text import batches
from qat.scheme import QuantSpec
from qat.train.calibrate import calibrate

STATIC = FakeQuantOptions("ste_clipped", "static", "minmax")


@pytest.fixture(scope="module")
def text(tiny_text, tiny_tokenizer):
    """Windows of 32 tokens."""
    return load_windows(DataConfig(path=str(tiny_text), block_size=32, eval_tokens=150), tiny_tokenizer)


@pytest.fixture(scope="module")
def learned(tiny_model_dir, text):
    """The tiny Llama after 80 steps on the text, so that its weights mean something."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(80):
        batch = text.train[torch.arange(step * 8, step * 8 + 8) % len(text.train)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def inserted(model, scheme: str = "w3a16_g32", **plan_parts):
    """A copy with training layers of the scheme and their first scales, and the coverage."""
    model = copy.deepcopy(model)
    named = plan("w2a16_g32", **plan_parts) if scheme == "w3a16_g32" else plan(scheme, **plan_parts)
    if scheme == "w3a16_g32":
        named = replace(named, default=replace(named.default, weight=replace(named.default.weight, bits=3)))
    coverage = insert(model, named, STATIC)
    calibrate(model, torch.zeros(1, 8, dtype=torch.int64), 1)
    return model, coverage


def quantized(model, text, method: str, scheme: str = "w3a16_g32", **options):
    """The copy after the method, and the coverage."""
    model, coverage = inserted(model, scheme)
    chosen = PtqOptions(method, windows=len(text.train), **options)
    check(model, coverage, text.train, chosen)
    apply(model, text.train, chosen)
    return model, coverage


@torch.no_grad()
def divergence(model, learned, ids) -> float:
    """KL of the quantized model's predictions from the float model's."""
    ours, theirs = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, learned))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


# KL to the float model as a share of that of rounding to nearest: the most that is accepted, found with this model
SHARES = {
    ("gptq", "w3a16_g32"): 0.3,
    ("gptq", "w4a16_row"): 0.5,
    ("gptq", "w4a16_g64_asym"): 0.5,
    ("gptq", "w4a8_g32"): 0.5,
    ("awq", "w3a16_g32"): 0.9,
    ("awq", "w4a16_row"): 0.95,
    ("awq", "w4a8_g32"): 0.9,
}


@pytest.mark.parametrize(("method", "scheme"), SHARES)
def test_method_beats_round_to_nearest_on_held_out_text(learned, text, method, scheme):
    rtn, _ = quantized(learned, text, "rtn", scheme)
    model, _ = quantized(learned, text, method, scheme)
    ours, theirs = (divergence(m, learned, text.evaluation) for m in (model, rtn))
    assert ours < SHARES[method, scheme] * theirs


@pytest.mark.parametrize("method", ["rtn_mse", "gptq", "awq"])
def test_method_lowers_the_error_of_the_first_block(learned, text, method):
    def error(model) -> float:
        # the model's own first block alone, on inputs that no method changes
        block, inputs = model.model.layers[0], learned.model.embed_tokens(text.evaluation)
        rotary = learned.model.rotary_emb(inputs, torch.arange(inputs.shape[1])[None])
        with torch.no_grad():
            outputs = [layers(inputs, position_embeddings=rotary) for layers in (block, learned.model.layers[0])]
        return float((outputs[0] - outputs[1]).square().mean())

    rtn, _ = quantized(learned, text, "rtn")
    model, _ = quantized(learned, text, method)
    assert error(model) < error(rtn)


@pytest.mark.parametrize("method", PTQ_METHODS)
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g64_asym", "w4a8_g32"])
def test_codes_of_a_method_are_those_of_the_export(learned, text, method, scheme):
    model, coverage = quantized(learned, text, method, scheme)
    packed = pack_model(model, coverage, {}, None)
    for name, weight, fake_quant in quantized_weights(model):
        tensor, spec = packed.tensors[name], fake_quant.spec
        assert torch.equal(tensor.codes(), grid.quantize(weight, fake_quant.qparams(weight), spec))
        assert torch.equal(tensor.scale, tensor.scale.bfloat16().float()), (
            "a stored scale is rounded before codes are chosen"
        )
        if method == "gptq" and "layers" in name:
            assert torch.equal(tensor.dequantize(torch.float32), weight), "weights lie on their grid"


def test_scales_alone_leave_the_weights(learned, text):
    model, _ = quantized(learned, text, "gptq", keep="scales")
    rtn, _ = quantized(learned, text, "rtn")
    for ours, theirs, fresh in zip(find_blocks(model), find_blocks(rtn), learned.model.layers, strict=True):
        for name, target in ours.targets.items():
            linear = fresh.get_submodule(name.removeprefix(f"{ours.name}."))
            assert torch.equal(target.weight(), linear.weight)
            other = theirs.targets[name].module.weight_fake_quant
            assert not torch.equal(target.module.weight_fake_quant.scale, other.scale)


def test_compensated_weights_are_off_the_grid_and_round_to_the_codes_of_gptq(learned, text):
    rounded, _ = quantized(learned, text, "gptq")
    model, _ = quantized(learned, text, "gptq", keep="compensated")
    for ours, theirs, fresh in zip(find_blocks(model), find_blocks(rounded), learned.model.layers, strict=True):
        for name, target in ours.targets.items():
            weight, wanted = target.weight(), theirs.targets[name].weight()
            fake_quant = target.module.weight_fake_quant
            assert torch.equal(fake_quant.scale, theirs.targets[name].module.weight_fake_quant.scale)
            assert torch.equal(
                grid.fake_quantize(weight, fake_quant.qparams(weight), target.spec, torch.float32), wanted
            )
            assert not torch.equal(weight, wanted)
            assert not torch.equal(weight, fresh.get_submodule(name.removeprefix(f"{ours.name}.")).weight)


def test_scaling_of_awq_changes_nothing_in_float(learned, text):
    model, _ = quantized(learned, text, "awq")
    for block in find_blocks(model):
        for target in block.targets.values():
            target.quantizing(False)
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, learned.model.layers[0].input_layernorm.weight)
    table = {name: fq for name, _, fq in quantized_weights(model) if "embed" in name}
    for fake_quant in table.values():
        fake_quant.set_phase(replace(fake_quant.now, quantizing=False))
    ids = text.evaluation
    torch.testing.assert_close(model(input_ids=ids).logits, learned(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


def test_value_scales_are_shared_by_the_heads_that_read_them():
    scale = torch.arange(1.0, 7.0)  # 2 value heads of 3 channels, each read by 2 query heads
    assert awq.shared(scale, 2, 3).tolist() == [1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert awq.mean_power(awq.shared(scale, 2, 3), 2, 3).tolist() == scale.tolist()


def test_stages_follow_the_calls_of_the_block(learned, text):
    model, _ = inserted(learned)
    blocks = find_blocks(model)
    enter(model, blocks, [text.train[:2], text.train[:3, :7]])
    names = [[name.rpartition(".")[2] for name in stage] for stage in blocks[0].stages()]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_batches_hold_the_chosen_windows_in_two_lengths():
    windows = torch.arange(10 * 64).view(10, 64)
    found = batches(windows, 8, 0.5, seed=1)
    assert {batch.shape[1] for batch in found} == {64, 8}
    tokens = torch.cat([batch.flatten() for batch in found])
    assert len(tokens) == len(tokens.unique()) == 8 * 64
    assert sum(len(batch) for batch in found if batch.shape[1] == 64) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, batches(windows, 8, 0.5, seed=1), strict=True))


def spec(bits: int = 4, size: int | None = 8, symmetric: bool = True) -> QuantSpec:
    return QuantSpec(bits, symmetric, "group" if size else "channel", size)


def output_error(rounded: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    return float((((rounded - weight) @ hessian) * (rounded - weight)).sum())


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_equals_a_plain_transcription_of_the_formula(act_order):
    torch.manual_seed(0)
    x, weight = torch.randn(200, 24) @ torch.randn(24, 24), torch.randn(5, 24)
    hessian, grid_spec = x.t() @ x / 100, spec()
    qparams = from_extremes(weight, grid_spec)
    found = gptq.solve(weight, qparams, grid_spec, *gptq.factorize(hessian, 0.01, act_order, "w"))[0]
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(24)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order])).mT.float()
    left = weight[:, order].clone()
    for i, column in enumerate(order):
        at = QParams(*(q[:, column // 8 : column // 8 + 1] for q in qparams))
        one = grid.fake_quantize(left[:, i : i + 1].clone(), at, spec(size=None), torch.float32)
        left[:, i:] -= (left[:, i : i + 1] - one) / upper[i, i] * upper[i, i:]
        left[:, i] = one[:, 0]
    wanted = torch.empty_like(left)
    wanted[:, order] = left
    codes = [grid.quantize(w, qparams, grid_spec) for w in (found, wanted)]
    assert (codes[0] != codes[1]).float().mean() < 0.02, "but for ties, the same codes"
    assert output_error(found, weight, hessian) == pytest.approx(output_error(wanted, weight, hessian), rel=0.02)


def test_gptq_rounds_a_dead_column_to_nearest(capsys):
    torch.manual_seed(0)
    x, weight = torch.randn(100, 16), torch.randn(4, 16)
    x[:, 3] = 0
    qparams = from_extremes(weight, spec())
    found = gptq.solve(weight, qparams, spec(), *gptq.factorize(x.t() @ x, 0.01, True, "layer"))[0]
    assert torch.equal(found[:, 3], grid.fake_quantize(weight, qparams, spec(), torch.float32)[:, 3])
    assert "layer: 1 of 16 inputs are always 0" in capsys.readouterr().err


def test_gptq_takes_a_hessian_of_low_rank():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 16), torch.randn(4, 16)
    hessian, qparams = x.t() @ x, from_extremes(weight, spec())
    found = gptq.solve(weight, qparams, spec(), *gptq.factorize(hessian, 0.01, True, "layer"))[0]
    rtn = grid.fake_quantize(weight, qparams, spec(), torch.float32)
    assert output_error(found, weight, hessian) < output_error(rtn, weight, hessian)


def test_gptq_raises_damping_until_the_hessian_is_positive_definite(capsys):
    hessian = torch.eye(8) * 4
    hessian[0, 1] = hessian[1, 0] = 4.3  # eigenvalue -0.3: damping 0.01 * 4 is too little, 0.1 * 4 is enough
    _, factor = gptq.factorize(hessian, 0.01, True, "layer")
    assert torch.isfinite(factor).all()
    assert "layer: the Hessian needed damping 0.1 of" in capsys.readouterr().err
    hessian[0, 1] = hessian[1, 0] = 400.0
    with pytest.raises(UserError, match=r"layer: Hessian must be positive definite, .* not at damping 10"):
        gptq.factorize(hessian, 0.01, True, "layer")


def test_search_with_a_gram_matrix_minimizes_the_output_error():
    torch.manual_seed(0)
    x, weight = torch.randn(100, 16) @ torch.randn(16, 16), torch.randn(4, 16)
    hessian, row = x.t() @ x, spec(3, None)
    errors = [
        output_error(grid.fake_quantize(weight, qparams, row, torch.float32), weight, hessian)
        for qparams in (search(weight, row, hessian), search(weight, row), from_extremes(weight, row))
    ]
    assert errors[0] == min(errors)
    assert errors[0] < errors[2]


def test_too_few_tokens_are_refused_with_their_count(learned, text):
    model, coverage = inserted(learned)
    wanted = r"at least 128 tokens, the inputs of model.layers.0.mlp.down_proj, got 96 \(3 windows of 32\)"
    with pytest.raises(UserError, match=wanted) as caught:
        check(model, coverage, text.train, PtqOptions("gptq", windows=3))
    assert caught.value.before_work
    check(model, coverage, text.train[:1], PtqOptions("rtn_mse", windows=3))


def test_awq_refuses_static_inputs_and_other_blocks(learned, text, tiny_gpt2_dir):
    model, coverage = inserted(learned, "w8a8_static")
    with pytest.raises(UserError, match="ptq=awq moves the ranges of inputs") as caught:
        check(model, coverage, text.train, PtqOptions("awq"))
    assert caught.value.before_work
    gpt2, coverage = inserted(float_model(tiny_gpt2_dir), "w4a16_g32")
    with pytest.raises(UserError, match="ptq=awq needs blocks with the layers of Llama, and input_layernorm"):
        check(gpt2, coverage, text.train, PtqOptions("awq"))


def test_gptq_takes_conv1d_and_refuses_fused_experts(text, tiny_gpt2_dir, tiny_mixtral_dir):
    model, _ = quantized(float_model(tiny_gpt2_dir), text, "gptq", "w4a16_g32")
    for name, weight, fake_quant in quantized_weights(model):
        if "h." in name:
            assert torch.equal(fake_quant(weight, torch.float32), weight), name
    mixtral, coverage = inserted(float_model(tiny_mixtral_dir), "w4a16_g32")
    with pytest.raises(UserError, match=r"ptq=gptq: quantizes linear layers, got fused experts, model.layers.0"):
        check(mixtral, coverage, text.train, PtqOptions("gptq"))


def test_unknown_method_is_refused(learned, text):
    model, coverage = inserted(learned)
    with pytest.raises(UserError, match=r"ptq.method: must be one of .*, got gtpq. Did you mean 'gptq'\?"):
        check(model, coverage, text.train, PtqOptions("gtpq"))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_nan_while_calibrating_names_the_layer(learned, text, method):
    model, _ = inserted(learned)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[5] = torch.nan
    with pytest.raises(UserError, match=r"model.layers.1.self_attn.q_proj: inputs must be finite") as caught:
        apply(model, text.train, PtqOptions(method, windows=8))
    assert not caught.value.before_work
