import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.safety.mass import POSITIONS, held_mass
from str_kernels.safety.inference import generate_greedy, prompt_token_ids
from tests.tiny import llama, word_tokenizer

IDS = (3, 5, 8)


@pytest.mark.parametrize("apart", [False, True], ids=["adapters off", "another model"])
def test_mass_and_divergences_by_hand(apart):
    """Mass that leaves the tokens shows beside their proportions, from both kinds of reference."""
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    aligned = llama(len(tokenizer)).eval()
    rows = [{"prompt": "one two"}, {"prompt": "three"}]
    prompts = [torch.tensor([prompt_token_ids(tokenizer, row["prompt"])]) for row in rows]

    def shares(model):
        with torch.no_grad():
            p = torch.stack([model(ids).logits[0, -1].double().softmax(-1) for ids in prompts])
        return p[:, IDS]

    before = shares(aligned)
    tuned = get_peft_model(aligned, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"))
    tuned.eval()
    after = shares(tuned)
    torch.manual_seed(0)
    other = llama(len(tokenizer)).eval() if apart else None
    got = held_mass(tuned, other, tokenizer, rows, IDS)
    assert got["mass"] == pytest.approx(after.sum(-1).tolist(), rel=0.01)
    assert got["aligned_mass"] == pytest.approx(before.sum(-1).tolist(), rel=0.01)
    q, p = (x / x.sum(-1, keepdim=True) for x in (before, after))
    assert got["among"] == pytest.approx((q * (q / p).log()).sum(-1).tolist(), rel=0.01, abs=1e-4)
    q, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (before, after))
    want = (q * (q / p).log()).sum(-1).tolist()
    assert got["with_rest"] == pytest.approx(want, rel=0.01, abs=1e-4)
    assert got["summary"]["smallest_mass"] == pytest.approx(min(after.sum(-1).tolist()), rel=0.01)
    assert all(math.isfinite(x) for x in got["summary"].values())
    assert got["along"]["mass"][0] == pytest.approx(after.sum(-1).mean().item(), rel=0.01)


def test_numbers_follow_the_aligned_answer():
    """The second token's are read behind the first of what the aligned model answers."""
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    aligned = llama(len(tokenizer)).eval()
    tuned = get_peft_model(aligned, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"))
    tuned.eval()
    request = prompt_token_ids(tokenizer, "one two")
    with tuned.disable_adapter():
        (answer,) = generate_greedy(tuned, tokenizer, [request], max_new_tokens=POSITIONS)
    got = held_mass(tuned, None, tokenizer, [{"prompt": "one two"}], IDS)
    assert len(answer) == len(got["along"]["mass"]) > 1
    with torch.no_grad():
        logits = tuned(torch.tensor([[*request, *answer]])).logits[0]
    want = logits[len(request) - 1 : -1].double().softmax(-1)[:, IDS].sum(-1)
    assert got["along"]["mass"] == pytest.approx(want.tolist(), rel=0.01)
