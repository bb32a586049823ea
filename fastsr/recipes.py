"""Block operators as recipes: short lists of convolution descriptors over a private workspace.

A recipe says which convolutions a block runs, from where they read, with which prologue and epilogue, and where they
store. A device that implements `conv(descriptor)` therefore runs every recipe, and the few hand-fused blocks override
one recipe each. The same list is what one C call or a CUDA graph walks, what memory planning reads, and what the
tests run with the eager `conv` of this file against each operator's definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsr.op import OPS


@dataclass(frozen=True)
class View:
    """A range of channels of a named buffer; `channels=None` is all from `start` on. rows, columns: (first, end) of
    those pixels that it is cut to; what a convolution reads beyond is zero."""

    buffer: str
    start: int = 0
    channels: int | None = None
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def of(self, buffers: dict[str, Tensor]) -> Tensor:
        """The (N, channels, H, W) slice itself, sharing the buffer's memory."""
        whole = buffers[self.buffer]
        channels = whole.shape[1] - self.start if self.channels is None else self.channels
        view = whole.narrow(1, self.start, channels)
        for axis, span in ((2, self.rows), (3, self.columns)):
            view = view if span is None else view.narrow(axis, span[0], span[1] - span[0])
        return view

    def size(self, whole: Sequence[int]) -> tuple[int, int]:
        """(rows, columns) of the slice, given the shape of the buffer."""
        spans = self.rows or (0, whole[2]), self.columns or (0, whole[3])
        return spans[0][1] - spans[0][0], spans[1][1] - spans[1][0]


@dataclass(frozen=True)
class Conv:
    """One convolution; the fields mean what the arguments of `fastsr.ops.conv_act` mean, beside these.

    sources: read as one concatenation. store: where the result goes. skip: added after gain and scale; several views
    are read as one concatenation.
    scale: name of an (N, Cout) buffer. sums: name of an (N, Cout, 3, 3) buffer that receives, in the same pass, the
    sums of the stored values over the pixels that each tap of a following zero-padded 3x3 convolution reads.
    modulate: (factor, term) maps of the output's shape; what stands before post_relu becomes y * factor + term. It does
    not go together with skip or shuffle. outer: a second skip, last of all: outer + outer_gain * y is stored.
    """

    sources: tuple[View, ...]
    weight: Tensor
    bias: Tensor | None
    store: View
    stride: int = 1
    padding: int = 0
    groups: int = 1
    transposed: bool = False
    pre_scale: Tensor | None = None
    pre_shift: Tensor | None = None
    pre_relu: bool = False
    upsample: int = 1
    act: str = "none"
    slope: float = 0.0
    prelu: Tensor | None = None
    gain: float = 1.0
    scale: str | None = None
    skip: View | tuple[View, ...] | None = None
    skip_gain: float = 1.0
    post_relu: bool = False
    shuffle: int = 1
    shuffle_order: str = "torch"
    sums: str | None = None
    modulate: tuple[View, View] | None = None
    outer: View | None = None
    outer_gain: float = 1.0


@dataclass(frozen=True)
class Gate:
    """Channel attention computed before the convolution it scales (operators.md, rewrite 1), a tiny kernel.

    From the nine sums S of h: mean(W * h + b) = b + sum(W[o, i, ky, kx] S[i, ky, kx]) / pixels, then
    sigmoid(up_weight relu(down_weight mean + down_bias) + up_bias), stored as an (N, C) buffer. Without a weight,
    `sums` is an (N, C) buffer of the means themselves.
    """

    sums: str
    pixels: int
    weight: Tensor | None
    bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    store: str


@dataclass(frozen=True)
class Mean:
    """The mean of every channel over the image, stored as an (N, C) buffer."""

    source: View
    store: str


@dataclass(frozen=True)
class Scale:
    """source * scale[n, c], for an (N, C) buffer; where no convolution stands before that could do it."""

    source: View
    scale: str
    store: View


@dataclass(frozen=True)
class Copy:
    """source, stored once more, for pixels that no convolution could store alone."""

    source: View
    store: View


Step = Conv | Gate | Mean | Scale | Copy


