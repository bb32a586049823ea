"""How far a network looks: measured, not typed in.

A pixel that is not a number makes every value that depends on it not a number, whatever the weights: each layer here
computes sums of products, also with weights that are zero. One such pixel in the middle of a strip therefore shows the
receptive field exactly. In float64, because torch then multiplies out what each output reads; the fast algorithms of
narrower types mix neighbours. A strip is as good as an image, as a kernel's middle row reaches as far as the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

LIMIT = 1024  # pixels; a network that looks further than that is taken to look at the whole image
SHORTEST = 16  # cells of the first strip


@dataclass(frozen=True)
class Source:
    """One of the tensors that parts are cut out of: its channels, and how many of its pixels, along an axis, stand for
    one of the image's."""

    channels: int
    ratio: Fraction = Fraction(1)

    def span(self, start: int, stop: int) -> slice:
        """Its pixels for start..stop of the image's; `start` is a multiple where several image pixels are one here."""
        return slice(int(start * self.ratio), -int(-stop * self.ratio // 1))


def reach(
    enlarge: Callable[[list[Tensor]], Tensor], sources: Sequence[Source], scale: int, multiple: int, limit: int = LIMIT
) -> int | None:
    """How many image pixels around a pixel its `scale` x `scale` results depend on, rounded up to `multiple`.

    enlarge: takes a float64 tensor (1, channels, H * ratio, W * ratio) for each source, on the CPU, and returns
        (1, any, H * scale, W * scale). H and W are multiples of `multiple`, and so is where it may be cut.
    Returns None if that is more than `limit`, as it is where something averages over the whole image.
    """
    along = [_along(enlarge, sources, scale, multiple, limit, axis) for axis in (2, 3)]
    return None if None in along else max(along)


def _along(
    enlarge: Callable[[list[Tensor]], Tensor],
    sources: Sequence[Source],
    scale: int,
    multiple: int,
    limit: int,
    axis: int,
) -> int | None:
    cells = SHORTEST
    while True:
        middle = cells // 2
        result = enlarge([_strip(source, cells, middle, multiple, axis) for source in sources])
        touched = torch.isnan(result).flatten(0, 1).any(0).any(3 - axis)
        touched = touched[: cells * multiple * scale].view(cells, -1).any(1).nonzero().flatten().tolist()
        if touched and touched[0] > 0 and touched[-1] < cells - 1:  # neither end is, so this is all
            radius = multiple * max(middle - touched[0], touched[-1] - middle)
            return radius if radius <= limit else None
        if multiple * middle > limit:
            return None
        cells *= 2


def _strip(source: Source, cells: int, middle: int, multiple: int, axis: int) -> Tensor:
    """Zeros, one cell high (or wide), and in the middle cell not a number."""
    long, short = source.span(0, cells * multiple).stop, source.span(0, multiple).stop
    strip = torch.zeros((1, source.channels, long, short) if axis == 2 else (1, source.channels, short, long)).double()
    spoilt = source.span(middle * multiple, (middle + 1) * multiple)
    strip.narrow(axis, spoilt.start, spoilt.stop - spoilt.start).fill_(torch.nan)
    return strip
