"""Convolutions that the CUDA kernels are tested with, on the emulation and on a GPU: one feature at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastsr.op import OPS, Op, _replace, _tensors
from fastsr.ops.conv_act import _defaults

Make = Callable[..., torch.Tensor]
TENSORS = ("bias", "prelu", "scale", "skip", "pre_scale", "pre_shift")
FLOOR = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # as tests/test_ops.py has it


def maker(dtype=torch.bfloat16, layout=torch.channels_last, seed=0):
    """`make(*shape)`: normal values, 4-D tensors in the layout, weights scaled so that results stay near one."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        t = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            t = t / max(1.0, (shape[1] * shape[2] * shape[3]) ** 0.5) if shape[2] == shape[3] else t
            t = t.to(memory_format=layout)
        return t.to(dtype)

    return make


def _case(inputs: list[tuple[int, ...]], weight: tuple[int, ...], **changed: Any):
    return inputs, weight, changed


def convolution(case: str, make: Make) -> tuple:
    """The arguments of `conv_act` for one of CONVOLUTIONS."""
    inputs, weight, changed = CONVOLUTIONS[case]
    made = {k: make(*v) if k in TENSORS else v for k, v in changed.items()}
    return [make(*s) for s in inputs], make(*weight), *_defaults(**made)


PADDED = {"padding": 1}
CONVOLUTIONS = {
    "rcan": _case([(1, 64, 20, 21)], (64, 64, 3, 3), bias=(64,), act="relu", **PADDED),
    "several tiles": _case([(2, 64, 33, 18)], (64, 64, 3, 3), bias=(64,), act="leaky", slope=0.2, **PADDED),
    "one pixel": _case([(1, 64, 1, 1)], (64, 64, 3, 3), bias=(64,), **PADDED),
    "16 to 32": _case([(1, 16, 9, 10)], (32, 16, 3, 3), bias=(32,), **PADDED),
    "32 outputs, odd height": _case([(1, 64, 19, 9)], (32, 64, 3, 3), bias=(32,), act="relu", **PADDED),
    "slices": _case([(1, 64, 8, 9), (1, 32, 8, 9), (1, 64, 8, 9)], (32, 160, 3, 3), **PADDED),
    "192 inputs, streamed": _case([(1, 192, 10, 17)], (64, 192, 3, 3), bias=(64,), **PADDED),
    "48 outputs": _case([(1, 64, 9, 17)], (48, 64, 3, 3), bias=(48,), act="leaky", slope=0.05, **PADDED),
    "128 outputs": _case([(1, 48, 9, 8)], (128, 48, 3, 3), bias=(128,), **PADDED),
    "everything": _case(
        [(2, 64, 9, 11)], (64, 64, 3, 3), bias=(64,), act="prelu", prelu=(64,), gain=0.3, scale=(2, 64),
        skip=(2, 64, 9, 11), skip_gain=0.5, post_relu=True, **PADDED,
    ),
    "prologue": _case(
        [(1, 64, 9, 9), (1, 32, 9, 9)], (64, 96, 3, 3), pre_scale=(96,), pre_shift=(96,), pre_relu=True, **PADDED
    ),
    "shuffle": _case([(1, 64, 9, 8)], (256, 64, 3, 3), bias=(256,), act="relu", shuffle=2, **PADDED),
    "shuffle, tf": _case([(1, 32, 5, 8)], (128, 32, 3, 3), bias=(128,), shuffle=2, shuffle_order="tf",
                                **PADDED),
    "shuffle by 3": _case([(1, 64, 5, 4)], (27, 64, 3, 3), shuffle=3, **PADDED),
    "nearest": _case([(1, 64, 6, 7)], (64, 64, 3, 3), bias=(64,), upsample=2, **PADDED),
    "1x1 of several": _case([(1, 64, 9, 9)] * 3, (64, 192, 1, 1), bias=(64,)),
    "5x5": _case([(1, 64, 9, 8)], (64, 64, 5, 5), bias=(64,), padding=2),
    "transposed, 4": _case([(1, 64, 5, 6)], (64, 64, 8, 8), stride=4, padding=2, transposed=True),
    "strided, 4": _case([(1, 64, 20, 24)], (64, 64, 8, 8), stride=4, padding=2),
    "transposed, 2": _case([(1, 64, 5, 6)], (64, 64, 6, 6), stride=2, padding=2, transposed=True),
    "groups": _case([(1, 64, 10, 11)], (64, 16, 3, 3), bias=(64,), groups=4, **PADDED),
    "groups of 12": _case([(1, 48, 9, 8)], (32, 12, 3, 3), groups=4, **PADDED),
    "first": _case([(1, 3, 10, 11)], (64, 3, 3, 3), bias=(64,), **PADDED),
    "last": _case([(1, 64, 10, 11)], (3, 64, 3, 3), bias=(3,), **PADDED),
    "last of 96, tiles": _case([(2, 64, 18, 17), (2, 32, 18, 17)], (3, 96, 3, 3), bias=(3,), skip=(2, 3, 18, 17),
                              **PADDED),
    "last, one channel": _case([(1, 48, 5, 33)], (1, 48, 3, 3), act="relu", pre_relu=True, **PADDED),
    "9x9": _case([(1, 3, 9, 10)], (64, 3, 9, 9), bias=(64,), padding=4),
}  # fmt: skip


def dense(
    make: Make, n=1, height=12, width=9, growth=32, layers=2, last=3, outer=False, gain=1.0, outer_gain=1.0
) -> tuple:
    """The arguments of a `dense_block` of 64 channels in e4m3, whose branch is as large as what it is added to."""
    grown = [64 + i * growth for i in range(layers)]
    weights = [2 * make(growth, c, 3, 3) for c in grown] + [make(64, grown[-1] + growth, last, last)]
    biases = [make(growth) for _ in grown] + [make(64)]
    x, more = (make(n, 64, height, width) for _ in range(2))
    return OPS["dense_block"]._bind((x, weights, biases, 0.2, gain, more if outer else None, outer_gain, True))


FLOAT8 = {
    "tiles": {"height": 33, "width": 18},
    "outer": {"n": 2, "outer": True, "gain": 0.7, "outer_gain": 0.5},
    "esrgan": {"height": 7, "layers": 4},
    "one pixel": {"height": 1, "width": 1},
    "rdn": {"growth": 64, "layers": 3, "last": 1},
}


def in_float64(op: Op, args: Any) -> torch.Tensor:
    """The operator's definition in float64."""
    return op.eager(*_replace(args, [t.double() for t in _tensors(args)]))
