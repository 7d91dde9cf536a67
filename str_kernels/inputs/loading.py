"""Models and tokenizers by name: a Hub id, a local folder, or a GGUF file.

Code that comes with a model never runs: ``trust_remote_code`` is always False.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from str_kernels.inputs.template import ensure_chat_template

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_MOST_LAYERS = 10_000  # no model has a tenth of them; a damaged number would fill the memory
_LAYERS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer"}
_LAYERS |= {"encoder_layers", "decoder_layers"}
_OWN = re.compile(r"\w+=")  # how an error of this package begins


def load_model_and_tokenizer(
    model: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    adapter: str | os.PathLike | None = None,
    device: str = "auto",
) -> tuple[torch.nn.Module, Tokenizer]:
    """Load a causal language model, in eval mode, and its tokenizer with a padding token.

    Args:
        model: a Hub id, a folder that ``save_pretrained`` wrote, or a ``.gguf`` file.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype; None keeps the
            checkpoint's own (fp32 for GGUF, whose weights are dequantised).
        adapter: a PEFT adapter, Hub id or folder, to put on the model.
        device: a torch device name; ``"auto"`` takes the accelerator if one is present.

    Raises:
        ValueError: the model or the adapter does not exist or needs code of its own, or the dtype
            or the device is unknown.
    """
    target, torch_dtype = resolve_device(device), resolve_dtype(dtype)
    if adapter is not None:
        check_adapter(adapter)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype=torch_dtype)
    if adapter is not None:
        loaded = _with_adapter(loaded, adapter)
    return loaded.to(target).eval(), tokenizer


def load_config(model: str | os.PathLike) -> PretrainedConfig:
    """Load the configuration of a model, without its weights.

    Raises:
        ValueError: there is none, it needs code of its own, or it asks for too many layers.
    """
    source, gguf = _source(model)
    if not gguf:
        with library_reading(f"model={os.fspath(model)!r}", "cannot be loaded"):
            refuse_many_layers(PretrainedConfig.get_config_dict(source)[0], model)
    return _from_pretrained(AutoConfig, model)


def refuse_many_layers(values: Any, model: str | os.PathLike) -> None:
    """Refuse a configuration's JSON with more layers than any model has.

    It comes before the configuration itself, which may list each layer.

    Raises:
        ValueError: a number of layers, of the model or of a part of it, is too large.
    """
    for name, value in values.items() if isinstance(values, dict) else ():
        if name in _LAYERS and isinstance(value, int) and value > _MOST_LAYERS:
            raise ValueError(
                f"model={os.fspath(model)!r}: {name}={value} in its configuration; must be at most "
                f"{_MOST_LAYERS:,}."
            )
        if isinstance(value, dict):
            refuse_many_layers(value, model)


def load_tokenizer(model: str | os.PathLike) -> Tokenizer:
    """Load the tokenizer of a model, with a padding token and a chat template."""
    load_config(model)  # names a model that needs code of its own before anything else is read
    tokenizer = _from_pretrained(AutoTokenizer, model)
    with library_reading(f"model={os.fspath(model)!r}", "its tokenizer cannot encode text"):
        tokenizer("text", truncation=False)
    ensure_pad_token(tokenizer)
    ensure_chat_template(tokenizer)
    return tokenizer


def load_model(
    model: str | os.PathLike, *, dtype: str | torch.dtype | None = None, **keywords: Any
) -> torch.nn.Module:
    """Load the model alone, in eval mode on the CPU; arguments as `load_model_and_tokenizer`.

    ``keywords`` are transformers' own, such as a ``quantization_config``.
    """
    _, gguf = _source(model)
    if not gguf:
        load_config(model)  # a damaged one is refused before anything is built
    torch_dtype = resolve_dtype(dtype) or (torch.float32 if gguf else "auto")
    loaded = _from_pretrained(AutoModelForCausalLM, model, dtype=torch_dtype, **keywords).eval()
    if gguf:  # dequantised by now: an ordinary model, which can be saved
        loaded.hf_quantizer = None
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
    return loaded


def _from_pretrained(auto: Any, model: str | os.PathLike, **keywords: Any) -> Any:
    (source, gguf), name = _source(model), os.fspath(model)
    with library_reading(f"model={name!r}", "cannot be loaded"):
        try:
            return auto.from_pretrained(source, trust_remote_code=False, **gguf, **keywords)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ValueError(
                f"model={name!r}: needs code that comes with it, which is never run here; use a "
                "model that transformers has built in."
            ) from error


@contextmanager
def library_reading(name: str, fault: str) -> Iterator[None]:
    """Raise whatever a library's reader raises as a ValueError that begins with ``name``.

    The readers check little: a damaged file ends in an AttributeError or KeyError somewhere inside,
    and tokenizers raise bare Exceptions. Only a lack of memory is not the file's fault.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = str(error)
        if isinstance(error, ValueError) and _OWN.match(told):
            raise
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{name}: {fault}; {kind}{told}") from error


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the torch dtype of a name; None stays None."""
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def resolve_device(device: str) -> torch.device:
    """Return the device of a name; ``"auto"`` is CUDA (or ROCm), else MPS, else the CPU."""
    if device == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device("cuda" if torch.cuda.is_available() else mps)
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        rule = "not a torch device, such as cpu or cuda:0."
        raise ValueError(f"device={device!r}: {rule}") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch finds no GPU here; use cpu.")
    return resolved


def ensure_pad_token(tokenizer: Tokenizer) -> None:
    """Give a tokenizer without a padding token the end-of-text token for it.

    Padding is always masked by position and never recognised by its id, so that any token will do.
    """
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise ValueError("tokenizer has no padding, end or unknown token: set pad_token in it.")
        tokenizer.pad_token = substitute


def _source(model: str | os.PathLike) -> tuple[str, dict[str, str]]:
    """Return what ``from_pretrained`` wants: a folder or Hub id, and the GGUF file in it."""
    path, name = Path(model), os.fspath(model)
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_file():
        fault = "is a file; must be a model folder, a Hub id or a .gguf file."
    elif path.is_dir() and (path / "config.json").is_file():
        return name, {}
    elif (path / "adapter_config.json").is_file():
        rule = "name its base model here and this folder as the adapter."
        name, fault = str(path), f"holds an adapter, not a model; {rule}"
    elif path.is_dir():
        name, fault = str(path), "holds no config.json, so it is not a model folder."
    elif path.suffix == ".gguf" or not _HUB_ID.fullmatch(name):
        fault = "no such file or folder."
    else:
        return name, {}
    raise ValueError(f"model={name!r}: {fault}")


def check_adapter(adapter: str | os.PathLike) -> None:
    """Check that this is an adapter's folder, or may be a Hub id of one."""
    path = Path(adapter)
    if path.is_dir():
        if not (path / "adapter_config.json").is_file():
            raise ValueError(f"adapter={str(path)!r}: holds no adapter_config.json.")
    elif path.is_file() or not _HUB_ID.fullmatch(os.fspath(adapter)):
        raise ValueError(f"adapter={os.fspath(adapter)!r}: no such folder.")


def _with_adapter(model: torch.nn.Module, adapter: str | os.PathLike) -> torch.nn.Module:
    from peft import PeftModel

    with library_reading(f"adapter={os.fspath(adapter)!r}", "cannot be put on this model"):
        return PeftModel.from_pretrained(model, os.fspath(adapter))


def merge_adapter(model: torch.nn.Module, adapter: str | os.PathLike) -> torch.nn.Module:
    """Return the model with a PEFT adapter in its weights, and no adapter left.

    Raises:
        ValueError: the adapter does not exist, or consists of soft prompts.
    """
    from peft.tuners.tuners_utils import BaseTuner

    check_adapter(adapter)
    wrapped = _with_adapter(model, adapter)
    if not isinstance(wrapped.base_model, BaseTuner):
        raise ValueError(
            f"adapter={os.fspath(adapter)!r}: soft prompts cannot be merged into weights."
        )
    return wrapped.merge_and_unload().eval()
