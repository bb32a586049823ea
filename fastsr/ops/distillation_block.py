"""IDN's information distillation block: a short path of three convolutions, part of whose result is kept aside while
the rest goes through three more; both meet the block's input in a sum and a 1x1 convolution. Bound by arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr.op import empty_image, expect, expect_alike, op
from fastsr.recipes import Conv, Recipe, View

COUNT = 7  # convolutions: six of the two paths, and the 1x1


@op
def distillation_block(x: Tensor, weights: list[Tensor], biases: list[Tensor], slope: float = 0.05) -> Tensor:
    """down(c6(c5(c4(b))) + [x, a]), where [a, b] = c3(c2(c1(x))). Hui, Wang, Gao 2018, figure 2.

    c1 ... c6 and down are convolution, bias and leaky ReLU of `slope`; all keep the size.
    x: (N, C, H, W). weights: those of c1 ... c6 and down, each (Cout, Cin/groups, k, k) with odd k; all but c4 may be
    grouped, as their shapes tell. c4 reads the last channels of c3's result, as many as its weight has; the S channels
    before, the slice a, are kept. c6 makes C + S channels. biases: (Cout,) for each weight.
    Returns (N, C', H, W), C' the channels of down, in the layout of x. Raises ValueError.
    """
    h = x
    for i in range(3):
        h = _conv(h, weights[i], biases[i], slope)
    kept = h.shape[1] - weights[3].shape[1]
    joined = torch.cat([x, h[:, :kept]], 1)
    h = h[:, kept:]
    for i in range(3, 6):
        h = _conv(h, weights[i], biases[i], slope)
    return _conv(h + joined, weights[6], biases[6], slope)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, slope: float) -> Tensor:
    groups = x.shape[1] // weight.shape[1]
    return F.leaky_relu(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=groups), slope)


@distillation_block.check
def _(x, weights, biases, slope):
    expect(x.dim() == 4, "x is (N, C, H, W)", x=x)
    expect(
        len(weights) == COUNT and len(biases) == COUNT, f"{COUNT} weights and biases", weights=weights, biases=biases
    )
    expect_alike(x=x, weights=weights, biases=biases)
    square = all(w.dim() == 4 and w.shape[2] == w.shape[3] and w.shape[2] % 2 == 1 for w in weights)
    expect(square, "weights of (Cout, Cin/groups, k, k) with odd k", weights=weights)
    c, kept = x.shape[1], weights[2].shape[0] - weights[3].shape[1]
    expect(0 < kept < weights[2].shape[0], "the fourth weight reads some of the third's channels, not all",
           third=weights[2], fourth=weights[3])  # fmt: skip
    expect(weights[5].shape[0] == c + kept, f"the sixth weight makes {c} + {kept} channels", x=x, sixth=weights[5])
    widths = [c, *(w.shape[0] for w in weights)]
    widths[3] = weights[3].shape[1]  # what the fourth reads
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        groups, rest = widths[i] // weight.shape[1], widths[i] % weight.shape[1]
        fits = rest == 0 and groups > 0 and weight.shape[0] % groups == 0
        expect(fits, f"weights[{i}] fits {widths[i]} channels", weight=weight)
        expect(bias.shape == weight.shape[:1], f"biases[{i}] is (Cout,)", bias=bias, weight=weight)


@distillation_block.alloc
def _(x, weights, biases, slope):
    return empty_image(x, (x.shape[0], weights[6].shape[0], x.shape[2], x.shape[3]))


@distillation_block.recipe
def _(x, weights, biases, slope):
    n, c, height, width = x.shape
    kept = weights[2].shape[0] - weights[3].shape[1]
    read = (View("x"), View("h1"), View("h2"), View("h3", kept), View("h4"), View("h5"), View("h6"))
    widths = (c, *(w.shape[0] for w in weights[:2]), weights[3].shape[1], *(w.shape[0] for w in weights[3:6]))
    steps = tuple(
        Conv((read[i],), w, biases[i], View("out" if i == 6 else f"h{i + 1}"), padding=w.shape[-1] // 2,
             groups=widths[i] // w.shape[1], act="leaky", slope=slope,
             skip=(View("x"), View("h3", 0, kept)) if i == 5 else None)
        for i, w in enumerate(weights)
    )  # fmt: skip
    workspace = {step.store.buffer: (n, step.weight.shape[0], height, width) for step in steps}
    return Recipe({"x": x}, workspace, steps)


def _sample(make, n, h, w, features, widths, kept, groups):
    inputs = (features, *widths[:2], widths[2] - kept, *widths[3:])
    outputs = (*widths, features)
    split = [groups if i in (1, 4) else 1 for i in range(COUNT)]
    kernels = (3, 3, 3, 3, 3, 3, 1)
    weights = [make(o, i // g, k, k) for i, o, g, k in zip(inputs, outputs, split, kernels)]
    return make(n, features, h, w), weights, [make(o) for o in outputs], 0.05


@distillation_block.samples
def _(make):
    yield _sample(make, 1, 4, 3, 4, (4, 2, 4, 4, 2, 5), 1, 2)
    yield _sample(make, 2, 3, 4, 3, (3, 3, 3, 2, 2, 5), 2, 1)
    yield _sample(make, 1, 24, 25, 64, (48, 32, 64, 64, 48, 80), 16, 4)  # the authors' block
    yield _sample(make, 1, 9, 7, 64, (48, 32, 64, 64, 48, 80), 16, 4)
