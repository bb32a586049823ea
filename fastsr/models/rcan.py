"""RCAN: Image Super-Resolution Using Very Deep Residual Channel Attention Networks.

Y. Zhang, K. Li, K. Li, L. Wang, B. Zhong, Y. Fu, ECCV 2018. Weights: yulunzhang/RCAN (`RCAN`, RGB in 0..255, the mean
shift in the file) and XPixelGroup/BasicSR (`RCANBasicSR`, Apache-2.0, RGB in 0..1, mean and range in no file).
Tested variants: both, x2 x3 x4 x8, small ones, ranges 255 and 1; spandrel's objects, with and without mean shift and
with a pixel-unshuffled input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr import packing
from fastsr.models.network import RGB_MEAN, Network, State, colour_shift, indices, pad_to_multiple, upsampler_scale
from fastsr.nn import ConvAct, MeanShift, chain, numbered, tail, upsampler
from fastsr.ops import rcab


@dataclass(frozen=True)
class RCANConfig:
    """groups of blocks; hidden: channels inside the attention (features // 16 in the paper).

    mean, rgb_range: what `sub_mean` and `add_mean` shift by is their product; an empty mean leaves both out.
    input_gain: images are multiplied by it on the way in and divided by it on the way out, as spandrel does.
    unshuffle: pixels folded into channels in front, which divides the scale; the size is padded to a multiple.
    """

    scale: int = 4
    groups: int = 10
    blocks: int = 20
    features: int = 64
    hidden: int = 4
    channels: int = 3
    rgb_range: float = 255.0
    mean: tuple[float, ...] = RGB_MEAN
    input_gain: float = 1.0
    unshuffle: int = 1

    def __post_init__(self) -> None:
        _check_sizes("rcan", self)
        if len(self.mean) not in (0, self.channels):
            raise ValueError(f"rcan: expected mean to have {self.channels} values, or none; got {self.mean}")
        if not self.rgb_range > 0 or not self.input_gain > 0:
            raise ValueError(f"rcan: expected rgb_range and input_gain above 0; got {self}")


@dataclass(frozen=True)
class RCANBasicSRConfig:
    """As RCANConfig. img_range: what values 0..1 are multiplied by inside, after the subtraction of rgb_mean.
    res_scale: of every block's body."""

    scale: int = 4
    groups: int = 10
    blocks: int = 20
    features: int = 64
    hidden: int = 4
    channels: int = 3
    img_range: float = 255.0
    res_scale: float = 1.0
    rgb_mean: tuple[float, ...] = RGB_MEAN

    def __post_init__(self) -> None:
        _check_sizes("rcan_basicsr", self)
        if len(self.rgb_mean) != self.channels:
            expected = f"rgb_mean, which is not in the file, to have one value for each of {self.channels} channels"
            raise ValueError(f"rcan_basicsr: expected {expected}; got {self.rgb_mean}")
        if not self.img_range > 0:
            raise ValueError(f"rcan_basicsr: expected img_range above 0; got {self.img_range}")


def _check_sizes(name: str, config: RCANConfig | RCANBasicSRConfig) -> None:
    sizes = {f: getattr(config, f) for f in ("scale", "groups", "blocks", "features", "hidden", "channels")}
    if min(sizes.values()) < 1:
        raise ValueError(f"{name}: expected sizes of at least 1; got {sizes}")


# The authors' form.


class CALayer(nn.Module):
    """The two 1x1 convolutions of the channel attention."""

    def __init__(self, config: RCANConfig) -> None:
        super().__init__()
        self.conv_du = numbered({0: ConvAct(config.features, config.hidden, 1),
                                 2: ConvAct(config.hidden, config.features, 1)})  # fmt: skip


class RCAB(nn.Module):
    """x + attention(conv(relu(conv(x))))."""

    def __init__(self, config: RCANConfig) -> None:
        super().__init__()
        f = config.features
        self.body = numbered({0: ConvAct(f, f, act="relu"), 2: ConvAct(f, f), 3: CALayer(config)})

    def forward(self, x: Tensor) -> Tensor:
        a, b, attention = self.body.values()
        down, up = attention.conv_du.values()
        return rcab(x, a.weight, a.bias, b.weight, b.bias, down.weight, down.bias, up.weight, up.bias)


class ResidualGroup(nn.Module):
    """x + conv(blocks(x)); the convolution is the last entry of `body`."""

    def __init__(self, config: RCANConfig) -> None:
        super().__init__()
        f, n = config.features, config.blocks
        self.body = numbered({i: RCAB(config) for i in range(n)} | {n: ConvAct(f, f)})

    def forward(self, x: Tensor) -> Tensor:
        *blocks, last = self.body.values()
        y = x
        for block in blocks:
            y = block(y)
        return last(y, skip=x)


class RCAN(Network):
    """The network of the paper's figure 2 in the authors' form; see the module's docstring."""

    name = "rcan"
    Config = RCANConfig
    dialects = {
        "official": ("head.0.weight", "body.0.body.0.body.3.conv_du.0.weight", "tail.1.weight"),
        "unshuffled": ("head.1.weight", "body.0.body.0.body.3.conv_du.0.weight", "tail.1.weight"),
    }
    hints = ("rgb_range", "input_gain")
    split = True

    def __init__(self, config: RCANConfig) -> None:
        super().__init__(config)
        c, f, n = config.channels, config.features, config.groups
        self.colour = "y" if c == 1 else "rgb"  # type: ignore[misc]
        if config.mean:
            self.sub_mean = MeanShift(config.mean, -1, config.rgb_range)
            self.add_mean = MeanShift(config.mean, +1, config.rgb_range)
        fold = config.unshuffle**2
        self.head = numbered({0 if fold == 1 else 1: ConvAct(c * fold, f)})
        self.body = numbered({i: ResidualGroup(config) for i in range(n)} | {n: ConvAct(f, f)})
        self.tail = numbered({0: upsampler(f, config.scale * config.unshuffle), 1: ConvAct(f, c)})

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> RCANConfig:
        """Sizes from shapes; the range from the mean shift, or where there is none from `rgb_range` (default 1)."""
        head = state["head.0.weight" if dialect == "official" else "head.1.weight"]
        features, channels = head.shape[0], state["tail.1.weight"].shape[0]
        unshuffle = round((head.shape[1] / channels) ** 0.5)
        shifts = "sub_mean.bias" in state
        mean, rgb_range = colour_shift(state, hints.get("rgb_range", 255.0)) if shifts else ((), 1.0)
        return RCANConfig(
            scale=upsampler_scale(state, "tail.0", features) // unshuffle,
            groups=len(indices(state, "body")) - 1,
            blocks=len(indices(state, "body.0.body")) - 1,
            features=features,
            hidden=state["body.0.body.0.body.3.conv_du.0.weight"].shape[0],
            channels=channels,
            rgb_range=rgb_range if shifts else hints.get("rgb_range", 1.0),
            mean=mean,
            input_gain=hints.get("input_gain", 1.0),
            unshuffle=unshuffle,
        )

    @classmethod
    def hints_of(cls, module: nn.Module) -> dict[str, Any]:
        """spandrel's RCAN has the authors' keys, but takes 0..1 and multiplies by its `rgb_range`."""
        if type(module).__module__.split(".")[0] == "spandrel":
            return {"input_gain": float(module.rgb_range), "rgb_range": float(module.rgb_range)}  # type: ignore[arg-type]
        return super().hints_of(module)

    @property
    def scales(self) -> tuple[int, ...]:
        """The one factor of the tail."""
        return (self.config.scale,)

    @property
    def value_range(self) -> tuple[float, float]:
        """0..255 for the authors' weights."""
        return 0.0, self.config.rgb_range / self.config.input_gain

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W), in the authors' files RGB in 0..255 -> (N, C, H * scale, W * scale) in the same range."""
        h, w = x.shape[-2:]
        y = self.local_part(self.global_part(x), self.config.scale)
        return y[..., : h * self.config.scale, : w * self.config.scale]

    @property
    def multiple(self) -> int:
        """The factor of the pixel-unshuffle."""
        return self.config.unshuffle

    def global_part(self, x: Tensor) -> Tensor:
        """Everything at the image's size: each block's gate is an average over all of it."""
        gain, r = self.config.input_gain, self.config.unshuffle
        x = x if gain == 1 else x * gain
        x = pad_to_multiple(x, r)
        x = self.sub_mean(x) if self.config.mean else x
        x = F.pixel_unshuffle(x, r) if r > 1 else x
        skip = chain(self.head, x)
        *groups, last = self.body.values()
        y = skip
        for group in groups:
            y = group(y)
        return last(y, skip=skip)

    def local_part(self, features: Tensor, scale: int) -> Tensor:
        """The upsampler."""
        upsample, last = self.tail.values()
        y = tail([*upsample.values(), last, *([self.add_mean] if self.config.mean else [])], features)
        return y if self.config.input_gain == 1 else y / self.config.input_gain


