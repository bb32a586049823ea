"""Channel attention: sums of every channel, a gate made of them, and a map scaled by the gate.

Sums are float32, added up tile by tile with atomics; with a slot for every tile they are added in a fixed order
afterwards. The gate is one small program an image, which reads the weights of the convolution behind whose sums it
stands (operators.md, rewrite 1) once. The scaling reads and writes the map once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsr.kernels.launch import Launch, as_pixels, ceil_div, power_of_two


@triton.jit(do_not_specialize=["x_pitch", "size", "slots", "slot_step"])
def _sum_kernel(
    x, x_step, x_pitch,  # (N, C, ...): pointer, elements a pixel, pixels an image; the pixels of an image in one row
    sums,  # [N, slots, C] float32, added to
    size, slots, slot_step,
    C: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    n = tl.program_id(2).to(tl.int64)
    p = tile * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    at = x + (n * x_pitch + p)[:, None] * x_step + c[None, :]
    v = tl.load(at, mask=(p < size)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    tl.atomic_add(sums + (n * slots + tile * slot_step) * C + c, tl.sum(v, 0), mask=c < C, sem="relaxed")


@triton.jit(do_not_specialize=["pixels"])
def _gate_kernel(
    gate,  # [N, C] float32
    sums,  # [N, 9, F] float32 as the convolution kernel makes them, or [N, C] if there is no weight
    weight,  # [C, 3, 3, F] or None
    bias,  # [C] or None
    down, down_bias, up, up_bias,  # [R, C], [R], [C, R], [C]
    pixels,
    C: tl.constexpr, F: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    c = tl.arange(0, BC)
    r = tl.arange(0, BR)
    if weight is None:
        mean = tl.load(sums + n * C + c, mask=c < C, other=0.0) / pixels
    else:
        f = tl.arange(0, BF)
        acc = tl.zeros((BC, BF), dtype=tl.float32)
        F_BLOCKS: tl.constexpr = (F + BF - 1) // BF
        for i in range(9 * F_BLOCKS):
            ky = i // F_BLOCKS // 3
            kx = i // F_BLOCKS % 3
            fs = i % F_BLOCKS * BF + f
            ok = fs < F
            region = sums + n * (9 * F) + fs
            # what this tap reads: all but the last row (ky = 0) or the first (ky = 2), columns likewise
            s = tl.load(region, mask=ok, other=0.0)
            row = tl.load(region + tl.where(ky == 0, 2, 1) * F, mask=ok, other=0.0)
            column = tl.load(region + tl.where(kx == 0, 4, 3) * F, mask=ok, other=0.0)
            corner = tl.load(region + (5 + tl.where(ky == 0, 2, 0) + tl.where(kx == 0, 1, 0)) * F, mask=ok, other=0.0)
            s -= tl.where(ky == 1, 0.0, row) + tl.where(kx == 1, 0.0, column)
            s += tl.where((ky == 1) | (kx == 1), 0.0, corner)
            at = weight + c[:, None] * (9 * F) + (i // F_BLOCKS * F + fs)[None, :]
            w = tl.load(at, mask=(c < C)[:, None] & ok[None, :], other=0.0)
            acc += w.to(tl.float32) * s[None, :]
        mean = tl.sum(acc, 1) / pixels
    if bias is not None:
        mean += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    ok = (r < R)[:, None] & (c < C)[None, :]
    w = tl.load(down + r[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
    hidden = tl.sum(tl.where(ok, w * mean[None, :], 0.0), 1)
    hidden += tl.load(down_bias + r, mask=r < R, other=0.0).to(tl.float32)
    hidden = tl.where(hidden < 0, 0.0, hidden)
    ok = (c < C)[:, None] & (r < R)[None, :]
    w = tl.load(up + c[:, None] * R + r[None, :], mask=ok, other=0.0).to(tl.float32)
    y = tl.sum(tl.where(ok, w * hidden[None, :], 0.0), 1)
    y += tl.load(up_bias + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(gate + n * C + c, 1 / (1 + tl.exp(-y)), mask=c < C)


@triton.jit(do_not_specialize=["x_pitch", "out_pitch", "size"])
def _scale_kernel(
    out, out_step, out_pitch, x, x_step, x_pitch,  # as in _sum_kernel
    gate,  # [N, C] float32
    size,
    C: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    ok = (p < size)[:, None] & (c < C)[None, :]
    v = tl.load(x + (n * x_pitch + p)[:, None] * x_step + c[None, :], mask=ok, other=0.0).to(tl.float32)
    v = v * tl.load(gate + n * C + c, mask=c < C, other=0.0)[None, :]
    tl.store(out + (n * out_pitch + p)[:, None] * out_step + c[None, :], v.to(out.dtype.element_ty), mask=ok)


def _one_row(t: Tensor) -> tuple[Tensor, int, int]:
    """The tensor, elements a pixel, pixels an image: with the pixels of an image in one row, copied if need be."""
    p = as_pixels(t)
    if t.shape[2] > 1 and p.row != t.shape[3]:
        p = as_pixels(t.clone(memory_format=torch.channels_last))
    return p.tensor, p.step, p.image


def default_config(channels: int) -> dict[str, int]:
    """The tile of the two kernels that pass over a map, 16 KiB of half precision. Chosen by rule, not measured."""
    bc = min(64, power_of_two(channels))
    return {"BP": 8192 // bc, "BC": bc, "num_warps": 4}


def prepare_sums(sums: Tensor, x: Tensor, config: dict[str, int] | None = None) -> Launch:
    """Adds the sums of x (N, C, H, W) over its pixels to sums (N, slots, C) float32: one slot, or one for each of
    `sum_tiles`."""
    n, c, h, w = x.shape
    config = dict(default_config(c) if config is None else config)
    t, step, pitch = _one_row(x)
    args = {"x": t, "x_step": step, "x_pitch": pitch, "sums": sums, "size": h * w, "slots": sums.shape[1],
            "slot_step": int(sums.shape[1] > 1), "C": c, "BP": config["BP"], "BC": config["BC"]}  # fmt: skip
    grid = (ceil_div(h * w, config["BP"]), ceil_div(c, config["BC"]), n)
    return Launch(_sum_kernel, grid, args, {"num_warps": config["num_warps"]})


def sum_tiles(x: Tensor) -> int:
    """How many slots sums of a fixed order need."""
    return ceil_div(x.shape[2] * x.shape[3], default_config(x.shape[1])["BP"])


def prepare_gate(
    gate: Tensor,
    sums: Tensor,
    pixels: int,
    weight: Tensor | None,
    bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
) -> Launch:
    """gate (N, C) float32 from sums (N, 9, F) through weight (C, F, 3, 3), or from sums (N, C) without a weight."""
    n, c = gate.shape
    f, r = sums.shape[-1], down_weight.shape[0]
    bc = power_of_two(c)
    args = {
        "gate": gate, "sums": sums,
        "weight": None if weight is None else weight.contiguous(memory_format=torch.channels_last),
        "bias": None if bias is None else bias.contiguous(),
        "down": down_weight.contiguous(), "down_bias": down_bias.contiguous(),
        "up": up_weight.contiguous(), "up_bias": up_bias.contiguous(), "pixels": pixels,
        "C": c, "F": f, "R": r, "BC": bc, "BF": max(1, min(power_of_two(f), 8192 // bc)), "BR": power_of_two(r),
    }  # fmt: skip
    return Launch(_gate_kernel, (n,), args, {"num_warps": 8})


def prepare_scale(out: Tensor, x: Tensor, gate: Tensor, config: dict[str, int] | None = None) -> Launch:
    """out = x * gate[n, c], for images (N, C, H, W) and gate (N, C) float32. The pixels of `out` are in one row."""
    n, c, h, w = x.shape
    config = dict(default_config(c) if config is None else config)
    t, step, pitch = _one_row(x)
    target, out_step, out_pitch = _one_row(out)
    assert target is out, "the output has its pixels in one row"
    args = {"out": out, "out_step": out_step, "out_pitch": out_pitch, "x": t, "x_step": step, "x_pitch": pitch,
            "gate": gate, "size": h * w, "C": c, "BP": config["BP"], "BC": config["BC"]}  # fmt: skip
    grid = (ceil_div(h * w, config["BP"]), ceil_div(c, config["BC"]), n)
    return Launch(_scale_kernel, grid, args, {"num_warps": config["num_warps"]})
