"""The direct forms of the CPU engine (direct, pointwise, narrow) on many shapes drawn by chance: every kernel, stride
and direction, odd widths, groups, several sources, sliced maps, every part of the epilogue, against float64."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from conftest import ROOT
from fastsr import _library
from fastsr.ops.conv_act import conv_shape
from test_engine import EPILOGUES, LEVEL, LEVELS, Case, Layer, rms_error

if LEVEL in (None, "baseline"):
    pytest.skip(f"no CPU kernels: {_library.load() or 'baseline'}", allow_module_level=True)

SIZES = ((1, 1), (1, 6), (2, 3), (5, 7), (3, 40), (13, 9), (8, 26))
WIDTHS = (1, 2, 3, 5, 8, 12, 16, 17, 20, 33, 64)


def split(rng: random.Random, channels: int) -> tuple[int, ...]:
    """Channels as up to four sources."""
    widths = []
    while channels > 1 and len(widths) < 3 and rng.random() < 0.4:
        widths.append(rng.randrange(1, channels))
        channels -= widths[-1]
    return (*widths, channels)


def epilogue(rng: random.Random, outputs: int, shuffle: int) -> tuple[str, ...]:
    """Parts that go together: nothing of the output's shape with a shuffle, two skips only where there are channels."""
    parts = {"bias"} | set(rng.choice(EPILOGUES))
    if shuffle > 1:
        parts -= {"skip", "skips", "modulate", "outer"}
    if outputs <= 5:
        parts -= {"skips"}
    if rng.random() < 0.3:
        parts.add("pre")
    if rng.random() < 0.3 and shuffle == 1:
        parts.add("partial")
    return tuple(sorted(parts))


def drawn(form: str, count: int) -> Iterator[Case]:
    """Shapes that the form computes, always the same ones."""
    rng = random.Random(form)
    while count > 0:
        groups = rng.choice((1, 1, 1, 2, 3, 4)) if form != "narrow" else 1
        cin = groups * rng.choice(WIDTHS)
        shuffle = rng.choice((1, 1, 1, 2, 3)) if form != "narrow" else 1
        outputs = rng.choice(WIDTHS if form != "narrow" else (1, 2, 3, 4))
        cout = groups * shuffle**2 * (min(outputs, 20) if shuffle > 1 else outputs)
        kernel, conv = 1, {"groups": groups, "shuffle": shuffle, "shuffle_order": rng.choice(("torch", "tf"))}
        if form != "pointwise":
            kernel = rng.choice((1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 12, 17))
            conv |= {"padding": rng.choice((0, kernel // 2, max(0, kernel // 2 - 1)))}
            kind = rng.choice(("plain", "plain", "strided", "transposed", "upsample"))
            if kind in ("strided", "transposed"):
                conv |= {"stride": rng.choice((2, 3, 4)), "transposed": kind == "transposed"}
            elif kind == "upsample" and form == "direct":
                conv |= {"upsample": rng.choice((2, 3)), "stride": rng.choice((1, 1, 2))}
        if form == "narrow" and (cout * conv.get("transposed", 0) * conv.get("stride", 1) ** 2 > 4 or cin < 4 * cout):
            continue
        case = Case(form, split(rng, cin), cout, kernel, rng.choice(SIZES), conv, epilogue(rng, cout, shuffle))
        weight = (cin, cout // groups) if conv.get("transposed") else (cout, cin // groups)
        *_, height, width = conv_shape(
            [torch.empty(1, cin, *case.size, device="meta")], torch.empty(*weight, kernel, kernel, device="meta"),
            conv.get("stride", 1), conv.get("padding", 0), groups, conv.get("transposed", False),
            conv.get("upsample", 1),
        )  # fmt: skip
        if min(height, width) > 0 and cin * cout * kernel**2 < 2e6:
            count -= 1
            yield case


CASES = [
    *(case for form in ("direct", "pointwise", "narrow") for case in drawn(form, 60)),
    # sums in several pieces, and blocks of outputs in several panels
    Case("direct", (80,), 40, 5, (6, 30), {"padding": 2}, ("bias", "leaky")),
    Case("direct", (300,), 16, 3, (4, 13), {"padding": 1}, ("bias",)),
    Case("direct", (16,), 100, 3, (9, 8), {"padding": 1}, ("bias", "relu")),
    Case("pointwise", (64,) * 20, 80, 1, (3, 33), {}, ("bias", "relu", "skip")),
    Case("pointwise", (3, 1) * 12, 160, 1, (3, 33), {}, ("bias", "partial")),
    # several tiles a row
    Case("direct", (64,), 16, 3, (3, 500), {"padding": 1}, ("bias", "partial")),
    Case("narrow", (64,), 3, 3, (3, 500), {"padding": 1}, ("bias", "pre", "partial")),
    # outputs that are stored past the caches
    Case("direct", (3,), 64, 3, (130, 131), {"padding": 1}, ("bias", "skip")),
    Case("direct", (8,), 64, 6, (66, 65), {"padding": 2, "stride": 2, "transposed": True}, ("bias", "leaky")),
    Case("pointwise", (32, 32), 64, 1, (130, 131), {}, ("bias", "relu")),
]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i].form}")
def test_shape(number):
    case = CASES[number]
    layer = Layer(case)
    assert layer.refused() == ""
    result, partial = layer.run()
    expected = layer.expected()
    eager = rms_error(layer.expected(torch.float32), expected)
    assert rms_error(result, expected) <= max(2 * eager, 1e-7), case
    if partial is not None:
        padded = torch.nn.functional.pad(result.double().sum((2, 3)), (0, -case.cout % 16))
        scale = result.double().abs().sum((2, 3)).max()
        assert ((partial.double().sum(1) - padded).abs() <= 1e-6 * scale).all(), case


@pytest.mark.parametrize("number", range(0, len(CASES), 3), ids=lambda i: f"{i}-{CASES[i].form}")
def test_shape_in_bfloat16(number):
    case = CASES[number]
    layer = Layer(case, dtype=torch.bfloat16, bf16=case.form != "narrow" and LEVEL == "avx512_bf16")
    assert layer.refused() == ""
    result, _ = layer.run()
    assert rms_error(result, layer.expected()) <= 8e-3, case


@pytest.mark.skipif("FASTSR_CPU_ISA" in os.environ, reason="one level of the others")
@pytest.mark.parametrize("level", [level for level in LEVELS if level != LEVEL])
def test_the_other_levels(level):
    if LEVELS.index(level) > LEVELS.index(_library.offered_isa()):
        pytest.skip(f"this processor has no {level}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"FASTSR_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
