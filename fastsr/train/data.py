"""Training and validation images: decoded and shrunk once, kept as plain arrays on disk, read patch by patch.

Low resolution is what MATLAB's bicubic `imresize` makes of the whole image, clipped and rounded to 8 bits, so patches
see what the network is given in use.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsr.image.io import FORMATS, read_image, write_atomically
from fastsr.image.resize import imresize


@dataclass(frozen=True)
class Example:
    """One image, uint8 (H, W, 3), and what it was shrunk to at each scale, (H // scale, W // scale, 3)."""

    name: str
    high: np.ndarray
    low: dict[int, np.ndarray]

    def target(self, scale: int) -> np.ndarray:
        """The part of `high` that `low[scale]` was made of: cut at the bottom and right to multiples of the scale."""
        height, width = self.low[scale].shape[:2]
        return self.high[: height * scale, : width * scale]


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files in a folder and its subfolders, sorted. Raises ValueError where there are none."""
    root = Path(folder)
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in FORMATS and p.is_file())
    if not found:
        raise ValueError(f"{root}: no images in this folder (looked for {', '.join(FORMATS)})")
    return found


def shrink(high: np.ndarray, scale: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (H // scale, W // scale, 3): cut to multiples of the scale, cubic, rounded halves up."""
    height, width = (size // scale for size in high.shape[:2])
    cut = torch.from_numpy(high[: height * scale, : width * scale].astype(np.float64)).permute(2, 0, 1)
    levels = imresize(cut[None], 1 / scale)[0].permute(1, 2, 0)
    return np.floor(levels.numpy().clip(0, 255) + 0.5).astype(np.uint8)


def prepare(paths: Sequence[Path], scales: Sequence[int], cache: Path) -> list[Example]:
    """Reads images through the folder `cache`, which gets what is not there yet: arrays that are mapped, not loaded, so
    a data set may be larger than memory. An image that has changed since is made anew."""
    cache.mkdir(parents=True, exist_ok=True)
    return [_prepare_one(path, scales, cache) for path in paths]


def _prepare_one(path: Path, scales: Sequence[int], cache: Path) -> Example:
    status = path.stat()
    version = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    key = hashlib.sha256(version.encode()).hexdigest()[:24]

    def kept(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        file = cache / f"{key}_{name}.npy"
        if not file.exists():
            buffer = io.BytesIO()
            np.save(buffer, make())
            write_atomically(file, buffer.getbuffer())
        return np.load(file, mmap_mode="r")

    high = kept("high", lambda: np.asarray(read_image(path).convert("RGB")))
    return Example(str(path), high, {scale: kept(f"x{scale}", lambda s=scale: shrink(high, s)) for scale in scales})


class Patches:
    """Random pairs of patches. What a step gets is a function of (seed, step), so a run can go on from any step."""

    def __init__(
        self, examples: Sequence[Example], weights: dict[int, float], patch: int, batch: int, seed: int
    ) -> None:
        self.examples, self.patch, self.batch, self.seed = examples, patch, batch, seed
        self.scales = list(weights)
        self.shares = np.array([weights[s] for s in self.scales]) / sum(weights.values())
        for example in examples:
            for scale, low in example.low.items():
                if min(low.shape[:2]) < patch:
                    raise ValueError(
                        f"{example.name}: shrunk by {scale} to {low.shape[1]}x{low.shape[0]} it is less than a patch "
                        f"of {patch}; leave it out or choose a smaller patch"
                    )

    def step(self, number: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor, int]:
        """The share of process `rank` of `world` in a step's batch: (N, 3, patch, patch), (N, 3, patch * scale, patch *
        scale), both uint8, and the scale, which all processes share."""
        rng = np.random.default_rng((self.seed, number))
        scale = int(rng.choice(self.scales, p=self.shares))
        pairs = [self._pair(rng, scale) for _ in range(self.batch)]
        mine = pairs[rank * self.batch // world : (rank + 1) * self.batch // world]
        low, high = (torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2) for side in zip(*mine))
        return low, high, scale

    def _pair(self, rng: np.random.Generator, scale: int) -> tuple[np.ndarray, np.ndarray]:
        example = self.examples[rng.integers(len(self.examples))]
        low = example.low[scale]
        top, left = (int(rng.integers(size - self.patch + 1)) for size in low.shape[:2])
        turns, flip = int(rng.integers(4)), bool(rng.integers(2))
        pair = []
        for image, factor in ((low, 1), (example.high, scale)):
            side = self.patch * factor
            piece = image[top * factor : top * factor + side, left * factor : left * factor + side]
            piece = np.rot90(piece, turns)
            pair.append(piece[:, ::-1] if flip else piece)
        return pair[0], pair[1]
