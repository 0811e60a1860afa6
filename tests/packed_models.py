"""Small PackedModels for the tests of the file formats, and what it means for two of them to be the same."""

from __future__ import annotations

import torch

from qat import grid
from qat.formats.packed_model import PackedModel
from qat.grid import QParams
from qat.packing import pack
from qat.scheme import KvSpec, QuantScheme, QuantSpec

W8 = QuantScheme("w8a16", QuantSpec(8))
TOKENS = QuantSpec(8, granularity="token", dynamic=True, scale_dtype="float32", is_activation=True)
STATIC = QuantSpec(8, False, "tensor", is_activation=True)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY, UP, CONV = "model.q_proj.weight", "model.up_proj.weight", "model.c_attn.weight"
EXPERTS = "model.experts.gate_up_proj"


def packed_weight(scheme: QuantScheme, shape: tuple[int, ...], seed: int = 0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    qparams = grid.choose_qparams(*grid.min_max(weight, scheme.weight), scheme.weight)
    return pack(grid.quantize(weight, qparams, scheme.weight), qparams, scheme.weight)


def small_model(layers: dict[str, tuple[QuantScheme, str, tuple[int, ...]]], **parts) -> PackedModel:
    """A PackedModel of a few weights: name -> (scheme, kind, shape)."""
    fields = {
        "tensors": {name: packed_weight(scheme, shape) for name, (scheme, _, shape) in layers.items()},
        "schemes": {name: scheme for name, (scheme, _, _) in layers.items()},
        "modules": {name: kind for name, (_, kind, _) in layers.items()},
        "tied": {},
        "input_qparams": {},
        "floats": {"model.norm.weight": torch.randn(96), "model.gate.weight": torch.randn(5, 96)},
        "config": {"model_type": "llama", "hidden_size": 96},
        "kv": None,
    }
    return PackedModel(**(fields | parts))


def assert_same(one: PackedModel, other: PackedModel) -> None:
    for part in ("schemes", "modules", "tied", "config", "kv"):
        assert getattr(one, part) == getattr(other, part), part
    assert list(one.tensors) == list(other.tensors)
    for name, tensor in one.tensors.items():
        same = other.tensors[name]
        assert (tensor.spec, tensor.shape) == (same.spec, same.shape)
        assert torch.equal(tensor.packed, same.packed)
        assert torch.equal(tensor.scale, same.scale)
        assert (tensor.zero_point is None) == (same.zero_point is None)
        assert tensor.zero_point is None or torch.equal(tensor.zero_point, same.zero_point)
        assert torch.equal(tensor.codes(), same.codes())
    assert set(one.input_qparams) == set(other.input_qparams)
    for name, qparams in one.input_qparams.items():
        assert all(torch.equal(a, b) for a, b in zip(qparams, other.input_qparams[name], strict=True))
    assert set(one.floats) == set(other.floats)
    assert all(torch.equal(tensor, other.floats[name]) for name, tensor in one.floats.items())


def full_model(bits: int, symmetric: bool, granularity: str) -> PackedModel:
    """Every kind of module at once, with odd sizes; K = 96 holds two groups of 48."""
    size = 48 if granularity == "group" else None
    spec = QuantSpec(bits, symmetric, granularity, size)
    a16, a8 = QuantScheme("a16", spec), QuantScheme("a8", spec, TOKENS)
    layers = {
        EMBED: (QuantScheme("table", spec), "embedding", (21, 96)),
        QUERY: (a8, "linear", (7, 96)),
        UP: (QuantScheme("static", spec, STATIC), "linear", (33, 96)),
        CONV: (a16, "conv1d", (9, 96)),
        EXPERTS: (a16, "experts", (3, 5, 96)),
    }
    inputs = {"model.up_proj": QParams(torch.tensor([0.0625]), torch.tensor([-3], dtype=torch.int32))}
    values = QuantSpec(4, symmetric, "token", dynamic=True, is_activation=True)
    kv = KvSpec(values, "channel", 16, 4, 32) if granularity == "group" else KvSpec(values)
    return small_model(layers, tied={HEAD: EMBED}, input_qparams=inputs, kv=kv)
