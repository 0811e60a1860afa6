"""A Llama model with random weights as a float16 GGUF file without a vocabulary, for llama.cpp to quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

# name in transformers -> name in GGUF; what a layer has stands behind model.layers.N and blk.N
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Any, file: Path) -> None:
    """Write a tied LlamaForCausalLM with plain rotary embeddings; turns its weights into float16 in place."""
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, value in model.half().named_parameters():
        writer.add_tensor(gguf_name(name), stored(name, value.detach(), config.head_dim).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """The GGUF name of a parameter of transformers."""
    if name in WHOLE:
        return WHOLE[name]
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{OF_LAYER[part]}.weight"


def stored(name: str, value: Tensor, head_dim: int) -> Tensor:
    """Norms are float32; rows of q and k are reordered, for llama.cpp rotates neighbours and transformers halves."""
    if value.dim() == 1:
        return value.float()
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return value
    halves = value.view(-1, 2, head_dim // 2, value.shape[-1])
    return halves.transpose(1, 2).reshape(value.shape)
