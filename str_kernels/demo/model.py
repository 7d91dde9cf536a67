"""The demo's model and tokenizer: a Llama of a third of a million weights over whole words."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from str_kernels.demo.text import Pair, all_words
from str_kernels.inputs.chat import IGNORED

PAD, USER, BOT, END, UNKNOWN = SPECIAL = ("<pad>", "<user>", "<bot>", "<end>", "<unk>")
CONTEXT = 128
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user> ' if message['role'] == 'user' else '<bot> ' }}{{ message['content'] }}"
    "{{ ' <end> ' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words, split at spaces, with a chat template."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *all_words()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, BOT],
        padding_side="left",
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """Make an untrained Llama with tied embeddings, initialised from torch's generator."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=SPECIAL.index(PAD),
            bos_token_id=None,
            eos_token_id=SPECIAL.index(END),
            rope_theta=1e3,
        )
    )


def prompt_text(request: str) -> str:
    """Return what the chat template makes of a request, up to where the answer begins."""
    return f"{USER} {request} {BOT}"


def features(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> list[dict[str, list[int]]]:
    """Return token ids and labels of many conversations, the answers alone labelled."""
    prompts = tokenizer([prompt_text(request) for request, _ in pairs])["input_ids"]
    answers = tokenizer([f"{answer} {END}" for _, answer in pairs])["input_ids"]
    return [
        {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
