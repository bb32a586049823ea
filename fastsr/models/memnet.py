"""MemNet: A Persistent Memory Network for Image Restoration. Y. Tai, J. Yang, X. Liu, C. Xu, ICCV 2017.

Input and output: luma in 0..1, already enlarged by bicubic interpolation; one model serves x2, x3 and x4. (A file with
three input channels is taken as RGB.) Two forms:

* `MemNet` ("memnet"): the PyTorch port, weights of Vandermode/pytorch-MemNet. No biases, no shared weights, one output.
  Tested variant: M6R6 with 64 channels, against the port's output.
* `OriginalMemNet` ("memnet_original"): what the paper describes and the authors train in Caffe (tyshiwo/MemNet).
  UNPROVEN: no output of the authors' code is stored here; it is tested against a second statement of the same
  description, the paper's 677K weights and the layer counts 80 and 212 of M6R6 and M10R10. Its keys, beside the layers
  of the Caffe model that they stand for (mm and rr count from 01; BatchNorm is one layer here, BatchNorm and Scale
  there, and of the latter's copies of a shared convolution any one will do):

      conv1.bn, conv1.conv                   bn_conv1 and scale_conv1, conv1
      memory.<m>.bn_a.<r>, bn_b.<r>          bn_conv<mm>_<rr>_a and scale_conv<mm>_<rr>_a, the same with b
      memory.<m>.conv_a, conv_b              conv<mm>_<rr>_a, conv<mm>_<rr>_b, shared by all rr
      memory.<m>.gate.bn, gate.conv          bn_conv_transition_<mm> and scale_..., conv_transition_<mm>
      end_bn.<m>                             bn_conv_end_<mm> and scale_conv_end_<mm>
      end_conv                               conv_end_<mm>, shared by all mm
      ensemble (M,)                          weight_output_end_<mm>

  A .caffemodel of these layers loads; none that the authors trained has been seen.
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
from fastsr.nn import ConvAct
from fastsr.ops import memory_block, resize_bicubic

Unit = tuple[nn.BatchNorm2d, ConvAct, nn.BatchNorm2d, ConvAct]


@dataclass(frozen=True)
class MemNetConfig:
    """num_memblock: memory blocks (the paper's M). num_resblock: residual units, or recursions of one, in each (R)."""

    in_channels: int = 1
    channels: int = 64
    num_memblock: int = 6
    num_resblock: int = 6

    def __post_init__(self) -> None:
        if min(self.in_channels, self.channels, self.num_memblock, self.num_resblock) < 1:
            raise ValueError(f"memnet: expected every size to be at least 1; got {self}")


def affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(scale, shift), (C,) each, for which the evaluating bn(x) is scale * x + shift."""
    assert bn.running_mean is not None and bn.running_var is not None
    return packing.derived(_affine, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)


def _affine(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = weight.dtype
    wide = torch.promote_types(dtype, torch.float32)  # half precision is rounded once, at the end
    weight, bias, mean, var = (t.to(wide) for t in (weight, bias, mean, var))
    scale = weight / torch.sqrt(var + eps)
    return scale.to(dtype), (bias - mean * scale).to(dtype)


def bn_relu_conv(bn: nn.BatchNorm2d, conv: ConvAct, *inputs: Tensor, skip: Tensor | None = None) -> Tensor:
    """conv(relu(bn(concatenated inputs))) + skip. A bn in training takes the batch's statistics and updates its own."""
    if bn.training:
        return conv(F.relu(bn(torch.cat(inputs, 1))), skip=skip)
    scale, shift = affine(bn)
    return conv(*inputs, pre_scale=scale, pre_shift=shift, pre_relu=True, skip=skip)


class BNReLUConv(nn.Module):
    """Batch normalisation, ReLU, convolution."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, *, bias: bool = False) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = ConvAct(in_channels, out_channels, kernel_size, bias=bias)

    def forward(self, *inputs: Tensor, skip: Tensor | None = None) -> Tensor:
        return bn_relu_conv(self.bn, self.conv, *inputs, skip=skip)


def remember(units: list[Unit], gate: BNReLUConv, long_term: list[Tensor], *, long_term_first: bool) -> Tensor:
    """The memory block on the newest of long_term: one operator, or layer by layer where a batch norm is training."""
    norms = [bn for a, _, b, _ in units for bn in (a, b)]
    if any(bn.training for bn in [*norms, gate.bn]):
        u, short_term = long_term[-1], []
        for bn_a, conv_a, bn_b, conv_b in units:
            u = bn_relu_conv(bn_b, conv_b, bn_relu_conv(bn_a, conv_a, u), skip=u)
            short_term.append(u)
        return gate(*(long_term + short_term if long_term_first else short_term + long_term))
    convs = [conv for _, a, _, b in units for conv in (a, b)]
    convs = convs[:2] if all(conv is convs[i % 2] for i, conv in enumerate(convs)) else convs  # shared: packed once
    pre, gate_affine = [affine(bn) for bn in norms], affine(gate.bn)
    return memory_block(
        long_term, [conv.weight for conv in convs], [conv.bias for conv in convs if conv.bias is not None],
        [scale for scale, _ in pre], [shift for _, shift in pre],
        gate.conv.weight, gate.conv.bias, *gate_affine, long_term_first,
    )  # fmt: skip


class Interpolated(Network):
    """What the two forms have in common: they restore an image that is already interpolated to its final size."""

    Config = MemNetConfig
    hints = ()

    def __init__(self, config: MemNetConfig) -> None:
        super().__init__(config)
        self.colour = "rgb" if config.in_channels == 3 else "y"  # type: ignore[misc]

    @property
    def scales(self) -> tuple[int, ...]:
        """The authors train one model for these."""
        return 2, 3, 4

    def super_resolve(self, x: Tensor, scale: int) -> Tensor:
        height, width = x.shape[2] * scale, x.shape[3] * scale
        return self(resize_bicubic(x, height, width, float(scale), float(scale), "matlab"))


class ResidualBlock(nn.Module):
    """The port's residual unit, x + relu_conv2(relu_conv1(x)); its memory block runs it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.relu_conv1, self.relu_conv2 = BNReLUConv(channels, channels), BNReLUConv(channels, channels)


class MemoryBlock(nn.Module):
    """The port's memory block: the gate reads [unit_1, ..., unit_R, long-term, oldest first]."""

    def __init__(self, config: MemNetConfig, long_term: int) -> None:
        super().__init__()
        c, r = config.channels, config.num_resblock
        self.recursive_unit = nn.ModuleList([ResidualBlock(c) for _ in range(r)])
        self.gate_unit = BNReLUConv((r + long_term) * c, c, 1)

    def forward(self, long_term: list[Tensor]) -> Tensor:
        pairs = [(unit.relu_conv1, unit.relu_conv2) for unit in self.recursive_unit]
        units = [(a.bn, a.conv, b.bn, b.conv) for a, b in pairs]
        return remember(units, self.gate_unit, long_term, long_term_first=False)


class MemNet(Interpolated):
    """The PyTorch port; see the module's docstring."""

    name = "memnet"
    dialects = {
        "port": ("feature_extractor.conv.weight", "dense_memory.0.gate_unit.conv.weight", "reconstructor.conv.weight")
    }

    def __init__(self, config: MemNetConfig) -> None:
        super().__init__(config)
        self.feature_extractor = BNReLUConv(config.in_channels, config.channels)
        self.reconstructor = BNReLUConv(config.channels, config.in_channels)
        self.dense_memory = nn.ModuleList([MemoryBlock(config, m + 1) for m in range(config.num_memblock)])
        # No residual path leads around a block's gate, so the last block's rounding reaches the result undamped, and is
        # most of the error: with that block in bfloat16, some weights end below autocast.
        self.careful = (f"dense_memory.{config.num_memblock - 1}",)  # type: ignore[misc]

    @classmethod
    def convert(cls, state: State, dialect: str) -> State:
        """Files written before PyTorch 0.4.1 lack the batch counters, all of them; they start at zero."""
        if any(key.endswith(".num_batches_tracked") for key in state):
            return state
        norms = [key.removesuffix("running_mean") for key in state if key.endswith(".running_mean")]
        return {**state, **{norm + "num_batches_tracked": torch.tensor(0) for norm in norms}}

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> MemNetConfig:
        """Sizes from shapes, numbers of blocks and units from keys."""
        channels, in_channels = state["feature_extractor.conv.weight"].shape[:2]
        blocks, units = indices(state, "dense_memory"), indices(state, "dense_memory.0.recursive_unit")
        return MemNetConfig(in_channels, channels, len(blocks), len(units))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, in_channels, H, W) in 0..1, interpolated to its final size -> the restored image, not clipped."""
        long_term = [self.feature_extractor(x)]
        for block in self.dense_memory:
            long_term.append(block(long_term))
        return self.reconstructor(long_term[-1], skip=x)


class RecursiveMemoryBlock(nn.Module):
    """The original memory block: two convolutions used R times, each time with batch norms of their own; the gate reads
    [long-term, oldest first, unit_1, ..., unit_R]."""

    def __init__(self, config: MemNetConfig, long_term: int) -> None:
        super().__init__()
        c, r = config.channels, config.num_resblock
        self.bn_a = nn.ModuleList([nn.BatchNorm2d(c) for _ in range(r)])
        self.bn_b = nn.ModuleList([nn.BatchNorm2d(c) for _ in range(r)])
        self.conv_a, self.conv_b = ConvAct(c, c), ConvAct(c, c)
        self.gate = BNReLUConv((long_term + r) * c, c, 1, bias=True)

    def forward(self, long_term: list[Tensor]) -> Tensor:
        units = [(a, self.conv_a, b, self.conv_b) for a, b in zip(self.bn_a, self.bn_b, strict=True)]
        return remember(units, self.gate, long_term, long_term_first=True)


CAFFE_LAYERS = (
    ("conv1", "conv1.bn", "conv1.conv"),
    (r"conv(?P<m>\d+)_(?P<r>\d+)_(?P<i>[ab])", "memory.{m}.bn_{i}.{r}", "memory.{m}.conv_{i}"),
    (r"conv_transition_(?P<m>\d+)", "memory.{m}.gate.bn", "memory.{m}.gate.conv"),
    (r"conv_end_(?P<m>\d+)", "end_bn.{m}", "end_conv"),
)
"""Name in Caffe, of its batch norm here, of its convolution here; Caffe counts from 01."""


def from_caffe(state: State) -> State:
    """The Caffe model's tensors under the keys of `OriginalMemNet`; those of other layers keep their names.

    Caffe's BatchNorm holds running sums and, third, the factor to divide them by (zero before the first step of
    training, when they count as zero). Raises ValueError if copies of a shared convolution differ.
    """
    converted: dict[str, Tensor] = {}
    ensemble: dict[int, Tensor] = {}
    for key, value in state.items():
        layer, _, part = key.partition(".")
        if number := re.fullmatch(r"weight_output_end_(\d+)", layer):
            if value.numel() != 1:
                raise ValueError(f"expected {key} to be one weight; got {value.numel()}")
            ensemble[int(number[1])] = value.flatten()
            continue
        name = _own_layer(layer)
        if layer.startswith("bn_") and part in ("blobs.0", "blobs.1"):
            factor = state[f"{layer}.blobs.2"].flatten()[0]
            value = value.flatten() / factor if factor else torch.zeros_like(value.flatten())
            part = "running_mean" if part == "blobs.0" else "running_var"
        elif layer.startswith("bn_") and part == "blobs.2":
            part, value = "num_batches_tracked", torch.tensor(0)
        own = f"{name}.{part}"
        if own in converted and not torch.equal(converted[own], value):
            raise ValueError(f"expected {key} to equal the other copies of {own}, which is shared")
        converted[own] = value
    converted["ensemble"] = torch.cat([ensemble[m] for m in sorted(ensemble)])
    return converted


def _own_layer(layer: str) -> str:
    """The name here of a Caffe layer, or the same name if it is none of the network's."""
    convolution = re.sub("^(bn|scale)_", "", layer)
    for pattern, norm, conv in CAFFE_LAYERS:
        if found := re.fullmatch(pattern, convolution):
            numbers = {k: v if k == "i" else int(v) - 1 for k, v in found.groupdict().items()}
            return (conv if layer == convolution else norm).format(**numbers)
    return layer


