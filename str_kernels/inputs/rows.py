"""One row of data: which forms are read, and which answers are marked as not learned.

Stage: a JSON object → a checked row with ``prompt`` and ``response``, or ``messages``, and with
``tools`` where the conversation has some. Other forms are refused with the way to convert them.
"""

from __future__ import annotations

from itertools import islice
from reprlib import repr as shortened
from typing import Any

from str_kernels.inputs.jsonl import RowFault, parse_line, recipe

Row = dict[str, Any]
Message = dict[str, Any]
Messages = list[Message]

# A message's mark of 0 or false means: read this answer and do not learn it.
MARKS = ("weight", "train", "trainable", "training", "loss", "loss_mask")

_ASSISTANTS = ("model", "gpt", "bot", "ai", "chatbot", "chatgpt")
_ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(_ASSISTANTS, "assistant"),
    "human": "user",
}
_NAMES = str({other: name for other, name in _ROLES.items() if other != name})
_RENAMED = f"(lambda name: {_NAMES}.get(name, name))"
_SHAREGPT = (
    f"{{'messages': [{{'role': {_RENAMED}(m['from'].lower()), 'content': m['value']}} "
    "for m in r['%s']]}"
)
_ROLES_RENAMED = recipe(
    f"{{**r, 'messages': [{{**m, 'role': {_RENAMED}(m['role'].lower())}} for m in r['messages']]}}"
)
_PARTS_JOINED = recipe(
    "{**r, 'messages': [{**m, 'content': ''.join(p['text'] for p in m['content']) "
    "if isinstance(m['content'], list) else m['content']} for m in r['messages']]}"
)

# Forms of other programs: the key that gives one away, its name, the row that it would be here.
_FORMS = (
    ("conversations", "ShareGPT's form", _SHAREGPT % "conversations"),
    ("conversation", "ShareGPT's form", _SHAREGPT % "conversation"),
    (
        "instruction",
        "Alpaca's form",
        "{'prompt': (r['instruction'] + chr(10) + (r.get('input') or '')).strip(), "
        "'response': r.get('output')}",
    ),
    (
        "completion",
        "the prompt/completion form",
        "{'prompt': r['prompt'], 'response': r['completion']} if isinstance(r['prompt'], str) "
        "else {'messages': r['prompt'] + r['completion']}",
    ),
)
_RULE = 'must have "messages", or "prompt" and "response"'


def checked(row: Any, *, response_required: bool) -> Row:
    """Return the row as it is used: with ``tools`` as a list, or without the key.

    Raises:
        RowFault: the row has another form, or a value that would be misread.
    """
    if not isinstance(row, dict):
        raise RowFault(f"is a {type(row).__name__}; must be a JSON object.")
    _check_form(row)
    if "messages" in row:
        _check_messages(row["messages"])
    if response_required:
        _check_answer(_answer(row))
    _check_marks_of_row(row)
    return _with_tools(row)


def prompt_messages(row: Row) -> Messages:
    """Return the conversation up to the answer, as chat messages."""
    if "messages" not in row:
        return [{"role": "user", "content": row["prompt"]}]
    messages = row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def response_of(row: Row) -> str | None:
    """Return a row's answer: its response, or the last message if the assistant speaks there."""
    return _answer(row).get("content")


def conversation(row: Row) -> Messages:
    """Return the whole conversation, with the answer if the row has one."""
    if "messages" in row:
        return row["messages"]
    answer = row.get("response")
    told = [] if answer is None else [{"role": "assistant", "content": answer}]
    return [*prompt_messages(row), *told]


def is_blank(text: str) -> bool:
    """Tell whether a text shows nothing: white space and characters without a shape."""
    return all(character.isspace() or not character.isprintable() for character in text)


