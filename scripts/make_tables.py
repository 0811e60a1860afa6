"""Rewrite the measured tables of README.md and recipes/README.md from docs/results/*.json.

python scripts/make_tables.py [--check] [--root FOLDER]; --check changes nothing and exits 1 when a file is out of date.
A table stands between `<!-- NAME:begin -->` and `:end -->`. A result: a run's results.json plus "recipe" and "command".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from qat.report.ladder import ladder_table
from qat.report.table import (
    bench_table,
    decode_table,
    kv_table,
    markdown_table,
    ops_table,
    overhead_table,
    summary_table,
)


def make_blocks(folder: Path) -> dict[str, dict[str, str]]:
    """File under the root -> block name -> Markdown."""
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    runs = [data for data in found.values() if "recipe" in data]
    tables = {
        "bench_step": bench_table,
        "bench_decode": decode_table,
        "bench_decode_llama-3.2-1b": decode_table,
        "bench_kv": kv_table,
        "bench_ops": ops_table,
        "bench_overhead": overhead_table,
        "ladder": ladder_table,
    }
    bench = {
        name: make(found[f"{name}.json"]) if f"{name}.json" in found else "Not measured yet.\n"
        for name, make in tables.items()
    }
    summary = summary_table(runs) if runs else "Not measured yet.\n"
    full = [f"### {run['recipe']}\n\n```\n{run['command']}\n```\n\n{markdown_table(run)}" for run in runs]
    blocks = {"results": summary} | bench
    return {"README.md": blocks, "recipes/README.md": blocks | {"results": "\n".join([summary, *full])}}


def fill(text: str, name: str, block: str) -> str | None:
    """`text` with what stands between the markers of `name` replaced; None when it has no such markers."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text and end not in text:
        return None
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"markers: must be one '{begin}' and then one '{end}'. Mend the file by hand.")
    return text.split(begin)[0] + f"{begin}\n{block}{end}" + text.split(end)[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a file is out of date")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="repository root")
    args = parser.parse_args(arguments)
    made = make_blocks(args.root / "docs" / "results")
    # only what was measured needs a place
    measured = {path.stem for path in (args.root / "docs" / "results").glob("bench_*.json")}
    stale, unplaced = [], {"results", "bench_step"} | (measured & set(made["README.md"]))
    for file, blocks in made.items():
        old = new = (args.root / file).read_text(encoding="utf-8")
        for name, block in blocks.items():
            if (filled := fill(new, name, block)) is not None:
                new, unplaced = filled, unplaced - {name}
        if new != old:
            stale.append(file)
            if not args.check:
                (args.root / file).write_text(new, encoding="utf-8")
    if unplaced:
        raise SystemExit(f"markers: no file has a place for {sorted(unplaced)}. Add <!-- NAME:begin --> and :end.")
    print(f"{'out of date' if args.check else 'rewritten'}: {', '.join(stale) or 'nothing'}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
