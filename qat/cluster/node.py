"""One machine of a job: meet the others, start torchrun, pass on the signal to stop, requeue what was preempted.

    python -m qat.cluster --run runs/NAME --processes 8 -- train recipe=... name=NAME

Run once on each machine (`srun --ntasks-per-node=1`); SLURM says which machine this is. A run folder that holds an
unfinished run is resumed, a finished one is left alone. torchrun turns the trainer's exit code into its own, so how the
run ended is read from run_status.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.cluster.meeting import arrive, missing, open_store
from qat.errors import UserError, problem

PREEMPTED = 75
STOP = "stop"  # a file in the job folder: what is preempted is not to be queued again
RESTART = 144  # tells submitit's local executor to start the job again
PR_SET_PDEATHSIG = 1  # sys/prctl.h
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class NodeJob:
    """What a machine does. `command`: the words after `qat` that start the run; seconds as in ClusterConfig."""

    run: Path
    processes: int
    command: tuple[str, ...]
    port: int = 29500
    start_seconds: float = 300.0
    save_seconds: int = 300
    requeue: bool = True


@dataclass(frozen=True)
class Place:
    """Which machine of the job this is: its number, and the names of all."""

    node: int
    hosts: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one machine's part; the exit code is 0 finished, 1 failed, 2 refused, 75 preempted."""
    parser = argparse.ArgumentParser(prog="python -m qat.cluster", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder, on a file system that all machines see")
    parser.add_argument("--processes", type=int, required=True, help="processes on each machine")
    parser.add_argument("--port", type=int, default=NodeJob.port, help="the first of two free ports (default 29500)")
    parser.add_argument("--start-seconds", type=float, default=NodeJob.start_seconds, help="wait for other machines")
    parser.add_argument("--save-seconds", type=int, default=NodeJob.save_seconds, help="time to save when stopped")
    parser.add_argument("--no-requeue", dest="requeue", action="store_false", help="leave a preempted job at that")
    parser.add_argument("command", nargs="+", help="after --: the words after `qat`, such as train recipe=...")
    options = vars(parser.parse_args(argv))
    job = NodeJob(**{**options, "command": tuple(options["command"])})
    try:
        return run_node(job, here())
    except UserError as error:
        for line in error.problems:
            print(f"error: {line}", file=sys.stderr)
        return 2 if error.before_work else 1


def here() -> Place:
    """This machine in its SLURM job; alone outside of one."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if nodes is None:
        return Place(0, (socket.gethostname(),))
    command = ["scontrol", "show", "hostnames", nodes]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Place(int(os.environ.get("SLURM_NODEID", "0")), tuple(done.stdout.split()))


def job_folder(run: Path) -> Path:
    """Where script, logs and configuration of a run's jobs stand: beside the run folder, which belongs to the run."""
    return run.absolute().parent / ".jobs" / run.name


def run_status(run: Path) -> str | None:
    """What run_status.json says; None when the folder holds no run."""
    try:
        return json.loads((run / "run_status.json").read_text(encoding="utf-8"))["status"]
    except FileNotFoundError:
        return None


def run_node(job: NodeJob, place: Place) -> int:
    """Start or resume the run on this machine and wait for its end; the exit code as `main`.

    Raises:
        UserError: a machine did not come, or the port is taken.
    """
    if (job_folder(job.run) / STOP).exists():
        print(f"{job.run} is not to go on in this job", flush=True)
        return PREEMPTED
    before = run_status(job.run)
    # a run that goes on may do so with another number of processes
    resumed = ("resume", str(job.run), f"trainer.devices={job.processes}", f"trainer.nodes={len(place.hosts)}")
    words = job.command if before is None else resumed
    if len(place.hosts) > 1:
        words = meet(job, place, words if before != "finished" else ())
    if not words or before == "finished":
        print(f"{job.run} is finished", flush=True)
        return 0
    code = _wait(subprocess.Popen(_torchrun(job, place, words), start_new_session=True, preexec_fn=_before_torchrun))
    status = run_status(job.run)
    if status == "preempted":
        return _requeue(job, place)
    return 0 if status == "finished" and code == 0 else max(1, code)


def meet(job: NodeJob, place: Place, words: Sequence[str]) -> tuple[str, ...]:
    """Wait for all machines; what all of them run is what the first one found in the run folder.

    Raises:
        UserError: naming the machines that did not come.
    """
    store = open_store(place.hosts[0], job.port, place.node == 0, job.start_seconds, "cluster.port")
    names = [f"node {i}" for i in range(len(place.hosts))]
    arrive(store, names[place.node], json.dumps(list(words)))
    absent = missing(store, names, job.start_seconds)
    if absent:
        given = "no word from " + ", ".join(f"{name} ({place.hosts[int(name.split()[1])]})" for name in absent)
        wanted = f"all {len(names)} machines must come within {job.start_seconds:g} s"
        fix = 'Look at the logs of these machines, or exclude them: cluster.sbatch=["exclude=HOST"].'
        raise UserError(problem("start", wanted, given, fix), before_work=False)
    chosen = json.loads(store.get(names[0]))
    arrive(store, f"{names[place.node]} read")
    if place.node == 0:  # it serves the store, so it leaves last
        missing(store, [f"{name} read" for name in names], job.start_seconds)
    return tuple(chosen)


def _torchrun(job: NodeJob, place: Place, words: Sequence[str]) -> list[str]:
    layout = ["--standalone"]
    if len(place.hosts) > 1:
        layout = [f"--nnodes={len(place.hosts)}", f"--node-rank={place.node}", f"--master-addr={place.hosts[0]}"]
        layout += [f"--master-port={job.port + 1}", f"--rdzv-conf=timeout={round(job.start_seconds)}"]
    limits = [f"--nproc-per-node={job.processes}", f"--shutdown-timeout={job.save_seconds}"]
    return [*TORCHRUN, *layout, *limits, "-m", "qat.cli.main", *words]


def _before_torchrun() -> None:
    """In the new process: no death by a signal that SLURM sends to every process, no life after this one is killed."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(process: subprocess.Popen) -> int:
    """The exit code of torchrun; a signal to stop is passed on as SIGTERM, which torchrun gives to its workers."""

    def stop(number: int, _frame: Any) -> None:
        print(f"{signal.Signals(number).name}: the run saves and stops", file=sys.stderr, flush=True)
        process.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        return process.wait()
    finally:
        for number, answer in previous.items():
            signal.signal(number, answer)


def _requeue(job: NodeJob, place: Place) -> int:
    """Put a preempted job back into the queue, from the first machine; the exit code."""
    number = os.environ.get("SLURM_JOB_ID")
    requeue = job.requeue and not (job_folder(job.run) / STOP).exists()
    if requeue and os.environ.get("SUBMITIT_EXECUTOR") == "local":
        return RESTART
    if requeue and number and place.node == 0:
        print(f"{job.run} was preempted: job {number} is queued again", flush=True)
        subprocess.run(["scontrol", "requeue", number], check=True)
    elif place.node == 0:
        print(f"{job.run} was preempted; go on with: qat resume {job.run}", flush=True)
    return PREEMPTED
