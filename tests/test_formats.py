"""Export folders: read(write(m)) == m for every grid, stock transformers agrees, and damage is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat import grid
from qat.errors import UserError
from qat.formats import FORMATS, compressed_tensors
from qat.formats import folder as on_disk
from qat.formats.folder import check_checksums, write_checksums
from qat.formats.packed_model import PackedModel
from qat.grid import QParams
from qat.packing import pack
from qat.scheme import QuantScheme, QuantSpec

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
    kv = QuantSpec(4, symmetric, "token", dynamic=True, is_activation=True)
    return small_model(layers, tied={HEAD: EMBED}, input_qparams=inputs, kv=kv)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_read_returns_what_write_was_given(tmp_path, name, symmetric, granularity, bits):
    model = full_model(bits, symmetric, granularity)
    FORMATS[name].write(model, tmp_path)
    assert_same(FORMATS[name].read(tmp_path), model)


def test_read_returns_what_write_was_given_when_split_over_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "SHARD_SIZE", "1KB")
    model = full_model(4, False, "group")
    compressed_tensors.write(model, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(compressed_tensors.read(tmp_path), model)


def test_write_stores_the_tensors_that_compressed_tensors_names(tmp_path):
    compressed_tensors.write(full_model(3, False, "group"), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    shapes = {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in stored.items()}
    assert shapes == {
        "model.norm.weight": ("float32", [96]),
        "model.gate.weight": ("float32", [5, 96]),
        "model.embed_tokens.weight": ("int8", [21, 96]),
        "model.embed_tokens.weight_scale": ("bfloat16", [21, 2]),
        "model.embed_tokens.weight_zero_point": ("int8", [21, 2]),
        "lm_head.weight_scale": ("bfloat16", [21, 2]),
        "lm_head.weight_zero_point": ("int8", [21, 2]),
        "model.q_proj.weight_packed": ("int32", [7, 9]),
        "model.q_proj.weight_scale": ("bfloat16", [7, 2]),
        "model.q_proj.weight_zero_point": ("int32", [1, 2]),
        "model.q_proj.weight_shape": ("int64", [2]),
        "model.up_proj.weight_packed": ("int32", [33, 9]),
        "model.up_proj.weight_scale": ("bfloat16", [33, 2]),
        "model.up_proj.weight_zero_point": ("int32", [4, 2]),
        "model.up_proj.weight_shape": ("int64", [2]),
        "model.up_proj.input_scale": ("bfloat16", [1]),
        "model.up_proj.input_zero_point": ("int8", [1]),
        "model.c_attn.weight_packed": ("int32", [9, 9]),
        "model.c_attn.weight_scale": ("bfloat16", [9, 2]),
        "model.c_attn.weight_zero_point": ("int32", [1, 2]),
        "model.c_attn.weight_shape": ("int64", [2]),
        "model.experts.gate_up_proj_packed": ("int32", [15, 9]),
        "model.experts.gate_up_proj_scale": ("bfloat16", [15, 2]),
        "model.experts.gate_up_proj_zero_point": ("int32", [2, 2]),
        "model.experts.gate_up_proj_shape": ("int64", [3]),
    }


def test_quantization_config_groups_by_grid_and_container_and_ignores_floats(tmp_path):
    w4 = QuantScheme("w4a16_g32", QuantSpec(4, True, "group", 32))
    layers = {
        EMBED: (W8, "embedding", (21, 96)),
        QUERY: (w4, "linear", (7, 96)),
        UP: (QuantScheme("w8a8", QuantSpec(8), TOKENS), "linear", (33, 96)),
        "model.down_proj.weight": (w4, "linear", (96, 64)),
    }
    compressed_tensors.write(small_model(layers, tied={HEAD: EMBED}), tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    groups = told.pop("config_groups")
    assert told == {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ["model.gate"],
        "kv_cache_scheme": None,
    }
    assert [(group["targets"], group["format"]) for group in groups.values()] == [
        (["model.embed_tokens", "lm_head"], "int-quantized"),
        (["model.q_proj", "model.down_proj"], "pack-quantized"),
        (["model.up_proj"], "int-quantized"),
    ]
    kinds = {"type": "int", "symmetric": True}
    assert groups["group_1"]["weights"] == kinds | {
        "num_bits": 4,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }
    assert groups["group_1"]["input_activations"] is None
    assert groups["group_2"]["input_activations"] == kinds | {
        "num_bits": 8,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }


def test_write_refuses_a_model_that_diverged(tmp_path):
    model = small_model({QUERY: (W8, "linear", (7, 96))})
    model.tensors[QUERY].scale[0] = float("nan")
    with pytest.raises(UserError, match=r"model.q_proj.weight: scales must be finite and positive, got nan"):
        compressed_tensors.write(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_write_refuses_a_static_input_without_its_grid(tmp_path):
    model = small_model({UP: (QuantScheme("static", QuantSpec(8), STATIC), "linear", (7, 96))})
    with pytest.raises(UserError, match=r"model\.up_proj: a static input needs exactly one stored grid, got none"):
        compressed_tensors.write(model, tmp_path)


def test_write_refuses_the_config_of_a_quantized_model(tmp_path):
    model = small_model({QUERY: (W8, "linear", (7, 96))})
    model.config["quantization_config"] = {}
    with pytest.raises(UserError, match="must be that of a float model"):
        compressed_tensors.write(model, tmp_path)


# ---- stock transformers ----------------------------------------------------------------------------------------------


def quantized(source: Path, linear: QuantScheme, table: QuantScheme, tied: bool):
    """(PackedModel of a tiny Hugging Face model, that float model holding the dequantized weights)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, tie_word_embeddings=tied).eval()
    if not tied:
        torch.nn.init.normal_(model.lm_head.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    parts = small_model({}, floats={}, config=json.loads(model.config.to_json_string(use_diff=False)))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parts.floats[name] = parameter.detach().clone()
            continue
        scheme = table if name in (EMBED, HEAD) else linear
        qparams = grid.choose_qparams(*grid.min_max(parameter, scheme.weight), scheme.weight)
        parts.tensors[name] = pack(grid.quantize(parameter, qparams, scheme.weight), qparams, scheme.weight)
        parts.schemes[name] = scheme
        parts.modules[name] = "embedding" if name == EMBED else "linear"
        parameter.data = parts.tensors[name].dequantize(torch.float32)
    if tied:
        parts.tied = {HEAD: EMBED}
    return parts, model


def weight_only(name: str, *grid_of_weight) -> QuantScheme:
    return QuantScheme(name, QuantSpec(*grid_of_weight))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "linear",
    [
        weight_only("w4a16_g32", 4, True, "group", 32),
        weight_only("w4a16_asym", 4, False, "channel"),
        weight_only("w4a16_g64_asym", 4, False, "group", 64),
        weight_only("w8a16", 8),
        weight_only("w8a16_tensor_asym", 8, False, "tensor"),
        weight_only("w3a16_g64", 3, True, "group", 64),
    ],
    ids=lambda scheme: scheme.name,
)
def test_stock_transformers_gives_the_logits_of_the_dequantized_weights(tmp_path, tiny_model_dir, linear, tied):
    from transformers import AutoModelForCausalLM

    packed, reference = quantized(tiny_model_dir, linear, W8, tied)
    compressed_tensors.write(packed, tmp_path)
    stock, loading = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    ids = torch.arange(34).view(2, 17) * 7 % 300
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, reference(ids).logits)
    for name, tensor in packed.tensors.items():
        assert torch.equal(stock.get_parameter(name), tensor.dequantize(torch.float32)), name


