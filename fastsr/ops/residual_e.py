"""CARN-M's efficient residual unit: grouped 3x3, grouped 3x3, 1x1, sum. Bound by memory unless fused."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastsr.op import empty_image, expect, op
from fastsr.ops.res_block import expect_chain
from fastsr.recipes import Conv, Recipe, View


@op
def residual_e(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    weight3: Tensor,
    bias3: Tensor | None,
    groups: int,
) -> Tensor:
    """relu(x + conv3(relu(conv2(relu(conv1(x)))))), CARN (Ahn et al. 2018), figure 3c.

    x: (N, C, H, W). weight1, weight2: (C, C/groups, 3, 3). weight3: (C, C, 1, 1). The result is like x.
    """
    h = F.relu(F.conv2d(x, weight1, bias1, padding=1, groups=groups))
    h = F.relu(F.conv2d(h, weight2, bias2, padding=1, groups=groups))
    return F.relu(x + F.conv2d(h, weight3, bias3))


@residual_e.check
def _(x, weight1, bias1, weight2, bias2, weight3, bias3, groups):
    expect_chain(x, [(weight1, bias1), (weight2, bias2)], groups)
    expect_chain(x, [(weight3, bias3)])
    shapes = [tuple(w.shape[2:]) for w in (weight1, weight2, weight3)]
    expect(shapes == [(3, 3), (3, 3), (1, 1)], "kernels of 3x3, 3x3 and 1x1", shapes=shapes)
    c = x.shape[1]
    same = all(w.shape[0] == c for w in (weight1, weight2, weight3)) and weight1.shape[1] * groups == c
    expect(same and weight2.shape[1] * groups == c, "C channels throughout, in `groups` groups", x=x, weight1=weight1)


@residual_e.alloc
def _(x, weight1, bias1, weight2, bias2, weight3, bias3, groups):
    return empty_image(x, x.shape)


@residual_e.recipe
def _(x, weight1, bias1, weight2, bias2, weight3, bias3, groups):
    steps = (
        Conv((View("x"),), weight1, bias1, View("h1"), padding=1, groups=groups, act="relu"),
        Conv((View("h1"),), weight2, bias2, View("h2"), padding=1, groups=groups, act="relu"),
        Conv((View("h2"),), weight3, bias3, View("out"), skip=View("x"), post_relu=True),
    )
    return Recipe({"x": x}, {name: tuple(x.shape) for name in ("h1", "h2", "out")}, steps)


@residual_e.samples
def _(make):
    yield make(1, 4, 3, 4), make(4, 2, 3, 3), make(4), make(4, 2, 3, 3), make(4), make(4, 4, 1, 1), make(4), 2
    yield make(2, 2, 1, 3), make(2, 2, 3, 3), None, make(2, 2, 3, 3), None, make(2, 2, 1, 1), None, 1
    yield (make(2, 64, 12, 13), make(64, 16, 3, 3), make(64), make(64, 16, 3, 3), make(64),
           make(64, 64, 1, 1), make(64), 4)  # fmt: skip
