"""The levers of a plan: which are on, what each costs, and the order in which they are tried."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from str_kernels.levers import LongContext

TILE_TOKENS = 2048


@dataclass(frozen=True)
class Levers:
    """What a step does to need less memory: the levers of ``LongContext``, and the head's.

    Args:
        gradient_checkpointing: as in ``LongContext``, like the next two.
        offload: ``"cpu"``, ``"disk"`` or None.
        tile_tokens: a number of tokens or None.
        fused_head: the loss is computed from the hidden states, and no logits are stored.
        window_attention: as in ``LongContext``, like the next.
        tile_all: needs ``tile_tokens``.

    Raises:
        ValueError: values outside the rules of ``LongContext``.
    """

    gradient_checkpointing: bool = False
    offload: str | None = None
    tile_tokens: int | None = None
    fused_head: bool = False
    window_attention: bool = False
    tile_all: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        _ = self.body

    @property
    def body(self) -> LongContext:
        """Those that are applied to the body."""
        return LongContext(**{f.name: getattr(self, f.name) for f in fields(LongContext)})

    @property
    def names(self) -> list[str]:
        """The names of those that are on, as the options of the command line call them."""
        return [name for name in COSTS if getattr(self, name)]

    @property
    def words(self) -> str:
        """The levers in a table."""
        return " + ".join(_WORDS[name] for name in self.names) or "none"


_WORDS = {
    "fused_head": "fused head",
    "gradient_checkpointing": "checkpoints",
    "offload": "offload",
    "tile_tokens": "tiles",
    "tile_all": "projections",
    "window_attention": "windows",
}
COSTS = {
    "fused_head": "takes no more time than the model's own head",
    "gradient_checkpointing": "computes the forward of each layer once more",
    "offload": "copies the input of each layer to the host and back",
    "tile_tokens": "computes the inside of each MLP once more",
    "tile_all": "computes each projection that has an adapter once more, and each norm",
    "window_attention": "takes less time than a mask, and works in batches without padding alone",
}


def ladder(device: str, tile_tokens: int = TILE_TOKENS, *, windows: bool = False) -> list[Levers]:
    """Sets of levers, the cheapest in time first; the CPU offloads to disk, not to itself.

    With ``windows`` each set that trains long contexts is followed by the same in windows.
    """
    away = "disk" if device == "cpu" else "cpu"
    least = Levers(gradient_checkpointing=True, fused_head=True)
    long = [
        least,
        replace(least, offload=away),
        replace(least, tile_tokens=tile_tokens),
        replace(least, offload=away, tile_tokens=tile_tokens),
        replace(least, offload=away, tile_tokens=tile_tokens, tile_all=True),
    ]
    if windows:
        long = [y for x in long for y in (x, replace(x, window_attention=True))]
    short = [Levers(), Levers(fused_head=True), Levers(gradient_checkpointing=True)]
    return [*short, *long]
