"""An image's way through a network: colour and value range in front, the same behind, and what may be done in parts."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from fastsr.image.colour import rgb_to_gray, rgb_to_ycbcr, ycbcr_to_rgb
from fastsr.image.resize import imresize
from fastsr.models.network import Network
from fastsr.models.sftgan import OutdoorSceneSeg, condition


@dataclass(frozen=True)
class Pass:
    """From values 0..1 or levels, (N, C, H, W), to values 0..1, (N, C, H * scale, W * scale), at least float32 and not
    clamped.

    A network of luma gets a gray image as it is, and of a colour image the luma, while the cubic `imresize` enlarges
    the chroma; a network of RGB gets gray as three equal channels and its output is turned into gray.
    `finish(begin(values))` is all of it. `begin` does what has to see the whole image: the trunk of a network that is
    `split`, SFTGAN's segmentation. `finish` may be given parts, cut at the same places out of everything that `begin`
    returned, at multiples of `network.multiple`.
    """

    network: Network
    scale: int
    segmentation: OutdoorSceneSeg | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of values and results: colour arithmetic in half precision would show."""
        return torch.promote_types(self.network.dtype, torch.float32)

    @property
    def ratios(self) -> list[Fraction]:
        """For each tensor that `begin` returns: how many of its pixels, along an axis, stand for one of the image."""
        features = [Fraction(1, self.network.multiple)] if self.network.split else []
        return [Fraction(1), *features, *([Fraction(self.scale)] if self.segmentation is not None else [])]

    def widened(self, dtype: torch.dtype, device: torch.device | None = None) -> Pass:
        """The same with a copy of the network in another dtype and on another device."""
        network = copy.deepcopy(self.network).to(device=device, dtype=dtype)
        return replace(self, network=network.eval())

    def begin(self, values: Tensor) -> list[Tensor]:
        """values in `dtype`, or levels, on the network's device -> [the same, and what else `finish` needs]."""
        inputs = [values]
        if self.network.split:
            inputs.append(self.network.global_part(self._given(self._values(values))))
        if self.segmentation is not None:
            image = self._values(values).expand(-1, 3, -1, -1)
            seen = condition(self.segmentation, image.to(self.segmentation.device, self.segmentation.dtype))
            inputs.append(seen.to(self.network.device, self.network.dtype))
        return inputs

    def finish(self, inputs: list[Tensor]) -> Tensor:
        """What `begin` returned, or parts of it -> the enlarged values."""
        values, *more = inputs
        values = self._values(values)
        low, high = self.network.value_range
        if self.network.split:
            height, width = (size * self.scale for size in values.shape[2:])
            y = self.network.local_part(more[0], self.scale)[..., :height, :width]
        else:
            y = self.network.super_resolve(self._given(values), self.scale, *more)
        y = (y.to(values.dtype) - low) / (high - low)
        if values.shape[1] == 1:
            return y if self.network.colour == "y" else rgb_to_gray(y)
        if self.network.colour == "y":
            return ycbcr_to_rgb(torch.cat([y, imresize(rgb_to_ycbcr(values)[:, 1:], self.scale)], dim=1))
        return y

    def _values(self, values: Tensor) -> Tensor:
        """Values 0..1 of levels 0..255 (uint8) or 0..65535 (int32), which take less memory; values are as they are."""
        if values.is_floating_point():
            return values
        return values.to(self.dtype) / (255 if values.dtype == torch.uint8 else 65535)

    def _given(self, values: Tensor) -> Tensor:
        """What the network gets: its colours, value range and dtype."""
        low, high = self.network.value_range
        if self.network.colour == "y":
            values = rgb_to_ycbcr(values)[:, :1] if values.shape[1] == 3 else values
        else:
            values = values.expand(-1, 3, -1, -1)
        return (values * (high - low) + low).to(self.network.dtype)
