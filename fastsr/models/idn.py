"""IDN: Fast and Accurate Single Image Super-Resolution via Information Distillation Network.

Z. Hui, X. Wang, X. Gao, CVPR 2018. Weights: Zheng222/IDN-Caffe; keys are its layers' names with `.weight` and `.bias`.
Input and output: luma in 0..1 (16..235 over 255 for colour images). Tested variants: x2, x3 and x4.

The weights do not say the scale: the transposed convolution that enlarges has 17x17 of them for every scale. A Caffe
file names its stride, and so the scale; else it is given once, `fastsr.load(file, scale=4)`, or in each call,
`model(x, scale=4)`. A call that knows no scale raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsr.models.network import Network, State
from fastsr.nn import ConvAct
from fastsr.ops import conv_act, distillation_block, resize_bicubic

SCALES = (2, 3, 4)  # what the authors publish


def check_scale(scale: Any) -> None:
    """Raises ValueError unless scale is a positive int."""
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"idn: expected scale to be a positive integer; got {scale!r}")


@dataclass(frozen=True)
class IDNConfig:
    """scale: None is unknown. block_widths: channels that the six convolutions of a block make, the second and fifth
    in `groups` groups. slice: how many of the third's channels bypass the last three."""

    scale: int | None = None
    channels: int = 1
    features: int = 64
    blocks: int = 4
    block_widths: tuple[int, ...] = (48, 32, 64, 64, 48, 80)
    slice: int = 16
    groups: int = 4
    leaky_slope: float = 0.05
    upsample_kernel: int = 17

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_widths", tuple(self.block_widths))
        w, g = self.block_widths, self.groups
        if self.scale is not None:
            check_scale(self.scale)
        if min(self.channels, self.features, self.blocks, self.slice, g, *w) < 1 or len(w) != 6:
            raise ValueError(f"idn: expected every size to be at least 1 and six block_widths; got {self}")
        if w[2] <= self.slice or w[5] != self.features + self.slice:
            raise ValueError(
                f"idn: expected block_widths[2] > slice and block_widths[5] = features + slice; got {self}"
            )
        if any(width % g for width in (w[0], w[1], w[3], w[4])):
            raise ValueError(f"idn: expected block_widths 0, 1, 3 and 4 to be multiples of groups; got {self}")
        if self.upsample_kernel % 2 == 0:
            raise ValueError(f"idn: expected an odd upsample_kernel; got {self.upsample_kernel}")


class Upsample(nn.ConvTranspose2d):
    """The transposed convolution to the residual image, (n - 1) * scale + 1 long; its stride is an argument."""

    def forward(self, x: Tensor, scale: int, skip: Tensor | None = None) -> Tensor:  # type: ignore[override]
        padding = int(self.padding[0])
        return conv_act([x], self.weight, self.bias, scale, padding, transposed=True, skip=skip)


class IDN(Network):
    """The network of the paper's figure 1; see the module's docstring."""

    name = "idn"
    Config = IDNConfig
    dialects = {"caffe": ("conv1.weight", "conv2.weight", "conv3_1.weight", "down1.weight", "upsample.weight")}
    hints = ("scale",)
    fixed = ("leaky_slope",)

    def __init__(self, config: IDNConfig) -> None:
        super().__init__(config)
        self.colour = "rgb" if config.channels == 3 else "y"  # type: ignore[misc]
        f, k, w, g = config.features, config.upsample_kernel, config.block_widths, config.groups
        leaky = {"act": "leaky", "slope": config.leaky_slope}
        self.conv1 = ConvAct(config.channels, f, **leaky)
        self.conv2 = ConvAct(f, f, **leaky)
        inputs = (f, w[0], w[1], w[2] - config.slice, w[3], w[4])
        for n in range(config.blocks):  # the authors count on: blocks are conv3 ... conv6, their ends down1 ... down4
            for i in range(6):
                layer = ConvAct(inputs[i], w[i], groups=g if i in (1, 4) else 1, **leaky)
                setattr(self, f"conv{n + 3}_{i + 1}", layer)
            setattr(self, f"down{n + 1}", ConvAct(w[5], f, 1, **leaky))
        self.upsample = Upsample(f, config.channels, k, config.scale or 1, k // 2)

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> IDNConfig:
        """Sizes from shapes; the scale is a hint, a user's or a Caffe file's, or unknown."""
        widths = tuple(state[f"conv3_{i}.weight"].shape[0] for i in range(1, 7))
        return IDNConfig(
            channels=state["conv1.weight"].shape[1],
            features=state["conv2.weight"].shape[0],
            blocks=sum(key.startswith("down") and key.endswith(".weight") for key in state),
            block_widths=widths,
            slice=widths[2] - state["conv3_4.weight"].shape[1],
            groups=widths[0] // state["conv3_2.weight"].shape[1],
            upsample_kernel=state["upsample.weight"].shape[2],
            **hints,
        )

    @property
    def scales(self) -> tuple[int, ...]:
        """The scale it was loaded for; while that is unknown, those that the authors publish."""
        return SCALES if self.config.scale is None else (self.config.scale,)

    def block(self, x: Tensor, number: int) -> Tensor:
        """Distillation block 1, 2, ...: (N, features, H, W) -> the same shape."""
        names = [*(f"conv{number + 2}_{i}" for i in range(1, 7)), f"down{number}"]
        layers = [getattr(self, name) for name in names]
        return distillation_block(x, [m.weight for m in layers], [m.bias for m in layers], self.config.leaky_slope)

    def features(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, features, H, W): all that comes before the transposed convolution."""
        x = self.conv2(self.conv1(x))
        for n in range(self.config.blocks):
            x = self.block(x, n + 1)
        return x

    @staticmethod
    def bicubic(x: Tensor, scale: int) -> Tensor:
        """The image that the residual is added to, MATLAB's enlarged x: (N, channels, H * scale, W * scale)."""
        return resize_bicubic(x, x.shape[2] * scale, x.shape[3] * scale, float(scale), float(scale), "matlab")

    def forward(self, x: Tensor, scale: int | None = None) -> Tensor:
        """x: (N, channels, H, W) -> (N, channels, (H - 1) * scale + 1, (W - 1) * scale + 1), not clipped.

        Pixel (0, 0) of the result is pixel (scale - 1, scale - 1) of the enlarged image: the first scale - 1 rows and
        columns are missing. Raises ValueError if the scale is unknown, or not the one it was loaded for.
        """
        scale = self._known(scale)
        y = self.features(x)
        return self.upsample(y, scale, self.bicubic(x, scale)[:, :, scale - 1 :, scale - 1 :])

    def super_resolve(self, x: Tensor, scale: int) -> Tensor:
        """As in `Network`; the first scale - 1 rows and columns, which the network does not make, are the bicubic
        image's, all others the authors' values."""
        first = self._known(scale) - 1
        whole = self.bicubic(x, scale)
        made = self.upsample(self.features(x), scale, whole[:, :, first:, first:])
        return torch.cat([whole[:, :, :first], torch.cat([whole[:, :, first:, :first], made], 3)], 2)

    def _known(self, scale: int | None) -> int:
        """The scale of a call, which may leave out what the configuration says."""
        known = self.config.scale
        if known is not None and scale not in (None, known):
            raise ValueError(f"idn: expected scale={known}, for which the network was loaded; got {scale}")
        scale = known if scale is None else scale
        if scale is None:
            raise ValueError(
                "idn: the scale is not known, as the weights do not say it; give it in the call, model(x, scale=4), "
                "or when loading, fastsr.load(file, scale=4)"
            )
        check_scale(scale)
        return scale
