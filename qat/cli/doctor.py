"""Exit 0 when nothing is wrong, 1 otherwise. Paste the output into bug reports.

qat doctor
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from qat.run_folder import PACKAGES

BAD_LIGHTNING = ("2.6.2", "2.6.3")
CPU_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Where runs would go."""
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="folder to check for write access")


def run(args: argparse.Namespace) -> int:
    """Print one line per fact, `problem:` lines last."""
    problems: list[str] = []
    for name, value in [*versions(problems), *hardware(), *kernels(), *places(args.runs_dir, problems)]:
        print(f"{name:<20} {value}")
    for line in problems:
        print(f"problem: {line}")
    return 1 if problems else 0


def versions(problems: list[str]) -> list[tuple[str, str]]:
    """Installed versions; the two releases of lightning that were malware are a problem."""
    from importlib.metadata import PackageNotFoundError, version
    from platform import python_version

    facts = [("python", python_version())]
    for name in (*PACKAGES, "wandb", "gguf", "accelerate"):
        try:
            facts.append((name, version(name)))
        except PackageNotFoundError:
            facts.append((name, "not installed"))
    if dict(facts)["lightning"] in BAD_LIGHTNING:
        problems.append("lightning 2.6.2 and 2.6.3 steal credentials: pip install 'lightning>=2.6.6,<2.7', rotate keys")
    return facts


def hardware() -> list[tuple[str, str]]:
    """CPU, threads, GPU."""
    import torch

    flags: set[str] = set()
    if Path("/proc/cpuinfo").exists():
        line = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags")), "")
        flags = set(line.split())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        ("cpu cores", str(os.cpu_count())),
        ("torch threads", str(torch.get_num_threads())),
        ("cpu features", " ".join(flag for flag in CPU_FLAGS if flag in flags) or "none of " + " ".join(CPU_FLAGS)),
        ("gpu", ", ".join(gpus) or "none"),
    ]


def kernels() -> list[tuple[str, str]]:
    """C++ compiler, and the backends of every serving op."""
    from qat.kernels import cpu
    from qat.kernels.dispatch import KERNELS, PREFERENCE

    compiler = next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
    facts = [("c++ compiler", compiler or "none"), ("cpu kernels", cpu.unavailable() or "loaded")]
    reason = cpu.unavailable()
    training = f"plain torch ({reason})" if reason else "fused fake quantization; integer matmul where inputs are int8"
    facts.append(("training on the cpu", training))
    for op in sorted({op for op, _ in KERNELS}):
        facts.append((op, ", ".join(name for name in PREFERENCE["auto"] if (op, name) in KERNELS)))
    return facts


def places(runs_dir: Path, problems: list[str]) -> list[tuple[str, str]]:
    """Write access and free space where runs and converted models go; hub access."""
    facts = []
    cache = Path(os.environ.get("QAT_CACHE") or "~/.cache/qat").expanduser()
    for name, folder in (("runs", runs_dir), ("model cache", cache)):
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(existing).free / 2**30
        try:
            with tempfile.TemporaryFile(dir=existing):
                facts.append((name, f"{folder} (writable, {free:.0f} GiB free)"))
        except OSError as error:
            facts.append((name, f"{folder} (not writable)"))
            problems.append(f"{folder}: must be writable, got {error.strerror}")
        if free < 2:
            problems.append(f"{folder}: less than 2 GiB free; a run of a 135M model writes about 1 GiB")
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
    return [*facts, ("hub", "offline (HF_HUB_OFFLINE is set)" if offline else "online if reachable")]
