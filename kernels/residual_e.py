"""CARN-M's efficient residual unit in one kernel: relu(x + W3 * relu(W2 * relu(W1 * x))), W1, W2 grouped 3x3, W3 1x1.

A program computes patches of TH x TW pixels less a frame of one. For every group it makes the first convolution of the
whole patch and leaves it in a scratch memory of its own; behind a barrier it reads it back, shifted, for the second,
whose result never leaves the registers: each group's channels are at once a block of the third convolution's sum. So
the feature map is read once (and once more for the sum) and written once. As many programs run as fit the device, one
patch after the other, so that their scratch stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsr.kernels.launch import Launch, as_pixels, ceil_div

PROGRAMS = 264  # twice the multiprocessors of an H100; at 32 KiB of scratch each, 9 MB


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)  # keeps NaN


@triton.jit(do_not_specialize=["height", "width", "tiles_y", "tiles_x", "patches"])
def _residual_e_kernel(
    out, out_step, out_pitch,  # (N, C, height, width): pointer, elements a pixel, `Pixels.pitch`
    x, x_step, x_pitch,
    scratch,  # [programs, GROUPS, TH * TW, KG]
    weight1, bias1, weight2, bias2,  # [C, 3, 3, KG], [C] or None
    weight3, bias3,  # [C, C], [C] or None
    height, width, tiles_y, tiles_x, patches,
    C: tl.constexpr, GROUPS: tl.constexpr, LARGE: tl.constexpr, PRECISION: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    KG: tl.constexpr = C // GROUPS
    BP: tl.constexpr = TH * TW
    p = tl.arange(0, BP)
    py = p // TW
    px = p % TW
    k = tl.arange(0, BK)
    c = tl.arange(0, BC)
    mine = scratch + tl.program_id(0).to(tl.int64) * (GROUPS * BP * KG)
    patch = tl.program_id(0)
    while patch < patches:
        n = (patch // (tiles_y * tiles_x)).to(tl.int64)
        y = (patch // tiles_x % tiles_y) * (TH - 2) - 1 + py
        z = (patch % tiles_x) * (TW - 2) - 1 + px
        exists = (y >= 0) & (y < height) & (z >= 0) & (z < width)
        image = x_pitch[0] >> 1
        pitch = x_pitch[1] >> 1
        source = x + n * image * x_step

        for g in range(GROUPS):
            acc = tl.zeros((BP, BK), dtype=tl.float32)
            for tap in range(9):
                iy = y + tap // 3 - 1
                ix = z + tap % 3 - 1
                ok = exists & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
                if LARGE:
                    iy = iy.to(tl.int64)
                at = source + g * KG + ((iy * pitch + ix) * x_step)[:, None] + k[None, :]
                a = tl.load(at, mask=ok[:, None] & (k < KG)[None, :], other=0.0)
                at = weight1 + (g * KG + k)[:, None] * (9 * KG) + (tap * KG + k)[None, :]
                w = tl.load(at, mask=(k < KG)[:, None] & (k < KG)[None, :], other=0.0)
                acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
            if bias1 is not None:
                acc += tl.load(bias1 + g * KG + k, mask=k < KG, other=0.0).to(tl.float32)[None, :]
            h = tl.where(exists[:, None], _relu(acc), 0.0)  # the second convolution's padding
            at = mine + (g * BP + p)[:, None] * KG + k[None, :]
            tl.store(at, h.to(scratch.dtype.element_ty), mask=(k < KG)[None, :])

        tl.debug_barrier()
        inside = exists & (py > 0) & (py < TH - 1) & (px > 0) & (px < TW - 1)
        total = tl.zeros((BP, BC), dtype=tl.float32)
        for g in range(GROUPS):
            acc = tl.zeros((BP, BK), dtype=tl.float32)
            for tap in range(9):
                q = p + (tap // 3 - 1) * TW + tap % 3 - 1
                at = mine + (g * BP + q)[:, None] * KG + k[None, :]
                a = tl.load(at, mask=inside[:, None] & (k < KG)[None, :], other=0.0)
                at = weight2 + (g * KG + k)[:, None] * (9 * KG) + (tap * KG + k)[None, :]
                w = tl.load(at, mask=(k < KG)[:, None] & (k < KG)[None, :], other=0.0)
                acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
            if bias2 is not None:
                acc += tl.load(bias2 + g * KG + k, mask=k < KG, other=0.0).to(tl.float32)[None, :]
            h = _relu(acc).to(x.dtype.element_ty)
            at = weight3 + c[:, None] * C + (g * KG + k)[None, :]
            w = tl.load(at, mask=(c < C)[:, None] & (k < KG)[None, :], other=0.0)
            total = tl.dot(h, tl.trans(w), total, input_precision=PRECISION)
        if bias3 is not None:
            total += tl.load(bias3 + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        ok = inside[:, None] & (c < C)[None, :]
        if LARGE:
            y = y.to(tl.int64)
        at = source + ((y * pitch + z) * x_step)[:, None] + c[None, :]
        total = _relu(total + tl.load(at, mask=ok, other=0.0).to(tl.float32))
        image = out_pitch[0] >> 1
        pitch = out_pitch[1] >> 1
        at = out + n * image * out_step + ((y * pitch + z) * out_step)[:, None] + c[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=ok)
        tl.debug_barrier()  # before the next patch is written over this one
        patch += tl.num_programs(0)


@dataclass(frozen=True)
class Shape:
    """What a launch configuration depends on. dtype and precision as in `conv.Shape`."""

    dtype: str
    precision: str
    channels: int
    groups: int

    def key(self) -> str:
        """The name under which a tuned configuration is kept."""
        precise = self.precision if self.dtype == "float32" else ""
        return f"residual_e {self.dtype}{precise} {self.channels} groups{self.groups}"


def default_config(shape: Shape) -> dict[str, int]:
    """Size of a patch with its frame, warps and stages, for a shape that nobody tuned. Registers and shared memory were
    checked by compiling (patches of 16x32 spill); speed was not measured."""
    return {"TH": 16, "TW": 16, "num_warps": 8, "num_stages": 3}


def allowed(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The values that each number of a configuration may have; tuning looks among them."""
    return {"TH": (8, 16, 32), "TW": (8, 16, 32), "num_warps": (4, 8), "num_stages": (2, 3, 4)}


