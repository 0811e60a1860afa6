"""The command line: what each verb prints, and that every mistake ends with exit code 2 before anything is touched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import same_process, tiny_run

from qat import pipeline
from qat.cli.compose import groups
from qat.cli.main import VERBS, main
from qat.observers import OBSERVERS

EXPORT = "export/compressed_tensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, tiny_text):
    """A finished run. Tests that write into it take a copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_fresh_process", same_process)
        return tiny_run(tmp_path_factory.mktemp("cli"), tiny_model_dir, tiny_text, "scheme=w4a16_g32")


@pytest.fixture
def qat(capsys):
    """`qat(words...)` -> (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as error:  # argparse
            code = error.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def train(qat, tmp_path, tiny_model_dir, tiny_text):
    """`qat train recipe=tiny` into tmp_path/runs/mine, with overrides that win."""

    def call(*overrides: str) -> tuple[int, str, str]:
        fixed = {"model.path": tiny_model_dir, "data.path": tiny_text, "runs_dir": tmp_path / "runs", "name": "mine"}
        given = {word.split("=")[0] for word in overrides}
        return qat("train", "recipe=tiny", *(f"{k}={v}" for k, v in fixed.items() if k not in given), *overrides)

    return call


def lines_of(error: str) -> list[str]:
    return [line for line in error.splitlines() if line.startswith("error: ")]


def files(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_the_verb_and_its_examples(qat, verb):
    code, out, _ = qat(verb, "--help")
    assert code == 0
    assert out.startswith(f"usage: qat {verb}")
    assert VERBS[verb][1] in " ".join(out.split())
    assert re.search(rf"^ *qat {verb}", out.partition("\n")[2], re.MULTILINE)


def test_help_lists_every_verb_and_no_words_is_a_mistake(qat):
    code, out, _ = qat("--help")
    assert code == 0
    assert all(re.search(rf"^  {verb} +{re.escape(line)}$", out, re.MULTILINE) for verb, (_, line) in VERBS.items())
    assert qat()[0] == 2


def test_unknown_verb_is_refused_with_the_nearest(qat):
    code, out, error = qat("trian", "recipe=tiny")
    assert (code, out) == (2, "")
    assert error == "error: qat: must name a verb, got trian. Did you mean 'train'?\n"


def test_options_may_stand_among_the_overrides(qat, tiny_model_dir):
    code, out, _ = qat("plan", f"model.path={tiny_model_dir}", "--json", "scheme=w8a16")
    assert code == 0
    assert {layer["scheme"] for layer in json.loads(out)["layers"]} == {"w8a16", None}


@pytest.fixture
def model_copy(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def spoil_nan(model):
    state = load_file(model / "model.safetensors")
    state["model.norm.weight"][5] = torch.nan
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


def spoil_truncated(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def spoil_tokenizer(model):
    for file in [*model.glob("tokenizer*"), *model.glob("chat_template*"), *model.glob("special_tokens*")]:
        file.unlink()


def spoil_config(model):
    (model / "config.json").unlink()


SPOILED_MODELS = {
    "nan": (spoil_nan, r"model\.norm\.weight: weights must be finite, got nan at \[5\]"),
    "truncated": (spoil_truncated, r"model\.safetensors: must be a whole safetensors file"),
    "no-tokenizer": (spoil_tokenizer, r"must hold a tokenizer, got none of tokenizer\.json"),
    "no-config": (spoil_config, r"model\.path: must hold config\.json"),
}


@pytest.mark.parametrize("case", SPOILED_MODELS)
def test_train_refuses_a_spoiled_model_before_any_work(train, model_copy, tmp_path, case):
    spoil, match = SPOILED_MODELS[case]
    spoil(model_copy)
    code, out, error = train(f"model.path={model_copy}")
    assert (code, out) == (2, "")
    assert len(lines_of(error)) == 1
    assert re.search(match, error)
    assert not (tmp_path / "runs").exists()


GROUP_128 = (
    r"model\.layers\.0\.self_attn\.q_proj\.weight, .*model\.layers\.1\.mlp\.up_proj\.weight: "
    r"in_features must be a multiple of group_size=128, got 64\. Use group_size=64 or 32"
)
REFUSED = {
    "scheme=w4a16_g33": r"scheme: must be a file in conf/scheme, got 'w4a16_g33'. Did you mean 'w4a16_g32'\?",
    "trainer.max_step=3": r"trainer.max_step: must be a setting, got an unknown key. Did you mean 'trainer.max_steps'\?",
    "scheme=w4a16_g128": GROUP_128,
    "plan.rules=[{match: model.layer.0.*}]": r"plan rule 'model.layer.0.\*': must match a layer, got no match",
    "plan.embedding=w4a16_g128": r"model\.embed_tokens\.weight.*: in_features must be a multiple of group_size=128",
    "model.path=/no/such/folder": r"model\.path: must exist, got /no/such/folder",
    "data.path=/no/such/file.txt": r"data path /no/such/file\.txt: must exist",
    "data.block_size=4096": r"text must fill one window of 4096 tokens",
    "trainer.devices=2": r"trainer\.strategy: single is one process, got devices=2",
    "optim.lr=0": r"optim\.lr: must be finite and above 0",
    "name=a/b": r"name: must be a plain folder name",
    "fake_quant.weight_scale=learned": r"fake_quant: weight_scale=learned goes with estimator lsq",
    "kv.bits=1": r"kv\.bits: must be a whole number from 2 to 8, got 1",
}


@pytest.mark.parametrize("override", REFUSED)
def test_train_refuses_a_mistake_before_any_work(train, tmp_path, override):
    code, out, error = train(override)
    assert (code, out) == (2, "")
    assert re.search(rf"^error: .*{REFUSED[override]}", error, re.MULTILINE)
    assert not (tmp_path / "runs").exists()
    assert "Traceback" not in error


def test_train_names_every_layer_and_rule_that_is_wrong_at_once(train):
    _, _, error = train("scheme=w4a16_g128", "plan.rules=[{match: model.layer.0.*}]")
    rule, sizes = lines_of(error)
    assert rule.startswith("error: plan rule")
    # everything but the two down_proj, which are 128 wide, and the table
    assert sizes.count("_proj.weight") == 12


def test_train_refuses_empty_text_and_a_wrong_column(train, tmp_path, tiny_jsonl):
    (tmp_path / "empty.txt").write_text("\n \n\n")
    code, _, error = train(f"data.path={tmp_path / 'empty.txt'}")
    assert code == 2
    assert "empty.txt: must hold text, got 1 documents, all blank" in error
    code, _, error = train("data=jsonl", f"data.path={tiny_jsonl}", "data.column=txt")
    assert code == 2
    assert re.search(
        r"stories\.jsonl:1: must have the column 'txt'.* Set data\.column to one of: text, messages", error
    )
    assert not (tmp_path / "runs").exists()


def test_train_refuses_a_folder_that_holds_another_run_and_leaves_it(train, tmp_path):
    mine = tmp_path / "runs/mine"
    mine.mkdir(parents=True)
    (mine / "resolved.yaml").write_text("name: other\n")
    before = files(mine)
    code, _, error = train()
    assert code == 2
    assert re.search(r"runs/mine: must not hold another run, got one\. .*set overwrite=true to replace it", error)
    assert files(mine) == before


def test_train_never_replaces_a_folder_that_is_no_run(train, tmp_path):
    mine = tmp_path / "runs/mine"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    code, _, error = train("overwrite=true")
    assert code == 2
    assert re.search(r"runs/mine: must not hold another run, got a folder with other files", error)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_train_keeps_the_earlier_run_when_the_new_one_is_refused(train, tmp_path, finished):
    shutil.copytree(finished, tmp_path / "runs/mine")
    before = files(tmp_path / "runs/mine")
    for mistake in ("scheme=w4a16_g128", "model.path=/no/such", "data.path=/no/such"):
        assert train("overwrite=true", mistake)[0] == 2
    assert files(tmp_path / "runs/mine") == before


def test_train_refuses_a_file_in_the_place_of_the_run_folder(train, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").write_text("")
    code, _, error = train("overwrite=true")
    assert code == 2
    assert "runs/mine: must be a folder, got a file" in error


@pytest.mark.parametrize(
    ("world", "overrides", "match"),
    [
        ("2", [], r"needs 1 processes, got 2"),
        (None, ["trainer=ddp", "trainer.accelerator=cpu"], r"needs 2 processes, got 1\. .*torchrun --nproc-per-node=2"),
    ],
)
def test_train_refuses_another_number_of_processes(train, tmp_path, monkeypatch, world, overrides, match):
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    code, _, error = train(*overrides)
    assert code == 2
    assert re.search(match, error)
    assert not (tmp_path / "runs").exists()


def test_train_prints_the_configuration_and_stops(train, tmp_path):
    code, out, _ = train("--cfg", "optim.lr=0.5")
    assert code == 0
    assert re.search(r"^  lr: 0\.5$", out, re.MULTILINE)
    assert not (tmp_path / "runs").exists()


def test_train_that_fails_later_ends_with_1_and_says_so_in_the_folder(train, tmp_path, monkeypatch):
    def broken(*arguments):
        raise UserErrorLater

    from qat.errors import UserError

    UserErrorLater = UserError("step 1: the loss must be finite, got nan. Lower it.", before_work=False)
    monkeypatch.setattr("qat.train.fit.fit", broken)
    monkeypatch.setattr(pipeline, "_train", broken)
    code, _, error = train()
    assert code == 1
    assert lines_of(error) == ["error: step 1: the loss must be finite, got nan. Lower it."]
    status = json.loads((tmp_path / "runs/mine/run_status.json").read_text())
    assert status["status"] == "failed"
    assert "must be finite" in status["error"]


def test_interrupt_ends_with_130_and_says_so_in_the_folder(train, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_train", interrupted)
    code, _, error = train()
    assert code == 130
    assert error.endswith("interrupted\n")
    assert json.loads((tmp_path / "runs/mine/run_status.json").read_text())["status"] == "interrupted"


def test_debug_adds_the_traceback(qat):
    code, _, error = qat("ls", "nonsense", "--debug")
    assert code == 2
    assert "Traceback" in error
    assert lines_of(error)


def test_train_shows_table_verdict_folder_and_the_next_command(train, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_fresh_process", same_process)
    code, out, _ = train("export.prompts=[Once]", "scheme=w8a16")
    assert code == 0
    text = " ".join(out.split())
    for part in (
        "QAT, packed",
        "Parity: equal",
        "> Once",
        f"run folder: {tmp_path / 'runs/mine'}",
        "next: qat generate",
    ):
        assert part in text


def test_installed_command_ends_with_the_code_of_main(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qat.cli.main", "inspect", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}: must be something qat knows")


def test_ls_names_every_group_and_table(qat):
    code, out, _ = qat("ls")
    assert code == 0
    names = out.split()
    assert names == [*groups(), "observers", "estimators", "formats", "kernels"]
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
    assert "reference" in facts["wna16_matmul"]
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


def test_plan_refuses_a_model_of_which_too_much_would_stay_float(qat, tiny_gpt2_dir):
    code, _, error = qat("plan", f"model.path={tiny_gpt2_dir}", "scheme=w4a16_g32", "plan.max_unsupported=0.05")
    assert code == 2
    assert re.search(r"plan\.max_unsupported: .*got 1\d\.\d%.*transformer\.wpe\.weight", error)


@pytest.mark.parametrize("words", [["data=jsonl"], ["recipe=tiny"], ["data.path=anything"]])
def test_plan_asks_for_no_text(qat, tiny_model_dir, words):
    assert qat("plan", f"model.path={tiny_model_dir}", *words)[0] == 0


def test_plan_needs_no_weights(qat, model_copy):
    (model_copy / "model.safetensors").unlink()
    assert qat("plan", f"model.path={model_copy}")[0] == 0


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
