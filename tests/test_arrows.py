"""Data flows one way: a module imports only from its own layer and those before it."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "str_kernels"

# In the order of the data. What stands on one line may import each other.
LAYERS = [
    {
        "version",
        "files",
        "tensor_files",
        "alive",
        "autocast",
        "options",
        "quantise",
        "transforms",
        "waits",
        "ranks",
    },
    {"notices", "tensor_rows"},
    {"settings"},
    {"validation", "constraint", "oracle"},
    {"vocabulary"},
    {"engine"},
    {"backends"},
    {"terms"},
    {"operator", "split"},
    {"untraced"},
    {"functional"},
    {"accuracy"},
    {"inputs"},
    {"safety", "huggingface"},
    {"levers"},
    {"evaluation"},
    {"probe"},
    {"integrations"},
    {"training"},
    {"demo", "bench"},
    {"planning"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def part_of(path: Path) -> str:
    """``str_kernels/a/b.py`` belongs to ``a``, ``str_kernels/a.py`` to ``a`` too."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """First names below ``str_kernels`` that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("str_kernels"):
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            found |= {n[1] for n in names if n[0] == "str_kernels" and len(n) > 1}
    return {name for name in found if name in RANK}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    """No file imports from a later layer."""
    mine = part_of(path)
    assert mine in RANK, f"{mine}: name its layer here"
    later = {name for name in imported(path) if RANK[name] > RANK[mine]}
    assert not later, f"{mine} imports {sorted(later)}, which come after it"


def dotted(path: Path) -> str:
    """``str_kernels/a/b.py`` is ``str_kernels.a.b``, ``a/__init__.py`` is ``str_kernels.a``."""
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {dotted(path): path for path in PACKAGE.rglob("*.py")}


def modules_imported(name: str) -> set[str]:
    """Every module of ours that this one imports, inside functions and for annotations too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {node.module}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def test_no_file_is_in_a_circle():
    """Inside a layer too, every file can be read after those that it imports."""
    graph = {name: modules_imported(name) for name in MODULES}
    assert sum(map(len, graph.values())) > len(graph)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names it


ROOMS = ["deferred", "constraint", "trl", "patch"]


def test_the_rooms_of_huggingface_have_an_order():
    """Each room imports only from itself and from those before it."""
    start = "str_kernels.huggingface."
    for name in MODULES:
        for other in modules_imported(name):
            if name.startswith(start) and other.startswith(start):
                mine, its = (x.removeprefix(start).split(".")[0] for x in (name, other))
                assert ROOMS.index(its) <= ROOMS.index(mine), (name, other)


def test_the_oracle_stands_alone():
    """The reference restates every formula: of ours it imports nothing but the options."""
    assert imported(PACKAGE / "oracle.py") == {"options"}
