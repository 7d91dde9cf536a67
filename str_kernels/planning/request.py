"""`Request`: what is planned, checked as far as no configuration is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from str_kernels.options import MAX_SAFETY_TOKENS

GIB = 1 << 30
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class Request:
    """What is planned.

    Args:
        model: a Hub id, a folder, or the JSON file of a configuration.
        context: tokens in a sequence.
        memory: GiB of the device; None: nothing has to fit.
        batch: sequences in a forward.
        rank: of the LoRA adapter on every linear layer but the head.
        dtype: of the body: auto, float32, bfloat16, float16, nf4 or int8.
        device: ``"cuda"`` or ``"cpu"``: whose kernels run.
        processes: data-parallel processes; each has the whole model.
        safety_tokens: of the constraint; 0: there is none, nor a reference pass.

    Raises:
        ValueError: a value outside its rule.
    """

    model: str
    context: int
    memory: float | None = None
    batch: int = 1
    rank: int = 16
    dtype: str = "auto"
    device: str = "cuda"
    processes: int = 1
    safety_tokens: int = 64

    def __post_init__(self) -> None:
        """Check what needs no configuration."""
        for name in ("context", "batch", "rank", "processes"):
            _require_count(name, getattr(self, name), 2 if name == "context" else 1)
        _require_count("safety_tokens", self.safety_tokens, 0)
        if self.safety_tokens > MAX_SAFETY_TOKENS:
            raise ValueError(
                f"safety_tokens={self.safety_tokens}: must be at most {MAX_SAFETY_TOKENS}."
            )
        if self.device not in DEVICES:
            raise ValueError(f"device={self.device!r}: must be one of {', '.join(DEVICES)}.")
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"memory={self.memory!r}: must be a positive number of GiB.")

    @property
    def room(self) -> int | None:
        """Bytes of the device."""
        return None if self.memory is None else round(self.memory * GIB)


def _require_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {least}.")
