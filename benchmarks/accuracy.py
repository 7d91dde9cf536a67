"""Measure error and live share by ε, screen, index and logit scale, beside the bf16 head.

Example: python -m benchmarks.accuracy --model ./gemma --data answers.jsonl --other prose.jsonl
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.accuracy_plot import draw
from benchmarks.common import cases, finish, parse, parser, results
from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.bench.contenders import CONTENDERS
from str_kernels.bench.inputs import Case, from_model
from str_kernels.bench.report import cells, markdown
from str_kernels.bench.truth import Truth, errors, truth_of
from str_kernels.cli.console import say
from str_kernels.functional import linear_cross_entropy
from str_kernels.vocabulary import VocabularyIndex

EPSILONS = [2.0**-k for k in (7, 9, 11, 13, 15)]
LARGEST_LOGITS = (5, 20, 80, 160, 320, 640)
KEYS = ("case", "dtype", "what", "index", "screen", "eps", "largest_logit")


def main() -> None:
    """Measure every setting on every case, and draw a plot of each case."""
    made = parser(__doc__, rows=512)
    made.add_argument("--other", help="other text to make an index from, with --model")
    args = parse(made)
    found = results(args, "accuracy", KEYS)
    text = []
    for case in cases(args):
        say(case.name)
        if not found.has(case=case.name, dtype=case.dtype, what="done"):
            for row in _all(case, args):
                found.add({"case": case.name, "dtype": case.dtype, **row})
            found.add({"case": case.name, "dtype": case.dtype, "what": "done"})
        mine = [row for row in found.rows if (row["case"], row["dtype"]) == (case.name, case.dtype)]
        rows = [row for row in mine if "hidden_error" in row]
        name = "-".join(case.name.replace(",", "").replace("'", "").split()).lower()
        draw(rows, case.name, args.out / f"accuracy-{name}-{case.dtype}.png")
        text.append(f"### {case.name}, {case.dtype}\n\n{markdown(*table(rows))}")
    finish(args.out, "accuracy", "\n".join(text))


def _all(case: Case, args: Any) -> Iterator[dict[str, Any]]:
    """Yield every row: the bf16 head, then ε × index, the screens, the logit scales."""
    truth = truth_of(case)
    yield {"what": "bf16 head", **bf16_head(case)}
    indices: dict[str, VocabularyIndex | None] = {"like text": case.index}
    if args.other:
        calibration = from_model(args.model, args.other, 2, positions="all").calibration
        indices["other text"] = VocabularyIndex.build(case.weight, calibration.to(case.weight))
    indices["no text"] = VocabularyIndex.build(case.weight)
    indices["none"] = None
    for name, index in indices.items():
        for eps in EPSILONS:
            yield {"what": "eps", "index": name, **filtered(case, truth, index, eps, "auto")}
    for screen in ("exact", "bf16", "int8"):
        row = filtered(case, truth, case.index, DEFAULT_EPS, screen)
        yield {"what": "screen", "index": "like text", **row}
    largest = (case.hidden_states[:64].float() @ case.weight.float().T).abs().max().item()
    for target in LARGEST_LOGITS:
        scaled = replace(case, hidden_states=case.hidden_states * (target / largest))
        row = filtered(scaled, truth_of(scaled), case.index, DEFAULT_EPS, "auto")
        yield {"what": "scale", "index": "like text", "largest_logit": target, **row}
        yield {"what": "bf16 head", "largest_logit": target, **bf16_head(scaled)}


def filtered(
    case: Case, truth: Truth, index: VocabularyIndex | None, eps: float, screen: str
) -> dict[str, Any]:
    """Return the errors and the live share of these settings."""
    hidden = case.hidden_states.detach().requires_grad_()
    weight = case.weight.detach().requires_grad_()
    loss, parts = linear_cross_entropy(
        hidden,
        weight,
        case.labels,
        index=index,
        filter_eps=eps,
        screen=screen,
        return_parts=True,
    )
    d_hidden, d_weight = torch.autograd.grad(loss, [hidden, weight])
    found = errors(truth, loss.detach(), d_hidden, d_weight, parts.lse)
    live, dead = (x.mean().item() for x in (parts.live_share, parts.dead_mass))
    return {"eps": eps, "screen": screen, "live": live, "dead_mass": dead, **found}


def bf16_head(case: Case) -> dict[str, Any]:
    """Return the errors of the ordinary head: logits and gradient in bf16, the softmax in fp32."""
    case = case.cast(torch.bfloat16)
    truth = truth_of(case)
    outcome = CONTENDERS["transformers"].run(case, trainable=True)
    logits = (case.hidden_states @ case.weight.T).float()
    return errors(truth, *outcome[:3], torch.logsumexp(logits, -1))


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Make a table with a line for each setting."""
    named = []
    for row in rows:
        words = [row["what"], row.get("index", ""), row.get("screen", "")]
        if row.get("eps"):
            words.append(f"ε {row['eps']:.1e}, live {row['live']:.1%}")
        if row.get("largest_logit"):
            words.append(f"largest logit {row['largest_logit']}")
        named.append(row | {"setting": ", ".join(filter(None, words))})
    return cells(named, "setting")


if __name__ == "__main__":
    main()
