"""Make build/peers-env with the contenders of the benchmarks; says of each whether it is there, and why not.

    python scripts/bench_peers.py      (make bench-peers; takes minutes, llama.cpp is compiled for this machine)

The project's own environment is not touched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

ENVIRONMENT = Path("build/peers-env")
REPORT = ENVIRONMENT / "peers.json"
CONTENDERS = {
    "onnxruntime": ["onnxruntime==1.32.0", "onnx"],
    "openvino": ["openvino==2026.4.1"],
    "xllamacpp": ["xllamacpp==2026.10.11549"],
    # from source, for the instructions of this machine
    "llama_cpp": ["--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36"],
}


def install(python: Path, module: str, words: list[str]) -> str:
    """Install one contender and import it: its version, or why it is absent."""
    flags = "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF"
    settings = os.environ | {"CMAKE_ARGS": flags, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
    done = subprocess.run([python, "-m", "pip", "install", "-q", *words], env=settings, capture_output=True, text=True)
    if done.returncode:
        return f"absent: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}"
    code = f"import {module}; print(getattr({module}, '__version__', 'present'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return f"absent: {(done.stderr.strip().splitlines() or ['import failed'])[-1]}"
    return done.stdout.strip().splitlines()[-1]


def main() -> int:
    """Install all, report all; 0 when at least one is there."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    report = {module: install(python, module, words) for module, words in CONTENDERS.items()}
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    for module, version in report.items():
        print(f"{module:<12} {version}")
    return int(all(version.startswith("absent") for version in report.values()))


if __name__ == "__main__":
    sys.exit(main())
