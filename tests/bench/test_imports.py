"""Benchmarks run from a checkout without its tests."""

import ast
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("path", BENCHMARKS.rglob("*.py"), ids=lambda p: p.stem)
def test_no_benchmark_imports_tests(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    assert not {name for name in found if name.split(".")[0] == "tests"}
