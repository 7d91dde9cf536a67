"""Commands killed or on a full disk: what is there loads, old files stay, the end is the same."""

import os
import shutil
import subprocess
import sys
import tempfile
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
MOUNTING = ["unshare", "--user", "--map-root-user", "--mount"]  # a namespace where one may mount
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def interrupt(how, commands, moments):
    """Run the interruptions in a process of their own, since they fork."""
    given = [sys.executable, "-c", START, how, *commands, "--moments", str(moments)]
    if how == "disk":
        trial = [*MOUNTING, "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
        if shutil.which("unshare") is None or subprocess.run(trial, capture_output=True).returncode:
            pytest.skip("needs a namespace of its own to mount a disk in")
        given = [*MOUNTING, *given]
    done = subprocess.run(given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    for command in commands:
        assert f"{how} {command}: {moments} moments, every result the same" in done.stderr


@posix
def test_a_killed_command_ends_in_the_same_result():
    """The command with most files, at one moment."""
    interrupt("kill", ("train",), 1)


@posix
def test_a_command_on_a_full_disk_ends_in_a_sentence():
    """The command that replaces a file, at one moment, and over its own old result."""
    interrupt("disk", ("cache",), 1)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("how", ["kill", "fill", "disk"])
def test_fifty_moments(how, command):
    """Of every command."""
    interrupt(how, (command,), 50)
