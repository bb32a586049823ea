"""The convolution of every network, with all that stands around it: the functional face of each device's engine.

    y = store( post( gain * act( pre(x1 + ... + xk concatenated) * W + b ) * scale[n, c] + skip_gain * skip ) )

Bound by arithmetic for 3x3 layers of 32 channels and more, by memory for 1x1 layers and the 3-channel ends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr.op import empty_image, expect, expect_alike, is_channels_last, op
from fastsr.recipes import Conv, Recipe, View

ACTIVATIONS = ("none", "relu", "leaky", "prelu")


def activate(x: Tensor, act: str, slope: float, prelu: Tensor | None) -> Tensor:
    """The activation named `act`; `slope` belongs to "leaky", `prelu` (1 or C slopes) to "prelu"."""
    if act == "relu":
        return F.relu(x)
    if act == "leaky":
        return F.leaky_relu(x, slope)
    if act == "prelu":
        assert prelu is not None
        return F.prelu(x, prelu)
    return x


def depth_to_space(x: Tensor, r: int, order: str) -> Tensor:
    """(N, C*r*r, H, W) -> (N, C, H*r, W*r). The input channel of output (c, y, x) within a cell is c*r*r + y*r + x in
    the order "torch" (PixelShuffle) and (y*r + x)*C + c in the order "tf" (TensorFlow's depth_to_space)."""
    if order == "torch":
        return F.pixel_shuffle(x, r)
    n, c, h, w = x.shape
    return x.reshape(n, r, r, c // (r * r), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // (r * r), h * r, w * r)


@op
def conv_act(
    inputs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    transposed: bool = False,
    pre_scale: Tensor | None = None,
    pre_shift: Tensor | None = None,
    pre_relu: bool = False,
    upsample: int = 1,
    act: str = "none",
    slope: float = 0.0,
    prelu: Tensor | None = None,
    gain: float = 1.0,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
    skip_gain: float = 1.0,
    post_relu: bool = False,
    shuffle: int = 1,
    shuffle_order: str = "torch",
) -> Tensor:
    """Convolution of concatenated inputs with a prologue and an epilogue.

    inputs: one or more (N, Ci, H, W) of one dtype and size, read as their concatenation over channels.
    weight: (Cout, C/groups, k, k), or (C, Cout/groups, k, k) if `transposed`. bias: (Cout,).
    Prologue, in this order: `* pre_scale[c] + pre_shift[c]`, ReLU if `pre_relu`, nearest upsampling by `upsample`;
        then zero padding by `padding`, so the padding is exactly zero whatever the prologue makes of zero.
    act: "none", "relu", "leaky" (slope) or "prelu" (`prelu`: 1 or Cout slopes), on the convolution plus bias.
    gain, scale (N, Cout), skip (the shape of the convolution's output) and post_relu follow as in the formula above.
    shuffle: r > 1 stores the result depth-to-space, (N, Cout/r^2, H*r, W*r), in `shuffle_order` "torch" or "tf".
    Returns a tensor with the layout of the first input, or channels-last if the weight is. Raises ValueError.
    """
    x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)
    if pre_scale is not None:
        x = x * pre_scale[:, None, None]
    if pre_shift is not None:
        x = x + pre_shift[:, None, None]
    if pre_relu:
        x = F.relu(x)
    if upsample > 1:
        x = F.interpolate(x, scale_factor=upsample, mode="nearest")
    convolve = F.conv_transpose2d if transposed else F.conv2d
    y = convolve(x, weight, bias, stride=stride, padding=padding, groups=groups)
    y = activate(y, act, slope, prelu)
    if gain != 1.0:
        y = y * gain
    if scale is not None:
        y = y * scale[:, :, None, None]
    if skip is not None:
        y = y + (skip if skip_gain == 1.0 else skip * skip_gain)
    if post_relu:
        y = F.relu(y)
    return depth_to_space(y, shuffle, shuffle_order) if shuffle > 1 else y


def conv_shape(
    inputs: list[Tensor], weight: Tensor, stride: int, padding: int, groups: int, transposed: bool, upsample: int
) -> tuple[int, int, int, int]:
    """(N, Cout, H, W) of the convolution, before a shuffle."""
    n, _, h, w = inputs[0].shape
    k = weight.shape[2:]
    h, w = h * upsample, w * upsample
    if transposed:
        c = weight.shape[1] * groups
        h, w = ((s - 1) * stride - 2 * padding + k[i] for i, s in enumerate((h, w)))
    else:
        c = weight.shape[0]
        h, w = ((s + 2 * padding - k[i]) // stride + 1 for i, s in enumerate((h, w)))
    return n, c, h, w


@conv_act.check
def _(
    inputs, weight, bias, stride, padding, groups, transposed, pre_scale, pre_shift, pre_relu, upsample, act, slope,
    prelu, gain, scale, skip, skip_gain, post_relu, shuffle, shuffle_order,
):  # fmt: skip
    expect(len(inputs) > 0, "inputs holds at least one tensor", inputs=inputs)
    first = inputs[0]
    expect(all(x.dim() == 4 for x in inputs), "inputs are (N, C, H, W), an image alone as x[None]", inputs=inputs)
    same = all(x.shape[0] == first.shape[0] and x.shape[2:] == first.shape[2:] for x in inputs)
    expect(same, "inputs of one N, H and W", inputs=inputs)
    expect_alike(inputs=inputs, weight=weight, bias=bias, pre_scale=pre_scale, pre_shift=pre_shift, prelu=prelu,
                 scale=scale, skip=skip)  # fmt: skip
    expect(
        weight.dim() == 4, "weight is (Cout, C/groups, k, k), or (C, Cout/groups, k, k) if transposed", weight=weight
    )
    expect(stride >= 1 and padding >= 0 and groups >= 1, "stride, groups >= 1 and padding >= 0",
           stride=stride, padding=padding, groups=groups)  # fmt: skip
    c = sum(x.shape[1] for x in inputs)
    fitting = weight.shape[0] if transposed else weight.shape[1] * groups
    expect(c == fitting, f"inputs of {fitting} channels together, as weight and groups say",
           inputs=inputs, weight=weight, groups=groups)  # fmt: skip
    expect(c % groups == 0, "a number of channels that is a multiple of groups", weight=weight, groups=groups)
    shape = conv_shape(inputs, weight, stride, padding, groups, transposed, upsample)
    expect(min(shape) > 0, "an output of at least one pixel", inputs=inputs, weight=weight, padding=padding)
    out = shape[1]
    expect(out % groups == 0, "Cout is a multiple of groups", weight=weight, groups=groups)
    expect(bias is None or bias.shape == (out,), "bias is (Cout,)", bias=bias, weight=weight)
    for name, t in (("pre_scale", pre_scale), ("pre_shift", pre_shift)):
        expect(t is None or t.shape == (c,), f"{name} has one value per input channel", **{name: t}, inputs=inputs)
    expect(act in ACTIVATIONS, f"act is one of {', '.join(ACTIVATIONS)}", act=act)
    expect((act == "prelu") == (prelu is not None), 'prelu goes with act="prelu"', act=act, prelu=prelu)
    expect(prelu is None or prelu.shape in ((1,), (out,)), "prelu is (1,) or (Cout,)", prelu=prelu, weight=weight)
    expect(scale is None or scale.shape == (shape[0], out), "scale is (N, Cout)", scale=scale, weight=weight)
    expect(skip is None or skip.shape == shape, f"skip is {list(shape)}", skip=skip)
    expect(upsample >= 1 and shuffle >= 1, "upsample and shuffle are at least 1", upsample=upsample, shuffle=shuffle)
    expect(shuffle == 1 or skip is None, "skip and shuffle are not used together", skip=skip, shuffle=shuffle)
    expect(out % (shuffle * shuffle) == 0, "Cout is a multiple of shuffle^2", weight=weight, shuffle=shuffle)
    expect(shuffle_order in ("torch", "tf"), 'shuffle_order is "torch" or "tf"', shuffle_order=shuffle_order)


@conv_act.alloc
def _(
    inputs, weight, bias, stride, padding, groups, transposed, pre_scale, pre_shift, pre_relu, upsample, act, slope,
    prelu, gain, scale, skip, skip_gain, post_relu, shuffle, shuffle_order,
):  # fmt: skip
    n, c, h, w = conv_shape(inputs, weight, stride, padding, groups, transposed, upsample)
    shape = (n, c // (shuffle * shuffle), h * shuffle, w * shuffle)
    return empty_image(inputs[0], shape, channels_last=is_channels_last(inputs[0]) or is_channels_last(weight))


@conv_act.recipe
def _(
    inputs, weight, bias, stride, padding, groups, transposed, pre_scale, pre_shift, pre_relu, upsample, act, slope,
    prelu, gain, scale, skip, skip_gain, post_relu, shuffle, shuffle_order,
):  # fmt: skip
    n, c, h, w = conv_shape(inputs, weight, stride, padding, groups, transposed, upsample)
    images = {f"x{i}": x for i, x in enumerate(inputs)}
    step = Conv(
        tuple(View(name) for name in images), weight, bias, View("out"), stride, padding, groups, transposed,
        pre_scale, pre_shift, pre_relu, upsample, act, slope, prelu, gain, None if scale is None else "scale",
        None if skip is None else View("skip"), skip_gain, post_relu, shuffle, shuffle_order,
    )  # fmt: skip
    given = {name: t for name, t in (("scale", scale), ("skip", skip)) if t is not None}
    return Recipe(images | given, {"out": (n, c // (shuffle * shuffle), h * shuffle, w * shuffle)}, (step,))


def _defaults(**changed: object) -> tuple[object, ...]:
    """Everything after `weight`, in order, with the arguments named here changed."""
    return conv_act._bind(([], None), changed)[2:]


@conv_act.samples
def _(make):
    # smallest first: gradcheck takes the first ones
    yield [make(1, 2, 4, 5)], make(3, 2, 3, 3), *_defaults(bias=make(3), padding=1, act="leaky", slope=0.2)
    yield (
        [make(2, 3, 4, 3), make(2, 1, 4, 3)],
        make(4, 2, 3, 3),
        *_defaults(
            bias=make(4), padding=1, groups=2, pre_scale=make(4), pre_shift=make(4), pre_relu=True, act="prelu",
            prelu=make(4), gain=0.3, scale=make(2, 4), skip=make(2, 4, 4, 3), skip_gain=0.5, post_relu=True,
        ),
    )  # fmt: skip
    yield [make(1, 2, 3, 4)], make(8, 2, 1, 1), *_defaults(bias=make(8), act="relu", shuffle=2)
    yield [make(1, 2, 3, 4)], make(8, 2, 3, 3), *_defaults(padding=1, shuffle=2, shuffle_order="tf")
    yield [make(1, 2, 3, 4)], make(2, 2, 3, 3), *_defaults(padding=1, upsample=2, act="prelu", prelu=make(1))
    yield [make(1, 2, 3, 2)], make(2, 3, 6, 6), *_defaults(bias=make(3), stride=2, padding=2, transposed=True)
    yield (
        [make(1, 3, 2, 3), make(1, 1, 2, 3)],
        make(4, 2, 4, 4),
        *_defaults(stride=2, padding=1, groups=2, transposed=True, pre_shift=make(4), skip=make(1, 4, 4, 6)),
    )
    yield [make(1, 2, 8, 4)], make(3, 2, 8, 8), *_defaults(bias=make(3), stride=4, padding=2)
    yield [make(1, 1, 3, 4)], make(1, 2, 17, 17), *_defaults(bias=make(2), stride=3, padding=8, transposed=True)
    # what the networks run
    yield [make(1, 64, 48, 48)], make(64, 64, 3, 3), *_defaults(bias=make(64), padding=1, act="relu")
    yield [make(1, 64, 24, 25)], make(64, 16, 3, 3), *_defaults(bias=make(64), padding=1, groups=4, act="relu")
    yield [make(1, 64, 24, 25)] * 3, make(64, 192, 1, 1), *_defaults(bias=make(64), act="relu")
    yield [make(1, 64, 24, 25)], make(256, 64, 3, 3), *_defaults(bias=make(256), padding=1, act="relu", shuffle=2)
    yield [make(1, 64, 24, 25)], make(64, 64, 3, 3), *_defaults(bias=make(64), padding=1, upsample=2, act="relu")
    yield [make(1, 48, 17, 16)], make(32, 12, 3, 3), *_defaults(padding=1, groups=4, act="leaky", slope=0.05)
    yield [make(1, 64, 12, 12)], make(64, 64, 8, 8), *_defaults(bias=make(64), stride=4, padding=2, transposed=True)
    yield [make(1, 3, 40, 41)], make(64, 3, 9, 9), *_defaults(bias=make(64), padding=4)
    yield [make(1, 64, 48, 48)], make(3, 64, 3, 3), *_defaults(bias=make(3), padding=1)
