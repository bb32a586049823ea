"""DBPN's up-projection unit, plain and dense, and what it shares with its mirror. Bound by arithmetic.

A unit enlarges its input, shrinks the result again, and enlarges what that got wrong to correct the first result. The
subtraction and the addition are epilogues of the second and third convolution.
M. Haris, G. Shakhnarovich, N. Ukita, "Deep Back-Projection Networks for Super-Resolution", CVPR 2018, section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr.op import empty_image, expect, expect_alike, op
from fastsr.ops.conv_act import conv_shape
from fastsr.recipes import Conv, Recipe, View

Layer = tuple[Tensor, Tensor, Tensor]  # weight, bias and PReLU slopes of a convolution
Bottleneck = tuple[Tensor | None, Tensor | None, Tensor | None]


@op
def up_projection(
    inputs: list[Tensor],
    bottleneck_weight: Tensor | None,
    bottleneck_bias: Tensor | None,
    bottleneck_slope: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    slope1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    slope2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    slope3: Tensor,
    stride: int,
    padding: int,
) -> Tensor:
    """high + deconv3(conv2(high) - low) where high = deconv1(low), a PReLU behind each convolution.

    inputs: (N, Ci, H, W) each. low is the PReLU of the bottleneck, a 1x1 convolution of their concatenation; without
    one there is a single input, which is low. Layers 1 and 3 are transposed convolutions of `stride`, layer 2 is a
    convolution of `stride`; all three have (C, C, k, k) weights, (C,) biases, `padding`, and (1,) or (C,) slopes.
    Returns (N, C, (H - 1) * stride - 2 * padding + k, ...), r times the size for k = r + 4, stride r, padding 2, in
    the layout of the first input. Raises ValueError.
    """
    low = squeeze(inputs, (bottleneck_weight, bottleneck_bias, bottleneck_slope))
    high = F.prelu(F.conv_transpose2d(low, weight1, bias1, stride, padding), slope1)
    error = F.prelu(F.conv2d(high, weight2, bias2, stride, padding), slope2) - low
    return high + F.prelu(F.conv_transpose2d(error, weight3, bias3, stride, padding), slope3)


def squeeze(inputs: list[Tensor], bottleneck: Bottleneck) -> Tensor:
    """What a unit projects: its inputs through the bottleneck, or its only input."""
    weight, bias, slope = bottleneck
    if weight is None or slope is None:
        return inputs[0]
    return F.prelu(F.conv2d(torch.cat(inputs, 1), weight, bias), slope)


def expect_unit(
    inputs: list[Tensor], bottleneck: Bottleneck, layers: tuple[Layer, ...], stride: int, padding: int
) -> None:
    """Checks the arguments of a unit of either direction."""
    expect(len(inputs) > 0, "inputs holds at least one tensor", inputs=inputs)
    first, weight = inputs[0], layers[0][0]
    same = all(x.dim() == 4 and x.shape[0] == first.shape[0] and x.shape[2:] == first.shape[2:] for x in inputs)
    expect(same, "inputs are (N, C, H, W) and agree in all but C", inputs=inputs)
    square = weight.dim() == 4 and weight.shape[0] == weight.shape[1] and weight.shape[2] == weight.shape[3]
    expect(square, "weight1 is (C, C, k, k)", weight1=weight)
    c = weight.shape[0]
    for number, (w, b, slope) in enumerate(layers, 1):
        expect(w.shape == weight.shape, f"weight{number} has the shape of weight1", weight1=weight, weight=w)
        expect(b.shape == (c,), f"bias{number} is ({c},)", bias=b)
        expect(slope.shape in ((1,), (c,)), f"slope{number} is (1,) or ({c},)", slope=slope)
    together = sum(x.shape[1] for x in inputs)
    given = [t is not None for t in bottleneck]
    complete = all(given) or not any(given)
    expect(complete, "weight, bias and slope of a bottleneck, or none of the three", bottleneck=bottleneck)
    if all(given):
        w, b, slope = bottleneck
        expect(w.shape == (c, together, 1, 1), f"bottleneck_weight is ({c}, {together}, 1, 1)", weight=w, inputs=inputs)
        expect(b.shape == (c,), f"bottleneck_bias is ({c},)", bias=b)
        expect(slope.shape in ((1,), (c,)), f"bottleneck_slope is (1,) or ({c},)", slope=slope)
    else:
        expect(len(inputs) == 1 and together == c, f"one input of {c} channels, or a bottleneck", inputs=inputs)
    expect_alike(inputs=inputs, bottleneck=bottleneck, layer1=layers[0], layer2=layers[1], layer3=layers[2])
    expect(stride >= 1 and padding >= 0, "stride >= 1 and padding >= 0", stride=stride, padding=padding)


def unit_shape(
    inputs: list[Tensor], weight: Tensor, stride: int, padding: int, transposed: bool
) -> tuple[int, int, int, int]:
    """(N, C, H, W) after the first layer, which is the result's too."""
    return conv_shape(inputs, weight, stride, padding, 1, transposed, 1)


