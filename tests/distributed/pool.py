"""Two processes with a gloo group between them, started once, that run one case after another.

A case is a function that the processes can import. Both run it with the same arguments, and each
answers with what it returns or with its error. When no process computes for a minute, the case
hangs: the test fails with the stack of every process, and the next test gets new ones.
"""

from __future__ import annotations

import datetime
import faulthandler
import importlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # comes with accelerate

WORLD = 2
HANGS = 60  # seconds in which no process computes
_ALONE = 10  # seconds to wait for the others when one process has failed
_STARTS = 300  # seconds for the imports or a case, on a machine that is busy


class Failed(NamedTuple):
    """The error of one process."""

    message: str
    traceback: str


class Pool:
    """So many processes; they start with the first case, and import ``module`` before it."""

    def __init__(self, world: int = WORLD, module: str = __name__) -> None:
        self._world, self._module = world, module
        self._workers: list[multiprocessing.Process] = []
        self._pipes: list[Connection] = []
        self._folder: Path | None = None

    def run(self, case: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        """What every process returns, in the order of ranks; AssertionError if one fails."""
        answers = self._answers(case, args, kwargs)
        wrong = [answer.traceback for answer in answers if isinstance(answer, Failed)]
        assert not wrong, "\n".join(wrong)
        return answers

    def errors(self, case: Callable, *args: Any, **kwargs: Any) -> list[str]:
        """The message of the error with which the case ends in every process."""
        answers = self._answers(case, args, kwargs)
        assert all(isinstance(answer, Failed) for answer in answers), answers
        return [answer.message for answer in answers]

    def stop(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._workers, self._pipes = [], []
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def _answers(self, case: Callable, args: tuple, kwargs: dict) -> list[Any]:
        if not self._workers:
            self._start()
        for pipe in self._pipes:
            pipe.send((case, args, kwargs))
        return self._collect(HANGS, f"{case.__name__}{args}{kwargs or ''}")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = Path(tempfile.mkdtemp(prefix="str_kernels_ranks_"))
        for rank in range(self._world):
            here, there = context.Pipe()
            worker = context.Process(
                target=_serve, args=(rank, self._world, self._folder, there), daemon=True
            )
            worker.start()
            there.close()
            self._workers.append(worker)
            self._pipes.append(here)
        self._collect(_STARTS, "the start of the processes")
        for pipe in self._pipes:
            pipe.send((_import, (self._module,), {}))
        self._collect(_STARTS, f"the import of {self._module}")

    def _collect(self, seconds: float, what: str) -> list[Any]:
        answers: dict[int, Any] = {}
        end, used, last = time.monotonic() + _STARTS, 0.0, time.monotonic()
        while len(answers) < self._world and time.monotonic() < min(end, last + seconds):
            now = self._computed()
            if now > used + 0.5:
                used, last = now, time.monotonic()
            waiting = {pipe: r for r, pipe in enumerate(self._pipes) if r not in answers}
            for pipe in wait(list(waiting), timeout=1):
                try:
                    answers[waiting[pipe]] = pipe.recv()
                except EOFError:
                    answers[waiting[pipe]] = Failed("died", "a process has died")
                if isinstance(answers[waiting[pipe]], Failed):  # the other may wait for it
                    end = min(end, time.monotonic() + _ALONE)
        failed = [x for x in answers.values() if isinstance(x, Failed)]
        if len(answers) == self._world and not any(x.message == "died" for x in failed):
            return [answers[rank] for rank in range(self._world)]
        stacks = self._stacks()
        self.stop()
        errors = "\n".join(x.traceback for x in failed)
        raise AssertionError(f"{what}: only {sorted(answers)} answered.\n{errors}\n{stacks}")

    def _computed(self) -> float:
        """Seconds of CPU that the processes have used."""
        alive = [psutil.Process(worker.pid) for worker in self._workers if worker.is_alive()]
        return sum(sum(process.cpu_times()[:2]) for process in alive)

    def _stacks(self) -> str:
        for worker in self._workers:
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGUSR1)
        time.sleep(1)
        paths = sorted(self._folder.glob("stack.*"))
        return "\n".join(f"{path.name}:\n{path.read_text(encoding='utf-8')}" for path in paths)


def _serve(rank: int, world: int, folder: Path, pipe: Connection) -> None:
    """The life of one process."""
    with open(folder / f"stack.{rank}", "w", encoding="utf-8") as stack:
        faulthandler.register(signal.SIGUSR1, stack)
        pipe.send(_answer(_join_group, rank, world, folder))
        while True:
            try:
                case, args, kwargs = pipe.recv()
            except EOFError:
                return
            pipe.send(_answer(case, *args, **kwargs))


def _answer(case: Callable, *args: Any, **kwargs: Any) -> Any:
    try:
        return case(*args, **kwargs)
    except Exception as error:
        return Failed(f"{type(error).__name__}: {error}", traceback.format_exc())


def _import(module: str) -> None:
    importlib.import_module(module)


def _join_group(rank: int, world: int, folder: Path) -> None:
    # as torchrun sets them, for accelerate
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(number) for name, number in ranks.items()}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    import torch

    from str_kernels.backends.torch import backend

    backend.FEWEST_FILTERED = 1  # as tests/conftest.py does
    torch.set_num_threads(1)
    longer = datetime.timedelta(seconds=10 * HANGS)  # so that a hang is seen as one
    where = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", where, rank=rank, world_size=world, timeout=longer)
