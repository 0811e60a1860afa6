"""Sweeps whose trials are SLURM jobs, on a SLURM of scripts: ends, pruning, queues, stopped and killed drivers."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from sweeps import TRIAL, opened, run, sweep_of

from qat.config import ClusterConfig, RunConfig
from qat.report.sweep_record import read_sweep
from qat.sweep import driver, slurm
from qat.sweep.launchers import LAUNCHERS
from qat.sweep.slurm import SlurmJob, check_slurm


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> FakeSlurm:
    monkeypatch.setattr(driver, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(slurm, "LEFT_OVER_POLL_SECONDS", 0.05)
    return FakeSlurm(tmp_path / "bin", TRIAL, monkeypatch)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "s"


def states(folder: Path) -> list[str]:
    return [trial.state for trial in read_sweep(folder).trials]


def when(condition, action) -> threading.Thread:
    """Do something to the driver as soon as something is true; the thread ends with the test."""

    def wait():
        end = time.monotonic() + 30
        while not condition() and time.monotonic() < end:
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_trials_are_jobs_and_those_that_fail_say_why(cluster, folder):
    config = sweep_of(1.0, do=["finish", "fail", "raise", "memory"], parallel=4)
    assert run(config, folder, launch=SlurmJob) is None
    trials = read_sweep(folder).trials
    assert [trial.state for trial in trials] == ["complete", "failed", "failed", "failed"]
    assert [trial.metrics.get("perplexity.packed") for trial in trials] == [1.0, None, None, None]
    assert trials[1].reason == "exit 1: in_features: must be a multiple of group_size, got 63. Use 21."
    assert trials[2].reason == "exit 1: KeyError: 'key'"
    assert trials[3].reason.startswith("out of memory: RuntimeError")
    assert sorted(cluster.states) == ["COMPLETED", "FAILED", "FAILED", "FAILED"]
    script = (cluster.folder / "jobs/100/script").read_text()
    assert "#SBATCH --job-name=trial-0000\n" in script
    assert "#SBATCH --signal=USR1@300\n" in script
    assert not list((folder / "configs").glob("*.job"))


def test_what_slurm_ends_and_what_it_refuses_is_said(cluster, folder, tmp_path):
    cluster.say("ends_as", "TIMEOUT")
    run(sweep_of(1.0), folder, launch=SlurmJob, do="killed")
    assert read_sweep(folder).trials[0].reason == "exit 1: SLURM job 100 ended as TIMEOUT"
    cluster.say("refuses", "sbatch: error: invalid partition specified: gpu")
    run(sweep_of(1.0), tmp_path / "t", launch=SlurmJob)
    reason = read_sweep(tmp_path / "t").trials[0].reason
    assert "sbatch: must take the job, got 'sbatch: error: invalid partition" in reason


def test_hopeless_job_is_stopped_early_and_counts_as_pruned(cluster, folder):
    pruning = {"kind": "median", "startup_trials": 2, "warmup_steps": 2}
    assert run(sweep_of(1.0, 2.0, 9.0, pruning=pruning), folder, launch=SlurmJob, do="watched") is None
    assert states(folder) == ["complete", "complete", "pruned"]
    assert 2 <= read_sweep(folder).trials[2].last_step < 59


def test_preempted_job_queues_itself_again_and_is_the_same_trial(cluster, folder):
    assert run(sweep_of(1.0), folder, launch=SlurmJob, do="preempted") is None
    assert states(folder) == ["complete"]
    assert (cluster.states, cluster.calls) == (["COMPLETED"], ["train", "resume"])


def test_waiting_in_the_queue_is_not_running(cluster, folder):
    cluster.say("full")
    when(lambda: cluster.states == ["PENDING"], lambda: (time.sleep(3), (cluster.folder / "full").unlink()))
    began = time.monotonic()
    run(sweep_of(1.0, timeout_minutes=3 / 60), folder, launch=SlurmJob)
    assert time.monotonic() - began > 3
    assert states(folder) == ["complete"]
    assert read_sweep(folder).trials[0].minutes < 3 / 60


def test_stopped_driver_takes_its_jobs_out_of_the_queue_and_the_next_one_submits_them_again(cluster, folder):
    config = sweep_of(1.0, 2.0, parallel=2)

    def first_runs() -> bool:
        return (folder / "trial-0000/run_status.json").is_file() and (cluster.folder / "full").touch() is None

    def stop() -> None:
        while len(cluster.states) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    cluster.say("full")
    when(lambda: cluster.states[:1] == ["PENDING"], lambda: (cluster.folder / "full").unlink())
    when(first_runs, stop)
    assert run(config, folder, launch=SlurmJob, do="hang") == signal.SIGTERM
    assert states(folder) == ["interrupted", "interrupted"]
    assert not [state for state in cluster.states if state in ("PENDING", "RUNNING")]
    (cluster.folder / "full").unlink()
    for number in (0, 1):
        # each trial hangs at its first start only
        (folder / f"trial-000{number}").mkdir(exist_ok=True)
        with (folder / f"trial-000{number}/pids").open("a") as file:
            file.write("0\n")
    assert run(config, folder, launch=SlurmJob, do="hang") is None
    assert states(folder) == ["complete", "complete"]


def test_job_of_a_killed_driver_is_ended_and_its_trial_runs_again(cluster, folder):
    with opened(sweep_of(1.0), folder, launch=SlurmJob, do="hang") as sweep:
        number = sweep.study.ask()
        sweep._start(number)
        while not (folder / "trial-0000/run_status.json").is_file():
            time.sleep(0.02)
    assert cluster.states == ["RUNNING"]
    assert run(sweep_of(1.0), folder, launch=SlurmJob, do="hang") is None
    assert states(folder) == ["complete"]
    assert cluster.states == ["FAILED", "COMPLETED"]


def test_job_that_is_killed_counts_as_ended_at_once(cluster, folder):
    with opened(sweep_of(1.0), folder, launch=SlurmJob, do="hang") as sweep:
        number = sweep.study.ask()
        sweep._start(number)
        job = sweep._active[number].job
        while job.waits or not (folder / "trial-0000/run_status.json").is_file():
            assert job.poll() is None
        job.kill()
        assert job.poll() == -signal.SIGKILL
        # its number stays for the next driver, which waits for the end
        assert (folder / "configs/trial-0000.job").is_file()
    assert run(sweep_of(1.0), folder, launch=SlurmJob, do="hang") is None
    assert cluster.states[0] == "CANCELLED by 0"


def test_check_names_what_is_missing(cluster, monkeypatch, tmp_path):
    config = RunConfig(cluster=ClusterConfig("slurm"))
    assert LAUNCHERS["slurm"].check(config, 8) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    config.cluster.kind = "local"
    problems = check_slurm(config, 1)
    assert re.search(r"needs cluster\.kind=slurm, got local\. Add cluster=slurm", problems[0])
    assert "got no sbatch, srun, sacct, squeue, scancel, scontrol" in problems[1]
