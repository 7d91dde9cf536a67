"""Whether a sequence is split over processes, whose positions then cannot be weighed here.

Stage: the arguments of a forward, and what frameworks say of themselves → an error, or nothing.

A position's weight needs the number of labels and positions of its whole sequence. Accelerate's
context and sequence parallelism and DeepSpeed's Ulysses tell of themselves. Another split is seen
only by a process whose part has position ids and no beginning.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from str_kernels import waits
from str_kernels.settings import Positions


def refuse_split(arguments: Mapping[str, Any], positions: Positions) -> None:
    """Refuse a part of a sequence; on a GPU what its position ids show is an error of a later call.

    Raises:
        ValueError: the sequence is split over processes.
    """
    owner = _of_accelerate() or _of_deepspeed()
    if owner is not None:
        _refuse(owner, positions)
    ids = arguments.get("position_ids")
    if arguments.get("shift_labels") is None or not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    without = (ids != 0).all()
    if not waits.allowed(ids.device):
        waits.judge_later(without, lambda: _refuse("no position id is 0", positions))
    elif without:
        _refuse("no position id is 0", positions)


def _refuse(why: str, positions: Positions) -> None:
    raise ValueError(
        f"positions={positions!r}: the sequence is split over processes ({why}), and a weight "
        "needs the whole of it: use positions='labels', or position_weights in the batch."
    )


def _of_accelerate() -> str | None:
    state = sys.modules.get("accelerate.state")
    config = state and state.AcceleratorState._shared_state.get("parallelism_config")
    for kind, name in (("cp", "context"), ("sp", "sequence")):
        if getattr(config, f"{kind}_enabled", False):
            return f"accelerate's {name} parallelism, {kind}_size={getattr(config, f'{kind}_size')}"
    return None


def _of_deepspeed() -> str | None:
    groups = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    if groups is None or groups._SEQUENCE_PARALLEL_GROUP is None:
        return None
    return "DeepSpeed's Ulysses"
