"""docs/faults.md: every fault has its row, and every row a test that exists or a reason."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = 104
TEST = re.compile(r"`(tests/\w+\.py)::(\w+)`")
ROW = re.compile(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)


def rows() -> list[tuple[int, str, str, str]]:
    """Number, fault, what happens, tests."""
    found = ROW.findall((ROOT / "docs/faults.md").read_text(encoding="utf-8"))
    return [(int(number), fault, happens, tests) for number, fault, happens, tests in found]


@cache
def functions_of(file: str) -> set[str]:
    """Names of the test functions of a file, read without running it."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_fault_has_one_row_in_order():
    assert [number for number, *_ in rows()] == list(range(1, FAULTS + 1))


def test_every_named_test_exists():
    named = [place for *_, tests in rows() for place in TEST.findall(tests)]
    assert len(named) > FAULTS
    assert [f"{file}::{name}" for file, name in named if name not in functions_of(file)] == []


def test_last_column_holds_tests_only_and_is_empty_for_a_reason_only():
    for number, fault, happens, tests in rows():
        assert fault.strip() and (len(happens) >= 10 or happens == "E2"), number
        assert TEST.sub("", tests).strip() in ("", "–"), number
        if not TEST.search(tests):
            assert len(happens) > 60, f"row {number} has no test, so it must say why it does not apply"
