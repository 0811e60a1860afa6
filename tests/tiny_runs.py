"""Whole runs on tiny models: `qat train recipe=tiny` in this process, for the tests that look at what a run leaves."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

from qat import pipeline
from qat.cli.compose import compose_run, to_yaml
from qat.cli.main import main


def same_process(*arguments: str) -> str:
    """In place of `pipeline._fresh_process`: the same command without the six seconds of a new interpreter."""
    out = io.StringIO()
    with redirect_stdout(out):
        code = main(list(arguments))
    assert code in (0, 1), f"qat {' '.join(arguments)} ended with {code}"
    return out.getvalue()


def tiny_run(folder: Path, model: Path, text: Path, *overrides: str) -> Path:
    """The run folder of a two-step run of `model` under `folder`/run."""
    fixed = [f"runs_dir={folder}", "name=run", f"model.path={model}", f"data.path={text}"]
    config = compose_run(["recipe=tiny", *fixed, *overrides])
    return pipeline.run(config, to_yaml(config))


def read(run: Path, name: str) -> dict:
    """A JSON file of a run folder."""
    return json.loads((run / name).read_text())


def lines_of(error: str) -> list[str]:
    """The problems that a command names on stderr."""
    return [line for line in error.splitlines() if line.startswith("error: ")]


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, to see that nothing was touched."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
