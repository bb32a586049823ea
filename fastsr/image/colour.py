"""Colour conversions, ITU-R BT.601. Tensors (N, C, H, W), any floating dtype, values 0..1 (8-bit values over 255).

`ycbcr` is MATLAB's `rgb2ycbcr`, on which the published luma PSNRs rest: luma 16..235 and chroma 16..240, over 255.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows Y, Cb, Cr; columns R, G, B: what full-scale red, green, blue add, in 8-bit levels.
_LEVELS = torch.tensor(
    [[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]], dtype=torch.float64
)
_MATRIX = _LEVELS / 255
_INVERSE = torch.linalg.inv(_MATRIX)
_OFFSET = torch.tensor([16.0, 128.0, 128.0], dtype=torch.float64) / 255
_GRAY = torch.tensor([[0.299, 0.587, 0.114]], dtype=torch.float64)


def rgb_to_ycbcr(image: Tensor) -> Tensor:
    """(N, 3, H, W) RGB -> (N, 3, H, W) Y Cb Cr. Raises ValueError for another number of channels."""
    return _mix(image, _MATRIX) + _column(_OFFSET, image)


def ycbcr_to_rgb(image: Tensor) -> Tensor:
    """(N, 3, H, W) Y Cb Cr -> (N, 3, H, W) RGB, not clipped: not every Y Cb Cr triple is a colour."""
    return _mix(image - _column(_OFFSET, image), _INVERSE)


def rgb_to_y(image: Tensor) -> Tensor:
    """(N, 3, H, W) RGB -> (N, 1, H, W) luma, 16/255..235/255 and not rounded."""
    return _mix(image, _MATRIX[:1]) + _column(_OFFSET[:1], image)


def rgb_to_gray(image: Tensor) -> Tensor:
    """(N, 3, H, W) RGB -> (N, 1, H, W) full-range gray, 0.299 R + 0.587 G + 0.114 B: equal channels stay unchanged."""
    return _mix(image, _GRAY)


def _mix(image: Tensor, matrix: Tensor) -> Tensor:
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"image: expected three colour channels, (N, 3, H, W), got {tuple(image.shape)}")
    return torch.einsum("oc,nchw->nohw", matrix.to(image), image)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like)[:, None, None]
