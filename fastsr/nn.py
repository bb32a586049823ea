"""Layers shared by the networks, thin over the operators.

A layer holds parameters under the authors' names and passes them to one operator; what is computed stands in
`fastsr/ops`. `ConvAct` and its kin subclass torch's own convolutions, so keys, initialisation and repr are torch's.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from fastsr.ops import conv_act, conv_chain, linear_tail


class ConvAct(nn.Conv2d):
    """A convolution with the prologue and epilogue of `fastsr.ops.conv_act`; keys `weight`, `bias`.

    padding: None is k // 2, which keeps the size at stride 1. act: "none", "relu", "leaky" (with `slope`).
    upsample: nearest upsampling in front. shuffle: depth-to-space of the result, in `shuffle_order`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        bias: bool = True,
        act: str = "none",
        slope: float = 0.0,
        upsample: int = 1,
        shuffle: int = 1,
        shuffle_order: str = "torch",
    ) -> None:
        padding = kernel_size // 2 if padding is None else padding
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
        self.act, self.slope = act, slope
        self.upsample, self.shuffle, self.shuffle_order = upsample, shuffle, shuffle_order

    def forward(  # type: ignore[override]
        self,
        *inputs: Tensor,
        pre_scale: Tensor | None = None,
        pre_shift: Tensor | None = None,
        pre_relu: bool = False,
        prelu: Tensor | None = None,
        gain: float = 1.0,
        scale: Tensor | None = None,
        skip: Tensor | None = None,
        skip_gain: float = 1.0,
        post_relu: bool = False,
    ) -> Tensor:
        """inputs: (N, Ci, H, W) each, read as their concatenation. The rest as in `conv_act`."""
        return conv_act(
            list(inputs), self.weight, self.bias, int(self.stride[0]), int(self.padding[0]), self.groups,
            pre_scale=pre_scale, pre_shift=pre_shift, pre_relu=pre_relu, upsample=self.upsample,
            act=self.act if prelu is None else "prelu", slope=self.slope, prelu=prelu, gain=gain, scale=scale,
            skip=skip, skip_gain=skip_gain, post_relu=post_relu,
            shuffle=self.shuffle, shuffle_order=self.shuffle_order,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """torch's own line, and what of the prologue and epilogue is in use."""
        extra = {"act": (self.act, "none"), "upsample": (self.upsample, 1), "shuffle": (self.shuffle, 1)}
        return super().extra_repr() + "".join(f", {k}={v}" for k, (v, default) in extra.items() if v != default)


class MeanShift(ConvAct):
    """A frozen 1x1 convolution that adds `sign * value_range * mean` to each colour; weights are the identity.

    It is a convolution because the authors' files hold it as one; its weights are loaded like any others.
    """

    def __init__(self, mean: tuple[float, ...], sign: int, value_range: float = 1.0) -> None:
        channels = len(mean)
        super().__init__(channels, channels, 1)
        nn.init.dirac_(self.weight)
        # Rounded where the authors' is. By NumPy, because on the meta device torch imports its compiler to multiply.
        bias = np.float32(sign * value_range) * np.array(mean, np.float32)
        self.bias = nn.Parameter(torch.tensor(bias.tolist()))
        self.requires_grad_(False)


def numbered(layers: dict[int, nn.Module]) -> nn.ModuleDict:
    """Layers under the indices they have in the authors' `nn.Sequential`, whose activations hold no parameters here."""
    return nn.ModuleDict({str(index): layer for index, layer in layers.items()})


def chain(layers: nn.ModuleDict, x: Tensor) -> Tensor:
    """Applies the layers one after the other."""
    for layer in layers.values():
        x = layer(x)
    return x


def fused(layers: Iterable[nn.Module], x: Tensor, skip: Tensor | None = None) -> Tensor:
    """What `chain` makes of these `ConvAct`s, plus skip, in one operator. All have the activation of the first, but the
    last has none, and enlarge, if at all, in one way."""
    convolutions: list[ConvAct] = list(layers)  # type: ignore[arg-type]
    first = convolutions[0]
    if len(convolutions) == 1:
        return first(x, skip=skip)
    nearest = any(layer.upsample > 1 for layer in convolutions)
    return conv_chain(
        x, [layer.weight for layer in convolutions], [layer.bias for layer in convolutions if layer.bias is not None],
        [layer.upsample * layer.shuffle for layer in convolutions], "nearest" if nearest else first.shuffle_order,
        first.act, first.slope, skip,
    )  # fmt: skip


def tail(layers: Iterable[nn.Module], x: Tensor, gain: float = 1.0) -> Tensor:
    """gain times what `chain` makes of these `ConvAct`s, which have nothing between them but PixelShuffles: one
    operator, which need not take them one after the other."""
    convolutions: list[ConvAct] = list(layers)  # type: ignore[arg-type]
    if len(convolutions) == 1:
        return convolutions[0](x, gain=gain)
    biases = [layer.bias for layer in convolutions if layer.bias is not None]
    return linear_tail(x, [layer.weight for layer in convolutions], biases, gain)


def upsampler(features: int, scale: int) -> nn.ModuleDict:
    """EDSR's upsampler, run by `chain`: convolution and PixelShuffle, once for x3, once a doubling for x1, x2, x4, x8.

    Raises ValueError for a scale that is neither 3 nor a power of two.
    """
    r, steps = (3, 1) if scale == 3 else (2, max(scale, 1).bit_length() - 1)
    if r**steps != scale:
        raise ValueError(f"upsampler: expected scale to be 3 or a power of two; got {scale}")
    return numbered({2 * i: ConvAct(features, features * r * r, shuffle=r) for i in range(steps)})
