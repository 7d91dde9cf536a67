"""The levers of a plan: which are on, what each costs, and the order in which they are tried."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Levers:
    """What a step does to need less memory.

    Args:
        fused_head: the loss is computed from the hidden states, and no logits are stored.
        gradient_checkpointing: each layer keeps its input alone, and is computed again in the
            backward.
        tile_tokens: a module that treats each token alone runs over so many tokens at a time.
        offload: the inputs that checkpointing keeps wait in the host's memory.
    """

    fused_head: bool = False
    gradient_checkpointing: bool = False
    tile_tokens: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        tile = self.tile_tokens
        if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
            raise ValueError(f"tile_tokens={tile!r}: must be a positive integer or None.")
        if self.offload and not self.gradient_checkpointing:
            raise ValueError(
                "offload=True: says where checkpoints wait, and there are none; set "
                "gradient_checkpointing=True too."
            )

    @property
    def names(self) -> list[str]:
        """The names of those that are on."""
        return [field.name for field in fields(self) if getattr(self, field.name)]

    @property
    def words(self) -> str:
        """The levers in a table."""
        return " + ".join(_WORDS[name] for name in self.names) or "none"


_WORDS = {
    "fused_head": "fused head",
    "gradient_checkpointing": "checkpoints",
    "tile_tokens": "tiles",
    "offload": "offload",
}
COSTS = {
    "fused_head": "takes no more time than the model's own head",
    "gradient_checkpointing": "computes each layer's forward once more",
    "tile_tokens": "computes the inside of its modules once more",
    "offload": "copies each layer's input to the host and back",
}


def ladder(tile_tokens: int) -> list[Levers]:
    """Sets of levers, the cheapest in time first."""
    fused = Levers(fused_head=True)
    kept = Levers(fused_head=True, gradient_checkpointing=True)
    tiled = Levers(fused_head=True, gradient_checkpointing=True, tile_tokens=tile_tokens)
    away = Levers(fused_head=True, gradient_checkpointing=True, offload=True)
    every = Levers(True, True, tile_tokens, True)
    return [Levers(), fused, Levers(gradient_checkpointing=True), kept, away, tiled, every]
