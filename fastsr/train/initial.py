"""Weights to begin with that already interpolate, so that training starts at bicubic's level and not from noise."""

from __future__ import annotations

import torch

from fastsr.models.carn import CARN
from fastsr.models.network import Network
from fastsr.nn import ConvAct

NOISE = 0.1  # how much of its random weights a layer keeps beside the identity


@torch.no_grad()
def interpolating(network: Network) -> None:
    """Changes a new CARN or CARN-M so that it enlarges about as well as bicubic does.

    Features 0..2 carry the colours' parts above the mean, 3..5 those below it, which pass every ReLU unchanged; the
    fusions hand on their last input; upsamplers sample the parabola through three neighbours; the last layer takes the
    difference. All other weights stay random, those that would disturb this scaled down.
    Raises ValueError for another network, or one whose upsampler has fewer than 6 features a group.
    """
    if not isinstance(network, CARN) or network.config.features // network.config.group < 6:
        raise ValueError(f"interpolating: expected a CARN with 6 features a group or more; got {network.summary()}")
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.weight.requires_grad:
            layer.bias.zero_()
    for cascade in (network, network.b1, network.b2, network.b3):
        for n, fusion in enumerate((cascade.c1, cascade.c2, cascade.c3), start=1):
            weight = fusion.body["0"].weight.mul_(NOISE)
            features = weight.shape[0]
            weight[:, n * features :, 0, 0] += torch.eye(features)
    for block in (network.b1, network.b2, network.b3):
        for unit in {block.b1, getattr(block, "b2", block.b1), getattr(block, "b3", block.b1)}:
            list(unit.body.values())[-1].weight.mul_(NOISE)
    network.entry.weight[:6] = 0
    network.exit.weight.mul_(NOISE)[:, :6] = 0
    for colour in range(3):
        network.entry.weight[colour, colour, 1, 1] = network.exit.weight[colour, colour, 1, 1] = 1
        network.entry.weight[3 + colour, colour, 1, 1] = network.exit.weight[colour, 3 + colour, 1, 1] = -1
    for upsampler in network.upsample.children():
        for layer in upsampler.body.values():
            assert isinstance(layer, ConvAct)
            r = layer.shuffle
            offset = [(2 * i + 1 - r) / (2 * r) for i in range(r)]  # of an output pixel from its input pixel
            taps = torch.tensor([[t * (t - 1) / 2, 1 - t * t, t * (t + 1) / 2] for t in offset])
            kernels = torch.einsum("ya,xb->yxab", taps, taps).reshape(r * r, 3, 3)
            for feature in range(6):
                own = layer.weight[feature * r * r : (feature + 1) * r * r]
                own.zero_()
                own[:, feature] = kernels


STARTS = {"interpolating": interpolating}
"""What a configuration can name as `start`."""
