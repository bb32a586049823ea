"""RDN: Residual Dense Network for Image Super-Resolution. Y. Zhang, Y. Tian, Y. Kong, B. Zhong, Y. Fu, CVPR 2018.

Three forms of one network, whose keys differ:

* `rdn`, the form of EDSR-PyTorch: RGB in 0..255; the upsampler works in G channels. Tested variants: configuration A
  (D=20, C=6, G=32) and B (D=16, C=8, G=64), x2 x3 x4.
* `rdn_plain`, the form of yjn870/RDN-pytorch: RGB in 0..1; the upsampler works in G0 channels, which are as many as G.
  Tested variants: its default D=16, C=8, G=64, x2 x3 x4.
* `rdn_original`, the authors' Torch7 code (yulunzhang/RDN): RGB in 0..255; the upsampler works in G0 channels, the
  blocks may have a width of their own, the colour mean is taken off first and added last, and there are x8 and x1 (no
  upsampler) too. Restated from the authors' code, and not proved: there is no output of it to compare with. Keys are
  those of `rdn`, between `subMean` and `addMean` (`.weight`, `.bias` of 1x1 convolutions). Their `.t7` files are read
  by the order of the model's parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fastsr.models.network import RGB_MEAN, Network, State, colour_shift, indices
from fastsr.nn import ConvAct, MeanShift, numbered, tail
from fastsr.ops import dense_block


@dataclass(frozen=True)
class RDNConfig:
    """D blocks of C dense layers, which add G channels each; G0 channels between the blocks. `kernel` is that of the
    convolutions outside the blocks. The value range is 0..rgb_range."""

    scale: int = 2
    D: int = 16
    C: int = 8
    G: int = 64
    G0: int = 64
    kernel: int = 3
    channels: int = 3
    rgb_range: float = 255.0

    def __post_init__(self) -> None:
        _check("rdn", self, (2, 3, 4))
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"rdn: expected an odd kernel; got {self.kernel}")

    @property
    def block_width(self) -> int:
        """Channels between the blocks."""
        return self.G0

    @property
    def up_width(self) -> int:
        """Channels after each shuffle."""
        return self.G


@dataclass(frozen=True)
class RDNPlainConfig:
    """D blocks of C dense layers, which add G channels each. Values are 0..1."""

    scale: int = 2
    D: int = 16
    C: int = 8
    G: int = 64
    channels: int = 3

    def __post_init__(self) -> None:
        _check("rdn_plain", self, (2, 3, 4))


@dataclass(frozen=True)
class RDNOriginalConfig:
    """As in RDNConfig. block_width: channels between the blocks, `nFeaSDB` in the authors' code; G0 is `nFeat`.
    mean: the mean colour, of values 0..1."""

    scale: int = 2
    D: int = 16
    C: int = 8
    G: int = 64
    G0: int = 64
    block_width: int = 64
    rgb_range: float = 255.0
    mean: tuple[float, ...] = RGB_MEAN
    kernel: ClassVar[int] = 3

    def __post_init__(self) -> None:
        _check("rdn_original", self, (1, 2, 3, 4, 8))

    @property
    def channels(self) -> int:
        """As many as the mean colour has."""
        return len(self.mean)

    @property
    def up_width(self) -> int:
        """Channels after each shuffle."""
        return self.G0


def _check(name: str, config: Any, scales: tuple[int, ...]) -> None:
    if config.scale not in scales:
        raise ValueError(f"{name}: expected scale to be one of {scales}; got {config.scale}")
    sizes = {f: getattr(config, f) for f in ("D", "C", "G", "G0", "block_width", "channels") if hasattr(config, f)}
    if min(sizes.values()) < 1:
        raise ValueError(f"{name}: expected sizes of at least 1; got {sizes}")


class DenseLayer(nn.Module):
    """A dense layer's convolution under EDSR-PyTorch's key `conv.0`."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.conv = numbered({0: ConvAct(in_channels, growth, act="relu")})


