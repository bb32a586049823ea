"""SRFeat: Single Image Super-Resolution with Feature Discrimination.

S.-J. Park, H. Son, S. Cho, K.-S. Hong, S. Lee, ECCV 2018. Weights: HyeongseokSon1/SRFeat, TensorFlow; the keys here
are its variables by their place in the figure, only transposed. Input and output: RGB in -1..1, x4.
The authors' files are TensorLayer's: `.npz` with the list `params` of a network's arrays, in the order in which its
layers were made, convolutions as (height, width, in, out), dense layers as (in, out), batch normalisation as shift,
scale, mean and variance. VGG19 comes as `vgg19.npy`, a dict of lists [weight, bias].
Tested variants: the generator, the image and the feature discriminator, and the VGG19 features they and the perceptual
loss look at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr import packing
from fastsr.models.network import Network, State, indices
from fastsr.nn import ConvAct, fused
from fastsr.ops import res_block

SLOPE = 0.2
EPS = 1e-5
DECAY = 0.9
FEATURE_SCALE = 1 / 12.75  # of VGG's features, in front of the feature discriminator and in the perceptual loss
BGR_MEAN = (103.939, 116.779, 123.68)  # of ImageNet, for values 0..255


class BatchNorm(nn.Module):
    """Batch normalisation of (N, C, H, W) as TensorFlow has it: the running averages take the biased variance of the
    batch (torch's take the unbiased one), with decay 0.9, and no batches are counted."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)
        with torch.no_grad():
            self.running_mean.lerp_(x.mean((0, 2, 3)), 1 - DECAY)
            self.running_var.lerp_(x.var((0, 2, 3), correction=0), 1 - DECAY)
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=EPS)

    def folded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(weight, bias) of the convolution that does what a convolution with `weight` and no bias does, and then this
        layer in evaluation mode."""
        return packing.derived(_folded, weight, self.weight, self.bias, self.running_mean, self.running_var)


def _folded(weight: Tensor, factor: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    factor = factor * (var + EPS).rsqrt()
    return weight * factor[:, None, None, None], bias - mean * factor


def without_counters(state: State) -> State:
    """The state dict without the batch counters of torch's own batch normalisation, which ports to torch have."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


GENERATOR = re.compile("41((?:4111141111)+)4*?((?:41)+)41")  # the ranks of its arrays: blocks, 1x1s, upsampling, end
DISCRIMINATOR = re.compile("41((?:411111)+)2121")
BATCH_NORM = ("bias", "weight", "running_mean", "running_var")  # in TensorLayer's order


def listed(state: State) -> list[Tensor]:
    """The arrays of TensorLayer's list, in its order; none if the state dict is something else."""
    keys = [f"params.{i}" for i in range(len(state))]
    return [state[k] for k in keys] if all(k in state for k in keys) else []


def ranks(state: State) -> str:
    """The number of axes of each array in TensorLayer's list: 4 for a convolution, 2 for a dense layer, else 1."""
    return "".join(str(array.dim()) for array in listed(state))


def from_tensorflow(array: Tensor) -> Tensor:
    """A convolution's kernel or a dense layer's matrix with the output in front; anything else as it is."""
    return array.permute(3, 2, 0, 1) if array.dim() == 4 else array.t() if array.dim() == 2 else array


@dataclass(frozen=True)
class SRFeatConfig:
    """scale: 2, 4 or 8, a doubling for each upsampling layer. kernel: of the first convolution."""

    scale: int = 4
    features: int = 128
    blocks: int = 16
    channels: int = 3
    kernel: int = 9

    def __post_init__(self) -> None:
        if self.scale not in (2, 4, 8):
            raise ValueError(f"srfeat: expected scale to be 2, 4 or 8; got {self.scale}")
        if min(self.features, self.blocks, self.channels) < 1 or self.kernel % 2 == 0:
            raise ValueError(f"srfeat: expected sizes of at least 1 and an odd kernel; got {self}")


