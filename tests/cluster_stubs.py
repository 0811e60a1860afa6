"""A cluster of shell scripts: srun, sbatch and scontrol on the PATH, and a torchrun that plays a run in milliseconds.

The torchrun writes its words into `calls.jsonl`, and run_status.json as the real trainer would: the next word of `plot`
is finished, preempted (with the exit code that torchrun makes of 75), failed, or wait (for SIGTERM, then preempted).
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

SRUN = """#!/bin/bash
# srun: the command once for every machine of the job
while [[ $1 == -* ]]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do SLURM_NODEID=$i "$@" & done
code=0
for job in $(jobs -p); do wait $job || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
# scontrol: names of machines, and a note of what is queued again
if [[ $1 == show ]]; then tr , '\\n' <<< "$3"; else echo "$@" >> "$(dirname "$0")/requeued"; fi
"""
SBATCH = """#!/bin/bash
# sbatch: keeps the script
cp "$1" "$(dirname "$0")/submitted.sh"
echo "Submitted batch job 4242"
"""
TORCHRUN = """
import json, os, signal, sys, time
from pathlib import Path

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
here = Path(__file__).parent
words = sys.argv[sys.argv.index("qat.cli.main") + 1 :]
with (here / "calls.jsonl").open("a") as file:
    file.write(json.dumps({"torchrun": sys.argv[1:-len(words)], "qat": words}) + "\\n")
plot = (here / "plot").read_text().split()
calls = len((here / "calls.jsonl").read_text().splitlines())
status = plot[min(calls, len(plot)) - 1]
print("ready", flush=True)
deadline = time.time() + 20
while status == "wait" and not stopped and time.time() < deadline:
    time.sleep(0.01)
run = Path((here / "run").read_text())
run.mkdir(parents=True, exist_ok=True)
(run / "run_status.json").write_text(json.dumps({"status": "preempted" if status == "wait" else status}))
sys.exit(0 if status == "finished" else 1)
"""


class Stubs:
    """The scripts in a folder, and the environment in which they are found."""

    def __init__(self, folder: Path, run: Path):
        self.folder = folder
        folder.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
            self.script(name, text)
        self.script("python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
        (folder / "torchrun.py").write_text(TORCHRUN)
        (folder / "run").write_text(str(run))
        # read by every Python that starts with this folder in PYTHONPATH
        words = [sys.executable, str(folder / "torchrun.py")]
        (folder / "sitecustomize.py").write_text(f"import qat.cluster.node\nqat.cluster.node.TORCHRUN = {words!r}\n")
        self.torchrun = words

    def script(self, name: str, text: str) -> None:
        """An executable file."""
        file = self.folder / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def plot(self, *outcomes: str) -> None:
        """What each start of torchrun leaves; the last one counts for all that follow."""
        (self.folder / "plot").write_text(" ".join(outcomes))

    def environment(self, **more: str) -> dict[str, str]:
        """This process's environment with the scripts first."""
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "PYTHONPATH": str(self.folder), **more}

    @property
    def calls(self) -> list[dict]:
        """What torchrun was started with, in order."""
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def requeued(self) -> str:
        """What scontrol was told."""
        file = self.folder / "requeued"
        return file.read_text() if file.exists() else ""
