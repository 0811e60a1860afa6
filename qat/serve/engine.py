"""The decode engine: prefill and decoding of the Llama family in C++, several sequences at a time.

Weights are laid out once (q, k, v merged, gate and up merged); the cache is static, bfloat16, or int8 on the grid that
`kv=kv8` trained. Schemes with float inputs are served with float inputs (two int8 planes, see `kernels/cpu`), schemes
with int8 inputs, dynamic or stored, with int8 inputs: what is served is what was trained. `refuses` says which models
it cannot run; those go through transformers' `generate` on packed layers.

Weights that a plan keeps in float are served as bfloat16. Layers may have different schemes. The number of threads
follows the times of the steps: a core that another process keeps busy is left alone.

Letters: M rows of a call (tokens of any sequences), S scored rows, H hidden size, V vocabulary, T positions of a slot.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError, problem
from qat.formats.packed_model import PackedModel
from qat.kernels import cpu
from qat.serve.rotary import rotary_frequencies

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
NEEDED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NEEDED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


TABLE = "model.embed_tokens.weight"
BIASES = ("o_proj.bias", "down_proj.bias", "up_proj.bias", "gate_proj.bias", "lm_head.bias")


def refuses(model: PackedModel) -> str | None:
    """Why the engine cannot run a model, or None."""
    config = model.config
    if config.get("model_type") not in FAMILY:
        return f"model type {config.get('model_type')} is not one of {', '.join(FAMILY)}"
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        return f"rotary type {rope.get('rope_type')} is not supported yet"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "partial rotary embeddings are not supported yet"
    if config.get("hidden_act") != "silu":
        return f"activation {config.get('hidden_act')} is not silu"
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if head_dim % 16 or head_dim > 512:
        return f"head size must be a multiple of 16 up to 512, got {head_dim}"
    kv = model.kv
    if kv is not None and not (kv.is_uniform and kv.values.bits == 8 and kv.values.symmetric):
        return f"a cache of {kv.describe()} is not supported yet"
    if any(name.endswith(BIASES) for name in model.floats):
        return "biases outside of q, k, v are not supported yet"
    return _weights_refused(model)


def _weights_refused(model: PackedModel) -> str | None:
    names = [
        f"model.layers.{i}.{part}.weight"
        for i in range(model.config["num_hidden_layers"])
        for part in (*NEEDED, *NEEDED_MLP)
    ]
    names += [TABLE, _head_name(model)]
    missing = [name for name in names if name not in model.tensors and name not in model.floats]
    if missing:
        return f"weights are missing ({', '.join(missing[:2])})"
    for name in names:
        if name in model.floats:
            continue
        spec = model.schemes[name].input
        if spec is not None and not spec.dynamic and not spec.symmetric:
            return f"{name}: stored input grids with zero points are not supported yet"
        if reason := (cpu.refuses_input(spec) if spec else None) or cpu.refuses(model.tensors[name]):
            return f"{name}: {reason}"
    return cpu.unavailable()


def _head_name(model: PackedModel) -> str:
    if model.config.get("tie_word_embeddings") and "lm_head.weight" not in {*model.tensors, *model.floats}:
        return TABLE
    return model.tied.get("lm_head.weight", "lm_head.weight")


class Engine:
    """A packed model ready to decode.

    Args:
        positions: T, the longest sequence (prompt and answer) of a slot.
        slots: sequences held at one time.
        int8_cache: keys and values as int8; None follows the model's own KV grid.
    Raises:
        UserError: `refuses` has a reason.
    """

    def __init__(self, model: PackedModel, positions: int = 1024, slots: int = 1, int8_cache: bool | None = None):
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
        self.vocabulary = config["vocab_size"]
        int8_cache = model.kv is not None if int8_cache is None else int8_cache
        facts = [config["hidden_size"], heads, kv_heads, head_dim, config["intermediate_size"], self.positions, slots]
        facts += [self.vocabulary, layers, int(int8_cache)]
        linears = self._linears(model, layers)
        parts = [part for linear in linears for part in linear]
        grids = [number for part in parts for number in (*part.weight.grid, part.planes)]
        scales, counts = [part.input_scale for part in parts], [len(linear) for linear in linears]
        blobs = [part.weight.blob for part in parts]
        del linears, parts  # so that a blob is freed when it has been moved
        cpu.in_huge_pages(blobs)
        # the table is read a row at a time
        self.bytes_per_token = sum(blob.numel() for blob in blobs[1:])
        self._handle = torch.ops.qat.engine_new(
            *(facts, config["rms_norm_eps"], self._floats(model, layers), _windows(config)),
            *(blobs, grids, scales, counts),
        )
        weakref.finalize(self, torch.ops.qat.engine_free, torch.empty(0), self._handle)

    def _linears(self, model: PackedModel, layers: int) -> list[list[_Part]]:
        """Laid-out weights: the table, then q k v, o, gate up, down of every layer, then the head."""
        head = [_part(model, [_head_name(model)])]
        table = head if _head_name(model) == TABLE else [_part(model, [TABLE])]
        linears = [table]
        for layer in range(layers):
            for names in (NEEDED[:3], NEEDED[3:], NEEDED_MLP[:2], NEEDED_MLP[2:]):
                linears.append(_parts(model, [f"model.layers.{layer}.{name}.weight" for name in names]))
        return [*linears, head]

    def _floats(self, model: PackedModel, layers: int) -> list[Tensor]:
        """The float tensors in the order that `engine_new` wants."""
        inverse, factor = rotary_frequencies(model.config)
        angles = torch.outer(torch.arange(self.positions).float(), inverse)
        none = torch.empty(0)
        floats = [(angles.cos() * factor).contiguous(), (angles.sin() * factor).contiguous()]
        floats.append(model.floats["model.norm.weight"].float().contiguous())
        for layer in range(layers):
            base = f"model.layers.{layer}."
            for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
                floats.append(model.floats.get(f"{base}{name}.weight", none).float().contiguous())
            biases = [model.floats.get(f"{base}self_attn.{name}_proj.bias") for name in "qkv"]
            given = [bias.float() for bias in biases if bias is not None]
            floats.append(torch.cat(given) if given else none)
        return floats

    def forward(self, ids: Tensor, slot: Tensor, position: Tensor, scored: Tensor) -> Tensor:
        """Run rows [M] of token ids at their slots and positions; logits [S, V] float32 of the rows `scored` [S].

        Rows of one sequence must come in order of position; their keys and values are cached.
        """
        return torch.ops.qat.engine_forward(ids, slot, position, scored, 0, self._handle)[0]

    def best(self, ids: Tensor, slot: Tensor, position: Tensor, scored: Tensor) -> Tensor:
        """As `forward`, but the most likely token [S] int64 of each scored row; -1 for a row whose logits are NaN."""
        return self.top(ids, slot, position, scored, 1)[1].flatten()

    def top(self, ids: Tensor, slot: Tensor, position: Tensor, scored: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `forward`, but the k largest logits and their tokens, [S, k] each, best first."""
        return torch.ops.qat.engine_forward(ids, slot, position, scored, k, self._handle)

    @property
    def threads(self) -> int:
        """Threads of the latest step: the engine uses as many as made steps fastest lately."""
        return torch.ops.qat.engine_threads(torch.empty(0), self._handle)


