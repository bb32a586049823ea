"""The residual block of CARN, EnhanceNet, SRFeat and all EDSR-like networks. Bound by arithmetic."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastsr.op import empty_image, expect, expect_alike, op
from fastsr.ops.conv_act import activate
from fastsr.recipes import Conv, Recipe, View


@op
def res_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str = "relu",
    slope: float = 0.0,
    gain: float = 1.0,
    post_relu: bool = False,
) -> Tensor:
    """x + gain * conv2(act(conv1(x))), then ReLU if post_relu. Both convolutions keep the size (odd kernels).

    x: (N, C, H, W). weight1: (F, C, k, k), weight2: (C, F, k, k). act: "none", "relu" or "leaky" (slope).
    The result has the shape and layout of x. Raises ValueError.
    """
    h = activate(F.conv2d(x, weight1, bias1, padding=weight1.shape[-1] // 2), act, slope, None)
    y = F.conv2d(h, weight2, bias2, padding=weight2.shape[-1] // 2)
    y = x + (y if gain == 1.0 else y * gain)
    return F.relu(y) if post_relu else y


@res_block.check
def _(x, weight1, bias1, weight2, bias2, act, slope, gain, post_relu):
    expect_chain(x, [(weight1, bias1), (weight2, bias2)])
    expect(weight2.shape[0] == x.shape[1], "the block returns as many channels as it takes", x=x, weight2=weight2)
    expect(act in ("none", "relu", "leaky"), "act is none, relu or leaky", act=act)


def expect_chain(x: Tensor, layers: list[tuple[Tensor, Tensor | None]], groups: int = 1) -> None:
    """Checks x and a chain of size-keeping convolutions given as (weight, bias): channels, odd kernels, one dtype."""
    expect(x.dim() == 4, "x is (N, C, H, W)", x=x)
    channels = x.shape[1]
    for weight, bias in layers:
        fits = weight.dim() == 4 and weight.shape[2] == weight.shape[3] and weight.shape[2] % 2 == 1
        g = groups if fits and weight.shape[1] * groups == channels else 1
        expect(fits and weight.shape[1] * g == channels, f"a (Cout, {channels}, k, k) weight with odd k", weight=weight)
        expect(bias is None or bias.shape == weight.shape[:1], "bias is (Cout,)", weight=weight, bias=bias)
        expect_alike(x=x, weight=weight, bias=bias)
        channels = weight.shape[0]


@res_block.alloc
def _(x, weight1, bias1, weight2, bias2, act, slope, gain, post_relu):
    return empty_image(x, x.shape)


@res_block.recipe
def _(x, weight1, bias1, weight2, bias2, act, slope, gain, post_relu):
    n, _, h, w = x.shape
    conv1 = Conv((View("x"),), weight1, bias1, View("h"), padding=weight1.shape[-1] // 2, act=act, slope=slope)
    conv2 = Conv((View("h"),), weight2, bias2, View("out"), padding=weight2.shape[-1] // 2, gain=gain,
                 skip=View("x"), post_relu=post_relu)  # fmt: skip
    return Recipe({"x": x}, {"h": (n, weight1.shape[0], h, w), "out": tuple(x.shape)}, (conv1, conv2))


@res_block.samples
def _(make):
    yield make(1, 2, 4, 3), make(3, 2, 3, 3), make(3), make(2, 3, 3, 3), make(2), "relu", 0.0, 0.5, True
    yield make(2, 2, 3, 4), make(2, 2, 3, 3), None, make(2, 2, 1, 1), None, "leaky", 0.2
    yield make(1, 64, 24, 25), make(64, 64, 3, 3), make(64), make(64, 64, 3, 3), make(64), "relu", 0.0, 1.0, True
    yield make(1, 128, 12, 13), make(128, 128, 3, 3), make(128), make(128, 128, 3, 3), make(128), "leaky", 0.2
