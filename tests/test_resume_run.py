"""`qat resume`: a whole run cut in any of its stages ends as the run that never stopped."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import files, lines_of, read, same_process

from qat import pipeline, signals
from qat.cli.main import main
from qat.run_folder import RunFolder, _hold

STAGES = ("loading", "training", "training the control", "evaluating", "exporting", "verifying")


@pytest.fixture(autouse=True)
def own_process(monkeypatch, own_signals):
    """Signals and fresh processes stay inside the test."""

    def listening(*arguments):
        signals.poll()
        return same_process(*arguments)

    monkeypatch.setattr(pipeline, "_fresh_process", listening)


@pytest.fixture
def train(tmp_path, tiny_model_dir, tiny_text, capsys):
    """Starts a run of four steps with a control under tmp_path/runs; exit code and stderr."""

    def go(name, *overrides):
        fixed = [f"runs_dir={tmp_path / 'runs'}", f"name={name}", f"model.path={tiny_model_dir}"]
        fixed += [f"data.path={tiny_text}", "distill=kl_ce", "trainer.max_steps=4", "trainer.checkpoint_every=2"]
        code = main(["train", "recipe=tiny", *fixed, *overrides])
        return code, capsys.readouterr().err

    return go


def cut_in(stage: str, monkeypatch) -> None:
    """The process is told to end as soon as the run enters `stage`."""
    enter = RunFolder.stage

    def told(self, name, step):
        enter(self, name, step)
        if name == stage:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "stage", told)


def without_time(results: dict) -> dict:
    varying = ("seconds", "name", "tokens_per_second", "peak_memory_gib")
    return {key: value for key, value in results.items() if key not in varying}


def test_run_cut_in_any_stage_ends_as_the_run_that_was_not(train, tmp_path, monkeypatch, capsys):
    assert train("whole")[0] == 0
    whole = tmp_path / "runs/whole"
    wanted = load_file(whole / "checkpoints/final/model.safetensors")
    for stage in STAGES:
        with monkeypatch.context() as patch:
            cut_in(stage, patch)
            code, _ = train(stage.split()[-1])
        assert code == 75, stage
        run = tmp_path / "runs" / stage.split()[-1]
        status = read(run, "run_status.json")
        assert (status["status"], status["stage"]) == ("preempted", stage)
        signals.forget()
        assert main(["resume", str(run)]) == 0, stage
        capsys.readouterr()
        assert read(run, "run_status.json")["status"] == read(run, "manifest.json")["exit_state"] == "finished"
        assert [entry["after"] for entry in read(run, "manifest.json")["resumed"]] == ["preempted"]
        mine = load_file(run / "checkpoints/final/model.safetensors")
        assert all(torch.equal(mine[name], wanted[name]) for name in wanted), stage
        assert without_time(read(run, "results.json")) == without_time(read(whole, "results.json")), stage
        export = "export/compressed_tensors/training_digests.json"
        assert read(run, export) == read(whole, export)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["final"], stage


def test_finished_run_is_left_alone(finished, capsys):
    before = files(finished)
    assert main(["resume", str(finished)]) == 0
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert files(finished) == before


@pytest.fixture
def stopped(train, tmp_path, monkeypatch):
    """A run that was asked to stop when its training began."""
    with monkeypatch.context() as patch:
        cut_in("training the control", patch)
        assert train("stopped")[0] == 75
    signals.forget()
    return tmp_path / "runs/stopped"


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["seed=1"], ["seed: this run has 0, got 1", "--force goes on all the same"]),
        (
            ["trainer.batch_size=3", "optim.lr=0.5"],
            ["optim.lr: this run has", "this run sees 2 windows a step, got 3"],
        ),
        (["scheme.weight.bits=8", "--force"], ["scheme.weight.bits: this run has 4, got 8", "run of its own name"]),
        (["fake_quant.estimator=lsq", "fake_quant.weight_scale=learned"], ["fake_quant.estimator", "weight_scale"]),
        (["nonsense.key=1"], ["nonsense.key: must be a setting"]),
    ],
)
def test_resume_with_other_settings_is_refused_naming_each(stopped, capsys, overrides, wanted):
    before = files(stopped)
    assert main(["resume", str(stopped), *overrides]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in wanted), error
    assert files(stopped) == before


def test_resume_takes_settings_that_change_no_number_of_the_training(stopped, capsys):
    assert main(["resume", str(stopped), "trainer.log_every=2", "evaluate.batch_size=2"]) == 0
    assert "log_every: 2" in (stopped / "resolved.yaml").read_text()


def test_resume_with_other_text_or_weights_is_refused_unless_forced(stopped, tiny_text, capsys, monkeypatch, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text(tiny_text.read_text().replace("miller", "painter"))
    resolved = stopped / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace(str(tiny_text), str(text)))
    before = files(stopped)
    assert main(["resume", str(stopped)]) == 2
    after = files(stopped)
    del before["run.lock"], after["run.lock"]  # who holds it, and since when
    assert after == before
    assert "data.path: must be what the run began with, got other content" in capsys.readouterr().err
    assert main(["resume", str(stopped), "--force"]) == 0


def test_run_held_by_another_process_is_refused_by_train_and_resume(stopped, train, capsys):
    child = os.fork()
    if child == 0:
        lock = _hold(stopped)  # stays open until the process ends
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(lock.closed)
    os.waitpid(child, os.WUNTRACED)
    try:
        wanted = f"one process at a time works on a run, got held by process {child} on "
        assert main(["resume", str(stopped)]) == 2
        assert wanted in capsys.readouterr().err
        code, error = train("stopped", "overwrite=true")
        assert code == 2
        assert wanted in error
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert main(["resume", str(stopped)]) == 0


def test_resume_of_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["resume", str(tmp_path)]) == 2
    assert lines_of(capsys.readouterr().err) == [
        f"error: {tmp_path}: must be a run folder, got no resolved.yaml. Name a folder that `qat train` made."
    ]


def test_every_line_of_the_metrics_is_of_one_step_after_a_resume(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut_in("training", patch)
        train("cut", "trainer.layer_stats_every=1")
    signals.forget()
    run = tmp_path / "runs/cut"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 3, "lo')  # as a killed process leaves it
    assert main(["resume", str(run)]) == 0
    for name in ("metrics.jsonl", "control/metrics.jsonl"):
        lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
        steps = [line["step"] for line in lines if line["event"] == "train"]
        assert steps == [1, 2, 3, 4], name
