"""EnhanceNet: Single Image Super-Resolution Through Automated Texture Synthesis.

M. S. M. Sajjadi, B. Scholkopf, M. Hirsch, ICCV 2017. Weights: msmsajjadi/EnhanceNet-Code, a TensorFlow checkpoint. Keys
are its layer names with `.weight` (torch layout) and `.bias`. Input and output: RGB in 0..1.
Tested variants: x4, the same generator for every one of the paper's losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastsr import packing
from fastsr.models.network import Network, State
from fastsr.nn import ConvAct, fused
from fastsr.ops import res_block, resize_bicubic

TRAINING_MEAN = (0.47614917, 0.45001204, 0.40904046)  # of the authors' training images, RGB


@dataclass(frozen=True)
class EnhanceNetConfig:
    """rgb_mean: subtracted in front and added at the end; it stands in no file."""

    scale: int = 4
    blocks: int = 10
    features: int = 64
    channels: int = 3
    rgb_mean: tuple[float, ...] = TRAINING_MEAN

    def __post_init__(self) -> None:
        if self.scale != 4:
            raise ValueError(f"enhancenet: expected scale to be 4, the only one the network has; got {self.scale}")
        if min(self.blocks, self.features, self.channels) < 1:
            raise ValueError(f"enhancenet: expected sizes of at least 1; got {self}")
        if len(self.rgb_mean) != self.channels:
            expected = f"rgb_mean, which is not in the file, to have one value for each of {self.channels} channels"
            raise ValueError(f"enhancenet: expected {expected}; got {self.rgb_mean}")


class EnhanceNet(Network):
    """The generator of the paper's table 1; see the module's docstring."""

    name = "enhancenet"
    Config = EnhanceNetConfig
    dialects = {
        "tensorflow": ("Conv.weight", "Conv_1.weight", "Conv_2.weight"),
        "tensorflow checkpoint": ("generator/Conv/weights", "generator/Conv_1/weights", "generator/Conv_2/weights"),
    }
    hints = ("rgb_mean",)
    fixed = ("scale",)

    def __init__(self, config: EnhanceNetConfig) -> None:
        super().__init__(config)
        c, f = config.channels, config.features
        self.colour = "y" if c == 1 else "rgb"  # type: ignore[misc]
        first = 2 * config.blocks + 1  # the number of the first layer after the blocks
        self.Conv = ConvAct(c, f, act="relu")
        for n in range(1, first):
            setattr(self, f"Conv_{n}", ConvAct(f, f, act="relu" if n % 2 else "none"))
        for n in (first, first + 1):
            setattr(self, f"Conv_{n}", ConvAct(f, f, act="relu", upsample=2))
        setattr(self, f"Conv_{first + 2}", ConvAct(f, f, act="relu"))
        setattr(self, f"Conv_{first + 3}", ConvAct(f, c))

    @classmethod
    def convert(cls, state: State, dialect: str) -> State:
        """A checkpoint's variables (height, width, in, out) under their layers' names. What training adds is left out:
        other scopes, and what an optimiser keeps of a variable, which is named below it."""
        if dialect == "tensorflow":
            return state
        kinds = {"weights": "weight", "biases": "bias"}
        converted = {}
        for key, value in state.items():
            layer, _, kind = key.removeprefix("generator/").rpartition("/")
            if key.startswith("generator/") and f"generator/{layer}" not in state:
                name = f"{layer}.{kinds.get(kind, kind)}"
                converted[name] = value.permute(3, 2, 0, 1).contiguous() if value.dim() == 4 else value
        return converted

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> EnhanceNetConfig:
        """Sizes from shapes, the number of blocks from the number of layers."""
        features, channels = state["Conv.weight"].shape[:2]
        layers = sum(key.startswith("Conv") and key.endswith(".weight") for key in state)
        if layers < 7 or layers % 2 == 0:
            raise ValueError(f"expected 5 layers and two for each block; there are {layers}")
        mean = tuple(hints.get("rgb_mean", TRAINING_MEAN))
        return EnhanceNetConfig(blocks=(layers - 5) // 2, features=features, channels=channels, rgb_mean=mean)

    @property
    def scales(self) -> tuple[int, ...]:
        """4."""
        return (self.config.scale,)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) RGB in 0..1 -> (N, 3, 4 * H, 4 * W) in the same range, not clipped."""
        mean, minus_mean = packing.derived(_mean, self.Conv.weight, self.config.rgb_mean)
        # the mean is subtracted on load, so that the zero padding stays zero
        y = self.Conv(x, pre_shift=minus_mean)
        layers = [getattr(self, f"Conv_{n}") for n in range(1, 2 * self.config.blocks + 5)]
        blocks, end = layers[:-4], layers[-4:]
        for a, b in zip(blocks[::2], blocks[1::2], strict=True):
            y = res_block(y, a.weight, a.bias, b.weight, b.bias, act="relu")
        mean = mean[:, None, None]
        return fused(end, y, skip=self.interpolate(x - mean)) + mean

    def interpolate(self, x: Tensor) -> Tensor:
        """The image that the last layer's residual is added to: TensorFlow 1's bicubic, not a centred one."""
        r, (h, w) = self.config.scale, x.shape[-2:]
        return resize_bicubic(x, h * r, w * r, float(r), float(r), "tf1")


def _mean(like: Tensor, values: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The mean and its negative, in the dtype and on the device of the weights."""
    mean = like.new_tensor(values)
    return mean, -mean
