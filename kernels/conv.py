"""The convolution engine: an implicit matrix product over pixels, with all that stands around it.

    y = store( post( gain * act( pre(x1 + ... + xk concatenated) * W + b ) * scale[n, c] + skip_gain * skip ) )

One program computes BP pixels of BC output channels of one image. It walks taps and blocks of BK input channels, reads
the pixels that a tap sees (zero outside the image), and multiplies them with that tap's weights: the input is read from
the second-level cache once a tap, from memory once. Concatenated inputs are read where they lie.

Three kinds of convolution are one loop. In each, a program belongs to a phase (ry, rx) of the output, and output pixel
(gy * U + ry - shift) sees input rows gy * stride + base(ry) + j for j = 0 ... J - 1:

    convolution            U = 1, J = k, base = -padding
    transposed, stride s   U = s, J = ceil(k / s), base = 1 - J, weights of phase r: taps r, r + s, r + 2s ... reversed
    nearest upsampling u   U = u, base = floor((r - padding) / u), weights: sums of the taps that meet in one pixel

A depth-to-space store is a matter of which rows of the weights a program takes: it computes one position (dy, dx) of
the cells, so that it stores whole pixels. Where a pixel has so few channels that most of a program's rows would stand
empty, it takes all positions together, and stores each channel where it belongs.

A framed convolution has weights of their own for the pixels of each border and corner (`ops.linear_tail.merge`): nine
regions of the image, each walked by programs of its own, in one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsr.kernels.launch import Launch, Pixels, as_pixels, ceil_div, power_of_two

LEAST_TILE = 64  # pixels; no configuration has a smaller BP
FEW_ROWS = 16  # of one position of a cell; with fewer, the smallest block of a matrix product would not be filled


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)  # keeps NaN


@triton.jit
def _at(x, AXIS: tl.constexpr):
    """A vector as a column (AXIS 0) or a row (AXIS 1) of a tile."""
    if AXIS == 0:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def _add_sums(sums, tile, where, AXIS: tl.constexpr, ok):
    """Adds the sums of a tile over the pixels `where` holds for."""
    tl.atomic_add(sums, tl.sum(tl.where(_at(where, AXIS), tile, 0.0), AXIS), mask=ok, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "height", "width", "grid_height", "grid_width", "out_height", "out_width", "slots", "slot_step",
    ]
)  # fmt: skip
def _conv_kernel(
    out, out_step, out_pitch,  # (N, COUT / FOLD^2, ...): pointer, elements a pixel, `Pixels.pitch`
    x, x_step, x_pitch,  # tuples over the inputs, (N, Ci, height, width) each
    weight,  # [U * U, COUT, TAPS, TAPS, KG]; of a frame [9, ...]: by row (between, first, last), then by column
    bias,  # [COUT] or None, as all that follows; of a frame [9, COUT]
    pre_scale, pre_shift,  # [GROUPS * KG]
    prelu,  # [COUT], or one slope
    scale,  # [N, COUT] float32
    skip, skip_step, skip_pitch,  # tuples, like the output before the fold
    factor, factor_step, factor_pitch, term, term_step, term_pitch,
    outer, outer_step, outer_pitch,
    sums,  # [N, slots, 9, COUT] float32, added to: all, first and last row, first and last column, corners
    slope, gain, skip_gain, outer_gain,  # numbers, or None for 1 (slope: None for 0)
    height, width, grid_height, grid_width, out_height, out_width, slots, slot_step,
    COUT: tl.constexpr, KG: tl.constexpr, GROUPS: tl.constexpr,
    STARTS: tl.constexpr,  # first channel of each input
    ENDS: tl.constexpr,  # first block of BK channels behind each input
    TAPS: tl.constexpr, STRIDE: tl.constexpr, U: tl.constexpr,
    LIFT: tl.constexpr, DIVIDE: tl.constexpr, BASE: tl.constexpr,  # base(r) = (r + LIFT) // DIVIDE - BASE
    SHIFT: tl.constexpr,
    FOLD: tl.constexpr, TORCH_ORDER: tl.constexpr, TOGETHER: tl.constexpr,  # all positions of a cell in one program
    FRAME: tl.constexpr,
    PRE: tl.constexpr, PRE_RELU: tl.constexpr, ACT: tl.constexpr, ONE_SLOPE: tl.constexpr, POST_RELU: tl.constexpr,
    SKIP_STARTS: tl.constexpr,  # first channel of each skip, and behind the last
    EVEN_K: tl.constexpr, EVEN_C: tl.constexpr, LARGE: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,  # tiles are [channels, pixels], else [pixels, channels]
    BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    CELL: tl.constexpr = FOLD * FOLD
    SPREAD: tl.constexpr = 1 if TOGETHER else CELL  # programs over which the positions of a cell are spread
    CG: tl.constexpr = COUT // (SPREAD * GROUPS)  # rows of the weights that one program's column of the grid takes
    C_BLOCKS: tl.constexpr = (CG + BC - 1) // BC
    INPUTS: tl.constexpr = len(x)
    BLOCKS: tl.constexpr = ENDS[INPUTS - 1]
    ALONG_P: tl.constexpr = 1 if WEIGHTS_FIRST else 0
    ALONG_C: tl.constexpr = 0 if WEIGHTS_FIRST else 1

    tile = tl.program_id(0) // C_BLOCKS
    group = tl.program_id(1) % GROUPS
    cell = tl.program_id(1) // GROUPS % SPREAD
    phase = tl.program_id(1) // (GROUPS * SPREAD)
    n = tl.program_id(2).to(tl.int64)

    # pixels: position in the phase's grid, in the input, in the output
    region = phase
    region_y = 0
    region_x = 0
    region_height = grid_height
    region_width = grid_width
    if FRAME:  # tiles of what lies between, of the first and the last row, of both columns, and the corners
        row_tiles = tl.cdiv(grid_width - 2, BP)
        column_tiles = tl.cdiv(grid_height - 2, BP)
        rows_tile = tile - tl.cdiv((grid_height - 2) * (grid_width - 2), BP)
        columns_tile = rows_tile - 2 * row_tiles
        corner = columns_tile - 2 * column_tiles
        of_row = tile * 0  # 1 is the first, 2 the last; numbers of the run, as both sides of a branch must be
        of_column = tile * 0
        if corner >= 0:
            of_row = 1 + corner // 2
            of_column = 1 + corner % 2
            tile = tile * 0
        elif columns_tile >= 0:
            of_column = 1 + columns_tile // column_tiles
            tile = columns_tile % column_tiles
        elif rows_tile >= 0:
            of_row = 1 + rows_tile // row_tiles
            tile = rows_tile % row_tiles
        region = 3 * of_row + of_column
        region_y = tl.where(of_row == 0, 1, (of_row - 1) * (grid_height - 1))
        region_x = tl.where(of_column == 0, 1, (of_column - 1) * (grid_width - 1))
        region_height = tl.where(of_row == 0, grid_height - 2, 1)
        region_width = tl.where(of_column == 0, grid_width - 2, 1)
    p = tile * BP + tl.arange(0, BP)
    gy = region_y + p // region_width
    gx = region_x + p % region_width
    y0 = gy * STRIDE + (phase // U + LIFT) // DIVIDE - BASE
    x0 = gx * STRIDE + (phase % U + LIFT) // DIVIDE - BASE
    inside = p < region_height * region_width
    oy = gy * U + phase // U - SHIFT
    ox = gx * U + phase % U - SHIFT
    stored = inside & (oy >= 0) & (oy < out_height) & (ox >= 0) & (ox < out_width)

    # channels: as stored, and as rows of the weights
    c = (tl.program_id(0) % C_BLOCKS) * BC + tl.arange(0, BC)
    c_ok = c < CG
    if TOGETHER:
        row = c
        channel = row // CELL if TORCH_ORDER else row % (COUT // CELL)
        cell = row % CELL if TORCH_ORDER else row // (COUT // CELL)
    else:
        channel = group * CG + c
        row = channel * CELL + cell if TORCH_ORDER else cell * (COUT // CELL) + channel

    k = tl.arange(0, BK)
    weights = weight + (region * COUT + row)[:, None] * (TAPS * TAPS * KG) + k[None, :]
    if WEIGHTS_FIRST:
        acc = tl.zeros((BC, BP), dtype=tl.float32)
    else:
        acc = tl.zeros((BP, BC), dtype=tl.float32)
    for i in range(TAPS * TAPS * BLOCKS):
        tap = i // BLOCKS
        block = i % BLOCKS
        source = x[0]
        step = x_step[0]
        image = x_pitch[0][0]
        pitch = x_pitch[0][1]
        first_block = 0
        first = 0
        count = STARTS[1]
        for s in tl.static_range(1, INPUTS):
            here = block >= ENDS[s - 1]
            source = tl.where(here, x[s], source)
            step = tl.where(here, x_step[s], step)
            image = tl.where(here, x_pitch[s][0], image)
            pitch = tl.where(here, x_pitch[s][1], pitch)
            first_block = tl.where(here, ENDS[s - 1], first_block)
            first = tl.where(here, STARTS[s], first)
            count = tl.where(here, STARTS[s + 1] - STARTS[s], count)
        image = image >> 1
        pitch = pitch >> 1
        if GROUPS > 1:
            count = KG
        kb = (block - first_block) * BK
        iy = y0 + tap // TAPS
        ix = x0 + tap % TAPS
        ok = inside & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
        if LARGE:
            iy = iy.to(tl.int64)
        at = source + n * image * step + (group * KG + kb) + ((iy * pitch + ix) * step)[:, None] + k[None, :]
        w_at = weights + (tap * KG + first + kb)
        if EVEN_K:
            w_ok = c_ok[:, None]
            x_ok = ok[:, None]
        else:
            w_ok = c_ok[:, None] & (kb + k < count)[None, :]
            x_ok = ok[:, None] & (kb + k < count)[None, :]
        a = tl.load(at, mask=x_ok, other=0.0)
        if EVEN_K and EVEN_C:
            w = tl.load(w_at)
        else:
            w = tl.load(w_at, mask=w_ok, other=0.0)
        if PRE:
            k_at = group * KG + first + kb + k
            k_ok = kb + k < count
            v = a.to(tl.float32)
            if pre_scale is not None:
                v = v * tl.load(pre_scale + k_at, mask=k_ok, other=0.0).to(tl.float32)[None, :]
            if pre_shift is not None:
                v = v + tl.load(pre_shift + k_at, mask=k_ok, other=0.0).to(tl.float32)[None, :]
            if PRE_RELU:
                v = _relu(v)
            a = tl.where(x_ok, v, 0.0).to(a.dtype)  # the padding is zero after the prologue
        if WEIGHTS_FIRST:
            acc = tl.dot(w, tl.trans(a), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)

    y = acc
    if bias is not None:
        at = bias + row
        if FRAME:
            at += region * COUT
        y += _at(tl.load(at, mask=c_ok, other=0.0).to(tl.float32), ALONG_C)
    if ACT == "relu":
        y = _relu(y)
    elif ACT == "leaky":
        y = tl.where(y < 0, y * slope, y)
    elif ACT == "prelu":
        if ONE_SLOPE:
            y = tl.where(y < 0, y * tl.load(prelu).to(tl.float32), y)
        else:
            y = tl.where(y < 0, y * _at(tl.load(prelu + row, mask=c_ok, other=0.0).to(tl.float32), ALONG_C), y)
    if gain is not None:
        y = y * gain
    if scale is not None:
        y = y * _at(tl.load(scale + n * COUT + row, mask=c_ok, other=0.0), ALONG_C)

    ok = _at(stored, ALONG_P) & _at(c_ok, ALONG_C)
    if LARGE:
        oy = oy.to(tl.int64)
    if skip is not None:
        for s in tl.static_range(len(skip)):
            image = skip_pitch[s][0] >> 1
            pitch = skip_pitch[s][1] >> 1
            at = skip[s] + n * image * skip_step[s] + _at((oy * pitch + ox) * skip_step[s], ALONG_P)
            if len(skip) == 1:
                v = tl.load(at + _at(row, ALONG_C), mask=ok, other=0.0).to(tl.float32)
            else:
                mine = (row >= SKIP_STARTS[s]) & (row < SKIP_STARTS[s + 1])
                v = tl.load(at + _at(row - SKIP_STARTS[s], ALONG_C), mask=ok & _at(mine, ALONG_C), other=0.0)
                v = v.to(tl.float32)
            y += v if skip_gain is None else v * skip_gain
    if factor is not None:
        image = factor_pitch[0] >> 1
        pitch = factor_pitch[1] >> 1
        at = factor + n * image * factor_step + _at((oy * pitch + ox) * factor_step, ALONG_P) + _at(row, ALONG_C)
        y = y * tl.load(at, mask=ok, other=0.0).to(tl.float32)
        image = term_pitch[0] >> 1
        pitch = term_pitch[1] >> 1
        at = term + n * image * term_step + _at((oy * pitch + ox) * term_step, ALONG_P) + _at(row, ALONG_C)
        y = y + tl.load(at, mask=ok, other=0.0).to(tl.float32)
    if POST_RELU:
        y = _relu(y)
    if outer is not None:
        image = outer_pitch[0] >> 1
        pitch = outer_pitch[1] >> 1
        at = outer + n * image * outer_step + _at((oy * pitch + ox) * outer_step, ALONG_P) + _at(row, ALONG_C)
        v = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        y = v + (y if outer_gain is None else y * outer_gain)

    image = out_pitch[0] >> 1
    pitch = out_pitch[1] >> 1
    position = (cell // FOLD * pitch + cell % FOLD) * out_step  # in the cell
    at = out + n * image * out_step + _at((oy * pitch + ox) * FOLD * out_step, ALONG_P)
    at += _at(position + channel, ALONG_C)
    result = y.to(out.dtype.element_ty)
    tl.store(at, result, mask=ok)

    if sums is not None:  # of what was stored; FOLD = 1 here
        y = result.to(tl.float32)
        slot = sums + (n * slots + tile * slot_step) * (9 * COUT) + row
        _add_sums(slot, y, stored, ALONG_P, c_ok)
        low = tile * BP
        high = low + BP - 1
        sides = (low // grid_width != high // grid_width) | (low % grid_width == 0) | ((high + 1) % grid_width == 0)
        if sides | (low < grid_width) | (high >= (grid_height - 1) * grid_width):  # otherwise far from the border
            for j in range(1, 9):  # not unrolled: nine reductions at once do not fit the registers
                first_row = (j == 1) | (j == 5) | (j == 6)
                last_row = (j == 2) | (j == 7) | (j == 8)
                first_column = (j == 3) | (j == 5) | (j == 7)
                last_column = (j == 4) | (j == 6) | (j == 8)
                on_row = tl.where(first_row, oy == 0, tl.where(last_row, oy == out_height - 1, stored))
                on_column = tl.where(first_column, ox == 0, tl.where(last_column, ox == out_width - 1, stored))
                _add_sums(slot + j * COUT, y, stored & on_row & on_column, ALONG_P, c_ok)


@dataclass(frozen=True)
class Shape:
    """What a launch configuration depends on: everything about a convolution but the size of its image.

    dtype: "bfloat16", "float16" or "float32"; precision: "tf32" or "ieee", of float32 products. taps: J * J. inputs:
    the channels of each input, of one group; rows: of the weights that one program's column of the grid takes: output
    channels of one group, and of one position of a cell unless those are stored together. prologue: whether values
    change between loading and multiplying. sums: whether the sums of what is stored are made. scattered: whether a
    program stores all positions of its cells, each value at an address of its own.
    """

    dtype: str
    precision: str
    taps: int
    inputs: tuple[int, ...]
    rows: int
    prologue: bool = False
    sums: bool = False
    scattered: bool = False

    def key(self) -> str:
        """The name under which a tuned configuration is kept."""
        precise = self.precision if self.dtype == "float32" else ""
        inputs = "+".join(map(str, self.inputs))
        extra = " pre" * self.prologue + " sums" * self.sums + " scattered" * self.scattered
        return f"conv {self.dtype}{precise} taps{self.taps} {inputs}-{self.rows}{extra}"


def default_config(shape: Shape) -> dict[str, int]:
    """The launch configuration of a shape that nobody tuned: block sizes BP, BC, BK, whether the weights are the left
    operand (as M, where 64 channels fill it), warps and stages. Register and shared memory use were checked by
    compiling for sm_80 and sm_90; speed was not measured."""
    for bk in (64, 32, 16):
        if all(c % bk == 0 for c in shape.inputs):
            break
    else:
        bk = min(32, max(16, power_of_two(max(shape.inputs))))
    exact = shape.dtype == "float32"
    bc = min(64, max(16, power_of_two(shape.rows)))
    config = {"BP": 128, "BC": bc, "BK": min(bk, 32) if exact else bk, "WEIGHTS_FIRST": int(bc == 64),
              "num_warps": 8 if shape.prologue or shape.sums or shape.scattered else 4,
              "num_stages": 4 if bc == 32 and not exact else 3}  # fmt: skip
    if exact and shape.precision == "ieee":
        config |= {"BP": 64, "WEIGHTS_FIRST": 0}
    return config


def allowed(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The values that each number of a configuration may have; tuning looks among them. Blocks are no larger than what
    they are to hold."""
    rows, channels = (max(16, power_of_two(n)) for n in (shape.rows, max(shape.inputs)))
    return {
        "BP": (64, 128, 256), "BC": tuple(n for n in (16, 32, 64, 128) if n <= rows),
        "BK": tuple(n for n in (16, 32, 64) if n <= channels), "WEIGHTS_FIRST": (0, 1), "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
    }  # fmt: skip


