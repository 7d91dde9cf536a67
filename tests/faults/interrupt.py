"""Commands interrupted at random moments: killed, with files that may not grow, on a full disk.

What is there afterwards must load or be absent, and the command, repeated or resumed, must end in
the result of an uninterrupted run, bit for bit.

Examples: python -m tests.faults.interrupt kill train --moments 50
          unshare --user --map-root-user --mount python -m tests.faults.interrupt disk train
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from str_kernels import SafetyTokens, VocabularyIndex
from str_kernels.cli.console import say
from str_kernels.cli.main import main as command_line
from str_kernels.evaluation.answers import AnswerFile
from str_kernels.huggingface.constraint.references import ReferenceCache
from str_kernels.huggingface.patch.index_cache import cached_index
from str_kernels.inputs.loading import check_adapter, load_model_and_tokenizer, load_tokenizer
from str_kernels.tensor_files import SavedTensors
from str_kernels.tensor_rows import TensorRows
from str_kernels.training.checks import prepare
from str_kernels.training.run import train
from str_kernels.training.settings import TrainSettings

WORDS = ("rain", "wind", "ball", "team", "song", "choir")
TOKENS = ["sorry", "cannot", "unable"]
ROOM = 1 << 26  # bytes of a disk that is not full
TABLES = "SELECT name FROM sqlite_master"


@dataclass(frozen=True)
class Command:
    """What is interrupted.

    Args:
        run: does the work of a folder; ``again`` tells that it was interrupted before.
        check: fails if something in the folder is neither whole nor absent.
        result: what must be the same in the end.
    """

    run: Callable[[Path, bool], None]
    check: Callable[[Path], None]
    result: Callable[[Path], object]


def inputs(folder: Path) -> None:
    """Write a model, data and safety tokens, which every command reads."""
    from tests.tiny import save_tiny_model

    save_tiny_model(folder / "model")
    rows = [{"prompt": f"tell me the topic of {word}", "response": "weather ."} for word in WORDS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    SafetyTokens.from_strings(load_tokenizer(folder / "model"), TOKENS).save(folder / "given.json")


def _settings(folder: Path) -> TrainSettings:
    return TrainSettings(
        model=str(folder / "model"), data=str(folder / "data.jsonl"), out=str(folder / "run"),
        steps=5, batch=2, rank=2, max_length=64, save_steps=1, learning_rate=1e-2,
        tokens=str(folder / "given.json"), reference="cache",
    )  # fmt: skip


def _train(folder: Path, again: bool) -> None:
    settings = _settings(folder)
    resumable = again and any(folder.glob("run/checkpoint-*/str_kernels_seal.json"))
    finished = again and (folder / "run" / "adapter_config.json").is_file()
    if resumable or not finished:
        train(prepare(settings, resume=resumable))


def _check_run(folder: Path) -> None:
    run = folder / "run"
    if (run / "adapter_config.json").is_file():
        check_adapter(run)
        load_model_and_tokenizer(folder / "model", adapter=run, device="cpu")
    references = run / "references.sqlite"
    if references.is_file() and sqlite3.connect(references).execute(TABLES).fetchall():
        _check_references(references)  # else killed before its first transaction ended


def _adapter(folder: Path) -> object:
    return load_file(folder / "run" / "adapter_model.safetensors")


def _line(*words: object) -> None:
    """Call the command line; anything but success is raised."""
    try:
        command_line([str(word) for word in words])
    except SystemExit as ended:
        if ended.code:
            raise


def _cache(folder: Path, again: bool) -> None:
    _line("cache", folder / "model", folder / "data.jsonl", "--tokens", folder / "given.json",
          "--out", folder / "refs.safetensors", "--max-length", 64, "--batch", 1)  # fmt: skip


def _check_references(path: Path) -> None:
    tokens = SafetyTokens.load(path.parents[path.parent.name == "run"] / "given.json")
    ReferenceCache(path, tokens.constraint())
    if path.suffix == ".sqlite":
        saved = TensorRows(path, path.name)
        names = [name for (name,) in sqlite3.connect(path).execute("SELECT name FROM tensors")]
    else:
        saved = SavedTensors(path, path.name)
        names = saved.names
    for name in names:
        assert saved[name].isfinite().all()


def _check_cache(folder: Path) -> None:
    if (folder / "refs.safetensors").is_file():
        _check_references(folder / "refs.safetensors")


def _tokens(folder: Path, again: bool) -> None:
    _line("tokens", folder / "model", "--out", folder / "tokens.json", "--top-k", 4)


def _check_tokens(folder: Path) -> None:
    if (folder / "tokens.json").is_file():
        SafetyTokens.load(folder / "tokens.json", load_tokenizer(folder / "model"))


def _evaluate(folder: Path, again: bool) -> None:
    _line("evaluate", folder / "model", "--refusals", folder / "data.jsonl", "--max-new-tokens", 4,
          "--batch-size", 1, "--out", folder / "rates.json")  # fmt: skip


def _check_evaluation(folder: Path) -> None:
    if (folder / "rates.json").is_file():
        json.loads((folder / "rates.json").read_text())
    AnswerFile(folder / "rates.json.answers.jsonl", {}).close()


def _rates(folder: Path) -> object:
    result = json.loads((folder / "rates.json").read_text())
    return result["counts"], result["outcomes"]


def _index(folder: Path, again: bool) -> None:
    source = torch.Generator().manual_seed(0)
    weight, states = (torch.randn(n, 16, generator=source) for n in (2000, 64))
    cached_index(weight, states, folder / "indices")


def _indices(folder: Path) -> list[Path]:
    return sorted((folder / "indices").glob("*.safetensors"))


def _check_index(folder: Path) -> None:
    for path in _indices(folder):
        VocabularyIndex.load(path)


COMMANDS = {
    "train": Command(_train, _check_run, _adapter),
    "cache": Command(_cache, _check_cache, lambda folder: load_file(folder / "refs.safetensors")),
    "tokens": Command(_tokens, _check_tokens, lambda folder: (folder / "tokens.json").read_text()),
    "evaluate": Command(_evaluate, _check_evaluation, _rates),
    "index": Command(_index, _check_index, lambda folder: list(map(load_file, _indices(folder)))),
}


class Child:
    """Work in a forked process, which writes into a pipe, for files may be limited.

    Args:
        work: what is done.
        limit: bytes that no file may exceed.
    """

    def __init__(self, work: Callable[[], None], limit: int | None = None) -> None:
        self._read, write = os.pipe()
        self.id = os.fork()
        if not self.id:
            _work(work, write, limit)
        os.close(write)

    def ended(self) -> tuple[int, str]:
        """Wait for the end; return the exit code (negative: a signal's number) and the output."""
        with os.fdopen(self._read) as pipe:
            output = pipe.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.id, 0)[1]), output