# BasicSR's form.


class BasicSRAttention(nn.Module):
    """The two 1x1 convolutions of the channel attention, under BasicSR's indices (the pooling is 0 there)."""

    def __init__(self, config: RCANBasicSRConfig) -> None:
        super().__init__()
        self.attention = numbered({1: ConvAct(config.features, config.hidden, 1),
                                   3: ConvAct(config.hidden, config.features, 1)})  # fmt: skip


class BasicSRRCAB(nn.Module):
    """x + res_scale * attention(conv(relu(conv(x))))."""

    def __init__(self, config: RCANBasicSRConfig) -> None:
        super().__init__()
        f = config.features
        self.rcab = numbered({0: ConvAct(f, f, act="relu"), 2: ConvAct(f, f), 3: BasicSRAttention(config)})
        self.res_scale = config.res_scale

    def forward(self, x: Tensor) -> Tensor:
        a, b, attention = self.rcab.values()
        down, up = attention.attention.values()
        return rcab(
            x, a.weight, a.bias, b.weight, b.bias, down.weight, down.bias, up.weight, up.bias, self.res_scale
        )  # fmt: skip


class BasicSRGroup(nn.Module):
    """x + conv(blocks(x))."""

    def __init__(self, config: RCANBasicSRConfig) -> None:
        super().__init__()
        self.residual_group = numbered({i: BasicSRRCAB(config) for i in range(config.blocks)})
        self.conv = ConvAct(config.features, config.features)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(chain(self.residual_group, x), skip=x)


