"""Runs that start from a post-training method and are cut: what they end with is that of a run never cut."""

from __future__ import annotations

import os
import signal

import pytest
from tiny_runs import read, same_process, tiny_run

from qat import pipeline, signals
from qat.cli.main import main
from qat.run_folder import RunFolder

WORDS = ["scheme=w4a16_g32", "ptq.windows=16", "evaluate.baselines=false"]
WORDS += ["trainer.max_steps=4", "trainer.checkpoint_every=2", "trainer.layer_stats_every=1"]

BLOCKS = ["stages=blockwise_then_kl", "stages.schedule.0.steps=3"]


@pytest.fixture
def applied(monkeypatch, own_signals) -> list[str]:
    """The method's name for every time that it is applied; signals and fresh processes stay inside the test."""
    monkeypatch.setattr(pipeline, "_fresh_process", same_process)
    apply, found = pipeline.build.apply_ptq, []

    def noted(model, windows, config):
        found.append(config.ptq.method)
        return apply(model, windows, config)

    monkeypatch.setattr(pipeline.build, "apply_ptq", noted)
    return found


def cut(stage: str, monkeypatch, *arguments) -> None:
    """A run that is asked to stop when it enters `stage`."""
    enter = RunFolder.stage

    def told(self, name, step):
        enter(self, name, step)
        if name == stage:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "stage", told)
        with pytest.raises(signals.Stopped):
            tiny_run(*arguments)
    signals.forget()


# a stage that hears of the stop before it has saved anything, one in the middle of the training, one after it
@pytest.mark.parametrize(
    ("start", "repeated"),
    [
        (["ptq=gptq"], {"loading": True, "training": False, "evaluating": False}),
        (["ptq=awq", "fake_quant=learned", *BLOCKS], {"training": False}),
        (["ptq=rtn_mse", "stages=scales_last", "stages.schedule.1.steps=2"], {"training": False}),
    ],
    ids=["gptq", "awq-blocks", "rtn_mse-scales"],
)
def test_cut_run_ends_with_the_bytes_of_one_never_cut(
    applied, tmp_path, tiny_model_dir, tiny_text, monkeypatch, capsys, start, repeated
):
    arguments = (tiny_model_dir, tiny_text, *start, *WORDS)
    whole = tiny_run(tmp_path / "whole", *arguments)
    assert len(applied) == 1
    for stage, is_repeated in repeated.items():
        applied.clear()
        cut(stage, monkeypatch, tmp_path / stage, *arguments)
        run = tmp_path / stage / "run"
        assert main(["resume", str(run)]) == 0, capsys.readouterr().err
        assert len(applied) == 1 + is_repeated, stage
        for file in ("checkpoints/final/model.safetensors", "export/compressed_tensors/model.safetensors"):
            assert (run / file).read_bytes() == (whole / file).read_bytes(), (stage, file)
        assert read(run, "results.json")["perplexity"] == read(whole, "results.json")["perplexity"]
        mine, wanted = (read(folder, "manifest.json")["ptq"] for folder in (run, whole))
        assert {**mine, "seconds": 0} == {**wanted, "seconds": 0}


def test_quantizing_without_training_is_not_repeated_either(applied, tmp_path, tiny_model_dir, tiny_text, monkeypatch):
    words = ["ptq=gptq", *WORDS, "trainer.max_steps=0"]
    cut("evaluating", monkeypatch, tmp_path, tiny_model_dir, tiny_text, *words)
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert applied == ["gptq"]
    assert read(tmp_path / "run", "results.json")["method"] == "gptq"