class Block(nn.Module):
    """x + bn2(conv2(leaky(bn1(conv1(x)))))."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = ConvAct(features, features, bias=False), BatchNorm(features)
        self.conv2, self.bn2 = ConvAct(features, features, bias=False), BatchNorm(features)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.bn2(self.conv2(F.leaky_relu(self.bn1(self.conv1(x)), SLOPE)))
        first, second = self.bn1.folded(self.conv1.weight), self.bn2.folded(self.conv2.weight)
        return res_block(x, *first, *second, act="leaky", slope=SLOPE)


class SRFeat(Network):
    """The generator: residual blocks, each of which also reaches the end through a 1x1 convolution."""

    name = "srfeat"
    Config = SRFeatConfig
    dialects = {
        "tensorflow": ("conv_in.weight", "blocks.0.bn1.running_mean", "up1.weight", "conv_out.weight"),
        "tensorlayer": ("params.0",),
    }

    def __init__(self, config: SRFeatConfig) -> None:
        super().__init__(config)
        f = config.features
        self.conv_in = ConvAct(config.channels, f, config.kernel)
        self.blocks = nn.ModuleList(Block(f) for _ in range(config.blocks))
        self.skips = nn.ModuleList(ConvAct(f, f, 1, bias=False) for _ in range(config.blocks - 1))
        for i in range(config.scale.bit_length() - 1):
            up = ConvAct(f, 4 * f, act="leaky", slope=SLOPE, shuffle=2, shuffle_order="tf")
            setattr(self, f"up{i + 1}", up)
        self.conv_out = ConvAct(f, config.channels)

    @classmethod
    def detect(cls, state: State) -> str | None:
        """As for every network; TensorLayer's list has no names, but the axes of its arrays follow each other so only
        in the generator."""
        dialect = super().detect(state)
        mine = dialect != "tensorlayer" or GENERATOR.fullmatch(ranks(state))
        return dialect if mine else None

    @classmethod
    def convert(cls, state: State, dialect: str) -> State:
        """The keys are the module's own, or the place in TensorLayer's list: the 1x1 convolutions come after all
        blocks, because the sum at the end is where they join its list of parameters."""
        found = GENERATOR.fullmatch(ranks(state))
        if dialect == "tensorflow" or found is None:
            return without_counters(state)
        blocks, ups = len(found[1]) // 10, len(found[2]) // 2
        names = ["conv_in.weight", "conv_in.bias"]
        for i in range(blocks):
            for n in (1, 2):
                names += [f"blocks.{i}.conv{n}.weight", *(f"blocks.{i}.bn{n}.{part}" for part in BATCH_NORM)]
        names += [f"skips.{i}.weight" for i in range(blocks - 1)]
        names += [f"up{i + 1}.{part}" for i in range(ups) for part in ("weight", "bias")]
        names += ["conv_out.weight", "conv_out.bias"]
        return {name: from_tensorflow(array) for name, array in zip(names, listed(state))}

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> SRFeatConfig:
        """Sizes from shapes, counts from keys."""
        features, channels, kernel, _ = state["conv_in.weight"].shape
        ups = [k for k in state if k.startswith("up") and k.endswith(".weight")]
        blocks = len(indices(state, "blocks"))
        return SRFeatConfig(2 ** len(ups), features, blocks, channels, kernel)

    @property
    def scales(self) -> tuple[int, ...]:
        """The factor of the upsampling layers."""
        return (self.config.scale,)

    @property
    def value_range(self) -> tuple[float, float]:
        return -1.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) RGB in -1..1 -> (N, 3, H * scale, W * scale), not clamped."""
        x = self.conv_in(x)
        *blocks, last = self.blocks
        branches = None  # the sum of the 1x1 branches; adding as they come keeps one image in memory, not fifteen
        for block, skip in zip(blocks, self.skips):
            x = block(x)
            branches = skip(x, skip=branches)
        x = last(x) if branches is None else last(x) + branches
        upsamplers = [getattr(self, f"up{i + 1}") for i in range(self.config.scale.bit_length() - 1)]
        return fused([*upsamplers, self.conv_out], x)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """channels: 3 for images, 512 for VGG's features. widths: output channels of the convolutions, of which every
    second halves the image. hidden: of the first dense layer. cells: pixels of the last map, which the dense layer
    fixes; 19 * 19 belongs to images of 296 x 296, the authors' patches, and 2 * 2 to their features."""

    channels: int = 3
    widths: tuple[int, ...] = (64, 64, 128, 128, 256, 256, 512, 512)
    hidden: int = 1024
    cells: int = 19 * 19

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.channels, self.hidden, self.cells, *self.widths) < 1:
            raise ValueError(f"srfeat_discriminator: expected two or more widths, all sizes at least 1; got {self}")


