"""The report of a run or of a sweep, made again from the files in its folder. No model is loaded.

qat report runs/smollm2_quickstart
qat report runs/scheme_lr
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.errors import UserError, problem


def arguments(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.add_argument("folder", type=Path, help="a run folder or a sweep folder")


def run(args: argparse.Namespace) -> int:
    """Write report.html (a sweep: also report.md, best.yaml) and print where."""
    from qat.report.page import write_report
    from qat.report.sweep import write_sweep_report
    from qat.report.sweep_record import is_sweep

    folder: Path = args.folder
    if is_sweep(folder):
        paths = write_sweep_report(folder)
    elif (folder / "resolved.yaml").is_file():
        paths = [write_report(folder)]
    else:
        got = "no such folder" if not folder.is_dir() else "neither sweep.yaml nor resolved.yaml in it"
        raise UserError(problem(str(folder), "must be a run or sweep folder", got, "See runs/."))
    for path in paths:
        print(path)
    return 0