def _work(work: Callable[[], None], output: int, limit: int | None) -> None:
    """Do the work, and end this process: 0, 1 for a trace, 2 for an error in words."""
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        torch.set_num_threads(1)
        work()
        code = 0
    except (OSError, ValueError) as error:
        say(f"{type(error).__name__}: {error}")
        code = 2
    except SystemExit as ended:  # the command line has written the error itself
        code = 2 if ended.code in (1, 2) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def done(work: Callable[[], None]) -> None:
    """Do some work in a process of its own, which must succeed."""
    code, output = Child(work).ended()
    assert code == 0, output


def same(a: object, b: object) -> bool:
    """Equal to the bit; dicts and lists of tensors are compared one by one."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def kill(command: Command, folder: Path, seconds: float) -> None:
    """Kill the command after some time."""
    child = Child(lambda: command.run(folder, False))
    time.sleep(seconds)
    os.kill(child.id, signal.SIGKILL)
    child.ended()


def fill(command: Command, folder: Path, limit: int | None) -> int:
    """Let no file grow beyond a limit; the command must end with a sentence, or not need more.

    The exit code is returned: 2 where it needed more.
    """
    code, output = Child(lambda: command.run(folder, False), limit).ended()
    assert code in (0, 2), f"exit code {code} at a limit of {limit} bytes:\n{output}"
    assert "Traceback" not in output, output
    return code


class Disk:
    """A folder on a disk of its own (tmpfs), whose size is set; mounting needs a namespace."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _mount(self, option: str, *given: str) -> None:
        subprocess.run(["mount", "-o", option, *given, self._folder], check=True)

    def __enter__(self) -> Disk:
        self._folder.mkdir()
        self._mount(f"size={ROOM}", "-t", "tmpfs", "tmpfs")
        return self

    def __exit__(self, *_: object) -> None:
        # lazily: what was loaded from its files may be mapped still
        subprocess.run(["umount", "--lazy", self._folder], check=True)

    def fill(self, command: Command, room: int) -> int:
        """Run the command with so many bytes of room; afterwards there is enough again."""
        self._mount(f"remount,size={_used(self._folder) + room}")
        try:
            return fill(command, self._folder, None)
        finally:
            self._mount(f"remount,size={ROOM}")


