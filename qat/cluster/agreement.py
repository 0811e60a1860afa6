"""`join`: before any work, every rank says what it is about to do, and all stop when one of them means something else.

    rank --sha256(settings, code, versions)--> store of torchrun --> all ranks compare --> go, or the keys and ranks

A rank that does not come is named. Nothing is loaded yet, so a wrong start costs seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections import defaultdict
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qat.cluster.meeting import arrive, missing, span
from qat.config import RunConfig
from qat.errors import UserError, problem

PACKAGES = ("torch", "transformers", "lightning")
FAREWELL_SECONDS = 30.0


def join(config: RunConfig) -> None:
    """Return when all ranks of this job are here and mean the same run; at once for a single process.

    Raises:
        UserError: the launcher started another number of processes than the run asks for, fewer GPUs are here than
            devices, ranks differ (exit 2), or some did not come within trainer.start_timeout_minutes (exit 1).
    """
    check_layout(config)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1:
        agree(_launcher_store(), rank, world, statement(config), 60 * config.trainer.start_timeout_minutes)


def check_layout(config: RunConfig) -> None:
    """Refuse a run whose processes, machines or GPUs are not those it was started with."""
    trainer, environment = config.trainer, os.environ
    world = trainer.devices * trainer.nodes
    started = environment.get("WORLD_SIZE", "1")
    nodes = f"--nnodes={trainer.nodes} " if trainer.nodes > 1 else ""
    fix = f"Start it with: torchrun {nodes}--nproc-per-node={trainer.devices} -m qat.cli.main train ..."
    if started != str(world):
        raise UserError(problem("trainer.devices * trainer.nodes", f"needs {world} processes", started, fix))
    if world > 1 and "TORCHELASTIC_RUN_ID" not in environment:
        raise UserError(problem("launcher", "several processes are started by torchrun", "another one", fix))
    if environment.get("LOCAL_WORLD_SIZE", str(trainer.devices)) != str(trainer.devices):
        given = f"{environment['LOCAL_WORLD_SIZE']} on {socket.gethostname()}"
        raise UserError(problem("trainer.devices", f"needs {trainer.devices} processes on each machine", given, fix))
    if trainer.accelerator == "gpu":
        import torch

        found = torch.cuda.device_count()
        if found < trainer.devices:
            fix = "Use trainer.accelerator=cpu, fewer trainer.devices, or a machine with more GPUs."
            wanted = f"needs {trainer.devices} GPUs on {socket.gethostname()}"
            raise UserError(problem("trainer.devices", wanted, found, fix))


def statement(config: RunConfig) -> dict[str, str]:
    """What must be the same on all ranks, as dotted key -> text: settings, code and versions."""
    versions = {f"version of {name}": version(name) for name in PACKAGES}
    return {**_leaves(asdict(config), ""), "code of qat": code_digest(), **versions}


def code_digest() -> str:
    """First 12 hex digits of the sha256 over the package's Python files."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def agree(store: Any, rank: int, world: int, mine: dict[str, str], seconds: float) -> None:
    """Compare `mine` with what the other ranks say through `store`; UserError as `join`."""
    text = json.dumps(mine, sort_keys=True)
    store.set(f"statement {rank}", text)
    arrive(store, f"rank {rank}", f"{hashlib.sha256(text.encode()).hexdigest()} {socket.gethostname()}")
    absent = missing(store, [f"rank {i}" for i in range(world)], seconds)
    if absent:
        raise _absent(store, rank, world, [int(name.split()[1]) for name in absent], seconds)
    said = [words.decode().split() for words in store.multi_get([f"rank {i}" for i in range(world)])]
    groups: dict[str, list[int]] = defaultdict(list)
    for i, (digest, _) in enumerate(said):
        groups[digest].append(i)
    problems = [] if len(groups) == 1 else _differences(store, list(groups.values()))
    arrive(store, f"read {rank}")
    if problems and os.environ.get("GROUP_RANK", "0") == "0":
        # the first machine's torchrun serves the store and ends with the first of its ranks: they leave last
        missing(store, [f"read {i}" for i in range(world)], FAREWELL_SECONDS)
    if problems:
        raise UserError(*problems, told_elsewhere=rank != 0)


def _absent(store: Any, rank: int, world: int, absent: list[int], seconds: float) -> UserError:
    here = [i for i in range(world) if i not in absent]
    hosts = sorted({store.get(f"rank {i}").decode().split()[1] for i in here})
    given = f"no word from rank {span(absent)} (rank {span(here)} came, on {', '.join(hosts)})"
    fix = "Look at the log of the missing ranks; raise trainer.start_timeout_minutes if they are only slow."
    line = problem("start", f"all {world} ranks must come within {seconds:g} s", given, fix)
    return UserError(line, before_work=False, told_elsewhere=rank != here[0])


def _differences(store: Any, groups: list[list[int]]) -> list[str]:
    """A line for every key that is not the same in all groups of ranks."""
    said = [json.loads(store.get(f"statement {ranks[0]}")) for ranks in groups]
    fix = "Start every machine with the same command, code and packages."
    lines = []
    for key in sorted(set().union(*said)):
        values = [one.get(key, "nothing") for one in said]
        if len(set(values)) > 1:
            pairs = zip(values, groups, strict=True)
            given = "; ".join(f"{value} on rank {span(ranks)}" for value, ranks in pairs)
            lines.append(problem(key, "must be the same on all ranks", given, fix))
    return lines


def _leaves(value: Any, key: str) -> dict[str, str]:
    if isinstance(value, dict) and value:
        items = [(f"{key}.{name}" if key else str(name), part) for name, part in value.items()]
        return {name: text for inner, part in items for name, text in _leaves(part, inner).items()}
    return {key: str(value)}


def _launcher_store() -> Any:
    """The store that torchrun keeps for its workers, under a prefix of ours."""
    from datetime import timedelta

    from torch.distributed import PrefixStore, rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=5)))
    return PrefixStore("qat start", store)
