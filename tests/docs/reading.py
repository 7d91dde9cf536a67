"""The code blocks of a page, and the folder in which they run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tests.tiny import exchanges

DOCS = Path(__file__).parents[2] / "docs"
MODELS = ("my-model", "Qwen/Qwen2.5-0.5B-Instruct", "meta-llama/Llama-3.1-8B-Instruct")
CONTEXT = 131072
_BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# A tiny model on a CPU shows in two steps what a real one does in a hundred. Without bitsandbytes
# the body is not quantised. Nothing else of a block is changed.
SHORTER = (
    (r"max_steps=\d+", "max_steps=2, use_cpu=True"),
    (r"gradient_accumulation_steps=16", "gradient_accumulation_steps=1"),
    (r"--steps \d+", "--steps 2"),
    (r"bench --quick --out", "bench --quick --contenders ours,transformers --out"),
    (r"--accumulation 8", "--accumulation 1"),
)
UNQUANTISED = (
    (r"quantization_config=four_bits, ", ""),
    (r"four_bits = BitsAndBytesConfig\(.*?\n\)\n", ""),
)


class Block(NamedTuple):
    """A block of a page: its language, its text, and the line where it begins."""

    language: str
    text: str
    line: int


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of these languages, in order."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match[1], match[2], text[: match.start()].count("\n") + 1)
        for match in _BLOCK.finditer(text)
    ]
    return [block for block in found if block.language in languages]


def shorter(text: str) -> str:
    """The block with fewer steps, for a CPU."""
    quantises = importlib.util.find_spec("bitsandbytes") is not None
    for pattern, replacement in (*SHORTER, *(() if quantises else UNQUANTISED)):
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return text


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a shell block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words]


def furnish(folder: Path, model: Path) -> None:
    """Make the files that the pages name: models by their Hub ids, and data."""
    for name in MODELS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(model, target_is_directory=True)
    refused, answered = exchanges(forbidden=True), exchanges(forbidden=False)
    for name, rows in {
        "data.jsonl": answered[:16],
        "harmful.jsonl": refused[:4],
        "refusals.jsonl": refused[:4],
        "lookalikes.jsonl": answered[:4],
        "refused.jsonl": refused[4:8],
        "answered.jsonl": answered[4:8],
        "task.jsonl": answered[8:12],
    }.items():
        write(folder / name, [{"prompt": q, "response": a} for q, a in rows])
    turns = [[("user", q), ("assistant", a)] for q, a in answered[:16]]
    chats = [[{"role": role, "content": text} for role, text in chat] for chat in turns]
    write(folder / "chats.jsonl", [{"messages": chat} for chat in chats])


def write(path: Path, rows: list[dict]) -> None:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def load(name: str):
    """A module of ``docs/``, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