class SRFeatDiscriminator(Network):
    """The discriminator, for images or for VGG's features times FEATURE_SCALE. Its parts are torch's own."""

    name = "srfeat_discriminator"
    Config = DiscriminatorConfig
    dialects = {
        "tensorflow": ("conv0.weight", "conv1.weight", "bn1.running_mean", "fc1.weight", "fc2.weight"),
        "tensorlayer": ("params.0",),
    }

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__(config)
        channels = (config.channels, *config.widths)
        for i, width in enumerate(config.widths):
            setattr(self, f"conv{i}", nn.Conv2d(channels[i], width, 3, stride=1 + i % 2))
            if i > 0:
                setattr(self, f"bn{i}", BatchNorm(width))
        self.fc1 = nn.Linear(config.cells * config.widths[-1], config.hidden)
        self.fc2 = nn.Linear(config.hidden, 1)

    @classmethod
    def detect(cls, state: State) -> str | None:
        """As for every network; of TensorLayer's lists, those whose arrays have the axes of this chain of layers."""
        dialect = super().detect(state)
        mine = dialect != "tensorlayer" or DISCRIMINATOR.fullmatch(ranks(state))
        return dialect if mine else None

    @classmethod
    def convert(cls, state: State, dialect: str) -> State:
        """The keys are the module's own, or the place in TensorLayer's list."""
        if dialect == "tensorflow":
            return without_counters(state)
        names = ["conv0.weight", "conv0.bias"]
        for i in range(1, ranks(state).count("4")):
            names += [f"conv{i}.weight", f"conv{i}.bias", *(f"bn{i}.{part}" for part in BATCH_NORM)]
        names += ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
        return {name: from_tensorflow(array) for name, array in zip(names, listed(state))}

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> DiscriminatorConfig:
        """Sizes from shapes. Only the number of the last map's pixels is known, not how they lie."""
        layers = [k for k in state if k.startswith("conv") and k.endswith(".weight")]
        widths = tuple(state[f"conv{i}.weight"].shape[0] for i in range(len(layers)))
        hidden, inputs = state["fc1.weight"].shape
        if inputs % widths[-1]:
            raise ValueError(f"fc1 has {inputs} inputs, which is no multiple of the {widths[-1]} channels in front")
        return DiscriminatorConfig(state["conv0.weight"].shape[1], widths, hidden, inputs // widths[-1])

    @property
    def value_range(self) -> tuple[float, float]:
        """Of images; features have none."""
        return -1.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, channels, H, W) -> (N, 1), logits: positive for what looks real. The image has to end in
        `config.cells` pixels, at halves rounded up; raises ValueError if it does not."""
        for i in range(len(self.config.widths)):
            x = getattr(self, f"conv{i}")(pad_same(x, 1 + i % 2))
            x = F.leaky_relu(getattr(self, f"bn{i}")(x) if i > 0 else x, SLOPE)
        cells = x.shape[2] * x.shape[3]
        if cells != self.config.cells:
            raise ValueError(
                f"srfeat_discriminator: expected an image that ends in {self.config.cells} pixels; got one that ends "
                f"in {x.shape[2]} x {x.shape[3]}; cut it to the size of the patches that the weights were trained on"
            )
        x = x.permute(0, 2, 3, 1).flatten(1)  # the dense layer counts channels fastest
        return self.fc2(F.leaky_relu(self.fc1(x), SLOPE))


def pad_same(x: Tensor, stride: int) -> Tensor:
    """Zero padding that TensorFlow's SAME means for a 3x3 convolution: at stride 2 an even length gets one row behind
    it and none in front."""
    height, width = (1 if stride == 1 else size % 2 for size in x.shape[2:])
    return F.pad(x, (width, 1, height, 1))


@dataclass(frozen=True)
class VGGConfig:
    """widths: channels of the blocks. depths: convolutions in each; (2, 2, 4, 4, 4) is VGG19 up to conv5_4."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    depths: tuple[int, ...] = (2, 2, 4, 4, 4)

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.depths) or min(*self.widths, *self.depths, len(self.widths)) < 1:
            raise ValueError(f"srfeat_vgg19: expected one width and one depth a block, all at least 1; got {self}")


