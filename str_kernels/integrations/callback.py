"""`PatchCallback`: patches the trainer's model while it trains.

LLaMA-Factory, whose ``run_exp`` takes callbacks, needs one line with its usual file::

    python -c "from llamafactory.train.tuner import run_exp; from str_kernels.integrations import \
PatchCallback; run_exp(callbacks=[PatchCallback(tokens='safety_tokens.json')])" sft.yaml
"""

from __future__ import annotations

from typing import Any

from str_kernels.huggingface.patch.callback import SafetyLogCallback
from str_kernels.integrations.settings import PatchSettings


class PatchCallback(SafetyLogCallback):
    """Patches the model when training begins, logs, and unpatches it at the end.

    When an error ends a training, the patch stays until the next training begins.

    Args:
        config: the settings of ``PatchSettings``, by name.

    Raises:
        ValueError: a setting is unknown, or the token file cannot be read. When training begins:
            ``patch_model`` refuses the model, or the tokens belong to another tokenizer.
    """

    def __init__(self, **config: Any) -> None:
        """Read the settings and the token file now, rather than after the model has loaded."""
        super().__init__()
        self._config = config
        self._settings = PatchSettings.from_config(config)
        self._settings.read_constraint()

    def state(self) -> dict:
        """Return what a checkpoint needs to make this callback again, and to go on."""
        return {**super().state(), "args": self._config}

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Patch the model."""
        self._unpatch()
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._patch = self._settings.patch(model, tokenizer)
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Unpatch the model."""
        self._unpatch()

    def _unpatch(self) -> None:
        if self._patch is not None:
            self._patch.unpatch()
        self._patch = None
