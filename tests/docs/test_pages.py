"""Every command and every program of the pages runs as it is printed, on a tiny model."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli.calling import call
from tests.docs.reading import CONTEXT, DOCS, Block, blocks, commands, furnish, shorter

PAGES = sorted(DOCS.glob("*.md"))
ELSEWHERE = ("demo", "doctor")  # commands that tests/cli runs as they stand
OTHERS = ("pip", "git", "mkdocs", "pytest", "ruff", "cd", "python")  # what a page may call besides


@pytest.fixture(scope="module")
def model(aligned_model_dir, tmp_path_factory) -> Path:
    """The aligned tiny model, with the context of a large one."""
    folder = tmp_path_factory.mktemp("docs") / "model"
    shutil.copytree(aligned_model_dir, folder)
    for name, entry in (
        ("config.json", "max_position_embeddings"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, entry: CONTEXT}))
    return folder


@pytest.fixture
def logging_as_before():
    """A page may turn logging on for its program."""
    root, ours = logging.getLogger(), logging.getLogger("str_kernels")
    handlers, level = list(root.handlers), ours.level
    yield
    root.handlers[:] = handlers
    ours.setLevel(level)


def test_there_is_something_to_run():
    """The blocks are found at all."""
    assert sum(len(blocks(page, "sh", "python")) for page in PAGES) > 15


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "sh", "python")], ids=lambda p: p.stem
)
def test_a_page_runs(page, model, tmp_path, monkeypatch, capsys):
    """Its blocks one after another, in a folder that has the models and data that it names."""
    furnish(tmp_path, model)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "sh", "python"):
        where = f"{page.name}:{block.line}"
        if block.language == "sh":
            run_shell(block, where, capsys)
        elif "from trl" not in block.text or find_spec("trl"):  # none for Python 3.10
            with warnings.catch_warnings():
                exec(compile(shorter(block.text), where, "exec"), {"__name__": "__main__"})


def run_shell(block: Block, where: str, capsys: pytest.CaptureFixture) -> None:
    """Run the package's commands; other programs are only looked at."""
    for words in commands(Block(block.language, shorter(block.text), block.line)):
        assert words[0] in ("str-kernels", *OTHERS), f"{where}: {words}"
        if words[0] == "str-kernels" and words[1] not in ELSEWHERE:
            called = call(capsys, *words[1:])
            assert called.code == 0, f"{where}: {words}\n{called.err}"
