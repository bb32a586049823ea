"""The dense block of RDN and of ESRGAN, whose residual-in-residual ends with `outer`. Bound by arithmetic."""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr import _float8
from fastsr.op import empty_image, expect, expect_alike, op
from fastsr.recipes import Conv, Recipe, View


@op
def dense_block(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    slope: float = 0.0,
    gain: float = 1.0,
    outer: Tensor | None = None,
    outer_gain: float = 1.0,
    float8: bool = False,
) -> Tensor:
    """x + gain * last([x, g1, .., gk]) where g1 = act(conv1(x)), g2 = act(conv2([x, g1])), and so on.

    RDN (Zhang et al. 2018, figure 3) has ReLU and a 1x1 `last`, ESRGAN (Wang et al. 2018, figure 4) leaky ReLU, a
    3x3 `last` and gain 0.2. With `outer` the result is outer + outer_gain * (that): the end of ESRGAN's RRDB.

    x, outer: (N, C, H, W). weights: k + 1 of (Gi, C + G1 + .. + G(i-1), s, s) with odd s; the last has C outputs and
    no activation. biases: one a weight, (Gi,). slope: of the leaky ReLU, 0 for ReLU. The result has the shape and
    layout of x. Raises ValueError.

    float8: convolutions multiply in e4m3 and sum in more. Weights have a scale for each output; x and what the layers
    grow have one for each image, with room for g1, .., gk 28 times larger than x. What is added stays as it is.
    """
    if float8:
        return _eager_float8(x, weights, biases, slope, gain, outer, outer_gain)
    features = [x]
    for weight, bias in zip(weights[:-1], biases[:-1]):
        y = F.conv2d(torch.cat(features, 1), weight, bias, padding=weight.shape[-1] // 2)
        features.append(F.leaky_relu(y, slope) if slope else F.relu(y))
    y = F.conv2d(torch.cat(features, 1), weights[-1], biases[-1], padding=weights[-1].shape[-1] // 2)
    y = x + (y if gain == 1.0 else y * gain)
    return y if outer is None else outer + y * outer_gain


def _eager_float8(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    slope: float,
    gain: float,
    outer: Tensor | None,
    outer_gain: float,
) -> Tensor:
    by = _float8.scale(x, (1, 2, 3), _float8.MAPS)
    weights = [_float8.through(w, _float8.scale(w, (1, 2, 3), _float8.WEIGHTS)) for w in weights]
    features = [_float8.through(x, by)]
    for weight, bias in zip(weights[:-1], biases[:-1]):
        y = F.conv2d(torch.cat(features, 1), weight, bias, padding=weight.shape[-1] // 2)
        features.append(_float8.through(F.leaky_relu(y, slope) if slope else F.relu(y), by))
    y = x + gain * F.conv2d(torch.cat(features, 1), weights[-1], biases[-1], padding=weights[-1].shape[-1] // 2)
    return y if outer is None else outer + y * outer_gain


@dense_block.check
def _(x, weights, biases, slope, gain, outer, outer_gain, float8):
    expect(x.dim() == 4, "x is (N, C, H, W)", x=x)
    expect(len(weights) >= 2 and len(biases) == len(weights), "two weights or more and as many biases",
           weights=len(weights), biases=len(biases))  # fmt: skip
    expect_alike(x=x, weights=weights, biases=biases, outer=outer)
    channels = x.shape[1]
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        square = weight.dim() == 4 and weight.shape[2] == weight.shape[3] and weight.shape[2] % 2 == 1
        fits = square and weight.shape[1] == channels
        expect(fits, f"weights[{i}] is (G, {channels}, s, s) with odd s", weight=weight)
        expect(bias.shape == weight.shape[:1], f"biases[{i}] is (G,)", weight=weight, bias=bias)
        channels += weight.shape[0]
    expect(weights[-1].shape[0] == x.shape[1], "the last weight has as many outputs as x", x=x, last=weights[-1])
    expect(outer is None or outer.shape == x.shape, "outer has the shape of x", x=x, outer=outer)


@dense_block.alloc
def _(x, weights, biases, slope, gain, outer, outer_gain, float8):
    return empty_image(x, x.shape)


@dense_block.recipe
def _(x, weights, biases, slope, gain, outer, outer_gain, float8):
    # x stays where it is; only what the layers grow is in the workspace, each layer beside the one before
    n, _, h, w = x.shape
    starts = [0, *accumulate(weight.shape[0] for weight in weights[:-1])]
    steps = []
    for weight, bias, start in zip(weights, biases, starts):
        sources = (View("x"), View("grown", 0, start)) if start else (View("x"),)
        padding = weight.shape[-1] // 2
        if weight is not weights[-1]:
            act = "leaky" if slope else "relu"
            steps.append(Conv(sources, weight, bias, View("grown", start, weight.shape[0]), padding=padding,
                              act=act, slope=slope))  # fmt: skip
        else:
            steps.append(Conv(sources, weight, bias, View("out"), padding=padding, gain=gain, skip=View("x"),
                              outer=None if outer is None else View("outer"), outer_gain=outer_gain))  # fmt: skip
    inputs = {"x": x} if outer is None else {"x": x, "outer": outer}
    return Recipe(inputs, {"grown": (n, starts[-1], h, w), "out": tuple(x.shape)}, tuple(steps), float8=float8)


@dense_block.samples
def _(make):
    def layers(channels: int, growth: int, count: int, last: int):
        shapes = [(growth, channels + i * growth, 3, 3) for i in range(count)]
        shapes.append((channels, channels + count * growth, last, last))
        return [make(*s) for s in shapes], [make(s[0]) for s in shapes]

    yield make(1, 2, 4, 3), *layers(2, 2, 2, 1)
    yield make(2, 2, 3, 4), *layers(2, 1, 3, 3), 0.2, 0.2, make(2, 2, 3, 4), 0.3
    yield make(1, 64, 12, 13), *layers(64, 32, 4, 3), 0.2, 0.2
    yield make(1, 64, 7, 10), *layers(64, 32, 4, 3), 0.2, 0.2, make(1, 64, 7, 10), 0.2
    yield make(1, 64, 7, 8), *layers(64, 64, 8, 1)
    yield make(1, 64, 9, 8), *layers(64, 32, 6, 1)
