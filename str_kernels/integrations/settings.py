"""`PatchSettings`: names and plain values of a configuration file → a patched model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from str_kernels.huggingface.patch.install import patch_model
from str_kernels.huggingface.patch.patch import Patch
from str_kernels.options import REMOVED, SafetyConstraint, removed
from str_kernels.safety.tokens import SafetyTokens
from str_kernels.settings import CONSTRAINT_NAMES, ConstraintSettings, setting


@dataclass(frozen=True)
class PatchSettings(ConstraintSettings):
    """The patch as a configuration names it: the constraint's settings, and these.

    Raises:
        ValueError: a value outside its rule, or a setting of the constraint without tokens.
    """

    tokens: str | None = setting(
        None, "Safety tokens file (str-kernels tokens); default: the fused cross-entropy alone."
    )
    check_accuracy_every: int | None = setting(
        None, "Training losses between two checks of the filter's accuracy; default: none."
    )

    def faults(self) -> list[str]:
        """Return a sentence for each value outside its rule, and for settings without tokens."""
        unused = [
            f"{name}={getattr(self, name)!r}: belongs to the safety constraint, which needs "
            "tokens; make a file of them with str-kernels tokens."
            for name in CONSTRAINT_NAMES
            if self.tokens is None and getattr(self, name) != getattr(ConstraintSettings, name)
        ]
        return super().faults() + unused

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> PatchSettings:
        """Read settings by name; None and ``{}`` are the defaults.

        Raises:
            ValueError: not a mapping, or a name that is no setting.
        """
        if config is not None and not isinstance(config, Mapping):
            raise ValueError(f"str_kernels={config!r}: must be a section of settings by name.")
        known = [field.name for field in fields(cls)]
        for name in config or {}:
            if name in REMOVED:
                raise ValueError(f"str_kernels.{removed(name)}")
            if name not in known:
                raise ValueError(f"str_kernels.{name}: is not a setting; choose one of {known}.")
        return cls(**(config or {}))

    def read_constraint(
        self, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> SafetyConstraint | None:
        """Make the constraint on the tokens in the file; a tokenizer must be the tokens' own.

        Raises:
            ValueError: no such file, another tokenizer's, or tokens that do not fit the kind.
        """
        if self.tokens is None:
            return None
        return self.constraint(SafetyTokens.load(self.tokens, tokenizer).token_ids)

    def patch(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> Patch:
        """Patch this model; errors are those of ``read_constraint`` and ``patch_model``."""
        safety = self.read_constraint(tokenizer)
        every = self.check_accuracy_every
        return patch_model(model, safety, **self.of_the_patch, check_accuracy_every=every)
