"""`str-kernels tokens`: find a model's safety tokens, show them, save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from str_kernels.cli import console
from str_kernels.cli.options import AsJson, BatchSize, Device, Dtype, ModelName
from str_kernels.files import replacing
from str_kernels.ranks import share_work
from str_kernels.safety.tokens import SafetyTokens

ASKED = 20  # requests
ANSWER_TOKENS = 32  # enough to see a refusal
ANCHOR_TOKENS = 24  # as short as they were measured
HARDLY = 0.25  # share of the requests; who refuses fewer has nothing to hold


def tokens(
    model: ModelName,
    *,
    out: Annotated[Path, typer.Option(help="File to save the tokens in.")] = Path(
        "safety_tokens.json"
    ),
    top_k: Annotated[int, typer.Option(help="How many tokens to keep.", min=1, max=1024)] = 64,
    templates: Annotated[
        Path | None,
        typer.Option(help="Rejections: one on each line, or JSONL responses. Default: built in."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Requests to refuse: one on each line, or JSONL. Default: built in."),
    ] = None,
    benign: Annotated[
        Path | None,
        typer.Option(help="Requests to answer: one on each line, or JSONL. Default: built in."),
    ] = None,
    anchors: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write refused.jsonl and benign.jsonl in, the requests with the model's "
            "own answers: anchors of train."
        ),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter to put on the model.")] = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Find the tokens that a model's refusals consist of, and save them."""
    console.check_output("out", out)
    files = {} if anchors is None else {n: anchors / f"{n}.jsonl" for n in ("refused", "benign")}
    if anchors is not None:
        for path in files.values() if anchors.is_dir() else (anchors,):
            console.check_output("anchors", path)
    with console.stage("reading"):
        console.quiet_libraries()
        from str_kernels.inputs.loading import load_model_and_tokenizer

        texts = {
            "templates": _answers(templates),
            "prompts": _requests(prompts),
            "benign_prompts": _requests(benign),
        }
        loaded, tokenizer = load_model_and_tokenizer(
            model, dtype=dtype, adapter=adapter, device=device
        )
    with share_work(), console.stage("asking what it refuses"):
        refused = _refused(loaded, tokenizer, texts["prompts"], batch_size)
    requests = "built-in requests" if prompts is None else f"requests of {prompts}"
    console.say(_how_often(model, *refused, requests))
    with share_work() as ranks, console.stage("identifying safety tokens"):
        found = SafetyTokens.identify(
            loaded, tokenizer, top_k=top_k, batch_size=batch_size, **texts
        )
    if ranks.first:
        found.save(out)
    if files:
        with share_work() as ranks, console.stage("answering the requests"):
            answered = answered_requests(loaded, tokenizer, texts, batch_size)
        if ranks.first:
            anchors.mkdir(exist_ok=True)
            for name, path in files.items():
                _write(path, answered[name])
    if as_json:
        console.print_json({"path": str(out), **found.as_dict()})
    else:
        _show(model, found)
    console.say(f"saved {out}")
    options = ""
    if files:
        console.say("saved " + " and ".join(map(str, files.values())))
        options = "".join(f" --anchors {path}" for path in files.values())
    console.say(f"next: str-kernels train {model} DATA.jsonl --tokens {out}{options} --out ADAPTER")


def answered_requests(
    model: Any, tokenizer: Any, texts: dict[str, list[Any] | None], batch_size: int = 8
) -> dict[str, list[dict[str, Any]]]:
    """Make rows of the requests with the model's own answers; without an answer there is no row.

    Raises:
        ValueError: the model answers none of a kind.
    """
    from str_kernels.evaluation.evaluation import answer_rows
    from str_kernels.safety.templates import BENIGN_REQUESTS, REFUSED_REQUESTS

    pools = {
        "refused": texts.get("prompts") or REFUSED_REQUESTS,
        "benign": texts.get("benign_prompts") or BENIGN_REQUESTS,
    }
    found = {}
    for name, pool in pools.items():
        rows = [_row(request) for request in pool]
        answers = answer_rows(
            model, tokenizer, rows, max_new_tokens=ANCHOR_TOKENS, batch_size=batch_size
        )
        pairs = zip(rows, answers, strict=True)
        found[name] = [_answered(row, answer) for row, answer in pairs if answer]
        if not found[name]:
            raise ValueError(f"anchors: the model answers none of the {len(rows)} {name} requests.")
    return found


def _answered(row: dict[str, Any], answer: str) -> dict[str, Any]:
    if "messages" not in row:
        return {**row, "response": answer}
    return {"messages": [*row["messages"], {"role": "assistant", "content": answer}]}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with replacing(path) as partial:
        partial.write_text(lines, encoding="utf-8")


def _refused(
    model: Any, tokenizer: Any, prompts: list[Any] | None, batch_size: int
) -> tuple[int, int]:
    """Count the refusals among the model's own answers to the first requests."""
    from str_kernels.evaluation.evaluation import answer_rows
    from str_kernels.evaluation.judge import is_refusal
    from str_kernels.safety.templates import REFUSED_REQUESTS

    asked = list(REFUSED_REQUESTS if prompts is None else prompts)[:ASKED]
    rows = [_row(one) for one in asked]
    answers = answer_rows(
        model, tokenizer, rows, max_new_tokens=ANSWER_TOKENS, batch_size=batch_size
    )
    return sum(map(is_refusal, answers)), len(answers)


def _row(request: Any) -> dict[str, Any]:
    return {"prompt": request} if isinstance(request, str) else {"messages": request}


def _how_often(model: str, refused: int, asked: int, requests: str) -> str:
    told = f"{model} refuses {refused} of {asked} {requests}"
    if refused >= HARDLY * asked:
        return told
    return (
        f"{told}: there is nothing to hold, for the constraint keeps the refusals that a model "
        "has; align the model first, or give --prompts that it refuses."
    )


def _show(model: str, found: SafetyTokens) -> None:
    rows = [
        [str(rank), str(token), repr(text), f"{score:+.4f}"]
        for rank, (token, text, score) in enumerate(
            zip(found.token_ids, found.tokens, found.scores or (), strict=True), start=1
        )
    ]
    console.print_table(
        f"{len(found)} safety tokens of {model}", ["", "id", "token", "score"], rows
    )


def _answers(path: Path | None) -> list[str] | None:
    from str_kernels.inputs.data import read_jsonl
    from str_kernels.inputs.rows import response_of

    if path is None or path.suffix != ".jsonl":
        return _lines(path)
    return [response_of(row) or "" for row in read_jsonl(path)]


def _requests(path: Path | None) -> list[Any] | None:
    from str_kernels.inputs.data import read_jsonl
    from str_kernels.inputs.rows import prompt_messages

    if path is None or path.suffix != ".jsonl":
        return _lines(path)
    rows = read_jsonl(path, response_required=False)
    if with_tools := sum("tools" in row for row in rows):
        console.say(f"note: {path}: the tools of {with_tools} rows are not shown to the model.")
    return [prompt_messages(row) for row in rows]


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
        raise ValueError(f"{path}: holds no text; write one text on each line.")
    return [line for line in found if line]