@pytest.mark.parametrize("table", [weight_only("w8a16_asym", 8, False), weight_only("w4a16_g32", 4, True, "group", 32)])
def test_stock_transformers_reads_a_tied_table_on_other_grids(tmp_path, tiny_model_dir, table):
    from transformers import AutoModelForCausalLM

    packed, reference = quantized(tiny_model_dir, W8, table, tied=True)
    compressed_tensors.write(packed, tmp_path)
    ids = torch.arange(17).view(1, 17)
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
        assert torch.equal(stock, reference(ids).logits)


def test_stock_transformers_refuses_what_it_would_fill_with_random_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    for kind, name, shape in (("conv1d", CONV, (9, 96)), ("experts", EXPERTS, (3, 5, 96))):
        folder = tmp_path / kind
        folder.mkdir()
        model = small_model({name: (W8, kind, shape)}, config={"model_type": "gpt2", "n_embd": 96})
        compressed_tensors.write(model, folder)
        with pytest.raises(ValueError, match="model type `qat-gpt2` but Transformers does not recognize"):
            AutoModelForCausalLM.from_pretrained(folder)
        assert compressed_tensors.read(folder).config["model_type"] == "gpt2"


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def export(tmp_path) -> Path:
    """A good folder with its checksums; q_proj is packed, asymmetric w3 g48; the table is int8."""
    layers = {
        EMBED: (W8, "embedding", (21, 96)),
        QUERY: (QuantScheme("w3", QuantSpec(3, False, "group", 48)), "linear", (7, 96)),
        UP: (QuantScheme("static", QuantSpec(5, True, "tensor"), STATIC), "linear", (33, 95)),
        "model.down_proj.weight": (QuantScheme("w4", QuantSpec(4, False, "tensor")), "linear", (7, 96)),
    }
    inputs = {"model.up_proj": QParams(torch.tensor([0.0625]), torch.tensor([-3]))}
    compressed_tensors.write(small_model(layers, tied={HEAD: EMBED}, input_qparams=inputs), tmp_path)
    write_checksums(tmp_path)
    compressed_tensors.read(tmp_path)
    check_checksums(tmp_path)
    return tmp_path


