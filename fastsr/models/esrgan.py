"""ESRGAN (RRDBNet): Enhanced Super-Resolution Generative Adversarial Networks. X. Wang et al., ECCV Workshops 2018.

Weights: xinntao/ESRGAN (Apache-2.0), and Real-ESRGAN's and BasicSR's networks of the same form. Input and output: RGB,
or one channel, in 0..1. Tested variants: x4 with 23 and with 2 blocks; x1 and x2 through pixel-unshuffle; the key names
of the first release ("old"), of the second, which are the module's own ("new"), and of BasicSR; the discriminator for
128x128 images. The old layout's x1, x2 and x8, other widths and the discriminator for 256x256 follow the same code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastsr.models.network import Network, State, indices, pad_to_multiple
from fastsr.nn import ConvAct, fused
from fastsr.ops import dense_block

SLOPE = 0.2  # of every leaky ReLU
GAIN = 0.2  # of the residual branches
DENSE_LAYERS = 5


@dataclass(frozen=True)
class ESRGANConfig:
    """unshuffle: the factor of the pixel-unshuffle in front. `scale * unshuffle` is what the upsampler makes, x2 by x2;
    BasicSR has x4 without unshuffle, x2 with 2 and x1 with 4. growth: channels that a dense layer adds."""

    scale: int = 4
    in_channels: int = 3
    out_channels: int = 3
    features: int = 64
    blocks: int = 23
    growth: int = 32
    unshuffle: int = 1

    def __post_init__(self) -> None:
        sizes = (self.in_channels, self.out_channels, self.features, self.blocks, self.growth)
        if min(sizes) < 1:
            raise ValueError(f"esrgan: expected sizes of at least 1; got {self}")
        if self.unshuffle not in (1, 2, 4):
            raise ValueError(f"esrgan: expected unshuffle to be 1, 2 or 4; got {self.unshuffle}")
        if self.scale not in (1, 2, 4, 8, 16):
            raise ValueError(f"esrgan: expected scale to be 1, 2, 4, 8 or 16; got {self.scale}")

    @property
    def steps(self) -> int:
        """The number of x2 upsampling steps."""
        return (self.scale * self.unshuffle).bit_length() - 1


class DenseBlock(nn.Module):
    """ESRGAN's residual dense block: x + 0.2 * conv5([x, g1, .., g4])."""

    float8 = False

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        for n in range(1, DENSE_LAYERS):
            setattr(self, f"conv{n}", ConvAct(features + (n - 1) * growth, growth, act="leaky", slope=SLOPE))
        self.conv5 = ConvAct(features + 4 * growth, features)

    def forward(self, x: Tensor, outer: Tensor | None = None) -> Tensor:
        """x, outer: (N, features, H, W). With `outer` the result is outer + 0.2 * (the block's)."""
        layers = [getattr(self, f"conv{n}") for n in range(1, DENSE_LAYERS + 1)]
        return dense_block(x, [c.weight for c in layers], [c.bias for c in layers], SLOPE, GAIN, outer, GAIN,
                           self.float8)  # fmt: skip


class RRDB(nn.Module):
    """Residual in residual dense block: x + 0.2 * RDB3(RDB2(RDB1(x)))."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.RDB1, self.RDB2, self.RDB3 = (DenseBlock(features, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.RDB3(self.RDB2(self.RDB1(x)), outer=x)


class ESRGAN(Network):
    """The generator, figures 3 and 4 of the paper; see the module's docstring."""

    name = "esrgan"
    Config = ESRGANConfig
    dialects = {
        "new": ("conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight", "trunk_conv.weight"),
        "basicsr": ("conv_first.weight", "body.0.rdb1.conv1.weight", "conv_body.weight"),
        "old": ("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"),
    }
    float8_parts = ("RRDB_trunk",)

    def __init__(self, config: ESRGANConfig) -> None:
        super().__init__(config)
        self.colour = "y" if config.out_channels == 1 else "rgb"  # type: ignore[misc]
        f = config.features
        self.conv_first = ConvAct(config.in_channels * config.unshuffle**2, f)
        self.RRDB_trunk = nn.Sequential(*(RRDB(f, config.growth) for _ in range(config.blocks)))
        self.trunk_conv = ConvAct(f, f)
        for n in range(1, config.steps + 1):
            setattr(self, f"upconv{n}", ConvAct(f, f, upsample=2, act="leaky", slope=SLOPE))
        self.HRconv = ConvAct(f, f, act="leaky", slope=SLOPE)
        self.conv_last = ConvAct(f, config.out_channels)

    @classmethod
    def convert(cls, state: State, dialect: str) -> State:
        """Renames the old layout's and BasicSR's keys; another key keeps its name, and is reported by `load`."""
        names = {"new": {}, "basicsr": _FROM_BASICSR, "old": _old_names(state)}[dialect]
        return {_renamed(key, names): value for key, value in state.items()}

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> ESRGANConfig:
        """Sizes from shapes, the scale from the number of upsampling steps. Four or sixteen times as many channels
        going in as coming out are a pixel-unshuffle's."""
        features, first = state["conv_first.weight"].shape[:2]
        last = state["conv_last.weight"].shape[0]
        unshuffle = {4 * last: 2, 16 * last: 4}.get(first, 1)
        steps = sum(re.fullmatch(r"upconv\d+\.weight", key) is not None for key in state)
        if 2**steps < unshuffle:
            raise ValueError(
                f"{first} channels go in, {last} come out, and {steps} upsampling steps make no whole scale"
            )
        return ESRGANConfig(
            scale=2**steps // unshuffle,
            in_channels=first // unshuffle**2,
            out_channels=last,
            features=features,
            blocks=len(indices(state, "RRDB_trunk")),
            growth=state["RRDB_trunk.0.RDB1.conv1.weight"].shape[0],
            unshuffle=unshuffle,
        )

    @property
    def scales(self) -> tuple[int, ...]:
        """The one factor of the upsampler and the unshuffle together."""
        return (self.config.scale,)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, in_channels, H, W) in 0..1 -> (N, out_channels, H * scale, W * scale), not clipped. An H or W
        that is no multiple of config.unshuffle, which the authors' network refuses, is padded to one by mirroring, and
        the result cut: as their scripts and spandrel's network do."""
        (h, w), r, scale = x.shape[-2:], self.config.unshuffle, self.config.scale
        if r > 1:
            x = F.pixel_unshuffle(pad_to_multiple(x, r), r)
        shallow = self.conv_first(x)
        x = self.trunk_conv(self.RRDB_trunk(shallow), skip=shallow)
        upsamplers = [getattr(self, f"upconv{n}") for n in range(1, self.config.steps + 1)]
        return fused([*upsamplers, self.HRconv, self.conv_last], x)[..., : h * scale, : w * scale]

    @property
    def multiple(self) -> int:
        """The factor of the pixel-unshuffle."""
        return self.config.unshuffle


