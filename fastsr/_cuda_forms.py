"""The one form into which the CUDA engine brings every convolution: pure functions of its shape.

csrc/cuda/conv/conv.h says what blocks, octets, chunks and taps are. `lower` makes them, and the order in which weights
are packed, from the geometry of a convolution:

* A strided convolution reads phases of its input, a transposed one writes phases of its output, each phase with taps of
  its own; nearest upsampling before a convolution writes phases too, whose taps are sums of the original ones.
* PixelShuffle is a way of placing octets of channels.
* 32 outputs on Hopper fill the 64 rows of its matrix product with two output rows at once: twelve taps instead of nine,
  zero where a row does not read, which is 75 % useful work against 50 % with empty rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

OCTETS = 8  # of a block, at most
TILE_COLUMNS = 8
SHARED_80 = 99 * 1024
MAX_SOURCES = 24
LAST_ROWS, LAST_WIDTH = 32, 16  # csrc/cuda/conv/last_conv.cuh
LAST, SM80, SM90 = 27, 80, 90  # the main loops

Slot = tuple[int, ...]  # the kernel rows (or columns) whose weights are added up for one tap


class Unsuitable(Exception):
    """Says why a convolution is none that the engine can compute."""


@dataclass(frozen=True)
class Geometry:
    """All that the form of a convolution depends on. widths: channels of each source. sums: whether channel sums are
    asked for."""

    widths: tuple[int, ...]
    outputs: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: int = 0
    groups: int = 1
    transposed: bool = False
    upsample: int = 1
    shuffle: int = 1
    order: str = "torch"
    sums: bool = False


@dataclass(frozen=True, eq=False)
class Form:
    """The fields of ConvParams that the geometry alone decides, the table, and the packing.

    index: where each packed element comes from, in the flat concatenation of weight (after `merge`), bias, slopes, both
    prologue vectors and one zero: numbers of those parts' elements from the weight's start, with -1, -2, -3, -4, -5
    minus 8 times the element for bias, slope, scale, shift and zero. merge: matrices (slots, kernel rows) and (slots,
    kernel columns) that make sums of taps out of taps, or None where every tap is one of the weight's. has_sums:
    whether it leaves channel sums. whole_inputs, whole_outputs: whether every octet that is read, or stored, has eight
    channels and starts at a multiple of eight.
    """

    arch: int
    rows: int
    step_in: int
    step_out: int
    row_pitch: int
    halo_y: int
    halo_x: int
    halo_more: int
    halo_w: int
    blocks: int
    chunks: int
    taps_most: int
    steps: int
    tiles: int
    block_tiles: int
    table: np.ndarray
    index: np.ndarray
    merge: tuple[np.ndarray, np.ndarray] | None
    has_sums: bool
    whole_inputs: bool
    whole_outputs: bool


@dataclass(frozen=True)
class Tap:
    """One row or column of taps of an output phase: grid offset, phase of the input, which weights."""

    offset: int
    phase: int
    slot: Slot


@dataclass(frozen=True)
class Eight:
    """Rows of a block: `channels`, numbers of output channels as the weight counts them, go to the channels from
    `first` on of the pixel in `cell`, `row` output rows below the position; they read `inputs`."""

    row: int
    cell: tuple[int, int]
    first: int
    channels: tuple[int, ...]
    inputs: tuple[int, int]
    taps: tuple[tuple[Tap, Tap], ...]


@dataclass(frozen=True)
class WeightTile:
    """rows x 16 weights: `valid` channels from number `k` on, of the tap at the offsets `place` into the input's
    `phase`."""

    block: int
    k: int
    valid: int
    phase: tuple[int, int]
    place: tuple[int, int]


def axis_taps(
    kernel: int, stride: int, padding: int, transposed: bool, upsample: int
) -> tuple[int, int, list[list[Tap]]]:
    """The taps along one axis, for each phase of the output; before them the steps of input and output positions."""
    if transposed:
        phases = []
        for q in range(stride):
            read = [k for k in range(kernel) if (q + padding - k) % stride == 0]
            phases.append([Tap((q + padding - k) // stride, 0, (k,)) for k in read])
        return 1, stride, phases
    if upsample > 1:
        phases = []
        for q in range(upsample):
            offsets: dict[int, list[int]] = {}
            for k in range(kernel):
                offsets.setdefault((q + k - padding) // upsample, []).append(k)
            phases.append([Tap(offset, 0, tuple(read)) for offset, read in offsets.items()])
        return 1, upsample, phases
    return stride, 1, [[Tap((k - padding) // stride, (k - padding) % stride, (k,)) for k in range(kernel)]]


def _eights(g: Geometry) -> tuple[int, int, list[Eight]]:
    """Steps of input and output, and all octets."""
    if g.upsample > 1 and (g.transposed or g.stride > 1):
        raise Unsuitable("upsampling together with a stride or a transposed convolution")
    axes = [axis_taps(k, g.stride, g.padding, g.transposed, g.upsample) for k in g.kernel]
    step_in, step_out = axes[0][:2]
    if g.shuffle > 1 and step_out > 1:
        raise Unsuitable("a shuffled store together with upsampling or a transposed convolution")
    group, inputs = g.outputs // g.groups, sum(g.widths) // g.groups
    # Octets must not mix groups, or each would have to read the inputs of several.
    size = 8 if g.groups == 1 or group % 8 == 0 else group if group < 8 else 1
    r, eights = g.shuffle, []
    stored = g.outputs // (r * r)
    for qy, qx in product(range(step_out), repeat=2):
        taps = tuple(product(axes[0][2][qy], axes[1][2][qx]))
        for cell in product(range(r), repeat=2):
            for first in range(0, stored, size):
                within = range(first, min(first + size, stored))
                phase = cell[0] * r + cell[1]
                channels = tuple(c * r * r + phase if g.order == "torch" else phase * stored + c for c in within)
                used = {c // group for c in channels}
                read = (min(used) * inputs, (max(used) + 1) * inputs)
                place = (qy, qx) if r == 1 else cell
                eights.append(Eight(0, place, first, channels, read, taps))
    return step_in, step_out * r, eights


def _paired(eights: list[Eight]) -> list[Eight]:
    """The octets of two output rows, the lower one's taps a row further down."""
    return [
        Eight(row, e.cell, e.first, e.channels, e.inputs,
              tuple((Tap(y.offset + row, y.phase, y.slot), x) for y, x in e.taps))
        for row in (0, 1) for e in eights
    ]  # fmt: skip


