"""Resizing of images: MATLAB's `imresize` with its kernels, resizing by a measured blur kernel, back-projection.

Everything here takes (N, C, H, W) tensors, any floating dtype and range, and is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr.ops.resize_bicubic import BORDERS, Taps, centred_taps, keys_cubic, resample, resize_bicubic

Scale = float | Sequence[float]
Kernel = str | np.ndarray | Tensor


def _box(x: np.ndarray) -> np.ndarray:
    return ((x >= -0.5) & (x < 0.5)).astype(np.float64)


def _linear(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _lanczos2(x: np.ndarray) -> np.ndarray:
    return np.sinc(x) * np.sinc(x / 2) * (np.abs(x) < 2)


def _lanczos3(x: np.ndarray) -> np.ndarray:
    return np.sinc(x) * np.sinc(x / 3) * (np.abs(x) < 3)


KERNELS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {  # the function and its radius in pixels
    "box": (_box, 0.5),
    "linear": (_linear, 1.0),
    "cubic": (keys_cubic, 2.0),
    "lanczos2": (_lanczos2, 2.0),
    "lanczos3": (_lanczos3, 3.0),
}


def pair(scale: Scale) -> tuple[float, float]:
    """One number for both axes, or (vertical, horizontal). Raises ValueError unless both are positive and finite."""
    y, x = (scale, scale) if isinstance(scale, (int, float)) else scale
    if not (0 < y < math.inf and 0 < x < math.inf):
        raise ValueError(f"scale: expected positive finite numbers, got {scale}")
    return float(y), float(x)


def scaled_shape(height: int, width: int, scale: Scale) -> tuple[int, int]:
    """Sizes times scale, rounded up as MATLAB does, but not for a rounding error (10 * 1.1 is 11, not 12)."""
    y, x = pair(scale)
    return math.ceil(round(height * y, 9)), math.ceil(round(width * x, 9))


def imresize(
    image: Tensor,
    scale: Scale | None = None,
    *,
    shape: tuple[int, int] | None = None,
    kernel: Kernel = "cubic",
    antialias: bool | str = True,
    border: str = "mirror",
) -> Tensor:
    """MATLAB's `imresize` of image (N, C, H, W), floating point -> (N, C, H', W') of the same dtype, not clipped.

    scale: one number or (vertical, horizontal). shape: (H', W'), by default ceil(size * scale). With both, the scale
    says where samples are taken and the shape how many; with shape alone the scale is H' / H, W' / W.
    kernel: "cubic", "linear", "box", "lanczos2", "lanczos3", or a 2-D blur kernel, which is correlated with the image
    (not flipped), its middle on the pixel at size // 2, and of which samples 1/scale apart are kept; only for scales
    of at most 1. antialias: widen the kernel along the axes that shrink; "vertical" lets the vertical scale decide for
    both axes, and widens (or narrows) both. border: what lies outside the image, for kernels given by name: "mirror"
    repeats it backwards, "clamp" repeats its outermost pixels, "mirror_end" is "mirror" but leaves out what lies above
    and to the left. The first two are both MATLAB's: files that it made in 2017 are clamped, its later versions and
    IDN's code mirror; they differ near the borders only.
    antialias="vertical" with border="mirror_end" is how the code published with ZSSR resizes.
    Raises ValueError for a shape, scale or kernel that is not one of these.
    """
    if image.dim() != 4 or not image.is_floating_point() or 0 in image.shape:
        raise ValueError(
            f"imresize: image: expected a non-empty floating-point (N, C, H, W), got {tuple(image.shape)} {image.dtype}"
        )
    height, width = image.shape[2:]
    if scale is None and shape is None:
        raise ValueError("imresize: expected scale or shape, got neither")
    scale = pair(scale) if scale is not None else (shape[0] / height, shape[1] / width)
    shape = tuple(shape) if shape is not None else scaled_shape(height, width, scale)
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"imresize: shape: expected two positive sizes, got {shape}")
    if not isinstance(kernel, str):
        return _blur_and_sample(image, scale, shape, torch.as_tensor(kernel))
    if kernel not in KERNELS:
        raise ValueError(f"imresize: kernel: expected one of {', '.join(KERNELS)} or a 2-D array, got {kernel!r}")
    if antialias not in (True, False, "vertical"):
        raise ValueError(f"imresize: antialias: expected True, False or 'vertical', got {antialias!r}")
    if border not in BORDERS:
        raise ValueError(f"imresize: border: expected one of {', '.join(BORDERS)}, got {border!r}")
    if kernel == "cubic" and antialias is True and border == "mirror":
        return resize_bicubic(image, *shape, *scale)
    function, radius = KERNELS[kernel]

    def taps(axis: int) -> Taps | None:
        size, count, factor = image.shape[2 + axis], shape[axis], scale[axis]
        if factor == 1.0 and size == count:
            return None
        stretch = max(1.0, 1.0 / factor) if antialias else 1.0
        if antialias == "vertical":
            stretch = 1.0 / factor if scale[0] < 1 else 1.0
        return centred_taps(size, count, factor, function, radius, stretch, border)

    return resample(image, taps(0), taps(1))


def _blur_and_sample(image: Tensor, scale: tuple[float, float], shape: tuple[int, int], kernel: Tensor) -> Tensor:
    if kernel.dim() != 2 or kernel.numel() == 0:
        raise ValueError(f"imresize: kernel: expected a 2-D array, got shape {tuple(kernel.shape)}")
    if max(scale) > 1:
        raise ValueError(f"imresize: a blur kernel needs scales of at most 1, got {scale}; enlarge with 'cubic'")
    for dim in (2, 3):
        size, reach = image.shape[dim], kernel.shape[dim - 2]
        position = torch.arange(-(reach // 2), size + (reach - 1) // 2) % (2 * size)
        position = torch.minimum(position, 2 * size - 1 - position)
        image = image.index_select(dim, position.to(image.device))
    n, c, h, w = image.shape
    blurred = F.conv2d(image.reshape(n * c, 1, h, w), kernel.to(image)[None, None])
    blurred = blurred.view(n, c, *blurred.shape[2:])
    for dim, factor, count in zip((2, 3), scale, shape, strict=True):
        last = blurred.shape[dim] - 1 / factor
        position = torch.from_numpy(np.rint(np.linspace(0, last, count)).astype(np.int64))
        blurred = blurred.index_select(dim, position.clamp_(0, blurred.shape[dim] - 1).to(image.device))
    return blurred


def kernel_shift(kernel: np.ndarray, scale: Scale) -> np.ndarray:
    """Moves a 2-D blur kernel (H, W) so that shrinking with it by 1/scale lines up with cubic interpolation.

    The centre of mass comes to size / 2 + (scale - size % 2) / 2 along each axis, by a cubic-spline shift after
    padding with zeros so that nothing is cut off. Returns float64, larger than the kernel; the sum is not touched.
    """
    kernel = np.asarray(kernel, dtype=np.float64)
    if kernel.ndim != 2 or not kernel.sum() > 0:
        raise ValueError(f"kernel_shift: kernel: expected a 2-D array of positive sum, got shape {kernel.shape}")
    shifts = []
    for axis, factor in enumerate(pair(scale)):
        size = kernel.shape[axis]
        centre = (kernel.sum(axis=1 - axis) * np.arange(size)).sum() / kernel.sum()
        shifts.append(size / 2 + (factor - size % 2) / 2 - centre)
    kernel = np.pad(kernel, math.ceil(max(map(abs, shifts))) + 1)
    rows, columns = (_spline_shift(size, shift) for size, shift in zip(kernel.shape, shifts, strict=True))
    return rows @ kernel @ columns.T


def _spline_shift(size: int, shift: float) -> np.ndarray:
    """The (size, size) matrix that shifts a signal by `shift` samples through its interpolating cubic spline.

    The spline's coefficients mirror about the first and last sample; positions outside the signal give zero.
    """

    def rows(position: np.ndarray) -> np.ndarray:  # values of the mirrored B-spline basis at these positions
        first = np.floor(position).astype(np.int64)
        matrix = np.zeros((len(position), size))
        period = max(1, 2 * size - 2)
        for index in (first - 1, first, first + 1, first + 2):
            x = np.abs(position - index)
            basis = np.where(x < 1, (4 + x * x * (3 * x - 6)) / 6, np.maximum(0.0, 2 - x) ** 3 / 6)
            np.add.at(matrix, (np.arange(len(position)), (size - 1) - np.abs(size - 1 - index % period)), basis)
        return matrix

    position = np.arange(size) - shift
    inside = (position >= 0) & (position <= size - 1)
    return inside[:, None] * rows(position) @ np.linalg.inv(rows(np.arange(size, dtype=np.float64)))


def back_projection(
    enlarged: Tensor,
    image: Tensor,
    scale: Scale,
    *,
    down_kernel: Kernel = "cubic",
    up_kernel: str = "cubic",
    antialias: bool | str = True,
    border: str = "mirror",
) -> Tensor:
    """One step towards an `enlarged` (N, C, H', W') that shrinks to `image` (N, C, H, W); the result is cut to 0..1.

    What `image` has and the shrunk result lacks is enlarged and added. The last arguments are those of `imresize`.
    M. Irani, S. Peleg, "Improving resolution by image registration", CVGIP, 1991.
    """
    y, x = pair(scale)
    options = {"antialias": antialias, "border": border}
    shrunk = imresize(enlarged, (1 / y, 1 / x), shape=tuple(image.shape[2:]), kernel=down_kernel, **options)
    missing = imresize(image - shrunk, (y, x), shape=tuple(enlarged.shape[2:]), kernel=up_kernel, **options)
    return (enlarged + missing).clamp(0, 1)
