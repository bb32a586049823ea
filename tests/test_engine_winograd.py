"""The Winograd forms of the CPU engine on many shapes drawn by chance: kernels in pieces, strided and transposed as
phases, upsampling, shuffles, groups, odd widths, several sources, sliced maps, every part of the epilogue, against
float64."""

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
from test_engine import LEVEL, LEVELS, Case, Layer, rms_error
from test_engine_shapes import epilogue, split

if LEVEL in (None, "baseline"):
    pytest.skip(f"no CPU kernels: {_library.load() or 'baseline'}", allow_module_level=True)

# By form: the error of a layer in float32, the same with products in bfloat16 (None: refused), and what it computes, as
# kernel, stride, transposed, upsample.
PIECES = {3: ((3, 1, False, 1), (5, 1, False, 1), (7, 1, False, 1)), 5: ((5, 1, False, 1), (9, 1, False, 1)), 2: ()}
PHASES = {
    3: ((6, 2, True, 1), (6, 2, False, 1), (5, 2, False, 1), (9, 3, True, 1), (5, 1, False, 2), (7, 1, False, 3)),
    5: ((17, 4, True, 1), (10, 2, False, 1), (9, 2, True, 1), (13, 1, False, 3)),
    2: ((8, 4, True, 1), (8, 4, False, 1), (4, 2, True, 1), (3, 2, False, 1), (12, 8, True, 1), (3, 1, False, 2)),
}
FORMS = {
    "winograd43": (2e-6, 1.6e-2, 3), "winograd23": (1e-6, 6e-3, 3), "winograd63": (1.2e-5, None, 3),
    "winograd25": (3e-6, None, 5), "winograd35": (5e-6, None, 5), "winograd42": (1.2e-6, 1e-2, 2),
    "winograd32": (1e-6, 6e-3, 2),
}  # fmt: skip
SIZES = ((1, 1), (1, 6), (2, 3), (5, 7), (3, 40), (13, 9), (26, 27))
WIDTHS = (1, 3, 8, 12, 16, 17, 20, 33, 64)


