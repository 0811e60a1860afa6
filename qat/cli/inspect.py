"""PATH is a run folder, an export folder, a Hugging Face model folder, or one safetensors file.

qat inspect runs/smollm2_quickstart
qat inspect runs/smollm2_quickstart/export/compressed_tensors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qat.errors import UserError, problem


def arguments(parser: argparse.ArgumentParser) -> None:
    """The path."""
    parser.add_argument("path", type=Path)


def run(args: argparse.Namespace) -> int:
    """Print what the path holds."""
    path: Path = args.path
    if (path / "resolved.yaml").is_file():
        return _run_folder(path)
    if path.is_file() and path.suffix == ".safetensors":
        return _tensors(path)
    if (path / "config.json").is_file():
        from qat.formats.folder import read_json

        config = read_json(path / "config.json")
        return _export(path) if "qat" in config else _model(path, config)
    fix = "Name a run folder, an export, a model folder, or a .safetensors file."
    raise UserError(problem(str(path), "must be something qat knows", "nothing of the kind", fix))


def _run_folder(path: Path) -> int:
    from rich.console import Console

    from qat.report.record import read_run
    from qat.report.table import parity_text, recovery_text, render_table

    run = read_run(path)
    status = run.status or {}
    print(f"status:   {status.get('status', 'unknown')} at {status.get('at', '?')}")
    print(f"command:  {(run.manifest or {}).get('command', '?')}")
    if run.results:
        Console().print(render_table(run.results, run.parity))
        print(f"recovery: {recovery_text(run.results)}")
    print(f"parity:   {parity_text(run.parity)}")
    print(f"files:    {', '.join(sorted(p.name for p in path.iterdir()))}")
    return 0


def _export(path: Path) -> int:
    from rich.console import Console
    from rich.table import Table

    from qat.serve.load import read_export

    packed = read_export(path)
    table = Table("tensor", "shape", "scheme", "grid", "bytes")
    for name, tensor in packed.tensors.items():
        shape = "x".join(map(str, tensor.shape))
        table.add_row(name, shape, packed.schemes[name].name, tensor.spec.describe(), f"{tensor.nbytes:,}")
    Console(width=None if Console().is_terminal else 140).print(table)
    floats = sum(tensor.numel() for tensor in packed.floats.values())
    for alias, owner in packed.tied.items():
        print(f"{alias} is {owner}")
    print(f"{len(packed.tensors)} packed tensors; {len(packed.floats)} float tensors with {floats:,} values")
    print(f"keys and values: {packed.kv.describe() if packed.kv else 'float'}")
    return 0


def _model(path: Path, config: dict[str, Any]) -> int:
    print(f"model type: {config.get('model_type')}, architectures: {config.get('architectures')}")
    for file in sorted(path.glob("*.safetensors")):
        _tensors(file)
    return 0


def _tensors(file: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stream:
            names = stream.keys()
            for name in names:
                part = stream.get_slice(name)
                print(f"{name:<60} {part.get_dtype():<6} {'x'.join(map(str, part.get_shape()))}")
    except (SafetensorError, OSError) as error:
        fix = "Download or export it again."
        raise UserError(problem(str(file), "must be a whole safetensors file", str(error), fix)) from None
    return 0
