"""Which way `linear_tail` is computed on a CPU: layer by layer, or merged into one convolution and its frame.

The rule: the way with fewer multiplications, as the engine makes them. That is the merged one but for images of a few
pixels, most of which are border, and for kernels that merge into more than 5x5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsr.ops.linear_tail import linear_tail, merged_recipe, unmergeable
from fastsr.recipes import Conv, Recipe

TILES = {3: 4, 5: 3}  # pixels along an axis of a tile of Winograd's F(4x4, 3x3) and F(3x3, 5x5), by the kernel
FEW = 4  # outputs of the last layer, which has a form of its own, without tiles
LANES = 16
LARGE = 256


def recipe(x: Tensor, weights: list[Tensor], biases: list[Tensor], gain: float, any_size: bool = False) -> Recipe:
    """The recipe that the engine runs; with any_size that for a large image, if x can have it."""
    assert linear_tail.recipe_of is not None
    ways = [linear_tail.recipe_of]
    if unmergeable(x, weights) is None:
        ways.append(merged_recipe)
    like = torch.empty((*x.shape[:2], LARGE, LARGE), device="meta") if any_size else x.to("meta")
    likes = like, [w.to("meta") for w in weights], [b.to("meta") for b in biases], gain
    return min(ways, key=lambda way: products(way(*likes)))(x, weights, biases, gain)


def products(recipe: Recipe) -> int:
    """How many multiplications the convolutions of a recipe take."""
    buffers = recipe.workspace | {name: tuple(x.shape) for name, x in recipe.inputs.items()}
    total = 0
    for step in recipe.steps:
        if isinstance(step, Conv):
            (source,) = step.sources
            outputs, inputs, taps, _ = step.weight.shape
            height, width = source.size(buffers[source.buffer])
            tile = TILES.get(taps)
            if outputs <= FEW:
                each = taps**2 * height * width
            elif tile is not None and min(height, width) >= tile:
                each = (tile + taps - 1) ** 2 * math.ceil(height / tile) * math.ceil(width / tile)
            else:
                each = taps**2 * height * width
            total += each * inputs * (outputs if outputs <= FEW else math.ceil(outputs / LANES) * LANES)
    return buffers[recipe.output][0] * total
