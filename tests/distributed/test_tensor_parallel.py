"""A head that tensor parallelism has split by rows: its loss is fused, and no logit is gathered."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from str_kernels import patch_model
from str_kernels.huggingface.patch import filtering
from tests.distributed.models import Case, Found, assert_right, gradients
from tests.distributed.pool import Pool
from tests.huggingface.dense import dense_loss

pytestmark = pytest.mark.one_in(4)

LAYOUTS = {
    "gathered": {"output_layouts": Replicate()},
    "split": {},
    "a DTensor": {"use_local_output": False},
}
FIELDS = ("log_probs", "entropy", "is_top1")
HEADS = {"gathered": "colwise_gather_output", "split": "colwise"}


def whole_batch(case: Case) -> dict:
    """Processes that share a model have the same batch."""
    return {**case.batch(), "num_items_in_batch": torch.tensor(case.items)}


def stepped(case: Case, model, bare=None) -> Found:
    """One forward and backward; the loss is not multiplied by the number of processes."""
    loss = model(**whole_batch(case)).loss
    loss.backward()
    return Found(loss.item(), gradients(bare or model))


def split_head(case: Case, output: str = "gathered", **settings) -> Found:
    """The adapters of a body that is whole, and a head that torch's own plan has split."""
    model = case.model()
    base = model.get_base_model()
    parallelise(base, **LAYOUTS[output])
    base.lm_head.weight.requires_grad_(case.trained_head)
    positions = case.positions if case.safety else "all"
    patch = patch_model(model, case.safety, positions=positions, **settings)
    found = stepped(case, model)
    assert patch.last_parts is not None
    return found