@dataclass(frozen=True)
class Recipe:
    """Steps over named buffers. inputs: the operator's image arguments; workspace: name -> shape of everything else,
    among them the `output`, the buffer that is the operator's result. float8: convolutions read e4m3, all maps with the
    scales of the first input; what is added stays what it is."""

    inputs: dict[str, Tensor]
    workspace: dict[str, tuple[int, ...]]
    steps: tuple[Step, ...]
    output: str = "out"
    float8: bool = False


def border_sums(h: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 3, 3): entry (ky, kx) is the sum over the pixels that tap (ky, kx) of a zero-padded 3x3
    convolution reads: the total without the last row (ky = 0) or the first (ky = 2), columns likewise."""
    rows = torch.stack([h[:, :, :-1].sum(2), h.sum(2), h[:, :, 1:].sum(2)], 2)
    return torch.stack([rows[..., :-1].sum(3), rows.sum(3), rows[..., 1:].sum(3)], 3)


def eager_gate(step: Gate, buffers: dict[str, Tensor]) -> None:
    """Runs a Gate with torch operators, filling its buffer."""
    mean = buffers[step.sums]
    if step.weight is not None:
        mean = torch.einsum("oiyx,niyx->no", step.weight, mean) / step.pixels
    if step.bias is not None:
        mean = mean + step.bias
    hidden = torch.relu(mean @ step.down_weight.flatten(1).T + step.down_bias)
    buffers[step.store].copy_(torch.sigmoid(hidden @ step.up_weight.flatten(1).T + step.up_bias))


def _skip(skip: View | tuple[View, ...] | None, buffers: dict[str, Tensor]) -> Tensor | None:
    if isinstance(skip, tuple):
        return torch.cat([v.of(buffers) for v in skip], 1)
    return None if skip is None else skip.of(buffers)


def eager_conv(step: Conv, buffers: dict[str, Tensor]) -> None:
    """Runs a Conv with the eager definition of `conv_act`, filling its slice: what every device's `conv` answers to."""
    y = OPS["conv_act"].eager(
        [v.of(buffers) for v in step.sources], step.weight, step.bias, step.stride, step.padding, step.groups,
        step.transposed, step.pre_scale, step.pre_shift, step.pre_relu, step.upsample, step.act, step.slope,
        step.prelu, step.gain, None if step.scale is None else buffers[step.scale],
        _skip(step.skip, buffers), step.skip_gain,
        step.post_relu and step.modulate is None, step.shuffle, step.shuffle_order,
    )  # fmt: skip
    if step.modulate is not None:
        factor, term = (v.of(buffers) for v in step.modulate)
        y = y * factor + term
        y = torch.relu(y) if step.post_relu else y
    if step.outer is not None:
        y = step.outer.of(buffers) + y * step.outer_gain
    step.store.of(buffers).copy_(y)
    if step.sums is not None:
        buffers[step.sums].copy_(border_sums(y))


def run(
    recipe: Recipe,
    conv: Callable[[Conv, dict[str, Tensor]], None] = eager_conv,
    gate: Callable[[Gate, dict[str, Tensor]], None] = eager_gate,
) -> Tensor:
    """Runs a recipe in a fresh workspace (NaN at first, so that a read before a write shows) and returns its output."""
    if recipe.float8:
        raise ValueError("run: expected a recipe without float8; the operator's definition rounds as its kernels do")
    like = next(iter(recipe.inputs.values()))
    buffers = dict(recipe.inputs)
    for name, shape in recipe.workspace.items():
        buffers[name] = torch.full(shape, torch.nan, dtype=like.dtype, device=like.device)
    for step in recipe.steps:
        if isinstance(step, Conv):
            conv(step, buffers)
        elif isinstance(step, Gate):
            gate(step, buffers)
        elif isinstance(step, Mean):
            buffers[step.store].copy_(step.source.of(buffers).mean((2, 3)))
        elif isinstance(step, Copy):
            step.store.of(buffers).copy_(step.source.of(buffers))
        else:
            step.store.of(buffers).copy_(step.source.of(buffers) * buffers[step.scale][:, :, None, None])
    return buffers[recipe.output]
