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
from qat.nn.kv import fake_quantize_keys, fake_quantize_kv, install_kv, mixed_attention
from qat.scheme import KvSpec

FOLDERS = ["tiny_model_dir", "tiny_gpt2_dir", "tiny_mixtral_dir"]
KV8, KV4_ASYM = KvConfig(8), KvConfig(4, symmetric=False)
KV4_CHANNEL = KvConfig(4, False, "channel", group_size=4, sink_tokens=1, recent_tokens=3)


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
    y = fake_quantize_kv(x, kv_spec(config).values)
    assert torch.equal(y, by_hand(x, config))
    assert torch.equal(fake_quantize_kv(x[:, 1:2, 3:4], kv_spec(config).values), y[:, 1:2, 3:4])
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(fake_quantize_kv(strided, kv_spec(config).values), y)
    assert fake_quantize_kv(x.bfloat16(), kv_spec(config).values).dtype == torch.bfloat16


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


@pytest.mark.parametrize("config", [KV8, KV4_ASYM, KV4_CHANNEL], ids=str)
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


@pytest.mark.parametrize("config", [KV4_ASYM, KV4_CHANNEL], ids=str)
@pytest.mark.parametrize("folder", FOLDERS)
def test_gradient_flows_through_keys_and_values(folder, config, request):
    model = float_model(request.getfixturevalue(folder))
    install_kv(model, kv_spec(config))
    model(input_ids=IDS, labels=IDS).loss.backward()
    names = [n for n, _ in model.named_parameters() if n.endswith(("k_proj.weight", "v_proj.weight", "c_attn.weight"))]
    assert len(names) in (2, 4)
    assert all(model.get_parameter(name).grad.any() for name in names)


def test_kv_gradient_passes_straight_through():
    x = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (dx,) = torch.autograd.grad(fake_quantize_kv(x, kv_spec(KvConfig(2)).values), x, grad)
    assert torch.equal(dx, grad)


def test_kv_refuses_a_model_outside_the_attention_table(tiny_model_dir):
    model = float_model(tiny_model_dir)
    model.config._attn_implementation = "own_kernel"
    with pytest.raises(UserError, match="kv: needs an attention implementation of transformers' table, got own_kernel"):
        install_kv(model, kv_spec(KV8))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


MIXED = [
    KV4_CHANNEL,
    KvConfig(4, False, "channel", group_size=4),
    KvConfig(3, True, "token", sink_tokens=2),
    KvConfig(3, True, "token", recent_tokens=5),
    KvConfig(4, False, "channel", group_size=16, sink_tokens=30),
]


def read_by(query: int, keys: torch.Tensor, values: torch.Tensor, config: KvConfig):
    """Keys and values [T, D] as the query at place `query` reads them, token by token and group by group."""
    keys, values = keys[: query + 1].clone(), values[: query + 1].clone()
    oldest_kept = query - config.recent_tokens + 1
    for token in range(config.sink_tokens, oldest_kept):
        values[token] = by_hand(values[token].float(), config)
        if config.key_axis == "token":
            keys[token] = by_hand(keys[token].float(), config)
    if config.key_axis == "channel":
        for start in range(config.sink_tokens, oldest_kept - config.group_size + 1, config.group_size):
            group = slice(start, start + config.group_size)
            keys[group] = by_hand(keys[group].T.contiguous().float(), config).T.double()
    return keys, values


@pytest.mark.parametrize("config", MIXED, ids=str)
def test_every_query_reads_sinks_and_recent_tokens_in_float_and_whole_groups_on_the_grid(config):
    query, key, value = draw(1, 4, 6, 8), draw(1, 2, 17, 8), draw(1, 2, 17, 8)
    mask = torch.full((6, 17), -torch.inf).triu(12)[None, None]
    out = mixed_attention(torch.nn.Module(), query, key, value, mask, kv_spec(config))
    assert out.shape == (1, 6, 4, 8)
    for head in range(4):
        for row in range(6):
            keys, values = read_by(11 + row, key[0, head // 2], value[0, head // 2], config)
            wanted = (query[0, head, row] @ keys.T / 8**0.5).softmax(-1) @ values
            torch.testing.assert_close(out[0, row, head], wanted, rtol=0, atol=FLOAT64_MODEL)


def test_keys_per_channel_leave_sinks_and_the_incomplete_group():
    keys, spec = draw(1, 2, 11, 8).float(), kv_spec(KV4_CHANNEL)
    y = fake_quantize_keys(keys, spec)
    assert torch.equal(y[:, :, :1], keys[:, :, :1])
    assert torch.equal(y[:, :, 9:], keys[:, :, 9:])
    assert torch.equal(y[0, 1, 1:5, 3], by_hand(keys[0, 1, 1:5, 3], KV4_CHANNEL))
    assert torch.equal(fake_quantize_keys(keys[:, :, :4], spec), keys[:, :, :4])


def test_sinks_and_recent_tokens_longer_than_the_text_leave_the_model_float(tiny_model_dir):
    model, plain = float_model(tiny_model_dir), float_model(tiny_model_dir)
    plain.set_attn_implementation("eager")
    install_kv(model, kv_spec(KvConfig(4, False, "channel", 4, sink_tokens=20, recent_tokens=20)))
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        (("row",), "kv.key_axis: must be token or channel, got row"),
        (("channel",), "kv.group_size: key_axis=channel needs at least 2 tokens, got None"),
        (("token", 32), "kv.group_size: key_axis=token takes no group size, got 32"),
        (("token", None, -1), "kv.sink_tokens: must be a count of tokens, got -1"),
        (("token", None, 0, 1.5), "kv.recent_tokens: must be a count of tokens, got 1.5"),
    ],
)
def test_kv_spec_refuses(parts, match):
    with pytest.raises(UserError, match=match):
        KvSpec(kv_spec(KV8).values, *parts)


def test_groups_need_a_model_that_keeps_its_first_tokens(tiny_mixtral_dir):
    model = float_model(tiny_mixtral_dir)
    model.config.sliding_window = 64
    with pytest.raises(UserError, match="counted from the first token, which is kept, got sliding_window=64"):
        install_kv(model, kv_spec(KV4_CHANNEL))
