"""Convolutions one after the other with one activation between: the end of CARN, ESRGAN, EnhanceNet, SRFeat and SFTGAN,
where features become a large image, and all of ZSSR. Bound by memory: the maps between are the network's largest."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastsr.op import empty_image, expect, expect_alike, is_channels_last, op
from fastsr.ops.conv_act import activate, depth_to_space
from fastsr.recipes import Conv, Recipe, View

ENLARGED = ("torch", "tf", "nearest")


@op
def conv_chain(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    factors: list[int],
    enlarged: str = "torch",
    act: str = "relu",
    slope: float = 0.0,
    skip: Tensor | None = None,
) -> Tensor:
    """The last of h_i = act(conv_i(h_(i-1))), h_0 = x, without its activation, plus skip. Convolutions keep the size.

    x: (N, C, H, W). weights: (Cout, Cin/groups, k, k) with odd k, two or more; their shapes tell the groups. biases:
        (Cout,) each, as many, or [].
    factors: one for each weight; where it is more than 1, the map is enlarged so many times, as `enlarged` says: by
        nearest upsampling in front of the convolution, or depth-to-space behind the activation, in the order "torch" or
        "tf" (see `conv_act`). The last is 1 unless nearest.
    act: "none", "relu" or "leaky" (slope). skip: like the result.
    Returns (N, Cout of the last, H * R, W * R), R the product of the factors, with the layout of x, or channels-last if
    one of the weights is. Raises ValueError.
    """
    for i, (weight, r) in enumerate(zip(weights, factors)):
        if enlarged == "nearest" and r > 1:
            x = F.interpolate(x, scale_factor=r, mode="nearest")
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(x, weight, biases[i] if biases else None, padding=weight.shape[-1] // 2, groups=groups)
        if i < len(weights) - 1:
            x = activate(x, act, slope, None)
        if enlarged != "nearest" and r > 1:
            x = depth_to_space(x, r, enlarged)
    return x if skip is None else x + skip


@conv_chain.check
def _(x, weights, biases, factors, enlarged, act, slope, skip):
    expect(x.dim() == 4, "x is (N, C, H, W)", x=x)
    expect(len(weights) >= 2 and len(factors) == len(weights), "two weights or more and as many factors",
           weights=weights, factors=factors)  # fmt: skip
    expect(enlarged in ENLARGED, f"enlarged is one of {', '.join(ENLARGED)}", enlarged=enlarged)
    expect(act in ("none", "relu", "leaky"), "act is none, relu or leaky", act=act)
    expect(min(factors) >= 1 and (enlarged == "nearest" or factors[-1] == 1), "factors of at least 1, no shuffle at "
           "the end", factors=factors)  # fmt: skip
    channels = x.shape[1]
    for i, (weight, r) in enumerate(zip(weights, factors)):
        square = weight.dim() == 4 and weight.shape[2] == weight.shape[3] and weight.shape[2] % 2 == 1
        fits = square and channels % weight.shape[1] == 0 and weight.shape[0] % (channels // weight.shape[1]) == 0
        expect(fits, f"weights[{i}] is (Cout, {channels}/groups, k, k) with odd k", weight=weight)
        channels = weight.shape[0] if enlarged == "nearest" else weight.shape[0] // (r * r)
        expect(enlarged == "nearest" or channels * r * r == weight.shape[0],
               f"weights[{i}] has a multiple of {r}^2 outputs", weight=weight)  # fmt: skip
    each = not biases or [b.shape for b in biases] == [w.shape[:1] for w in weights]
    expect(each, "no biases, or a (Cout,) for each weight", biases=biases, weights=weights)
    expect(skip is None or tuple(skip.shape) == _shapes(x, weights, factors, enlarged)[-1], "skip is like the result",
           skip=skip)  # fmt: skip
    expect_alike(x=x, weights=weights, biases=biases, skip=skip)


def _shapes(x: Tensor, weights: list[Tensor], factors: list[int], enlarged: str) -> list[tuple[int, int, int, int]]:
    """Of every map behind x."""
    n, _, h, w = x.shape
    shapes = []
    for weight, r in zip(weights, factors):
        h, w = h * r, w * r
        shapes.append((n, weight.shape[0] if enlarged == "nearest" else weight.shape[0] // (r * r), h, w))
    return shapes


@conv_chain.alloc
def _(x, weights, biases, factors, enlarged, act, slope, skip):
    channels_last = is_channels_last(x) or any(is_channels_last(w) for w in weights)
    return empty_image(x, _shapes(x, weights, factors, enlarged)[-1], channels_last=channels_last)


@conv_chain.recipe
def _(x, weights, biases, factors, enlarged, act, slope, skip):
    last, nearest = len(weights) - 1, enlarged == "nearest"
    names = ["x", *(f"h{i + 1}" for i in range(last)), "out"]
    shapes = [tuple(x.shape), *_shapes(x, weights, factors, enlarged)]
    steps = tuple(
        Conv((View(names[i]),), weight, biases[i] if biases else None, View(names[i + 1]),
             padding=weight.shape[-1] // 2, groups=shapes[i][1] // weight.shape[1], upsample=r if nearest else 1,
             act="none" if i == last else act, slope=slope,
             skip=View("skip") if i == last and skip is not None else None,
             shuffle=1 if nearest else r, shuffle_order="torch" if nearest else enlarged)
        for i, (weight, r) in enumerate(zip(weights, factors))
    )  # fmt: skip
    inputs = {"x": x} if skip is None else {"x": x, "skip": skip}
    return Recipe(inputs, dict(zip(names[1:], shapes[1:])), steps)


@conv_chain.samples
def _(make):
    def layers(*widths: int, bias: bool = True, groups: int = 1):
        pairs = list(zip(widths[::2], widths[1::2]))
        weights = [make(o, i // (1 if n == len(pairs) - 1 else groups), 3, 3) for n, (i, o) in enumerate(pairs)]
        return weights, [make(w.shape[0]) for w in weights] if bias else []

    yield make(1, 2, 3, 4), *layers(2, 8, 2, 3), [2, 1], "torch"
    yield make(2, 2, 2, 3), *layers(2, 2, 2, 3, bias=False), [2, 1], "nearest", "leaky", 0.2, make(2, 3, 4, 6)
    yield make(1, 2, 3, 2), *layers(2, 4, 4, 8, 2, 1), [1, 2, 1], "tf", "none"
    yield make(1, 4, 2, 2), *layers(4, 8, 2, 3, groups=2), [2, 1]
    yield make(1, 64, 12, 13), *layers(64, 256, 64, 256, 64, 3), [2, 2, 1], "torch"
    yield make(1, 64, 9, 10), *layers(64, 64, 64, 64, 64, 64, 64, 3), [2, 2, 1, 1], "nearest", "leaky", 0.2
