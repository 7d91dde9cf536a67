"""The model of a plan: built from a configuration, on tensors without storage.

Stage: a name or a JSON file → `Subject`: the model with its adapter, in training mode.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from str_kernels.inputs.loading import DTYPES, library_reading, load_config, refuse_many_layers
from str_kernels.levers.windows import has_windows
from str_kernels.planning.quantised import FORMATS, quantise_body
from str_kernels.training.lora import add_lora

_MIXED = ("mixed-bfloat16", "mixed-float16")


class Subject(NamedTuple):
    """A model to count.

    Attributes:
        name: what the user called it.
        model: PEFT's wrapper; all its tensors are on the meta device.
        inner: the causal language model inside.
        config: its configuration of text.
        head: its output layer.
        dtype: the format of its body.
        rank: of the adapter.
    """

    name: str
    model: nn.Module
    inner: nn.Module
    config: PretrainedConfig
    head: nn.Module
    dtype: str
    rank: int

    @property
    def positions(self) -> int | None:
        """The longest context that the model has positions for, where its configuration says so."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def slides(self) -> bool:
        """Whether some of its layers attend in a sliding window."""
        return has_windows(self.config)

    def in_floats(self) -> Subject:
        """The same model with a body that is not quantised, and so can compute."""
        if self.dtype not in FORMATS:
            return self
        return subject_of(self.name, rank=self.rank, dtype="bfloat16")

    def bytes_of(self, *, trained: bool) -> int:
        """Bytes of the weights that are trained, or of the others, each storage once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        found = {t.untyped_storage()._cdata: t for t in tensors if t.requires_grad is trained}
        return sum(t.untyped_storage().nbytes() for t in found.values())


def read_config(model: str | os.PathLike) -> PretrainedConfig:
    """Read the configuration of a Hub id, a folder, or a JSON file.

    Raises:
        ValueError: there is none, or transformers does not know its architecture.
    """
    path, name = Path(model), f"model={os.fspath(model)!r}"
    if path.suffix != ".json":
        return load_config(model)
    with library_reading(name, "is no configuration"):
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values.pop("model_type", None) if isinstance(values, dict) else None
        if kind is None:
            raise ValueError(
                f"{name}: names no model_type; give the config.json of a transformers model."
            )
        refuse_many_layers(values, model)
        return AutoConfig.for_model(kind, **values)


def subject_of(model: str | os.PathLike, *, rank: int, dtype: str) -> Subject:
    """Build the model of a configuration on the meta device, with a LoRA adapter.

    Args:
        model: as for `read_config`.
        rank: the adapter's, on every linear layer but the head.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16``, ``float16``, ``nf4`` or
            ``int8``; the last two keep embeddings, head and norms in bf16.

    Raises:
        ValueError: an unknown configuration or dtype, or a model that cannot be built so.
    """
    if dtype in _MIXED:
        raise ValueError(
            f"dtype={dtype!r}: autocast casts no tensor without storage, so it cannot be counted; "
            "plan with float32, which is the most that it takes."
        )
    if dtype not in ("auto", *DTYPES, *FORMATS):
        raise ValueError(f"dtype={dtype!r}: must be auto, {', '.join((*DTYPES, *FORMATS))}.")
    config, name = read_config(model), os.fspath(model)
    form = dtype if dtype in FORMATS else None
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    torch_dtype = torch.bfloat16 if form else own if dtype == "auto" else DTYPES[dtype]
    torch_dtype = torch_dtype or torch.float32
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    inner = _built(config, name, torch_dtype)
    wrapped = add_lora(inner, rank=rank)
    head = inner.get_output_embeddings()
    if form:
        quantise_body(wrapped, head, form)
    inner.config.use_cache = False
    shown = form or str(torch_dtype).removeprefix("torch.")
    text = inner.config.get_text_config()
    return Subject(name, wrapped.train(), inner, text, head, shown, rank)


def _built(config: PretrainedConfig, name: str, dtype: torch.dtype) -> nn.Module:
    with (
        library_reading(
            f"model={name!r}",
            "cannot be built without its weights; give a causal language model of transformers",
        ),
        torch.device("meta"),
    ):
        inner = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if inner.get_output_embeddings() is None:
            raise ValueError("it has no output layer")
        return inner
