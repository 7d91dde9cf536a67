"""Greedy answers and the state of the model they come from."""

import pytest
import torch

from str_kernels.inputs.loading import load_model_and_tokenizer
from str_kernels.safety.inference import generate_greedy, last_logits, prompt_token_ids, reading
from tests.tiny import CONTEXT, exchanges, word_tokenizer


@pytest.fixture(scope="module")
def aligned(aligned_model_dir):
    """The aligned tiny model and its tokenizer."""
    return load_model_and_tokenizer(aligned_model_dir, device="cpu")


@pytest.fixture
def prompts(aligned):
    """Six prompts of different lengths."""
    questions = [question for question, _ in exchanges(forbidden=True)[:6]]
    return [prompt_token_ids(aligned[1], question) for question in questions]


def by_hand(model, prompt, steps, end):
    """Greedy decoding without cache, batch or padding."""
    ids = list(prompt)
    for _ in range(steps):
        token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == end:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_batched_answers_equal_those_by_hand(aligned, prompts):
    """Padding, batches and cache change no answer, nor does their order."""
    model, tokenizer = aligned
    expected = [by_hand(model, prompt, 16, tokenizer.eos_token_id) for prompt in prompts]
    for batch_size in (1, 4):
        answers = generate_greedy(
            model, tokenizer, prompts, max_new_tokens=16, batch_size=batch_size
        )
        assert answers == expected


def test_the_models_own_generation_settings_do_not_matter(aligned, prompts):
    """A sampling temperature and a repetition penalty of the model are ignored, then restored."""
    model, tokenizer = aligned
    plain = generate_greedy(model, tokenizer, prompts, max_new_tokens=16)
    own = model.generation_config
    own.repetition_penalty, own.do_sample, own.temperature = 9.0, True, 5.0
    try:
        assert generate_greedy(model, tokenizer, prompts, max_new_tokens=16) == plain
        assert model.generation_config is own
    finally:
        own.repetition_penalty, own.do_sample, own.temperature = 1.0, False, 1.0


def test_reading_leaves_no_trace(aligned):
    """Each module's mode and the random state are as before, even after an error."""
    model, _ = aligned
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()

    def read_and_fail():
        with reading(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        read_and_fail()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    model.eval()


def test_last_logits_equal_an_unpadded_forward(aligned, prompts):
    """A sequence's logits are those it has alone: fp32, so equal to a few units of rounding."""
    model, _ = aligned
    with torch.no_grad():
        together = last_logits(model, prompts, 3, pad=0)
        for row, prompt in enumerate(prompts):
            alone = model(torch.tensor([prompt])).logits[0, -3:]
            # logits of size 10 through 48-term sums: 1e-4 is about 100 roundings of 1e-6
            torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=0)


def test_a_prompt_longer_than_the_context_is_named(aligned, prompts):
    """The error says which prompt, its length and the context, before anything is generated."""
    model, tokenizer = aligned
    long = [*prompts, [9] * (CONTEXT - 3)]
    with pytest.raises(
        ValueError, match=rf"prompt 7 has {CONTEXT - 3} tokens.*context of {CONTEXT}"
    ):
        generate_greedy(model, tokenizer, long, max_new_tokens=4)


def test_prompts_without_a_chat_template():
    """A tokenizer without a template gets the default one for the call, and keeps none."""
    tokenizer = word_tokenizer(["Assistant:", "User:", "###", "sorry"], chat=False)
    text = tokenizer.decode(prompt_token_ids(tokenizer, "sorry"))
    assert text.endswith("sorry ### Assistant:")
    assert tokenizer.chat_template is None