def _blocks(eights: list[Eight], most: int) -> list[list[Eight]]:
    """Octets that share a block: those of other taps or other inputs only where neither fills one."""
    same: dict[object, list[Eight]] = {}
    for e in eights:
        same.setdefault((e.taps, e.inputs), []).append(e)
    full, rest = [], []
    for group in same.values():
        cuts = [group[i : i + most] for i in range(0, len(group), most)]
        full += [c for c in cuts if len(c) == most]
        rest += [c for c in cuts if len(c) < most]
    if len(rest) > 1 and len({(e.inputs) for c in rest for e in c}) == 1:  # phases of few channels
        together = [e for c in rest for e in c]
        rest = [together[i : i + most] for i in range(0, len(together), most)]
    return full + rest


def plane_bytes(halo_rows: int, halo_w: int) -> int:
    """As in csrc/cuda/conv/tile.h."""
    return -(-halo_rows * halo_w * 16 // 128) * 128 + 16


def suits_sm90(g: Geometry) -> bool:
    """Whether Hopper's own kernel is for it: blocks of 64 outputs that are at least three quarters full, or 32 outputs
    in pairs of rows, and whole sixteens of inputs."""
    pairs = g.outputs == 32 and not g.sums and g.stride == g.upsample == g.shuffle == 1 and not g.transposed
    full = g.outputs / (64 * math.ceil(g.outputs / 64)) >= 0.75 and g.outputs // g.shuffle**2 % 8 == 0
    return g.groups == 1 and all(w % 16 == 0 for w in g.widths) and (pairs or full) and max(g.kernel) <= 12


def suits_last(g: Geometry) -> bool:
    """Whether it is a 3x3 convolution to at most three channels, for which there is a kernel."""
    plain = Geometry(g.widths, g.outputs, (3, 3), padding=1)
    return g == plain and g.outputs <= 3 and sum(g.widths) >= 16


@functools.lru_cache(maxsize=512)
def lower(g: Geometry, arch: int) -> Form:
    """The form of a convolution for a main loop: LAST, SM80 or SM90. Raises Unsuitable."""
    if len(g.widths) > MAX_SOURCES:
        raise Unsuitable(f"{len(g.widths)} maps read as one (at most {MAX_SOURCES})")
    if arch == LAST:
        return _lower_last(g)
    step_in, step_out, eights = _eights(g)
    offsets = [[t.offset for e in eights for t in (pair[axis] for pair in e.taps)] for axis in (0, 1)]
    halo_y, halo_x = min(offsets[0]), min(offsets[1])
    halo_more, halo_w = max(offsets[0]) - halo_y, TILE_COLUMNS + max(offsets[1]) - halo_x
    pitch = 1
    if arch == SM90 and len(eights) == 4 and not g.sums:
        eights, pitch = _paired(eights), 2
    if arch == SM90:
        rows = 64
    else:
        count = max(len(b) for b in _blocks(eights, OCTETS))
        rows = 16 if count <= 2 else 32 if count <= 4 else 64
    blocks = _blocks(eights, rows // 8)
    steps, taps_limit = _stage(g, arch, rows, blocks, halo_more, halo_w)

    taps: list[int] = []
    chunks: list[list[int]] = []
    table: list[int] = []
    tiles: list[WeightTile] = []
    sizes = []
    for block in blocks:
        first_chunk, first_tile = len(chunks), len(tiles)
        found: dict[tuple[int, int], dict[tuple[int, int], tuple[Tap, Tap]]] = {}  # by phase of the input, by offsets
        for y, x in dict.fromkeys(pair for e in block for pair in e.taps):
            found.setdefault((y.phase, x.phase), {})[y.offset, x.offset] = (y, x)
        read = (min(e.inputs[0] for e in block), max(e.inputs[1] for e in block))
        for source, channel, k, valid in _pieces(g.widths, read, 16 * steps):
            for phase, places in found.items():
                places = sorted(places)
                for i in range(0, len(places), taps_limit):
                    part = places[i : i + taps_limit]
                    chunks.append([source, channel, valid, *phase, len(taps), len(part), len(tiles), k])
                    taps += [(y - halo_y) * halo_w + x - halo_x for y, x in part]
                    tiles += [WeightTile(len(sizes), k + 16 * s, min(16, valid - 16 * s), phase, place)
                              for place in part for s in range(steps)]  # fmt: skip
        sizes.append(len(tiles) - first_tile)
        table += [first_chunk, len(chunks) - first_chunk]
        octets = [[e.row, *e.cell, e.first, len(e.channels)] for e in block]
        octets += [[0] * 5] * (OCTETS - len(octets))
        table += [v for o in octets for v in o]

    slots = [list(dict.fromkeys(t.slot for e in eights for t in (p[axis] for p in e.taps))) for axis in (0, 1)]
    plain = all(len(s) == 1 for axis in slots for s in axis)
    if plain:
        slots, merge = [[(k,) for k in range(n)] for n in g.kernel], None
    else:
        merge = tuple(
            np.array([[float(k in s) for k in range(n)] for s in axis], dtype=np.float32)
            for axis, n in zip(slots, g.kernel, strict=True)
        )
    return Form(
        arch, rows, step_in, step_out, pitch, halo_y, halo_x, halo_more, halo_w, len(blocks), len(chunks),
        max(c[6] for c in chunks), steps, len(tiles), max(sizes),
        np.array(table + [v for c in chunks for v in c] + taps, dtype=np.int32),
        _index(g, arch, rows, blocks, tiles, slots), merge,
        g.sums and step_out == 1 and pitch == 1 and step_in == 1,
        all(c[1] % 8 == 0 and c[2] % 8 == 0 for c in chunks),
        all(len(e.channels) == 8 and e.first % 8 == 0 for e in eights),
    )  # fmt: skip


def _lower_last(g: Geometry) -> Form:
    """The 1x1 product of last_conv.cuh, with a column for each tap of each output."""
    inputs = sum(g.widths)
    steps = next(s for s in (4, 2, 1) if s == 1 or all(w % (16 * s) == 0 for w in g.widths))
    pieces = _pieces(g.widths, (0, inputs), 16 * steps)
    chunks = [[source, c, valid, 0, 0, 0, 1, steps * i, k] for i, (source, c, k, valid) in enumerate(pieces)]
    octets = [[0, 0, 0, 0, g.outputs]] + [[0] * 5] * (OCTETS - 1)
    index = np.full((len(pieces) * steps, LAST_ROWS, 16), ZERO, dtype=np.int64)
    for i, (_, _, k, valid) in enumerate(pieces):
        for tap, o, c in product(range(9), range(g.outputs), range(valid)):
            index[i * steps + c // 16, tap * g.outputs + o, c % 16] = (o * inputs + k + c) * 9 + tap
    row, channel = tile_order(SM80, LAST_ROWS)
    lines = np.arange(LAST_ROWS)
    vectors = [np.where(lines < g.outputs, part - 8 * lines, ZERO) for part in (BIAS, SLOPE)]
    vectors += [part - 8 * np.arange(inputs) for part in (SCALE, SHIFT)]
    return Form(
        LAST, LAST_ROWS, 1, 1, 1, -1, -1, 2, LAST_WIDTH + 2, 1, len(chunks), 1, steps, len(index), len(index),
        np.array([0, len(chunks), *(v for o in octets for v in o), *(v for c in chunks for v in c), 0], dtype=np.int32),
        np.concatenate([index[:, row, channel].reshape(-1), *vectors]), None, False,
        all(c[2] % 8 == 0 and c[1] % 8 == 0 for c in chunks), False,
    )  # fmt: skip


def _stage(
    g: Geometry, arch: int, rows: int, blocks: list[list[Eight]], halo_more: int, halo_w: int
) -> tuple[int, int]:
    """Channels, in sixteens, and taps at most, of a chunk."""
    most = max(len({(y.offset, y.phase, x.offset, x.phase) for e in b for y, x in e.taps}) for b in blocks)
    if arch == SM90:
        steps, limit = (4, 16) if most <= 2 else (2, 13)
    else:
        steps, limit = (4, 16) if most == 1 else (2, 4) if most <= 4 else (1, 16)
    reads = {e.inputs for b in blocks for e in b}

    def padded(s: int) -> int:
        return sum(16 * s for read in reads for _ in _pieces(g.widths, read, 16 * s))

    while steps > 1 and padded(steps) > padded(1):
        steps //= 2
    if arch == SM80:  # two stages of the low tile must fit beside the channel sums
        halo = -(-2 * steps * plane_bytes(16 + halo_more, halo_w) // 128) * 128
        limit = min(limit, ((SHARED_80 - 4 * 64 * 4) // 2 - halo) // (rows * 32 * steps))
        if limit < 1:
            raise Unsuitable(f"a kernel of {g.kernel[0]}x{g.kernel[1]}, whose halo does not fit into shared memory")
    return steps, limit


def _pieces(widths: Sequence[int], read: tuple[int, int], size: int) -> list[tuple[int, int, int, int]]:
    """(source, first channel, its number among all, how many) of the pieces that cover channels read[0] to read[1]."""
    found, start = [], 0
    for source, width in enumerate(widths):
        begin, end = max(read[0], start), min(read[1], start + width)
        found += [(source, c - start, c, min(size, end - c)) for c in range(begin, end, size)]
        start += width
    return found


BIAS, SLOPE, SCALE, SHIFT, ZERO = -1, -2, -3, -4, -5  # parts of what is packed, beside the weights; see Form.index


def _index(
    g: Geometry, arch: int, rows: int, blocks: list[list[Eight]], tiles: list[WeightTile], slots: list[list[Slot]]
) -> np.ndarray:
    """See Form.index."""
    inputs, outputs = sum(g.widths), g.outputs
    group_in, group_out = inputs // g.groups, outputs // g.groups
    ny, nx = len(slots[0]), len(slots[1])
    number = [{s: i for i, s in enumerate(axis)} for axis in slots]
    lines = np.full((len(blocks), rows), -1, dtype=np.int64)  # the output channel of each row
    for b, block in enumerate(blocks):
        for o, e in enumerate(block):
            lines[b, 8 * o : 8 * o + len(e.channels)] = e.channels
    index = np.full((len(tiles), rows, 16), ZERO, dtype=np.int64)
    for t, tile in enumerate(tiles):
        ci = np.arange(tile.k, tile.k + max(tile.valid, 0))[None]
        for o, e in enumerate(blocks[tile.block]):
            wanted = (tile.place, tile.phase)
            pair = next((p for p in e.taps if ((p[0].offset, p[1].offset), (p[0].phase, p[1].phase)) == wanted), None)
            if pair is None:
                continue
            y, x = number[0][pair[0].slot], number[1][pair[1].slot]
            co = np.array(e.channels)[:, None]
            inside = co // group_out == ci // group_in
            if g.transposed:  # (inputs, outputs / groups, ny, nx)
                at = ((ci * group_out + co % group_out) * ny + y) * nx + x
            else:  # (outputs, inputs / groups, ny, nx)
                at = ((co * group_in + ci % group_in) * ny + y) * nx + x
            index[t, 8 * o : 8 * o + len(e.channels), : ci.size] = np.where(inside, at, ZERO)
    order_row, order_k = tile_order(arch, rows)
    packed = index[:, order_row, order_k].reshape(-1)
    every = lines.reshape(-1)
    vectors = [np.where(every >= 0, part - 8 * every, ZERO) for part in (BIAS, SLOPE)]
    vectors += [part - 8 * np.arange(inputs) for part in (SCALE, SHIFT)]
    return np.concatenate([packed, *vectors])


def tile_order(arch: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, channel) of the elements of a weight tile of rows x 16, in the order of memory.

    sm_90: core matrices of 8 rows x 8 channels, those of neighbouring channels side by side.
    sm_80: for each 16 rows, what each lane holds of mma.sync's B operand: channels 2 (lane % 4) and the next of row
    lane / 4, the same 8 channels further, and both again 8 rows further.
    """
    i = np.arange(rows * 16)
    if arch == SM90:
        return i // 128 * 8 + i % 64 // 8, i // 64 % 2 * 8 + i % 8
    lane, register, half = i // 8 % 32, i // 2 % 4, i % 2
    return i // 256 * 16 + register // 2 * 8 + lane // 4, register % 2 * 8 + lane % 4 * 2 + half
