"""SFTGAN: Recovering Realistic Texture in Image Super-resolution by Deep Spatial Feature Transform.

X. Wang, K. Yu, C. Dong, C. C. Loy, CVPR 2018. Weights: xinntao/SFTGAN. Two networks for x4, which need to be told what
is where in the image: `model(image, condition)`, RGB in 0..1 and class probabilities. A third, the segmentation
network, says it: `condition(segmentation, image)`.
Tested variants: SFT_Net (noBN_OST_bg), SFT_Net_torch (the paper's) and OutdoorSceneSeg (segmentation_OST).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr.image.resize import imresize
from fastsr.models.network import Network, State, indices
from fastsr.nn import ConvAct, chain, fused, numbered
from fastsr.ops import sft_block, sft_layer

CLASSES = ("background", "sky", "water", "grass", "mountain", "building", "plant", "animal")
BGR_MEAN = (103.939, 116.779, 123.68)  # subtracted from 0..255 in front of the segmentation network
SCALE = 4
COND_SLOPE = 0.1


@dataclass(frozen=True)
class SFTConfig:
    """paper: SFT_Net_torch, the paper's network, else SFT_Net; they differ in far more than their keys show.
    condition: channels of the shared condition. hidden: of a branch. cond_hidden: inside the condition network."""

    paper: bool = False
    blocks: int = 16
    features: int = 64
    channels: int = 3
    classes: int = len(CLASSES)
    condition: int = 32
    hidden: int = 32
    cond_hidden: int = 128

    def __post_init__(self) -> None:
        sizes = (self.features, self.channels, self.classes, self.condition, self.hidden, self.cond_hidden)
        if min(*sizes, self.blocks) < 1:
            raise ValueError(f"sftgan: expected sizes of at least 1; got {self}")

    @property
    def slope(self) -> float:
        """Of the leaky ReLU inside the branches."""
        return 0.01 if self.paper else 0.1


class SFTLayer(nn.Module):
    """Features scaled and shifted by maps that two branches make of the condition."""

    def __init__(self, config: SFTConfig) -> None:
        super().__init__()
        self.config = config
        for name in ("scale", "shift"):
            setattr(self, f"SFT_{name}_conv0", ConvAct(config.condition, config.hidden, 1))
            setattr(self, f"SFT_{name}_conv1", ConvAct(config.hidden, config.features, 1))

    def branch(self, name: str) -> list[Tensor]:
        """[weight, bias, weight, bias] of the branch "scale" or "shift"."""
        layers = (getattr(self, f"SFT_{name}_conv{i}") for i in (0, 1))
        return [t for layer in layers for t in (layer.weight, layer.bias)]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        config = self.config
        return sft_layer(x, condition, self.branch("scale"), self.branch("shift"), config.slope, not config.paper)


class SFTBlock(nn.Module):
    """The residual block with a transform in front of each convolution."""

    def __init__(self, config: SFTConfig) -> None:
        super().__init__()
        self.config = config
        self.sft0, self.sft1 = SFTLayer(config), SFTLayer(config)
        self.conv0, self.conv1 = (ConvAct(config.features, config.features) for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        a, b = self.sft0, self.sft1
        return sft_block(
            x, condition, a.branch("scale"), a.branch("shift"), self.conv0.weight, self.conv0.bias,
            b.branch("scale"), b.branch("shift"), self.conv1.weight, self.conv1.bias,
            self.config.slope, self.config.paper,
        )  # fmt: skip


class SFTNet(Network):
    """A residual network whose every block, and its end, is told by the condition what it looks at."""

    name = "sftgan"
    Config = SFTConfig
    dialects = {
        "SFT_Net": ("CondNet.0.weight", "sft_branch.0.sft0.SFT_scale_conv0.weight", "HR_branch.0.weight"),
        "SFT_Net_torch": ("CondNet.0.weight", "sft_branch.0.sft0.SFT_scale_conv0.weight", "HR_branch.1.weight"),
    }
    careful = ("HR_branch.6",)  # one convolution from the result, which shows two thirds of its error

    def __init__(self, config: SFTConfig) -> None:
        super().__init__(config)
        f, h, slope = config.features, config.cond_hidden, COND_SLOPE
        self.conv0 = ConvAct(config.channels, f)
        blocks: list[nn.Module] = [SFTBlock(config) for _ in range(config.blocks)]
        self.sft_branch = numbered(dict(enumerate([*blocks, SFTLayer(config), ConvAct(f, f)])))
        if config.paper:
            upsamplers = {i: ConvAct(f, f, upsample=2, act="relu") for i in (1, 4)}
        else:
            upsamplers = {i: ConvAct(f, 4 * f, act="relu", shuffle=2) for i in (0, 3)}
        self.HR_branch = numbered({**upsamplers, 6: ConvAct(f, f, act="relu"), 8: ConvAct(f, config.channels)})
        stem = ConvAct(config.classes, h, SCALE, stride=SCALE, padding=0, act="leaky", slope=slope)
        middle = {i: ConvAct(h, h, 1, act="leaky", slope=slope) for i in (2, 4, 6)}
        self.CondNet = numbered({0: stem, **middle, 8: ConvAct(h, config.condition, 1)})

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> SFTConfig:
        """Sizes from shapes; the variant from the places of the upsampling convolutions."""
        branch = indices(state, "sft_branch")
        return SFTConfig(
            paper=dialect == "SFT_Net_torch",
            blocks=len([i for i in branch if f"sft_branch.{i}.conv0.weight" in state]),
            features=state["conv0.weight"].shape[0],
            channels=state["conv0.weight"].shape[1],
            classes=state["CondNet.0.weight"].shape[1],
            condition=state["CondNet.8.weight"].shape[0],
            hidden=state["sft_branch.0.sft0.SFT_scale_conv0.weight"].shape[0],
            cond_hidden=state["CondNet.0.weight"].shape[0],
        )

    @property
    def scales(self) -> tuple[int, ...]:
        """x4 only: the condition network's first layer reads cells of 4x4."""
        return (SCALE,)

    def forward(self, image: Tensor | tuple[Tensor, Tensor], condition: Tensor | None = None) -> Tensor:
        """image: (N, 3, H, W) RGB in 0..1. condition: (N, 8, 4H, 4W), the probabilities of CLASSES, which sum to 1.
        Also takes the pair as one argument, as the authors' does. Returns (N, 3, 4H, 4W). Raises ValueError for a
        condition that is missing or of another shape."""
        if isinstance(image, tuple):
            image, condition = image
        self._check(image, condition)
        condition = chain(self.CondNet, condition)
        head = x = self.conv0(image)
        *transforms, conv = self.sft_branch.values()
        for transform in transforms:
            x = transform(x, condition)
        return fused(self.HR_branch.values(), conv(x, skip=head))

    def _check(self, image: Tensor, condition: Tensor | None) -> None:
        n, _, h, w = image.shape
        shape = (n, self.config.classes, h * SCALE, w * SCALE)
        if condition is None or tuple(condition.shape) != shape:
            got = "none" if condition is None else list(condition.shape)
            raise ValueError(
                f"sftgan: expected a condition of shape {list(shape)}, class probabilities for every pixel of the "
                f"result; got {got}. Pass model(image, condition); "
                "fastsr.models.sftgan.condition(segmentation, image) makes one with a loaded OutdoorSceneSeg"
            )

    def super_resolve(self, x: Tensor, scale: int, condition: Tensor | None = None) -> Tensor:
        """As the base class says; `condition` as in `forward`, and as needed."""
        return self(x, condition)


