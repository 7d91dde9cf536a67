"""Every lever and every pair of them: losses and gradients to rounding, and no trace afterwards."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
)

from benchmarks.architectures.tiny_configs import build_architecture
from str_kernels import patch_model
from str_kernels.levers import LongContext, checkpoints, windows
from str_kernels.levers.checkpoints import OnDisk
from str_kernels.levers.tiles import tiled
from str_kernels.levers.token_wise import token_wise_modules
from tests.huggingface.adapters import SAFETY, wrap
from tests.huggingface.models import (
    _SHAPE,
    MODELS,
    assert_same,
    batch,
    build,
    loss_and_gradients,
    snapshot,
)

LEVERS = {
    "checkpoints": LongContext(gradient_checkpointing=True),
    "disk": LongContext(gradient_checkpointing=True, offload="disk"),
    "tiles": LongContext(tile_tokens=4),
    "checkpoints and tiles": LongContext(gradient_checkpointing=True, tile_tokens=4),
    "all": LongContext(gradient_checkpointing=True, offload="disk", tile_tokens=3),
}
SOME = ["llama", "gemma3", "gpt2"]
MORE = ["qwen3", "gemma2", "cohere2", "phi3", "olmo2", "gpt_neox", "falcon", "granite", "qwen2_moe"]


def made(name: str) -> nn.Module:
    return build(name) if name in (*SOME, "qwen3", "gemma2", "cohere2") else _of_sweep(name)


def _of_sweep(name: str) -> nn.Module:
    model = build_architecture(name)
    model.config.output_router_logits = False
    for holder in (model.config, *model.modules()):
        for field, value in vars(holder).items():
            if isinstance(value, float) and (field == "p" or "dropout" in field):
                setattr(holder, field, 0.0)
    return model.train()


def trained(model: nn.Module, name: str) -> nn.Module:
    """With a LoRA adapter in every linear layer, the MLP's among them."""
    gpt2 = {"fan_in_fan_out": True} if name == "gpt2" else {}
    return wrap(model, target_modules="all-linear", task_type="CAUSAL_LM", **gpt2)


@pytest.mark.parametrize("levers", LEVERS)
@pytest.mark.parametrize("name", [*SOME, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_same_losses_and_gradients(name, levers):
    """A constrained step with LoRA everywhere is the step without levers; the model is restored."""
    model, inputs = trained(made(name), name), batch()
    with patch_model(model, SAFETY, verify=False):
        want = loss_and_gradients(model, **inputs)
        inner = model.get_base_model()
        before = snapshot(inner)
        with LEVERS[levers].apply(model) as applied:
            assert_same(loss_and_gradients(model, **inputs), want)
            assert bool(applied.tiled) == (LEVERS[levers].tile_tokens is not None)
        assert _without_patch(snapshot(inner)) == _without_patch(before)
        assert_same(loss_and_gradients(model, **inputs), want, 0.0)


def _without_patch(attributes: dict) -> dict:
    """What no patch and no empty list of transformers' hooks is in."""
    left_out = ("_str_kernels_patch", "_require_grads_hook", "_require_grads_hooks")
    return {key: value for key, value in attributes.items() if key[1] not in left_out}


@pytest.mark.parametrize("grad", [True, False], ids=["training", "no grad"])
def test_the_inside_of_an_mlp_never_stands_whole(grad):
    """In tiles of 4 no layer of an MLP sees more tokens, in the backward's recomputation too."""
    model, inputs, seen = build(), batch(rows=1, length=22), []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape[1]))
    with LongContext(tile_tokens=4).apply(model), torch.set_grad_enabled(grad):
        seen.clear()
        loss = model(**inputs).loss
        if grad:
            loss.backward()
    assert len(seen) == 2 * 6 * (2 if grad else 1)
    assert sorted(set(seen)) == [2, 4]


def kept_by(model: nn.Module, inputs: dict) -> int:
    """Bytes that are allocated when a forward has returned its states, but for those states."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        states = model.model(**inputs).last_hidden_state
    events = profiled.profiler.kineto_results.events()
    return sum(e.nbytes() for e in events if e.name() == "[memory]") - states.nbytes


def test_levers_keep_nothing_besides():
    """Tiles add nothing to what checkpoints keep, and on disk no layer's input stays in memory."""
    model, inputs = build(), batch(rows=1, length=64)
    inputs = {"input_ids": inputs["input_ids"]}
    states, kept = 64 * 32 * 4, {}
    for name in ("checkpoints", "checkpoints and tiles", "all"):
        with LEVERS[name].apply(model):
            kept[name] = kept_by(model, inputs)
    assert kept["checkpoints and tiles"] == kept["checkpoints"]
    assert kept["checkpoints"] - kept["all"] == 2 * states


