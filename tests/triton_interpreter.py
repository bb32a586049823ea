"""Corrections to Triton's interpreter, by which kernels are tested where there is no GPU.

It keeps bfloat16 as 16-bit integers and multiplies those in `tl.dot`, and it cuts float32 to bfloat16 where a GPU
rounds to the nearest even. Both stand corrected after `correct()`. Arithmetic on bfloat16 outside `tl.dot` stays
wrong, so kernels convert first.
"""

from __future__ import annotations

import numpy as np


def correct() -> None:
    """Corrects the interpreter of this process; once is enough, more does no harm."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "uncorrected"):
        return
    builder.uncorrected = dot, cast = builder.create_dot, builder.cast_impl

    def widened(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self, a, b, d, *rest):
        a, b = (
            interpreter.TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, a, b, d, *rest)

    def cast_impl(self, source, to):
        types = source.dtype.scalar, to.scalar
        if types == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widened(source.data), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            rounded = np.where(np.isnan(source.data), 0x7FC0, rounded)
            return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)
        return cast(self, source, to)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
