"""The exact pass by the vendor's BLAS: cuBLAS or hipBLAS multiplies, and one kernel does the rest.

Stage: ``Block`` → ``Dense``. Blocks of rows × words are so small that their logits stay in L2::

    logits = H Wᵀ       [rows, words] fp32, by BLAS
    shares_kernel       p = exp(z - shift) in the dtype of H, and sums of each row
    expected += p @ W   [rows, D] fp32, by BLAS, for the p of a few blocks of words at once

There are no atomics. Where rows without a label are not known to the host, and the call has more
rows than one block, the device sends their number and computes the first block, while the host
waits for the number; then only rows that need the vocabulary are queued. BLAS takes sizes from the
host alone, so that without the wait it would multiply all rows. fp16, whose exponents are too few,
and what needs a third product keep the pass of ``exact.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels.backends.triton.finish import join_rows
from str_kernels.backends.triton.launch import PRODUCT, SHARES
from str_kernels.backends.triton.operands import label_places, operands, tuning
from str_kernels.backends.triton.shares import shares_kernel
from str_kernels.engine.contract import Block, Dense, Wanted
from str_kernels.engine.finish import join_sums
from str_kernels.engine.logits import columns_of
from str_kernels.options import TILE, LossOptions


class _Sums(NamedTuple):
    """The rows of ``sums``, each ``[R]``; all but the last leave the label out.

    ``exact`` and ``kept`` are the sums of the shares before and after they were rounded.
    """

    shift: Tensor
    maximum: Tensor
    mass: Tensor
    weighted: Tensor
    exact: Tensor
    kept: Tensor
    logit_sum: Tensor


def exact_pass(block: Block, wanted: Wanted, byte_budget: int) -> Dense:
    """Compute every pair of R rows; the scratch of logits and p takes ``byte_budget`` bytes."""
    work = _Work(block, wanted, byte_budget)
    for part in work.parts():
        work.run(part)
    return work.finish()


class _Work:
    """The scratch and the results of one exact pass."""

    def __init__(self, block: Block, wanted: Wanted, byte_budget: int) -> None:
        self.block, self.wanted, self.given = block, wanted, operands(block)
        given = self.given
        self.labels, self.label_logit = label_places(block), columns_of(block).label
        size = given.hidden.element_size()
        self.rows = _even(given.rows, PRODUCT.rows)
        numbers = min(PRODUCT.rows * PRODUCT.words, byte_budget // (4 + size))
        tiles = max(1, numbers // (TILE * self.rows))
        self.words = TILE * min(tiles, given.tiles)
        self.group = self.words * self._held(byte_budget // (self.rows * self.words) - 4)
        self.sums = given.hidden.new_empty(len(_Sums._fields), given.rows, dtype=torch.float32)
        self.logits = self.sums.new_empty(self.rows, self.words)
        self.share = self.expected = None
        if wanted.hidden:
            self.share = given.hidden.new_empty(self.rows, self.group)
            self.expected = self.sums.new_empty(given.rows, given.dim)

    def _held(self, bytes_left: int) -> int:
        """Count the blocks of p that are multiplied at once, from bytes for each number."""
        given = self.given
        if given.weight.dtype != given.hidden.dtype:
            return 1  # their rows of W are cast, and take memory as well
        most = bytes_left // given.hidden.element_size()
        return max(1, min(most, -(-given.vocab // self.words)))

    def parts(self) -> Iterator[slice]:
        """Cut the rows that need the vocabulary, as far as the host knows or can learn them."""
        present, before, done = self.block.present, self.block.start, 0
        rows = self.given.rows
        if present is not None and before == 0:
            done = min(rows, self.rows)
            if present.total > done:
                present.send()
            if done:
                yield slice(0, done)
        if present is not None and done < rows:
            # of a few sizes, for each of which BLAS chooses a kernel
            rows = min(rows, 16 * -(-max(0, present.read() - before) // 16))
        size = _even(rows - done, self.rows)
        for start in range(done, rows, size):
            yield slice(start, min(start + size, rows))

    def run(self, part: slice) -> None:
        """Pass over the vocabulary for these rows."""
        hidden, filled = self.given.hidden[part], 0
        for first in range(0, self.given.vocab, self.group):
            weight = self.given.weight[first : first + self.group].to(hidden.dtype)
            for held in range(0, len(weight), self.words):
                rows = weight[held : held + self.words]
                products = self.logits[: len(hidden), : len(rows)]
                multiply(hidden, rows.T, out=products)
                self._share(part, products, first=first + held, held=held, filled=filled)
            if self.expected is not None:
                share = self.share[: len(hidden), : len(weight)]
                multiply(share, weight, out=self.expected[part], add=filled > 0)
                filled = self.given.dim

    def _share(self, part: slice, products: Tensor, *, first: int, held: int, filled: int) -> None:
        """Launch the kernel for one block of words."""
        given, options = self.given, self.block.options
        shares_kernel[(-(-len(products) // SHARES.block_r),)](
            products,
            given.bias,
            self.labels[part],
            self.label_logit[part] if options.label_smoothing else None,
            self.share,
            self.sums[:, part],
            None if self.expected is None else self.expected[part],
            len(products),
            given.rows,
            first,
            products.shape[1],
            self.words,
            self.group,
            held,
            filled,
            float(options.logit_scale),
            None if options.softcap is None else float(options.softcap),
            **tuning(SHARES, "RD"),
        )

    def finish(self) -> Dense:
        """Add the label's own logit, and correct the rounding of each row's shares."""
        sums, options = _Sums(*self.sums), self.block.options
        smooth = None
        if options.label_smoothing:
            smooth = options.logit_scale * self.given.weight.sum(0, dtype=torch.float32)
        return join_sums(
            self.block,
            self.label_logit,
            shift=sums.shift,
            mass=sums.mass,
            maximum=sums.maximum,
            expected=self.expected,
            weighted=sums.weighted if self.wanted.entropy else None,
            logit_sum=sums.logit_sum if options.label_smoothing else None,
            smooth_gradient=smooth,
            # the rounded shares sum to what the exact ones do, as `tiles.rounded` says
            exact=sums.exact if self.wanted.hidden else None,
            kept=sums.kept if self.wanted.hidden else None,
            join=join_rows,
        )


def multiply(left: Tensor, right: Tensor, *, out: Tensor, add: bool = False) -> None:
    """Write ``left @ right`` to ``out`` fp32 [·, ·], or add it: exact products, summed in fp32."""
    if left.dtype == torch.float32 or left.device.type == "cpu":  # a CPU has no ``out_dtype``
        left, right = left.float(), right.float()
        torch.addmm(out, left, right, beta=float(add), out=out)
    elif add:
        # torch 2.8's addmm wants bf16 to add to
        sums = out[None]
        torch.baddbmm(sums, left[None], right[None], out_dtype=torch.float32, out=sums)
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=out)


@cache
def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether BLAS multiplies such operands into fp32 there: torch does since 2.8, but on a CPU."""
    one, out = (torch.zeros(16, 16, dtype=kind, device=device) for kind in (dtype, torch.float32))
    try:
        multiply(one, one, out=out)
        multiply(one, one, out=out, add=True)
    except (TypeError, RuntimeError):  # an unknown argument, or a product that is not there
        return False
    return True


def blas_refusal(dtype: torch.dtype, device: torch.device, options: LossOptions) -> str | None:
    """Say why this pass cannot run; None if it can."""
    if dtype == torch.float16:
        return "fp16 has no exponents for probabilities relative to another block's maximum"
    if options.softcap is not None and options.label_smoothing:
        return "label smoothing under a softcap needs one more product"
    if options.leaves_out and options.label_smoothing:
        return "label smoothing sums no logit that a constraint leaves out"
    if not widens(dtype, device):
        return f"torch {torch.__version__} has no product of {dtype} into fp32 on this device"
    return None


def _even(count: int, most: int) -> int:
    """Return the rows of a block when ``count`` are cut into as few as hold at most ``most``."""
    blocks = -(-count // most) or 1
    return max(1, min(most, 16 * -(-count // (16 * blocks))))