class DenseBlock(nn.Module):
    """The paper's residual dense block, with EDSR-PyTorch's keys."""

    float8 = False

    def __init__(self, width: int, growth: int, layers: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(DenseLayer(width + n * growth, growth) for n in range(layers))
        self.LFF = ConvAct(width + layers * growth, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return residual_dense(x, [*(layer.conv["0"] for layer in self.convs), self.LFF], self.float8)


class PlainLayer(nn.Module):
    """A dense layer's convolution under yjn870's key `conv`."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.conv = ConvAct(in_channels, growth, act="relu")


class PlainBlock(nn.Module):
    """The paper's residual dense block, with yjn870's keys."""

    float8 = False

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainLayer(width * (n + 1), width) for n in range(layers))
        self.lff = ConvAct(width * (layers + 1), width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return residual_dense(x, [*(layer.conv for layer in self.layers), self.lff], self.float8)


def residual_dense(x: Tensor, layers: list[ConvAct], float8: bool) -> Tensor:
    """x + fusion of x and everything the layers grow; the last layer is the 1x1 fusion."""
    return dense_block(x, [c.weight for c in layers], [c.bias for c in layers], float8=float8)


def dense_features(
    x: Tensor, shallow1: ConvAct, shallow2: ConvAct, blocks: Iterable[nn.Module], fusion: Iterable[nn.Module]
) -> Tensor:
    """Figure 2 up to the upsampler: two shallow layers, the blocks one after the other, a 1x1 and a 3x3 convolution
    over all their results, and the sum with the first shallow layer's."""
    first = shallow1(x)
    x = shallow2(first)
    results = []
    for block in blocks:
        x = block(x)
        results.append(x)
    fuse, smooth = fusion
    x = fuse(*results)
    results.clear()  # all that memory is free from here on
    return smooth(x, skip=first)


def upsampler(scale: int, in_channels: int, width: int, kernel: int) -> dict[int, nn.Module]:
    """Convolution and PixelShuffle, by 3 once, or by 2 until the scale is reached, each under its index."""
    factors = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
    layers: dict[int, nn.Module] = {}
    for r in factors:
        layers[2 * len(layers)] = ConvAct(width if layers else in_channels, width * r * r, kernel, shuffle=r)
    return layers


def scale_of(weights: list[Tensor]) -> int:
    """The upsampler's scale, given its convolutions and the one after them: a shuffle by r leaves 1/r^2 channels."""
    scale = 1
    for before, after in zip(weights[:-1], weights[1:]):
        ratio = before.shape[0] / after.shape[1]
        if ratio not in (4, 9):
            raise ValueError(f"between {before.shape[0]} and {after.shape[1]} channels there is no shuffle by 2 or 3")
        scale *= 2 if ratio == 4 else 3
    return scale


class RDN(Network):
    """The form of EDSR-PyTorch; see the module's docstring."""

    name = "rdn"
    Config: type = RDNConfig
    dialects = {"edsr": ("SFENet1.weight", "SFENet2.weight", "RDBs.0.convs.0.conv.0.weight", "GFF.0.weight")}
    hints = ("rgb_range",)
    float8_parts = ("RDBs",)

    mean_shift: ClassVar[bool] = False

    def __init__(self, config: RDNConfig | RDNOriginalConfig) -> None:
        super().__init__(config)
        self.colour = "y" if config.channels == 1 else "rgb"  # type: ignore[misc]
        g0, width, kernel = config.G0, config.block_width, config.kernel
        self.SFENet1, self.SFENet2 = ConvAct(config.channels, g0, kernel), ConvAct(g0, width, kernel)
        self.RDBs = nn.ModuleList(DenseBlock(width, config.G, config.C) for _ in range(config.D))
        self.GFF = numbered({0: ConvAct(config.D * width, g0, 1), 1: ConvAct(g0, g0, kernel)})
        layers = upsampler(config.scale, g0, config.up_width, kernel)
        layers[2 * len(layers)] = ConvAct(config.up_width if layers else g0, config.channels, kernel)
        self.UPNet = numbered(layers)

    @classmethod
    def detect(cls, state: State) -> str | None:
        """As for every network; the mean shift is what tells the original form from EDSR-PyTorch's."""
        return super().detect(state) if cls.mean_shift == ("subMean.weight" in state) else None

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> Any:
        """Sizes from shapes, the scale from the upsampler's; rgb_range is a hint, 255 in the authors' framework."""
        first = state["SFENet1.weight"]
        return RDNConfig(**cls._sizes(state), kernel=first.shape[2], channels=first.shape[1], **hints)

    @staticmethod
    def _sizes(state: State) -> dict[str, int]:
        tail = [state[f"UPNet.{n}.weight"] for n in indices(state, "UPNet")]
        return {
            "scale": scale_of(tail),
            "D": len(indices(state, "RDBs")),
            "C": len(indices(state, "RDBs.0.convs")),
            "G": state["RDBs.0.convs.0.conv.0.weight"].shape[0],
            "G0": state["SFENet1.weight"].shape[0],
        }

    @property
    def scales(self) -> tuple[int, ...]:
        """The upsampler's one factor."""
        return (self.config.scale,)

    @property
    def value_range(self) -> tuple[float, float]:
        """0..rgb_range."""
        return 0.0, self.config.rgb_range

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, channels, H, W) in 0..rgb_range -> (N, channels, H * scale, W * scale), not clipped."""
        return tail(self.UPNet.values(), self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Everything in front of the upsampler: (N, channels, H, W) -> (N, G0, H, W)."""
        return dense_features(x, self.SFENet1, self.SFENet2, self.RDBs, self.GFF.values())


class RDNOriginal(RDN):
    """The form of the authors' Torch7 code; see the module's docstring."""

    name = "rdn_original"
    Config: type = RDNOriginalConfig
    dialects = {"edsr": ("subMean.weight", *RDN.dialects["edsr"]), "torch7": ("modules.1.weight", "modules.1.bias")}
    mean_shift = True

    def __init__(self, config: RDNOriginalConfig) -> None:
        super().__init__(config)
        self.subMean = MeanShift(config.mean, -1, config.rgb_range)
        self.addMean = MeanShift(config.mean, +1, config.rgb_range)

    @classmethod
    def detect(cls, state: State) -> str | None:
        """As for every network; a Torch7 model is this one if it begins and ends with a 1x1 convolution of colours."""
        dialect = super(RDN, cls).detect(state)
        if dialect != "torch7":
            return dialect
        first, *_, last = [t.shape for key, t in state.items() if key.endswith(".weight")] * 2
        return dialect if first == last == (first[0], first[0], 1, 1) else None

    @classmethod
    def convert(cls, state: State, dialect: str) -> State:
        """The keys are the module's own, or paths in a Torch7 model, whose order is that of the layers."""
        if dialect == "edsr":
            return state
        paths = list(dict.fromkeys(key.rpartition(".")[0] for key in state))
        pointwise = [state[f"{path}.weight"].shape[-1] == 1 for path in paths]
        if sum(pointwise) < 4:
            raise ValueError(f"it has {sum(pointwise)} convolutions of 1x1 instead of 4 or more")
        blocks, layers = sum(pointwise) - 3, pointwise.index(True, 1) - 3  # but for both ends and the fusion of blocks
        names = ["subMean", "SFENet1", "SFENet2"]
        for d in range(blocks):
            names += [*(f"RDBs.{d}.convs.{c}.conv.0" for c in range(layers)), f"RDBs.{d}.LFF"]
        names += ["GFF.0", "GFF.1"]
        names += [f"UPNet.{2 * i}" for i in range(len(paths) - len(names) - 1)] + ["addMean"]
        own = dict(zip(paths, names))
        return {f"{own[path]}.{part}": t for key, t in state.items() for path, _, part in [key.rpartition(".")]}

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> RDNOriginalConfig:
        """Sizes from shapes; the mean colour and the value range from what subMean takes off."""
        mean, rgb_range = colour_shift({"sub_mean.bias": state["subMean.bias"]}, **hints)
        width = state["SFENet2.weight"].shape[0]
        return RDNOriginalConfig(**cls._sizes(state), block_width=width, rgb_range=rgb_range, mean=mean)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) in 0..rgb_range -> (N, 3, H * scale, W * scale), not clipped."""
        return tail([*self.UPNet.values(), self.addMean], self.features(self.subMean(x)))


class RDNPlain(Network):
    """The form of yjn870/RDN-pytorch; see the module's docstring."""

    name = "rdn_plain"
    Config = RDNPlainConfig
    dialects = {"yjn870": ("sfe1.weight", "sfe2.weight", "rdbs.0.layers.0.conv.weight", "gff.0.weight")}
    float8_parts = ("rdbs",)

    def __init__(self, config: RDNPlainConfig) -> None:
        super().__init__(config)
        self.colour = "y" if config.channels == 1 else "rgb"  # type: ignore[misc]
        g = config.G
        self.sfe1, self.sfe2 = ConvAct(config.channels, g), ConvAct(g, g)
        self.rdbs = nn.ModuleList(PlainBlock(g, config.C) for _ in range(config.D))
        self.gff = numbered({0: ConvAct(config.D * g, g, 1), 1: ConvAct(g, g)})
        self.upscale = numbered(upsampler(config.scale, g, g, kernel=3))
        self.output = ConvAct(g, config.channels)

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> RDNPlainConfig:
        """Sizes from shapes, the scale from the upsampler's."""
        tail = [state[f"upscale.{n}.weight"] for n in indices(state, "upscale")]
        return RDNPlainConfig(
            scale=scale_of([*tail, state["output.weight"]]),
            D=len(indices(state, "rdbs")),
            C=len(indices(state, "rdbs.0.layers")),
            G=state["sfe1.weight"].shape[0],
            channels=state["sfe1.weight"].shape[1],
        )

    @property
    def scales(self) -> tuple[int, ...]:
        """The upsampler's one factor."""
        return (self.config.scale,)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, channels, H, W) in 0..1 -> (N, channels, H * scale, W * scale), not clipped."""
        x = dense_features(x, self.sfe1, self.sfe2, self.rdbs, self.gff.values())
        return tail([*self.upscale.values(), self.output], x)
