"""Float models in: what loads, and what is refused by name before any training."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.config import ModelConfig
from qat.errors import UserError
from qat.models import (
    check_tokenizer,
    fix_pre_tokenizer,
    gguf_keys,
    hidden_and_head,
    is_tied,
    load_config,
    load_model,
    load_tokenizer,
    local_source,
    meta_model,
)


@pytest.fixture
def model_copy(tiny_model_dir, tmp_path):
    """A copy of the tiny Llama that a test may damage."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def at(folder, **changes) -> ModelConfig:
    return ModelConfig(path=str(folder), **changes)


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))


def test_load_model_gives_float32_eval_weights_equal_to_the_file(tiny_model_dir):
    model = load_model(at(tiny_model_dir, attention="eager"))
    assert not model.training and model.config._attn_implementation == "eager"
    state = model.state_dict()
    for name, wanted in load_file(tiny_model_dir / "model.safetensors").items():
        assert state[name].dtype == torch.float32 and torch.equal(state[name], wanted)


def test_load_model_widens_bfloat16_weights_to_float32(model_copy):
    halved = {name: tensor.bfloat16() for name, tensor in load_file(model_copy / "model.safetensors").items()}
    save_file(halved, model_copy / "model.safetensors", metadata={"format": "pt"})
    edit_config(model_copy, dtype="bfloat16")
    model = load_model(at(model_copy))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.get_input_embeddings().weight, halved["model.embed_tokens.weight"].float())


@pytest.mark.parametrize(
    ("fixture", "tied"), [("tiny_model_dir", True), ("tiny_gpt2_dir", True), ("tiny_mixtral_dir", False)]
)
def test_meta_model_has_the_real_models_shapes_and_ties(request, fixture, tied):
    folder = request.getfixturevalue(fixture)
    real, meta = load_model(at(folder)), meta_model(at(folder))
    assert is_tied(real) == is_tied(meta) == tied
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
    assert [(n, p.shape) for n, p in real.named_parameters()] == [(n, p.shape) for n, p in meta.named_parameters()]


def test_meta_model_needs_only_config_json(tiny_model_dir, tmp_path):
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    assert meta_model(at(tmp_path)).num_parameters() == load_model(at(tiny_model_dir)).num_parameters()


@pytest.mark.parametrize("fixture", ["tiny_model_dir", "tiny_gpt2_dir", "tiny_mixtral_dir"])
def test_hidden_and_head_give_the_models_logits(request, fixture):
    model = load_model(at(request.getfixturevalue(fixture)))
    base, head = hidden_and_head(model)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(head(base(ids).last_hidden_state), model(ids).logits)


@pytest.mark.parametrize("key", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_hidden_and_head_refuses_a_model_that_changes_its_logits(tiny_model_dir, key):
    model = meta_model(at(tiny_model_dir))
    setattr(model.config, key, 1.0 if key != "final_logit_softcapping" else None)
    hidden_and_head(model)
    setattr(model.config, key, 30.0)
    with pytest.raises(UserError, match=f"LlamaForCausalLM: logits must be the head's output, got {key}=30.0"):
        hidden_and_head(model)


def test_load_model_refuses_logits_changed_under_a_key_of_their_own(tiny_model_dir, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(UserError, match=r"logits must be head\(hidden states\), got a gap of"):
        load_model(at(tiny_model_dir))


def test_load_model_names_missing_and_misshapen_weights_together(model_copy):
    def change(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.norm.weight"] = torch.ones(3)

    edit_weights(model_copy, change)
    with pytest.raises(UserError, match=r"1 missing: model.layers.1.mlp.up_proj.weight") as caught:
        load_model(at(model_copy))
    assert "1 others: model.norm.weight [3] instead of [64]" in caught.value.problems[1]


def test_load_model_refuses_a_missing_head_only_when_it_is_not_tied(model_copy):
    assert "lm_head.weight" not in load_file(model_copy / "model.safetensors")
    assert is_tied(load_model(at(model_copy)))
    edit_config(model_copy, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"1 missing: lm_head.weight"):
        load_model(at(model_copy))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_load_model_names_tensor_and_index_of_a_weight_that_is_not_finite(model_copy, value):
    def change(weights):
        weights["model.layers.0.mlp.down_proj.weight"][3, 7] = value

    edit_weights(model_copy, change)
    with pytest.raises(UserError, match=rf"layers.0.mlp.down_proj.weight: .* got {value} at \[3, 7\] \(1 in all\)"):
        load_model(at(model_copy))


@pytest.mark.parametrize("keep", [0, 5, 2000, -1], ids=["empty", "header-cut", "data-cut", "one-byte-short"])
def test_load_model_names_a_safetensors_file_that_is_cut_short(model_copy, keep):
    file = model_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model.safetensors: must be a whole safetensors file"):
        load_model(at(model_copy))


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({"weight_map": {"a": "../other/model.safetensors"}}, "must name files in its own folder, got ../other"),
        ({"weight_map": {"a": "/etc/passwd"}}, "must name files in its own folder, got /etc/passwd"),
        ({"weight_map": {"a": "model-2.safetensors"}}, "model-2.safetensors: the index asks for it, got no such file"),
        ({"weights": {}}, "must be JSON with a weight_map, got KeyError"),
        ([], "must be JSON with a weight_map, got TypeError"),
    ],
)
def test_load_model_refuses_an_index_it_cannot_follow(model_copy, index, match):
    (model_copy / "model.safetensors").unlink()
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=match):
        load_model(at(model_copy))


