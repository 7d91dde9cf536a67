"""Chat templates: the programs, in a tokenizer, that write a conversation as text.

Stage: messages and tools → text. A template comes with the model, so that whatever it does with a
conversation that it was not written for becomes a readable error.
"""

from __future__ import annotations

import json
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from str_kernels.inputs.rows import MARKS, Messages, called_name

# Tokenizers of base models have no template of their own. This one writes
#   ### User:⏎ the request ⏎⏎### Assistant:⏎ the answer <end of text>
# A newline ends every heading, so that no tokenizer joins a heading with the text after it.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token if bos_token is defined and bos_token else '' }}"
    "{% for message in messages %}"
    "{{ '\n\n' if not loop.first else '' }}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Assistant:\n' }}{% endif %}"
)

Tools = list[dict[str, Any]] | None

# What a template's own code may raise; a template is a program that came with the model.
_TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    SyntaxError,
)


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template the default one; return whether it was needed.

    Raises:
        ValueError: the default template needs an end token, and the tokenizer has none.
    """
    if tokenizer.chat_template is not None:
        return False
    if tokenizer.eos_token is None:
        raise ValueError(
            "tokenizer has neither a chat template nor an end token, so that answers would never "
            "end: set one of the two."
        )
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return True


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    answer_next: bool = False,
    tools: Tools = None,
) -> str:
    """Return the conversation as text; ``answer_next`` begins the assistant's turn.

    Raises:
        ValueError: the template rejects the conversation, for example a role it does not know, or
            does not write the calls of a message that has nothing else.
    """
    text = apply(
        tokenizer, messages, tools=tools, tokenize=False, add_generation_prompt=answer_next
    )
    _check_calls(text, messages, tools)
    return text


def apply(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools, **keywords: Any
) -> Any:
    """Apply the chat template to the messages without their marks."""
    shown = [{key: m[key] for key in m if key not in MARKS} for m in messages]
    try:
        template = template_text(tokenizer, tools)
        return tokenizer.apply_chat_template(shown, tools, chat_template=template, **keywords)
    except _TEMPLATE_ERRORS as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the chat template rejects this conversation: {error or type(error).__name__}. Its "
            f"roles are {roles}; give the order that the template asks for, or use another "
            "template."
        ) from error


def template_text(tokenizer: PreTrainedTokenizerBase, tools: Tools) -> str:
    """Return the text of the template; a tokenizer may have one of its own for tools."""
    if not tokenizer.chat_template:
        return DEFAULT_CHAT_TEMPLATE
    return tokenizer.get_chat_template(None, tools)


def _check_calls(text: str, messages: Messages, tools: Tools) -> None:
    """Check that a message without content shows its calls, and nothing in the content's place."""
    silent = [m for m in messages if m.get("content") is None]
    names = [called_name(call) for message in silent for call in message.get("tool_calls") or ()]
    if any(name not in text for name in names):
        raise ValueError(
            "the chat template does not write tool_calls, so that a message with content null is "
            "empty; use a template that knows tools, or write the calls as content."
        )
    if silent and text.count("None") > json.dumps([messages, tools]).count("None"):
        raise ValueError(
            'the chat template writes "None" for content null; give "content": "" instead.'
        )