def refuses(channels: int, groups: int) -> str:
    """Why the kernel cannot compute this unit; empty if it can."""
    if channels > 128:
        return f"{channels} channels (the sum of one program holds 128)"
    if channels // groups > 64:
        return f"{channels // groups} channels a group (a program holds 64)"
    return ""


def prepare(
    out: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    weight3: Tensor,
    bias3: Tensor | None,
    groups: int,
    precision: str = "ieee",
    configure: Callable[[Shape], dict[str, int]] = default_config,
) -> Launch:
    """The launch that fills `out`, whose pixels lie as `launch.pixels` asks; arguments as in `ops.residual_e`."""
    n, c, h, w = x.shape
    kg = c // groups
    config = configure(Shape(str(x.dtype).removeprefix("torch."), precision, c, groups))
    source, target = as_pixels(x), as_pixels(out)
    assert target.tensor is out, "the output has pixels with a pitch"
    tiles = ceil_div(h, config["TH"] - 2), ceil_div(w, config["TW"] - 2)
    patches = n * tiles[0] * tiles[1]
    programs = min(patches, PROGRAMS)
    scratch = torch.empty(programs * groups * config["TH"] * config["TW"] * kg, dtype=x.dtype, device=x.device)

    def vector(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.contiguous()

    args = {
        "out": out, "out_step": target.step, "out_pitch": target.pitch,
        "x": source.tensor, "x_step": source.step, "x_pitch": source.pitch, "scratch": scratch,
        "weight1": weight1.contiguous(memory_format=torch.channels_last), "bias1": vector(bias1),
        "weight2": weight2.contiguous(memory_format=torch.channels_last), "bias2": vector(bias2),
        "weight3": weight3.contiguous(), "bias3": vector(bias3), "height": h, "width": w,
        "tiles_y": tiles[0], "tiles_x": tiles[1], "patches": patches,
        "C": c, "GROUPS": groups, "LARGE": source.large or target.large, "PRECISION": precision,
        "TH": config["TH"], "TW": config["TW"],
        "BK": max(16, triton.next_power_of_2(kg)), "BC": max(16, triton.next_power_of_2(c)),
    }  # fmt: skip
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    return Launch(_residual_e_kernel, (programs,), args, options)
