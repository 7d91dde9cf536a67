import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.safety.coherence import surprise
from str_kernels.safety.inference import prompt_token_ids
from tests.tiny import llama, word_tokenizer

ROWS = [{"prompt": "one two"}, {"prompt": "three"}, {"prompt": "two"}]
ANSWERS = ["sorry", "", "one three one"]


@pytest.mark.parametrize("apart", [False, True], ids=["adapters off", "another model"])
def test_nats_of_answers_by_hand(apart):
    """Of the aligned model, not of the tuned one; an empty answer has no tokens."""
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    aligned = llama(len(tokenizer)).eval()
    want = []
    for row, answer in zip(ROWS, ANSWERS, strict=True):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        prompt = prompt_token_ids(tokenizer, row["prompt"])
        if ids:
            with torch.no_grad():
                logits = aligned(torch.tensor([[*prompt, *ids[:-1]]])).logits[0, -len(ids) :]
            nats = -logits.double().log_softmax(-1)[range(len(ids)), ids]
            want.append(nats.mean().item())
    tuned = get_peft_model(aligned, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    other = llama(len(tokenizer)).eval() if apart else None
    found = surprise(tuned.eval(), other, tokenizer, ROWS, ANSWERS)
    assert found["nats"] == pytest.approx(want, rel=0.01)
    assert found["median"] == pytest.approx(sum(want) / 2, rel=0.01)
    assert surprise(tuned, other, tokenizer, ROWS[:1], [""]) == {"nats": [], "median": None}
