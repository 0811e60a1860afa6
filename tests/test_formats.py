"""Export folders: read(write(m)) == m for every grid, and stock transformers computes with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packed_models import (
    CONV,
    EMBED,
    EXPERTS,
    HEAD,
    QUERY,
    STATIC,
    TOKENS,
    UP,
    W8,
    assert_same,
    full_model,
    small_model,
)
from safetensors.torch import load_file

from qat import grid
from qat.errors import UserError
from qat.formats import FORMATS, compressed_tensors
from qat.formats import folder as on_disk
from qat.packing import pack
from qat.scheme import QuantScheme, QuantSpec


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
    assert len(list(tmp_path.glob("qat-*-of-*.safetensors"))) > 1
    assert not (tmp_path / "qat.safetensors").exists()
    assert_same(compressed_tensors.read(tmp_path), model)


def test_write_stores_the_tensors_that_compressed_tensors_names(tmp_path):
    compressed_tensors.write(full_model(3, False, "group"), tmp_path)
    stored = load_file(tmp_path / "qat.safetensors")
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


IDS = torch.arange(34).view(2, 17) * 7 % 300


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "linear",
    [
        weight_only("w4a16_g32", 4, True, "group", 32),
        weight_only("w4a16_tensor_asym", 4, False, "tensor"),
        weight_only("w8a16", 8),
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
    with torch.no_grad():
        assert torch.equal(stock(IDS).logits, reference(IDS).logits)
    for name, tensor in packed.tensors.items():
        assert torch.equal(stock.get_parameter(name), tensor.dequantize(torch.float32)), name


@pytest.mark.parametrize("table", [weight_only("w8a16_asym", 8, False), weight_only("w4a16_g32", 4, True, "group", 32)])
def test_stock_transformers_reads_a_tied_table_on_other_grids(tmp_path, tiny_model_dir, table):
    from transformers import AutoModelForCausalLM

    packed, reference = quantized(tiny_model_dir, W8, table, tied=True)
    compressed_tensors.write(packed, tmp_path)
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(IDS).logits
        assert torch.equal(stock, reference(IDS).logits)


ASYMMETRIC = [weight_only("w4a16_asym", 4, False), weight_only("w3a16_g32_asym", 3, False, "group", 32)]


@pytest.mark.parametrize("scheme", ASYMMETRIC, ids=lambda scheme: scheme.name)
def test_stock_transformers_is_exact_or_refuses_packed_zero_points(tmp_path, tiny_model_dir, scheme):
    from transformers import AutoModelForCausalLM

    packed, reference = quantized(tiny_model_dir, scheme, W8, tied=True)
    compressed_tensors.write(packed, tmp_path)
    try:
        stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    except RuntimeError as error:
        # compressed-tensors 0.20 allocates them unpacked on the meta device, for its own files too.
        assert "mismatched_sizes" in str(error)
    else:
        with torch.no_grad():
            assert torch.equal(stock(IDS).logits, reference(IDS).logits)


@pytest.mark.parametrize("scheme", ASYMMETRIC, ids=lambda scheme: scheme.name)
def test_compressed_tensors_decompresses_packed_zero_points_to_the_dequantized_weight(tmp_path, scheme):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    model = small_model({QUERY: (scheme, "linear", (37, 96))})
    compressed_tensors.write(model, tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    stored = {n.removeprefix("model.q_proj."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
    stored["weight_scale"] = stored["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(told["format"])
    weight = compressor.decompress(stored, QuantizationScheme(**told))["weight"]
    assert torch.equal(weight, model.tensors[QUERY].dequantize(torch.float32))


def test_stock_transformers_refuses_what_it_would_fill_with_random_weights(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel

    for kind, name, shape in (("conv1d", CONV, (9, 96)), ("experts", EXPERTS, (3, 5, 96))):
        folder = tmp_path / kind
        folder.mkdir()
        model = small_model({name: (W8, kind, shape)}, config={"model_type": "gpt2", "n_embd": 96})
        compressed_tensors.write(model, folder)
        with pytest.raises(ValueError, match="model type `qat-gpt2` but Transformers does not recognize"):
            AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            GPT2LMHeadModel.from_pretrained(folder)
        assert compressed_tensors.read(folder).config["model_type"] == "gpt2"
