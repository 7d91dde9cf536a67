"""A plugin for Axolotl: it patches the model as a section of the configuration file says.

::

    plugins:
      - str_kernels.integrations.axolotl.StrKernelsPlugin
    str_kernels:
      tokens: safety_tokens.json
      positions: all
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from str_kernels.huggingface.patch.patch import Patch
from str_kernels.integrations.settings import PatchSettings

# Axolotl has loaded its base class by then, which answers the hooks that are not here.
_base = sys.modules.get("axolotl.integrations.base")
_BasePlugin = object if _base is None else _base.BasePlugin

# Axolotl's other losses replace the one that the patch fuses.
_OTHER_LOSSES = (
    "cut_cross_entropy",
    "chunked_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "unsloth_cross_entropy_loss",
)


class StrKernelsPlugin(_BasePlugin):
    """Patches the model after it and its adapter are loaded, with ``PatchSettings``."""

    def __init__(self) -> None:
        super().__init__()
        self._patch: Patch | None = None

    def get_input_args(self) -> str:
        """Name the schema of the section."""
        return "str_kernels.integrations.axolotl_args.StrKernelsArgs"

    def pre_model_load(self, cfg: Mapping[str, Any]) -> None:
        """Check the settings and the token file before the model, which is slow to load.

        Raises:
            ValueError: a setting or the token file is wrong, another loss is on, or preference
                training has a constraint.
        """
        constraint = _settings(cfg).read_constraint()
        for name in _OTHER_LOSSES:
            if cfg.get(name):
                raise ValueError(
                    f"{name}={cfg.get(name)!r}: computes the loss that str_kernels fuses; turn one "
                    "of the two off."
                )
        if cfg.get("rl") and constraint is not None:
            raise ValueError(
                f"rl={cfg.get('rl')!r}: has no cross-entropy to which the constraint can be added; "
                "leave str_kernels.tokens out."
            )

    def post_model_load(self, cfg: Mapping[str, Any], model: Any) -> None:
        """Patch the model, with or without an adapter."""
        self._patch = _settings(cfg).patch(model)

    def add_callbacks_post_trainer(self, cfg: Mapping[str, Any], trainer: Any) -> list:
        """Add nothing, for a trainer logs by itself; check the tokens.

        Raises:
            ValueError: the tokens belong to another tokenizer than the trainer's.
        """
        if self._patch is not None:
            processor = getattr(trainer, "processing_class", None)
            _settings(cfg).read_constraint(getattr(processor, "tokenizer", processor))
        return []

    def post_train(self, cfg: Mapping[str, Any], model: Any) -> None:
        """Unpatch the model."""
        if self._patch is not None:
            self._patch.unpatch()
        self._patch = None


def _settings(cfg: Mapping[str, Any]) -> PatchSettings:
    return PatchSettings.from_config(cfg.get("str_kernels"))
