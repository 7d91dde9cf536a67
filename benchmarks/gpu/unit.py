"""Step 1: what is installed, how fast memory is, the unit, and what the clocks do under load."""

from __future__ import annotations

import torch

from benchmarks.gpu.run import Run
from str_kernels.bench.clock import bare_product, elapsed
from str_kernels.bench.contenders import CONTENDERS
from str_kernels.bench.sensors import read_sensors
from str_kernels.version import versions

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "nvidia-ml-py",
    "nvidia-cutlass-dsl",
    "pytest-xdist",
    "matplotlib",
)


def unit(run: Run) -> None:
    """Add what is installed, the copy, the bare product at every shape, and it without a pause."""
    run.add("installed", **_installed(run))
    _copy(run)
    for head in reversed(run.sizes.heads):  # the next steps use the first one's inputs
        for rows in run.sizes.rows:
            case = run.case(rows, head)
            if run.todo("unit", case):
                product = bare_product(case.hidden_states, case.weight)
                # the ratio to itself tells how well the protocol repeats
                run.add("unit", case, **run.timed(product, case, queued=True).as_row())
    case = run.case(run.sizes.rows[0], run.sizes.heads[0])
    if run.todo("sustained", case):
        run.add("sustained", case, **_sustained(run, case))


def _installed(run: Run) -> dict:
    peers = {c.package for c in CONTENDERS.values()} - {None, "torch", "transformers"}
    found = versions(*_PACKAGES, *sorted(peers))
    found["cuda"] = torch.version.cuda
    missing = {c.name: c.missing() for c in CONTENDERS.values() if c.missing()}
    facts = {"versions": found, "missing": missing, "idle": read_sensors(run.device)}
    if run.device.type == "cuda":
        about = torch.cuda.get_device_properties(run.device)
        facts["device"] = {
            "name": about.name,
            "multiprocessors": about.multi_processor_count,
            "memory": about.total_memory,
            "l2": getattr(about, "L2_cache_size", None),
            "capability": [about.major, about.minor],
        }
    return facts


def _copy(run: Run) -> None:
    """Copy on the device: every byte is read once and written once."""
    if not run.todo("copy"):
        return
    source = torch.empty(run.sizes.copied, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = [elapsed(lambda: target.copy_(source), run.device, 10) / 10 for _ in range(5)]
    run.add("copy", bytes=2 * run.sizes.copied, seconds=seconds)


def _sustained(run: Run, case) -> dict:
    """Multiply without a pause: the first calls and the last ones, with the clocks of each."""
    product = bare_product(case.hidden_states, case.weight)
    product()
    parts, total = [], 0.0
    while total < run.sizes.sustained_s or len(parts) < 2:
        sensors: dict[str, float] = {}
        seconds = elapsed(product, run.device, 10, sensors)
        parts.append({"seconds": seconds / 10, **sensors})
        total += seconds
    return {"first": parts[0], "last": parts[-1], "total_s": total}
