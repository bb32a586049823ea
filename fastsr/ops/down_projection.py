"""DBPN's down-projection unit, plain and dense: `up_projection` with the directions exchanged. Bound by arithmetic.

M. Haris, G. Shakhnarovich, N. Ukita, "Deep Back-Projection Networks for Super-Resolution", CVPR 2018, section 3.2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastsr.op import empty_image, expect, op
from fastsr.ops.up_projection import expect_unit, make_layers, squeeze, unit_recipe, unit_shape


@op
def down_projection(
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
    """low + conv3(deconv2(low) - high) where low = conv1(high), a PReLU behind each convolution.

    inputs: (N, Ci, H, W) each. high is the PReLU of the bottleneck, a 1x1 convolution of their concatenation; without
    one there is a single input, which is high. Layers 1 and 3 are convolutions of `stride`, layer 2 is a transposed
    convolution of `stride`; all three have (C, C, k, k) weights, (C,) biases, `padding`, and (1,) or (C,) slopes.
    H and W are such that layer 2 returns to them: multiples of r for k = r + 4, stride r, padding 2.
    Returns (N, C, (H + 2 * padding - k) / stride + 1, ...) in the layout of the first input. Raises ValueError.
    """
    high = squeeze(inputs, (bottleneck_weight, bottleneck_bias, bottleneck_slope))
    low = F.prelu(F.conv2d(high, weight1, bias1, stride, padding), slope1)
    error = F.prelu(F.conv_transpose2d(low, weight2, bias2, stride, padding), slope2) - high
    return low + F.prelu(F.conv2d(error, weight3, bias3, stride, padding), slope3)


@down_projection.check
def _(inputs, bw, bb, bs, w1, b1, s1, w2, b2, s2, w3, b3, s3, stride, padding):
    expect_unit(inputs, (bw, bb, bs), ((w1, b1, s1), (w2, b2, s2), (w3, b3, s3)), stride, padding)
    shape = unit_shape(inputs, w1, stride, padding, transposed=False)
    expect(min(shape) > 0, "an output of at least one pixel", inputs=inputs, weight1=w1, padding=padding)
    k = w1.shape[2]
    rest = [(size + 2 * padding - k) % stride for size in inputs[0].shape[2:]]
    expect(not any(rest), f"H and W for which H + {2 * padding} - {k} is a multiple of the stride {stride}, since the "
           "error is taken at the input's size; pad or crop the input", inputs=inputs)  # fmt: skip


@down_projection.alloc
def _(inputs, bw, bb, bs, w1, b1, s1, w2, b2, s2, w3, b3, s3, stride, padding):
    return empty_image(inputs[0], unit_shape(inputs, w1, stride, padding, transposed=False))


@down_projection.recipe
def _(inputs, bw, bb, bs, w1, b1, s1, w2, b2, s2, w3, b3, s3, stride, padding):
    layers = ((w1, b1, s1), (w2, b2, s2), (w3, b3, s3))
    return unit_recipe(inputs, (bw, bb, bs), layers, stride, padding, transposed=False)


@down_projection.samples
def _(make):
    # smallest first: gradcheck takes the first ones; in DBPN r = 2, 4, 8 go with k = 6, 8, 12
    yield [make(1, 1, 4, 6)], None, None, None, *make_layers(make, 1, 6, 1), 2, 2
    yield ([make(1, 2, 4, 2), make(1, 1, 4, 2)], make(2, 3, 1, 1), make(2), make(2), *make_layers(make, 2, 6, 2), 2, 2)
    yield [make(2, 1, 8, 16)], None, None, None, *make_layers(make, 1, 12, 1), 8, 2
    yield [make(1, 64, 28, 32)], None, None, None, *make_layers(make, 64, 8, 1), 4, 2
    yield ([make(1, 64, 16, 14)] * 3, make(64, 192, 1, 1), make(64), make(1), *make_layers(make, 64, 6, 1), 2, 2)
