"""DBPN: Deep Back-Projection Networks. M. Haris, G. Shakhnarovich, N. Ukita, CVPR 2018 and TPAMI 2020.

`DBPN` and `DBPNDiscriminator` are those of alterzero/DBPN-Pytorch (MIT); `DDBPN` is the network of
sanghyun-son/EDSR-PyTorch (MIT). Input and output: DBPN RGB in 0..1, DDBPN RGB in 0..255 (`rgb_range`), the
discriminator RGB with ImageNet's mean taken off and divided by its deviation.
Tested variants: D-DBPN (T = 7), DBPNLL (T = 10), DBPN-S (T = 2) and DBPN-RES-MR64-3, each x2, x4 and x8; DDBPN x4; the
discriminator for 48x48 images.

What no file of a `DBPN` can say, and what `load` assumes unless told by a hint:

* residual: the network's output is added to the bicubic enlargement, which the authors' scripts do outside the
  network. True for the iterative form, whose published files are named RES, else False.
* imagenet: images are normalised with ImageNet's mean and deviation, as in the authors' GAN training. False.
* iterations: the iterative form reuses its T stages. The width of the last layer is T times that of a stage for the
  plain form and `iterations` times for the iterative one, so files tell them apart, except where both agree: that is
  taken for the plain form unless the hint says `iterations=T`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr.models.network import RGB_MEAN, Network, State, colour_shift, indices
from fastsr.nn import ConvAct, MeanShift, numbered
from fastsr.ops import down_projection, resize_bicubic, up_projection

PADDING = 2  # of every projection; kernel = scale + 4 and stride = scale, so sizes change by exactly the scale
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DBPNConfig:
    """features and width: channels after the first and the second layer. stages: T, the number of up-projections.
    iterations: None for one pass whose T large feature maps are reconstructed together; else the number of passes
    through the same stages, of which each gives its last one. residual, imagenet: see the module's docstring."""

    scale: int = 4
    channels: int = 3
    features: int = 256
    width: int = 64
    stages: int = 7
    iterations: int | None = None
    residual: bool = False
    imagenet: bool = False

    def __post_init__(self) -> None:
        check_sizes("dbpn", self.scale, channels=self.channels, features=self.features, width=self.width,
                    stages=self.stages)  # fmt: skip
        if self.iterations is not None and (self.iterations < 1 or self.stages < 2):
            raise ValueError(f"dbpn: expected iterations of at least 1 over at least 2 stages; got {self}")
        if self.imagenet and self.channels != 3:
            raise ValueError(f"dbpn: expected 3 channels for imagenet=True; got {self.channels}")


@dataclass(frozen=True)
class DDBPNConfig:
    """features and width: channels after the first and the second layer (the authors' n0 and nr). stages: their
    `depth`, the number of up-projections. rgb_range: white."""

    scale: int = 4
    features: int = 128
    width: int = 32
    stages: int = 6
    rgb_range: float = 255.0

    def __post_init__(self) -> None:
        check_sizes("ddbpn", self.scale, features=self.features, width=self.width, stages=self.stages)
        if not self.rgb_range > 0:
            raise ValueError(f"ddbpn: expected a positive rgb_range; got {self.rgb_range}")


@dataclass(frozen=True)
class DBPNDiscriminatorConfig:
    """image_size: height and width of the images, a multiple of 16. width: channels of the first layer."""

    image_size: int = 240
    channels: int = 3
    width: int = 64

    def __post_init__(self) -> None:
        if self.image_size < 16 or self.image_size % 16:
            raise ValueError(f"dbpn_discriminator: expected image_size to be a multiple of 16; got {self.image_size}")
        if min(self.channels, self.width) < 1:
            raise ValueError(f"dbpn_discriminator: expected channels and width of at least 1; got {self}")


def check_sizes(name: str, scale: int, **sizes: int) -> None:
    """Raises ValueError for a scale or size that the networks do not have."""
    if scale not in (2, 4, 8):
        raise ValueError(f"{name}: expected scale 2, 4 or 8 (projection kernels 6, 8, 12); got {scale}")
    if min(sizes.values()) < 1:
        raise ValueError(f"{name}: expected sizes of at least 1; got {sizes}")