def change_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    stored = load_file(folder / "model.safetensors")
    if tensor is None:
        del stored[name]
    else:
        stored[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, *path: str | int, to: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    (folder / "config.json").write_text(json.dumps(config))


BF16 = torch.bfloat16
DAMAGED_TENSORS = {
    "scale-nan": ("model.q_proj.weight_scale", torch.full((7, 2), float("nan"), dtype=BF16), "finite and positive"),
    "scale-zero": ("model.q_proj.weight_scale", torch.zeros(7, 2, dtype=BF16), "finite and positive, got 0.0"),
    "scale-negative": ("model.q_proj.weight_scale", -torch.ones(7, 2, dtype=BF16), "finite and positive, got -1.0"),
    "scale-shape": ("model.q_proj.weight_scale", torch.ones(7, 1, dtype=BF16), r"must be bfloat16 \[7, 2\], got"),
    "scale-dtype": ("model.q_proj.weight_scale", torch.ones(7, 2), r"must be bfloat16 \[7, 2\], got float32"),
    "words-shape": ("model.q_proj.weight_packed", torch.zeros(7, 8, dtype=torch.int32), r"must be int32 \[7, 9\]"),
    "words-dtype": ("model.q_proj.weight_packed", torch.zeros(7, 9), r"must be int32 \[7, 9\], got float32"),
    "words-padding": ("model.up_proj.weight_packed", -torch.ones(33, 15, dtype=torch.int32), "must be 0, got others"),
    "shape-huge": ("model.q_proj.weight_shape", torch.tensor([1 << 60, 96]), "model.q_proj.weight_scale: must be"),
    "shape-negative": ("model.q_proj.weight_shape", torch.tensor([-7, 96]), "none empty, got"),
    "shape-indivisible": ("model.q_proj.weight_shape", torch.tensor([7, 95]), "multiple of group_size=48, got 95"),
    "shape-3d": ("model.q_proj.weight_shape", torch.tensor([1, 7, 96]), "linear weight must have 2 dimensions"),
    "shape-float": ("model.q_proj.weight_shape", torch.tensor([7.0, 96.0]), "must be a list of int64, got float32"),
    "zero-words-padding": (
        "model.q_proj.weight_zero_point",
        -torch.ones(1, 2, dtype=torch.int32),
        "q_proj.weight_zero_point: bits behind the last code",
    ),
    "zero-range": (
        "model.down_proj.weight_zero_point",
        torch.tensor([9], dtype=torch.int8),
        r"zero points must be in \[-8, 7\], got 9",
    ),
    "int8-shape": (EMBED, torch.zeros(20, 96, dtype=torch.int8), r"embed_tokens.weight_scale: must be bfloat16 \[20"),
    "int8-dtype": (EMBED, torch.zeros(21, 96), r"embed_tokens.weight: must be int8 \[21, 96\], got float32"),
    "alias-scale": (
        "lm_head.weight_scale",
        torch.ones(21, 1, dtype=BF16),
        "must equal model.embed_tokens.weight_scale",
    ),
    "input-nan": (
        "model.up_proj.input_scale",
        torch.full((1,), float("nan"), dtype=BF16),
        "up_proj.input: scales must",
    ),
    "input-shape": ("model.up_proj.input_scale", torch.ones(2, dtype=BF16), r"input_scale: must be bfloat16 \[1\]"),
    "missing-weight": ("model.q_proj.weight_packed", None, "must hold model.q_proj.weight_packed, got 1 missing"),
    "missing-float": ("model.norm.weight", None, "must hold model.norm.weight, got 1 missing"),
    "unexpected": ("model.extra.weight", torch.ones(2, 2), "must not hold model.extra.weight, got 1 unexpected"),
}


@pytest.mark.parametrize("case", DAMAGED_TENSORS)
def test_read_refuses_a_damaged_tensor(export, case):
    name, tensor, message = DAMAGED_TENSORS[case]
    change_tensor(export, name, tensor)
    with pytest.raises(UserError, match=message):
        compressed_tensors.read(export)


def test_read_refuses_int8_codes_outside_the_range_of_their_bits(tmp_path):
    table = QuantScheme("w4", QuantSpec(4))
    compressed_tensors.write(small_model({EMBED: (table, "embedding", (21, 96))}), tmp_path)
    change_tensor(tmp_path, EMBED, torch.full((21, 96), 8, dtype=torch.int8))
    with pytest.raises(UserError, match=r"codes must be in \[-8, 7\], got \[8, 8\]"):
        compressed_tensors.read(tmp_path)


DAMAGED_CONFIGS = {
    "version": (("qat", "format_version"), 2, "format_version must be 1, got 2"),
    "no-facts": (("qat",), None, "must hold our facts under 'qat'"),
    "no-quantization": (("quantization_config",), None, "must hold quantization_config, got none"),
    "other-bits-told": (
        ("quantization_config", "config_groups", "group_1", "weights", "num_bits"),
        4,
        "quantization_config must say what the tensors hold",
    ),
    "other-bits": (("qat", "schemes", 1, "weight", "bits"), 4, r"weight_zero_point|weight_packed: must be int32"),
    "impossible-bits": (("qat", "schemes", 1, "weight", "bits"), 9, "must be a whole number from 2 to 8, got 9"),
    "text-for-bool": (("qat", "schemes", 1, "weight", "symmetric"), "no", "must hold bits, symmetric"),
    "dynamic-weight": (("qat", "schemes", 1, "weight", "dynamic"), True, "weight grids are stored"),
    "scheme-index": (("qat", "modules", QUERY, "scheme"), 4, "scheme must be below 4, got 4"),
    "negative-index": (("qat", "modules", QUERY, "scheme"), -1, "scheme must be below 4, got -1"),
    "kind": (("qat", "modules", QUERY, "kind"), "dense", "module kind must be one of"),
    "conv1d": (("qat", "modules", QUERY, "kind"), "conv1d", "model_type must be qat-llama, got llama"),
    "tied": (("qat", "tied", HEAD), "model.nothing.weight", "must hold|must not hold"),
    "floats": (("qat", "floats"), {"a": 1}, "must be a list"),
    "model-type": (("model_type",), "gpt2", "model_type must be llama, got gpt2"),
}


@pytest.mark.parametrize("case", DAMAGED_CONFIGS)
def test_read_refuses_a_config_that_disagrees(export, case):
    path, value, message = DAMAGED_CONFIGS[case]
    change_config(export, *path, to=value)
    with pytest.raises(UserError, match=message):
        compressed_tensors.read(export)


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_read_names_a_truncated_file(export, kept):
    file = export / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors: must be a whole safetensors file"):
        compressed_tensors.read(export)


def test_read_names_a_file_that_is_not_json_or_not_there(export):
    (export / "config.json").write_bytes(b'{"model_type": "ll')
    with pytest.raises(UserError, match=r"config\.json: must be readable JSON"):
        compressed_tensors.read(export)
    (export / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: must exist"):
        compressed_tensors.read(export)


def test_read_names_missing_tensors_file(export):
    (export / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: must exist"):
        compressed_tensors.read(export)


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "..", "a\\b.safetensors"])
def test_read_refuses_an_index_that_points_outside_the_folder(export, name):
    (export / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError, match="must list plain file names"):
        compressed_tensors.read(export)


def test_read_refuses_an_index_that_names_other_tensors(export):
    index = {"weight_map": {"model.norm.weight": "model.safetensors"}}
    (export / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"must hold what model.safetensors.index.json says, got lm_head"):
        compressed_tensors.read(export)
    (export / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["model.safetensors"]}))
    with pytest.raises(UserError, match="must hold a weight_map of names"):
        compressed_tensors.read(export)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_check_checksums_names_a_file_with_a_flipped_bit(export, file):
    content = bytearray((export / file).read_bytes())
    content[-5] ^= 1
    (export / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file}: must have sha256"):
        check_checksums(export)


def test_check_checksums_names_missing_files_and_refuses_paths(export):
    (export / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json: must have sha256 .* got no such file"):
        check_checksums(export)
    (export / "checksums.json").write_text(json.dumps({"../other": "0"}))
    with pytest.raises(UserError, match="must list plain file names"):
        check_checksums(export)
