"""The ladder: every rung of recipes/ladder_RUNG_SETTING.yaml trained, scored beside its baselines, kept in one file.

    python scripts/ladder.py --list
    python scripts/ladder.py --setting recover --limit-minutes 60
    python scripts/ladder.py --only w4a16_g64,w3a16_g64 --seeds 0,1

A rung is `qat train recipe=...` and then scripts/ladder_score.py on its run, each in a process of its own. What stands
in docs/results/ladder.json for the same resolved configuration is not done again; a run that was stopped is resumed;
after each model scored the file is replaced whole. `scripts/make_tables.py` makes the tables of recipes/README.md.
Further key=value words hold for all rungs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qat.cli.compose import compose_run, from_yaml
from qat.config import RunConfig
from qat.errors import UserError
from qat.paths import write_json_atomic

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("recover", "adapt")
# in the order they are run
RUNGS = (
    *("w4a16_row", "w4a16_g64", "w4a16_g32", "w4a8_g32", "w3a16_g64", "w8a8", "w2a16_g32"),
    *("kv8", "kv4", "mixed_3_5_bits", "mixed_3_bits"),
)
BASELINES = ("rtn", "rtn_mse", "gptq", "awq", "squeezellm")
TEXTS = ["play=play", "code=code"]
# settings that change no number of a run
ASIDE = ("name", "runs_dir", "overwrite", "cluster", "logger", "export")


@dataclass(frozen=True)
class Job:
    """One line of the table."""

    rung: str
    setting: str
    seed: int

    @property
    def recipe(self) -> str:
        """The recipe it is an ordinary run of."""
        return f"ladder_{self.rung}_{self.setting}"

    @property
    def name(self) -> str:
        """Its key in the results, and its run folder."""
        return f"{self.recipe}_seed{self.seed}"


class Stopped(Exception):
    """The time is over, or a run was asked to stop."""


def jobs(settings: list[str], only: list[str], seeds: list[int]) -> list[Job]:
    """What to do, in order: all rungs with the first seed, then those of four bits with the others."""
    chosen = [rung for rung in RUNGS if not only or rung in only]
    first, more = seeds[:1], seeds[1:]
    once = [Job(rung, setting, seed) for setting in settings for seed in first for rung in chosen]
    again = [Job(r, setting, s) for s in more for setting in settings for r in chosen if r.startswith("w4")]
    return once + again


def digest(content: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def key_of(config: RunConfig) -> str:
    """What tells two runs apart: all settings but those that change no number."""
    content = {name: value for name, value in asdict(config).items() if name not in ASIDE}
    content["evaluate"] = {name: value for name, value in content["evaluate"].items() if name != "controls"}
    return digest(content)


def model_key(name: str, config: RunConfig, manifest: dict[str, Any], texts: list[str]) -> str:
    """What tells scores apart: rungs whose float model, control or baseline is the same share them."""
    prints, control = manifest["fingerprints"], manifest.get("control")
    parts: dict[str, Any] = {"model": prints["model"], "data": prints["data"], "texts": texts, "name": name}
    parts |= {"tokens": config.data.eval_tokens, "precision": config.evaluate.precision}
    if name != "float":
        parts["control"] = control and Path(control).parent.name
    if name in BASELINES:
        content = asdict(config)
        parts |= {group: content[group] for group in ("scheme", "kv", "plan")}
        parts["ptq"] = {key: value for key, value in content["ptq"].items() if key not in ("method", "keep")}
    if name == "packed":
        parts["run"] = key_of(config)
    return digest(parts)


class Ladder:
    """The results file, and the processes that fill it."""

    def __init__(self, file: Path, runs: Path, overrides: list[str], texts: list[str], deadline: float) -> None:
        self.file, self.runs, self.overrides, self.texts, self.deadline = file, runs, overrides, texts, deadline
        empty: dict[str, Any] = {"protocol": "", "texts": {}, "rungs": {}}
        self.results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else empty

    def words(self, job: Job) -> list[str]:
        """The overrides of the run."""
        return [f"recipe={job.recipe}", f"seed={job.seed}", *self.overrides]

    def config(self, job: Job) -> RunConfig:
        """The checked configuration of the run."""
        return compose_run(self.words(job))

    def is_done(self, job: Job) -> bool:
        """Whether the file has all of it, for this very configuration."""
        row = self.results["rungs"].get(job.name)
        return bool(row and row["key"] == key_of(self.config(job)) and not row["missing"])

    def do(self, job: Job) -> None:
        """Train and score one rung, or what is left of it.

        Raises:
            Stopped: the time is over, or the run was asked to stop; what was done is kept.
            subprocess.CalledProcessError: the run or the scoring failed.
        """
        run, config = self.runs / job.name, self.config(job)
        self.train(job, run, config)
        result, manifest = _read(run / "results.json"), _read(run / "manifest.json")
        names = ["float", *([] if result["control_is_float"] else ["control"]), "packed", *BASELINES]
        keys = {name: model_key(name, config, manifest, self.texts) for name in names}
        known = {m["key"]: m for row in self.results["rungs"].values() for m in row["models"].values()}
        models = {name: known[key] for name, key in keys.items() if key in known}
        row = _row(job, config, result, manifest)
        self.keep(job, row, models, names)
        for line in self.score(run, [name for name in names if name not in models]):
            if "texts" in line and "model" not in line:
                self.results["texts"] |= line["texts"]
                self.results["protocol"] = result["protocol"]
                continue
            name = line.pop("model")
            models[name] = line | {"key": keys[name]}
            self.keep(job, row, models, names)

    def keep(self, job: Job, row: dict[str, Any], models: dict[str, Any], names: list[str]) -> None:
        """Write the file with what is known of a rung."""
        missing = [name for name in names if name not in models]
        self.results["rungs"][job.name] = row | {"models": models, "missing": missing}
        write_json_atomic(self.file, self.results)

    def train(self, job: Job, run: Path, config: RunConfig) -> None:
        """Have a finished run of this configuration in the folder."""
        python = [sys.executable, "-m", "qat.cli.main"]
        if (run / "resolved.yaml").is_file() and key_of(from_yaml(run / "resolved.yaml")) == key_of(config):
            if _read(run / "run_status.json").get("status") != "finished":
                self.process([*python, "resume", str(run)])
            return
        place = [f"name={job.name}", f"runs_dir={self.runs}", "overwrite=true"]
        self.process([*python, "train", *self.words(job), *place])

    def score(self, run: Path, names: list[str]) -> Iterator[dict[str, Any]]:
        """Lines of ladder_score.py as they come."""
        if not names:
            return
        texts = [word for text in self.texts for word in ("--text", text)]
        command = [sys.executable, str(ROOT / "scripts/ladder_score.py"), str(run), "--models", ",".join(names)]
        with subprocess.Popen([*command, *texts], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                yield json.loads(line)
                if time.monotonic() > self.deadline:
                    process.terminate()
                    raise Stopped
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)

    def process(self, command: list[str]) -> None:
        """Run a command to its end; when the time is over, ask it to save and stop."""
        with subprocess.Popen(command) as process:
            try:
                left = self.deadline - time.monotonic()
                process.wait(None if left == float("inf") else max(0.0, left))
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
                raise Stopped from None
        if process.returncode in (75, 130):  # asked to stop, from outside; saved
            raise Stopped
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)


def _row(job: Job, config: RunConfig, result: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        **asdict(job),
        "recipe": job.recipe,
        "key": key_of(config),
        "control_is_float": result["control_is_float"],
        "fake_quant": result["perplexity"]["fake_quant"],
        "bits_per_weight": result["bits_per_weight"],
        "bytes": result["bytes"]["packed"],
        "kv": result["kv"],
        "tokens": result["tokens"]["train"],
        "stages": result["stages"],
        "minutes": result["seconds"]["total"] / 60,
        "training_minutes": result["seconds"]["training"] / 60,
        "calibration": manifest.get("ptq"),
        "peak_memory_gib": result["peak_memory_gib"],
        "overlap": result["overlap"],
        "notes": result["notes"],
    }


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def main(arguments: list[str] | None = None) -> int:
    """Do what is chosen and not done yet; 1 when a rung failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="one of the two; may stand twice")
    parser.add_argument("--only", default="", help=f"rungs with commas between: {', '.join(RUNGS)}")
    parser.add_argument("--seeds", default="0,1", help="the second and further ones are of the 4-bit rungs")
    parser.add_argument("--list", action="store_true", help="say what is done and what is not, and stop")
    parser.add_argument("--limit-minutes", type=float, default=float("inf"), help="save and stop after this time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/ladder", help="folder of the run folders")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/ladder.json")
    parser.add_argument("--text", action="append", metavar="NAME=DATA", help="other held-out texts")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(arguments)
    os.chdir(ROOT)
    only = [word for word in args.only.split(",") if word]
    if unknown := sorted(set(only) - set(RUNGS)):
        parser.error(f"--only: no rung {', '.join(unknown)}; known: {', '.join(RUNGS)}")
    chosen = jobs(args.setting or list(SETTINGS), only, [int(seed) for seed in args.seeds.split(",")])
    deadline = time.monotonic() + 60 * args.limit_minutes
    ladder = Ladder(args.output, args.runs.absolute(), args.overrides, args.text or TEXTS, deadline)
    failed = []
    for place, job in enumerate(chosen, start=1):
        state = "done" if ladder.is_done(job) else "to do"
        print(f"[{place}/{len(chosen)}] {job.name}: {state}", flush=True)
        if args.list or state == "done":
            continue
        try:
            ladder.do(job)
        except Stopped:
            print("stopped, or the time is over; the same command goes on from here")
            break
        except (subprocess.CalledProcessError, UserError) as error:
            failed.append(job.name)
            print(f"{job.name} failed: {error}", file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