@dataclass(frozen=True)
class SegConfig:
    """stem: output channels of the first three convolutions. blocks: bottlenecks of each stage. widths: inside them.
    outs: of each stage's result. head: of the last 3x3 convolution."""

    channels: int = 3
    stem: tuple[int, int, int] = (64, 64, 128)
    blocks: tuple[int, int, int, int] = (3, 4, 23, 3)
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    outs: tuple[int, int, int, int] = (256, 512, 1024, 2048)
    head: int = 512
    classes: int = len(CLASSES)

    def __post_init__(self) -> None:
        stages = (self.blocks, self.widths, self.outs)
        sizes = (self.channels, self.head, self.classes, *self.stem, *(n for stage in stages for n in stage))
        if len(self.stem) != 3 or any(len(stage) != 4 for stage in stages) or min(sizes) < 1:
            raise ValueError(f"outdoor_scene_seg: expected 3 stem sizes, 4 stages, all at least 1; got {self}")
        before = (self.stem[-1], *self.outs[:-1])
        if any(a == b for a, b in zip(before, self.outs)):  # a stage is told by the projection in front of it
            raise ValueError(f"outdoor_scene_seg: expected each stage to change the number of channels; got {self}")


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride and the dilation, 1x1, each with batch normalisation; added to the input, which is
    projected where the block changes the number of channels."""

    def __init__(self, channels: int, width: int, out: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        layers = [
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out),
        ]  # fmt: skip
        self.res = nn.Sequential(*layers)
        if channels != out:
            self.proj = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu((self.proj(x) if hasattr(self, "proj") else x) + self.res(x))


class OutdoorSceneSeg(Network):
    """The segmentation of outdoor scenes that SFTGAN's condition is made of: a dilated ResNet-101 at 1/8 of the size,
    then a transposed convolution per class. Its parts are torch's own."""

    name = "outdoor_scene_seg"
    Config = SegConfig
    dialects = {"official": ("feature.0.weight", "feature.10.res.0.weight", "deconv.weight")}

    def __init__(self, config: SegConfig) -> None:
        super().__init__(config)
        channels = (config.channels, *config.stem)
        layers: list[nn.Module] = []
        for i in range(3):
            conv = nn.Conv2d(channels[i], channels[i + 1], 3, 2 if i == 0 else 1, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(channels[i + 1]), nn.ReLU()]
        layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))  # no padding, unlike ResNet's own
        last = config.stem[-1]
        for stage, (stride, dilation) in enumerate(((1, 1), (2, 1), (1, 2), (1, 4))):
            for block in range(config.blocks[stage]):
                width, out = config.widths[stage], config.outs[stage]
                layers.append(Bottleneck(last, width, out, stride if block == 0 else 1, dilation))
                last = out
        head = [nn.Conv2d(last, config.head, 3, padding=1, bias=False), nn.BatchNorm2d(config.head), nn.ReLU()]
        layers += [*head, nn.Dropout(0.1), nn.Conv2d(config.head, config.classes, 1)]
        self.feature = nn.Sequential(*layers)
        n = config.classes
        self.deconv = nn.ConvTranspose2d(n, n, 16, 8, 4, groups=n, bias=False)

    @classmethod
    def convert(cls, state: State, dialect: str) -> State:
        """Files written before torch 0.4.1 have no batch counters."""
        counters = {k.replace("running_mean", "num_batches_tracked") for k in state if k.endswith("running_mean")}
        return {k: torch.tensor(0) for k in counters} | dict(state)

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> SegConfig:
        """Sizes from shapes; a stage begins where a block has a projection."""
        numbers = indices(state, "feature")
        blocks = [i for i in numbers if f"feature.{i}.res.0.weight" in state]
        first = [i for i in blocks if f"feature.{i}.proj.0.weight" in state]
        ends = [*first[1:], blocks[-1] + 1]
        after = blocks[-1] + 1

        def sizes(key: str) -> tuple[int, ...]:
            return tuple(state[f"feature.{i}.res.{key}.weight"].shape[0] for i in first)

        return SegConfig(
            channels=state["feature.0.weight"].shape[1],
            stem=tuple(state[f"feature.{i}.weight"].shape[0] for i in (0, 3, 6)),
            blocks=tuple(end - start for start, end in zip(first, ends)),
            widths=sizes("0"),
            outs=sizes("6"),
            head=state[f"feature.{after}.weight"].shape[0],
            classes=state["deconv.weight"].shape[0],
        )

    @property
    def value_range(self) -> tuple[float, float]:
        """Before BGR_MEAN is subtracted."""
        return 0.0, 255.0

    def logits(self, x: Tensor) -> Tensor:
        """What the softmax of `forward` takes."""
        return self.deconv(self.feature(x))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W), BGR in 0..255 minus BGR_MEAN, H and W multiples of 8 -> (N, 8, H, W), the probabilities of
        CLASSES. Other sizes give a multiple of 8, as the authors' network does: 8n - 5 to 8n + 2 give 8n."""
        return F.softmax(self.logits(x), 1)


def condition(segmentation: OutdoorSceneSeg, image: Tensor) -> Tensor:
    """The condition of SFTNet for images to be enlarged: (N, 3, H, W) RGB in 0..1 -> (N, 8, 4H, 4W), sums of 1.

    As the authors' test script: the image is enlarged by the bicubic `imresize` and segmented. They cut images so that
    4H and 4W are multiples of 8; here the last row and column are repeated up to one, and what is too much cut off.
    Raises ValueError.
    """
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"condition: image: expected (N, 3, H, W), got {tuple(image.shape)}")
    large = imresize(image, SCALE)
    height, width = large.shape[2:]
    large = F.pad(large, (0, -width % 8, 0, -height % 8), mode="replicate")
    bgr = 255 * large.flip(1) - large.new_tensor(BGR_MEAN)[:, None, None]
    return segmentation(bgr)[:, :, :height, :width]
