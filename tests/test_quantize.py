"""`qat quantize`: a whole run without training; and training that starts from a post-training method."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import read, same_process, tiny_run

from qat import pipeline
from qat.cli.compose import compose_run
from qat.cli.quantize import as_overrides
from qat.errors import UserError
from qat.nn.quant import quantized_weights
from qat.train.calibrate import calibrate

PATHS = ["model.path=m", "data.path=d"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(pipeline, "_fresh_process", same_process)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantize_leaves_a_whole_run_folder(qat, method, tmp_path, tiny_model_dir, tiny_text):
    words = [
        "scheme=w4a16_g32",
        f"method={method}",
        f"data.path={tiny_text}",
        "data.block_size=32",
        "data.eval_tokens=256",
    ]
    code, out, err = qat("quantize", tiny_model_dir, *words, f"runs_dir={tmp_path}", "name=run", "ptq.windows=16")
    assert code == 0, err
    run = tmp_path / "run"
    results, parity, manifest = (read(run, name) for name in ("results.json", "parity.json", "manifest.json"))
    assert (results["method"], results["steps"], parity["verdict"]) == (method, 0, "equal")
    assert (manifest["ptq"]["tokens"], manifest["ptq"]["layers"]) == (512, 14)
    assert {name: results["perplexity"][name] is not None for name in ("float", "rtn", "packed")} == {
        "float": True,
        "rtn": True,
        "packed": True,
    }
    assert f"{method.upper()}, packed" in out
    assert f"{method.upper()}, packed" in (run / "report.html").read_text()
    assert f"{method}: 2/2" in err


@pytest.mark.parametrize("start", ["static", "learned"])
def test_training_starts_from_the_method(tmp_path, tiny_model_dir, tiny_text, start):
    words = ("ptq=gptq", f"fake_quant={start}", "scheme=w4a16_g32", "ptq.windows=16", "evaluate.baselines=false")
    run = tiny_run(tmp_path, tiny_model_dir, tiny_text, *words, "optim.lr=1e-9", "optim.scale_lr=1e-9")
    assert read(run, "results.json")["method"] == "qat"
    assert read(run, "parity.json")["verdict"] == "equal"
    config = compose_run(
        ["recipe=tiny", "ptq=gptq", "scheme=w4a16_g32", "ptq.windows=16", *PATHS, f"fake_quant={start}"]
    )
    config.model.path, config.data.path = str(tiny_model_dir), str(tiny_text)
    begun, _, windows, _, floating = pipeline._prepare(config)
    calibrate(begun, windows.train[:2], 2)
    pipeline.build.apply_ptq(begun, windows.train, config)
    trained, _ = pipeline.rebuild(config, run)
    fresh = dict(floating.named_parameters())
    for (name, weight, fq), (_, before, before_fq) in zip(
        quantized_weights(trained), quantized_weights(begun), strict=True
    ):
        if "layers" in name:
            assert torch.equal(fq.codes(weight), before_fq.codes(before)), name
            assert not torch.equal(weight, fresh[name]), "the weights are the method's"


REFUSED = {
    "ptq=gptq fake_quant=dynamic": "fake_quant.weight_scale: the scales that ptq=gptq finds must be kept",
    "ptq=gptq phases=delayed": "phases.schedule: phases that choose new ranges would undo ptq=gptq",
    "ptq=awq ptq.keep=scales": "ptq.keep: awq finds scales for weights that it has rescaled",
    "ptq.method=squeezellm": "ptq.method: must be one of none, rtn, rtn_mse, gptq, awq, got 'squeezellm'",
    "ptq.windows=0": "ptq.windows: must be at least 1, got 0",
    "trainer.max_steps=0": "trainer.max_steps: only a ptq method needs no training, got 0",
}


@pytest.mark.parametrize("words", REFUSED)
def test_run_that_would_lose_its_start_is_refused(words):
    with pytest.raises(UserError, match=REFUSED[words]) as caught:
        compose_run([*PATHS, *words.split()])
    assert caught.value.before_work


def test_too_few_tokens_leave_no_folder(qat, tmp_path, tiny_model_dir, tiny_text):
    words = [f"data.path={tiny_text}", "data.block_size=32", "ptq.windows=2", f"runs_dir={tmp_path}"]
    code, _, err = qat("quantize", tiny_model_dir, *words)
    assert code == 2
    assert "calibration needs at least 128 tokens" in err
    assert "got 64 (2 windows of 32)" in err
    assert list(tmp_path.iterdir()) == []


def test_quantize_takes_a_model_by_name_and_refuses_an_unknown_method():
    assert "model=smollm2_135m" in as_overrides("smollm2_135m", ["scheme=w4a16_g64"])
    assert "name=mine_w4a16_g64_awq" in as_overrides("some/mine", ["scheme=w4a16_g64", "method=awq"])
    with pytest.raises(UserError, match=r"method: must be one of .*, got 'gtpq'. Did you mean 'gptq'\?"):
        as_overrides("m", ["method=gtpq"])
    with pytest.raises(UserError, match="needs a model before the overrides, got 'scheme=w4a16_g64'"):
        as_overrides("scheme=w4a16_g64", [])


def test_ls_lists_the_methods(qat):
    code, out, _ = qat("ls", "methods")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["rtn", "rtn_mse", "gptq", "awq"]
