"""MemNet's memory block: residual units in sequence, then a gate over all they made and all that is remembered.

Every convolution has its own batch normalisation and ReLU in front; in inference those are an affine map and a ReLU on
load. Bound by arithmetic in the units, by memory in the gate, whose concatenation is only a way of reading.
"""

from __future__ import annotations

from torch import Tensor

from fastsr.op import empty_image, expect, expect_alike, op
from fastsr.ops.conv_act import conv_act
from fastsr.recipes import Conv, Recipe, View


@op
def memory_block(
    long_term: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    pre_scales: list[Tensor],
    pre_shifts: list[Tensor],
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    gate_scale: Tensor,
    gate_shift: Tensor,
    long_term_first: bool = False,
) -> Tensor:
    """The gate's 1x1 convolution over [u_1, ..., u_R, *long_term], or [*long_term, u_1, ..., u_R] if long_term_first,
    where u_r = u_{r-1} + b(a(u_{r-1})) and u_0 = long_term[-1]. Tai et al. 2017, figure 2.

    a, b and the gate are conv(relu(scale * input + shift)).
    long_term: (N, C, H, W) each, oldest first; the last is the block's input.
    pre_scales, pre_shifts: (C,), in the order a, b of unit 1, a, b of unit 2, ...; R is half their number.
    weights: (C, C, k, k) with odd k, 2R in that order, or two that all units share. biases: (C,) each, as many, or [].
    gate_weight: (C, (R + len(long_term)) * C, 1, 1), with gate_bias (C,); gate_scale and gate_shift in its input order.
    Returns a tensor like the last of long_term. Raises ValueError.
    """
    u = long_term[-1]
    short_term = []
    for r in range(len(pre_scales) // 2):
        h = u
        for i in (2 * r, 2 * r + 1):
            weight, bias = _layer(weights, biases, i)
            h = conv_act.eager([h], weight, bias, padding=weight.shape[-1] // 2,
                               pre_scale=pre_scales[i], pre_shift=pre_shifts[i], pre_relu=True)  # fmt: skip
        u = u + h
        short_term.append(u)
    states = long_term + short_term if long_term_first else short_term + long_term
    return conv_act.eager(states, gate_weight, gate_bias, pre_scale=gate_scale, pre_shift=gate_shift, pre_relu=True)


def _layer(weights: list[Tensor], biases: list[Tensor], i: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of convolution i; two shared ones alternate."""
    i %= len(weights)
    return weights[i], biases[i] if biases else None


@memory_block.check
def _(
    long_term, weights, biases, pre_scales, pre_shifts, gate_weight, gate_bias, gate_scale, gate_shift, long_term_first
):
    expect(len(long_term) > 0, "long_term holds at least one tensor", long_term=long_term)
    x = long_term[-1]
    same = x.dim() == 4 and all(t.shape == x.shape for t in long_term)
    expect(same, "long_term are (N, C, H, W) of one shape", long_term=long_term)
    c, count = x.shape[1], len(pre_scales)
    expect(count > 0 and count % 2 == 0 and len(pre_shifts) == count,
           "two pre_scales and two pre_shifts a unit", pre_scales=pre_scales, pre_shifts=pre_shifts)  # fmt: skip
    expect(all(t.shape == (c,) for t in [*pre_scales, *pre_shifts]), f"pre_scales and pre_shifts of ({c},)",
           pre_scales=pre_scales, pre_shifts=pre_shifts)  # fmt: skip
    expect(len(weights) in (2, count), f"two weights, or one for each of the {count} pre_scales", weights=weights)
    square = all(w.dim() == 4 and w.shape[:2] == (c, c) and w.shape[2] == w.shape[3] for w in weights)
    expect(square and all(w.shape[2] % 2 == 1 for w in weights), f"weights of ({c}, {c}, k, k) with odd k",
           weights=weights)  # fmt: skip
    expect(len(biases) in (0, len(weights)) and all(b.shape == (c,) for b in biases),
           f"no biases, or a ({c},) for each weight", biases=biases, weights=weights)  # fmt: skip
    wide = (count // 2 + len(long_term)) * c
    expect(gate_weight.shape == (c, wide, 1, 1), f"gate_weight is ({c}, {wide}, 1, 1)", gate_weight=gate_weight)
    expect(gate_bias is None or gate_bias.shape == (c,), f"gate_bias is ({c},)", gate_bias=gate_bias)
    expect(gate_scale.shape == (wide,) and gate_shift.shape == (wide,), f"gate_scale and gate_shift are ({wide},)",
           gate_scale=gate_scale, gate_shift=gate_shift)  # fmt: skip
    expect_alike(long_term=long_term, weights=weights, biases=biases, pre_scales=pre_scales, pre_shifts=pre_shifts,
                 gate_weight=gate_weight, gate_bias=gate_bias, gate_scale=gate_scale,
                 gate_shift=gate_shift)  # fmt: skip


@memory_block.alloc
def _(
    long_term, weights, biases, pre_scales, pre_shifts, gate_weight, gate_bias, gate_scale, gate_shift, long_term_first
):
    return empty_image(long_term[-1], long_term[-1].shape)


@memory_block.recipe
def _(
    long_term, weights, biases, pre_scales, pre_shifts, gate_weight, gate_bias, gate_scale, gate_shift, long_term_first
):
    n, c, h, w = long_term[-1].shape
    inputs = {f"m{i}": t for i, t in enumerate(long_term)}
    units = len(pre_scales) // 2
    long = tuple(View(name) for name in inputs)
    short = tuple(View("short", r * c, c) for r in range(units))
    steps = []
    for r in range(units):
        u = short[r - 1] if r > 0 else long[-1]
        for i, source, store, skip in ((2 * r, u, View("h"), None), (2 * r + 1, View("h"), short[r], u)):
            weight, bias = _layer(weights, biases, i)
            steps.append(Conv((source,), weight, bias, store, padding=weight.shape[-1] // 2,
                              pre_scale=pre_scales[i], pre_shift=pre_shifts[i], pre_relu=True, skip=skip))  # fmt: skip
    steps.append(Conv(long + short if long_term_first else short + long, gate_weight, gate_bias, View("out"),
                      pre_scale=gate_scale, pre_shift=gate_shift, pre_relu=True))  # fmt: skip
    return Recipe(inputs, {"h": (n, c, h, w), "short": (n, units * c, h, w), "out": (n, c, h, w)}, tuple(steps))


def _sample(make, n, c, h, w, units, memories, *, shared, bias, long_term_first):
    convs, wide = 2 if shared else 2 * units, (units + memories) * c
    return (
        [make(n, c, h, w) for _ in range(memories)],
        [make(c, c, 3, 3) for _ in range(convs)],
        [make(c) for _ in range(convs)] if bias else [],
        [make(c) for _ in range(2 * units)],
        [make(c) for _ in range(2 * units)],
        make(c, wide, 1, 1),
        make(c) if bias else None,
        make(wide),
        make(wide),
        long_term_first,
    )


@memory_block.samples
def _(make):
    yield _sample(make, 1, 2, 4, 3, 2, 2, shared=True, bias=True, long_term_first=True)
    yield _sample(make, 2, 2, 3, 4, 2, 1, shared=False, bias=False, long_term_first=False)
    yield _sample(make, 1, 64, 8, 9, 6, 2, shared=False, bias=False, long_term_first=False)  # the port's M6R6, block 2
    yield _sample(make, 1, 64, 8, 7, 6, 6, shared=True, bias=True, long_term_first=True)  # the original's, block 6
