"""Every launcher prepares a block's tensors as the kernels take them, and shared arguments.

Only the refinement without atomics waits for the device, since it reads one number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from str_kernels.backends.triton.launch import Launch
from str_kernels.engine.contract import Block
from str_kernels.engine.tiles import positions_of
from str_kernels.options import TILE, LossOptions

GROUP = 8  # blocks of rows that share a tile of W in L2


class Operands(NamedTuple):
    """The operands of the logits, contiguous; ``bias`` is in tile order, ``places`` `Block`'s."""

    hidden: Tensor
    weight: Tensor
    order: Tensor | None
    bias: Tensor | None
    precision: str
    options: LossOptions
    places: Tensor | None = None

    @property
    def rows(self) -> int:
        """R."""
        return self.hidden.shape[0]

    @property
    def vocab(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.hidden.shape[1]

    @property
    def tiles(self) -> int:
        """T."""
        return -(-self.vocab // TILE)


def operands(block: Block) -> Operands:
    """Make a block's tensors contiguous, which copies only a strided one, and order its bias."""
    head, order = block.head, None if block.tiles is None else block.tiles.order
    bias = head.bias
    if bias is not None:
        bias = bias.contiguous() if order is None else bias[order]
    return Operands(
        head.hidden_states.contiguous(),
        head.weight.contiguous(),
        order,
        bias,
        precision_of(),
        block.options,
        block.places,
    )


def masked_sum(logit_sum: Tensor | None, given: Operands) -> Tensor | None:
    """Make label smoothing's sum -inf where a bias is: kernels add up logits above it alone."""
    options, unmasked = given.options, logit_sum is None or given.bias is None
    if unmasked or options.softcap is not None or options.logit_scale <= 0:
        return logit_sum
    return torch.where((given.bias == -torch.inf).any(), -torch.inf, logit_sum)


def precision_of() -> str:
    """Return how fp32 operands are multiplied."""
    return "tf32" if _tf32_allowed() else "ieee"


def _tf32_allowed() -> bool:
    """Whether the user lets torch's own fp32 products use tf32; AMD has fp32 matrix units."""
    if torch.version.hip:
        return False
    settings = torch.backends.cuda.matmul
    # since torch 2.9; it must not be mixed with the older name
    if hasattr(settings, "fp32_precision"):
        return settings.fp32_precision == "tf32"
    return settings.allow_tf32


def common(given: Operands) -> dict[str, Any]:
    """Return the arguments that every kernel with logits takes."""
    options = given.options
    return {
        "vocab": given.vocab,
        "logit_scale": float(options.logit_scale),
        "dim": given.dim,
        "softcap": None if options.softcap is None else float(options.softcap),
        "precision": given.precision,
    }


def tuning(launch: Launch, blocks: str) -> dict[str, int]:
    """Return the sizes of these blocks, such as ``"RD"``, and Triton's names of the others."""
    sizes = {f"BLOCK_{block}": getattr(launch, f"block_{block.lower()}") for block in blocks}
    return {**sizes, "num_warps": launch.warps, "num_stages": launch.stages}


def label_places(block: Block) -> Tensor:
    """Return each label's place in the order, ``[R]`` int32; negative where a row has no label."""
    if block.places is not None:
        return block.places
    return positions_of(block.labels, None if block.tiles is None else block.tiles.inverse).int()
