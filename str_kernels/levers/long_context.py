"""`LongContext`: which levers a model gets; they are applied to one instance and undone.

::

    gradient_checkpointing ──▶ a layer keeps its input, and is computed again in the backward
        offload ─────────────▶ that input waits in the host's memory, or on disk
    tile_tokens ─────────────▶ an MLP runs over so many tokens at a time, and keeps its input
        tile_all ────────────▶ so do projections with an adapter, and norms
    window_attention ────────▶ sliding windows attend block by block, without a mask [T, T]

No lever changes a loss or a gradient beyond rounding, and none knows the name of a model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from str_kernels.levers.applied import Applied

PLACES = ("cpu", "disk")


@dataclass(frozen=True)
class LongContext:
    """The levers that are on; ``apply`` gives them to a model.

    Args:
        gradient_checkpointing: each layer keeps its input alone, and is computed again in the
            backward.
        offload: where these inputs wait: ``"cpu"`` (the host's memory, pinned beside a GPU),
            ``"disk"`` (files without a name, in the folder of temporary files, which ``TMPDIR``
            names), or None (the device).
        tile_tokens: a module that treats each token alone runs over so many tokens at a time and
            keeps its input alone; None: over all at once. Such modules are found by trying. They
            are those with an inside, such as an MLP.
        tile_all: with ``tile_tokens``, also those whose backward keeps more than half as many bytes
            beside their input: a projection with LoRA, which computes in fp32, or a norm.
        window_attention: the layers with a sliding window attend in blocks of one window, where no
            token of a batch is padding; the model's attention must be torch's ("sdpa").

    Raises:
        ValueError: values outside these rules.
    """

    gradient_checkpointing: bool = False
    offload: str | None = None
    tile_tokens: int | None = None
    window_attention: bool = False
    tile_all: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.offload is not None and self.offload not in PLACES:
            raise ValueError(f"offload={self.offload!r}: must be None, 'cpu' or 'disk'.")
        if self.offload is not None and not self.gradient_checkpointing:
            raise ValueError(
                f"offload={self.offload!r}: says where checkpoints wait, and there are none; set "
                "gradient_checkpointing=True too."
            )
        tile = self.tile_tokens
        if tile is not None and (not isinstance(tile, int) or isinstance(tile, bool) or tile < 1):
            raise ValueError(f"tile_tokens={tile!r}: must be a positive integer or None.")
        if self.tile_all and tile is None:
            raise ValueError("tile_all=True: there are no tiles; set tile_tokens too.")

    def apply(self, model: nn.Module) -> Applied:
        """Switch the levers on for this model; ``undo()`` of the result switches them off.

        Apply them when the model is complete: on its device, with its adapters. Leave a trainer's
        own gradient checkpointing off, or give it the same setting. A patch may come before or
        after.

        Raises:
            ValueError: a lever that this model does not allow, or levers that it has already; the
                model is as it was.
        """
        from str_kernels.levers.applied import Applied  # imports torch, which settings do not

        return Applied(model, **asdict(self))
