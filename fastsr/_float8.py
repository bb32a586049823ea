"""Rounding to eight bits, e4m3: three bits of fraction, 2^-9 to 448. The definition that kernels follow.

All scales are powers of two, so that scaling is exact and a scale is a bfloat16. A floating-point format needs no
closer fit: what counts is the room above the largest value and below the values that still matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0  # of e4m3
MAPS, WEIGHTS = 4, 8  # largest values are scaled to below 2^4, with room for what grows of them, and 2^8


def scale(t: Tensor, dims: tuple[int, ...], power: int) -> Tensor:
    """The power of two by which the largest magnitude over `dims`, which are kept, divides to at most 2^power, and to
    half of that or more. 1 where all is zero. NaN is not counted."""
    largest = t.detach().float().abs().nan_to_num(0.0).amax(dims, keepdim=True)
    exponent = (torch.frexp(largest).exponent - power).clamp(min=-100)
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1.0).to(t.dtype)


def rounded(t: Tensor, by: Tensor) -> Tensor:
    """t / by in e4m3; what is larger than 448 becomes that."""
    return (t / by).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def through(t: Tensor, by: Tensor) -> Tensor:
    """t with the values that `rounded` leaves of it, in its own dtype."""
    return rounded(t, by).to(t.dtype) * by