_FROM_BASICSR = {
    r"body\.(\d+)\.rdb(\d)\.": r"RRDB_trunk.\1.RDB\2.",
    r"conv_body\.": "trunk_conv.",
    r"conv_up(\d+)\.": r"upconv\1.",
    r"conv_hr\.": "HRconv.",
}


def _old_names(state: State) -> dict[str, str]:
    """Patterns for the keys of the first release, whose indices in one nn.Sequential depend on blocks and scale: each
    upsampling step takes three (nearest, convolution, leaky ReLU)."""
    tail = sorted(int(m[1]) for key in state if (m := re.fullmatch(r"model\.([1-9]\d*)\.weight", key)))
    names = {
        r"model\.0\.": "conv_first.",
        r"model\.1\.sub\.(\d+)\.(RDB\d\.conv\d)\.0\.": r"RRDB_trunk.\1.\2.",
        r"model\.1\.sub\.\d+\.(weight|bias)$": r"trunk_conv.\1",
    }
    steps = len(tail) - 2
    own = [*(f"upconv{n}" for n in range(1, steps + 1)), "HRconv", "conv_last"]
    return names | {rf"model\.{index}\.": f"{name}." for index, name in zip(tail, own)}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for pattern, replacement in names.items():
        new, count = re.subn("^" + pattern, replacement, key)
        if count:
            return new
    return key


@dataclass(frozen=True)
class ESRGANDiscriminatorConfig:
    """input_size: of the images it judges, 128 or 256."""

    in_channels: int = 3
    features: int = 64
    input_size: int = 128

    def __post_init__(self) -> None:
        if self.input_size not in (128, 256) or min(self.in_channels, self.features) < 1:
            raise ValueError(
                f"esrgan_discriminator: expected input_size 128 or 256 and sizes of at least 1; got {self}"
            )


class ESRGANDiscriminator(Network):
    """BasicSR's VGG-style discriminator: pairs of 3x3 and stride-2 4x4 convolutions with batch norm, down to 4x4."""

    name = "esrgan_discriminator"
    Config = ESRGANDiscriminatorConfig
    dialects = {"basicsr": ("conv0_0.weight", "bn0_1.weight", "conv4_1.weight", "linear2.weight")}

    def __init__(self, config: ESRGANDiscriminatorConfig) -> None:
        super().__init__(config)
        self.levels = 5 if config.input_size == 128 else 6
        before = config.in_channels
        for n in range(self.levels):
            width = config.features * min(2**n, 8)
            setattr(self, f"conv{n}_0", nn.Conv2d(before, width, 3, 1, 1, bias=n == 0))
            if n > 0:
                setattr(self, f"bn{n}_0", nn.BatchNorm2d(width))
            setattr(self, f"conv{n}_1", nn.Conv2d(width, width, 4, 2, 1, bias=False))
            setattr(self, f"bn{n}_1", nn.BatchNorm2d(width))
            before = width
        self.linear1 = nn.Linear(before * 4 * 4, 100)
        self.linear2 = nn.Linear(100, 1)

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> ESRGANDiscriminatorConfig:
        """Sizes from shapes; the sixth level is the form for 256x256."""
        features, channels = state["conv0_0.weight"].shape[:2]
        return ESRGANDiscriminatorConfig(channels, features, 256 if "conv5_1.weight" in state else 128)

    def features(self, x: Tensor) -> Tensor:
        """x: (N, C, S, S) in 0..1 with S = config.input_size -> (N, 8 * config.features, 4, 4), what linear1 reads.
        Raises ValueError for another size."""
        size = self.config.input_size
        if tuple(x.shape[-2:]) != (size, size):
            raise ValueError(f"esrgan_discriminator: expected {size}x{size} images; got {x.shape[-2]}x{x.shape[-1]}")
        for n in range(self.levels):
            x = getattr(self, f"conv{n}_0")(x)
            x = F.leaky_relu(x if n == 0 else getattr(self, f"bn{n}_0")(x), SLOPE)
            x = F.leaky_relu(getattr(self, f"bn{n}_1")(getattr(self, f"conv{n}_1")(x)), SLOPE)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, S, S) in 0..1 with S = config.input_size -> (N, 1), the logit of "real". Raises ValueError."""
        x = self.features(x).flatten(1)
        return self.linear2(F.leaky_relu(self.linear1(x), SLOPE))
