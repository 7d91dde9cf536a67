"""The Axolotl plugin, driven by a stand-in that calls its hooks as Axolotl does."""

from __future__ import annotations

import importlib
import sys
import types

import pytest

from str_kernels.huggingface.patch.install import find_patch
from str_kernels.integrations import axolotl as plugin_module
from tests.huggingface.trainers import lora_model
from tests.integrations.programs import BasePlugin, Config, axolotl, logs_of, trainer_of
from tests.tiny import word_tokenizer


@pytest.fixture
def plugin(monkeypatch):
    """Loaded as Axolotl loads it, whose base class is there by then."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    yield importlib.reload(plugin_module).StrKernelsPlugin()
    monkeypatch.undo()
    importlib.reload(plugin_module)


def test_it_trains_with_the_constraint(plugin, tokens, tmp_path):
    """Two steps: both terms are logged, the penalty counts, the patch is gone afterwards."""
    cfg = Config(str_kernels={"tokens": tokens, "strength": 3.0, "positions": 2})
    trainer = axolotl(plugin, cfg, tmp_path)
    logs = logs_of(trainer)
    assert len(logs) == 2
    assert logs[1]["safety_penalty"] > 0
    for log in logs:
        total = log["cross_entropy"] + log["safety_penalty"]
        assert total == pytest.approx(log["loss"], rel=1e-3)
    assert find_patch(trainer.model) is None


def test_without_a_section_the_loss_is_fused_alone(plugin, tmp_path):
    """No tokens, no penalty."""
    logs = logs_of(axolotl(plugin, Config(), tmp_path))
    assert [log["safety_penalty"] for log in logs] == [0.0, 0.0]


def test_every_other_hook_is_the_bases(plugin):
    """Also one that this plugin has never heard of."""
    assert isinstance(plugin, BasePlugin)
    assert plugin.get_training_args(Config()) is None


def test_it_needs_no_axolotl():
    """Without Axolotl the class can be imported and made."""
    assert "axolotl" not in sys.modules
    assert plugin_module.StrKernelsPlugin().add_callbacks_post_trainer(Config(), None) == []


@pytest.mark.parametrize(
    ("cfg", "match"),
    [
        ({"str_kernels": {"strenght": 1}}, r"str_kernels\.strenght: is not a setting.*strength"),
        ({"str_kernels": [1]}, r"str_kernels=\[1\]: must be a section"),
        ({"str_kernels": {"strength": 2.0}}, r"strength=2\.0: .*needs tokens"),
        ({"str_kernels": {"positions": "some"}}, "positions='some'"),
        ({"str_kernels": {"tokens": "nowhere.json"}}, r"nowhere\.json"),
        ({"cut_cross_entropy": True}, "cut_cross_entropy=True"),
        ({"liger_fused_linear_cross_entropy": True}, "liger_fused_linear_cross_entropy=True"),
    ],
)
def test_faults_come_before_the_model(plugin, cfg, match):
    """A wrong setting or another loss is refused by name, before anything slow."""
    with pytest.raises(ValueError, match=match):
        plugin.pre_model_load(Config(cfg))


def test_preference_training(plugin, tokens):
    """It has no loss for the constraint: refused with one, let alone without."""
    with pytest.raises(ValueError, match="rl='dpo'"):
        plugin.pre_model_load(Config(rl="dpo", str_kernels={"tokens": tokens}))
    plugin.pre_model_load(Config(rl="dpo"))


def test_tokens_of_another_tokenizer(plugin, tokens, tmp_path):
    """Refused when the trainer, with its tokenizer, is there."""
    cfg = Config(str_kernels={"tokens": tokens})
    model = lora_model()
    plugin.post_model_load(cfg, model)
    trainer = trainer_of(model, tmp_path)
    trainer.processing_class = word_tokenizer(["other", "words"])
    with pytest.raises(ValueError, match="tokenizer"):
        plugin.add_callbacks_post_trainer(cfg, trainer)
    plugin.post_train(cfg, model)


def test_the_schema_joins_axolotls(plugin):
    """Its section is one field beside Axolotl's own, checked when the file is read."""
    pydantic = pytest.importorskip("pydantic")
    module, name = plugin.get_input_args().rsplit(".", 1)
    schema = getattr(importlib.import_module(module), name)

    class Own(pydantic.BaseModel):
        base_model: str

    class Joined(Own, schema):
        pass

    read = Joined(base_model="m", str_kernels={"check_accuracy_every": 50})
    assert read.model_dump() == {"base_model": "m", "str_kernels": {"check_accuracy_every": 50}}
    assert Joined(base_model="m").str_kernels is None
    with pytest.raises(pydantic.ValidationError, match="strenght"):
        Joined(base_model="m", str_kernels={"strenght": 1})