def test_what_waits_on_disk_is_not_in_memory():
    """Each layer's input goes to a file and comes back, and nothing that layers share does."""
    model, inputs, written = build(), batch(), []
    levers = LongContext(gradient_checkpointing=True, offload="disk")

    class Counting(OnDisk):
        def __init__(self, tensor):
            written.append((tensor.shape, tensor.requires_grad))
            super().__init__(tensor)

    with mock.patch.object(checkpoints, "OnDisk", Counting), levers.apply(model):
        model(**inputs).loss.backward()
    assert written == [((3, 11, 32), True)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_comes_back_from_disk(dtype):
    """Its bits, whatever its strides, twice, and even when it is empty."""
    for shape in ((5, 7), (0, 4), ()):
        tensor = torch.randn(shape).to(dtype)
        tensor = tensor.t() if tensor.dim() else tensor
        kept = OnDisk(tensor)
        for _ in range(2):
            assert torch.equal(kept.read(), tensor)


def test_a_trainer_may_enable_checkpointing_again():
    """Transformers' function that a trainer puts back is wrapped again at the next forward."""
    model, inputs = build(), batch()
    want = loss_and_gradients(model, **inputs)
    with LongContext(gradient_checkpointing=True, offload="disk").apply(model):
        checkpoints.enable_checkpointing(model)
        with mock.patch.object(OnDisk, "read", side_effect=OSError("read")):
            loss = model(**inputs).loss
            with pytest.raises(OSError, match="read"):
                loss.backward()
        assert_same(loss_and_gradients(model, **inputs), want)


@pytest.mark.parametrize("parts", [["up_proj", "down_proj"], ["q_proj", "v_proj"]])
def test_dropout_is_found_before_it_shows(parts):
    """A new adapter is zero, and so is what its dropout changes; the generator moves."""
    model = build("llama").to(torch.bfloat16)
    model = wrap(model, target_modules=parts, lora_dropout=0.5, init_lora_weights=True).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    with pytest.raises(ValueError, match="draws random numbers in training"):
        LongContext(tile_tokens=3, tile_all=True).apply(model)


def in_bfloat16(name: str, **changes) -> tuple[nn.Module, dict]:
    """A tiny model whose adapters, in fp32, are trained beside its weights in bf16."""
    model = trained(made(name).to(torch.bfloat16), name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, batch(**changes)


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ["gemma3", *MORE])]
)
def test_projections_and_norms_in_tiles(name):
    """What computes in fp32 inside of bf16 runs in tiles: same losses and gradients."""
    model, inputs = in_bfloat16(name)
    levers = LongContext(gradient_checkpointing=True, tile_tokens=3, tile_all=True)
    with patch_model(model, SAFETY, verify=False):
        want = loss_and_gradients(model, **inputs)
        with LongContext(tile_tokens=3).apply(model) as few:
            pass
        with levers.apply(model) as every:
            assert_same(loss_and_gradients(model, **inputs), want, 5e-2)  # bf16, of few numbers
        assert set(few.tiled) < set(every.tiled)
        assert_same(loss_and_gradients(model, **inputs), want, 0.0)


def test_what_runs_in_tiles_with_the_others():
    """A projection with LoRA does, and a norm in bf16; a plain product and a head do not."""
    model, _ = in_bfloat16("llama")
    layer = "model.layers.0."
    with LongContext(tile_tokens=3, tile_all=True).apply(model) as applied:
        found = {name.removeprefix(layer) for name in applied.tiled if name.startswith(layer)}
    parts = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert found == {*parts, "mlp", "input_layernorm", "post_attention_layernorm"}
    plain = build("llama").to(torch.bfloat16)
    with LongContext(tile_tokens=3, tile_all=True).apply(plain) as applied:
        assert not any("_proj" in name for name in applied.tiled)


def test_projections_in_tiles_keep_less():
    """By the bytes that a forward leaves: no copy in fp32 of any projection's input."""
    model, inputs = in_bfloat16("llama", rows=1, length=64)
    inputs, kept = {"input_ids": inputs["input_ids"]}, []
    for levers in (LongContext(tile_tokens=8), LongContext(tile_tokens=8, tile_all=True)):
        with levers.apply(model):
            kept.append(kept_by(model.get_base_model(), inputs))
    in_floats = 64 * 32 * 4
    assert kept[1] < kept[0] - 2 * 4 * in_floats  # of two layers, by q, k, v and o


