"""The linear tail as one convolution: its algebra in float64, which way a CPU takes, errors, packing, memory."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import fastsr
from conftest import relative_error, require_backend, rms_error
from fastsr import _cpu_tail, packing, recipes
from fastsr.ops import linear_tail
from fastsr.ops.linear_tail import merge, merged_recipe, unmergeable
from fastsr.recipes import Conv

FACTORS = {"x2": [2], "x3": [3], "x4": [2, 2], "x4 at once": [4], "x8": [2, 2, 2]}
SIZES = ((1, 1), (1, 6), (2, 2), (2, 7), (5, 9), (16, 12))


def chain(factors, features=4, colours=3, shift=False, bias=True, dtype=torch.float64):
    """Weights and biases of an upsampler and the last convolution, and of a shift of the colours behind it."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(features * r * r, features, 3, 3) for r in factors] + [(colours, features, 3, 3)]
    shapes += [(colours, colours, 1, 1)] if shift else []
    weights = [torch.randn(s, generator=generator, dtype=dtype) / math.sqrt(s[1] * s[2] * s[3]) for s in shapes]
    biases = [0.3 * torch.randn(s[0], generator=generator, dtype=dtype) for s in shapes] if bias else []
    return weights, biases


def image(n, features, height, width, dtype=torch.float64) -> Tensor:
    return torch.randn(n, features, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize(("bias", "shift"), list(itertools.product((True, False), repeat=2)))
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_merged_is_the_chain(factors, bias, shift):
    weights, biases = chain(factors, shift=shift, bias=bias)
    merged = 0
    for height, width in SIZES:
        x = image(2, 4, height, width)
        expected = linear_tail.eager(x, weights, biases, 0.7)
        assert relative_error(recipes.run(_cpu_tail.recipe(x, weights, biases, 0.7)), expected) < 1e-12
        if unmergeable(x, weights) is None:
            merged += 1
            assert relative_error(recipes.run(merged_recipe(x, weights, biases, 0.7)), expected) < 1e-12
    assert merged == 4


def test_kernels_are_5x5_and_the_border_has_its_own():
    for factors in FACTORS.values():
        weights, biases = chain(factors, shift=True)
        kernels, bias = merge(weights, biases)
        scale = math.prod(factors)
        assert kernels.shape == (3, 3, 3 * scale**2, 4, 5, 5) and bias.shape == (3, 3, 3 * scale**2)
        promised = merge([w.to("meta") for w in weights], [b.to("meta") for b in biases])
        assert (promised[0].shape, promised[1].shape) == (kernels.shape, bias.shape)
        assert (kernels[1, 0] - kernels[0, 0])[..., 2:, :].abs().max() > 1e-3


def test_what_cannot_be_merged():
    weights, _ = chain([2, 2])
    assert "two rows" in unmergeable(image(1, 4, 1, 6), weights)
    wide = [torch.zeros(16, 4, 5, 5), torch.zeros(16, 4, 5, 5), torch.zeros(3, 4, 5, 5)]
    assert "PixelShuffle" in unmergeable(image(1, 4, 8, 8), wide)


def test_wide_kernels_behind_one_shuffle():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((16, 4, 5, 5), (3, 4, 5, 5))]
    x = image(1, 4, 6, 7)
    assert relative_error(recipes.run(merged_recipe(x, weights, [], 1.0)), linear_tail.eager(x, weights, [])) < 1e-12


@pytest.mark.parametrize(("height", "width", "merged"), [(1, 9, False), (2, 2, False), (16, 12, True), (64, 64, True)])
def test_fewer_multiplications_decide(height, width, merged):
    weights, biases = chain([2, 2], features=64)
    recipe = _cpu_tail.recipe(image(1, 64, height, width), weights, biases, 1.0)
    first = recipe.steps[0]
    assert isinstance(first, Conv) and (first.weight.shape[-1] == 5) == merged
    if merged:  # no map of all features in the size of the result
        assert all(shape[1] == 3 for shape in recipe.workspace.values())


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_error_on_the_cpu(factors, layout):
    require_backend("cpu")
    weights, biases = chain(factors, features=64, shift=True, bias=False, dtype=torch.float32)
    x = image(2, 64, 13, 21, torch.float32).to(memory_format=layout)
    exact = linear_tail.eager(x.double(), [w.double() for w in weights], biases)
    with fastsr.use("cpu"):
        made = linear_tail(x, weights, biases)
    assert rms_error(made, exact) < 2e-6
    inner = (..., slice(8, -8), slice(8, -8))  # no frame is wider than 7
    for part in inner, (..., slice(8), slice(None)), (..., slice(8)), (..., slice(-8, None), slice(None)):
        assert rms_error(made[part], exact[part]) < 2e-6


