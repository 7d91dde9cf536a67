"""What Triton's interpreter needs before its answers mean anything, and a counter of its products.

The interpreter multiplies the bit patterns of bf16 operands in ``tl.dot``, without any error, and
cuts fp32 to bf16 off where a GPU rounds to nearest. `mend` widens operands to fp32 first, which is
what a matrix unit does, and makes casts round. Before Triton 3.7 the interpreter cannot count a
loop to a number that it has loaded: NumPy 2.4 no longer takes an array ``[1]`` for a number.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

COUNTED = {"flops": 0}  # operations in ``tl.dot``, 8-bit ones at half
_dot = interpreter.InterpreterBuilder.create_dot
_cast_impl = interpreter.InterpreterBuilder.cast_impl
_patch_tensor = interpreter._patch_lang_tensor


def mend() -> None:
    """Mend the interpreter of this process."""
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter._patch_lang_tensor = _patch_tensor_and_index


def _widened(operand):
    if operand.dtype != tl.bfloat16:
        return operand
    data = (operand.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


def _create_dot(self, a, b, *rest):
    share = 0.5 if a.dtype.primitive_bitwidth == 8 else 1
    COUNTED["flops"] += share * 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
    return _dot(self, _widened(a), _widened(b), *rest)


def _cast(self, source, target):
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        bits = np.ascontiguousarray(source.data).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        data = np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16)
        return interpreter.TensorHandle(data.reshape(source.data.shape), tl.bfloat16)
    return _cast_impl(self, source, target)


def _patch_tensor_and_index(tensor, *scope):
    _patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())
