"""The decode engine: prefill and decoding of the Llama family in C++, several sequences at a time.

Weights are laid out once (q, k, v merged, gate and up merged); the cache is static, bfloat16, or int8 on the grid that
`kv=kv8` trained. Schemes with float inputs are served with float inputs (two int8 planes, see `kernels/cpu`), schemes
with int8 inputs with int8 inputs: what is served is what was trained. `refuses` says which models it cannot run; those
go through transformers' `generate` on packed layers.

Letters: M rows of a call (tokens of any sequences), S scored rows, H hidden size, V vocabulary, T positions of a slot.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError, problem
from qat.formats.packed_model import PackedModel
from qat.kernels import cpu
from qat.kernels.reference import packed_embedding
from qat.packing import PackedTensor

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
NEEDED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NEEDED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def refuses(model: PackedModel) -> str | None:
    """Why the engine cannot run a model, or None."""
    config = model.config
    if config.get("model_type") not in FAMILY:
        return f"model type {config.get('model_type')} is not one of {', '.join(FAMILY)}"
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        return f"rotary type {rope.get('rope_type')} is not supported yet"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "partial rotary embeddings are not supported yet"
    if config.get("hidden_act") != "silu":
        return f"activation {config.get('hidden_act')} is not silu"
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        return "sliding-window attention is not supported yet"
    if model.kv is not None and not (model.kv.bits == 8 and model.kv.symmetric):
        return f"a cache of {model.kv.describe()} is not supported yet"
    if any(name.endswith(("o_proj.bias", "down_proj.bias", "up_proj.bias", "gate_proj.bias")) for name in model.floats):
        return "biases outside of q, k, v are not supported yet"
    return _weights_refused(model)


def _weights_refused(model: PackedModel) -> str | None:
    names = [
        f"model.layers.{i}.{part}.weight"
        for i in range(model.config["num_hidden_layers"])
        for part in (*NEEDED, *NEEDED_MLP)
    ]
    missing = [name for name in (*names, "model.embed_tokens.weight") if name not in model.tensors]
    if missing or _head_name(model) not in model.tensors:
        return f"not all weights are packed ({', '.join([*missing, _head_name(model)][:2])})"
    schemes = {model.schemes[name] for name in names}
    if len(schemes) > 1:
        return "the layers have different schemes"
    scheme = schemes.pop()
    if scheme.input is not None and (reason := cpu.refuses_input(scheme.input)):
        return reason
    return next((reason for name in names if (reason := cpu.refuses(model.tensors[name]))), None)


def _head_name(model: PackedModel) -> str:
    return model.tied.get("lm_head.weight", "lm_head.weight")


class Engine:
    """A packed model ready to decode.

    Args:
        positions: T, the longest sequence (prompt and answer) of a slot.
        slots: sequences held at one time.
    Raises:
        UserError: `refuses` has a reason.
    """

    def __init__(self, model: PackedModel, positions: int = 1024, slots: int = 1):
        reason = refuses(model)
        if reason:
            fix = "Use --backend dense, which goes through transformers."
            raise UserError(problem("engine", "must be able to run the model", reason, fix))
        config = model.config
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        layers = config["num_hidden_layers"]
        self.positions, self.slots = min(positions, config["max_position_embeddings"]), slots
        self.table, self.vocabulary = model.tensors["model.embed_tokens.weight"], config["vocab_size"]
        floats, weights = self._parts(model, layers, head_dim)
        self._planes = [_planes(model, "model.layers.0.mlp.up_proj.weight"), _planes(model, _head_name(model))]
        facts = [config["hidden_size"], heads, kv_heads, head_dim, config["intermediate_size"], self.positions, slots]
        facts += [config["vocab_size"], layers, int(model.kv is not None), *self._planes]
        blobs = [weight.blob for weight in weights]
        grids = [number for w in weights for number in (w.n, w.k, w.group, w.bits)]
        self.bytes_per_token = sum(blob.numel() for blob in blobs)
        self._handle = torch.ops.qat.engine_new(facts, config["rms_norm_eps"], floats, blobs, grids)
        weakref.finalize(self, torch.ops.qat.engine_free, torch.empty(0), self._handle)

    def _parts(self, model: PackedModel, layers: int, head_dim: int) -> tuple[list[Tensor], list[cpu.CpuWeight]]:
        """The float tensors and laid-out weights in the order that `engine_new` wants."""
        theta = (model.config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
        inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
        angles = torch.outer(torch.arange(self.positions).float(), inverse)
        none = torch.empty(0)
        floats = [angles.cos().contiguous(), angles.sin().contiguous(), model.floats["model.norm.weight"].float()]
        weights = []
        for layer in range(layers):
            base = f"model.layers.{layer}."
            biases = [model.floats.get(f"{base}self_attn.{name}_proj.bias") for name in "qkv"]
            bias = (
                torch.cat([b.float() for b in biases if b is not None]) if all(b is not None for b in biases) else none
            )
            for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
                floats.append(model.floats.get(f"{base}{name}.weight", none).float().contiguous())
            floats.append(bias)
            for group in (NEEDED[:3], NEEDED[3:], NEEDED_MLP[:2], NEEDED_MLP[2:]):
                weights.append(cpu.prepack([self._weight(model, f"{base}{part}.weight") for part in group]))
        weights.append(cpu.prepack([self._weight(model, _head_name(model))]))
        return floats, weights

    @staticmethod
    def _weight(model: PackedModel, name: str) -> PackedTensor:
        return model.tensors[name]

    def forward(self, ids: Tensor, slot: Tensor, position: Tensor, scored: Tensor) -> Tensor:
        """Run rows [M] of token ids at their slots and positions; logits [S, V] float32 of the rows `scored` [S].

        Rows of one sequence must come in order of position; their keys and values are cached.
        """
        x_MH = packed_embedding(ids, self.table).contiguous()
        return torch.ops.qat.engine_forward(x_MH, slot.contiguous(), position.contiguous(), scored, self._handle)

    def best(self, ids: Tensor, slot: Tensor, position: Tensor, scored: Tensor) -> Tensor:
        """As `forward`, but the most likely token [S] int64 of each scored row."""
        return self.forward(ids, slot, position, scored).argmax(-1)


def _planes(model: PackedModel, name: str) -> int:
    return 1 if model.schemes[name].input is not None else 2


def generate(
    engine: Engine,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos: set[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """New token ids for each prompt; all sequences decode together, a finished one stops costing.

    Raises:
        UserError: a prompt with its answer does not fit into a slot.
    """
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    if longest > engine.positions or len(prompts) > engine.slots:
        given = f"{len(prompts)} sequences of up to {longest}"
        fix = "Shorten the prompt or the answer, or make the engine larger."
        raise UserError(problem("engine", f"holds {engine.slots} sequences of {engine.positions}", given, fix))
    sampler = torch.Generator().manual_seed(seed)
    answers: list[list[int]] = [[] for _ in prompts]
    last = {}
    for slot, prompt in enumerate(prompts):
        last[slot] = _choose(_prefill(engine, prompt, slot), temperature, sampler)[0]
    for _ in range(max_new_tokens):
        active = []
        for slot, token in list(last.items()):
            if token in eos:
                del last[slot]
            else:
                answers[slot].append(token)
                active.append(slot)
        if not active or len(answers[active[0]]) >= max_new_tokens:
            break
        ids = torch.tensor([last[slot] for slot in active])
        positions = torch.tensor([len(prompts[slot]) + len(answers[slot]) - 1 for slot in active])
        logits = engine.forward(ids, torch.tensor(active), positions, torch.arange(len(active)))
        for slot, token in zip(active, _choose(logits, temperature, sampler), strict=True):
            last[slot] = token
    return answers


def _prefill(engine: Engine, prompt: list[int], slot: int, chunk: int = 256) -> Tensor:
    """Cache a prompt in pieces; logits [1, V] of its last token."""
    logits = torch.empty(0)
    for start in range(0, len(prompt), chunk):
        ids = torch.tensor(prompt[start : start + chunk])
        count = ids.numel()
        slots, positions = torch.full((count,), slot), torch.arange(start, start + count)
        logits = engine.forward(ids, slots, positions, torch.tensor([count - 1]))
    return logits


def _choose(logits: Tensor, temperature: float, sampler: Any) -> list[int]:
    """One token for each row of logits [S, V]: the best, or a sample at a temperature above 0."""
    if temperature <= 0:
        return logits.argmax(-1).tolist()
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=sampler).flatten().tolist()
