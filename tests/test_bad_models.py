"""Model folders that are not what they seem: adapters, other weights, code and pickles in them, layers shared."""

from __future__ import annotations

import json
import logging
import os
import struct

import pytest
import torch
from quant_models import plan
from safetensors.torch import load_file, save_file
from torch import nn

from qat.config import ModelConfig
from qat.errors import UserError
from qat.insert import FakeQuantOptions, insert
from qat.models import load_config, load_model, load_tokenizer, meta_model
from qat.nn.quant import QuantLinear, quantized_weights


def at(folder) -> ModelConfig:
    return ModelConfig(path=str(folder))


HUGE = struct.pack("<Q", 1 << 60) + b'{"a": 1}'
LIES = {
    "html": b"<!DOCTYPE html><html><body>404 not found</body></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n",
    "huge-header": HUGE,
    "header-is-no-json": struct.pack("<Q", 8) + b"{'a': 1}",
    "offsets-outside": struct.pack("<Q", 56) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}  ',
}


@pytest.mark.parametrize("lie", LIES)
def test_file_that_is_no_safetensors_is_named(model_copy, lie):
    (model_copy / "model.safetensors").write_bytes(LIES[lie])
    with pytest.raises(UserError, match=r"model\.safetensors: must be a whole safetensors file") as caught:
        load_model(at(model_copy))
    assert caught.value.before_work


def test_weights_that_the_model_has_not_are_refused(model_copy):
    """A config.json with fewer layers than the weights would train a cut model without a word."""
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"no weights but the model's, got 9 more: model\.layers\.1\."):
        load_model(at(model_copy))


def test_all_that_is_wrong_with_the_names_is_told_at_once(model_copy):
    weights = load_file(model_copy / "model.safetensors")
    weights["model.layers.0.mlp.other.weight"] = weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing: model\.layers\.0\.mlp\.up_proj\.weight") as caught:
        load_model(at(model_copy))
    assert "1 more: model.layers.0.mlp.other.weight" in str(caught.value)


@pytest.mark.parametrize("is_alone", [True, False])
def test_adapter_is_refused_with_the_way_to_merge_it(model_copy, is_alone):
    (model_copy / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/else"}')
    if is_alone:
        (model_copy / "config.json").unlink()
    for load in (load_config, load_model, meta_model):
        with pytest.raises(UserError, match=r"must be a whole model, got an adapter .*merge_and_unload"):
            load(at(model_copy))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_quantized_model_is_refused_by_the_name_of_its_method(model_copy, method):
    config = json.loads((model_copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (model_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"must be a float model, got .*quant_method={method}"):
        load_config(at(model_copy))


class Payload:
    """What a hostile checkpoint holds: unpickled, it makes a folder."""

    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "tokenizer.json"])
def test_pickle_that_runs_code_is_never_opened(model_copy, tmp_path, name):
    marker = tmp_path / "it-ran"
    (model_copy / "model.safetensors").unlink()
    torch.save(Payload(str(marker)), model_copy / name)
    with pytest.raises(UserError, match=r"pickled weights|must be a whole safetensors file|must load|must hold"):
        load_tokenizer(at(model_copy))
        load_model(at(model_copy))
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": "1.0"}', b"<html>"])
def test_tokenizer_that_is_cut_or_none_is_refused(model_copy, content):
    (model_copy / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"model: (must load|the tokenizer must have tokens|must hold)"):
        load_tokenizer(at(model_copy))


def test_code_that_a_config_names_is_not_run_and_said(model_copy, tmp_path, caplog):
    marker = tmp_path / "it-ran"
    (model_copy / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass OwnConfig: pass\n")
    config = json.loads((model_copy / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    config |= {"_attn_implementation_internal": "someone/kernels", "attn_implementation": "someone/kernels"}
    (model_copy / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, logger="qat.model_files"):
        model = load_model(at(model_copy))
    assert type(model).__module__.startswith("transformers.models.llama")
    assert model.config._attn_implementation == "sdpa"
    assert not marker.exists()
    assert "names code in auto_map, _attn_implementation_internal, which is ignored" in caplog.text


class Shared(nn.Module):
    """Calls one linear layer from two places, and a second one twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 32, bias=False)
        self.again = self.first
        self.blocks = nn.ModuleList([nn.Sequential(self.first), nn.Linear(32, 32, bias=False)])

    def forward(self, x):
        x = self.again(self.first(x))
        return self.blocks[1](self.blocks[1](self.blocks[0](x)))


def test_layer_in_several_places_gets_one_grid_in_all_of_them_and_counts_once():
    model = Shared()
    coverage = insert(model, plan("w8a8"), FakeQuantOptions(input_observer="minmax"))
    assert isinstance(model.first, QuantLinear)
    assert model.again is model.first is model.blocks[0][0]
    assert [name for name, _, _ in quantized_weights(model)] == ["first.weight", "blocks.1.weight"]
    assert coverage.weights == coverage.quantized_weights == 2 * 32 * 32
    x = torch.randn(4, 32)
    model(x).square().sum().backward()
    assert model.first.weight.grad.any()
    # the same layers written out: every call is on the grid
    y = x
    for layer in (model.first, model.first, model.first, model.blocks[1], model.blocks[1]):
        y = layer(y)
    assert torch.equal(model(x), y)
