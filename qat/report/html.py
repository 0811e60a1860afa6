"""The frame and parts of a page that opens anywhere, offline, in light or dark, without a script.

Whatever goes into a table is escaped here; figures are put into the page itself.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from qat.report.table import MISSING

NOT_RUN = '<p class="quiet">not run</p>'
CSS = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --quiet: #5d5d5d; --line: #d9d9d9; --soft: #f4f4f4;
  --warn-ink: #7a1c00; --warn-paper: #fdece6; --warn-line: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #17181a; --quiet: #a5a5a5; --line: #3a3c40;
  --soft: #222427; --warn-ink: #ffd2c0; --warn-paper: #43190a; --warn-line: #d55e00; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0.2rem; } h2 { margin-top: 2.4rem; border-bottom: 1px solid var(--line); }
.quiet { color: var(--quiet); margin: 0.3rem 0; } .scroll { overflow-x: auto; }
.warning { color: var(--warn-ink); background: var(--warn-paper); border-left: 6px solid var(--warn-line);
  padding: 0.7rem 1rem; margin: 1rem 0; font-weight: 600; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.8rem 0; }
th, td { text-align: left; padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; } .number { text-align: right; } .strong td { font-weight: 700; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; display: block; margin: 1rem 0; }
pre { background: var(--soft); padding: 0.8rem 1rem; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 0.85rem; }
summary { cursor: pointer; }
"""


def write_page(path: Path, title: str, sections: Sequence[tuple[str, str]], warnings: str = "") -> Path:
    """Write a page of (heading, HTML) sections below `warnings` (HTML) and the title; returns `path`."""
    body = "".join(f"<section><h2>{heading}</h2>\n{content}</section>\n" for heading, content in sections)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n"
        f"<body>\n{warnings}<h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[object]], strong: Sequence[bool] = ()) -> str:
    """An HTML table, every cell escaped; a column is set right when all its cells look like numbers."""
    texts = [[MISSING if cell is None else str(cell) for cell in row] for row in rows]
    right = [
        place > 0 and all(_looks_like_number(row[place]) for row in texts) and bool(texts)
        for place in range(len(header))
    ]

    def line(row: Sequence[str], tag: str) -> str:
        marks = (' class="number"' if is_right else "" for is_right in right)
        return "".join(f"<{tag}{m}>{escape(cell)}</{tag}>" for m, cell in zip(marks, row, strict=True))

    lines = [f"<tr>{line(header, 'th')}</tr>\n"]
    for place, row in enumerate(texts):
        mark = ' class="strong"' if place < len(strong) and strong[place] else ""
        lines.append(f"<tr{mark}>{line(row, 'td')}</tr>\n")
    return f'<div class="scroll"><table>\n{"".join(lines)}</table></div>\n'


def _looks_like_number(text: str) -> bool:
    return text in (MISSING, "not finite") or text.replace(",", "").replace(".", "").rstrip("%").isdigit()


def image(name: str, path: Path) -> str:
    """A PNG file inside the page."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="Figure: {name.replace("_", " ")}" src="data:image/png;base64,{data}">\n'


def details(summary: str, content: str) -> str:
    """HTML that opens with a click."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}</details>\n"