def layer(block: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and slopes of a block: a convolution and the PReLU behind it."""
    convolution, prelu = block.children()
    return convolution.weight, convolution.bias, prelu.weight


class Block(nn.ModuleDict):
    """A convolution and a PReLU with one slope, under the authors' names `conv` (or `deconv`) and `act`."""

    def __init__(self, convolution: nn.Module) -> None:
        name = "deconv" if isinstance(convolution, nn.ConvTranspose2d) else "conv"
        super().__init__({name: convolution, "act": nn.PReLU()})

    def forward(self, *inputs: Tensor) -> Tensor:
        return self["conv"](*inputs, prelu=self["act"].weight)


def sampler(width: int, scale: int, up: bool) -> nn.Module:
    """The parameters of a convolution of stride `scale`, transposed if `up`."""
    kind = nn.ConvTranspose2d if up else nn.Conv2d
    return kind(width, width, scale + 4, scale, PADDING)


class Projection(nn.Module):
    """An up- or down-projection unit over one or more feature maps; with more than one it starts with a bottleneck."""

    up: bool
    scale: int

    def blocks(self) -> tuple[nn.Module | None, nn.Module, nn.Module, nn.Module]:
        """The bottleneck, if there is one, and the three layers."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        bottleneck, *layers = self.blocks()
        project = up_projection if self.up else down_projection
        first = (None, None, None) if bottleneck is None else layer(bottleneck)
        one, two, three = (layer(block) for block in layers)
        return project(list(inputs), *first, *one, *two, *three, stride=self.scale, padding=PADDING)


class Unit(Projection):
    """A unit with the names of DBPN: UpBlock, D_UpBlock, DownBlock and D_DownBlock in the authors' code."""

    def __init__(self, up: bool, inputs: int, width: int, scale: int) -> None:
        super().__init__()
        self.up, self.scale = up, scale
        if inputs > 1:
            self.conv = Block(ConvAct(inputs * width, width, 1))
        for n, turned in enumerate((up, not up, up), 1):
            setattr(self, f"{'up' if up else 'down'}_conv{n}", Block(sampler(width, scale, turned)))

    def blocks(self) -> tuple[nn.Module | None, nn.Module, nn.Module, nn.Module]:
        one, two, three = (getattr(self, f"{'up' if self.up else 'down'}_conv{n}") for n in (1, 2, 3))
        return getattr(self, "conv", None), one, two, three


class DDBPNUnit(Projection):
    """A unit with the names of DDBPN, whose PReLUs have one slope a channel."""

    def __init__(self, up: bool, inputs: int, width: int, scale: int) -> None:
        super().__init__()
        self.up, self.scale = up, scale
        if inputs > 1:
            self.bottleneck = numbered({0: ConvAct(inputs * width, width, 1), 1: nn.PReLU(width)})
        self.conv_1, self.conv_2, self.conv_3 = (
            numbered({0: sampler(width, scale, turned), 1: nn.PReLU(width)}) for turned in (up, not up, up)
        )

    def blocks(self) -> tuple[nn.Module | None, nn.Module, nn.Module, nn.Module]:
        return getattr(self, "bottleneck", None), self.conv_1, self.conv_2, self.conv_3


def back_project(
    low: Tensor, ups: Iterable[nn.Module], downs: Iterable[nn.Module], newest_first: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Alternates up- and down-projections, each reading all results of the other kind; figure 5 of the paper.

    Returns the large and the small feature maps, in the order in which the units read them.
    """
    order = -1 if newest_first else 1
    ups = iter(ups)
    highs, lows = [next(ups)(low)], []
    for up, down in zip(ups, downs, strict=True):
        lows.append(down(*highs[::order]))
        highs.append(up(*lows[::order]))
    return highs[::order], lows[::order]


def pillow_bicubic(x: Tensor, scale: int) -> Tensor:
    """x (N, C, H, W) in 0..1, enlarged as Pillow's bicubic does it, but for its rounding to 8 bits.

    Pillow enlarges the width, then the height, and its 8-bit results cannot leave 0..1. It leaves out the taps beyond
    the border and scales the others up to a sum of one: the image within zeros over ones within zeros.
    """

    def convolve(image: Tensor) -> Tensor:
        image = F.pad(image, (2, 2))  # the kernel's reach
        height, width = image.shape[2:]
        return resize_bicubic(image, height, width * scale, 1.0, scale)[..., 2 * scale : -2 * scale]

    def widen(image: Tensor) -> Tensor:
        return (convolve(image) / convolve(torch.ones_like(image[:1, :1, :1]))).clamp(0, 1)

    return widen(widen(x).mT).mT


class DBPN(Network):
    """D-DBPN, DBPNLL, DBPN-S (stages 7, 10, 2) and DBPN-RES-MR64-3 (iterations 3); see the module's docstring."""

    name = "dbpn"
    Config = DBPNConfig
    dialects = {"official": ("feat0.conv.weight", "up1.up_conv1.deconv.weight", "output_conv.conv.weight")}
    hints = ("residual", "imagenet", "iterations")

    def __init__(self, config: DBPNConfig) -> None:
        super().__init__(config)
        c = config
        self.colour = "y" if c.channels == 1 else "rgb"  # type: ignore[misc]
        self.feat0 = Block(ConvAct(c.channels, c.features))
        self.feat1 = Block(ConvAct(c.features, c.width, 1))
        for t in range(1, c.stages + 1):
            setattr(self, f"up{t}", Unit(True, max(1, t - 1), c.width, c.scale))
            if t < c.stages:
                setattr(self, f"down{t}", Unit(False, t, c.width, c.scale))
        self.output_conv = nn.ModuleDict({"conv": ConvAct((c.iterations or c.stages) * c.width, c.channels)})

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> DBPNConfig:
        """Sizes from shapes; the form from the width of the last layer, see the module's docstring."""
        features, channels = state["feat0.conv.weight"].shape[:2]
        width, _, kernel, _ = state["up1.up_conv1.deconv.weight"].shape
        stages = len({key.split(".")[0] for key in state if re.match(r"up\d+\.", key)})
        maps = state["output_conv.conv.weight"].shape[1] // width
        iterations = hints.get("iterations") if maps == stages else maps
        return DBPNConfig(kernel - 4, channels, features, width, stages, iterations,
                          residual=hints.get("residual", iterations is not None),
                          imagenet=hints.get("imagenet", False))  # fmt: skip

    @property
    def scales(self) -> tuple[int, ...]:
        """The one factor of the projections."""
        return (self.config.scale,)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, channels, H, W) -> (N, channels, H * scale, W * scale), not clipped. With `residual` this is what is
        to be added to the bicubic enlargement, with `imagenet` it is normalised, as x is."""
        ups = [getattr(self, f"up{t}") for t in range(1, self.config.stages + 1)]
        downs = [getattr(self, f"down{t}") for t in range(1, self.config.stages)]
        low = self.feat1(self.feat0(x))
        if self.config.iterations is None:
            maps, _ = back_project(low, ups, downs, newest_first=True)
        else:
            maps = []
            for _ in range(self.config.iterations):
                highs, lows = back_project(low, ups, downs, newest_first=True)
                maps.append(highs[0])
                low = lows[0]
        return self.output_conv["conv"](*maps)

    def super_resolve(self, x: Tensor, scale: int) -> Tensor:
        """Images in 0..1; completes what `residual` and `imagenet` leave to the caller of the bare network."""
        base = pillow_bicubic(x, scale) if self.config.residual else None
        if self.config.imagenet:
            mean, std = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
            y = self((x - mean) / std) * std
            return y + (mean if base is None else base)  # the normalised base takes the mean with it
        y = self(x)
        return y if base is None else y + base


class DDBPN(Network):
    """The D-DBPN of EDSR-PyTorch: oldest feature first, a PReLU slope a channel, mean shifts at both ends."""

    name = "ddbpn"
    Config = DDBPNConfig
    dialects = {"official": ("initial.0.weight", "upmodules.0.conv_1.0.weight", "reconstruction.0.weight")}
    hints = ("rgb_range",)

    def __init__(self, config: DDBPNConfig) -> None:
        super().__init__(config)
        c = config
        self.sub_mean, self.add_mean = (MeanShift(RGB_MEAN, sign, c.rgb_range) for sign in (-1, +1))
        self.initial = numbered({0: ConvAct(3, c.features), 1: nn.PReLU(c.features),
                                 2: ConvAct(c.features, c.width, 1), 3: nn.PReLU(c.width)})  # fmt: skip
        self.upmodules = nn.ModuleList(DDBPNUnit(True, max(1, t), c.width, c.scale) for t in range(c.stages))
        self.downmodules = nn.ModuleList(DDBPNUnit(False, t + 1, c.width, c.scale) for t in range(c.stages - 1))
        self.reconstruction = numbered({0: ConvAct(c.stages * c.width, 3)})

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> DDBPNConfig:
        """Sizes from shapes, the range from the mean that is taken off. Where that is zero (weights of a `DBPN` under
        these names) the file does not say the range: it is the hint `rgb_range`, or that network's 1."""
        width, _, kernel, _ = state["upmodules.0.conv_1.0.weight"].shape
        unsaid = 255.0 if state["sub_mean.bias"].any() else 1.0
        _, rgb_range = colour_shift(state, hints.get("rgb_range", unsaid))
        features, stages = state["initial.0.weight"].shape[0], len(indices(state, "upmodules"))
        return DDBPNConfig(kernel - 4, features, width, stages, rgb_range)

    @property
    def scales(self) -> tuple[int, ...]:
        """The one factor of the projections."""
        return (self.config.scale,)

    @property
    def value_range(self) -> tuple[float, float]:
        """Black and white at both ends."""
        return 0.0, float(self.config.rgb_range)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) RGB in 0..rgb_range -> (N, 3, H * scale, W * scale), not clipped."""
        conv0, prelu0, conv1, prelu1 = self.initial.values()
        low = conv1(conv0(self.sub_mean(x), prelu=prelu0.weight), prelu=prelu1.weight)
        highs, _ = back_project(low, self.upmodules, self.downmodules, newest_first=False)
        return self.add_mean(self.reconstruction["0"](*highs))


class DBPNDiscriminator(Network):
    """Tells photographs from results, for images of one size: eight convolutions and two fully connected layers.

    In training mode the batch norms use the batch's statistics.
    """

    name = "dbpn_discriminator"
    Config = DBPNDiscriminatorConfig
    dialects = {"official": ("input_conv.conv.weight", "conv_blocks.0.conv.weight", "dense_layers.0.fc.weight")}

    def __init__(self, config: DBPNDiscriminatorConfig) -> None:
        super().__init__(config)
        f = config.width
        widths = [f * m for m in (1, 1, 2, 2, 4, 4, 8, 8)]
        self.input_conv = nn.ModuleDict({"conv": nn.Conv2d(config.channels, f, 3, 1, 1)})
        self.conv_blocks = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(a, b, 3, 2 - i % 2, 1), "bn": nn.BatchNorm2d(b)})
            for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        )
        flat = 8 * f * (config.image_size // 16) ** 2  # four of the blocks have stride 2
        self.dense_layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(a, b)}) for a, b in ((flat, 16 * f), (16 * f, 1))
        )

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> DBPNDiscriminatorConfig:
        """Sizes from shapes, the image's from the first fully connected layer."""
        width, channels = state["input_conv.conv.weight"].shape[:2]
        side = round((state["dense_layers.0.fc.weight"].shape[1] / (8 * width)) ** 0.5)
        return DBPNDiscriminatorConfig(16 * side, channels, width)

    def logit(self, x: Tensor) -> Tensor:
        """x: (N, channels, image_size, image_size), normalised -> (N, 1), positive for a photograph. Raises ValueError
        for another size."""
        c = self.config
        expected = (c.channels, c.image_size, c.image_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"dbpn_discriminator: expected x of shape (N, {', '.join(map(str, expected))}); "
                             f"got {list(x.shape)}; crop the images")  # fmt: skip
        y = F.leaky_relu(self.input_conv["conv"](x), 0.2)
        for block in self.conv_blocks:
            y = F.leaky_relu(block["bn"](block["conv"](y)), 0.2)
        hidden, last = (dense["fc"] for dense in self.dense_layers)
        return last(F.leaky_relu(hidden(y.flatten(1)), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        """The probability, (N, 1) in 0..1, that x is a photograph; x as in `logit`."""
        return torch.sigmoid(self.logit(x))
