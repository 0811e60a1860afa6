"""Keys and values on an integer grid: per token and head, dynamic, straight-through, before attention reads them.

Installed as a transformers attention implementation of its own name (`qat_kv8_sym_sdpa`, ...), so it works for every
model that goes through transformers' attention table, in training, evaluation and serving alike. A token's keys depend
on that token alone, so quantizing the whole cache at each step equals quantizing each entry when it is appended.
The bytes are saved by the decode engine's cache, not here: this is the arithmetic.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qat import estimators, grid
from qat.errors import UserError, problem
from qat.estimators import ESTIMATORS
from qat.scheme import QuantSpec


def fake_quantize_kv(x: Tensor, spec: QuantSpec) -> Tensor:
    """x [batch, heads, tokens, head_dim] with every head's vector on its own grid, same shape and dtype."""
    scale, zero_point = grid.choose_qparams(*grid.min_max(x, spec), spec)
    return estimators.fake_quantize(x, scale, zero_point, spec, ESTIMATORS["ste_pass_through"], x.dtype)


def install_kv(model: nn.Module, spec: QuantSpec | None) -> None:
    """Make a transformers model's attention read quantized keys and values; None leaves the model as it is.

    Raises UserError when the model does not use transformers' attention table.
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
    inner = ALL_ATTENTION_FUNCTIONS[base]
    mask = AttentionMaskInterface()[base]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return inner(module, query, fake_quantize_kv(key, spec), fake_quantize_kv(value, spec), *args, **kwargs)

    assert not base.startswith("qat_kv"), "a KV grid is installed once"
    name = f"qat_kv{spec.bits}_{'sym' if spec.symmetric else 'asym'}_{base}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    model_any.set_attn_implementation(name)
