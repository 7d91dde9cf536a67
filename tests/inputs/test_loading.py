"""Models by name, and the mistakes a user makes with one."""

import json

import pytest
import torch

from str_kernels.inputs.loading import load_model, load_model_and_tokenizer
from str_kernels.planning.subject import read_config


def test_a_saved_folder_loads(tiny_model_dir):
    """A local folder gives a model in eval mode and a tokenizer that can pad."""
    model, tokenizer = load_model_and_tokenizer(tiny_model_dir, device="cpu")
    assert not model.training
    assert tokenizer.pad_token_id is not None
    assert model.get_output_embeddings().weight.shape[0] == len(tokenizer)


def test_dtype_by_name(tiny_model_dir):
    """The dtype is the one that was named; an unknown one is refused by name."""
    model, _ = load_model_and_tokenizer(tiny_model_dir, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype='int3'"):
        load_model_and_tokenizer(tiny_model_dir, dtype="int3")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "missing.gguf"])
def test_a_missing_path_is_named(name):
    """A path that does not exist is not mistaken for a Hub id."""
    with pytest.raises(ValueError, match=f"model='{name}': no such file or folder"):
        load_model_and_tokenizer(name)


def test_a_folder_without_a_model(tmp_path):
    """An empty folder and an adapter's folder are told apart."""
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model_and_tokenizer(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter, not a model"):
        load_model_and_tokenizer(tmp_path)


def test_remote_code_is_never_run(tmp_path):
    """A model that brings code is refused, and its code is not run."""
    config = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("open(__file__ + '.ran', 'w')\nclass EvilConfig: pass\n")
    with pytest.raises(ValueError, match="needs code that comes with it, which is never run"):
        load_model_and_tokenizer(tmp_path)
    assert not list(tmp_path.glob("*.ran"))


def test_a_missing_adapter_is_named(tiny_model_dir, tmp_path):
    """An adapter folder without an adapter is refused before the model is loaded."""
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
        load_model_and_tokenizer(tiny_model_dir, adapter=tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_damaged_number_of_layers_is_refused(tiny_model_dir, tmp_path, model_type):
    """One that no model has is named before anything is built of it, a list of layers too."""
    config = json.loads((tiny_model_dir / "config.json").read_text())
    config |= {"num_hidden_layers": 99_999_999_999, "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_model, load_model_and_tokenizer, read_config):
        with pytest.raises(ValueError, match="num_hidden_layers=99999999999"):
            load(tmp_path)
    with pytest.raises(ValueError, match="num_hidden_layers=99999999999"):
        read_config(tmp_path / "config.json")