@dataclass(frozen=True)
class _Part:
    """A laid-out weight, its input planes, and the scale of its stored input grid (0: each token its own)."""

    weight: cpu.CpuWeight
    planes: int
    input_scale: float


def _part(model: PackedModel, names: list[str]) -> _Part:
    """One laid-out weight of stacked matrices; matrices kept in float are bfloat16."""
    if names[0] in model.floats:
        return _Part(cpu.prepack_floats([model.floats[name] for name in names]), 1, 0.0)
    planes = 2 if model.schemes[names[0]].input is None else 1
    return _Part(cpu.prepack([model.tensors[name] for name in names]), planes, _input_scale(model, names[0]))


def _input_scale(model: PackedModel, name: str) -> float:
    spec = model.schemes[name].input if name in model.schemes else None
    return 0.0 if spec is None or spec.dynamic else float(model.input_qparams[name.removesuffix(".weight")].scale)


def _parts(model: PackedModel, names: list[str]) -> list[_Part]:
    """Matrices that read the same inputs: merged where neighbours have the same scheme and stored input grid."""
    groups: list[list[str]] = []
    for name in names:
        same = (model.schemes.get(name), _input_scale(model, name))
        if groups and (model.schemes.get(groups[-1][0]), _input_scale(model, groups[-1][0])) == same:
            groups[-1].append(name)
        else:
            groups.append([name])
    return [_part(model, group) for group in groups]


def _windows(config: dict[str, Any]) -> list[int]:
    """Positions that each layer attends to; 0 is all."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window") or 0
    kinds = config.get("layer_types")
    if kinds:
        return [window if kind == "sliding_attention" else 0 for kind in kinds]
    return [window if config.get("use_sliding_window", True) else 0] * layers
