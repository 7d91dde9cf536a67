"""`str-kernels tokens`: find a model's safety tokens, show them, save them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from str_kernels.cli.console import (
    check_output,
    print_json,
    print_table,
    quiet_libraries,
    say,
    stage,
)

if TYPE_CHECKING:
    from str_kernels.safety.tokens import SafetyTokens


def tokens(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or GGUF file.")],
    out: Annotated[Path, typer.Option(help="Where to save them.")] = Path("safety_tokens.json"),
    top_k: Annotated[int, typer.Option(help="How many tokens to keep.", min=1, max=1024)] = 64,
    templates: Annotated[
        Path | None,
        typer.Option(help="Rejections: a text a line, or JSONL responses. Default: built in."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Requests to refuse: a text a line, or JSONL. Default: built in."),
    ] = None,
    benign: Annotated[
        Path | None,
        typer.Option(help="Requests to answer: a text a line, or JSONL. Default: built in."),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter to put on the model.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences side by side.", min=1)] = 8,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Find the tokens that a model's refusals are made of, and save them."""
    check_output("out", out)
    with stage("reading"):
        quiet_libraries()
        from str_kernels.inputs.loading import load_model_and_tokenizer
        from str_kernels.safety.tokens import SafetyTokens

        texts = {
            "templates": _answers(templates),
            "prompts": _requests(prompts),
            "benign_prompts": _requests(benign),
        }
        loaded, tokenizer = load_model_and_tokenizer(
            model, dtype=dtype, adapter=adapter, device=device
        )
    with stage("listening to refusals"):
        found = SafetyTokens.identify(
            loaded, tokenizer, top_k=top_k, batch_size=batch_size, **texts
        )
    found.save(out)
    if as_json:
        print_json({"path": str(out), **found.as_dict()})
    else:
        _show(model, found)
    say(f"saved {out}")
    say(f"next: str-kernels train {model} DATA.jsonl --tokens {out} --out ADAPTER")


def _show(model: str, found: SafetyTokens) -> None:
    rows = [
        [str(rank), str(token), repr(text), f"{score:+.4f}"]
        for rank, (token, text, score) in enumerate(
            zip(found.token_ids, found.tokens, found.scores or (), strict=True), start=1
        )
    ]
    print_table(f"{len(found)} safety tokens of {model}", ["", "id", "token", "score"], rows)


def _answers(path: Path | None) -> list[str] | None:
    from str_kernels.inputs.data import read_jsonl, response_of

    if path is None or path.suffix != ".jsonl":
        return _lines(path)
    return [response_of(row) or "" for row in read_jsonl(path)]


def _requests(path: Path | None) -> list[Any] | None:
    from str_kernels.inputs.data import prompt_messages, read_jsonl

    if path is None or path.suffix != ".jsonl":
        return _lines(path)
    return [prompt_messages(row) for row in read_jsonl(path, response_required=False)]


def _lines(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}).") from error
    if not any(found):
        raise ValueError(f"{path}: holds no text; must have one a line.")
    return [line for line in found if line]
