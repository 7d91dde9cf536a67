"""`PatchSettings`: names and plain values of a configuration file → a patched model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from str_kernels.huggingface.constraint.positions import Positions, validate_positions
from str_kernels.huggingface.patch.install import patch_model
from str_kernels.huggingface.patch.patch import Patch
from str_kernels.options import (
    DEFAULT_KIND,
    REMOVED,
    ConstraintKind,
    SafetyConstraint,
    removed,
)
from str_kernels.safety.tokens import SafetyTokens

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_OF_THE_PATCH = ("tokens", "check_accuracy_every")


@dataclass(frozen=True)
class PatchSettings:
    """The patch as a configuration names it.

    Args:
        tokens: file of safety tokens, as ``str-kernels tokens`` writes it; None: the fused
            cross-entropy alone, and none of the following but ``check_accuracy_every``.
        strength: as in ``SafetyConstraint``.
        kind: as in ``SafetyConstraint``.
        temperature: as in ``SafetyConstraint``.
        reference: ``"adapter_off"`` or the path of a cache, as ``str-kernels cache`` writes it.
        positions: as in ``patch_model``.
        check_accuracy_every: as in ``patch_model``.

    Raises:
        ValueError: a position that there is not, or a setting of the constraint without tokens.
    """

    tokens: str | None = None
    strength: float | None = None
    kind: ConstraintKind = DEFAULT_KIND
    temperature: float = 1.0
    reference: str = "adapter_off"
    positions: Positions = "all"
    check_accuracy_every: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a file."""
        validate_positions(self.positions)
        if self.tokens is not None:
            return
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in _OF_THE_PATCH and value != field.default:
                raise ValueError(
                    f"{field.name}={value!r}: belongs to the safety constraint, which needs "
                    "tokens; make a file of them with str-kernels tokens."
                )

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> PatchSettings:
        """Settings by name; None and ``{}`` are the defaults.

        Raises:
            ValueError: not a mapping, or a name that there is not.
        """
        if config is not None and not isinstance(config, Mapping):
            raise ValueError(f"str_kernels={config!r}: must be a section of settings by name.")
        known = [field.name for field in fields(cls)]
        for name in config or {}:
            if name in REMOVED:
                raise ValueError(f"str_kernels.{removed(name)}")
            if name not in known:
                raise ValueError(f"str_kernels.{name}: is not a setting; there are {known}.")
        return cls(**(config or {}))

    def constraint(
        self, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> SafetyConstraint | None:
        """The constraint, read from the file; with a tokenizer, the ids must be its own.

        Raises:
            ValueError: no such file, another tokenizer's, or settings that do not go together.
        """
        if self.tokens is None:
            return None
        return SafetyTokens.load(self.tokens, tokenizer).constraint(
            self.strength, self.kind, temperature=self.temperature
        )

    def patch(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> Patch:
        """Patch this model; errors are those of ``constraint`` and ``patch_model``."""
        return patch_model(
            model,
            self.constraint(tokenizer),
            reference=self.reference,
            positions=self.positions,
            check_accuracy_every=self.check_accuracy_every,
        )
