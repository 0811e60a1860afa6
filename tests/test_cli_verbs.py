"""Every verb but train: what it prints, what it refuses, and that looking changes nothing."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from tiny_runs import files, lines_of

from qat.cli.groups import groups
from qat.observers import OBSERVERS

EXPORT = "export/compressed_tensors"


def test_ls_names_every_group_and_table(qat):
    code, out, _ = qat("ls")
    assert code == 0
    names = out.split()
    assert names == [*groups(), "sweep", "methods", "observers", "estimators", "formats", "kernels"]
    for name in names:
        code, out, _ = qat("ls", name)
        assert code == 0
        assert all(len(line.split()) >= 2 for line in out.splitlines()), name
    assert [line.split()[0] for line in qat("ls", "observers")[1].splitlines()] == list(OBSERVERS)


def test_ls_tells_the_bits_of_schemes(qat):
    lines = {line.split()[0]: line for line in qat("ls", "schemes")[1].splitlines()}
    assert "(4.50 bits per weight at 576 inputs)" in lines["w4a16_g32"]
    # 4 bits of codes, 16 of the scale and 4 of the zero point for 64 weights
    assert "(4.31 bits per weight at 576 inputs)" in lines["w4a16_g64_asym"]
    assert "(4.12 bits per weight at 1536 inputs)" in lines["w4a16_g128"]


def test_ls_refuses_an_unknown_name_with_the_nearest(qat):
    code, _, error = qat("ls", "observer_")
    assert code == 2
    assert "Did you mean 'observers'?" in error


def test_doctor_states_versions_hardware_kernels_and_places(qat, tmp_path):
    code, out, _ = qat("doctor", "--runs-dir", tmp_path / "new/runs")
    facts = dict(re.split(r" {2,}| (?=/)", line, maxsplit=1) for line in out.splitlines() if "problem:" not in line)
    assert code == (1 if "problem:" in out else 0)
    assert facts["torch"] == torch.__version__
    assert {"python", "qat", "cpu cores", "cpu features", "gpu", "c++ compiler", "runs", "hub"} <= set(facts)
    assert "reference" in facts["w4a16_matmul"]
    assert facts["hub"].startswith("offline")
    assert not (tmp_path / "new").exists()


def test_doctor_refuses_a_release_that_steals_credentials(qat, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.6.3")
    code, out, _ = qat("doctor")
    assert code == 1
    assert "problem: lightning 2.6.2 and 2.6.3 steal credentials" in out


# Weights by hand. Llama: table 300 x 64, twice (q, o 64 x 64; k, v 32 x 64; gate, up 128 x 64; down 64 x 128), 5 norms.
# GPT-2: table, 256 positions, twice (64 x 192, 64 x 64, 64 x 256, 256 x 64 and their biases), 5 norms with biases.
# Mixtral: table and head, twice (attention as Llama's, 4 experts of 2 x 64 x 64 and 64 x 64, router 4 x 64), 5 norms.
ATTENTION = 2 * 64 * 64 + 2 * 32 * 64
PLANS = {
    "tiny_model_dir": (300 * 64, 2 * (ATTENTION + 3 * 64 * 128), 5 * 64),
    "tiny_gpt2_dir": (300 * 64, 2 * 64 * (192 + 64 + 256 + 256), 256 * 64 + 2 * (192 + 64 + 256 + 64) + 10 * 64),
    "tiny_mixtral_dir": (2 * 300 * 64, 2 * (ATTENTION + 4 * 3 * 64 * 64), 2 * 4 * 64 + 5 * 64),
}


@pytest.mark.parametrize("model", PLANS)
def test_plan_counts_every_weight(qat, request, model):
    table, linear, kept = PLANS[model]
    folder = request.getfixturevalue(model)
    words = [f"model.path={folder}", "scheme=w4a16_g32", "plan.max_unsupported=0.2"]
    code, out, _ = qat("plan", *words, "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["weights"] == table + linear + kept
    assert plan["quantized_weights"] == table + linear
    assert plan["coverage"] == pytest.approx((table + linear) / (table + linear + kept))
    # 4 bits and a 2-byte scale for 32 weights; 8 bits and a scale for each row of the table; float32
    wanted = linear // 2 + 2 * linear // 32 + table + 2 * table // 64 + 4 * kept
    assert plan["bytes"] == sum(layer["bytes"] for layer in plan["layers"]) == wanted
    assert plan["bits_per_weight"] == pytest.approx(8 * wanted / plan["weights"])
    assert plan["memory_gib"]["total"] > 0
    assert all(layer["scheme"] or layer["reason"] for layer in plan["layers"])
    code, out, _ = qat("plan", *words)
    assert code == 0
    assert f"{table + linear:,} of {table + linear + kept:,} weights quantized" in out


def test_plan_refuses_a_model_of_which_too_much_would_stay_float(qat, tiny_mixtral_dir):
    code, _, error = qat("plan", f"model.path={tiny_mixtral_dir}", "scheme=w4a16_g32", "plan.max_unsupported=0.002")
    assert code == 2
    assert re.search(r"plan\.max_unsupported: at most .*got 0\.3%.*model\.layers\.0\.mlp\.gate\.weight", error)


@pytest.mark.parametrize("words", [["data=jsonl"], ["recipe=tiny"], ["data.path=anything"]])
def test_plan_asks_for_no_text(qat, tiny_model_dir, words):
    assert qat("plan", f"model.path={tiny_model_dir}", *words)[0] == 0


def test_plan_needs_no_weights(qat, model_copy):
    (model_copy / "model.safetensors").unlink()
    assert qat("plan", f"model.path={model_copy}")[0] == 0


def test_plan_warns_of_a_rule_that_takes_table_or_head_too(qat, tiny_model_dir, tiny_mixtral_dir):
    words = ["plan.rules=[{match: '*', scheme: w8a16}]", "plan.max_unsupported=1"]
    _, _, error = qat("plan", f"model.path={tiny_mixtral_dir}", *words)
    assert [line.partition(":")[2].split(": ")[0].strip() for line in error.splitlines() if "warning" in line] == [
        "rule '*' also takes model.embed_tokens.weight",
        "rule '*' also takes lm_head.weight",
    ]
    _, _, error = qat("plan", f"model.path={tiny_model_dir}", "plan.rules=[{match: '*_proj', scheme: w8a16}]")
    assert "also takes" not in error
    # the default leaves table and head to plan.embedding, and routers have no grid
    _, out, _ = qat("plan", f"model.path={tiny_mixtral_dir}", "plan.max_unsupported=1", "--json")
    layers = {layer["name"]: layer for layer in json.loads(out)["layers"]}
    assert layers["lm_head.weight"]["reason"] == layers["model.embed_tokens.weight"]["reason"] == "plan.embedding"
    assert layers["model.layers.0.mlp.gate.weight"]["scheme"] is None


def test_plan_follows_rules_and_kv(qat, tiny_model_dir):
    rules = "plan.rules=[{match: model.layers.0.*, scheme: keep}, {match: '*.down_proj', scheme: w8a8}]"
    _, out, _ = qat("plan", f"model.path={tiny_model_dir}", "--json", rules, "kv=kv4")
    plan = json.loads(out)
    layers = {layer["name"]: layer for layer in plan["layers"]}
    assert layers["model.layers.0.mlp.down_proj.weight"]["scheme"] is None
    assert "rule 'model.layers.0.*'" in layers["model.layers.0.mlp.down_proj.weight"]["reason"]
    assert layers["model.layers.1.mlp.down_proj.weight"]["scheme"] == "w8a8"
    assert plan["kv"] == "int4 asym token"


def test_inspect_reads_run_export_model_and_file(qat, finished, tiny_model_dir):
    code, out, _ = qat("inspect", finished)
    assert code == 0
    assert "status:   finished" in out
    assert "parity:   equal" in out
    code, out, _ = qat("inspect", finished / EXPORT)
    assert code == 0
    assert "lm_head.weight is model.embed_tokens.weight" in out
    assert "15 packed tensors; 5 float tensors with 320 values" in out
    assert "keys and values: float" in out
    code, out, _ = qat("inspect", tiny_model_dir)
    assert code == 0
    assert "model type: llama" in out
    code, out, _ = qat("inspect", tiny_model_dir / "model.safetensors")
    assert code == 0
    assert re.search(r"^model\.embed_tokens\.weight +F32 +300x64$", out, re.MULTILINE)


def test_inspect_refuses_what_is_damaged_or_unknown(qat, tmp_path):
    assert qat("inspect", tmp_path)[0] == 2
    (tmp_path / "config.json").write_text('{"half')
    code, _, error = qat("inspect", tmp_path)
    assert code == 2
    assert "config.json: must be readable JSON" in error
    (tmp_path / "x.safetensors").write_bytes(b"half")
    code, _, error = qat("inspect", tmp_path / "x.safetensors")
    assert code == 2
    assert "x.safetensors: must be a whole safetensors file" in error


def test_evaluate_scores_run_and_export_alike(qat, finished, tiny_text, tmp_path):
    code, out, _ = qat("evaluate", finished)
    assert code == 0
    run = json.loads(out)
    stored = json.loads((finished / "results.json").read_text())
    assert run["packed"]["perplexity"] == stored["perplexity"]["packed"]
    assert run["fake_quant"]["perplexity"] == stored["perplexity"]["fake_quant"]
    # a name that the grammar of overrides cannot read
    export = shutil.copytree(finished / EXPORT, tmp_path / "my export (1), copy")
    words = [f"data.path={tiny_text}", "data.block_size=32", "data.eval_tokens=256", "evaluate.precision=fp32"]
    code, out, _ = qat("evaluate", export, *words)
    assert code == 0
    assert json.loads(out)["packed"]["perplexity"] == pytest.approx(run["packed"]["perplexity"], rel=1e-6)


def test_evaluate_refuses_overrides_of_a_run_and_folders_of_another_kind(qat, finished, tmp_path):
    code, _, error = qat("evaluate", finished, "data.path=x")
    assert code == 2
    assert "a run is scored on its own text, got data.path=x" in error
    assert qat("evaluate", tmp_path)[0] == 2


def test_export_again_gives_the_same_bytes_elsewhere(qat, finished, tmp_path):
    code, out, _ = qat("export", finished, "--output", tmp_path / "deep/again")
    assert code == 0
    assert out.strip() == str(tmp_path / "deep/again")
    assert files(tmp_path / "deep/again") == files(finished / EXPORT)


def test_export_refuses_a_folder_that_exists_until_told(qat, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    before = files(run)
    code, _, error = qat("export", run)
    assert code == 2
    assert re.search(r"compressed_tensors: must be a new folder, got one that exists\. Add --overwrite", error)
    assert files(run) == before
    (run / EXPORT / "model.safetensors").unlink()
    assert qat("export", run, "--overwrite")[0] == 0
    assert files(run) == before


@pytest.mark.parametrize("missing", ["resolved.yaml", "results.json", "checkpoints/final/model.safetensors"])
def test_export_refuses_a_run_that_is_not_finished(qat, finished, tmp_path, missing):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / missing).unlink()
    code, _, error = qat("export", run, "--output", tmp_path / "out")
    assert code == 2
    assert lines_of(error)
    assert not (tmp_path / "out").exists()
