"""The command line as a whole: help without torch, errors without a trace, exit codes."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from str_kernels.version import __version__
from tests.cli.calling import call


def commands():
    """Names of all registered commands."""
    from typer.main import get_command

    from str_kernels.cli.main import app

    return sorted(get_command(app).commands)


def help_text(capsys, *command):
    """A help page as one line of words."""
    called = call(capsys, *command, "--help")
    assert called.code == 0
    return re.sub(r"[\s│]+", " ", called.out)


def test_help_does_not_import_torch():
    """Help is there at once: neither torch nor transformers nor peft is imported for it."""
    code = f"""
import sys
from str_kernels.cli.main import main
for command in ([], *([name] for name in {commands()!r})):
    try:
        main([*command, "--help"])
    except SystemExit as exit:
        assert not exit.code, command
    heavy = {{"torch", "transformers", "peft", "triton", "numpy"}} & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage") == 1 + len(commands())


@pytest.mark.parametrize("name", commands())
def test_every_help_ends_with_an_example_that_is_understood(capsys, name):
    """The example's options all exist: it is parsed by the command that it is printed for."""
    from typer.main import get_command

    from str_kernels.cli.main import app

    example = help_text(capsys, name).rpartition("Example: str-kernels ")[2]
    words = shlex.split(re.split(" · | next: ", example)[0])
    assert words[0] == name
    command = get_command(app).commands[name]
    command.make_context(name, words[1:])  # raises a usage error for an unknown option


def test_the_main_help_names_every_command_and_an_example(capsys):
    """A newcomer sees what there is and how to begin."""
    text = help_text(capsys)
    assert {"doctor", "tokens", "evaluate"} <= set(commands())
    assert all(f" {name} " in text for name in commands())
    assert text.rstrip().endswith("Example: str-kernels doctor")


def test_version(capsys):
    """One line with the version."""
    assert call(capsys, "--version") == (0, f"str-kernels {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["unheard"], ["tokens"], ["tokens", "m", "--top-k", "0"]])
def test_a_wrong_command_line_exits_with_2(capsys, arguments):
    """An unknown command, a missing argument, a value out of range: usage on stderr."""
    called = call(capsys, *arguments)
    assert called.code == 2
    assert "Usage" in called.err
    assert called.out == ""


def test_a_users_mistake_is_one_sentence(capsys):
    """Exit code 2, the message on stderr, nothing on stdout, and no stack trace."""
    called = call(capsys, "tokens", "./nowhere")
    assert called.code == 2
    assert called.err.splitlines()[-1] == "error: model='./nowhere': no such file or folder."
    assert "Traceback" not in called.err
    assert called.out == ""


@pytest.mark.parametrize("where", ["first", "last", "environment"])
def test_debug_shows_the_trace(capsys, monkeypatch, where):
    """With --debug anywhere, or the variable, the error itself comes through."""
    arguments = ["tokens", "./nowhere"]
    if where == "environment":
        monkeypatch.setenv("STR_KERNELS_DEBUG", "1")
    else:
        arguments.insert(0 if where == "first" else 2, "--debug")
    with pytest.raises(ValueError, match="no such file or folder"):
        call(capsys, *arguments)


def test_the_installed_program_runs():
    """`python -m` and the entry point are the same program, and fail the same way."""
    done = subprocess.run(
        [sys.executable, "-m", "str_kernels.cli.main", "evaluate", "./nowhere"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 2
    assert "give at least one of --refusals, --task and --benign" in done.stderr