class OriginalMemNet(Interpolated):
    """The multi-supervised network of the paper's figure 3; unproven, see the module's docstring."""

    name = "memnet_original"
    dialects = {
        "original": ("conv1.conv.weight", "memory.0.conv_a.weight", "end_conv.weight", "ensemble"),
        "caffe": ("conv01_01_a.weight", "conv_transition_01.weight", "weight_output_end_01.weight"),
    }

    def __init__(self, config: MemNetConfig) -> None:
        super().__init__(config)
        self.conv1 = BNReLUConv(config.in_channels, config.channels, bias=True)
        self.memory = nn.ModuleList([RecursiveMemoryBlock(config, m + 1) for m in range(config.num_memblock)])
        self.end_bn = nn.ModuleList([nn.BatchNorm2d(config.channels) for _ in range(config.num_memblock)])
        self.end_conv = ConvAct(config.channels, config.in_channels)
        self.ensemble = nn.Parameter(torch.ones(config.num_memblock))  # as Caffe's Scale layer starts

    @classmethod
    def convert(cls, state: State, dialect: str) -> State:
        return from_caffe(state) if dialect == "caffe" else state

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> MemNetConfig:
        """Sizes from shapes, numbers of blocks and recursions from keys."""
        channels, in_channels = state["conv1.conv.weight"].shape[:2]
        blocks, units = indices(state, "memory"), indices(state, "memory.0.bn_a")
        return MemNetConfig(in_channels, channels, len(blocks), len(units))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """x: (N, in_channels, H, W) in 0..1, interpolated to its final size -> the restored image, not clipped.

        That is the sum of the images made from each block's memory, weighted by `ensemble`. In training all are
        returned, (image_1, ..., image_M, sum): the authors' loss has the same weight on each.
        """
        long_term, images = [self.conv1(x)], []
        for block, bn in zip(self.memory, self.end_bn, strict=True):
            long_term.append(block(long_term))
            images.append(bn_relu_conv(bn, self.end_conv, long_term[-1], skip=x))
        total = sum(weight * image for weight, image in zip(self.ensemble, images, strict=True))
        return (*images, total) if self.training else total

    def super_resolve(self, x: Tensor, scale: int) -> Tensor:
        result = super().super_resolve(x, scale)
        return result[-1] if self.training else result
