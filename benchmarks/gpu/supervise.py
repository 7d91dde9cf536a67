"""The steps run in one worker process, which is replaced when it dies or does not stop in time.

So an illegal access or a hanging kernel costs its own step alone, and the inputs are made once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.gpu import plan
from benchmarks.gpu.record import FILE, end, states
from str_kernels.cli.console import say


def supervise(args: argparse.Namespace) -> dict[str, str]:
    """Run every step that is not done; return how each ended."""
    if args.small:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the worker imports Triton
    todo = _todo(args)
    share = args.limit / sum(plan.BUDGETS.values())
    began, allowed, worker, ended = time.monotonic(), 0.0, None, {}
    for step in todo:
        allowed += plan.INSTALL_S if step == "install" else share * plan.BUDGETS[step]
        limit = allowed - (time.monotonic() - began)
        worker = worker or _Worker(args)
        say(f"{step}: at most {limit:.0f} s")
        started = time.monotonic()
        reply = worker.run(step, limit)
        if reply is None:
            worker = worker.kill()
            ended[step] = "killed"
            if (args.out / FILE).exists():
                end(args.out, step, "killed", time.monotonic() - started, "it died or hung")
        else:
            ended[step], usable = reply
            worker = worker if usable else worker.kill()
        say(f"{step}: {ended[step]} after {time.monotonic() - started:.1f} s")
    if worker is not None:
        worker.stop()
    return ended


def _todo(args: argparse.Namespace) -> list[str]:
    names = [*(["install"] if args.install else []), *plan.BUDGETS]
    if args.only:
        names = [name for name in names if name in args.only]
    before = {} if args.again else states(args.out)
    return [name for name in names if before.get(name, {}).get("state") != "done"]


class _Worker:
    """The process, and the pipe that steps are sent through."""

    def __init__(self, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        arguments = (there, args.out, args.small)
        self.process = context.Process(target=_serve, args=arguments)
        self.process.start()
        there.close()

    def run(self, step: str, limit: float) -> tuple[str, bool] | None:
        """Return how the step ended and whether the device still works; None: no answer."""
        try:
            self.pipe.send((step, limit))
            answered = self.pipe.poll(max(0.0, limit) + plan.GRACE_S)
            return self.pipe.recv() if answered else None
        except (EOFError, OSError):  # it died
            return None

    def kill(self) -> None:
        """End it whatever it does."""
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        """Let it end."""
        self.pipe.close()
        self.process.join(plan.GRACE_S)
        if self.process.is_alive():
            self.kill()


def _serve(pipe: Connection, out: Path, small: bool) -> None:
    from benchmarks.gpu.run import Run
    from benchmarks.gpu.steps import run_step

    run = Run.open(out, small=small)
    while True:
        try:
            step, limit = pipe.recv()
        except EOFError:
            return
        pipe.send((run_step(run, step, limit), run.usable()))
