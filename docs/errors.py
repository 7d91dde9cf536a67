"""Writes the list of messages in ``docs/troubleshooting.md``: ``python docs/errors.py``.

The messages are read from the code: every error that it raises and every warning that it gives,
with ``…`` for a value.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "str_kernels"
PAGE = Path(__file__).with_name("troubleshooting.md")
MARK = "<!-- every message: written by docs/errors.py, do not edit below -->\n"
VALUE = "…"

GROUPS = {
    "Data": ("inputs/jsonl", "inputs/rows", "inputs/data", "inputs/chat", "inputs/template"),
    "Models, tokenizers, adapters": ("inputs/loading", "training/lora"),
    "Settings, outputs, resumed runs": ("settings", "options", "training/", "cli/"),
    "Safety tokens and evaluations": ("safety/", "evaluation/"),
    "Constraint and reference": ("huggingface/constraint/",),
    "Patched models": ("huggingface/patch/", "huggingface/deferred/"),
    "Other programs": ("huggingface/trl", "integrations/"),
    "Files": ("files", "tensor_files", "vocabulary"),
    "The loss on tensors": ("",),
}
_ERRORS = (
    *("ValueError", "OSError", "RowFault", "FloatingPointError", "PicklingError"),
    *("BadParameter", "Warning"),
)
_MAKERS = ("_difference", "removed", "why_not_learnable")  # their texts are raised elsewhere
_TEXTS = ast.Constant | ast.JoinedStr | ast.IfExp | ast.BinOp | ast.Tuple


class Message(NamedTuple):
    """A text, the kind of error (or ``Warning``), and where it stands."""

    text: str
    kind: str
    path: Path
    line: int


def messages() -> Iterator[Message]:
    """Every message in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield from _of(path)


def _of(path: Path) -> Iterator[Message]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = _assigned(ast.iter_child_nodes(tree))
    for scope in (tree, *_functions(tree)):
        inside = list(_own(scope))
        names = {**constants, **_assigned(inside)}
        for node in inside:
            for kind, told in _told(node, getattr(scope, "name", "")):
                for text in _texts(told, names):
                    yield Message(text, kind, path, node.lineno)


def _told(node: ast.AST, function: str) -> Iterator[tuple[str, ast.expr]]:
    """Yield the kind and the text of an error or warning."""
    call = node.exc if isinstance(node, ast.Raise) else node
    if isinstance(call, ast.Call) and call.args:
        called = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if isinstance(node, ast.Raise):
            yield called, call.args[0]
        elif called in ("_warn", "warn"):
            yield "Warning", call.args[0]
    if function in _MAKERS and isinstance(node, ast.Return) and node.value is not None:
        yield "ValueError", node.value
    if function == "faults" and isinstance(node, ast.JoinedStr):  # collected, and raised together
        yield "ValueError", node


def _functions(tree: ast.AST) -> list[ast.AST]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function or module, without those of functions inside."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from _own(child)


def _assigned(nodes: Iterable[ast.AST]) -> dict[str, list[ast.expr]]:
    """Return what each name is assigned."""
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, _TEXTS):
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Name):
                found.setdefault(target.id, []).append(value)
            elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                for name, part in zip(target.elts, value.elts, strict=False):
                    if isinstance(name, ast.Name) and isinstance(part, _TEXTS):
                        found.setdefault(name.id, []).append(part)
    return found


def _texts(node: ast.expr, names: dict[str, list[ast.expr]]) -> list[str]:
    """Return every text that an expression may give."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.FormattedValue):
        return _texts(node.value, names)
    if isinstance(node, ast.JoinedStr):
        return _joined([_texts(value, names) for value in node.values])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined([_texts(node.left, names), _texts(node.right, names)])
    if isinstance(node, ast.IfExp):
        return _texts(node.body, names) + _texts(node.orelse, names)
    if isinstance(node, ast.Name) and node.id in names:
        others = {name: values for name, values in names.items() if name != node.id}
        return [text for value in names[node.id] for text in _texts(value, others)]
    return [VALUE]


def _joined(parts: list[list[str]]) -> list[str]:
    found = [""]
    for part in parts:
        found = [before + text for before in found for text in part]
    return found


def listing() -> str:
    """Return the messages in their groups, as Markdown."""
    grouped: dict[str, dict[str, None]] = {title: {} for title in GROUPS}
    for message in messages():
        if message.kind not in _ERRORS or len(message.text.strip(VALUE + ": ")) < 12:
            continue
        name = message.path.relative_to(PACKAGE).with_suffix("").as_posix()
        if name.startswith(("bench/", "demo/")):
            continue
        title = next(t for t, starts in GROUPS.items() if name.startswith(starts))
        shown = " ".join(message.text.split()).replace("`", "'")
        grouped[title][f"- `{shown}`"] = None
    return "\n".join(
        f"### {title}\n\n" + "\n".join(sorted(found)) + "\n" for title, found in grouped.items()
    )


if __name__ == "__main__":
    written = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    PAGE.write_text(f"{written}{MARK}\n{listing()}", encoding="utf-8")
