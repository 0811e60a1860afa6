"""Real processes under torchrun on gloo: ranks that mean different runs, and a recipe for 8 GPUs on a tiny Llama."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import VOCABULARY, save_model
from test_cluster import free_port

from qat.cli.compose import compose_run
from qat.config import recipes_dir

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
FOR_GPUS = sorted(file.stem for file in recipes_dir().glob("llama3_8b*.yaml"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tiny_tokenizer) -> Path:
    """Llama 3's architecture: grouped queries, head not tied; widths that groups of 128 divide."""
    from transformers import LlamaConfig

    hf_config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    return save_model(tmp_path_factory.mktemp("tiny_llama3"), hf_config, tiny_tokenizer)


def test_machines_started_with_different_settings_stop_before_any_work(tmp_path, llama, tiny_text):
    """Two machines' torchruns, of one process each, as an operator would start them by hand."""
    words = ["recipe=tiny", "trainer=ddp", "trainer.accelerator=cpu", "trainer.nodes=2", "trainer.devices=1"]
    words += [f"model.path={llama}", f"data.path={tiny_text}", f"runs_dir={tmp_path / 'runs'}"]
    launch = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    machines = [
        subprocess.Popen(
            [*launch, f"--node-rank={i}", "-m", "qat.cli.main", "train", *words, f"optim.lr={rate}"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, rate in enumerate(("1e-4", "1e-3"))
    ]
    errors = [machine.communicate(timeout=120)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [1, 1]
    assert "error: optim.lr: must be the same on all ranks, got 0.0001 on rank 0; 0.001 on rank 1." in errors[0]
    assert "error:" not in re.sub(r"torch\S*error\S*", "", errors[1]).replace("error_file", "")
    assert all(re.search(r"exitcode\s*: 2 ", error) for error in errors)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("recipe", FOR_GPUS)
def test_recipe_for_gpus_is_planned_without_a_download_and_says_what_the_plan_says(qat, recipe):
    code, out, _ = qat("plan", f"recipe={recipe}", "--json")
    assert code == 0
    plan = json.loads(out)
    assert plan["weights"] == 8_030_261_248
    need = {name: row["memory_gib"] for name, row in plan["strategies"].items()}
    text = (recipes_dir() / f"{recipe}.yaml").read_text()
    planned = re.search(r"^# Planned: +(.*)$", text, re.MULTILINE)[1]
    assert planned == (
        f"{need['fsdp2']:.0f} GiB per rank under FSDP2 ({need['ddp']:.0f} under DDP), "
        f"{plan['tokens_per_step']:,} tokens per step, {plan['host_gib']:.0f} GiB of main memory while loading"
    )


def test_recipe_for_gpus_runs_end_to_end_on_a_tiny_model_as_a_local_job(qat, tmp_path, llama, tiny_text):
    words = ["recipe=llama3_8b_w4a16_g128_fsdp2", "name=small", f"runs_dir={tmp_path}", f"model.path={llama}"]
    words += ["data=text", f"data.path={tiny_text}", "data.block_size=32", "data.eval_tokens=256", "data.subset=null"]
    words += ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=2", "trainer.eval_every=1"]
    words += ["trainer.layer_stats_every=1", "cluster.time_minutes=5", "cluster.signal_seconds=10"]
    own = compose_run(["recipe=llama3_8b_w4a16_g128_fsdp2"])
    run = compose_run(words)
    # what makes it this recipe is what it is on 8 GPUs
    for group in ("scheme", "plan", "fake_quant", "optim", "phases", "distill", "kv", "export"):
        assert getattr(run, group) == getattr(own, group)
    assert (run.trainer.strategy, run.trainer.gradient_checkpointing, run.trainer.batch_size) == ("fsdp2", True, 4)
    assert qat("plan", *words)[0] == 0
    code, out, _ = qat("submit", *words)
    assert code == 0
    log = Path(re.search(r"^output: +(.*)$", out, re.MULTILINE)[1])
    folder, deadline = tmp_path / "small", time.time() + 240
    while time.time() < deadline:
        if (folder / "run_status.json").exists():
            status = json.loads((folder / "run_status.json").read_text())["status"]
            if status in ("finished", "failed"):
                break
        time.sleep(0.2)
    assert status == "finished", log.read_text()
    assert json.loads((folder / "parity.json").read_text())["verdict"] == "equal"
    assert json.loads((folder / "results.json").read_text())["tokens"]["train"] == 2 * 2 * 4 * 32
