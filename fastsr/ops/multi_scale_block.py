"""The multi-scale residual block of MSRN. Bound by arithmetic: its 5x5 convolutions are most of the network.

J. Li, F. Fang, K. Mei, G. Zhang, "Multi-scale Residual Network for Image Super-Resolution", ECCV 2018, figure 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr.op import empty_image, expect, expect_alike, op
from fastsr.recipes import Conv, Recipe, View


@op
def multi_scale_block(
    x: Tensor,
    small1: Tensor,
    small_bias1: Tensor | None,
    small2: Tensor,
    small_bias2: Tensor | None,
    large1: Tensor,
    large_bias1: Tensor | None,
    large2: Tensor,
    large_bias2: Tensor | None,
    fuse: Tensor,
    fuse_bias: Tensor | None,
) -> Tensor:
    """x + fuse([s2, l2]), s2 = relu(small2 * [s1, l1]), l2 = relu(large2 * [s1, l1]), where s1 = relu(small1 * x),
    l1 = relu(large1 * x) and [a, b] is concatenation over channels. All convolutions keep the size.

    x: (N, C, H, W). small1: (F, C, 3, 3), large1: (F, C, 5, 5), small2: (G, 2F, 3, 3), large2: (G, 2F, 5, 5),
    fuse: (C, 2G, 1, 1), each with its bias or None; other odd kernels work too. The result has the shape and layout
    of x. Raises ValueError.
    """
    h = [F.relu(_same(x, small1, small_bias1)), F.relu(_same(x, large1, large_bias1))]
    h = torch.cat(h, 1)
    h = [F.relu(_same(h, small2, small_bias2)), F.relu(_same(h, large2, large_bias2))]
    return x + _same(torch.cat(h, 1), fuse, fuse_bias)


def _same(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution that keeps the size."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


@multi_scale_block.check
def _(x, small1, small_bias1, small2, small_bias2, large1, large_bias1, large2, large_bias2, fuse, fuse_bias):
    expect(x.dim() == 4, "x is (N, C, H, W)", x=x)
    c = x.shape[1]
    middle = small1.shape[0] + large1.shape[0]
    last = small2.shape[0] + large2.shape[0]
    for name, weight, bias, channels in (
        ("small1", small1, small_bias1, c),
        ("large1", large1, large_bias1, c),
        ("small2", small2, small_bias2, middle),
        ("large2", large2, large_bias2, middle),
        ("fuse", fuse, fuse_bias, last),
    ):
        k = weight.shape[-1]
        fits = weight.shape[1:] == (channels, k, k) and k % 2 == 1
        expect(fits, f"{name} is (Cout, {channels}, k, k) with odd k", **{name: weight})
        expect(bias is None or bias.shape == weight.shape[:1], f"{name} has a (Cout,) bias or None", bias=bias)
        expect_alike(x=x, **{name: weight}, bias=bias)
    expect(fuse.shape[0] == c, "the block returns as many channels as it takes", x=x, fuse=fuse)


@multi_scale_block.alloc
def _(x, small1, small_bias1, small2, small_bias2, large1, large_bias1, large2, large_bias2, fuse, fuse_bias):
    return empty_image(x, x.shape)


@multi_scale_block.recipe
def _(x, small1, small_bias1, small2, small_bias2, large1, large_bias1, large2, large_bias2, fuse, fuse_bias):
    n, _, h, w = x.shape

    def conv(source, weight, bias, store, start):  # each pair of branches stores into the two halves of one buffer
        view = View(store, start, weight.shape[0])
        return Conv((View(source),), weight, bias, view, padding=weight.shape[-1] // 2, act="relu")

    f, g = small1.shape[0], small2.shape[0]
    steps = (
        conv("x", small1, small_bias1, "first", 0),
        conv("x", large1, large_bias1, "first", f),
        conv("first", small2, small_bias2, "second", 0),
        conv("first", large2, large_bias2, "second", g),
        Conv((View("second"),), fuse, fuse_bias, View("out"), padding=fuse.shape[-1] // 2, skip=View("x")),
    )
    first, second = f + large1.shape[0], g + large2.shape[0]
    return Recipe({"x": x}, {"first": (n, first, h, w), "second": (n, second, h, w), "out": tuple(x.shape)}, steps)


@multi_scale_block.samples
def _(make):
    def weights(c, f, g, bias=True):
        for out, into, k in ((f, c, 3), (g, 2 * f, 3), (f, c, 5), (g, 2 * f, 5), (c, 2 * g, 1)):
            yield make(out, into, k, k)
            yield make(out) if bias else None

    yield make(2, 2, 3, 4), *weights(2, 2, 3)
    yield make(1, 1, 1, 1), *weights(1, 1, 2, bias=False)
    yield make(1, 64, 12, 13), *weights(64, 64, 128)
