"""Keys and values on a grid: every model of the attention table reads them, and decoding is the same arithmetic."""

from __future__ import annotations

import pytest
import torch
from quant_models import IDS, float_model, logits
from tolerances import FLOAT64_MODEL
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qat.config import KvConfig, kv_spec
from qat.errors import UserError
from qat.nn.kv import fake_quantize_kv, install_kv

FOLDERS = ["tiny_model_dir", "tiny_gpt2_dir", "tiny_mixtral_dir"]
KV8, KV4_ASYM = KvConfig(8), KvConfig(4, symmetric=False)


def by_hand(x: torch.Tensor, config: KvConfig) -> torch.Tensor:
    """The grid of one head's vector, written out once more."""
    steps = 2**config.bits - 1
    if config.symmetric:
        scale = x.abs().amax(-1, keepdim=True) / (steps // 2)
        return torch.round(x / scale).clamp(-(steps // 2) - 1, steps // 2) * scale
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / steps
    zero_point = torch.round(-(steps + 1) / 2 - low / scale).clamp(-(steps + 1) // 2, steps // 2)
    codes = torch.round(x / scale) + zero_point
    return (codes.clamp(-(steps + 1) // 2, steps // 2) - zero_point) * scale


@pytest.mark.parametrize("config", [KV8, KV4_ASYM, KvConfig(8, False), KvConfig(4)], ids=str)
def test_each_head_and_token_has_a_grid_of_its_own(config):
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 5).view(5, 1)
    y = fake_quantize_kv(x, kv_spec(config))
    assert torch.equal(y, by_hand(x, config))
    assert torch.equal(fake_quantize_kv(x[:, 1:2, 3:4], kv_spec(config)), y[:, 1:2, 3:4])
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(fake_quantize_kv(strided, kv_spec(config)), y)
    assert fake_quantize_kv(x.bfloat16(), kv_spec(config)).dtype == torch.bfloat16


@pytest.mark.parametrize("config", [KV8, KV4_ASYM], ids=str)
@pytest.mark.parametrize("folder", FOLDERS)
def test_attention_reads_keys_and_values_quantized_by_hand(folder, config, request):
    folder = request.getfixturevalue(folder)
    model, manual = float_model(folder), float_model(folder)
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, query, key, value, *args, **kwargs):
        return inner(module, query, by_hand(key, config), by_hand(value, config), *args, **kwargs)

    AttentionInterface.register("kv_by_hand", attention)
    AttentionMaskInterface.register("kv_by_hand", AttentionMaskInterface()["sdpa"])
    manual.set_attn_implementation("kv_by_hand")
    install_kv(model, kv_spec(config))
    assert torch.equal(logits(model), logits(manual))
    assert not torch.equal(logits(model), logits(float_model(folder)))


def test_no_kv_grid_leaves_the_model_as_it_is(tiny_model_dir):
    model = float_model(tiny_model_dir)
    install_kv(model, None)
    assert model.config._attn_implementation == "sdpa"


def test_fewer_bits_are_further_from_the_float_model(tiny_model_dir):
    distances = []
    for bits in (8, 4, 2):
        model = float_model(tiny_model_dir)
        install_kv(model, kv_spec(KvConfig(bits)))
        distances.append(float((logits(model) - logits(float_model(tiny_model_dir))).abs().max()))
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("config", [KV8, KV4_ASYM], ids=str)
@pytest.mark.parametrize("folder", FOLDERS)
def test_decoding_with_a_cache_equals_the_whole_forward(folder, config, request):
    # in float64, where no key sits so near a rounding point that another order of sums moves its code
    model = float_model(request.getfixturevalue(folder)).double()
    if folder == "tiny_mixtral_dir":
        model.set_experts_implementation("eager")  # the grouped matmul knows no float64
    install_kv(model, kv_spec(config))
    whole, steps, cache = logits(model), [], None
    with torch.no_grad():
        for ids in (IDS[:, :9], *IDS[:, 9:].split(1, 1)):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=FLOAT64_MODEL)


@pytest.mark.parametrize("folder", FOLDERS)
def test_gradient_flows_through_keys_and_values(folder, request):
    model = float_model(request.getfixturevalue(folder))
    install_kv(model, kv_spec(KV4_ASYM))
    model(input_ids=IDS, labels=IDS).loss.backward()
    names = [n for n, _ in model.named_parameters() if n.endswith(("k_proj.weight", "v_proj.weight", "c_attn.weight"))]
    assert len(names) in (2, 4)
    assert all(model.get_parameter(name).grad.any() for name in names)


def test_kv_gradient_passes_straight_through():
    x = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (dx,) = torch.autograd.grad(fake_quantize_kv(x, kv_spec(KvConfig(2))), x, grad)
    assert torch.equal(dx, grad)


def test_kv_refuses_a_model_outside_the_attention_table(tiny_model_dir):
    model = float_model(tiny_model_dir)
    model.config._attn_implementation = "own_kernel"
    with pytest.raises(UserError, match="kv: needs an attention implementation of transformers' table, got own_kernel"):
        install_kv(model, kv_spec(KV8))
