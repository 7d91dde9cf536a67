"""`str-kernels doctor`: what is installed, which backend runs here and why, and a self-check."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from str_kernels.cli.console import print_json, print_table, say, stage
from str_kernels.cli.options import AsJson
from str_kernels.cli.owner import owner_here, owner_of
from str_kernels.version import versions

SCHEMA = "str_kernels.doctor/1"
PACKAGES = ("str-kernels", "torch", "transformers", "peft", "accelerate", "safetensors", "triton")
COMPILERS = ("cc", "gcc", "clang", "cl")


def doctor(
    *,
    as_json: AsJson = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Compile the GPU kernels instead; no GPU is needed.")
    ] = False,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="With --kernels: a chip (90, gfx942); repeatable. Default: the GPU here."
        ),
    ] = None,
    accelerate: Annotated[
        Path | None,
        typer.Option(
            help="Tell who owns the head under this file of accelerate config. Default: here."
        ),
    ] = None,
) -> None:
    """Report versions, devices and the backend that runs here, and check it against the oracle.

    It also says who owns the head's weight: one process, DDP, FSDP, DeepSpeed, tensor parallelism.

    With --kernels it reports registers, shared memory, spills and the matrix instruction of every
    GPU kernel. It exits with 1 if the check fails.
    """
    if arch and not kernels:
        raise typer.BadParameter("needs --kernels", param_hint="--arch")
    if kernels:
        _kernels(arch or [], as_json)
        return
    owner = owner_here() if accelerate is None else owner_of(accelerate)
    with stage("reading versions and devices"):
        found = {
            "schema": SCHEMA,
            "versions": versions(*PACKAGES),
            "missing": _missing(),
            "devices": _devices(),
            "head": owner,
        }
    with stage("checking against the oracle"):
        from str_kernels.cli.self_check import self_check

        found["choices"] = [choice for name in found["devices"] for choice in _choices(name)]
        found["checks"] = [check for name in found["devices"] for check in self_check(name)]
    if as_json:
        print_json(found)
    else:
        _show(found)
    for sentence in found["missing"]:
        say(f"missing: {sentence}")
    if not all(check["passed"] for check in found["checks"]):
        say("the fused loss disagrees with the oracle on this machine: please report this output")
        raise typer.Exit(1)
    say("next: str-kernels demo")


def _kernels(archs: list[str], as_json: bool) -> None:
    from str_kernels.cli.kernels import COLUMNS, compile_table, tables

    found = compile_table(archs)
    if as_json:
        print_json(found)
    else:
        for chip, lines in tables(found):
            print_table(f"{chip}: w warps, s stages, spilled bytes", COLUMNS, lines)
    if not all(row["fits"] for row in found["rows"]):
        say("a kernel spills registers or exceeds the chip's shared memory: please report this")
        raise typer.Exit(1)
    say("next: str-kernels doctor")


def _missing() -> list[str]:
    """Name what a faster backend needs; the package works without it."""
    found = []
    if versions("triton")["triton"] is None:
        found.append("triton, for GPU kernels (pip install triton; Linux only)")
    compilers = [os.environ.get("CC"), *COMPILERS]
    if not any(shutil.which(name) for name in compilers if name):
        found.append(f"a C compiler, which triton needs to launch kernels (none of {COMPILERS})")
    return found


def _devices() -> dict[str, str]:
    """Describe every device that torch can use, by its name."""
    import torch

    from str_kernels.backends.torch.reduce import fused_reduction
    from str_kernels.engine.cpu import this_cpu
    from str_kernels.options import LossOptions

    capability = torch.backends.cpu.get_cpu_capability()
    measured = "" if this_cpu().known else ", screens chosen by measurement"
    loops = "as torch calls" if fused_reduction(LossOptions()) is None else "compiled"
    devices = {
        "cpu": f"{platform.processor() or platform.machine()}, {capability}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, loops {loops}{measured}"
    }
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        kind = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        devices[f"cuda:{index}"] = (
            f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {kind}, capability "
            f"{facts.major}.{facts.minor}"
        )
    return devices


def _choices(name: str) -> list[dict[str, Any]]:
    """Return what the default settings choose: backend, screen, filter and products' dtype."""
    import torch

    from str_kernels.backends.selection import resolve
    from str_kernels.engine.products import product_dtype
    from str_kernels.options import LossOptions

    device = torch.device(name)
    choices = []
    for dtype in (torch.float32, torch.bfloat16):
        found = resolve(LossOptions(), "auto", dtype=dtype, device=device, indexed=True)
        products = product_dtype(dtype, device) if found.backend.name == "torch" else dtype
        choices.append(
            {
                "device": name,
                "dtype": str(dtype).removeprefix("torch."),
                "products": str(products).removeprefix("torch."),
                "backend": found.backend.name,
                "backend_reason": found.backend_reason,
                "screen": found.screen,
                "filter_eps": found.eps,
                "screen_reason": found.reason,
            }
        )
    return choices


def _show(found: dict[str, Any]) -> None:
    rows = [[name, value or "not installed"] for name, value in found["versions"].items()]
    print_table("versions", ["package", "version"], rows)
    print_table("who owns the head", ["", ""], [[n, str(x)] for n, x in found["head"].items()])
    print_table("devices", ["device", "what"], [list(item) for item in found["devices"].items()])
    columns = ["device", "dtype", "products", "backend", "screen", "filter_eps", "why"]
    print_table(
        "what runs by default, with a vocabulary index",
        columns,
        [
            [
                *(choice[name] for name in columns[:5]),
                f"{choice['filter_eps']:.3g}",
                f"{choice['backend_reason']}; {choice['screen_reason']}",
            ]
            for choice in found["choices"]
        ],
    )
    print_table(
        "self-check against the oracle: relative error",
        ["device", "what", "loss", "hidden states' gradient", "weight's gradient", ""],
        [
            [
                check["device"],
                check["what"],
                *(f"{error:.1e}" for error in check["relative_errors"].values()),
                "passed" if check["passed"] else "FAILED",
            ]
            for check in found["checks"]
        ],
    )
