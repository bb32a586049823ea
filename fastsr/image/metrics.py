"""How far two images are apart."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def psnr(a: Tensor | np.ndarray, b: Tensor | np.ndarray, *, shave: int = 0) -> float:
    """Peak signal-to-noise ratio in decibels: 10 log10(peak^2 / mean squared error); infinite for equal images.

    a, b: two NumPy uint8 images (H, W) or (H, W, C), peak 255, or two floating-point tensors (..., H, W) with values
    0..1, peak 1; of one shape. shave: this many pixels on every side are left out, by custom the scale factor.
    All values count alike: for the luma PSNR of papers, pass `fastsr.image.colour.rgb_to_y` of both.
    Raises TypeError for other kinds, ValueError for unequal shapes or a shave that leaves nothing.
    """
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.dtype == b.dtype == np.uint8:
        x, y = (torch.from_numpy(v.astype(np.float64) / 255) for v in (a, b))
        rows, columns = 0, 1
    elif isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point() and b.is_floating_point():
        x, y = a.double(), b.double()
        rows, columns = -2, -1
    else:
        kinds = " and ".join(f"{type(v).__name__} of {getattr(v, 'dtype', 'no dtype')}" for v in (a, b))
        raise TypeError(f"psnr: expected two NumPy uint8 images or two floating-point tensors 0..1, got {kinds}")
    if x.shape != y.shape or x.dim() < 2:
        raise ValueError(f"psnr: expected images of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    height, width = x.shape[rows], x.shape[columns]
    if shave < 0 or min(height, width) <= 2 * shave:
        raise ValueError(f"psnr: shave={shave} leaves nothing of {height}x{width} pixels")
    difference = x - y
    difference = difference.narrow(rows, shave, height - 2 * shave).narrow(columns, shave, width - 2 * shave)
    error = difference.square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)
