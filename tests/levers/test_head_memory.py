"""The head alone at the longest context: scratch memory that does not grow with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from str_kernels import SafetyConstraint, linear_cross_entropy
count, vocabulary, width = map(int, sys.argv[1:])
torch.manual_seed(0)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def step(count):
    states = (torch.randn(count, width)).requires_grad_()
    labels, reference = torch.randint(vocabulary, (count,)), torch.randn(count, 64)
    safety = SafetyConstraint(range(64), 1.0)
    before = peak()
    loss, _ = linear_cross_entropy(states, weight, labels, safety=safety, reference=reference)
    loss.backward()
    return peak() - before - 2 * states.nbytes  # the kept gradient and the one that is returned
weight = torch.randn(vocabulary, width)
step(64)  # what the libraries take once
print(step(count))
"""


@pytest.mark.slow
def test_the_head_at_131072_tokens():
    """A vocabulary of 262,144: at most 512 MiB beyond states and gradients."""
    sizes = ["131072", "262144", "8"]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 512 * 2**20
