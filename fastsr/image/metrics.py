"""How far two images are apart."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 11  # pixels, of structural similarity


def psnr(a: Tensor | np.ndarray, b: Tensor | np.ndarray, *, shave: int = 0) -> float:
    """Peak signal-to-noise ratio in decibels: 10 log10(peak^2 / mean squared error); infinite for equal images.

    a, b: two NumPy uint8 images (H, W) or (H, W, C), peak 255, or two floating-point tensors (..., H, W) with values
    0..1, peak 1; of one shape. shave: this many pixels on every side are left out, by custom the scale factor.
    All values count alike: for the luma PSNR of papers, pass `fastsr.image.colour.rgb_to_y` of both.
    Raises TypeError for other kinds, ValueError for unequal shapes or a shave that leaves nothing.
    """
    x, y = _comparable("psnr", a, b, shave)
    error = (x - y).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Tensor | np.ndarray, b: Tensor | np.ndarray, *, shave: int = 0) -> float:
    """Structural similarity, at most 1: Z. Wang et al., IEEE Trans. Image Processing, 2004, in float64.

    a, b, shave and errors are those of `psnr`. Windows are 11 x 11 Gaussians of sigma 1.5 that lie whole inside what
    `shave` leaves, K1 = 0.01 and K2 = 0.03; colour is the mean over its channels. Raises ValueError where none fits.
    """
    x, y = _comparable("ssim", a, b, shave)
    x, y = (v.reshape(-1, 1, *v.shape[-2:]) for v in (x, y))
    if min(x.shape[-2:]) < WINDOW:
        raise ValueError(f"ssim: expected at least {WINDOW}x{WINDOW} pixels, got {x.shape[-2]}x{x.shape[-1]}")
    position = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    window = torch.exp(-(position**2) / (2 * 1.5**2))
    window = window / window.sum()

    def mean(v: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(v, window[None, None, :, None]), window[None, None, None, :])

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.mean().item()


def _comparable(name: str, a: Tensor | np.ndarray, b: Tensor | np.ndarray, shave: int) -> tuple[Tensor, Tensor]:
    """Two images as float64 tensors (..., H, W) with values 0..1, without `shave` pixels on every side."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.dtype == b.dtype == np.uint8:
        x, y = (torch.from_numpy(v.astype(np.float64) / 255) for v in (a, b))
        x, y = (v.movedim(2, 0) if v.dim() == 3 else v for v in (x, y))
    elif isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point() and b.is_floating_point():
        x, y = a.double(), b.double()
    else:
        kinds = " and ".join(f"{type(v).__name__} of {getattr(v, 'dtype', 'no dtype')}" for v in (a, b))
        raise TypeError(f"{name}: expected two NumPy uint8 images or two floating-point tensors 0..1, got {kinds}")
    if x.shape != y.shape or x.dim() < 2:
        raise ValueError(f"{name}: expected images of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    height, width = x.shape[-2:]
    if shave < 0 or min(height, width) <= 2 * shave:
        raise ValueError(f"{name}: shave={shave} leaves nothing of {height}x{width} pixels")
    inner = (..., slice(shave, height - shave), slice(shave, width - shave))
    return x[inner], y[inner]
