"""ZSSR: "Zero-Shot" Super-Resolution using Deep Internal Learning. A. Shocher, N. Cohen, M. Irani, CVPR 2018.

The network alone: it takes an image already interpolated to the wanted size. There are no trained weights to fetch;
`fastsr.train.zssr` learns them from each image. Input and output: RGB or one channel in 0..1. Tested variants: that of
assafshocher/ZSSR (width 64) and that of the PyTorch port HarukiYqM/pytorch-ZSSR (width 128), whose keys these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastsr.image.resize import imresize
from fastsr.models.network import Network, State
from fastsr.nn import ConvAct, fused


@dataclass(frozen=True)
class ZSSRConfig:
    """depth: convolutions, the first and last included. residual: the input is added to the output.
    relu_input: the port's ReLU in front of the first layer, in place, so that what is added has no negatives either."""

    channels: int = 3
    width: int = 64
    depth: int = 8
    residual: bool = True
    relu_input: bool = False

    def __post_init__(self) -> None:
        if min(self.channels, self.width) < 1 or self.depth < 3:
            raise ValueError(f"zssr: expected channels and width of at least 1, depth of at least 3; got {self}")


class ZSSR(Network):
    """3x3 convolutions without bias, ReLU between them; see the module's docstring.

    Files with these keys are the port's, so `load` sets relu_input unless told otherwise by the hint.
    """

    name = "zssr"
    Config = ZSSRConfig
    dialects = {"port": ("input.weight", "conv1.weight", "output.weight")}
    hints = ("residual", "relu_input")
    # All of it is one operator, whose maps no residual path leads around: rounded ones, which autocast has too, would
    # alone bring it down to autocast's error.
    float_maps = True

    def __init__(self, config: ZSSRConfig) -> None:
        super().__init__(config)
        c, f = config.channels, config.width
        self.colour = "y" if c == 1 else "rgb"  # type: ignore[misc]
        self.input = ConvAct(c, f, bias=False, act="relu")
        for n in range(1, config.depth - 1):
            setattr(self, f"conv{n}", ConvAct(f, f, bias=False, act="relu"))
        self.output = ConvAct(f, c, bias=False)

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> ZSSRConfig:
        """Sizes from shapes, the depth from the number of layers."""
        width, channels = state["input.weight"].shape[:2]
        return ZSSRConfig(channels, width, depth=len(state), **{"relu_input": True, **hints})

    @property
    def scales(self) -> tuple[int, ...]:
        """What the network was trained for stands in no file; it keeps the size, so any factor works."""
        return 2, 3, 4

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) in 0..1, interpolated to the wanted size -> the same shape, not clipped."""
        if self.config.relu_input:
            x = F.relu(x)
        middle = [getattr(self, f"conv{n}") for n in range(1, self.config.depth - 1)]
        return fused([self.input, *middle, self.output], x, skip=x if self.config.residual else None)

    def super_resolve(self, x: Tensor, scale: int) -> Tensor:
        return self(imresize(x, scale))
