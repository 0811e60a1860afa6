"""Sweeps whose trials are a few lines of Python instead of training, for the tests of the driver."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import yaml

from qat.config import ClusterConfig, RunConfig
from qat.sweep import driver
from qat.sweep.config import ParameterConfig, PruningConfig, SweepConfig
from qat.sweep.folder import claimed, trial_name
from qat.sweep.jobs import Job, LocalJob, TrialJob
from qat.sweep.study import Study

# A trial: reads its file, claims its folder, does what `do` says, and leaves results as a run does.
TRIAL = """
import json, os, signal, sys, time, yaml
config = yaml.safe_load(open(sys.argv[1]))
folder = os.path.join(config["runs_dir"], config["name"])
os.makedirs(folder, exist_ok=True)
write = lambda name, content: open(os.path.join(folder, name), "w").write(json.dumps(content))
status = lambda word: write("run_status.json", {"status": word})
value, do = config["value"], config.get("do", "finish")
metrics = os.path.join(folder, "metrics.jsonl")
if os.path.exists(metrics):
    os.remove(metrics)
open(os.path.join(folder, "pids"), "a").write(f"{os.getpid()}\\n")
first = len(open(os.path.join(folder, "pids")).readlines()) == 1
status("running")
if do == "fail":
    print("loading")
    print("error: in_features: must be a multiple of group_size, got 63. Use 21.", file=sys.stderr)
    sys.exit(2)
if do == "memory":
    sys.exit("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
if do == "raise":
    import atexit

    atexit.register(print, "logger: find logs there")
    {}["key"]
if do == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if do == "nan":
    value = None
if do == "watched":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as Lightning ends a run that is asked to stop
    for step in range(1, 60 if value > 5 else 4):
        open(metrics, "a").write(json.dumps({"event": "validation", "step": step, "perplexity": value}) + "\\n")
        time.sleep(0.02)
if do.startswith("stop_driver") and first:
    os.kill(os.getppid(), signal.SIGINT if do.endswith("ctrl_c") else signal.SIGTERM)
    time.sleep(60)
if do == "stubborn" and first:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for _ in range(2):
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.2)
    time.sleep(60)
if do == "preempted":
    status("preempted")
    if first or config.get("always"):
        sys.exit(75)
if do == "hang" and (first or config.get("always")):
    time.sleep(60)
write("results.json", {"perplexity": {"packed": value}, "bits_per_weight": 4.0 + 1 / (1 + config["value"])})
open(os.path.join(folder, "resolved.yaml"), "w").write(yaml.safe_dump({"name": config["name"], "seed": 3}))
status("finished")
"""


def sweep_of(*values: float, do: list[str] | None = None, **settings) -> SweepConfig:
    """A grid over `value`, and over what trials do."""
    space = [ParameterConfig("value", values=list(values))]
    space += [ParameterConfig("do", values=do)] if do else []
    pruning = PruningConfig(**settings.pop("pruning", {}))
    return SweepConfig("s", space, pruning=pruning, **({"sampler": "grid"} | settings))


def local(trial: TrialJob) -> Job:
    """Starts `TRIAL` on this machine."""
    return LocalJob(trial, [sys.executable, "-c", TRIAL, str(trial.config_file)])


@contextmanager
def opened(config: SweepConfig, path: Path, launch: Callable[[TrialJob], Job] = local, **fixed):
    """A driver of `config` in `path`, to be run; its trials are `TRIAL` with `fixed` in their files."""

    def configure(number, params):
        values = {"name": trial_name(number), "runs_dir": str(path), **fixed, **params}
        run = RunConfig(trial_name(number), str(path), cluster=ClusterConfig("slurm"))
        return run, yaml.safe_dump(values)

    with claimed(path, "space: 1\n") as folder:
        study = Study(config, 10, path)
        yield driver.Driver(config, folder, study, configure, launch)


def run(config: SweepConfig, path: Path, **fixed) -> int | None:
    """Drive the sweep to its end; the signal that stopped it."""
    with opened(config, path, **fixed) as sweep:
        return sweep.run()
