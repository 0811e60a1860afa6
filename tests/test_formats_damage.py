"""Damaged and tampered export folders are refused with the name of the file or tensor, before anything is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packed_models import EMBED, HEAD, QUERY, STATIC, UP, W8, small_model
from safetensors.torch import load_file, save_file

from qat.errors import UserError
from qat.formats import compressed_tensors
from qat.formats.folder import check_checksums, write_checksums
from qat.grid import QParams
from qat.scheme import QuantScheme, QuantSpec


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
    "shape-indivisible": (
        "model.q_proj.weight_shape",
        torch.tensor([7, 95]),
        r"weight_scale: must be bfloat16 \[7, 1\]",
    ),
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