def unit_recipe(
    inputs: list[Tensor], bottleneck: Bottleneck, layers: tuple[Layer, ...], stride: int, padding: int, transposed: bool
) -> Recipe:
    """A unit as convolutions; `transposed` says whether layers 1 and 3 are, or layer 2."""
    images = {f"x{i}": x for i, x in enumerate(inputs)}
    workspace = {name: unit_shape(inputs, layers[0][0], stride, padding, transposed) for name in ("first", "out")}
    workspace["error"] = (inputs[0].shape[0], layers[0][0].shape[0], *inputs[0].shape[2:])
    steps: list[Conv] = []
    start = View("x0")
    weight, bias, slope = bottleneck
    if weight is not None:
        start = View("low")
        workspace["low"] = workspace["error"]
        steps.append(Conv(tuple(View(name) for name in images), weight, bias, start, act="prelu", prelu=slope))
    routes = (("first", start, transposed, None, 1.0), ("error", View("first"), not transposed, start, -1.0),
              ("out", View("error"), transposed, View("first"), 1.0))  # fmt: skip
    for (weight, bias, slope), (store, source, turned, skip, sign) in zip(layers, routes, strict=True):
        steps.append(Conv((source,), weight, bias, View(store), stride=stride, padding=padding, transposed=turned,
                          act="prelu", prelu=slope, skip=skip, skip_gain=sign))  # fmt: skip
    return Recipe(images, workspace, tuple(steps))


@up_projection.check
def _(inputs, bw, bb, bs, w1, b1, s1, w2, b2, s2, w3, b3, s3, stride, padding):
    expect_unit(inputs, (bw, bb, bs), ((w1, b1, s1), (w2, b2, s2), (w3, b3, s3)), stride, padding)
    shape = unit_shape(inputs, w1, stride, padding, transposed=True)
    expect(min(shape) > 0, "an output of at least one pixel", inputs=inputs, weight1=w1, padding=padding)


@up_projection.alloc
def _(inputs, bw, bb, bs, w1, b1, s1, w2, b2, s2, w3, b3, s3, stride, padding):
    return empty_image(inputs[0], unit_shape(inputs, w1, stride, padding, transposed=True))


@up_projection.recipe
def _(inputs, bw, bb, bs, w1, b1, s1, w2, b2, s2, w3, b3, s3, stride, padding):
    layers = ((w1, b1, s1), (w2, b2, s2), (w3, b3, s3))
    return unit_recipe(inputs, (bw, bb, bs), layers, stride, padding, transposed=True)


def make_layers(make, c: int, k: int, slopes: int) -> list[Tensor]:
    """Three random layers, for samples."""
    return [t for _ in range(3) for t in (make(c, c, k, k), make(c), make(slopes))]


@up_projection.samples
def _(make):
    # smallest first: gradcheck takes the first ones; in DBPN r = 2, 4, 8 go with k = 6, 8, 12
    yield [make(1, 1, 2, 3)], None, None, None, *make_layers(make, 1, 6, 1), 2, 2
    yield ([make(1, 2, 2, 1), make(1, 1, 2, 1)], make(2, 3, 1, 1), make(2), make(2), *make_layers(make, 2, 6, 2), 2, 2)
    yield [make(2, 1, 1, 2)], None, None, None, *make_layers(make, 1, 12, 1), 8, 2
    yield [make(1, 64, 7, 8)], None, None, None, *make_layers(make, 64, 8, 1), 4, 2
    yield ([make(1, 64, 8, 7)] * 3, make(64, 192, 1, 1), make(64), make(1), *make_layers(make, 64, 6, 1), 2, 2)