def is_learned(message: Message) -> bool:
    """Tell whether an assistant's message is learned; a mark of 0 or false says that it is not.

    Raises:
        RowFault: a mark is neither 0 nor 1, or two marks contradict each other.
    """
    given = {name: message[name] for name in MARKS if message.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise RowFault(
                f"{name}={shortened(value)}: must be 0 (read, not learned) or 1 (learned); the "
                "loss has no other weights."
            )
    if len(set(map(bool, given.values()))) > 1:
        raise RowFault(f"has marks that contradict each other: {given}.")
    return all(given.values())


def _check_form(row: Row) -> None:
    """Refuse a row that has neither ``messages`` nor ``prompt`` and ``response`` of text."""
    if "messages" in row:
        return
    prompt, response = row.get("prompt"), row.get("response")
    if response is None:
        for key, name, expression in _FORMS:
            if row.get(key) is not None:
                raise RowFault(f'has "{key}", which is {name}; {_RULE}.', recipe(expression))
    if isinstance(prompt, list):
        raise RowFault('has a list as "prompt"; give one list, "messages".')
    if not isinstance(prompt, str) or not prompt.strip():
        keys = f"; it has {', '.join(map(shortened, islice(row, 8)))}" if row else ""
        raise RowFault(f'must have "messages", or "prompt" with some text{keys}.')
    if not isinstance(response, str | None):
        raise RowFault(f"response={shortened(response)}: must be text.")


def _answer(row: Row) -> Message:
    """Return the message that answers; it is empty where the row has none."""
    if "messages" not in row:
        return {"content": row.get("response")}
    last = row["messages"][-1]
    return last if last["role"] == "assistant" else {}


def _check_answer(answer: Message) -> None:
    if answer.get("tool_calls"):
        return
    if not answer.get("content"):
        raise RowFault('has no answer: add "response", or an assistant\'s message at the end.')
    if is_blank(answer["content"]) and is_learned(answer):
        raise RowFault("has an answer of blanks, which teaches to say nothing; leave the row out.")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise RowFault("messages must be a list with at least one message.")
    for position, message in enumerate(messages):
        try:
            _check_message(message, last=position == len(messages) - 1)
        except RowFault as fault:
            raise RowFault(f"messages[{position}] {fault}", fault.remedy) from fault
    if all(message["role"] == "assistant" for message in messages):
        raise RowFault("messages must contain a message that is not the assistant's.")


def _check_message(message: Any, *, last: bool) -> None:
    if isinstance(message, dict) and "from" in message and "role" not in message:
        raise RowFault(
            'has "from" and "value"; must have "role" and "content".',
            recipe(_SHAREGPT % "messages"),
        )
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowFault('must have "role" and "content", both text.')
    role = message["role"]
    known = _ROLES.get(role.lower())
    if known not in (None, role):
        raise RowFault(
            f"has the role {shortened(role)}; must be {known!r}, which is what chat "
            "templates call it.",
            _ROLES_RENAMED,
        )
    _check_content(message)
    learned, assistant = is_learned(message), role == "assistant"
    if not assistant and learned and any(message.get(name) for name in MARKS):
        raise RowFault(
            f"is marked as learned, and its role is {shortened(role)}; only the assistant's "
            "messages are learned: remove the mark."
        )
    empty = is_blank(message.get("content") or "") and not message.get("tool_calls")
    if assistant and learned and empty and not last:
        raise RowFault(
            "is an answer of blanks, which teaches to say nothing; mark it with weight 0, or "
            "leave the row out."
        )


def _check_content(message: Message) -> None:
    """Check that there is text, or tool calls in its place."""
    content = message.get("content")
    if message.get("function_call") is not None:
        raise RowFault(
            'has "function_call"; must have "tool_calls": [{"type": "function", "function": …}].'
        )
    if isinstance(content, list):
        raise RowFault(
            'has a list of parts as "content"; must be text, for only text is learned and asked.',
            _PARTS_JOINED,
        )
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(map(_names_a_function, calls))):
        raise RowFault(
            f"tool_calls={shortened(calls)}: must be a list of "
            '{"type": "function", "function": {"name": …, "arguments": …}}.'
        )
    if not isinstance(content, str) and not (content is None and calls):
        raise RowFault('must have "role" and "content", both text.')


def _names_a_function(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(called_name(call), str)


def called_name(call: Message) -> Any:
    """Return the name of the function that a tool call calls."""
    inner = call.get("function", call)
    return inner.get("name") if isinstance(inner, dict) else None


def _check_marks_of_row(row: Row) -> None:
    for name in MARKS:
        value = row.get(name)
        if value is not None and not (isinstance(value, int | float) and value == 1):
            raise RowFault(
                f"{name}={shortened(value)}: a row has no weight of its own; leave the row out, or "
                "mark the assistant's messages with weight 0 or 1, or remove the key."
            )


def _with_tools(row: Row) -> Row:
    """Return the row with its tools as a list; ``functions`` is what they were called before."""
    if "tools" not in row and "functions" not in row:
        return row
    tools, functions = (_tool_list(name, row.get(name)) for name in ("tools", "functions"))
    if tools and functions:
        raise RowFault('has "tools" and "functions", which is the old name; keep "tools".')
    tools += [{"type": "function", "function": function} for function in functions]
    rest = {name: value for name, value in row.items() if name not in ("tools", "functions")}
    return {**rest, "tools": tools} if tools else rest


def _tool_list(name: str, value: Any) -> list[dict[str, Any]]:
    """Return the tools of a row; some programs write the list as JSON text."""
    found = parse_line(value) if isinstance(value, str) and value.strip() else value or []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise RowFault(f"{name}={shortened(value)}: must be a list of objects, one for each tool.")
    return found
