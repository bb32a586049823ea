"""PSNR and SSIM of a network on a folder of images, by the protocol that its authors measured with.

All protocols have in common: an image is cut at the bottom and right to a multiple of the scale, shrunk, enlarged by
the network and by the cubic `imresize`, and compared without `scale` pixels on every side, with a peak of 255; the
figures of a folder are plain means over its images. What differs is in `Protocol`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastsr.image import io
from fastsr.image.colour import rgb_to_y, rgb_to_ycbcr, ycbcr_to_rgb
from fastsr.image.metrics import psnr, ssim
from fastsr.image.resize import imresize
from fastsr.image.upscale import as_network, as_segmentation, check_scale, enlarge
from fastsr.models import Network

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Protocol:
    """How small images are made and results compared.

    kernel: "cubic", MATLAB's with its antialiasing, or "lanczos", Pillow's.
    border: what MATLAB's kernels find outside the image, see `fastsr.image.resize.imresize`.
    luma_first: for a network of luma, Y Cb Cr of the whole image is shrunk, and enlarged luma compared with its luma;
        otherwise, and for networks of RGB, RGB is shrunk and enlarged, and luma made of that.
    low_rounded, result_rounded, luma_rounded: to 8 bits, halves up: the small image; the enlarged; luma wherever made.
    """

    name: str
    summary: str
    kernel: str = "cubic"
    border: str = "mirror"
    luma_first: bool = False
    low_rounded: bool = True
    result_rounded: bool = True
    luma_rounded: bool = False


BENCHMARK = Protocol("benchmark", "8-bit RGB shrunk by MATLAB's bicubic to 8 bits; luma of 8-bit results, not rounded")
IDN = Protocol(
    "idn", "8-bit luma shrunk by MATLAB's bicubic, not rounded; results of 8 bits", luma_first=True,
    low_rounded=False, luma_rounded=True,
)  # fmt: skip
ENHANCENET = Protocol(
    "enhancenet", "8-bit RGB shrunk by Pillow's Lanczos; luma of 8-bit results, rounded", kernel="lanczos",
    luma_rounded=True,
)  # fmt: skip
MSRN_OLD = Protocol(
    "msrn_old", "luma shrunk by MATLAB's bicubic with clamped borders; nothing rounded", border="clamp",
    luma_first=True, low_rounded=False, result_rounded=False,
)  # fmt: skip
PROTOCOLS = {p.name: p for p in (BENCHMARK, IDN, ENHANCENET, MSRN_OLD)}
PUBLISHED = {"idn": IDN, "memnet": IDN, "memnet_original": IDN, "enhancenet": ENHANCENET, "msrn_old": MSRN_OLD}
"""By network; the others' authors used what is customary, "benchmark"."""


