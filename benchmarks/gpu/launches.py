"""Steps 5 and 6: other tile sizes of the screen and of the refinement, each checked in fp32."""

from __future__ import annotations

from triton.errors import TritonError

from benchmarks.gpu.check import plain_of, refine_error, screen_error
from benchmarks.gpu.run import Run, first_line
from benchmarks.gpu.stages import BOTH, block_of, rows_of_block, rows_screened
from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.backends.triton import TritonBackend
from str_kernels.backends.triton.launch import Kind, Launch, Stage

Key = tuple[Stage, Kind]
_REFUSED = (TritonError, RuntimeError)  # too large for a chip; the driver raises the latter

# The table's own entry is always timed too, as "the table's".
SCREENS: dict[Key, tuple[Launch, ...]] = {
    ("screen", "byte"): (
        Launch(256, 128, stages=3),
        Launch(128, 128, stages=4),
        Launch(128, 64, stages=4),
        Launch(256, 64, stages=4),
        Launch(256, 128, stages=2),
        Launch(128, 128, warps=4, stages=3),
    ),
    ("screen", "half"): (
        Launch(128, 64, stages=3),
        Launch(128, 64, stages=4),
        Launch(256, 64, stages=4),
        Launch(256, 32, stages=4),
    ),
}
REFINES: dict[Key, tuple[Launch, ...]] = {
    ("refine", "half"): (
        Launch(64, 64, 128, stages=3),
        Launch(64, 64, 64, stages=4),
        Launch(128, 64, 64, stages=3),
        Launch(128, 64, 256, stages=3),
        Launch(128, 32, 128, stages=4),
        Launch(128, 128, 128, stages=2),
        Launch(64, 128, 128, stages=2),
        Launch(32, 64, 128, warps=4, stages=3),
    ),
}


def screen(run: Run) -> None:
    """Time every size of the screen, the 8-bit ones first."""
    case = run.case(run.sizes.rows[0], run.sizes.heads[0])
    backend = TritonBackend()
    block = block_of(case, rows_screened(backend, case, "int8"), backend)
    part = case.first(len(block.labels))
    plain = plain_of(block)
    for key, name, variant in _variants(run, SCREENS):
        if not run.todo(name, part):
            continue
        precision = "int8" if key[1] == "byte" else "exact"
        try:
            masses = variant.screen(block, precision)
            found = screen_error(plain, masses)
            del masses
            timing = run.timed(lambda b=variant, p=precision: b.screen(block, p), part)
        except _REFUSED as error:
            run.add(name, part, reason=first_line(error))
            continue
        run.add(name, part, **found, **timing.as_row())


def refine(run: Run) -> None:
    """Time every size of the refinement on the same live pairs."""
    case = run.case(run.sizes.rows[0], run.sizes.heads[0])
    backend = TritonBackend()
    block = block_of(case, rows_of_block(backend, case), backend)
    part = case.first(len(block.labels))
    work = backend.route(block, backend.screen(block, "int8"), DEFAULT_EPS)
    plain = plain_of(block)
    for _, name, variant in _variants(run, REFINES):
        if not run.todo(name, part):
            continue
        try:
            found = refine_error(plain, work, variant.refine(block, work, BOTH))
            timing = run.timed(lambda b=variant: b.refine(block, work, BOTH), part)
        except _REFUSED as error:
            run.add(name, part, reason=first_line(error))
            continue
        run.add(name, part, **found, **timing.as_row())


def _variants(run: Run, table: dict[Key, tuple[Launch, ...]]):
    for key, launches in table.items():
        yield key, f"{' '.join(key)}: the table's", TritonBackend()
        for launch in launches[: run.sizes.launches]:
            yield (
                key,
                f"{' '.join(key)}: {_described(launch)}",
                TritonBackend(launches={key: launch}),
            )


def _described(launch: Launch) -> str:
    sizes = [launch.block_r, launch.block_d, *([launch.block_e] if launch.block_e else [])]
    return f"{' × '.join(map(str, sizes))}, {launch.warps} warps, {launch.stages} stages"
