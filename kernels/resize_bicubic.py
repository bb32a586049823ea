"""Bicubic resizing in one pass: every output is the sum over its rows' taps of the sums over its columns' taps.

Taps come as tables, positions and weights, one row a tap. The image may lie in memory in any way; outputs are computed
in the order in which they lie. Where an axis shrinks so much that it has many taps, two passes, each along one axis
with a float32 image between them, need fewer reads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsr.kernels.launch import Launch, ceil_div


@triton.jit(
    do_not_specialize=[
        "channels", "out_height", "out_width", "total", "row_taps", "column_taps",
    ]
)  # fmt: skip
def _resize_kernel(
    out, out_strides,  # (N, C, out_height, out_width) with any strides, each as 2 n + 1 (`Pixels.pitch`)
    x, x_strides,  # (N, C, H, W), likewise
    rows, row_weights,  # [row_taps, out_height] int32, float32
    columns, column_weights,  # [column_taps, out_width]
    channels, out_height, out_width, total, row_taps, column_taps,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < total
    if CHANNELS_LAST:  # numbered so that neighbours lie side by side in the output
        c = i % channels
        ox = i // channels % out_width
        oy = i // channels // out_width % out_height
        n = i // channels // out_width // out_height
    else:
        ox = i % out_width
        oy = i // out_width % out_height
        c = i // out_width // out_height % channels
        n = i // out_width // out_height // channels
    image = x + n * (x_strides[0] >> 1) + c * (x_strides[1] >> 1)
    total_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    a = 0
    while a < row_taps:  # of a number not known to the compiler, which would unroll both loops
        y = tl.load(rows + a * out_height + oy, mask=ok, other=0)
        row = image + y.to(tl.int64) * (x_strides[2] >> 1)
        row_sum = tl.zeros((BLOCK,), dtype=tl.float32)
        b = 0
        while b < column_taps:
            at = tl.load(columns + b * out_width + ox, mask=ok, other=0)
            weight = tl.load(column_weights + b * out_width + ox, mask=ok, other=0.0)
            row_sum += tl.load(row + at.to(tl.int64) * (x_strides[3] >> 1), mask=ok, other=0.0).to(tl.float32) * weight
            b += 1
        total_sum += row_sum * tl.load(row_weights + a * out_height + oy, mask=ok, other=0.0)
        a += 1
    at = out + n * (out_strides[0] >> 1) + c * (out_strides[1] >> 1)
    at += oy * (out_strides[2] >> 1) + ox * (out_strides[3] >> 1)
    tl.store(at, total_sum.to(out.dtype.element_ty), mask=ok)


def _odd(strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(2 * s + 1 for s in strides)


def prepare(
    out: Tensor, x: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], block: int = 1024
) -> Launch:
    """out (N, C, H', W') of x (N, C, H, W). rows: positions (taps, H') int32 and weights (taps, H') float32, on the
    device, contiguous; columns: likewise for W'."""
    args = {
        "out": out, "out_strides": _odd(out.stride()), "x": x, "x_strides": _odd(x.stride()),
        "rows": rows[0], "row_weights": rows[1], "columns": columns[0], "column_weights": columns[1],
        "channels": out.shape[1], "out_height": out.shape[2], "out_width": out.shape[3], "total": out.numel(),
        "row_taps": rows[0].shape[0], "column_taps": columns[0].shape[0],
        "CHANNELS_LAST": out.stride(1) == 1 and out.shape[1] > 1, "BLOCK": block,
    }  # fmt: skip
    return Launch(_resize_kernel, (ceil_div(out.numel(), block),), args, {"num_warps": 8})