class SRFeatVGG(Network):
    """The features of VGG19 (K. Simonyan, A. Zisserman, ICLR 2015) that SRFeat compares: conv5_4 after its ReLU. The
    convolutions are torch's own."""

    name = "srfeat_vgg19"
    Config = VGGConfig
    dialects = {"caffe": ("conv1_1.weight", "conv1_1.bias"), "numpy": ("conv1_1.0", "conv1_1.1")}

    def __init__(self, config: VGGConfig) -> None:
        super().__init__(config)
        last = 3
        for block, (width, depth) in enumerate(zip(config.widths, config.depths), 1):
            for i in range(1, depth + 1):
                setattr(self, f"conv{block}_{i}", nn.Conv2d(last, width, 3, padding=1))
                last = width

    @classmethod
    def convert(cls, state: State, dialect: str) -> State:
        """The keys are the module's own, or those of `vgg19.npy`, whose dense layers are not needed."""
        if dialect == "caffe":
            return state
        parts = {"0": "weight", "1": "bias"}
        found = {re.fullmatch(r"(conv\d+_\d+)\.([01])", key): array for key, array in state.items()}
        return {f"{m[1]}.{parts[m[2]]}": from_tensorflow(array) for m, array in found.items() if m}

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> VGGConfig:
        """Sizes from shapes, counts from keys."""
        found = (re.fullmatch(r"conv(\d+)_(\d+)\.weight", k) for k in state)
        layers = [(int(m[1]), int(m[2])) for m in found if m]
        blocks = range(1, 1 + max(block for block, _ in layers))
        depths = tuple(max((i for block, i in layers if block == b), default=0) for b in blocks)
        return VGGConfig(tuple(state[f"conv{b}_1.weight"].shape[0] for b in blocks), depths)

    @property
    def value_range(self) -> tuple[float, float]:
        return -1.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) RGB in -1..1, clipped to it, so that pixels outside get no gradient -> (N, 512, H/16, W/16),
        halves rounded up: the features, not yet times FEATURE_SCALE."""
        x = 255 * ((x + 1) / 2).clamp(0, 1)
        x = x.flip(1) - x.new_tensor(BGR_MEAN)[:, None, None]
        for block, depth in enumerate(self.config.depths, 1):
            x = x if block == 1 else F.max_pool2d(x, 2, ceil_mode=True)
            for i in range(1, depth + 1):
                x = F.relu(getattr(self, f"conv{block}_{i}")(x))
        return x

    def loss(self, image: Tensor, target: Tensor) -> Tensor:
        """The perceptual loss, a scalar: the mean squared difference of the features of the two, times FEATURE_SCALE.
        image, target: (N, 3, H, W) RGB in -1..1."""
        return F.mse_loss(FEATURE_SCALE * self(image), FEATURE_SCALE * self(target))