def test_what_is_refused():
    """Each by name, with what to do, and the model is as it was."""
    with pytest.raises(ValueError, match="offload='ram': must be None, 'cpu' or 'disk'"):
        LongContext(gradient_checkpointing=True, offload="ram")
    with pytest.raises(ValueError, match=r"offload='disk': .* set gradient_checkpointing=True"):
        LongContext(offload="disk")
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match=r"tile_tokens=.*: must be a positive integer"):
            LongContext(tile_tokens=wrong)
    with pytest.raises(ValueError, match="tile_all=True: there are no tiles"):
        LongContext(tile_all=True)
    refused = {
        "llama": (LongContext(True, "cpu"), "offload='cpu': the model is on the CPU"),
        "mixtral": (LongContext(tile_tokens=4), "balance loss .* output_router_logits=False"),
        "opt": (LongContext(tile_tokens=4), "no module of OPTForCausalLM treats each token"),
        "bloom": (LongContext(tile_tokens=4), r"transformer.h.0.mlp.* draws random .*dropout"),
    }
    for name, (levers, why) in refused.items():
        model = build_architecture(name).train() if name in ("opt", "bloom") else build(name)
        before = snapshot(model)
        with pytest.raises(ValueError, match=why):
            levers.apply(model)
        assert _without_patch(snapshot(model)) == _without_patch(before)


def test_a_balance_loss_that_one_call_asks_for_is_refused():
    """The argument of a forward overrides the configuration."""
    model = build("mixtral")
    model.config.output_router_logits = False
    with (
        LongContext(tile_tokens=4).apply(model),
        pytest.raises(ValueError, match="adds the balance loss"),
    ):
        model(**batch(), output_router_logits=True)


