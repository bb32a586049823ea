"""MSRN: Multi-scale Residual Network for Image Super-Resolution.

J. Li, F. Fang, K. Mei, G. Zhang, ECCV 2018. Weights: MIVRC/MSRN-PyTorch. `MSRN` is the newer code (RGB in 0..255, the
mean shift in the file); `MSRNOld` the code of 2018 (luma in 0..1) and its `example` folder, most of whose layers have
no bias. Tested variants: MSRN x2 x3 x4 x8; MSRNOld x2 x3 x4, and x3 of the example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastsr.models.network import RGB_MEAN, Network, State, colour_shift, indices, upsampler_scale
from fastsr.nn import ConvAct, MeanShift, chain, numbered, tail, upsampler
from fastsr.ops import multi_scale_block


@dataclass(frozen=True)
class MSRNConfig:
    """mean, rgb_range: what `sub_mean` and `add_mean` shift by is their product."""

    scale: int = 4
    blocks: int = 8
    features: int = 64
    channels: int = 3
    rgb_range: float = 255.0
    mean: tuple[float, ...] = RGB_MEAN

    def __post_init__(self) -> None:
        _check_sizes("msrn", self)
        if len(self.mean) != self.channels or not self.rgb_range > 0:
            expected = f"a mean of {self.channels} values and rgb_range above 0"
            raise ValueError(f"msrn: expected {expected}; got {self.mean} and {self.rgb_range}")


@dataclass(frozen=True)
class MSRNOldConfig:
    """bias: of every layer but the 3x3 and 5x5 convolutions of the blocks, which always have one.
    upsampling: the name of the upsampling convolution, "conv", or "conv_2x" (whatever the scale) in the example."""

    scale: int = 4
    blocks: int = 8
    features: int = 64
    channels: int = 1
    bias: bool = True
    upsampling: str = "conv"

    def __post_init__(self) -> None:
        _check_sizes("msrn_old", self)
        if self.upsampling not in ("conv", "conv_2x"):
            raise ValueError(f'msrn_old: expected upsampling to be "conv" or "conv_2x"; got {self.upsampling!r}')


def _check_sizes(name: str, config: MSRNConfig | MSRNOldConfig) -> None:
    sizes = {f: getattr(config, f) for f in ("scale", "blocks", "features", "channels")}
    if min(sizes.values()) < 1:
        raise ValueError(f"{name}: expected sizes of at least 1; got {sizes}")


class MSRB(nn.Module):
    """The multi-scale residual block: 3x3 and 5x5 side by side, twice, crossing in between; the paper's figure 3."""

    def __init__(self, features: int, bias: bool = True) -> None:
        super().__init__()
        f = features
        self.conv_3_1 = ConvAct(f, f, 3, act="relu")
        self.conv_3_2 = ConvAct(2 * f, 2 * f, 3, act="relu")
        self.conv_5_1 = ConvAct(f, f, 5, act="relu")
        self.conv_5_2 = ConvAct(2 * f, 2 * f, 5, act="relu")
        self.confusion = ConvAct(4 * f, f, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.conv_3_1, self.conv_3_2, self.conv_5_1, self.conv_5_2, self.confusion)
        return multi_scale_block(x, *(t for layer in layers for t in (layer.weight, layer.bias)))


def _block_outputs(blocks: list[nn.Module], x: Tensor) -> list[Tensor]:
    """What each block of the trunk returns, first to last."""
    outputs = []
    for block in blocks:
        x = block(x)
        outputs.append(x)
    return outputs


class MSRN(Network):
    """The network of the paper's figure 2 in the newer code's form; see the module's docstring."""

    name = "msrn"
    Config = MSRNConfig
    dialects = {"official": ("head.0.weight", "body.0.conv_3_1.weight", "tail.0.weight")}
    hints = ("rgb_range",)

    def __init__(self, config: MSRNConfig) -> None:
        super().__init__(config)
        c, f, n = config.channels, config.features, config.blocks
        self.colour = "y" if c == 1 else "rgb"  # type: ignore[misc]
        self.sub_mean = MeanShift(config.mean, -1, config.rgb_range)
        self.add_mean = MeanShift(config.mean, +1, config.rgb_range)
        self.head = numbered({0: ConvAct(c, f)})
        self.body = numbered({i: MSRB(f) for i in range(n)})
        self.tail = numbered({0: ConvAct((n + 1) * f, f, 1), 1: ConvAct(f, f), 2: upsampler(f, config.scale),
                              3: ConvAct(f, c)})  # fmt: skip

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> MSRNConfig:
        """Sizes from shapes, the range from the mean shift."""
        features, channels = state["head.0.weight"].shape[:2]
        mean, rgb_range = colour_shift(state, **hints)
        scale = upsampler_scale(state, "tail.2", features)
        return MSRNConfig(scale, len(indices(state, "body")), features, channels, rgb_range, mean)

    @property
    def scales(self) -> tuple[int, ...]:
        """The one factor of the tail."""
        return (self.config.scale,)

    @property
    def value_range(self) -> tuple[float, float]:
        """0..255 for the authors' weights."""
        return 0.0, self.config.rgb_range

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W), in the authors' files RGB in 0..255 -> (N, C, H * scale, W * scale) in the same range."""
        head = chain(self.head, self.sub_mean(x))
        fuse, smooth, upsample, last = self.tail.values()
        y = fuse(*_block_outputs(list(self.body.values()), head), head)
        return tail([*upsample.values(), last, self.add_mean], smooth(y))


class MSRNOld(Network):
    """The network of 2018; the fusion reads the input layer first, then the blocks. See the module's docstring."""

    name = "msrn_old"
    Config = MSRNOldConfig
    dialects = {"old": ("conv_input.weight", "residual1.0.conv_3_1.weight", "bottle.weight", "conv_output.weight")}

    def __init__(self, config: MSRNOldConfig) -> None:
        super().__init__(config)
        c, f, n, r, bias = config.channels, config.features, config.blocks, config.scale, config.bias
        self.colour = "y" if c == 1 else "rgb"  # type: ignore[misc]
        self.conv_input = ConvAct(c, f, bias=bias)
        for i in range(1, n + 1):
            setattr(self, f"residual{i}", numbered({0: MSRB(f, bias)}))
        self.bottle = ConvAct((n + 1) * f, f, 1, bias=bias)
        setattr(self, config.upsampling, ConvAct(f, f * r * r, bias=bias, shuffle=r))
        self.conv_output = ConvAct(f, c, bias=bias)

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> MSRNOldConfig:
        """Sizes from shapes, the scale from the upsampling convolution."""
        features, channels = state["conv_input.weight"].shape[:2]
        upsampling = "conv_2x" if "conv_2x.weight" in state else "conv"
        return MSRNOldConfig(
            scale=round((state[f"{upsampling}.weight"].shape[0] / features) ** 0.5),
            blocks=sum(key.startswith("residual") and key.endswith(".conv_3_1.weight") for key in state),
            features=features,
            channels=channels,
            bias="bottle.bias" in state,
            upsampling=upsampling,
        )

    @property
    def scales(self) -> tuple[int, ...]:
        """The one factor of the upsampling convolution."""
        return (self.config.scale,)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 1, H, W), BT.601 luma (studio swing) in 0..1 -> (N, 1, H * scale, W * scale) in the same range."""
        first = self.conv_input(x)
        blocks = [getattr(self, f"residual{i}")["0"] for i in range(1, self.config.blocks + 1)]
        y = self.bottle(first, *_block_outputs(blocks, first))
        return tail([getattr(self, self.config.upsampling), self.conv_output], y)
