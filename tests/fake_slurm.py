"""A SLURM of one machine on the PATH: sbatch runs the script, sacct and squeue know it, scancel and scontrol act on it.

Jobs are folders of `jobs/`. While a file `full` stands in the folder new jobs wait; what `ends_as` holds becomes the
last state of jobs that fail; `refuses` holds what sbatch says instead of taking a job.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from qat.cluster import submit

SLURM = """
import os, re, signal, subprocess, sys, time
from pathlib import Path

here = Path(__file__).resolve().parent
jobs = here / "jobs"
verb, words = Path(sys.argv[0]).name, sys.argv[1:]
state = lambda job: (job / "state").read_text()

def become(job, word):
    (job / "new").write_text(word)
    (job / "new").rename(job / "state")

def session(pid, with_script):
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            of_job = int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == pid
            if of_job and (with_script or not (entry / "cmdline").read_bytes().startswith(b"bash")):
                yield int(entry.name)
        except OSError:
            pass

def supervise(job):
    text = (job / "script").read_text()
    output = re.search("^#SBATCH --output=(.*)$", text, re.M)[1].replace("%j", job.name)
    own = {"SLURM_JOB_ID": job.name, "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "127.0.0.1"}
    while True:
        while (here / "full").exists() and state(job) == "PENDING":
            time.sleep(0.01)
        if state(job) != "PENDING":
            return
        with open(output, "a") as log:
            script = subprocess.Popen(
                ["bash", job / "script"], stdout=log, stderr=log, env=os.environ | own, start_new_session=True
            )
        (job / "pid").write_text(str(script.pid))
        become(job, "RUNNING")
        code = script.wait()
        if (job / "requeue").exists():
            (job / "requeue").unlink()
            become(job, "PENDING")
        elif state(job) == "RUNNING":
            failed = (here / "ends_as").read_text() if (here / "ends_as").exists() else "FAILED"
            become(job, failed if code else "COMPLETED")

if verb == "sbatch":
    if (here / "refuses").exists():
        sys.exit((here / "refuses").read_text())
    number = 100 + len(list(jobs.iterdir()))
    job = jobs / str(number)
    job.mkdir()
    (job / "script").write_text(Path(words[-1]).read_text())
    become(job, "PENDING")
    if os.fork() == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        supervise(job)
    else:
        print(f"Submitted batch job {number}")
elif verb == "sacct":
    print("JobID|State|NodeList")
    for name in [word for word in words if word.isdigit()]:
        print(f"{name}|{state(jobs / name)}|127.0.0.1")
elif verb == "squeue":
    print(words[-1] if state(jobs / words[-1]) in ("PENDING", "RUNNING") else "")
elif verb == "scontrol":
    print("127.0.0.1") if words[0] == "show" else (jobs / words[-1] / "requeue").touch()
elif verb == "scancel":
    job = jobs / words[-1]
    asked = [word.partition("=")[2] for word in words if word.startswith("--signal")]
    if asked and state(job) == "PENDING":
        sys.exit("scancel: error: job is pending")
    if not asked:
        was = state(job)
        become(job, "CANCELLED by 0")
    if asked or was == "RUNNING":
        for pid in session(int((job / "pid").read_text()), with_script=not asked):
            os.kill(pid, getattr(signal, "SIG" + (asked or ["TERM"])[0]))
elif verb == "srun":
    while words[0].startswith("-"):
        words = words[2 if words[0] in ("--output", "--error") else 1 :]
    os.execvp(words[0], words)
"""
# What torchrun would start: the trial of `sweeps.py`, by its file; a resumed one finds it beside its run folder
TORCHRUN = """
import sys
from pathlib import Path

words = sys.argv[sys.argv.index("qat.cli.main") + 1 :]
run = Path(words[1])
with open(Path(__file__).parent / "calls", "a") as file:
    print(*words[:1], file=file)
file = words[2] if words[0] == "train" else run.parent / "configs" / f"{run.name}.yaml"
sys.argv = ["trial", str(file)]
"""


class FakeSlurm:
    """The programs in a folder of the PATH."""

    def __init__(self, folder: Path, trial: str, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        (folder / "jobs").mkdir(parents=True)
        # no site: the sitecustomize below is for the jobs
        (folder / "slurm").write_text(f"#!{sys.executable} -SE\n{SLURM}")
        (folder / "slurm").chmod(stat.S_IRWXU)
        for name in ("sbatch", "srun", "sacct", "squeue", "scancel", "scontrol"):
            (folder / name).symlink_to("slurm")
        (folder / "torchrun.py").write_text(TORCHRUN + trial)
        words = (sys.executable, str(folder / "torchrun.py"))
        (folder / "sitecustomize.py").write_text(f"import qat.cluster.node\nqat.cluster.node.TORCHRUN = {words!r}\n")
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
        monkeypatch.setattr(submit, "ASK_SECONDS", 0.05)
        submit._watcher.cache_clear()

    def say(self, name: str, text: str = "") -> None:
        """Put one of the files of the module's docstring."""
        (self.folder / name).write_text(text)

    @property
    def states(self) -> list[str]:
        """The state of every job, in the order of submission."""
        return [(job / "state").read_text() for job in sorted((self.folder / "jobs").iterdir())]

    @property
    def calls(self) -> list[str]:
        """train or resume, for every start of torchrun."""
        return (self.folder / "calls").read_text().split()
