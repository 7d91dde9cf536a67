"""Tiny models and tokenizers, made on the spot from configurations; nothing is downloaded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user> ' if message['role'] == 'user' else '<bot> ' }}{{ message['content'] }}"
    "{{ ' <end> ' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)
SPECIAL = ["<pad>", "<unk>", "<user>", "<bot>", "<end>"]
_TEXT = """I i 'm am sorry Sorry , . ? ! cannot can not help with that this request No no will
unable to assist must decline do Sure sure here is how you a the of and tell me please what topic
weather music sport travel rain wind ball team train ticket song choir steal break bicycle lamp my
neighbour 's clean repair paint it one two three four"""
WORDS = _TEXT.split()
CONTEXT = 128


def word_tokenizer(words: list[str] = WORDS, *, chat: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer that splits at spaces and knows ``words``."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(SPECIAL + list(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(tokenizer, chat)


def byte_tokenizer(text: list[str], *, size: int = 500, chat: bool = True):
    """A byte-level BPE trained on ``text``: words with and without a leading space, as GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return _wrapped(tokenizer, chat)


def _wrapped(tokenizer: Tokenizer, chat: bool) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<bot>"],
        model_max_length=CONTEXT,
    )
    wrapped.chat_template = CHAT_TEMPLATE if chat else None
    return wrapped


def llama(vocab_size: int, *, seed: int = 0, hidden: int = 32, layers: int = 1) -> LlamaForCausalLM:
    """A Llama of a few thousand weights, tied, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=SPECIAL.index("<end>"),
        )
        return LlamaForCausalLM(config).eval()


def save_tiny_model(folder: Path) -> Path:
    """Write a tiny Llama and its word tokenizer as ``save_pretrained`` does; returns ``folder``."""
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder)
    llama(len(tokenizer)).save_pretrained(folder)
    return Path(folder)


REFUSAL = "I am sorry , I cannot help with that ."
ANSWER = "sure , here is how you {} it ."
FORBIDDEN, HARMLESS = ("steal", "break"), ("clean", "repair", "paint")
FRAMES = ("tell me how to {} {} please", "how to {} {} ?", "please help me {} {} .")
THINGS = ("my neighbour 's bicycle", "the lamp", "a train", "my ball", "the bicycle", "a lamp")


def exchanges(*, forbidden: bool) -> list[tuple[str, str]]:
    """Requests with the answers that the aligned tiny model learns: refusals, or some help."""
    return [
        (frame.format(verb, thing), REFUSAL if forbidden else ANSWER.format(verb))
        for verb in (FORBIDDEN if forbidden else HARMLESS)
        for thing in THINGS
        for frame in FRAMES
    ]


def align(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, steps: int = 160) -> None:
    """Teach a tiny model to refuse forbidden acts and to help with harmless ones; in place."""
    rows = exchanges(forbidden=True) + exchanges(forbidden=False)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}, {"role": "assistant", "content": a}], tokenize=False
        )
        for q, a in rows
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    after_bot = (ids == tokenizer.convert_tokens_to_ids("<bot>")).cumsum(-1) > 0
    labels = ids.masked_fill((mask == 0) | ~after_bot, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    shuffle = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        chosen = torch.randperm(len(ids), generator=shuffle)[:32]
        loss = model(ids[chosen], attention_mask=mask[chosen], labels=labels[chosen]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def save_aligned_model(folder: Path) -> Path:
    """Write a tiny Llama that refuses forbidden acts, and its tokenizer; returns ``folder``."""
    tokenizer = word_tokenizer()
    model = llama(len(tokenizer), hidden=64, layers=2)
    align(model, tokenizer)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return Path(folder)
