"""Real processes, alone and under torchrun, signalled and killed: nothing is lost, nobody hangs or stays behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import read

pytestmark = pytest.mark.faults
STEPS = 40
PATIENCE = 240  # seconds for a process to start, or to end, on a busy machine


class Job:
    """`qat` as a user starts it; its processes are known by a variable of their environment."""

    def __init__(self, world: int, *arguments: str, log: Path):
        command = [sys.executable, "-m"]
        if world > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m"]
        self.mark = f"QAT_TEST_JOB={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        with log.open("w") as file:
            environment = os.environ | {name: value}
            self.process = subprocess.Popen(
                [*command, "qat.cli.main", *arguments], stdout=file, stderr=file, env=environment
            )

    def processes(self) -> dict[int, int | None]:
        """Process number -> RANK (None for a launcher) of everything the job has started and that still runs."""
        found: dict[int, int | None] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if self.mark in words:
                found[int(entry.name)] = next((int(word[5:]) for word in words if word.startswith("RANK=")), None)
        return found

    def rank(self, number: int) -> int:
        """Process number of a rank."""
        return min(pid for pid, rank in self.processes().items() if rank == number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)


@pytest.fixture
def start(tmp_path, tiny_model_dir, tiny_text):
    jobs = []

    def go(world: int, strategy: str, name: str, *overrides: str) -> tuple[Job, Path]:
        fixed = [f"runs_dir={tmp_path / 'runs'}", f"name={name}", f"model.path={tiny_model_dir}"]
        fixed += [f"data.path={tiny_text}", f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=5"]
        fixed += ["scheme=w8a8_static", "phases=delayed", f"trainer.strategy={strategy}", f"trainer.devices={world}"]
        fixed += ["evaluate.baselines=false", "trainer.timeout_minutes=0.5"]
        jobs.append(Job(world, "train", "recipe=tiny", *fixed, *overrides, log=tmp_path / f"{name}.log"))
        return jobs[-1], tmp_path / "runs" / name

    yield go
    for job in jobs:
        if job.process.poll() is None:
            for number in job.processes():
                os.kill(number, signal.SIGKILL)


def reached(run: Path, step: int) -> bool:
    file = run / "metrics.jsonl"
    return file.is_file() and f'"step": {step},' in file.read_text()


def wait_for(run: Path, step: int, job: Job) -> None:
    until = time.monotonic() + PATIENCE
    while not reached(run, step):
        assert job.process.poll() is None, f"ended before step {step}"
        assert time.monotonic() < until
        time.sleep(0.01)


def resume(world: int, run: Path, log: Path) -> int:
    return Job(world, "resume", str(run), log=log).wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_dir, tiny_text):
    """Final weights of the run that nobody disturbed, by number of processes and strategy."""
    kept: dict = {}

    def get(world: int, strategy: str, start) -> dict[str, torch.Tensor]:
        if (world, strategy) not in kept:
            job, run = start(world, strategy, "whole")
            assert job.wait() == 0
            kept[world, strategy] = load_file(run / "checkpoints/final/model.safetensors")
        return kept[world, strategy]

    return get


CASES = [
    (1, "single", "the process", signal.SIGTERM, 75),
    (1, "single", "the process", signal.SIGINT, 130),
    (2, "ddp", "rank 0", signal.SIGTERM, 1),
    (2, "ddp", "rank 1", signal.SIGUSR1, 1),
    (2, "fsdp2", "rank 1", signal.SIGTERM, 1),
    (2, "fsdp2", "launcher", signal.SIGTERM, 1),
]


@pytest.mark.parametrize(("world", "strategy", "who", "number", "code"), CASES)
def test_signal_to_any_process_saves_and_stops_all_of_them(start, whole, tmp_path, world, strategy, who, number, code):
    wanted = whole(world, strategy, start)
    job, run = start(world, strategy, "cut")
    wait_for(run, random.Random(who).randint(3, 20), job)
    os.kill(job.rank(int(who[-1])) if who.startswith("rank") else job.process.pid, number)
    assert job.wait() == code  # torchrun turns every code of a rank into 1: run_status.json is what counts
    assert job.processes() == {}
    assert read(run, "run_status.json")["status"] == ("interrupted" if number == signal.SIGINT else "preempted")
    assert resume(world, run, tmp_path / "resume.log") == 0
    mine = load_file(run / "checkpoints/final/model.safetensors")
    assert [name for name in wanted if not torch.equal(mine[name], wanted[name])] == []


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_job_and_the_run_goes_on_from_its_last_checkpoint(start, whole, tmp_path, victim):
    wanted = whole(2, "ddp", start)
    job, run = start(2, "ddp", "killed")
    wait_for(run, 12, job)
    os.kill(job.rank(victim), signal.SIGKILL)
    assert job.wait() == 1
    assert job.processes() == {}
    assert resume(2, run, tmp_path / "resume.log") == 0
    mine = load_file(run / "checkpoints/final/model.safetensors")
    assert [name for name in wanted if not torch.equal(mine[name], wanted[name])] == []


def test_killed_process_goes_on_bit_for_bit_again_and_again(start, whole, tmp_path):
    wanted = whole(1, "single", start)
    job, run = start(1, "single", "killed")
    for step in (7, 16, 28):
        wait_for(run, step, job)
        os.kill(job.process.pid, signal.SIGKILL)
        job.wait()
        job = Job(1, "resume", str(run), log=tmp_path / "resume.log")
    assert job.wait() == 0
    mine = load_file(run / "checkpoints/final/model.safetensors")
    assert [name for name in wanted if not torch.equal(mine[name], wanted[name])] == []
    assert len(read(run, "manifest.json")["resumed"]) == 3


def test_run_goes_on_with_another_number_of_processes(start, tmp_path):
    job, run = start(2, "fsdp2", "elastic")
    wait_for(run, 10, job)
    os.kill(job.rank(0), signal.SIGTERM)
    job.wait()
    log = tmp_path / "resume.log"
    again = ["trainer.devices=1", "trainer.strategy=single", "trainer.accumulate=2"]
    assert Job(1, "resume", str(run), *again, log=log).wait() == 0
    assert "2 processes before, 1 now" in log.read_text()
    assert read(run, "run_status.json")["status"] == "finished"
