"""The real wandb package, offline: a run that is cut and resumed stays one wandb run."""

from __future__ import annotations

import os
import signal

import pytest
from tiny_runs import read, same_process, tiny_run

from qat import pipeline, signals
from qat.cli.main import main
from qat.run_folder import RunFolder

wandb = pytest.importorskip("wandb")


def test_resumed_run_keeps_its_wandb_run(tmp_path, tiny_model_dir, tiny_text, monkeypatch, own_signals):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(pipeline, "_fresh_process", same_process)
    enter = RunFolder.stage

    def told(self, name, step):
        enter(self, name, step)
        if name == "training":
            os.kill(os.getpid(), signal.SIGTERM)

    words = ["logger=wandb_offline", "evaluate.baselines=false", "trainer.max_steps=3"]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "stage", told)
            with pytest.raises(signals.Stopped):
                tiny_run(tmp_path, tiny_model_dir, tiny_text, *words)
        wandb.run.finish()  # as at the end of the process
        signals.forget()
        run = tmp_path / "run"
        first = read(run, "manifest.json")["wandb_run"]
        assert main(["resume", str(run)]) == 0
    finally:
        wandb.teardown()
    assert first and read(run, "manifest.json")["wandb_run"] == first
    # both processes wrote a file of the same run, which `wandb sync` sends as one
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{first}.wandb"] * 2
