"""The residual channel attention block of RCAN. Bound by arithmetic once the attention needs no pass of its own.

Y. Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention Networks", ECCV 2018, figure 4.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastsr.op import empty_image, expect, op
from fastsr.ops.channel_attention import channel_attention, expect_gate
from fastsr.ops.res_block import expect_chain
from fastsr.recipes import Conv, Gate, Recipe, View


@op
def rcab(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    gain: float = 1.0,
) -> Tensor:
    """x + gain * attention(conv2(relu(conv1(x)))), where attention is `channel_attention`.

    x: (N, C, H, W). weight1: (F, C, 3, 3), weight2: (C, F, 3, 3). The gate's weights as in `channel_attention`.
    The result has the shape and layout of x. Raises ValueError.
    """
    h = F.relu(F.conv2d(x, weight1, bias1, padding=1))
    z = F.conv2d(h, weight2, bias2, padding=1)
    y = channel_attention.eager(z, down_weight, down_bias, up_weight, up_bias)
    return x + (y if gain == 1.0 else y * gain)


@rcab.check
def _(x, weight1, bias1, weight2, bias2, down_weight, down_bias, up_weight, up_bias, gain):
    expect_chain(x, [(weight1, bias1), (weight2, bias2)])
    expect(weight1.shape[2] == 3 and weight2.shape[2] == 3, "3x3 kernels", weight1=weight1, weight2=weight2)
    expect(weight2.shape[0] == x.shape[1], "the block returns as many channels as it takes", x=x, weight2=weight2)
    expect_gate(x, x.shape[1], down_weight, down_bias, up_weight, up_bias)


@rcab.alloc
def _(x, weight1, bias1, weight2, bias2, down_weight, down_bias, up_weight, up_bias, gain):
    return empty_image(x, x.shape)


@rcab.recipe
def _(x, weight1, bias1, weight2, bias2, down_weight, down_bias, up_weight, up_bias, gain):
    # The mean that the gate needs is linear in h, so nine sums of h make the gate before conv2 runs, and conv2's
    # epilogue applies it: the feature map is never read a second time (operators.md, rewrite 1).
    n, c, h, w = x.shape
    f = weight1.shape[0]
    steps = (
        Conv((View("x"),), weight1, bias1, View("h"), padding=1, act="relu", sums="sums"),
        Gate("sums", h * w, weight2, bias2, down_weight, down_bias, up_weight, up_bias, "gate"),
        Conv((View("h"),), weight2, bias2, View("out"), padding=1, gain=gain, scale="gate", skip=View("x")),
    )
    return Recipe({"x": x}, {"h": (n, f, h, w), "sums": (n, f, 3, 3), "gate": (n, c), "out": tuple(x.shape)}, steps)


@rcab.samples
def _(make):
    def gate(c, r):
        return make(r, c, 1, 1), make(r), make(c, r, 1, 1), make(c)

    yield make(2, 4, 3, 5), make(3, 4, 3, 3), make(3), make(4, 3, 3, 3), make(4), *gate(4, 2), 0.5
    yield make(1, 2, 1, 4), make(2, 2, 3, 3), None, make(2, 2, 3, 3), None, *gate(2, 1)
    yield make(1, 2, 1, 1), make(2, 2, 3, 3), make(2), make(2, 2, 3, 3), make(2), *gate(2, 1)
    yield make(2, 64, 24, 25), make(64, 64, 3, 3), make(64), make(64, 64, 3, 3), make(64), *gate(64, 4)
