"""What benchmarks know of the machine: its description, its read bandwidth, whether anybody else works on it."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

BUSY_LIMIT = 0.06  # share of all cores that others may use; this machine's own noise is 0.01 to 0.03
BLOCK = 1 << 28  # bytes read per pass, eight times the largest third-level cache of this kind of machine
READER = """
#include <cstdint>
#include <cstddef>
typedef int64_t wide __attribute__((vector_size(64)));
template <int streams> int64_t read(const wide* data, size_t count) {
  wide sums[streams] = {};
  const size_t part = count / streams;
  for (size_t i = 0; i + 2 <= part; i += 2)
    for (int s = 0; s < streams; ++s) sums[s] += data[s * part + i] + data[s * part + i + 1];
  int64_t total = 0;
  for (int s = 0; s < streams; ++s) for (int j = 0; j < 8; ++j) total += sums[s][j];
  return total;
}
extern "C" int64_t read_1(const wide* data, size_t count) { return read<1>(data, count); }
extern "C" int64_t read_4(const wide* data, size_t count) { return read<4>(data, count); }
extern "C" int64_t read_8(const wide* data, size_t count) { return read<8>(data, count); }
"""


def describe() -> dict[str, Any]:
    """Processor, vector instructions, cores, kernel, torch and compiler."""
    lines = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line
    )
    facts = {key.strip(): value.strip() for key, value in lines.items()}
    flags = [flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "amx", "fma", "f16c"))]
    return {
        "cpu": f"{facts.get('model name')}, family {facts.get('cpu family')}, model {facts.get('model')}",
        "flags": " ".join(flags),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "torch": torch.__version__,
        "compiler": _first_line(["g++", "--version"]),
    }


def _first_line(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return "none"
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def others_share(seconds: float = 1.0) -> float:
    """Share of all cores that was not idle (work, waiting for disks, stolen) while this process slept."""

    def read() -> list[int]:
        return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]

    before = read()
    time.sleep(seconds)
    spent = [after - start for start, after in zip(before, read(), strict=True)]
    return 1 - spent[3] / max(1, sum(spent))


def check_quiet(noisy: bool) -> float:
    """Share used by others; ends the program above the limit unless `noisy`, which marks the result instead."""
    share = min(others_share() for _ in range(2))
    if share > BUSY_LIMIT and not noisy:
        raise SystemExit(f"others use {share:.0%} of the cores, no numbers. Wait, or give --noisy to mark them.")
    return share


@cache
def _readers() -> dict[str, Any]:
    """Compiled loops that read so many places in turn; none without a compiler."""
    if shutil.which("g++") is None:
        return {}
    folder = Path(tempfile.mkdtemp(prefix="qat_reader_"))
    (folder / "read.cpp").write_text(READER)
    command = [
        "g++",
        "-O3",
        "-march=native",
        "-shared",
        "-fPIC",
        "-o",
        str(folder / "read.so"),
        str(folder / "read.cpp"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    library = ctypes.CDLL(str(folder / "read.so"))
    shutil.rmtree(folder)
    functions = {f"{streams} streams": library[f"read_{streams}"] for streams in (1, 4, 8)}
    for function in functions.values():
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int64
    return functions


def read_bandwidth(threads: int) -> dict[str, float]:
    """GB/s of reading 256 MB with that many threads, by each method; the largest is the peak used for shares.

    The bytes stand in 2 MB pages, as our weights do. Neighbours on the host change the bandwidth from minute to minute,
    so benchmarks ask in every round.
    """
    block = _block()
    torch.set_num_threads(threads)
    found = {"torch sum": _best(block.sum)}
    start, part = (block.data_ptr() + 63) // 64 * 64, (BLOCK - 64) // threads // 64
    with ThreadPoolExecutor(threads) as pool:
        for name, reader in _readers().items():

            def read(reader: Any = reader) -> None:
                list(pool.map(lambda i: reader(start + i * part * 64, part), range(threads)))

            found[name] = _best(read)
    return found


def fastest(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The largest by each method of several answers of `read_bandwidth`."""
    return {name: max(found[name] for found in rounds) for name in rounds[0]}


def median_share(speeds: list[float], rounds: list[dict[str, float]]) -> float:
    """Median over the rounds of a speed in GB/s as a share of the read bandwidth found in the same round."""
    return statistics.median(speed / max(found.values()) for speed, found in zip(speeds, rounds, strict=True))


@cache
def _block() -> torch.Tensor:
    from qat.kernels import cpu

    blobs = [torch.ones(BLOCK // 4, dtype=torch.float32).view(torch.uint8)]
    cpu.in_huge_pages(blobs)
    return blobs[0].view(torch.float32)


def _best(run: Any) -> float:
    times = []
    for _ in range(8):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return BLOCK / min(times) / 1e9


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process works on one core for as long as this lasts."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        yield
    finally:
        other.kill()
        other.wait()
