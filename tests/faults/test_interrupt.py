"""Commands that are killed or have no room: what is there loads, and the end is the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ("train", "cache", "tokens", "evaluate", "index")
# the tree goes last, so that the package is the installed one
START = f"""
import sys
sys.path.append({str(Path(__file__).parents[2])!r})
from tests.faults.interrupt import main
main()
"""
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def interrupt(how, commands, moments):
    """Run the interruptions in a process of their own, since they fork."""
    given = [sys.executable, "-c", START, how, *commands, "--moments", str(moments)]
    done = subprocess.run(given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    for command in commands:
        assert f"{how} {command}: {moments} moments, every result the same" in done.stderr


@posix
def test_a_killed_command_ends_in_the_same_result():
    """The command with most files, at one moment."""
    interrupt("kill", ("train",), 1)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("how", ["kill", "fill"])
def test_fifty_moments(how, command):
    """Of every command."""
    interrupt(how, (command,), 50)
