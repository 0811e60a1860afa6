"""Keys and values on an integer grid, dynamic, straight-through, before attention reads them.

    uniform      keys and values of every token and head on a grid of their own: any attention reads them
    otherwise    keys per channel in groups of tokens, or float sinks and recent tokens (KvSpec): how a query reads a
                 token depends on how far back it is, so scores and sums are made once from the floats and once from
                 the grid, and each pair of query and token takes its own; attention weights exist in full

Installed as a transformers attention implementation of its own name (`qat_kv_int8_sym_token_sdpa`, ...), so it works
for every model that goes through transformers' attention table, in training, evaluation and serving alike. A grid looks
at tokens up to the query only, and groups are counted from the start of the sequence, so quantizing the whole cache at
each step equals quantizing each group when it is whole. The bytes are saved by the decode engine's cache, not here:
this is the arithmetic.

Letters: B batch, H heads, T tokens, D head_dim, Q queries.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat import estimators, grid
from qat.errors import UserError, problem
from qat.estimators import ESTIMATORS
from qat.scheme import KvSpec, QuantSpec


def fake_quantize_kv(x: Tensor, spec: QuantSpec) -> Tensor:
    """x [B, H, T, D] with every head's vector on its own grid, same shape and dtype."""
    scale, zero_point = grid.choose_qparams(*grid.min_max(x, spec), spec)
    return estimators.fake_quantize(x, scale, zero_point, spec, ESTIMATORS["ste_pass_through"], x.dtype)


def fake_quantize_keys(keys: Tensor, spec: KvSpec) -> Tensor:
    """Keys [B, H, T, D] on their grid; per channel, sinks and the last incomplete group stay as they are."""
    if spec.key_axis == "token":
        return fake_quantize_kv(keys, spec.keys)
    assert spec.group_size is not None
    first = min(spec.sink_tokens, keys.shape[2])
    whole = (keys.shape[2] - first) // spec.group_size * spec.group_size
    if not whole:
        return keys
    grouped = keys[:, :, first : first + whole].transpose(2, 3).contiguous()
    quantized = fake_quantize_kv(grouped, spec.keys).transpose(2, 3)
    return torch.cat([keys[:, :, :first], quantized, keys[:, :, first + whole :]], 2)


def on_grid(queries: int, tokens: int, spec: KvSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which tokens the last `queries` of `tokens` read from the grid: two masks [Q, T], for keys and for values."""
    token = torch.arange(tokens, device=device)
    newest = torch.arange(tokens - queries, tokens, device=device)[:, None] - spec.recent_tokens
    values = (token >= spec.sink_tokens) & (token <= newest)
    if spec.key_axis == "token":
        return values, values
    assert spec.group_size is not None
    group = (token - spec.sink_tokens) // spec.group_size
    last = spec.sink_tokens + (group + 1) * spec.group_size - 1
    return (token >= spec.sink_tokens) & (last <= newest), values


def mixed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    spec: KvSpec,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of query [B, H, Q, D] on key, value [B, H', T, D] as `spec` reads them: [B, Q, H, D].

    `attention_mask` [B, 1, Q, T] is added to the scores, as transformers' eager attention has it.
    """
    shared = query.shape[1] // key.shape[1]
    keys_here, values_here = on_grid(query.shape[2], key.shape[2], spec, query.device)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def scores(keys: Tensor) -> Tensor:
        return query @ keys.repeat_interleave(shared, 1).transpose(2, 3) * scaling

    def summed(weights: Tensor, values: Tensor) -> Tensor:
        return weights @ values.repeat_interleave(shared, 1)

    logits = torch.where(keys_here, scores(fake_quantize_keys(key, spec)), scores(key))
    if attention_mask is not None:
        logits = logits + attention_mask[:, :, :, : key.shape[2]]
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    quantized = fake_quantize_kv(value, spec.values)
    out = summed(weights * values_here, quantized) + summed(weights * ~values_here, value)
    return out.transpose(1, 2).contiguous()


def install_kv(model: nn.Module, spec: KvSpec | None) -> None:
    """Make a transformers model's attention read quantized keys and values; None leaves the model as it is.

    Raises UserError when the model does not use transformers' attention table, or forgets tokens that groups are
    counted from.
    """
    if spec is None:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model_any: Any = model
    base = model_any.config._attn_implementation
    if base not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        fix = "Set model.attention=sdpa, or drop the kv choice for this model."
        raise UserError(problem("kv", "needs an attention implementation of transformers' table", base, fix))
    window = getattr(model_any.config.get_text_config(), "sliding_window", None)
    if not spec.is_uniform and window is not None:
        fix = "Use kv=kv8, or kv.key_axis=token without sink and recent tokens."
        given = f"sliding_window={window}"
        raise UserError(problem("kv", "groups and sinks are counted from the first token, which is kept", given, fix))
    inner = ALL_ATTENTION_FUNCTIONS[base]

    def uniform(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = fake_quantize_kv(key, spec.keys), fake_quantize_kv(value, spec.values)
        return inner(module, query, keys, values, *args, **kwargs)

    def mixed(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        options = kwargs.get("scaling"), kwargs.get("dropout", 0.0)
        return mixed_attention(module, query, key, value, attention_mask, spec, *options), None

    assert not base.startswith("qat_kv"), "a KV grid is installed once"
    name = f"qat_kv_{spec.describe().replace(' ', '_').replace(',', '')}_{base}"
    AttentionInterface.register(name, uniform if spec.is_uniform else mixed)
    # the mask of eager attention is always a tensor, which is what `mixed_attention` adds
    AttentionMaskInterface.register(name, AttentionMaskInterface()[base if spec.is_uniform else "eager"])
    model_any.set_attn_implementation(name)
