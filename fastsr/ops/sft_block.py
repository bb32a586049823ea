"""SFTGAN's residual block: two spatial feature transforms, each before a 3x3 convolution. Bound by arithmetic."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastsr.op import empty_image, expect, op
from fastsr.ops.res_block import expect_chain
from fastsr.ops.sft_layer import expect_branches, layer_steps, map_shapes, map_steps, sft_layer
from fastsr.recipes import Conv, Recipe, View


@op
def sft_block(
    x: Tensor,
    condition: Tensor,
    scale0: list[Tensor],
    shift0: list[Tensor],
    weight0: Tensor,
    bias0: Tensor | None,
    scale1: list[Tensor],
    shift1: list[Tensor],
    weight1: Tensor,
    bias1: Tensor | None,
    slope: float,
    paper: bool = False,
) -> Tensor:
    """x + conv1(SFT1(relu(conv0(SFT0(x))))) with SFT(x) = x * (1 + s) + t; in the paper's form
    x + conv1(relu(SFT1(conv0(relu(SFT0(x)))))) with SFT(x) = x * s + t. The maps s and t come from the condition.

    x: (N, C, H, W). condition: (N, K, H, W). scale0, shift0, scale1, shift1, slope: as in `sft_layer`.
    weight0: (F, C, k, k), weight1: (C, F, k, k), k odd; they keep the size. The result is like x. Raises ValueError.
    """
    h = sft_layer.eager(x, condition, scale0, shift0, slope, not paper)
    h = F.conv2d(F.relu(h) if paper else h, weight0, bias0, padding=weight0.shape[-1] // 2)
    h = sft_layer.eager(h if paper else F.relu(h), condition, scale1, shift1, slope, not paper)
    return x + F.conv2d(F.relu(h) if paper else h, weight1, bias1, padding=weight1.shape[-1] // 2)


@sft_block.check
def _(x, condition, scale0, shift0, weight0, bias0, scale1, shift1, weight1, bias1, slope, paper):
    expect_chain(x, [(weight0, bias0), (weight1, bias1)])
    expect(weight1.shape[0] == x.shape[1], "the block returns as many channels as it takes", x=x, weight1=weight1)
    expect_branches(x, condition, x.shape[1], scale0=scale0, shift0=shift0)
    expect_branches(x, condition, weight0.shape[0], scale1=scale1, shift1=shift1)


@sft_block.alloc
def _(x, condition, scale0, shift0, weight0, bias0, scale1, shift1, weight1, bias1, slope, paper):
    return empty_image(x, x.shape)


@sft_block.recipe
def _(x, condition, scale0, shift0, weight0, bias0, scale1, shift1, weight1, bias1, slope, paper):
    n, _, h, w = x.shape
    middle = (n, weight0.shape[0], h, w)
    steps = (
        *layer_steps(scale0, shift0, slope, not paper, "first", relu=paper),
        *map_steps("scale", scale1, slope, plus_one=not paper),
        *map_steps("shift1", shift1, slope),
        Conv((View("first"),), weight0, bias0, View("middle"), padding=weight0.shape[-1] // 2,
             act="none" if paper else "relu", modulate=(View("scale"), View("shift1")), post_relu=paper),
        Conv((View("middle"),), weight1, bias1, View("out"), padding=weight1.shape[-1] // 2, skip=View("x")),
    )  # fmt: skip
    branches = {"first": scale0, "shift": shift0, "scale": scale1, "shift1": shift1}
    workspace = {"middle": middle, "out": tuple(x.shape)}
    for name, weights in branches.items():
        workspace |= map_shapes(name, weights, x)
    return Recipe({"x": x, "condition": condition}, workspace, steps)


@sft_block.samples
def _(make):
    def branch(k, c, hidden):
        return [make(hidden, k, 1, 1), make(hidden), make(c, hidden, 1, 1), make(c)]

    def sample(n, h, w, c, middle, k, hidden, *rest, bias=True):
        biases = (make(middle), make(c)) if bias else (None, None)
        return (
            make(n, c, h, w), make(n, k, h, w), branch(k, c, hidden), branch(k, c, hidden), make(middle, c, 3, 3),
            biases[0], branch(k, middle, hidden), branch(k, middle, hidden), make(c, middle, 3, 3), biases[1], *rest,
        )  # fmt: skip

    yield sample(1, 3, 4, 2, 3, 2, 2, 0.1)
    yield sample(2, 4, 3, 2, 2, 3, 2, 0.01, True, bias=False)
    yield sample(1, 24, 25, 64, 64, 32, 32, 0.1)
    yield sample(1, 13, 12, 64, 64, 32, 32, 0.01, True)