def test_load_model_reads_sharded_weights(tiny_model_dir, model_copy):
    whole = load_model(at(tiny_model_dir))
    (model_copy / "model.safetensors").unlink()
    whole.save_pretrained(model_copy, max_shard_size="100KB")
    assert len(list(model_copy.glob("*.safetensors"))) > 1
    sharded = load_model(at(model_copy)).state_dict()
    assert all(torch.equal(sharded[name], tensor) for name, tensor in whole.state_dict().items())


def test_load_model_refuses_pickled_weights_and_none_at_all(model_copy):
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"must hold model.safetensors or .*, got none"):
        load_model(at(model_copy))
    torch.save({}, model_copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"got pickled weights \(pytorch_model.bin\), which can run code"):
        load_model(at(model_copy))


def test_load_config_refuses_a_model_that_is_quantized_already(model_copy):
    edit_config(model_copy, quantization_config={"quant_method": "gptq", "bits": 4})
    for load in (load_config, load_model, meta_model):
        with pytest.raises(UserError, match=r"must be a float model, got quantization_config with quant_method=gptq"):
            load(at(model_copy))


def test_load_config_names_the_missing_file_and_a_gguf_that_lies_there(tmp_path):
    with pytest.raises(UserError, match=rf"must hold config.json, got no {tmp_path}/config.json"):
        load_config(at(tmp_path))
    (tmp_path / "small.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"Point model.path at small.gguf"):
        load_config(at(tmp_path))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ("{", "not a valid JSON file"),
        ('{"model_type": "no-such-model"}', "model type `no-such-model`"),
    ],
)
def test_load_config_passes_on_what_transformers_cannot_read(tmp_path, fields, match):
    (tmp_path / "config.json").write_text(fields)
    with pytest.raises(UserError, match=f"must load as a causal language model, got .*{match}"):
        load_config(at(tmp_path))


def test_meta_model_refuses_a_model_that_is_no_language_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=r"must load as a causal language model, got Unrecognized configuration class"):
        meta_model(at(tmp_path))


def test_load_config_runs_no_code_of_the_model_unless_told_to(tmp_path):
    (tmp_path / "own.py").write_text("raise RuntimeError('the code ran')")
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}')
    with pytest.raises(UserError, match=r"Python code that comes with the model.*set model.trust_remote_code=true"):
        load_config(at(tmp_path))


def test_hub_name_is_refused_with_a_way_out_when_offline():
    with pytest.raises(UserError, match=r"model.path=nobody/no-such-model: .* give a folder you downloaded"):
        load_config(at("nobody/no-such-model"))


@pytest.mark.parametrize("path", ["no/such/folder", "/nowhere", "./nowhere", "nowhere.gguf", "a b"])
def test_local_source_refuses_paths_that_are_neither_there_nor_hub_names(path):
    with pytest.raises(UserError, match=r"model.path: must exist, got .*hub name such as owner/name"):
        local_source(at(path))


def test_local_source_keeps_folders_and_hub_names_and_refuses_other_files(model_copy):
    assert local_source(at(model_copy)) == str(model_copy)
    assert local_source(at("owner/model-1.5")) == "owner/model-1.5"
    with pytest.raises(UserError, match=r"must be a folder or a .gguf file"):
        local_source(at(model_copy / "config.json"))


def test_load_tokenizer_reads_the_folders_own(tiny_model_dir, tiny_tokenizer):
    tokenizer = load_tokenizer(at(tiny_model_dir))
    text = "The old king sells a lamp."
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert tokenizer.pad_token == "<|pad|>"


