"""What an error says can be read at once: a sentence or two, and never a page."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "str_kernels"
LONGEST = 300  # characters
VALUE = 16  # characters of a value in a message; paths may be longer


def texts(node: ast.expr, names: dict[str, ast.expr]) -> list[str]:
    """Every text that this expression may give; values count as ``VALUE`` characters."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.FormattedValue):
        return texts(node.value, names) if _is_text(node.value, names) else ["?" * VALUE]
    if isinstance(node, ast.JoinedStr):
        return _joined([texts(value, names) for value in node.values])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined([texts(node.left, names), texts(node.right, names)])
    if isinstance(node, ast.IfExp):
        return texts(node.body, names) + texts(node.orelse, names)
    if isinstance(node, ast.Name) and node.id in names:
        return texts(names[node.id], {k: v for k, v in names.items() if k != node.id})
    return ["?" * VALUE]


def _is_text(node: ast.expr, names: dict[str, ast.expr]) -> bool:
    return isinstance(node, ast.IfExp) or (isinstance(node, ast.Name) and node.id in names)


def _joined(parts: list[list[str]]) -> list[str]:
    found = [""]
    for part in parts:
        found = [before + text for before in found for text in part]
    return found


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every error that a module raises and of every warning that it gives."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant | ast.JoinedStr | ast.IfExp | ast.BinOp)
    }
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        warns = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("_warn", "warn")
        if isinstance(call, ast.Call) and call.args and (call is not node or warns):
            for text in texts(call.args[0], names):
                yield node.lineno, text


def test_no_message_is_long():
    """At most 300 characters, values as long as usual ones; a command to copy comes beside."""
    found = [(path, *told) for path in sorted(ROOT.rglob("*.py")) for told in messages(path)]
    assert len(found) > 250
    long = [f"{path}:{line}: {text}" for path, line, text in found if len(text) > LONGEST]
    assert not long, "\n".join(long)