def drawn(form: str, count: int) -> Iterator[Case]:
    """Shapes that the form computes, always the same ones."""
    rng = random.Random(form)
    taps = FORMS[form][2]
    while count > 0:
        kernel, stride, transposed, upsample = rng.choice(PIECES[taps] * 2 + PHASES[taps])
        plain = stride == 1
        groups = rng.choice((1, 1, 2, 3, 4)) if plain else 1
        shuffle = rng.choice((1, 1, 2, 3)) if plain and upsample == 1 else 1
        cin, outputs = groups * rng.choice(WIDTHS), rng.choice(WIDTHS)
        cout = groups * shuffle**2 * (min(outputs, 20) if shuffle > 1 else outputs)
        conv = {"padding": rng.choice((0, kernel // 2, max(0, (kernel - stride) // 2))), "groups": groups}
        conv |= {"stride": stride, "transposed": transposed, "upsample": upsample, "shuffle": shuffle}
        conv |= {"shuffle_order": rng.choice(("torch", "tf"))}
        size = rng.choice(SIZES)
        if stride > 1 and not transposed:
            size = (size[0] * stride - rng.randrange(2), size[1] * stride)
        case = Case(form, split(rng, cin), cout, kernel, size, conv, epilogue(rng, cout, shuffle))
        weight = (cin, cout // groups) if transposed else (cout, cin // groups)
        *_, height, width = conv_shape(
            [torch.empty(1, cin, *case.size, device="meta")], torch.empty(*weight, kernel, kernel, device="meta"),
            stride, conv["padding"], groups, transposed, upsample,
        )  # fmt: skip
        if min(height, width) > 0 and height * width <= 12000 and cin * cout * kernel**2 < 8e5:
            count -= 1
            yield case


CASES = [
    *(case for form in FORMS for case in drawn(form, 24)),
    # sums over K in chunks, V of one chunk at a time, several panels of outputs, weights that do not stay in the cache
    Case("winograd43", (200, 190), 80, 3, (13, 14), {"padding": 1}, ("bias", "relu", "skip")),
    Case("winograd43", (64,), 272, 3, (9, 10), {"padding": 1}, ("bias", "relu")),
    Case("winograd35", (96,), 96, 5, (10, 9), {"padding": 2}, ("bias", "leaky")),
    # several batches a task, and outputs that are stored past the caches
    Case("winograd43", (32,), 64, 3, (131, 130), {"padding": 1}, ("bias", "relu", "partial")),
    Case("winograd43", (16,), 64, 3, (65, 67), {"padding": 1, "upsample": 2}, ("bias",)),
    Case(
        "winograd42", (16,), 32, 8, (33, 34), {"padding": 2, "stride": 4, "transposed": True}, ("bias", "leaky", "skip")
    ),
]


def plane(case: Case) -> int:
    """Channels of a partial sum: those of the map that is stored."""
    return case.cout // dict(case.conv).get("shuffle", 1) ** 2


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i].form}")
def test_shape(number):
    case = CASES[number]
    layer = Layer(case)
    assert layer.refused() == ""
    result, partial = layer.run()
    assert rms_error(result, layer.expected()) <= FORMS[case.form][0], case
    if partial is not None:
        sums = partial[:, :, : plane(case)].double().sum(1)
        scale = result.double().abs().sum((2, 3)).max()
        assert ((sums - result.double().sum((2, 3))).abs() <= 1e-6 * scale).all(), case


@pytest.mark.parametrize("number", range(0, len(CASES), 2), ids=lambda i: f"{i}-{CASES[i].form}")
def test_shape_in_bfloat16(number):
    case = CASES[number]
    bound = FORMS[case.form][1]
    layer = Layer(case, dtype=torch.bfloat16, bf16=bound is not None and LEVEL == "avx512_bf16")
    assert layer.refused() == ""
    result, _ = layer.run()
    assert rms_error(result, layer.expected()) <= (bound or 0.0) + 4e-3, case


@pytest.mark.parametrize("form", [form for form, (_, bound, _) in FORMS.items() if bound is None])
def test_forms_that_lose_too_much_in_bfloat16_are_refused(form):
    taps = FORMS[form][2]
    layer = Layer(Case(form, (16,), 16, taps, (8, 8), {"padding": taps // 2}, ()), bf16=True)
    assert "bfloat16" in layer.refused()


@pytest.mark.parametrize(
    ("form", "kernel", "conv", "why"),
    [
        ("winograd43", 1, {}, "kernel is outside 2..64"),
        ("winograd43", 8, {"stride": 2}, "the kernel has more taps a phase than the form"),
        ("winograd35", 3, {"padding": 1}, "the kernel has fewer taps a phase than the form"),
        ("winograd42", 12, {"stride": 4, "transposed": True}, "the kernel has more taps a phase than the form"),
        ("winograd43", 6, {"stride": 2, "groups": 2}, "groups go with stride 1"),
        ("winograd43", 6, {"stride": 2, "upsample": 2}, "upsample goes with stride 1"),
    ],
)
def test_what_a_form_does_not_do_is_refused_with_a_reason(form, kernel, conv, why):
    assert Layer(Case(form, (16,), 16, kernel, (24, 24), conv, ())).refused() == why


@pytest.mark.parametrize("form", FORMS)
def test_nothing_that_is_not_a_number_is_lost(form):
    """Everything that reads a NaN is NaN; what shares no tile with it stays."""
    kernel, stride, transposed, upsample = (PIECES[FORMS[form][2]] + PHASES[FORMS[form][2]])[0]
    conv = {"padding": kernel // 2 - stride // 2, "stride": stride, "transposed": transposed, "upsample": upsample}
    layer = Layer(Case(form, (16,), 16, kernel, (40, 40), conv, ("relu",)))
    layer.inputs[0][0, 3, 4, 4] = torch.nan
    result, _ = layer.run()
    assert torch.isnan(result[torch.isnan(layer.expected())]).all()
    assert torch.isfinite(result[1]).all()
    assert torch.isfinite(result[0, :, result.shape[2] // 2 :]).all()


@pytest.mark.skipif("FASTSR_CPU_ISA" in os.environ, reason="one level of the others")
@pytest.mark.parametrize("level", [level for level in LEVELS if level != LEVEL])
def test_the_other_levels(level):
    if LEVELS.index(level) > LEVELS.index(_library.offered_isa()):
        pytest.skip(f"this processor has no {level}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"FASTSR_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