def test_load_tokenizer_pads_with_eos_and_says_so_when_there_is_no_pad_token(model_copy, caplog):
    fields = json.loads((model_copy / "tokenizer_config.json").read_text())
    del fields["pad_token"]
    (model_copy / "tokenizer_config.json").write_text(json.dumps(fields))
    with caplog.at_level(logging.WARNING, logger="qat.models"):
        tokenizer = load_tokenizer(at(model_copy))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert caplog.messages == ["the tokenizer has no pad token: padding with its end token <|im_end|>"]


def test_load_tokenizer_refuses_a_folder_without_one(model_copy):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model_copy / name).unlink()
    with pytest.raises(UserError, match=r"must hold a tokenizer, got none of tokenizer.json"):
        load_tokenizer(at(model_copy))


def test_check_tokenizer_refuses_more_ids_than_embedding_rows(tiny_model_dir):
    hf_config, tokenizer = load_config(at(tiny_model_dir)), load_tokenizer(at(tiny_model_dir))
    check_tokenizer(tokenizer, hf_config)
    tokenizer.add_tokens(["<|one more|>"])
    with pytest.raises(UserError, match=r"ids must stay below the 300 embedding rows, got 301"):
        check_tokenizer(tokenizer, hf_config)


def test_fix_pre_tokenizer_splits_every_digit_off_for_smollm_only(tiny_model_dir, caplog):
    tokenizer = load_tokenizer(at(tiny_model_dir))

    def pieces():
        return [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1776")]

    before = pieces()
    fix_pre_tokenizer(tokenizer, None)
    assert pieces() == before == ["in", "Ġ1776"]
    fix_pre_tokenizer(tokenizer, "llama-bpe")
    assert pieces() == before and "asks for pre-tokenizer 'llama-bpe'" in caplog.text
    fix_pre_tokenizer(tokenizer, "smollm")
    assert pieces() == ["in", "Ġ", "1", "7", "7", "6"]


@pytest.fixture
def gguf_file(tmp_path):
    """A GGUF file with metadata and one tensor; real in form, too small to convert."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "no-such-architecture")
    writer.add_context_length(2048)
    writer.add_tokenizer_pre("smollm")
    writer.add_tensor("output_norm.weight", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_gguf_keys_reads_pre_tokenizer_and_context_length(gguf_file):
    assert gguf_keys(gguf_file) == {"pre": "smollm", "context_length": 2048}


def test_gguf_is_converted_once_into_a_folder_named_by_content(gguf_file, tmp_path, monkeypatch, capsys):
    calls = []

    def convert(file, folder):
        calls.append(file)
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qat.models._convert", convert)
    first = local_source(at(gguf_file))
    assert "converting tiny.gguf" in capsys.readouterr().err
    assert local_source(at(gguf_file)) == first and len(calls) == 1
    with gguf_file.open("ab") as stream:
        stream.write(b"\0")
    assert local_source(at(gguf_file)) != first and len(calls) == 2
    assert all(path.name.startswith("tiny-") for path in (tmp_path / "cache" / "models").iterdir())


def test_gguf_conversion_that_stops_halfway_is_never_used(gguf_file, tmp_path, monkeypatch):
    def convert(file, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt("stopped")

    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qat.models._convert", convert)
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        local_source(at(gguf_file))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_gguf_conversion_uses_the_folder_another_process_published_meanwhile(gguf_file, tmp_path, monkeypatch):
    def convert(file, folder):
        other = folder.parent / folder.name[1:].rpartition(".tmp-")[0]
        other.mkdir()
        (other / "config.json").write_text("theirs")

    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qat.models._convert", convert)
    folder = local_source(at(gguf_file))
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [folder.rpartition("/")[2]]
    assert load_text(folder) == "theirs"


def load_text(folder: str) -> str:
    from pathlib import Path

    return (Path(folder) / "config.json").read_text()


def test_gguf_conversion_refuses_a_file_that_transformers_cannot_convert(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"tiny.gguf: must load as a causal language model"):
        local_source(at(gguf_file))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_gguf_names_the_extra_to_install_when_its_reader_is_missing(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qat.models.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"got no gguf or accelerate. Run: pip install 'qat\[gguf\]'"):
        local_source(at(gguf_file))


def test_gguf_suffix_on_other_content_is_refused(tmp_path):
    (tmp_path / "page.gguf").write_text("<html>")
    with pytest.raises(UserError, match=r"page.gguf: must be a GGUF file, got other content"):
        local_source(at(tmp_path / "page.gguf"))