def transposed_weight(weight: Tensor, stride: int, groups: int) -> Tensor:
    """(C, Cout / groups, k, k) of a transposed convolution -> [stride^2, Cout, J, J, C / groups], for the kernel."""
    c, rows, k, _ = weight.shape
    j = ceil_div(k, stride)
    pad = j * stride - k
    w = torch.nn.functional.pad(weight, (0, pad, 0, pad)) if pad else weight
    w = w.reshape(groups, c // groups, rows, j, stride, j, stride).flip(3, 5)
    w = w.permute(4, 6, 0, 2, 3, 5, 1)  # phase y, x, group, row, tap y, x, channel
    return w.reshape(stride * stride, groups * rows, j, j, c // groups).contiguous()


def upsampled_weight(weight: Tensor, upsample: int, padding: int) -> Tensor:
    """(Cout, C, k, k) behind nearest upsampling -> [upsample^2, Cout, J, J, C]: taps that meet in one pixel are added,
    in float32."""
    k = weight.shape[2]
    base = [(r - padding) // upsample for r in range(upsample)]
    seen = [[(r - padding + tap) // upsample - base[r] for tap in range(k)] for r in range(upsample)]
    j = 1 + max(map(max, seen))

    def along(w: Tensor, dim: int) -> Tensor:  # -> one axis more in front, of phases; `dim` becomes j long
        parts = []
        for phase in seen:
            taps = []
            for at in range(j):
                mine = [w.narrow(dim, tap, 1) for tap in range(k) if phase[tap] == at]
                taps.append(sum(mine[1:], mine[0]) if mine else torch.zeros_like(w.narrow(dim, 0, 1)))
            parts.append(torch.cat(taps, dim))
        return torch.stack(parts)

    w = along(along(weight.float(), 2), 4)  # phase x, phase y, Cout, C, j, j
    w = w.permute(1, 0, 2, 4, 5, 3).to(weight.dtype)
    return w.reshape(upsample * upsample, weight.shape[0], j, j, weight.shape[1]).contiguous()


def pack(weight: Tensor, stride: int, padding: int, groups: int, transposed: bool, upsample: int) -> Tensor:
    """The weights as the kernel reads them: a channels-last tensor, which may be the weight itself, or five axes."""
    if transposed:
        return transposed_weight(weight, stride, groups)
    if upsample > 1:
        return upsampled_weight(weight, upsample, padding)
    return weight.contiguous(memory_format=torch.channels_last)


def refuses(weight: Tensor, stride: int, groups: int, transposed: bool, upsample: int, shuffle: int, order: str) -> str:
    """Why the engine has no form of this convolution; empty if it has."""
    if weight.shape[2] != weight.shape[3]:
        return f"kernel of {weight.shape[2]}x{weight.shape[3]} (needs a square one)"
    if upsample > 1 and (stride > 1 or transposed):
        return "upsampling in front of a strided or transposed convolution has no kernel"
    rows = weight.shape[1] * groups if transposed else weight.shape[0]
    if groups > 1 and shuffle > 1 and (order != "torch" or rows // groups % shuffle**2):
        return "depth-to-space across groups has no kernel"
    return ""


def prepare(
    out: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    transposed: bool = False,
    pre_scale: Tensor | None = None,
    pre_shift: Tensor | None = None,
    pre_relu: bool = False,
    upsample: int = 1,
    act: str = "none",
    slope: float = 0.0,
    prelu: Tensor | None = None,
    gain: float = 1.0,
    scale: Tensor | None = None,
    skips: Sequence[Tensor] = (),
    skip_gain: float = 1.0,
    post_relu: bool = False,
    shuffle: int = 1,
    shuffle_order: str = "torch",
    sums: Tensor | None = None,
    modulate: tuple[Tensor, Tensor] | None = None,
    outer: Tensor | None = None,
    outer_gain: float = 1.0,
    precision: str = "ieee",
    packed: Tensor | None = None,
    framed: bool = False,
    configure: Callable[[Shape], dict[str, int]] = default_config,
) -> Launch:
    """The launch that fills `out`; arguments mean what those of `fastsr.ops.conv_act` and `fastsr.recipes.Conv` mean.

    out: (N, C', H', W') whose pixels lie as `pixels` asks. inputs and skips: read as one concatenation each, copied to
    channels-last where they lie otherwise. scale: (N, Cout) float32. sums: (N, slots, 9, Cout) float32, zeros, with one
    slot, or `sum_slots` of them for sums of a fixed order. packed: the result of `pack`, if it is at hand. framed: of a
    plain convolution of two rows and columns or more, that packed is [9, Cout, k, k, C] and bias (9, Cout), see the
    module's docstring; weight is any of the nine then. Call `refuses` first.
    """
    if groups > 1 and len(inputs) > 1:
        inputs = [torch.cat(list(inputs), 1)]
    sources = [as_pixels(t) for t in inputs]
    target = as_pixels(out)
    assert target.tensor is out, "the output has pixels with a pitch"
    n, _, height, width = inputs[0].shape
    k = weight.shape[2]
    if packed is None:
        packed = pack(weight, stride, padding, groups, transposed, upsample)
    kg = packed.shape[-1] if packed.dim() == 5 else weight.shape[1]
    cout = weight.shape[1] * groups if transposed else weight.shape[0]
    step, lift, divide, base, shift = stride, 0, 1, padding, 0
    taps, phases = k, 1
    if packed.dim() == 5 and not framed:
        taps, step = packed.shape[2], 1
        if transposed:
            phases, divide, base, shift = stride, stride, taps - 1, padding
        else:
            phases, divide, base = upsample, upsample, ceil_div(padding, upsample)
            lift = base * upsample - padding
    out_height, out_width = out.shape[2] // shuffle, out.shape[3] // shuffle
    grid_height, grid_width = ceil_div(out_height + shift, phases), ceil_div(out_width + shift, phases)

    channels = tuple(t.shape[1] for t in inputs) if groups == 1 else (kg,)
    together = shuffle > 1 and groups == 1 and cout // shuffle**2 < FEW_ROWS
    spread = 1 if together else shuffle * shuffle
    rows = cout // (groups * spread)
    prologue = pre_scale is not None or pre_shift is not None or pre_relu
    shape = Shape(str(out.dtype).removeprefix("torch."), precision, taps * taps, channels, rows, prologue,
                  sums is not None, together)  # fmt: skip
    config = dict(configure(shape))
    warps = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    blocks = [ceil_div(c, config["BK"]) for c in channels]
    tile_count = ceil_div(grid_height * grid_width, config["BP"])
    if framed:
        inner = grid_height - 2, grid_width - 2
        tile_count = 4 + sum(ceil_div(n, config["BP"]) for n in (inner[0] * inner[1], *inner, *inner))
    skipped = [as_pixels(t) for t in skips]
    one: dict[str, Pixels | None] = {"factor": None, "term": None, "outer": None}
    if modulate is not None:
        one["factor"], one["term"] = map(as_pixels, modulate)
    if outer is not None:
        one["outer"] = as_pixels(outer)
    everything = [target, *sources, *skipped, *(p for p in one.values() if p is not None)]

    args: dict[str, Any] = {
        "out": out, "out_step": target.step, "out_pitch": target.pitch,
        "x": tuple(p.tensor for p in sources), "x_step": tuple(p.step for p in sources),
        "x_pitch": tuple(p.pitch for p in sources),
        "weight": packed, "bias": _vector(bias), "pre_scale": _vector(pre_scale), "pre_shift": _vector(pre_shift),
        "prelu": _vector(prelu), "scale": scale,
        "skip": tuple(p.tensor for p in skipped) or None, "skip_step": tuple(p.step for p in skipped) or None,
        "skip_pitch": tuple(p.pitch for p in skipped) or None,
        "sums": sums, "slope": slope if act == "leaky" else None, "gain": None if gain == 1 else gain,
        "skip_gain": None if skip_gain == 1 else skip_gain, "outer_gain": None if outer_gain == 1 else outer_gain,
        "height": height, "width": width, "grid_height": grid_height, "grid_width": grid_width,
        "out_height": out_height, "out_width": out_width,
        "slots": 1 if sums is None else sums.shape[1], "slot_step": int(sums is not None and sums.shape[1] > 1),
        "COUT": cout, "KG": kg, "GROUPS": groups, "STARTS": _running((0, *channels)), "ENDS": _running(blocks),
        "TAPS": taps, "STRIDE": step, "U": phases, "LIFT": lift, "DIVIDE": divide, "BASE": base, "SHIFT": shift,
        "FOLD": shuffle, "TORCH_ORDER": shuffle_order == "torch", "TOGETHER": together, "FRAME": framed,
        "PRE": prologue, "PRE_RELU": pre_relu, "ACT": act, "ONE_SLOPE": prelu is not None and prelu.numel() == 1,
        "POST_RELU": post_relu, "SKIP_STARTS": _running((0, *(t.shape[1] for t in skips))),
        "EVEN_K": all(c % config["BK"] == 0 for c in channels), "EVEN_C": rows % config["BC"] == 0,
        "LARGE": any(p.large for p in everything), "PRECISION": precision,
        **config, "WEIGHTS_FIRST": bool(config["WEIGHTS_FIRST"]),
    }  # fmt: skip
    for name, image in one.items():
        args[name] = None if image is None else image.tensor
        args[f"{name}_step"] = None if image is None else image.step
        args[f"{name}_pitch"] = None if image is None else image.pitch
    parts = phases * phases * spread * groups
    grid = (tile_count * ceil_div(rows, config["BC"]), parts, n)
    return Launch(_conv_kernel, grid, args, warps)


def sum_slots(height: int, width: int) -> int:
    """How many slots sums of a fixed order need at most, for a convolution of one phase that makes such an image."""
    return ceil_div(height * width, LEAST_TILE)


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _running(values: Sequence[int]) -> tuple[int, ...]:
    """Sums of the values up to each of them."""
    total, sums = 0, []
    for v in values:
        total += v
        sums.append(total)
    return tuple(sums)
