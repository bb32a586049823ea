"""What every Triton kernel of this folder shares: images as pixels with a pitch, and a launch as data.

A launch is prepared before it runs. The same object is run on a device, compiled ahead of time for a device that is not
there, or put on a list to be walked again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LARGE = 2**31  # elements from which offsets inside one image need 64 bits


@dataclass(frozen=True)
class Launch:
    """One kernel call: its grid (at most three sizes), its arguments by name, and how many warps and stages it gets."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Runs it on the current stream."""
        self.kernel[self.grid](**self.args, **self.options)


@dataclass(frozen=True)
class Pixels:
    """An (N, C, H, W) tensor whose pixels each hold their channels side by side.

    Element (n, c, y, x) is at ((n * image + y * row) + x) * step + c. The step alone decides how a kernel may load, so
    it is what a kernel is compiled for; image and row, which follow the size of the image, are plain numbers.
    """

    tensor: Tensor
    step: int
    row: int
    image: int

    @property
    def pitch(self) -> tuple[int, int]:
        """Image and row as kernels take them, 2 n + 1 each: Triton compiles anew for a number in a tuple that becomes 1
        or a multiple of 16, whatever `do_not_specialize` says, and these never do."""
        return 2 * self.image + 1, 2 * self.row + 1

    @property
    def large(self) -> bool:
        """Whether offsets inside one image exceed 32 bits."""
        return self.image * self.step >= LARGE


def pixels(t: Tensor) -> Pixels | None:
    """The tensor as pixels with a pitch, or None if its strides are not of that kind (contiguous with C > 1, say)."""
    n, c, h, w = t.shape
    sn, sc, sy, sx = t.stride()
    if c > 1 and sc != 1:
        return None
    if w == 1:  # the stride of an axis of one element says nothing
        sx = sy if h > 1 else sn if n > 1 else c
    row = sy if h > 1 else sx * w
    image = sn if n > 1 else row * h
    if sx < c or row % sx or image % sx:
        return None
    return Pixels(t, sx, row // sx, image // sx)


def as_pixels(t: Tensor) -> Pixels:
    """The tensor as pixels, copied to channels-last only if it has to be."""
    found = pixels(t)
    if found is None:
        found = pixels(t.contiguous(memory_format=torch.channels_last))
    if found is None:  # channels-last by its strides alone, as where C = 1: torch saw no need to copy
        found = pixels(torch.empty_like(t, memory_format=torch.channels_last).copy_(t))
    assert found is not None
    return found


def power_of_two(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