def test_packed_again_when_a_factor_changes():
    require_backend("cpu")
    weights, biases = chain([2, 2], features=16, dtype=torch.float32)
    x = image(1, 16, 12, 12, torch.float32)
    with fastsr.use("cpu"):
        before = linear_tail(x, weights, biases)
        for t in [*weights, *biases]:
            t.data.mul_(1.5)  # which no version counter sees
            after = linear_tail(x, weights, biases)
            assert rms_error(after, linear_tail.eager(x, weights, biases)) < 2e-6
            assert not torch.equal(after, before)
            before = after


def test_multiplies_in_float32_in_every_mode():
    require_backend("cpu")
    weights, biases = chain([2], features=64, dtype=torch.float32)
    x = image(1, 64, 16, 16, torch.float32)
    with fastsr.use("cpu"):
        expected = linear_tail(x, weights, biases)
        packing.freeze([*weights, *biases], "bfloat16")
        assert torch.equal(linear_tail(x, weights, biases), expected)


def test_not_a_number_stays_one():
    require_backend("cpu")
    weights, biases = chain([2], features=16, dtype=torch.float32)
    x = image(1, 16, 12, 12, torch.float32)
    x[0, 3, 0, 0] = torch.nan
    with fastsr.use("cpu"):
        made = linear_tail(x, weights, biases)
    assert made[0, :, :2, :2].isnan().all() and made[0, :, 14:, 14:].isfinite().all()


TRITON = [(f, torch.float32) for f in ("x2", "x3", "x4", "x8")] + [("x4", torch.bfloat16), ("x4", torch.float16)]


@pytest.mark.interp
@pytest.mark.parametrize(("factors", "dtype"), TRITON, ids=str)
def test_one_launch_by_triton(factors, dtype, monkeypatch):
    device, factors = triton_device(), FACTORS[factors]
    from fastsr.kernels.launch import Launch

    launched = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launched.append(self), run(self)))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    weights, biases = chain(factors, features=17, shift=True, dtype=torch.float32)
    weights, biases = ([t.to(dtype).to(device) for t in given] for given in (weights, biases))
    packing.freeze([*weights, *biases])
    limit = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    sizes = [(2, 2, 2), (1, 2, 5), (1, 5, 3), (1, 13, 11)]
    if dtype != torch.float32 or math.prod(factors) == 8:  # slow in the interpreter
        sizes = sizes[2:3] if math.prod(factors) == 8 else sizes[3:]
    for i, (n, height, width) in enumerate(sizes):
        layout = torch.contiguous_format if i == 1 else torch.channels_last
        x = image(n, 17, height, width, dtype).to(device).to(memory_format=layout)
        exact = linear_tail.eager(x.double(), [w.double() for w in weights], [b.double() for b in biases], 0.7)
        launched.clear()
        with fastsr.use("triton"):
            made = linear_tail(x, weights, biases, 0.7)
        assert len(launched) == 1
        frame = 2 * math.prod(factors)  # rows and columns that are near a border
        near = (slice(frame), slice(None)), (slice(-frame, None), slice(None)), (slice(None), slice(-frame, None))
        for part in ((slice(None), slice(None)), *near, (slice(frame), slice(frame))):
            assert relative_error(made[(..., *part)], exact[(..., *part)]) < limit


@pytest.mark.interp
def test_triton_merges_what_is_frozen_and_can_be_merged(monkeypatch):
    device = triton_device()
    from fastsr.kernels.launch import Launch

    launched = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launched.append(self), run(self)))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    weights, biases = ([t.to(device) for t in given] for given in chain([2, 2], dtype=torch.float32))
    x, line = (image(1, 4, h, 5, torch.float32).to(device) for h in (4, 1))
    for given, launches in ((x, 3), (line, 3)):
        launched.clear()
        with fastsr.use("triton"):
            assert relative_error(linear_tail(given, weights, biases), linear_tail.eager(given, weights, biases)) < 1e-5
        assert len(launched) == launches
    packing.freeze([*weights, *biases])
    for change, given, launches in ((1.0, x, 1), (1.5, x, 1), (1.0, line, 3)):
        launched.clear()
        for t in weights:
            t.mul_(change)  # by which what was packed is packed again
        with fastsr.use("triton"):
            assert relative_error(linear_tail(given, weights, biases), linear_tail.eager(given, weights, biases)) < 1e-5
        assert len(launched) == launches


def triton_device() -> str:
    """Where Triton's kernels run: in its interpreter where there is no GPU."""
    from fastsr import _triton

    if _triton.missing() is not None:
        pytest.skip(f"no Triton kernels here: {_triton.missing()}")
    if not _triton.interpreted():
        return "cuda"
    import triton_interpreter

    triton_interpreter.correct()
    return "cpu"
