"""Who owns the head's weight: what launchers and accelerate's configuration tell, without a GPU.

Stage: the environment of a launched process, or a file of `accelerate config` → `Setting` → what
becomes of the head.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

PLAIN = "one process; it has the whole weight"
OWNERS = {
    "DDP": "every process has the whole weight; the loss needs nothing of the others",
    "FSDP1": "FSDP1 has it in a flat parameter: leave the head in the root unit",
    "FSDP2": "FSDP2 splits it; it is gathered for the loss, and freed again",
    "ZeRO": "DeepSpeed splits gradients and optimizer at most; every process has the whole weight",
    "ZeRO-3": "DeepSpeed's ZeRO-3 splits it; it is gathered for the loss, and freed again",
    "TP": "tensor parallelism may split its rows over processes, as the model's plan says",
}


class Setting(NamedTuple):
    """What was asked for.

    Attributes:
        processes: how many; None: the file leaves it to the launcher.
        engine: ``"FSDP"``, ``"DEEPSPEED"`` or anything else.
        version: of FSDP.
        stage: of ZeRO.
        tp: processes that share a layer.
        cp: processes that share a sequence by context parallelism.
        sp: the same by Ulysses.
    """

    processes: int | None = 1
    engine: str = ""
    version: int = 1
    stage: int = 0
    tp: int = 1
    cp: int = 1
    sp: int = 1

    @property
    def owner(self) -> str:
        """The short name of who owns the head."""
        if self.tp > 1:
            return "TP"
        if self.engine == "DEEPSPEED":
            return "ZeRO-3" if self.stage == 3 else "ZeRO"
        if self.engine == "FSDP":
            return f"FSDP{self.version}"
        return "plain" if self.processes == 1 else "DDP"

    def facts(self, source: str) -> dict[str, Any]:
        """The owner, what it does with the head, and with sequences; JSON values."""
        split = {"cp_size": self.cp, "sp_size": self.sp}
        sizes = [f"{name}={size}" for name, size in split.items() if size > 1]
        return {
            "source": source,
            "processes": self.processes,
            "owner": self.owner,
            "head": OWNERS.get(self.owner, PLAIN),
            "sequences": f"split over processes, {sizes[0]}" if sizes else "whole",
        }


def owner_here(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Who owns the head in a process that is launched like this one."""

    def number(name: str, default: int = 1) -> int:
        return _number(environment.get(name), default)

    def asked(name: str) -> bool:
        return environment.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1")

    engine = next((name for name in ("DEEPSPEED", "FSDP") if asked(name)), "")
    processes = number("WORLD_SIZE") if "RANK" in environment else 1
    sizes = {name: number(f"PARALLELISM_CONFIG_{name.upper()}_SIZE") for name in ("tp", "cp", "sp")}
    stage = number("ACCELERATE_DEEPSPEED_ZERO_STAGE", 0)
    found = Setting(processes, engine, number("FSDP_VERSION"), stage, **sizes)
    return found.facts("this process's environment")


def owner_of(path: Path) -> dict[str, Any]:
    """Who owns the head in the processes that ``accelerate launch --config_file`` starts.

    Raises:
        ValueError: no such file, or not one of `accelerate config`.
    """
    import yaml  # comes with accelerate

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"accelerate={str(path)!r}: cannot be read ({error}).") from error
    if not isinstance(read, dict) or "distributed_type" not in read:
        raise ValueError(
            f"accelerate={str(path)!r}: has no distributed_type; give a file that accelerate "
            "config wrote."
        )
    fsdp, deepspeed, parallel = (
        read.get(f"{name}_config") or {} for name in ("fsdp", "deepspeed", "parallelism")
    )
    sizes = {
        name: _number(parallel.get(f"parallelism_config_{name}_size"), 1)
        for name in ("tp", "cp", "sp")
    }
    kind = str(read["distributed_type"]).upper()
    single = kind == "NO"
    processes = 1 if single else read.get("num_processes")
    version, stage = fsdp.get("fsdp_version"), deepspeed.get("zero_stage")
    found = Setting(processes, kind, _number(version, 1), _number(stage, 0), **sizes)
    return found.facts(str(path))


def _number(given: Any, default: int) -> int:
    return int(given) if str(given).isdecimal() else default