def evaluate(
    model: Network | nn.Module | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    scale: int | None = None,
    protocol: str | None = None,
    segmentation: Network | nn.Module | str | os.PathLike[str] | None = None,
    progress: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measures a network on the full-size images of a folder (8-bit gray or RGB, extensions of `fastsr.image.io`).

    model, scale, segmentation: as for `fastsr.upscale`. protocol: a name in PROTOCOLS; by default what the network's
    authors published with. progress: called with the name and the figures of every image.

    Returns what JSON can hold: {"protocol", "model" (the network's name), "scale", "images": {file name: figures},
    "mean": figures}, where figures are psnr_y, ssim_y, psnr_rgb, ssim_rgb and "bicubic", a dict of the same four. PSNR
    is in decibels, None where it is infinite. The RGB figures are over all three channels; for a network of luma they
    are those of its luma with bicubic chroma; for a gray image they are equal to the Y figures, which are of its gray
    values as they are. Raises ValueError for an unknown protocol or scale, a folder without images or an image that is
    too small, not 8-bit gray or RGB, or whose result is not finite, OSError for one that cannot be read, and what
    `load` does.
    """
    network = as_network(model)
    scale = check_scale(type(network).__name__, network.scales, scale)
    seen = as_segmentation(network, segmentation)
    chosen = PUBLISHED.get(network.name, BENCHMARK) if protocol is None else PROTOCOLS.get(protocol)
    if chosen is None:
        raise ValueError(f"evaluate: expected protocol to be one of {', '.join(PROTOCOLS)}; got {protocol!r}")
    files = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in io.FORMATS and p.is_file())
    if not files:
        raise ValueError(f"evaluate: {folder}: no images in this folder (looked for {', '.join(io.FORMATS)})")
    images = {}
    for file in files:
        try:
            images[file.name] = _measure(network, io.read_image(file), scale, chosen, seen)
        except ValueError as error:
            raise ValueError(f"evaluate: {file}: {error}") from error
        if progress is not None:
            progress(file.name, images[file.name])
    return {
        "protocol": chosen.name,
        "model": network.name,
        "scale": scale,
        "images": images,
        "mean": _mean(list(images.values())),
    }


def _measure(network: Network, image: Image.Image, scale: int, protocol: Protocol, segmentation: Any) -> dict[str, Any]:
    if image.mode not in ("L", "RGB"):
        raise ValueError(f"expected 8-bit gray (mode L) or RGB, got mode {image.mode}")
    pixels = np.array(image)
    pixels = pixels[: pixels.shape[0] // scale * scale, : pixels.shape[1] // scale * scale]
    if pixels.size == 0:
        raise ValueError(f"expected at least {scale}x{scale} pixels, got {image.height}x{image.width}")
    high = _tensor(pixels)
    in_luma = protocol.luma_first and network.colour == "y" and high.shape[1] == 3
    whole = _to_ycbcr(high, protocol) if in_luma else high
    low = _shrink(whole, scale, protocol)
    bicubic = imresize(low, scale, border=protocol.border)
    if in_luma:
        luma = enlarge(network, low[:, :1], scale, None)
        result = torch.cat([luma.double().cpu(), bicubic[:, 1:]], dim=1)
    else:
        result = enlarge(network, low, scale, segmentation).double().cpu()
    if not torch.isfinite(result).all():
        raise ValueError(
            "the network's result holds values that are not finite; use a wider dtype or check the weights"
        )
    return _compare(result, high, scale, protocol, in_luma) | {
        "bicubic": _compare(bicubic, high, scale, protocol, in_luma)
    }


def _shrink(image: Tensor, scale: int, protocol: Protocol) -> Tensor:
    if protocol.kernel == "cubic":
        low = imresize(image, 1 / scale, border=protocol.border)
        return _rounded(low) if protocol.low_rounded else low
    levels = torch.floor(image * 255 + 0.5).to(torch.uint8)
    size = (image.shape[3] // scale, image.shape[2] // scale)
    planes = [Image.fromarray(plane.numpy()).resize(size, Image.Resampling.LANCZOS) for plane in levels[0]]
    return torch.cat([_tensor(np.array(plane)) for plane in planes], dim=1)


def _compare(result: Tensor, high: Tensor, scale: int, protocol: Protocol, in_luma: bool) -> Figures:
    """The figures of a result, in Y Cb Cr where `in_luma`, else in RGB or gray; `high` is RGB or gray."""
    final = _rounded if protocol.result_rounded else lambda x: x.clamp(0, 1)
    rgb = final(ycbcr_to_rgb(result)) if in_luma else final(result)
    if in_luma:
        y = final(result[:, :1]), _to_ycbcr(high, protocol)[:, :1]
    elif high.shape[1] == 1:
        y = rgb, high
    else:
        y = tuple(_rounded(rgb_to_y(x)) if protocol.luma_rounded else rgb_to_y(x) for x in (rgb, high))
    figures: Figures = {}
    for name, pair in (("y", y), ("rgb", (rgb, high))):
        ratio = psnr(*pair, shave=scale)
        figures[f"psnr_{name}"] = None if math.isinf(ratio) else ratio
        figures[f"ssim_{name}"] = ssim(*pair, shave=scale)
    return figures


def _to_ycbcr(image: Tensor, protocol: Protocol) -> Tensor:
    ycbcr = rgb_to_ycbcr(image)
    return _rounded(ycbcr) if protocol.luma_rounded else ycbcr


def _mean(images: list[dict[str, Any]]) -> dict[str, Any]:
    mean: dict[str, Any] = {}
    for key, first in images[0].items():
        values = [image[key] for image in images]
        if isinstance(first, dict):
            mean[key] = _mean(values)
        else:
            mean[key] = None if None in values else sum(values) / len(values)
    return mean


def _rounded(image: Tensor) -> Tensor:
    """To 8 bits, halves up, and back to 0..1."""
    return torch.floor(image.clamp(0, 1) * 255 + 0.5) / 255


def _tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W) or (H, W, 3) -> (1, C, H, W) float64, 0..1."""
    values = torch.from_numpy(pixels.astype(np.float64) / 255)
    return values[None, None] if values.dim() == 2 else values.permute(2, 0, 1)[None]
