"""Channel attention: every channel scaled by a gate made from the means of all. Bound by memory: two reads, one write.

Y. Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention Networks", ECCV 2018, section 3.3.
Inside a residual block `rcab` computes the same without a pass of its own.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastsr.op import empty_image, expect, expect_alike, op
from fastsr.recipes import Gate, Mean, Recipe, Scale, View


@op
def channel_attention(x: Tensor, down_weight: Tensor, down_bias: Tensor, up_weight: Tensor, up_bias: Tensor) -> Tensor:
    """x * sigmoid(up(relu(down(mean of x over the image)))).

    x: (N, C, H, W). down_weight: (R, C, 1, 1), up_weight: (C, R, 1, 1), with biases (R,) and (C,). The result is
    like x. Raises ValueError.
    """
    mean = x.mean((2, 3), keepdim=True)
    gate = F.conv2d(F.relu(F.conv2d(mean, down_weight, down_bias)), up_weight, up_bias).sigmoid()
    return x * gate


@channel_attention.check
def _(x, down_weight, down_bias, up_weight, up_bias):
    expect(x.dim() == 4, "x is (N, C, H, W)", x=x)
    expect_gate(x, x.shape[1], down_weight, down_bias, up_weight, up_bias)


def expect_gate(
    x: Tensor, channels: int, down_weight: Tensor, down_bias: Tensor, up_weight: Tensor, up_bias: Tensor
) -> None:
    """Checks the weights of a gate over `channels` channels, and that they have the dtype and device of x."""
    hidden = down_weight.shape[0]
    expect(
        down_weight.shape == (hidden, channels, 1, 1), f"down_weight is (R, {channels}, 1, 1)", down_weight=down_weight
    )
    expect(
        up_weight.shape == (channels, hidden, 1, 1), f"up_weight is ({channels}, {hidden}, 1, 1)", up_weight=up_weight
    )
    expect(down_bias.shape == (hidden,) and up_bias.shape == (channels,), "down_bias is (R,) and up_bias (C,)",
           down_bias=down_bias, up_bias=up_bias)  # fmt: skip
    expect_alike(x=x, down_weight=down_weight, down_bias=down_bias, up_weight=up_weight, up_bias=up_bias)


@channel_attention.alloc
def _(x, down_weight, down_bias, up_weight, up_bias):
    return empty_image(x, x.shape)


@channel_attention.recipe
def _(x, down_weight, down_bias, up_weight, up_bias):
    n, c, h, w = x.shape
    steps = (
        Mean(View("x"), "mean"),
        Gate("mean", h * w, None, None, down_weight, down_bias, up_weight, up_bias, "gate"),
        Scale(View("x"), "gate", View("out")),
    )
    return Recipe({"x": x}, {"mean": (n, c), "gate": (n, c), "out": tuple(x.shape)}, steps)


@channel_attention.samples
def _(make):
    yield make(2, 4, 3, 5), make(2, 4, 1, 1), make(2), make(4, 2, 1, 1), make(4)
    yield make(1, 3, 1, 1), make(1, 3, 1, 1), make(1), make(3, 1, 1, 1), make(3)
    yield make(2, 64, 24, 25), make(4, 64, 1, 1), make(4), make(64, 4, 1, 1), make(64)
