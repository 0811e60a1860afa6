"""Rotary frequencies as transformers makes them, so that the engine turns keys and queries as the model was trained."""

from __future__ import annotations

from typing import Any

import torch


def rotary_frequencies(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [D / 2] of a model's rotary embedding, and the factor of its cosines.

    Args:
        config: content of config.json.
    """
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    made = AutoConfig.for_model(**config)
    kind = (made.rope_parameters or {}).get("rope_type", "default")
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](made, torch.device("cpu"))
    size = getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads
    theta = (made.rope_parameters or {}).get("rope_theta", 10000.0)
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size), 1.0
