"""Whole runs, from a float model to a verified export: every preset scheme, every choice that changes what is stored.

A run verifies its export in a fresh process. Two runs here do exactly that; in the others the same commands run in
this process, which saves six seconds each.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import VOCABULARY, save_model
from quant_models import IDS, SCHEMES
from quant_models import logits as logits_of
from tiny_runs import read, same_process, tiny_run
from tolerances import PERPLEXITY

from qat import pipeline
from qat.errors import UserError
from qat.observers import OBSERVERS
from qat.serve.load import read_export, serve

# Every width of the layers below divides by 128.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": VOCABULARY}


@pytest.fixture
def run_of(tmp_path, tiny_text, monkeypatch):
    """`run_of(model, overrides)` -> run folder, verified in this process."""
    monkeypatch.setattr(pipeline, "_fresh_process", same_process)
    return lambda model, *overrides: tiny_run(tmp_path, model, tiny_text, *overrides)


@pytest.fixture(scope="module")
def wide_model_dir(tmp_path_factory, tiny_tokenizer):
    """Llama with hidden size 128 and a head of its own, its weights so large that rounding them is felt."""
    from transformers import LlamaConfig

    hf_config = LlamaConfig(
        **WIDE,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.1,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    return save_model(tmp_path_factory.mktemp("wide_llama"), hf_config, tiny_tokenizer)


def check(run) -> dict:
    """What holds for every finished run; returns results.json."""
    results, parity, coverage = (read(run, f"{name}.json") for name in ("results", "parity", "coverage"))
    assert read(run, "run_status.json")["status"] == read(run, "manifest.json")["exit_state"] == "finished"
    assert parity["verdict"] == "equal"
    owned = {layer["name"] for layer in coverage["layers"] if layer["scheme"] and not layer["tied_to"]}
    assert {line["name"] for line in parity["tensors"]} == owned
    for line in parity["tensors"]:
        assert line["codes"] == math.prod(line["shape"])
        assert line["mismatched_codes"] == 0
        assert line["scales_equal"] and line["zero_points_equal"] and line["digest_equal"], line["name"]
    fake, packed = results["perplexity"]["fake_quant"], results["perplexity"]["packed"]
    assert packed == parity["perplexity"]["packed"]
    assert fake == pytest.approx(parity["perplexity"]["fake_quant"], rel=1e-9), "what was saved is what was trained"
    assert abs(packed / fake - 1) <= PERPLEXITY
    assert (run / "report.html").stat().st_size > 1000
    return results


@pytest.mark.parametrize("scheme", SCHEMES)
def test_run_serves_what_it_trained_with_every_preset_scheme(run_of, wide_model_dir, scheme):
    results = check(run_of(wide_model_dir, f"scheme={scheme}"))
    assert results["scheme"] == scheme
    bits = int(scheme[1])
    # codes, scales and zero points of the linear layers; table and head are w8a16
    assert bits < results["bits_per_weight"] < (bits + 8) / 2 + 2
    assert results["kl_to_float"]["fake_quant"] > 0


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a8_static"])
def test_run_is_verified_in_a_fresh_process(tmp_path, tiny_text, tiny_model_dir, scheme):
    prompts = "export.prompts=[Once more]"
    results = check(tiny_run(tmp_path, tiny_model_dir, tiny_text, f"scheme={scheme}", prompts))
    assert [answer["prompt"] for answer in results["answers"]] == ["Once more"]


CHOICES = {
    "kv8": ["kv=kv8"],
    "kv4": ["kv=kv4"],
    "kv4-channel": ["kv=kv4_channel", "kv.group_size=8", "kv.recent_tokens=4"],
    "lsq": ["fake_quant=learned", "optim.scale_lr=0.01", "scheme=w4a16_g32"],
    "lsq-w8a8": ["fake_quant=learned", "scheme=w8a8"],
    "lsq_plus": ["fake_quant=learned", "fake_quant.estimator=lsq_plus", "scheme=w4a16_g32_asym", "optim.scale_lr=0.01"],
    "pass-through": ["fake_quant.estimator=ste_pass_through"],
    "embedding-keep": ["plan.embedding=keep", "plan.max_unsupported=1"],
    "embedding-same": ["plan.embedding=same", "scheme=w4a16_g32_asym"],
    "embedding-same-w8a8": ["plan.embedding=same", "scheme=w8a8"],
    "rules": ["plan.rules=[{match: model.layers.0.*, scheme: keep}, {match: '*.down_proj', scheme: w8a8}]"],
    "progressive": ["phases=progressive", "trainer.max_steps=32", "scheme=w3a16_g64", "trainer.layer_stats_every=8"],
    "delayed": ["phases=delayed", "phases.schedule.1.at=2", "trainer.max_steps=4", "scheme=w8a8_static"],
    "delayed-lsq": ["phases=delayed", "phases.schedule.1.at=2", "trainer.max_steps=4", "fake_quant=learned"],
    "freeze": ["phases=freeze", "phases.schedule.1.at=2", "trainer.max_steps=4"],
    "freeze-lsq": ["phases=freeze", "phases.schedule.1.at=2", "trainer.max_steps=4", "fake_quant=learned"],
    "per-tensor": ["scheme.weight.granularity=tensor", "scheme.name=w4_tensor", "fake_quant=static"],
    "bf16": ["trainer.precision=bf16", "evaluate.precision=bf16", "scheme=w4a16_g32"],
    "bf16-w8a8": ["trainer.precision=bf16", "evaluate.precision=bf16", "scheme=w8a8"],
    "no-baselines": ["evaluate.baselines=false"],
    "eager": ["model.attention=eager"],
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("model", ["tiny_model_dir", "wide_model_dir"])
def test_run_serves_what_it_trained_with_every_choice(run_of, request, model, choice):
    check(run_of(request.getfixturevalue(model), *CHOICES[choice]))


@pytest.mark.parametrize("observer", OBSERVERS)
def test_run_serves_what_it_trained_with_every_observer(run_of, tiny_model_dir, observer):
    chosen = ["scheme=w8a8_static", f"fake_quant.input_observer={observer}"]
    if observer != "histogram":  # which is for whole tensors only
        chosen += ["fake_quant=static", f"fake_quant.weight_observer={observer}"]
    check(run_of(tiny_model_dir, *chosen))


@pytest.mark.parametrize("chosen", [["scheme=w4a16_g32"], ["scheme=w8a8", "kv=kv8"], ["fake_quant=learned"]])
@pytest.mark.parametrize("model", ["tiny_gpt2_dir", "tiny_mixtral_dir"])
def test_run_serves_what_it_trained_with_conv1d_and_fused_experts(run_of, request, model, chosen):
    run = run_of(request.getfixturevalue(model), "plan.max_unsupported=0.2", *chosen)
    check(run)
    kinds = {layer["kind"] for layer in read(run, "coverage.json")["layers"] if layer["scheme"]}
    assert ("conv1d" if "gpt2" in model else "experts") in kinds
    # a stock load would serve random weights, so it is made to fail
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="qat-"):
        AutoModelForCausalLM.from_pretrained(run / "export/compressed_tensors")


@pytest.mark.parametrize("distill", ["ce", "kl_ce"])
def test_run_that_learns_from_the_text_has_a_control_of_its_own(run_of, wide_model_dir, distill):
    chosen = ["scheme=w2a16_g32", f"distill={distill}", "trainer.max_steps=6", "optim.lr=0.003"]
    run = run_of(wide_model_dir, *chosen)
    results = check(run)
    table = results["perplexity"]
    assert not results["control_is_float"]
    assert table["control"] < 0.9 * table["float"], "it adapted to the text"
    assert table["rtn_of_control"] > table["control"]
    packed, control, rtn = (math.log(table[name]) for name in ("packed", "control", "rtn_of_control"))
    assert results["recovery"] == pytest.approx(1 - (packed - control) / (rtn - control))
    steps = [json.loads(line)["step"] for line in (run / "control/metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 6


def test_run_with_kl_alone_has_the_float_model_as_control(run_of, wide_model_dir):
    results = check(run_of(wide_model_dir, "scheme=w2a16_g32", "trainer.max_steps=40", "optim.lr=0.002"))
    assert results["control_is_float"]
    assert results["perplexity"]["control"] == results["perplexity"]["float"]
    assert results["kl_to_float"]["fake_quant"] < 0.7 * results["kl_to_float"]["rtn"], "training won something back"


def test_run_refuses_a_kv_grid_for_eager_attention_before_any_work(run_of, tiny_model_dir, tmp_path):
    with pytest.raises(UserError, match=r"^kv: needs an attention .* got eager\. Set model\.attention=sdpa") as caught:
        run_of(tiny_model_dir, "model.attention=eager", "kv=kv8")
    assert caught.value.before_work
    assert not (tmp_path / "run").exists()


def test_two_runs_of_one_config_export_the_same_bytes(run_of, tiny_model_dir, tmp_path, tiny_text):
    first = run_of(tiny_model_dir, "scheme=w4a16_g32", "runs_dir=" + str(tmp_path / "one"))
    second = run_of(tiny_model_dir, "scheme=w4a16_g32", "runs_dir=" + str(tmp_path / "two"))
    names = ("model.safetensors", "config.json", "training_digests.json", "README.md")
    for name in names:
        one, two = (run / "export/compressed_tensors" / name for run in (first, second))
        assert one.read_bytes() == two.read_bytes(), name


@pytest.mark.parametrize("model", ["tiny_model_dir", "wide_model_dir"])
def test_stock_transformers_loads_the_export_and_gives_our_logits(run_of, request, model):
    from transformers import AutoModelForCausalLM

    export = run_of(request.getfixturevalue(model), "scheme=w4a16_g32") / "export/compressed_tensors"
    stock = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    assert torch.equal(logits_of(stock), logits_of(serve(read_export(export), torch.float32)))
    assert IDS.shape[1] > 1


def test_export_holds_what_a_folder_of_its_kind_needs(run_of, tiny_model_dir):
    export = run_of(tiny_model_dir, "scheme=w4a16_g32") / "export/compressed_tensors"
    names = {file.name for file in export.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert {"generation_config.json", "checksums.json", "training_digests.json", "chat_template.jinja"} <= names
    listed = json.loads((export / "checksums.json").read_text())
    assert set(listed) == names - {"checksums.json"}
    card = (export / "README.md").read_text()
    assert "| QAT, packed" in card
    generation = json.loads((export / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
