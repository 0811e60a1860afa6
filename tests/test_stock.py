"""Stock transformers on our packed layers after one import; also run with an older transformers (Makefile)."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from test_engine import packed_model
from tolerances import ENGINE_LOGITS
from transformers import AutoModelForCausalLM

from qat.errors import UserError
from qat.formats import compressed_tensors
from qat.nn.packed import PackedEmbedding, PackedLinear
from qat.serve import stock
from qat.serve.load import serve

SCHEMES = ["w4a16_g32", "w4a16_g32_asym", "w4a16_row_asym", "w4a8_g32", "w8a8", "w3a16_g64"]
IDS = torch.tensor([[5, 17, 100, 42, 7, 9, 250]])


stock.restore()  # collecting this file must not change what other tests load


@pytest.fixture(autouse=True)
def as_trained():
    stock.install()
    stock.use("as_trained")
    yield
    stock.use("auto")
    stock.restore()


def exported(folder, packed):
    folder.mkdir(exist_ok=True)
    compressed_tensors.write(packed, folder)
    return folder


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_from_pretrained_gives_the_logits_of_serve(tiny_model_dir, tmp_path, scheme, kv_bits):
    packed = packed_model(tiny_model_dir, scheme, kv_bits)
    folder = exported(tmp_path, packed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(PackedLinear) == 15 and kinds.count(PackedEmbedding) == 1 and torch.nn.Linear not in kinds
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, serve(packed)(IDS).logits)


def test_one_import_is_enough(tiny_model_dir, tmp_path):
    folder = exported(tmp_path, packed_model(tiny_model_dir, "w4a16_g32"))
    code = (
        "import sys, qat.serve.stock; from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "PackedLinear"


def test_auto_agrees_with_the_arithmetic_of_training(tiny_model_dir, tmp_path):
    packed = packed_model(tiny_model_dir, "w4a8_g32")
    stock.use("auto")
    model = AutoModelForCausalLM.from_pretrained(exported(tmp_path, packed))
    with torch.no_grad():
        wanted = serve(packed)(IDS).logits
        assert (model(IDS).logits - wanted).abs().max() <= ENGINE_LOGITS * wanted.abs().max()


def test_generate_continues_as_served_layers_do(tiny_model_dir, tmp_path):
    packed = packed_model(tiny_model_dir, "w4a16_g32")
    model = AutoModelForCausalLM.from_pretrained(exported(tmp_path, packed))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    wanted = serve(packed).generate(IDS, attention_mask=mask, **options)
    assert torch.equal(model.generate(IDS, attention_mask=mask, **options), wanted)


def test_another_dtype_is_replaced_and_said(tiny_model_dir, tmp_path, caplog):
    folder = exported(tmp_path, packed_model(tiny_model_dir, "w4a16_g32"))
    with caplog.at_level(logging.WARNING, logger="qat.serve.stock"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert "float32 activations" in caplog.text and model(IDS).logits.dtype == torch.float32


def test_folder_asked_to_be_dequantized_goes_to_transformers_and_says_so(tiny_model_dir, tmp_path, caplog):
    from transformers import CompressedTensorsConfig

    folder = foreign(tiny_model_dir, tmp_path, "pack-quantized", symmetric=True)
    with caplog.at_level(logging.WARNING, logger="qat.serve.stock"):
        config = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert "dequantize=True" in caplog.text
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_damaged_folder_is_refused(tiny_model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = exported(tmp_path, packed_model(tiny_model_dir, "w4a16_g32"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"must hold model\.layers\.0\.mlp\.up_proj\.weight_scale"):
        AutoModelForCausalLM.from_pretrained(folder)


def foreign(source, folder, container: str, symmetric: bool):
    """A folder that compressed-tensors' own compressor wrote, every linear layer but the head in int4 g32 or int8."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    bits, strategy = (4, "group") if container == "pack-quantized" else (8, "channel")
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    if strategy == "group":
        weights["group_size"] = 32
    group = {"targets": ["Linear"], "weights": weights, "format": container}
    if bits == 8:
        dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        group["input_activations"] = dynamic
    told = {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "format": container}
    told |= {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    config = QuantizationConfig.model_validate(told)
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        grouped = module.weight.view(module.weight.shape[0], -1, 32 if bits == 4 else module.weight.shape[1])
        scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
        module.weight_scale.data.copy_(scale)
        if getattr(module, "weight_zero_point", None) is not None:
            module.weight_zero_point.data.copy_(zero_point)
    ModelCompressor(quantization_config=config).compress_model(model)
    folder.mkdir(exist_ok=True)
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    plain = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(plain | {"quantization_config": told}))
    return folder


@pytest.mark.parametrize(("container", "symmetric"), [("pack-quantized", True), ("int-quantized", True)])
def test_folder_of_compressed_tensors_own_compressor_loads(tiny_model_dir, tmp_path, container, symmetric):
    folder = foreign(tiny_model_dir, tmp_path, container, symmetric)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(isinstance(module, PackedLinear) for module in ours.modules()) == 14
    stock.restore()
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    finally:
        stock.install()
    with torch.no_grad():
        wanted = theirs(IDS).logits
        # theirs divides 8-bit inputs by 127.5, ours by 127
        assert (ours(IDS).logits - wanted).abs().max() <= ENGINE_LOGITS * wanted.abs().max()
