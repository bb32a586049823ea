"""Spatial feature transform: features scaled and shifted per pixel by maps made from a condition. Bound by memory.

X. Wang, K. Yu, C. Dong, C. C. Loy, "Recovering Realistic Texture in Image Super-resolution by Deep Spatial Feature
Transform" (SFTGAN), CVPR 2018.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastsr.op import empty_image, expect, expect_alike, op
from fastsr.recipes import Conv, Recipe, View


@op
def sft_layer(
    x: Tensor, condition: Tensor, scale: list[Tensor], shift: list[Tensor], slope: float, plus_one: bool = True
) -> Tensor:
    """x * (1 + s) + t, or x * s + t without plus_one, for maps s and t made from the condition.

    x: (N, C, H, W). condition: (N, K, H, W). scale, shift: the branch of s and of t, each [weight, bias, weight, bias]
    of two 1x1 convolutions, K -> any -> C, with a leaky ReLU of `slope` between them. The result is like x. Raises
    ValueError.
    """
    s, t = branch(condition, scale, slope), branch(condition, shift, slope)
    return x * (1 + s if plus_one else s) + t


def branch(condition: Tensor, weights: list[Tensor], slope: float) -> Tensor:
    """The (N, C, H, W) map that one branch makes of the condition."""
    weight0, bias0, weight1, bias1 = weights
    return F.conv2d(F.leaky_relu(F.conv2d(condition, weight0, bias0), slope), weight1, bias1)


def expect_branches(x: Tensor, condition: Tensor, channels: int, **branches: list[Tensor]) -> None:
    """Checks x, the condition and the branches that make maps of so many channels, named as the arguments are."""
    images = x.dim() == 4 and condition.dim() == 4 and x.shape[0] == condition.shape[0]
    expect(images and x.shape[2:] == condition.shape[2:], "x is (N, C, H, W) and condition (N, K, H, W)",
           x=x, condition=condition)  # fmt: skip
    expect_alike(x=x, condition=condition, **branches)
    for name, weights in branches.items():
        expect(len(weights) == 4, f"{name} is [weight, bias, weight, bias]", **{name: weights})
        hidden = weights[0].shape[0]
        shapes = [(hidden, condition.shape[1], 1, 1), (hidden,), (channels, hidden, 1, 1), (channels,)]
        expect([tuple(t.shape) for t in weights] == shapes, f"{name} has the shapes {shapes}", **{name: weights})


def map_steps(name: str, weights: list[Tensor], slope: float, plus_one: bool = False) -> tuple[Conv, Conv]:
    """The two steps that make a branch's map from the buffer "condition"; they fill the buffers "<name>_hidden" and
    "<name>". The 1 of a scale map is part of the bias, which is exact and spares every reader an addition."""
    weight0, bias0, weight1, bias1 = weights
    if plus_one and not bias1.is_meta:  # where torch would import its compiler to add, 140 MB and a second
        bias1 = bias1 + 1
    return (
        Conv((View("condition"),), weight0, bias0, View(f"{name}_hidden"), act="leaky", slope=slope),
        Conv((View(f"{name}_hidden"),), weight1, bias1, View(name)),
    )


def map_shapes(name: str, weights: list[Tensor], x: Tensor) -> dict[str, tuple[int, ...]]:
    """The workspace of `map_steps`."""
    n, _, h, w = x.shape
    return {f"{name}_hidden": (n, weights[0].shape[0], h, w), name: (n, weights[2].shape[0], h, w)}


@sft_layer.check
def _(x, condition, scale, shift, slope, plus_one):
    expect_branches(x, condition, x.shape[1], scale=scale, shift=shift)


@sft_layer.alloc
def _(x, condition, scale, shift, slope, plus_one):
    return empty_image(x, x.shape)


@sft_layer.recipe
def _(x, condition, scale, shift, slope, plus_one):
    shapes = map_shapes("shift", shift, x) | map_shapes("out", scale, x)
    return Recipe({"x": x, "condition": condition}, shapes, layer_steps(scale, shift, slope, plus_one, "out"))


def layer_steps(
    scale: list[Tensor], shift: list[Tensor], slope: float, plus_one: bool, store: str, relu: bool = False
) -> tuple[Conv, ...]:
    """A layer that reads the buffer "x" and has no convolution before it: the last 1x1 convolution of the scale branch
    takes its part, as its result times x plus shift is the layer. Fills "shift" and `store`, and their "_hidden"."""
    hidden, last = map_steps(store, scale, slope, plus_one)
    last = Conv(last.sources, last.weight, last.bias, last.store, modulate=(View("x"), View("shift")), post_relu=relu)
    return *map_steps("shift", shift, slope), hidden, last


@sft_layer.samples
def _(make):
    def branch_of(k, hidden, c):
        return [make(hidden, k, 1, 1), make(hidden), make(c, hidden, 1, 1), make(c)]

    yield make(1, 2, 3, 4), make(1, 3, 3, 4), branch_of(3, 2, 2), branch_of(3, 4, 2), 0.1
    yield make(2, 3, 4, 3), make(2, 2, 4, 3), branch_of(2, 3, 3), branch_of(2, 3, 3), 0.01, False
    yield make(1, 64, 24, 25), make(1, 32, 24, 25), branch_of(32, 32, 64), branch_of(32, 32, 64), 0.1
