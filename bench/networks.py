"""What is measured: each network, its weights, and the image that goes in.

Sizes are of the small image. Weights are the embedded ones where there are some; else they are drawn from a fixed seed:
speed does not depend on them, and the drawn ones keep the values of every layer at a size at which errors mean
something. Accuracy is measured on trained networks too, the small ones in `tests/weights`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import fastsr
from fastsr.models.embedded import EMBEDDED

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPH = ROOT / "docs" / "images" / "astronaut.png"
TRAINED = ROOT / "tests" / "weights"
SCALE = 4


@dataclass(frozen=True)
class Case:
    """One network as it is measured. size: height and width of the small image at which the goals are set.
    enlarged_first: the network's own forward takes an image of the final size, so interpolating it is part of the work.
    he: weights drawn for ReLU chains without a residual path, through which torch's own would let a signal fade."""

    name: str
    create: str
    config: dict[str, Any] = field(default_factory=dict)
    size: int = 128
    enlarged_first: bool = False
    he: bool = False


CASES = {
    case.name: case
    for case in (
        Case("carn", "carn", {"scales": (SCALE,), "multi_scale": False}),
        Case("carn_m", "carn_m"),
        Case("idn", "idn", {"scale": SCALE}),
        Case("zssr", "zssr", enlarged_first=True, he=True),
        Case("enhancenet", "enhancenet"),
        Case("sftgan", "sftgan"),
        Case("msrn", "msrn"),
        Case("srfeat", "srfeat"),
        Case("dbpn", "dbpn", size=64),
        Case("memnet", "memnet", size=64, enlarged_first=True),
        Case("rcan", "rcan", size=64),
        Case("esrgan", "esrgan", size=64),
        Case("rdn", "rdn", {"scale": SCALE}, size=64),
    )
}
"""By name, the quick ones first. CARN-M stands beside CARN as a network of its own."""


class Enlarge(nn.Module):
    """A network's whole work, image in to image out: its own forward, or `super_resolve` where an image has to be
    interpolated first. `network` may be the plain one or what `fastsr.optimize` made of it."""

    def __init__(self, network: nn.Module, scale: int, enlarged_first: bool) -> None:
        super().__init__()
        self.network, self.scale, self.enlarged_first = network, scale, enlarged_first

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        """x: (1, C, H, W) in the network's value range -> (1, C, H * scale, W * scale), IDN a border less."""
        if self.enlarged_first:
            return self.network.super_resolve(x, self.scale)
        choice = {"scale": self.scale} if len(self.network.scales) > 1 else {}
        return self.network(x, *condition, **choice)


def build(case: Case) -> Enlarge:
    """The network of a case, frozen, with the same weights each time."""
    if case.create in EMBEDDED:
        network = fastsr.load(EMBEDDED[case.create])
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = fastsr.create(case.create, **case.config)
            if case.he:
                for p in network.parameters():
                    if p.dim() == 4:
                        nn.init.kaiming_normal_(p, nonlinearity="relu")
    return Enlarge(network.requires_grad_(False), SCALE, case.enlarged_first).eval()


def trained() -> dict[str, Path]:
    """Small trained networks by name: files for measuring accuracy, the embedded one among them."""
    return {**{name: Path(path) for name, path in EMBEDDED.items()}, **{p.stem: p for p in files(TRAINED)}}


def files(folder: Path) -> list[Path]:
    """The weights in a folder, sorted; none where there is no such folder."""
    return sorted(folder.glob("*.safetensors"))


def build_trained(path: Path) -> Enlarge:
    """A trained network at its largest scale."""
    network = fastsr.load(path).requires_grad_(False)
    return Enlarge(network, max(network.scales), False).eval()


@cache
def photograph() -> np.ndarray:
    """(H, W, 3) float64 in 0..1."""
    return np.asarray(Image.open(PHOTOGRAPH).convert("RGB"), dtype=np.float64) / 255


def inputs_of(module: Enlarge, size: int) -> tuple[Tensor, ...]:
    """The inputs of a network, float32, contiguous: the middle of the photograph, mirrored on where that is too small,
    in the network's colours and value range; for SFTGAN also probabilities of classes, smooth maps that sum to 1."""
    pixels = photograph()
    top, left = (max(0, (n - size) // 2) for n in pixels.shape[:2])
    beyond = [(0, max(0, size - n)) for n in pixels.shape[:2]]
    pixels = np.pad(pixels, (*beyond, (0, 0)), mode="symmetric")[top : top + size, left : left + size]
    network: Any = module.network
    if network.colour == "y":
        pixels = (16 + pixels @ np.array([65.481, 128.553, 24.966]))[..., None] / 255
    black, white = network.value_range
    image = torch.from_numpy(pixels * (white - black) + black).float().permute(2, 0, 1)[None].contiguous()
    return (image, *_condition(network, size))


def _condition(network: Any, size: int) -> Iterator[Tensor]:
    if network.name == "sftgan":
        generator = torch.Generator().manual_seed(0)
        coarse = 3 * torch.randn(1, network.config.classes, 8, 8, generator=generator)
        large = nn.functional.interpolate(coarse, size=(size * SCALE,) * 2, mode="bilinear", align_corners=False)
        yield large.softmax(1)
