"""`PatchCallback`: patches the trainer's model while it trains.

For LLaMA-Factory, whose ``run_exp`` takes callbacks, this is one line with its usual file::

    python -c "from llamafactory.train.tuner import run_exp; from str_kernels.integrations import \
PatchCallback; run_exp(callbacks=[PatchCallback(tokens='safety_tokens.json')])" sft.yaml
"""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import ExportableState

from str_kernels.huggingface.patch.callback import SafetyLogCallback
from str_kernels.integrations.settings import PatchSettings


class PatchCallback(SafetyLogCallback, ExportableState):
    """Patches the model when training begins, logs, and takes the patch off at the end.

    After a training that an error ended, the patch stays on until the next one begins.

    Args:
        config: the settings of ``PatchSettings``, by name.

    Raises:
        ValueError: a setting that there is not, a token file that cannot be read. When training
            begins: whatever ``patch_model`` refuses, or a token file of another tokenizer.
    """

    def __init__(self, **config: Any) -> None:
        """Read the settings and the token file now, rather than after the model has loaded."""
        super().__init__()
        self._config = config
        self._settings = PatchSettings.from_config(config)
        self._settings.read_constraint()

    def state(self) -> dict:
        """For the trainer's checkpoint: what it takes to make this callback again."""
        return {"args": self._config, "attributes": {}}

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Patch."""
        self._unpatch()
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._patch = self._settings.patch(model, tokenizer)
        # the trainer renews only the entries that it finds, and an older checkpoint has none
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Unpatch."""
        self._unpatch()

    def _unpatch(self) -> None:
        if self._patch is not None:
            self._patch.unpatch()
        self._patch = None
