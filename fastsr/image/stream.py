"""Results that are never in memory as a whole: they are written, part by part, into a tiled TIFF."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsr.image import io, tiles
from fastsr.image.passes import Pass
from fastsr.image.upscale import (
    as_network,
    as_segmentation,
    check_scale,
    check_size,
    evaluating,
    repeatable,
    to_levels,
    to_tensor,
)
from fastsr.models import Network

SIDE = 256  # of the file's tiles, which have nothing to do with those of the network


def upscale_to_tiff(
    path: str | os.PathLike[str],
    picture: io.Picture,
    model: Network | nn.Module | Mapping[str, Any] | str | os.PathLike[str],
    *,
    scale: int | None = None,
    segmentation: Network | nn.Module | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    tile: int | str | None = tiles.AUTO,
    tile_pad: int | str | None = None,
    deterministic: bool = False,
    memory: int | None = None,
) -> None:
    """Enlarges a picture into a TIFF of the same depth, with its profile, EXIF data and dpi: tiles of 256 x 256, not
    compressed. The file is at `path` when it is complete, and not before (`io.atomic_file`).

    picture: gray or RGB without alpha. scale: one of `model.scales`. The others are those of `fastsr.upscale`.
    memory: the bytes that the parts may take, and by default what is free. The call needs that, and about as much again
        for what the system's allocator keeps, beside twice the picture's pixels and the network; for RCAN also its
        features of the whole picture, for SFTGAN the segmentation's.
    Raises what `fastsr.upscale` does, and OSError when the file cannot be written.
    """
    tiles.check(tile, tile_pad)
    pixels = picture.pixels
    if pixels.shape[2] not in (1, 3):
        raise ValueError(f"picture: expected gray or RGB without alpha, got {pixels.shape[2]} channels; use upscale")
    network = as_network(model, device, dtype)
    scale = check_scale(type(network).__name__, network.scales, scale)
    check_size(*pixels.shape[:2], scale)
    steps = Pass(network, scale, as_segmentation(network, segmentation))
    levels = to_tensor(pixels, None).to(network.device)
    shape = (pixels.shape[0] * scale, pixels.shape[1] * scale, pixels.shape[2])
    held = {k: v for k, v in (("icc", picture.icc), ("exif", picture.exif), ("dpi", picture.dpi)) if v}
    with (
        io.atomic_file(path) as file,
        repeatable(deterministic),
        torch.inference_mode(),
        evaluating(network),
        evaluating(steps.segmentation or nn.Identity()),
    ):
        target = _TiledFile(file, shape, pixels.dtype, held)
        for core, result in tiles.parts(steps, levels, tile, tile_pad, deterministic, memory):
            target.write(core.top * scale, core.left * scale, to_levels(result, pixels))
            del result  # so that its memory is free for the next


class _TiledFile:
    """A TIFF whose tiles lie one after the other behind the directory, so that each pixel's place is known."""

    def __init__(self, file: Any, shape: tuple[int, int, int], dtype: np.dtype, held: dict[str, Any]) -> None:
        height, width, channels = shape
        self.file, self.dtype = file, dtype.newbyteorder("<")
        self.pixel = channels * dtype.itemsize
        self.across = -(-width // SIDE)
        count, size = self.across * -(-height // SIDE), SIDE * SIDE * self.pixel

        def directory(start: int) -> bytes:
            offsets = tuple(range(start, start + count * size, size))
            layout = {259: 1, 322: SIDE, 323: SIDE, 324: offsets, 325: (size,) * count}
            return io.tiff_directory(shape, dtype, layout, held)

        self.start = len(directory(0))  # offsets take four bytes each, whatever they are
        file.write(directory(self.start))
        file.truncate(self.start + count * size)

    def write(self, top: int, left: int, levels: Tensor) -> None:
        """Puts (1, C, h, w) where its first pixel is (top, left)."""
        rows = levels[0].permute(1, 2, 0).contiguous().cpu().numpy().astype(self.dtype, copy=False)
        height, width = rows.shape[:2]
        for y in range(height):
            down, inside = divmod(top + y, SIDE)
            x = 0
            while x < width:
                right, first = divmod(left + x, SIDE)
                stop = min(width, x + SIDE - first)
                before = (down * self.across + right) * SIDE * SIDE + inside * SIDE + first
                self.file.seek(self.start + before * self.pixel)
                self.file.write(rows[y, x:stop].tobytes())
                x = stop
