"""The published methods against their formulas, written out row by row in fp64."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.safety.baselines import constrained_sft, full_kl, pact, safe_lora
from benchmarks.safety.data import batches, encode, load_split
from tests.tiny import llama, word_tokenizer

HEADER = 1  # "<bot>"


@pytest.fixture
def tuned():
    tokenizer = word_tokenizer()
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(llama(len(tokenizer)).double(), config).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture
def batch(data):
    rows = load_split(data, "refusals").train[:2] + load_split(data, "sst2").train[:1]
    features = encode(word_tokenizer(), rows, 64)
    return next(batches(features, size=3, steps=1, pad=0, seed=0))


def answers(batch):
    """Of each row: all its tokens, and how many of them are prompt."""
    for ids, mask, labels in zip(*batch.values(), strict=True):
        length = int(mask.sum())
        yield ids[:length], int((labels[:length] == -100).sum())


@torch.no_grad()
def log_probabilities(model, ids, start):
    return model(ids[None, :-1]).logits[0, start - 1 :].log_softmax(-1)


def test_full_kl(tuned, batch):
    total, count = 0.0, 0
    for ids, start in answers(batch):
        log_p = log_probabilities(tuned, ids, start)
        with tuned.disable_adapter():
            log_q = log_probabilities(tuned, ids, start)
        total += (log_q.exp() * (log_q - log_p)).sum().item()
        count += len(ids) - start
    assert full_kl(tuned, batch).item() == pytest.approx(total / count, rel=1e-9)


def top_p_share(logits):
    total, taken = 0.0, 0
    for p in sorted(logits.softmax(-1).tolist(), reverse=True):
        total, taken = total + p, taken + 1
        if total >= 0.9:
            break
    return taken / len(logits)


def test_pact(tuned, batch):
    tokens = torch.tensor([5, 9, 17, 20, 31])
    total, count = 0.0, 0
    for ids, start in answers(batch):
        short = ids[start - HEADER :]
        log_p = log_probabilities(tuned, ids, start)[:, tokens]
        with tuned.disable_adapter():
            full = log_probabilities(tuned, ids, start)[:, tokens]
            alone = log_probabilities(tuned, short, HEADER)[:, tokens]
        for step in range(len(log_p)):
            gate = 2.0 * (top_p_share(log_p[step]) - top_p_share(alone[step]))
            gate = 1 / (1 + torch.exp(torch.tensor(-gate))).item()
            gate *= torch.exp(torch.tensor(-max(0.0, step - 8) / 8)).item()
            # of log-probabilities and of logits alike: the softmax over the tokens is the same
            target = (1 - gate) * full[step] + gate * alone[step]
            log_q = (target / 2).log_softmax(-1)
            total += 4 * (log_q.exp() * (log_q - (log_p[step] / 2).log_softmax(-1))).sum().item()
            count += 1
    assert count > 12  # beyond the prefix, where the gate fades
    assert pact(tuned, batch, tokens, HEADER).item() == pytest.approx(total / count, rel=1e-6)


def test_constrained_sft(tuned, batch):
    total, count = 0.0, 0
    for ids, start in answers(batch):
        log_p = log_probabilities(tuned, ids, start)
        with tuned.disable_adapter():
            log_q = log_probabilities(tuned, ids, start)
        for step, token in enumerate(ids[start:].tolist()):
            beta = 0.5 if step == 0 else 2.0 if step < 5 else 0.1
            ratio = beta * (log_p[step, token] - log_q[step, token])
            total += -2 / beta * torch.log(1 / (1 + torch.exp(-ratio))).item()
            count += 1
    assert count > 12  # beyond the first five
    assert constrained_sft(tuned, batch).item() == pytest.approx(total / count, rel=1e-6)


def test_constrained_sft_begins_as_the_cross_entropy(batch):
    """While nothing has moved its gradient is that of the cross-entropy."""
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(llama(len(tokenizer)), config).eval()
    found = []
    for loss in (constrained_sft(model, batch), model(**batch).loss):
        model.zero_grad()
        loss.backward()
        found.append([p.grad.clone() for n, p in model.named_parameters() if "lora_B" in n])
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-6)


def test_safe_lora_projects_what_is_unlike_the_alignment(tuned):
    """Layers whose update is unlike its projection, by the formula; the others stay as they are."""
    torch.manual_seed(3)
    base = llama(len(word_tokenizer())).double()
    modules = dict(base.named_modules())
    layers = {n: m for n, m in tuned.get_base_model().named_modules() if hasattr(m, "lora_B")}
    names = list(layers)
    with torch.no_grad():  # aligning changed the first in the adapter's own directions
        for name, layer in layers.items():
            modules[name].weight.copy_(layer.base_layer.weight)
            a, b = (x["default"].weight for x in (layer.lora_A, layer.lora_B))
            if name == names[0]:
                modules[name].weight.sub_(b @ a)
            elif name == names[1]:
                modules[name].weight.add_(torch.randn_like(modules[name].weight) * 1e-3)
                modules[name].weight[:-1] = layer.base_layer.weight[:-1]
    before = {n: m.lora_B["default"].weight.clone() for n, m in layers.items()}
    change = layers[names[1]].base_layer.weight - modules[names[1]].weight
    assert safe_lora(tuned, base) == 1
    for name, layer in layers.items():
        got, want = layer.lora_B["default"].weight, before[name]
        if name == names[1]:
            want = (change @ change.T / change.norm()) @ want
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12), name


def test_all_reach_the_adapter(tuned, batch):
    tokens = torch.tensor([5, 9, 17])
    own = constrained_sft(tuned, batch)
    for penalty in (full_kl(tuned, batch), pact(tuned, batch, tokens, HEADER), own):
        assert penalty.item() > 0
        tuned.zero_grad()
        penalty.backward()
        moved = [p.grad for n, p in tuned.named_parameters() if "lora_B" in n]
        assert moved
        assert all(g.abs().sum() > 0 for g in moved)
