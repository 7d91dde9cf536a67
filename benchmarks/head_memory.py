"""Count the bytes that the head takes beside its states and their gradient, at a long context.

Example: python -m benchmarks.head_memory --rows 131072 --vocab 262144 --dim 256
"""

from __future__ import annotations

import argparse

import torch

from str_kernels import SafetyConstraint, VocabularyIndex, linear_cross_entropy
from str_kernels.bench.inputs import synthetic
from str_kernels.bench.memory import peak_bytes
from str_kernels.cli.console import say

TOKENS = 64


def main() -> None:
    """Count a forward and a backward with a frozen head, an index and a constraint."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rows", type=int, default=131072, help="positions, N")
    made.add_argument("--vocab", type=int, default=262144, help="V")
    made.add_argument("--dim", type=int, default=256, help="D")
    args = made.parse_args()
    case = synthetic(args.rows, args.vocab, args.dim)
    states = case.hidden_states.requires_grad_()
    index = VocabularyIndex.build(case.weight, case.calibration)
    safety = SafetyConstraint(range(TOKENS), kind="kl", strength=10.0)
    reference, losses = torch.randn(args.rows, TOKENS), []

    def forward() -> None:
        losses.append(
            linear_cross_entropy(
                states, case.weight, case.labels, index=index, safety=safety, reference=reference
            )
        )

    def backward() -> None:
        losses.pop().backward()

    peak = peak_bytes(forward, states.device, backward).peak
    say(f"{(peak - states.grad.nbytes) / 2**20:.1f} MiB beside states and gradient")


if __name__ == "__main__":
    main()