class RCANBasicSR(Network):
    """The same network in BasicSR's form; see the module's docstring."""

    name = "rcan_basicsr"
    Config = RCANBasicSRConfig
    dialects = {"basicsr": ("conv_first.weight", "body.0.residual_group.0.rcab.0.weight", "conv_last.weight")}
    hints = ("img_range", "res_scale", "rgb_mean")
    split = True

    def __init__(self, config: RCANBasicSRConfig) -> None:
        super().__init__(config)
        c, f = config.channels, config.features
        self.colour = "y" if c == 1 else "rgb"  # type: ignore[misc]
        self.conv_first = ConvAct(c, f)
        self.body = numbered({i: BasicSRGroup(config) for i in range(config.groups)})
        self.conv_after_body = ConvAct(f, f)
        self.upsample = upsampler(f, config.scale)
        self.conv_last = ConvAct(f, c)

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> RCANBasicSRConfig:
        """Sizes from shapes; the hints for what stands in no file."""
        features, channels = state["conv_first.weight"].shape[:2]
        return RCANBasicSRConfig(
            scale=upsampler_scale(state, "upsample", features),
            groups=len(indices(state, "body")),
            blocks=len(indices(state, "body.0.residual_group")),
            features=features,
            hidden=state["body.0.residual_group.0.rcab.3.attention.1.weight"].shape[0],
            channels=channels,
            **hints | {"rgb_mean": tuple(hints.get("rgb_mean", RGB_MEAN))},
        )

    @classmethod
    def hints_of(cls, module: nn.Module) -> dict[str, Any]:
        """BasicSR's module holds its mean as a tensor `mean` of shape (1, C, 1, 1)."""
        mean = getattr(module, "mean", None)
        more = {"rgb_mean": tuple(mean.flatten().tolist())} if isinstance(mean, Tensor) else {}
        return super().hints_of(module) | more

    @property
    def scales(self) -> tuple[int, ...]:
        """The one factor of the upsampler."""
        return (self.config.scale,)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) RGB in 0..1 -> (N, C, H * scale, W * scale) in the same range."""
        return self.local_part(self.global_part(x), self.config.scale)

    def global_part(self, x: Tensor) -> Tensor:
        """Everything at the image's size: each block's gate is an average over all of it."""
        # (x - mean) * range on load, so that the zero padding stays zero
        scale, shift, _ = self._colour()
        skip = self.conv_first(x, pre_scale=scale, pre_shift=shift)
        return self.conv_after_body(chain(self.body, skip), skip=skip)

    def local_part(self, features: Tensor, scale: int) -> Tensor:
        """The upsampler."""
        y = tail([*self.upsample.values(), self.conv_last], features, gain=1 / self.config.img_range)
        return y + self._colour()[2][:, None, None]

    def _colour(self) -> tuple[Tensor, Tensor, Tensor]:
        """img_range, -rgb_mean * img_range and rgb_mean, a number for each colour, where the weights are."""
        return packing.derived(_colour, self.conv_first.weight, self.config.img_range, self.config.rgb_mean)


def _colour(like: Tensor, range_: float, values: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    mean = like.new_tensor(values)
    return torch.full_like(mean, range_), -mean * range_, mean