def keep(disk: Disk, command: Command, folder: Path, expected: object) -> None:
    """Repeat a finished command where nothing can be written: the old result stays."""
    disk.fill(command, 0)
    assert same(command.result(folder), expected), "the old result is gone"


def interrupt(how: str, name: str, moments: int, seed: int) -> None:
    """Interrupt a command at random moments, and compare every result with the uninterrupted."""
    command, source = COMMANDS[name], random.Random(f"{how} {name} {seed}")
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base, folder = place / "inputs", place / "work"
        base.mkdir()
        done(lambda: inputs(base))
        disk = stack.enter_context(Disk(folder)) if how == "disk" else None
        begin(base, folder)
        before, clock = _used(folder), time.monotonic()
        done(lambda: command.run(folder, False))
        clock = time.monotonic() - clock
        expected = command.result(folder)
        written = _used(folder) - before
        largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if disk:
            keep(disk, command, folder, expected)
        for moment in range(moments):
            begin(base, folder)
            if how == "kill":
                at = source.uniform(0, clock)
                kill(command, folder, at)
            elif disk:
                at = source.randrange(0, written, os.sysconf("SC_PAGESIZE"))  # as a disk is given
                code = disk.fill(command, at)
                # what cannot be cached is said, and the index is used all the same
                assert code == 2 or name == "index", f"{at} bytes of {written} were enough"
            else:
                at = round(largest ** source.uniform(0.3, 1))
                fill(command, folder, at)
            there = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
            try:
                command.check(folder)
                done(lambda: command.run(folder, True))
                assert same(command.result(folder), expected), "another result"
            except Exception:
                say(f"{how} {name}, moment {moment}, at {at:.4g}: {there}")
                raise


def _used(folder: Path) -> int:
    """Bytes of its disk that are taken."""
    there = os.statvfs(folder)
    return (there.f_blocks - there.f_bfree) * there.f_frsize


def begin(base: Path, folder: Path) -> None:
    """Begin anew, with the inputs alone."""
    shutil.rmtree(folder, ignore_errors=True)  # a disk's own folder stays, and is empty
    shutil.copytree(base, folder, dirs_exist_ok=True)


def main() -> None:
    """Interrupt as the command line says; an error tells what was found."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("how", choices=("kill", "fill", "disk"))
    made.add_argument("commands", nargs="+", choices=COMMANDS)
    made.add_argument("--moments", type=int, default=50)
    made.add_argument("--seed", type=int, default=0)
    args = made.parse_args()
    torch.set_num_threads(1)
    for name in args.commands:
        interrupt(args.how, name, args.moments, args.seed)
        say(f"{args.how} {name}: {args.moments} moments, every result the same")


if __name__ == "__main__":
    main()
