"""Stand-ins of training programs: they call plugins and callbacks in the programs' own order."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from tests.huggingface.trainers import lora_model, rows, trainer_for
from tests.tiny import word_tokenizer


class BasePlugin:
    """Axolotl's: every hook is there and does nothing."""

    def __init__(self) -> None:
        self.registered = None

    def register(self, cfg: dict) -> None:
        self.registered = cfg

    def get_training_args(self, cfg: dict) -> None:
        """A hook that the plugin has no answer of its own to."""


class Config(dict):
    """Axolotl's ``DictDefault``: attributes are items, and None where there is none."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def trainer_of(model: Any, folder: Any, **settings: Any) -> Trainer:
    """Two steps of transformers' trainer on a tiny model."""
    settings = {"max_steps": 2, "disable_tqdm": True, **settings}
    return trainer_for(model, folder, dataset=rows(8), tokenizer=word_tokenizer(), **settings)


def axolotl(plugin: Any, cfg: Config, folder: Any) -> Trainer:
    """Load, make a trainer, train: the hooks as Axolotl calls them."""
    plugin.register(cfg)
    plugin.pre_model_load(cfg)
    model = lora_model()
    plugin.post_model_load(cfg, model)
    trainer = trainer_of(model, folder)
    for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    trainer.train()
    plugin.post_train(cfg, model)
    return trainer


def llama_factory(callbacks: list, folder: Any, *, model: Any = None, **settings: Any) -> Trainer:
    """``run_exp(callbacks=...)``: the model is made inside."""
    trainer = trainer_of(lora_model() if model is None else model, folder, **settings)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def logs_of(trainer: Trainer) -> list[dict]:
    """Those with a loss."""
    return [log for log in trainer.state.log_history if "loss" in log]
