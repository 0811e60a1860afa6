"""qat/scaling.py: sizes that can be counted by hand, what each setting changes, and the tables of docs/scaling.md."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qat import build
from qat.cli.compose import compose_run
from qat.config import ModelConfig, recipes_dir
from qat.models import meta_model
from qat.scaling import Job, checkpoint_bytes, job_of, memory, sent, shape_of, side_by_side, stage_needs, traffic
from qat.stage_config import StageConfig

ROOT = Path(__file__).parents[1]
WORDS = ["model.path=m", "data.path=d", "scheme=w4a16_g32", "data.block_size=64", "trainer.batch_size=2"]


@pytest.fixture(scope="module")
def shape(tiny_model_dir):
    model = meta_model(ModelConfig(path=str(tiny_model_dir)))
    coverage = build.quantize_layers(model, compose_run(WORDS))
    return shape_of(model.config, coverage)


def job(*words: str) -> Job:
    return job_of(compose_run([*WORDS, *words]))


def test_shape_is_that_of_the_model(shape, tiny_model_dir):
    model = meta_model(ModelConfig(path=str(tiny_model_dir)))
    assert shape.weights == sum(p.numel() for p in model.parameters())
    blocks = model.model.layers
    assert (shape.blocks, shape.block_weights) == (2, sum(p.numel() for p in blocks[0].parameters()))
    assert shape.quantized_in_blocks == sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    assert (shape.tied, shape.table, shape.own_table, shape.rest) == (True, 300 * 64, 0, 300 * 64 + 64)
    coverage = build.quantize_layers(model, compose_run(WORDS))
    assert shape == shape_of(model.config, coverage)
    assert shape.scales == sum(
        b.numel() for name, b in model.named_buffers() if name.endswith("weight_fake_quant.scale")
    )


def test_weights_gradients_and_moments_are_dealt_out_under_fsdp2_only(shape):
    p = 4 * shape.weights
    for strategy, share in (("single", 1), ("ddp", 1), ("fsdp2", 4)):
        found = memory(shape, replace(job(), strategy=strategy, ranks=4))
        assert found.always["float32 weights"] == p / share
        assert found.always["Adam moments"] == 2 * p / share
        assert found.moments["end of backward"]["gradients"] == p / share
        assert found.always["DDP buckets"] == (p if strategy == "ddp" else 0)
        assert found.peak == sum(found.parts.values()) > 16 * shape.weights / share


def test_settings_that_save_memory_save_it(shape):
    before = memory(shape, job("trainer.batch_size=16")).peak
    for word in ("trainer.batch_size=1", "trainer.gradient_checkpointing=true", "distill=ce", "distill.chunk_tokens=8"):
        assert memory(shape, job("trainer.batch_size=16", word)).peak < before, word
    assert memory(shape, job("trainer.batch_size=16", "trainer.precision=fp32")).peak > before
    learned = memory(shape, job("fake_quant=learned")).always["scales, zero points"]
    assert learned - memory(shape, job()).always["scales, zero points"] == 16 * shape.scales


def test_checkpointing_on_a_gpu_frees_the_weights_on_their_grid_too(shape):
    gpu = replace(job(), on_gpu=True, fused=False)
    head = 2 * shape.table
    on_grid = [memory(shape, one).moments["loss"]["fake-quantized weights"] for one in (gpu, job("trainer=gpu"))]
    assert on_grid == [2 * shape.quantized_in_blocks + head] * 2
    assert memory(shape, replace(gpu, checkpointing=True)).moments["loss"]["fake-quantized weights"] == head


def test_traffic_is_the_gradients_or_the_units(shape):
    two = replace(job("trainer.accumulate=3"), ranks=2)
    p, rest = 4 * shape.weights, 4 * shape.rest
    assert traffic(shape, replace(two, ranks=1)) == {}
    assert traffic(shape, replace(two, strategy="ddp")) == {"all-reduce": p}
    found = traffic(shape, replace(two, strategy="fsdp2", teacher=False))
    assert found == {"all-gather": 3 * (2 * p - rest), "reduce-scatter": 3 * p}
    assert sent({"all-reduce": p}, 4) == pytest.approx(1.5 * p)
    assert sent(found, 2) == pytest.approx((found["all-gather"] + found["reduce-scatter"]) / 2)


def test_tokens_and_files_are_counted(shape):
    one = job("trainer.accumulate=3", "trainer=ddp", "trainer.devices=4", "trainer.nodes=2", "trainer.batch_size=2")
    assert (one.ranks, one.tokens_per_step) == (8, 8 * 2 * 64 * 3)
    assert [other.ranks for other in side_by_side(one)] == [1, 8, 8]
    files = checkpoint_bytes(shape, one)
    assert files == {
        "model": 4 * shape.weights + 8 * shape.scales,
        "training state": 12 * shape.weights + 8 * shape.scales,
    }


def test_plan_shows_every_strategy_and_the_tokens(qat, tiny_model_dir):
    words = [f"model.path={tiny_model_dir}", "scheme=w4a16_g32", "trainer=fsdp2", "trainer.devices=4"]
    code, out, _ = qat("plan", *words, "--json")
    plan = json.loads(out)
    assert code == 0
    assert {name: row["ranks"] for name, row in plan["strategies"].items()} == {"single": 1, "ddp": 4, "fsdp2": 4}
    assert plan["memory_gib"]["total"] == plan["strategies"]["fsdp2"]["memory_gib"]
    assert plan["tokens"] == plan["steps"] * plan["tokens_per_step"] == 100 * 4 * 8 * 512
    code, out, _ = qat("plan", *words)
    assert re.search(r"> fsdp2 +│ 4 ", out) and "16,384 tokens per step, 100 steps, 1,638,400 tokens" in out


def test_stages_train_fewer_values(shape, tiny_model_dir):
    wide = compose_run([*WORDS, "stages=low_rank", "stages.schedule.0.rank=4"])
    need = stage_needs(shape, wide)[0]
    products = 4 * 4 * shape.linear_sides
    # q, k, v, o, gate, up, down of two blocks; the head is tied
    layers = meta_model(ModelConfig(path=str(tiny_model_dir))).model.layers
    assert shape.linear_sides == sum(sum(p.shape) for p in layers.parameters() if p.dim() == 2)
    assert need.memory.always["low-rank products"] == products
    assert need.memory.always["Adam moments"] == 2 * products
    assert need.memory.moments["end of backward"]["gradients"] == products
    assert need.memory.moments["loss"]["sums with products"] == 4 * shape.linear
    held = memory(shape, job_of(wide, StageConfig("scales", steps=3)))
    assert held.always["Adam moments"] == held.moments["loss"]["gradients"] == 0
    assert held.always["scales, zero points"] == 24 * shape.scales
    assert traffic(shape, replace(need.job, ranks=2, strategy="ddp")) == {"all-reduce": products}


def test_blocks_wait_in_main_memory_of_a_gpu(shape):
    words = ["stages=blockwise_then_kl", "stages.schedule.0.windows=32", "trainer.accumulate=3"]
    blocks, whole = stage_needs(shape, compose_run([*WORDS, *words]))
    assert (blocks.kind, blocks.steps, blocks.tokens) == ("blockwise", 2 * 64, 64 * 2 * 64)
    assert (whole.kind, whole.tokens) == ("end_to_end", whole.steps * 3 * 2 * 64)
    streams = 2 * 4 * 32 * 64 * shape.hidden
    assert blocks.memory.always["streams"] == streams
    assert blocks.memory.moments["a block"]["gradients"] == 4 * shape.block_weights
    gpu = stage_needs(shape, compose_run([*WORDS, *words, "trainer=gpu"]))[0].memory
    assert gpu.moments["making the streams"] == {"float32 weights": 8 * shape.weights}
    assert gpu.moments["a block"]["blocks"] == 8 * shape.block_weights
    assert gpu.host > 8 * shape.weights + streams


def test_plan_shows_every_stage_and_the_sum(qat, tiny_model_dir):
    words = [f"model.path={tiny_model_dir}", "scheme=w4a16_g32", "stages=blockwise_kl_scales"]
    code, out, _ = qat("plan", *words)
    assert code == 0
    assert re.search(r"stage 0: blockwise: 128 steps, [\d,]+ tokens, 0\.\d\d GiB at a block\n", out)
    assert re.search(r"stage 1: end_to_end: 100 steps.*\nstage 2: scales: 50 steps", out)
    plan = json.loads(qat("plan", *words, "--json")[1])
    assert plan["steps"] == sum(stage["steps"] for stage in plan["stages"]) == 128 + 100 + 50
    assert plan["tokens"] == sum(stage["tokens"] for stage in plan["stages"])
    assert plan["memory_gib"]["total"] == max(stage["memory_gib"] for stage in plan["stages"])
    assert "stage 0" not in qat("plan", *words[:2])[1]


def test_plan_refuses_what_does_not_fit_and_says_what_would(qat):
    words = ["recipe=llama3_8b_w4a16_g128_fsdp2", "trainer.memory_gib=40", "trainer.batch_size=16"]
    code, out, error = qat("plan", *words)
    assert (code, "tokens per step" in out) == (2, True)
    found = re.search(
        r"trainer\.memory_gib: a rank must fit into the 40\.0 GiB of its device, got ([\d.]+) GiB\.", error
    )
    remedies = dict(re.findall(r"([\w.]+=\w+)[^(;]*(?:\(no teacher\) )?\(([\d.]+) GiB\)", error))
    assert {"trainer.batch_size=1", "distill=ce", "trainer.nodes=2"} <= set(remedies)
    assert all(float(size) < float(found[1]) for size in remedies.values())
    code, out, _ = qat("plan", words[0], words[1], "trainer.batch_size=1", "--json")
    assert code == 0
    assert json.loads(out)["memory_gib"]["total"] == pytest.approx(float(remedies["trainer.batch_size=1"]), abs=0.06)


def test_plan_of_a_folder_is_not_that_of_the_recipes_architecture(qat, tiny_model_dir):
    words = ["recipe=llama3_8b_w4a16_g128_fsdp2", f"model.path={tiny_model_dir}", "scheme=w4a16_g32", "--json"]
    assert json.loads(qat("plan", *words)[1])["weights"] < 1e6
    code, _, error = qat("plan", "recipe=llama3_8b_w8a8_fsdp2", "model.architecture=llama3_9b")
    assert code == 2
    assert "model.architecture: must stand in" in error and "Did you mean 'llama3_8b'?" in error


# parameters of the published models
PARAMETERS = {"llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496, "llama3_405b": 405_853_388_800}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_architecture_has_the_published_number_of_parameters(name):
    model = meta_model(ModelConfig(path=str(recipes_dir() / "architectures" / name)))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert {file.name for file in (recipes_dir() / "architectures" / name).iterdir()} == {"config.json"}


def test_document_holds_the_tables_of_today():
    spec = importlib.util.spec_from_file_location("check_scaling", ROOT / "scripts/check_scaling.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (ROOT / "docs/scaling.md").read_text()
    assert script.paper_tables() in text
    results = json.loads((ROOT / "docs/results/scaling.json").read_text())
    assert {case["case"] for case in results} == set(script.CASES)
    assert script.measured_table(results) in text
    assert [line for case in results for line in script.too_far(case)] == []
    # measured with the formulas as they are
    for case in results:
        shape = shape_of_case(script, case["case"])
        now = job_of(script.case_config(case["case"]))
        assert memory(shape, now).peak == pytest.approx(case["memory"]["paper"], rel=1e-9)
        assert traffic(shape, now) == case["traffic"]["paper"]


def shape_of_case(script, case: str):
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**script.SMALL), dtype=torch.float32)
    return shape_of(model.config, build.quantize_layers(model, script.case_config(case)))