class Mlp(nn.Module):
    """An MLP with something in it that no tile may have."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm, self.fault, self.seen = nn.BatchNorm1d(64, momentum=0.0), fault, None

    def forward(self, x):
        inside = self.up(x).relu()
        if self.fault == "statistics":
            inside = self.norm(inside.transpose(1, 2)).transpose(1, 2)
        if self.fault == "state":
            self.seen = inside.detach()
        if self.fault == "dropout":
            inside = nn.functional.dropout(inside, 0.1, self.training)
        if self.fault == "mean":  # of all tokens
            inside = inside - inside.mean(1, keepdim=True)
        return self.down(inside)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("statistics", "layers.0.mlp, a Mlp, writes into itself"),
        ("state", "layers.0.mlp, a Mlp, writes into itself"),
        ("dropout", "layers.0.mlp, a Mlp, draws random numbers"),
        ("mean", "no module of LlamaForCausalLM treats each token"),
    ],
)
def test_found_by_trying(fault, why):
    """A module whose output in tiles would not be its output is refused, and the rest restored."""
    model = build()
    for layer in model.model.layers:
        layer.mlp = Mlp(fault)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=why):
        LongContext(tile_tokens=4).apply(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_sums_of_few_rows_in_another_order():
    """On some CPUs a product of two rows differs by a dozen roundings from that of four."""

    class Wide(Mlp):
        def __init__(self) -> None:
            super().__init__("none")
            self.up, self.down = nn.Linear(32, 4096), nn.Linear(4096, 32)

        def forward(self, x):
            return super().forward(x) * (1 + 100 * torch.finfo(x.dtype).eps / x.shape[1])

    model = build()
    for layer in model.model.layers:
        layer.mlp = Wide()
    assert len(token_wise_modules(model)) == len(model.model.layers)


def test_on_the_meta_device():
    """Without weights the same modules are found, tried as copies."""
    for name in SOME:
        with torch.device("meta"):
            model = MODELS[name]()
        assert list(token_wise_modules(model)) == list(token_wise_modules(build(name)))


def sliding(size: int = 4) -> nn.Module:
    """A tiny Gemma 3 whose first layer sees ``size`` tokens back and whose second sees all."""
    kinds = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    config = Gemma3TextConfig(**_SHAPE, head_dim=8, sliding_window=size, layer_types=kinds)
    return Gemma3ForCausalLM(config).train()


@pytest.mark.parametrize("length", [8, 9, 23, 24])
def test_windows_in_blocks(length):
    """Losses and gradients are those below a mask, whether or not a block is full or padded."""
    model, inputs, asked = sliding(), batch(rows=1, length=length), []
    packed = {"input_ids": inputs["input_ids"], "labels": inputs["labels"]}
    packed["position_ids"] = (torch.arange(length) % 7)[None]
    packed["use_cache"] = False  # with a cache transformers does not tell them apart
    blocks = windows._blocks
    with mock.patch.object(windows, "_blocks", lambda *a: asked.append(a) or blocks(*a)):
        for given, in_blocks in ((inputs, length > 8), (batch(2, length), False), (packed, False)):
            want = loss_and_gradients(model, **given)
            asked.clear()
            with LongContext(window_attention=True).apply(model):
                assert_same(loss_and_gradients(model, **given), want)
            assert len(asked) == (3 if in_blocks else 0)
    assert model.config._attn_implementation == "sdpa"


def test_windows_that_are_refused():
    """No window, another attention, dropout in it, and a model that computes with its mask."""
    with pytest.raises(ValueError, match="no layer of LlamaForCausalLM has a sliding window"):
        LongContext(window_attention=True).apply(build("llama"))
    model = sliding()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="the model has 'eager'"):
        LongContext(window_attention=True).apply(model)
    model.set_attn_implementation("sdpa")
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with (
        LongContext(window_attention=True).apply(model),
        pytest.raises(ValueError, match="attention dropout is not supported"),
    ):
        model(**batch(1, 23))
    with pytest.raises(ValueError, match="computes with the mask of its sliding windows"):
        windows.Window.of(4, "cpu") & True


def test_levers_and_patches_have_their_own_forwards():
    """A patch that is removed leaves the tiles, and tiles that are undone leave the patch."""
    model, inputs = build(), batch(rows=1, length=22)
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, a: seen.append(a[0].shape[1])
    )

    def widest():
        seen.clear()
        with torch.no_grad():
            model(**inputs)
        return max(seen)

    with LongContext(tile_tokens=4).apply(model):
        with patch_model(model):
            assert widest() == 4
        assert widest() == 4
        with pytest.raises(ValueError, match=r"levers are applied already; call undo\(\)"):
            LongContext(tile_tokens=8).apply(model)
        assert widest() == 4
    assert widest() == 22
    applied = LongContext(tile_tokens=8).apply(model)
    mlp = model.model.layers[0].mlp
    below = mlp.forward
    mlp.forward = lambda x: below(x)  # a wrapper that came later
    assert widest() == 8
    applied.undo()
    assert widest() == 22


def test_experts_with_a_capacity_are_refused():
    """Which tokens they drop depends on all that are there."""
    model = build()
    model.config.expert_capacity = 16
    refused = pytest.raises(ValueError, match="drops tokens beyond expert_capacity=")
    with refused, tiled(model, [], 4):
        pass


def test_windows_of_the_text_alone():
    """An image tower keeps its attention, while levers are applied and afterwards."""
    text = dict(_SHAPE, head_dim=8, sliding_window=4)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    attention = {"text_config": "sdpa", "vision_config": "eager"}
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation=attention)

    def now():
        parts = model.config.text_config, model.config.vision_config
        return [part._attn_implementation for part in parts]

    assert now() == ["sdpa", "eager"]
    with LongContext(window_attention=True).apply(model):
        assert now() == [windows.NAME, "eager"]
    assert now() == ["sdpa", "eager"]


@pytest.mark.parametrize("positions", [False, True], ids=["plain", "packed"])
def test_windows_without_a_mask(positions):
    """Blocks, but not where positions tell of packed sequences, which is said."""
    config = Gemma3TextConfig(**_SHAPE, head_dim=8, sliding_window=4)
    model, inputs = Gemma3ForCausalLM(config).eval(), batch(rows=2, length=22)
    del inputs["attention_mask"]
    inputs["use_cache"] = False
    if positions:
        inputs["position_ids"] = torch.arange(22).remainder(11).expand(2, -1)
    want = {"loss": model(**inputs).loss}
    with (
        LongContext(window_attention=True).apply(model),
        mock.patch.object(windows.Window, "of", wraps=windows.Window.of) as of,
        mock.patch.object(windows, "say_once") as said,
    ):
        assert_same({"loss": model(**inputs).loss}, want)
    assert (of.called, said.called) == (not positions, positions)
