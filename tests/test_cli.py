"""`qat` and `qat train`: help, exit codes, and that every mistake ends with code 2 before anything is touched.

The other verbs are in `test_cli_verbs.py`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import files, lines_of, same_process

from qat import pipeline
from qat.cli.main import VERBS
from qat.errors import UserError


@pytest.fixture
def train(qat, tmp_path, tiny_model_dir, tiny_text):
    """`qat train recipe=tiny` into tmp_path/runs/mine, with overrides that win."""

    def call(*overrides: str) -> tuple[int, str, str]:
        fixed = {"model.path": tiny_model_dir, "data.path": tiny_text, "runs_dir": tmp_path / "runs", "name": "mine"}
        given = {word.split("=")[0] for word in overrides}
        return qat("train", "recipe=tiny", *(f"{k}={v}" for k, v in fixed.items() if k not in given), *overrides)

    return call


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
    "trainer.max_step=3": r"trainer.max_step: must be a setting, got an unknown key.*'trainer.max_steps'\?",
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
        raise UserError("step 1: the loss must be finite, got nan. Lower it.", before_work=False)

    monkeypatch.setattr(pipeline.stages, "train", broken)
    code, _, error = train()
    assert code == 1
    assert lines_of(error) == ["error: step 1: the loss must be finite, got nan. Lower it."]
    status = json.loads((tmp_path / "runs/mine/run_status.json").read_text())
    assert status["status"] == "failed"
    assert "must be finite" in status["error"]


def test_interrupt_ends_with_130_and_says_so_in_the_folder(train, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.stages, "train", interrupted)
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
