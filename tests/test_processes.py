"""Two processes train what one trains: DDP and FSDP2 over gloo, with dynamic, static and learned scales."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import scenarios
import torch
from quant_models import float_model, plan
from safetensors.torch import load_file, save_file
from tolerances import TWO_PROCESSES_CODES, TWO_PROCESSES_LARGEST, TWO_PROCESSES_LOSS, TWO_PROCESSES_MEAN

from qat.checkpoint import load_state
from qat.config import DataConfig
from qat.data import load_windows
from qat.insert import insert
from qat.nn.quant import quantized_weights

CASES = ("dynamic", "static", "learned", "dynamic@3", "static@1", "learned@4", "scales", "scales@3", "nan")


BLOCKS = ("blocks", "blocks@9")


@pytest.fixture(scope="module")
def windows(tiny_text, tiny_tokenizer):
    return load_windows(DataConfig(path=str(tiny_text), block_size=32, eval_tokens=64), tiny_tokenizer).train[:10]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def results(request, tmp_path_factory, tiny_model_dir, windows):
    """Folder of what two processes left, for one strategy."""
    folder = tmp_path_factory.mktemp("ranks")
    save_file({"windows": windows}, folder / "windows.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(__file__).with_name("scenarios.py")), str(folder), str(tiny_model_dir)]
    command += [str(folder / "windows.safetensors"), request.param, *CASES, *(BLOCKS if request.param == "ddp" else ())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / request.param


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model_dir, windows):
    """The same by one process, with the whole batch."""
    folder = tmp_path_factory.mktemp("alone")
    for name in scenarios.SCENARIOS:
        scenarios.train(folder / name, tiny_model_dir, windows, "single", name)
    return folder


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "train"]


@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_two_processes_train_what_one_trains(results, alone, name):
    mine, theirs = (load_file(folder / name / "state.safetensors") for folder in (results, alone))
    assert mine.keys() == theirs.keys()
    torch.testing.assert_close(losses(results / name), losses(alone / name), **TWO_PROCESSES_LOSS)
    for key, tensor in theirs.items():
        if tensor.is_floating_point():
            difference = (mine[key] - tensor).abs()
            assert float(difference.mean()) < TWO_PROCESSES_MEAN, key
            assert float(difference.max()) < TWO_PROCESSES_LARGEST, key
        elif key.endswith("zero_point"):
            assert int((mine[key] - tensor).abs().max()) <= 1, key
        else:
            assert torch.equal(mine[key], tensor), key
    assert json.loads((results / name / "facts.json").read_text()) == {"steps": 6, "tokens": 6 * 4 * 32}


@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_two_processes_end_with_the_codes_of_one(results, alone, tiny_model_dir, name):
    scheme, how, _, _ = scenarios.SCENARIOS[name]
    codes = []
    for folder in (results, alone):
        model = float_model(tiny_model_dir)
        insert(model, plan(scheme), how)
        load_state(model, folder / name / "state.safetensors")
        codes.append(torch.cat([fq.codes(weight).flatten() for _, weight, fq in quantized_weights(model)]))
    assert float((codes[0] != codes[1]).float().mean()) < TWO_PROCESSES_CODES
    assert int((codes[0].int() - codes[1].int()).abs().max()) <= 1


@pytest.mark.parametrize("name", [case for case in CASES if "@" in case])
def test_two_processes_go_on_bit_for_bit_when_one_of_them_was_asked_to_stop(results, name):
    whole = load_file(results / name.partition("@")[0] / "state.safetensors")
    again = load_file(results / name.replace("@", "") / "state.safetensors")
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []
    assert losses(results / name.replace("@", "")) == losses(results / name.partition("@")[0])


def test_processes_end_with_the_same_blocks_and_go_on_bit_for_bit(results):
    if results.name == "fsdp2":
        assert not (results / "blocks").exists(), "refused: see test_stages"
        return
    states = [
        load_file(results / name / f"state{rank}.safetensors") for name in ("blocks", "blocks9") for rank in (0, 1)
    ]
    for other in states[1:]:
        assert [key for key in other if not torch.equal(states[0][key], other[key])] == []
    lines = [json.loads(line) for line in (results / "blocks/metrics.jsonl").read_text().splitlines()]
    assert all(line["error_after"] < line["error_before"] for line in lines)
    assert len(lines) == 2


def test_gradient_that_is_not_finite_on_one_process_is_skipped_by_all(results):
    lines = [json.loads(line) for line in (results / "nan/metrics.jsonl").read_text().splitlines()]
    norms = {line["step"]: line["grad_norm"] for line in lines if line["event"] == "train"}
    assert [step for step, norm in norms.items() if norm is None] == [3]
    assert len(norms) == 6
    assert all(torch.isfinite(tensor).all() for tensor in load_file(results / "nan/state.safetensors").values())
    assert len(set(json.loads((results / "nan/sums.json").read_text()))) == 1