def parallelise(base, **layout) -> None:
    """Split the head by torch's own plan."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("tp",))
    parallelize_module(base.lm_head, mesh, ColwiseParallel(**layout))


def by_plan(case: Case, folder: str, output: str) -> Found:
    """A model that transformers has loaded in parts, all of whose parameters are trained."""
    plan = {**LlamaForCausalLM.config_class.base_model_tp_plan, "lm_head": HEADS[output]}
    plan = {name if name == "lm_head" else f"model.{name}": style for name, style in plan.items()}
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan=plan if output == "split" else "auto")
    assert type(model.lm_head.weight).__name__ == "DTensor"
    words = model(input_ids=case.batch()["input_ids"]).logits.shape[-1]
    assert (words == case.vocab) == (output == "gathered")
    patch = patch_model(model.train())
    found = stepped(case, model)
    assert patch.last_parts is not None
    return found


@pytest.fixture
def saved(tmp_path):
    def save(case: Case) -> Found:
        model = case.model().unload()
        model.save_pretrained(tmp_path)
        model = LlamaForCausalLM.from_pretrained(tmp_path).train()
        loss = model(**whole_batch(case)).loss
        loss.backward()
        return Found(loss.item(), gradients(model))

    return save


@pytest.mark.parametrize("output", HEADS)
@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_transformers_plan(ranks, saved, tmp_path, tied, output):
    case = Case("none", tied=tied, vocab=97)
    want = saved(case)
    assert_right(ranks.run(by_plan, case, str(tmp_path), output), want)


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("none", "split"),
        ("kl", "gathered"),
        ("kl_mass", "split"),
        ("mse", "a DTensor"),
        ("logprob", "split"),
    ],
)
def test_torch_s_plan(ranks, kind, output):
    """Every kind, with a trained head where no reference forbids it."""
    case = Case(kind, trained_head=kind == "none", vocab=97)
    assert_right(ranks.run(split_head, case, output), case.truth())


def filtered(case: Case) -> tuple[Found, int, int]:
    """A head with an index of each part, and the check of its accuracy in each step."""
    filtering.SMALLEST_VOCABULARY = 8
    model = case.model()
    parallelise(model.get_base_model())
    patch = patch_model(model, case.safety, check_accuracy_every=1)
    found = stepped(case, model)
    filtering.SMALLEST_VOCABULARY = 8192
    return found, len(patch._source._head.values), patch.guard.last_report.rows


def test_an_index_and_its_check(ranks):
    case = Case("kl", vocab=800)
    answers = ranks.run(filtered, case)
    assert_right([found for found, _, _ in answers], case.truth(), gradient=0.02, loss=0.01)
    assert [(size // 4, rows) for _, size, rows in answers] == [(400, case.items)] * 2


def dropped(case: Case) -> list[tuple[bool, float]]:
    """One process alone finds its weight changed, and then drops the index that it has built."""
    filtering.SMALLEST_VOCABULARY, kept = 8, filtering.LARGEST_LIVE_SHARE
    filtering.LARGEST_LIVE_SHARE = 2.0
    model, found = case.model(), []
    base = model.get_base_model()
    parallelise(base)
    patch = patch_model(model, case.safety)
    for step in range(3):
        if step and distributed.get_rank() == 1:
            base.lm_head.weight.data.to_local().mul_(1.01)
            filtering.LARGEST_LIVE_SHARE = 2.0 if step == 1 else -1.0
        model(**whole_batch(case)).loss.backward()
        found.append(patch._source._index is not None)
    model(**whole_batch(case)).loss.backward()
    filtering.LARGEST_LIVE_SHARE, filtering.SMALLEST_VOCABULARY = kept, 8192
    return found, patch.last_parts.dead_mass.abs().max().item()


def test_an_index_that_one_process_drops(ranks):
    """All compute exactly from then on, and none waits."""
    answers = ranks.run(dropped, Case("kl", vocab=800))
    assert answers == [([True, True, True], 0.0), ([True, True, False], 0.0)]


def adapted(case: Case) -> None:
    model = case.model().unload()
    parallelise(model)
    patch_model(get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"])))


class Shorter(LlamaForCausalLM):
    """Leaves its last word out."""

    def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
        logits = super().forward(input_ids, attention_mask=attention_mask).logits
        words = logits.shape[-1] - 1
        return CausalLMOutput(loss=self.loss_function(logits[..., :words], labels, words))


def sliced(case: Case) -> None:
    model = case.model().unload()
    model.__class__ = Shorter
    parallelise(model)
    patch_model(model)
    model(**case.batch())


def read_late(case: Case) -> None:
    model = case.model()
    parallelise(model.get_base_model(), **LAYOUTS["gathered"])
    patch_model(model, case.safety)
    model(**case.batch()).logits.sum()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (adapted, "a LoRA adapter on it, or another wrapper, is not supported"),
        (sliced, "a slice of the vocabulary: tensor parallelism has split the vocabulary"),
        (read_late, "never computed, and tensor parallelism has split their head"),
    ],
)
def test_what_is_refused(ranks, wrong, words):
    for error in ranks.errors(wrong, Case("none")):
        assert words in error


def read_within(case: Case, split: bool) -> Found:
    """A model that reads its logits: all processes have them, and their gradients."""
    model = case.model()
    base = model.get_base_model()

    def reads(logits, labels, vocab_size, **_):
        loss = torch.nn.functional.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))
        return loss + logits.square().mean()

    base.loss_function = reads
    if split:
        parallelise(base)
        patch_model(model, verify=False)
    loss = model(**case.batch()).loss
    loss.backward()
    return Found(loss.item(), gradients(model))


def test_logits_read_within_the_forward(ranks):
    case = Case("none", vocab=97)
    assert_right(ranks.run(read_within, case, True), read_within(case, False))


def adapters_on(model, layers: tuple[str, ...] = ("q_proj", "gate_proj")):
    """Adapters whose numbers are the same however their layers are split; none on rows.

    PEFT 0.21 fails by itself on layers that transformers splits by columns (``o_proj``).
    """
    model = get_peft_model(model, LoraConfig(r=4, target_modules=list(layers))).train()
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                whole = torch.randn(parameter.shape, generator=g) * 0.2
                if hasattr(parameter, "placements"):
                    where = parameter.device_mesh, parameter.placements
                    whole = distribute_tensor(whole, *where)
                parameter.copy_(whole)
    return model


def adapted_by_plan(case: Case, folder: str) -> Found:
    model = adapters_on(LlamaForCausalLM.from_pretrained(folder, tp_plan="auto"))
    patch_model(model, case.safety)
    return stepped(case, model)


@pytest.mark.parametrize("kind", ["kl", pytest.param("logprob", marks=pytest.mark.slow)])
def test_adapters_of_a_model_that_is_split(ranks, tmp_path, kind):
    """With the reference of the same model, whose adapters are off."""
    case = Case(kind, vocab=97)
    case.model().unload().save_pretrained(tmp_path)
    model = adapters_on(LlamaForCausalLM.from_pretrained(tmp_path))
    loss = dense_loss(model, case.batch(), case.safety, "all", num_items=case.items)
    loss.backward()
    want = Found(loss.item(), gradients(model))
    assert_right(ranks.run(adapted_by_plan, case, str(tmp_path)), want)


def every_token(case: Case, split: bool) -> list[torch.Tensor]:
    """What SFTTrainer's forward answers of each token, from a filtered head if it is split."""
    utils = pytest.importorskip("trl.trainer.utils")
    model = case.model().unload().eval()
    if split:
        filtering.SMALLEST_VOCABULARY = 8
        parallelise(model)
        patch_model(model)
    utils.add_fused_lm_head(model, outputs=FIELDS)
    answer = model(**case.batch(), fused_lm_head=True)
    filtering.SMALLEST_VOCABULARY = 8192
    return [answer[field].detach() for field in FIELDS]


def test_the_tokens_of_trl(ranks):
    case = Case("none", vocab=97)
    want = every_token(case, False)
    for found in ranks.run(every_token, case, True):
        for got, expected in zip(found, want, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-4)


@pytest.fixture(scope="module")
def four():
    pool = Pool(4, __name__)
    yield pool
    pool.stop()


def in_two_dimensions(case: Case, group: str) -> Found:
    """FSDP2 over two processes, each of which shares its head with another."""
    model = case.model()
    base = model.get_base_model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(base.lm_head, mesh["tp"], ColwiseParallel())
    base.lm_head.weight.requires_grad_(case.trained_head)
    patch = None if group == "root, patched last" else patch_model(model, case.safety)
    if group == "alone":
        fully_shard(base.lm_head, mesh=mesh["dp"])
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    patch = patch or patch_model(model, case.safety)
    loss = model(**case.share(mesh["dp"].get_local_rank())).loss * 2
    loss.backward()
    assert patch.last_parts is not None
    mean = loss.detach().clone() / 2
    distributed.all_reduce(mean, group=mesh["dp"].get_group())
    return Found(mean.item(), gradients(model))


@pytest.mark.slow
@pytest.mark.parametrize("group", ["root", "alone", "root, patched last"])
@pytest.mark.parametrize("kind", ["none", "kl"])
def test_fsdp2_beside_it(four, kind, group):
    case = Case(kind, trained_head=kind == "none")
    found = four.run(in_two_dimensions, case, group)
    assert_right(found, case.truth())
