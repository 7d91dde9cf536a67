"""What is measured, in which order, in how many seconds, and on which sizes."""

from __future__ import annotations

from typing import NamedTuple

# Seconds of each step, 540 together. What a step leaves unused, the next ones may use.
BUDGETS = {
    "unit": 40,  # copy bandwidth, the bare product, clocks
    "profile": 50,  # one call under torch's profiler: busy, idle, launches, waits
    "stages": 45,  # events around each stage, and the refinement's variants
    "exact": 40,  # every logit, by cuBLAS and by Triton
    "screen": 55,  # launch sizes of the screen
    "refine": 55,  # launch sizes of the refinement
    "head": 125,  # the head beside every peer
    "lora": 55,  # LoRA steps of a whole model
    "tests": 75,  # pytest -m gpu
}
INSTALL_S = 90  # of ``--install``, on top
GRACE_S = 15.0  # a step that does not stop by itself is killed so long after its limit


class Shape(NamedTuple):
    """A causal language model of random weights, and the context of its LoRA steps."""

    hidden: int
    layers: int
    heads: int
    groups: int
    inner: int
    vocab: int
    context: int


class Sizes(NamedTuple):
    """What a run measures; ``backend`` names the one that is ours."""

    heads: tuple[tuple[int, int], ...]  # V, D
    rows: tuple[int, ...]  # N, the first one is also that of stages and launch sizes
    profiled: tuple[int, ...]
    copied: int  # bytes
    model: Shape
    repeats: int  # paired runs of single calls, at most
    budget_s: float  # seconds of them, at most
    sustained_s: float  # of products without a pause
    backend: str
    launches: int | None  # so many launch sizes are tried; None: all
    queued: bool  # whether calls are timed in queues, too


FULL = Sizes(
    heads=((128256, 4096), (262144, 640)),
    rows=(8192, 512, 2048, 128),
    profiled=(8192, 512),
    copied=1 << 30,
    model=Shape(2048, 16, 32, 8, 8192, 128256, 8192),  # Llama 3.2 1B's
    repeats=7,
    budget_s=0.5,
    sustained_s=2.0,
    backend="auto",
    launches=None,
    queued=True,
)
# The same code on a CPU, in Triton's interpreter: a rehearsal, whose figures mean nothing.
SMALL = Sizes(
    heads=((200, 16), (150, 8)),
    rows=(8, 4),
    profiled=(8,),
    copied=1 << 16,
    model=Shape(32, 1, 2, 1, 64, 200, 8),
    repeats=1,
    budget_s=0.1,
    sustained_s=0.01,
    backend="triton",
    launches=1,
    queued=False,
)
