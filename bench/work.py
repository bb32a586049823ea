"""How much work a network is: the arithmetic of its convolutions, and how little of it the known algorithms leave.

`gflop` counts two operations a multiply-add of the direct convolution, as written in the eager definition, so a faster
algorithm shows as more GFLOP/s. `floor` divides each layer's count by what its best practical algorithm saves:

* 3x3, stride 1, at least 8 channels a group on both sides: Winograd F(4x4,3x3), 144 / 36 = 4. It is also what nearest
  upsampling in front, as four phases, comes to.
* 5x5 likewise: F(3x3,5x5), 225 / 49 = 4.59; in bfloat16 F(2x2,5x5), 100 / 36 = 2.78, as 49 lose too many bits.
* Kernels of size r + 4 at stride r, r = 2, 4, 8, padding 2, in either direction: phases of 3x3 taps, 4; of 2x2 taps,
  F(4x4,2x2) with 64 / 25 = 2.56, in bfloat16 F(3x3,2x2) with 36 / 16 = 2.25; of 2x2, 2x1 and 1x1 taps, 144 / 81 = 1.78.
* Everything else, 1x1 and the layers from or to an image among it: 1.

The floor of the time is the remaining arithmetic at the machine's measured rate: no memory traffic, no transforms, no
second of anything else. Layers from or to an image (up to four channels) stay float32 in bfloat16 networks. Linear
tails that are merged into one convolution (RCAN, RDN, MSRN) are not subtracted: a few percent there.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsr.train.trainer import PlainOperators

IMAGE = 4  # channels up to which a layer reads or writes images
NARROW = 8  # channels a group below which Winograd's transforms cost more than they save


@dataclass(frozen=True)
class Layer:
    """One convolution. pixels: of the map it makes, or of the one it reads if transposed, times the batch."""

    cin: int
    cout: int
    kernel: int
    stride: int
    groups: int
    transposed: bool
    pixels: int

    @property
    def flop(self) -> float:
        """Two a multiply-add of the direct form."""
        return 2.0 * self.pixels * self.kernel**2 * self.cin * self.cout / self.groups

    @property
    def at_an_end(self) -> bool:
        """Whether it reads or writes an image."""
        return min(self.cin, self.cout) <= IMAGE

    def gain(self, dtype: str) -> float:
        """By how much the best algorithm divides the multiplications; dtype is "f32" or "bf16"."""
        if min(self.cin, self.cout) // self.groups < NARROW:
            return 1.0
        if self.stride == 1 and self.kernel == 3:
            return 144 / 36
        if self.stride == 1 and self.kernel == 5:
            return 225 / 49 if dtype == "f32" else 100 / 36
        if self.kernel == self.stride + 4:
            phases = {2: 144 / 36, 4: 64 / 25 if dtype == "f32" else 36 / 16, 8: 144 / 81}
            return phases.get(self.stride, 1.0)
        return 1.0


class _Recorder(TorchDispatchMode):
    """Notes every convolution that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Layer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, _, _, transposed, _, groups = args[:9]
            cin, cout = x.shape[1], result.shape[1]
            counted = x if transposed else result
            pixels = counted.shape[0] * math.prod(counted.shape[2:])
            self.layers.append(Layer(cin, cout, weight.shape[-1], stride[0], groups, transposed, pixels))
        return result


def layers(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Layer]:
    """The convolutions of one call, found without computing anything."""
    # In inference mode a convolution does not come apart into the operator that is recorded.
    with torch.inference_mode(False), torch.no_grad(), PlainOperators(), _Recorder() as recorder:
        shadow = copy.deepcopy(module).to("meta")
        shadow(*(x.to("meta") for x in inputs))
    return recorder.layers


def gflop(found: list[Layer]) -> float:
    """Of the direct convolutions, 1e9 operations."""
    return sum(layer.flop for layer in found) / 1e9


def floor_gflop(found: list[Layer], dtype: str) -> float:
    """What the algorithms above leave, 1e9 operations of `dtype`; in "bf16", layers at an end count twice, as float32
    has half the rate."""
    weight = {True: 2.0 if dtype == "bf16" else 1.0, False: 1.0}
    return sum(layer.flop / layer.gain(dtype) * weight[layer.at_an_end] for layer in found) / 1e9
