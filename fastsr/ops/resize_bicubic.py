"""Bicubic resizing in the two definitions that the networks were trained with.

"matlab" is the `imresize` of MATLAB: Keys' cubic with a = -1/2, centres of pixels at half-integers, the image mirrored
at its borders, the kernel widened by 1/scale along an axis that shrinks. "tf1" is the `resize_bicubic` of TensorFlow 1
before half-pixel centres: a = -3/4, sample i reads position i / scale, taps clamped to the image, never widened, and
the four coefficients looked up in a table of 1024 steps a pixel. Both are separable. Bound by memory: 4 taps an axis.
R. Keys, "Cubic convolution interpolation for digital image processing", IEEE Trans. ASSP, 1981.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastsr.op import empty_image, expect, op

Taps = tuple[np.ndarray, np.ndarray]  # of one axis: positions (taps, samples) int64, weights (taps, samples) float64
METHODS = ("matlab", "tf1")
BORDERS = ("mirror", "clamp", "mirror_end")


def keys_cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' piecewise cubic of support [-2, 2], elementwise."""
    x = np.abs(x)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))


@lru_cache(maxsize=256)
def centred_taps(
    size: int,
    count: int,
    scale: float,
    kernel: Callable[[np.ndarray], np.ndarray] = keys_cubic,
    radius: float = 2.0,
    stretch: float | None = None,
    border: str = "mirror",
) -> Taps:
    """Where `count` samples read an axis of `size` pixels, and with which weights (each sample's sum to 1).

    Sample i sits at (i + 1/2) / scale - 1/2. The kernel, zero beyond `radius`, is widened by `stretch`
    (default: 1/scale where that is more than 1). A position outside is mirrored about the edge of the image ("mirror"),
    or stands for the pixel at that edge ("clamp"); "mirror_end" mirrors at the far end only, and drops what lies before
    pixel 0 and scales the rest up.
    """
    if stretch is None:
        stretch = max(1.0, 1.0 / scale)
    centre = (np.arange(count) + 0.5) / scale - 0.5
    reach = radius * stretch
    first = np.floor(centre - reach).astype(np.int64)
    position = first + np.arange(int(np.ceil(2 * reach)) + 2)[:, None]
    weight = kernel((centre - position) / stretch)
    if border == "mirror_end":
        weight = np.where(position < 0, 0.0, weight)
    weight = weight / weight.sum(axis=0)
    if border == "clamp":
        position = position.clip(0, size - 1)
    else:
        position = position % (2 * size)  # the mirrored image has period 2 * size, however far the kernel reaches
        position = np.minimum(position, 2 * size - 1 - position)
    used = weight.any(axis=1)
    return position[used], weight[used]


@lru_cache(maxsize=256)
def tf1_taps(size: int, count: int, scale: float) -> Taps:
    """The taps of TensorFlow 1: aligned top left, clamped, each coefficient that of the nearest 1/1024 of a pixel."""
    centre = np.arange(count) / scale
    first = np.floor(centre)
    fraction = np.rint((centre - first) * 1024) / 1024
    offset = np.arange(-1, 3)[:, None]
    position = np.clip(first.astype(np.int64) + offset, 0, size - 1)
    return position, keys_cubic(fraction - offset, a=-0.75)


def resample(x: Tensor, rows: Taps | None, columns: Taps | None) -> Tensor:
    """Applies taps to the last two axes of x (N, C, H, W), the axis that shrinks most first; None leaves an axis."""
    axes = [(dim, taps) for dim, taps in ((2, rows), (3, columns)) if taps is not None]
    axes.sort(key=lambda axis: axis[1][0].shape[1] / x.shape[axis[0]])
    y = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision is rounded once, at the end
    for dim, taps in axes:
        position = torch.from_numpy(taps[0]).to(x.device)
        weight = torch.from_numpy(taps[1]).to(y)
        weight = weight.unsqueeze(-1) if dim == 2 else weight
        total = y.index_select(dim, position[0]) * weight[0]
        for index, factor in zip(position[1:], weight[1:], strict=True):
            total = torch.addcmul(total, y.index_select(dim, index), factor)
        y = total
    return y.to(x.dtype)


@op
def resize_bicubic(
    x: Tensor, height: int, width: int, scale_y: float, scale_x: float, method: str = "matlab"
) -> Tensor:
    """x (N, C, H, W), floating point, any range -> (N, C, height, width) in the layout and dtype of x.

    The scales say where samples are taken, height and width how many of them; `method` is "matlab" or "tf1".
    """
    taps = centred_taps if method == "matlab" else tf1_taps
    return resample(x, taps(x.shape[2], height, scale_y), taps(x.shape[3], width, scale_x))


@resize_bicubic.check
def _(x, height, width, scale_y, scale_x, method):
    expect(x.dim() == 4 and x.is_floating_point(), "x is (N, C, H, W) and floating point", x=x)
    expect(x.shape[2] > 0 and x.shape[3] > 0, "x has at least one row and one column", x=x)
    expect(height > 0 and width > 0, "height and width are positive", height=height, width=width)
    expect(scale_y > 0 and scale_x > 0, "scale_y and scale_x are positive", scale_y=scale_y, scale_x=scale_x)
    expect(method in METHODS, f"method is one of {METHODS}", method=method)


@resize_bicubic.alloc
def _(x, height, width, scale_y, scale_x, method):
    return empty_image(x, (x.shape[0], x.shape[1], height, width))


@resize_bicubic.samples
def _(make):
    yield make(1, 2, 5, 7), 10, 14, 2.0, 2.0, "matlab"  # grows
    yield make(1, 2, 7, 6), 3, 9, 0.4, 1.5, "matlab"  # one axis shrinks, one grows
    yield make(1, 2, 5, 3), 20, 12, 4.0, 4.0, "tf1"
    yield make(1, 3, 48, 48), 192, 192, 4.0, 4.0, "matlab"  # training patch
    yield make(1, 3, 339, 510), 1356, 2040, 4.0, 4.0, "tf1"  # DIV2K x4 frame, odd height
