"""Resizing against what the authors' code gave: MATLAB's imresize, TensorFlow 1's resize_bicubic, ZSSR's utilities."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastsr.image.resize import back_projection, imresize, kernel_shift, pair, scaled_shape
from fastsr.ops.resize_bicubic import centred_taps, keys_cubic, resize_bicubic, tf1_taps

PARITY = Path(__file__).parent / "parity"
CASES = json.loads((PARITY / "imresize.json").read_text())["cases"]
STORED = load_file(PARITY / "imresize.safetensors")
ROUNDING = 6.1e-8  # of values up to 1 stored as float32
# The stored Lanczos kernels have a float32 epsilon added above and below the fraction line, against 0/0; ours do not.
LANCZOS_EPSILON = 1.5e-7
BORDERS = {"output": "mirror_end", "mirrored": "mirror"}  # of the stored tensors, by how their names begin


def image(name: str) -> torch.Tensor:
    return STORED[name].double().permute(2, 0, 1)[None]


def blur_kernel(name: str):
    return STORED[name].double().numpy() if name.startswith("kernel:") else name


def test_every_stored_case_is_tested():
    functions = [case["function"] for case in CASES]
    assert len(CASES) == 38
    assert {f.split()[0] for f in functions} == {"imresize", "kernel_shift", "back_projection"}


@pytest.mark.parametrize("borders", ["output", "mirrored"])
@pytest.mark.parametrize("case", [c for c in CASES if c["function"] == "imresize"], ids=lambda c: c["name"])
def test_imresize(case, borders):
    arguments = case["arguments"]
    x, kernel = image(case["input"]), blur_kernel(arguments["kernel"])
    if "raises" in case:  # the published code fails on a box that grows the image; MATLAB repeats the nearest pixel
        expected = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    elif f"mirrored:{case['name']}" in STORED:
        expected = image(f"{borders}:{case['name']}")
    else:  # both borders agree
        expected = image(f"output:{case['name']}")
    scale, shape = arguments.get("scale_factor"), arguments.get("output_shape")
    antialias = "vertical" if arguments.get("antialiasing", True) else False
    got = imresize(x, scale, shape=shape, kernel=kernel, antialias=antialias, border=BORDERS[borders])
    assert got.shape == expected.shape
    tolerance = ROUNDING + LANCZOS_EPSILON * (isinstance(kernel, str) and "lanczos" in kernel)
    assert (got - expected).abs().max() <= tolerance


# Two stored cases are antialiased by the vertical scale, where MATLAB looks at each axis.
MATLABS = [
    c
    for c in CASES
    if c["function"] == "imresize"
    and f"mirrored:{c['name']}" in STORED
    and c["name"] not in ("cubic_1.5x0.5", "cubic_0.5x1.5")
]


@pytest.mark.parametrize("case", MATLABS, ids=lambda c: c["name"])
def test_defaults_are_matlabs(case):
    arguments = case["arguments"]
    scale, shape, kernel = arguments.get("scale_factor"), arguments.get("output_shape"), arguments["kernel"]
    got = imresize(image(case["input"]), scale, shape=shape, kernel=kernel, antialias="antialiasing" not in arguments)
    tolerance = ROUNDING + LANCZOS_EPSILON * ("lanczos" in kernel)
    assert (got - image("mirrored:" + case["name"])).abs().max() <= tolerance


# Closed forms, for both of MATLAB's borders.


@pytest.mark.parametrize("border", ["mirror", "clamp"])
@pytest.mark.parametrize("scale", [2.0, 3.0, 1.7, 0.5, 1 / 3, 0.3, (0.5, 1.5)], ids=str)
class TestClosedForms:
    def test_a_constant_stays(self, scale, border):
        made = imresize(torch.full((1, 1, 9, 11), 0.37, dtype=torch.float64), scale, border=border)
        torch.testing.assert_close(made, torch.full_like(made, 0.37), rtol=0, atol=1e-15)

    def test_one_pixel_fills_the_result(self, scale, border):
        pixel = torch.full((2, 3, 1, 1), 0.7, dtype=torch.float64)
        made = imresize(pixel, scale, shape=(5, 4), border=border)
        torch.testing.assert_close(made, pixel.expand(2, 3, 5, 4), rtol=0, atol=1e-15)

    def test_a_ramp_is_sampled_at_the_centres(self, scale, border):
        """Keys' cubic reproduces straight lines wherever it does not reach outside, if it is widened by a whole number:
        sample i is the ramp at (i + 1/2) / scale - 1/2."""
        vertical = scale if isinstance(scale, float) else scale[0]
        stretch = max(1.0, 1 / vertical)
        ramp = torch.arange(40, dtype=torch.float64)[None, None, :, None].expand(1, 1, 40, 6)
        made = imresize(ramp, scale, border=border)[0, 0, :, 0]
        centre = (torch.arange(len(made), dtype=torch.float64) + 0.5) / vertical - 0.5
        inside = (centre >= 2 * stretch) & (centre <= 39 - 2 * stretch)
        exact = stretch == round(stretch)
        assert inside.sum() >= 3
        assert ((made - centre)[inside].abs() <= (1e-12 if exact else 0.05)).all()

    def test_rows_and_columns_are_independent(self, scale, border):
        x = image("input")
        y, w = (scale, scale) if isinstance(scale, float) else scale
        height, width = scaled_shape(13, 19, (y, w))
        rows = imresize(x, (y, 1.0), shape=(height, 19), border=border)
        expected = imresize(rows, (1.0, w), shape=(height, width), border=border)
        torch.testing.assert_close(imresize(x, scale, border=border), expected, rtol=0, atol=1e-13)

    def test_the_border_is_that_of_a_padded_image(self, scale, border):
        x, pad = image("input"), 30  # so that no kernel reaches the border of the padded image where it is looked at
        modes = {"mirror": "symmetric", "clamp": "edge"}
        wide = np.pad(x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode=modes[border])
        for dim, (size, factor) in enumerate(zip((13, 19), pair(scale), strict=True)):
            taps = centred_taps(size, 7, factor, border=border)
            centre = (np.arange(7) + 0.5) / factor - 0.5
            reached = np.arange(-pad, size + pad)
            weight = keys_cubic((centre - reached[:, None]) / max(1, 1 / factor))
            line = np.moveaxis(wide, 2 + dim, -1)[0, 0, pad]
            expected = line @ (weight / weight.sum(0))
            got = np.moveaxis(x.numpy(), 2 + dim, -1)[0, 0, 0][taps[0]] * taps[1]
            np.testing.assert_allclose(got.sum(0), expected, rtol=0, atol=1e-13)


def test_borders_differ_where_the_kernel_reaches_outside_and_nowhere_else():
    x = torch.rand(1, 1, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    difference = (imresize(x, 0.5) - imresize(x, 0.5, border="clamp")).abs()[0, 0]
    assert difference[2:-2, 2:-2].max() <= 1e-15 and difference[:2].max() > 1e-3 and difference[:, -2:].max() > 1e-3


def test_antialiasing_is_decided_axis_by_axis():
    x = image("input")
    both = imresize(x, (0.5, 1.5))
    torch.testing.assert_close(both, imresize(imresize(x, (0.5, 1.0)), (1.0, 1.5)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", [c for c in CASES if "kernel_shift" in c["function"]], ids=lambda c: c["name"])
def test_kernel_shift(case):
    got = kernel_shift(blur_kernel(case["input"]), case["arguments"]["sf"])
    expected = STORED[case["output"]].double().numpy()
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= ROUNDING * np.abs(expected).max()
    assert got.sum() == pytest.approx(case["sum"], abs=1e-7)


@pytest.mark.parametrize("borders", ["output", "mirrored"])
@pytest.mark.parametrize("case", [c for c in CASES if "back_projection" in c["function"]], ids=lambda c: c["name"])
def test_back_projection(case, borders):
    arguments = case["arguments"]
    got = back_projection(
        image(case["input"]),
        image(case["lr"]),
        arguments["sf"],
        down_kernel=blur_kernel(arguments["down_kernel"]),
        up_kernel=arguments["up_kernel"],
        antialias="vertical",
        border=BORDERS[borders],
    )
    assert (got - image(f"{borders}:{case['name']}")).abs().max() <= ROUNDING


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1.5e-7), (torch.float32, 3e-7)])
def test_tf1_bicubic_is_enhancenets(dtype, tolerance):
    case = json.loads((PARITY / "enhancenet_x4.json").read_text())
    stored = load_file(PARITY / "enhancenet_x4.safetensors")
    mean = torch.tensor(case["mean"], dtype=dtype)[:, None, None]
    got = resize_bicubic(stored["input"].to(dtype) - mean, 68, 92, 4.0, 4.0, "tf1") + mean
    assert (got - stored["bicubic"]).abs().max() <= tolerance  # the stored one is itself a float32 computation


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, ROUNDING), (torch.float32, 3e-7)])
def test_matlab_bicubic_is_idns(scale, dtype, tolerance):
    stored = load_file(PARITY / f"idn_x{scale}.safetensors")
    _, _, height, width = stored["bicubic"].shape
    got = resize_bicubic(stored["input"].to(dtype), height, width, float(scale), float(scale))
    assert (got - stored["bicubic"]).abs().max() <= tolerance


def test_tf1_coefficients_come_from_the_table_of_1024():
    _, exact = tf1_taps(8, 24, 2.5)  # fractions of 0.4, 0.8, ... are not multiples of 1/1024
    fraction = np.rint(0.4 * 1024) / 1024
    t, a = fraction, -0.75
    assert exact[1, 1] == pytest.approx((a + 2) * t**3 - (a + 3) * t**2 + 1, abs=1e-15)
    assert exact[0, 1] == pytest.approx(a * ((t + 1) ** 3 - 5 * (t + 1) ** 2 + 8 * (t + 1) - 4), abs=1e-15)


@pytest.mark.parametrize("size, count, scale", [(1, 5, 5.0), (2, 1, 0.125), (5, 3, 0.5), (7, 20, 2.9), (3, 3, 1.0)])
def test_taps_stay_inside_and_sum_to_one(size, count, scale):
    for position, weight in (centred_taps(size, count, scale), tf1_taps(size, count, scale)):
        assert position.min() >= 0 and position.max() < size
        np.testing.assert_allclose(weight.sum(axis=0), 1.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_and_dtype_are_kept(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.rand(2, 3, 9, 8, dtype=torch.float64).to(memory_format=layout)
    want = resize_bicubic(x, 5, 12, 0.5, 1.5)
    assert want.is_contiguous(memory_format=layout)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        got = resize_bicubic(x.to(dtype), 5, 12, 0.5, 1.5)
        assert got.dtype == dtype and got.is_contiguous(memory_format=layout)
        assert (got.double() - want).abs().max() <= tolerance


def test_gradient_after_a_call_in_inference_mode():
    x = torch.rand(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        resize_bicubic(x, 11, 13, 1.9, 2.7)
    assert torch.autograd.gradcheck(lambda t: resize_bicubic(t, 11, 13, 1.9, 2.7), (x,))


def test_scaled_shape_rounds_up_but_not_for_a_rounding_error():
    assert scaled_shape(10, 13, 1.1) == (11, 15)
    assert scaled_shape(13, 19, (1 / 3, 0.7)) == (5, 14)


def test_a_blur_kernel_of_one_tap_only_picks_pixels_and_takes_any_channel_count():
    x = torch.rand(2, 5, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(imresize(x, 0.5, kernel=np.ones((1, 1))), x[:, :, [0, 2, 4, 6]][..., [0, 2, 4]])
    assert imresize(x[..., :1, :1], 0.5, kernel=np.ones((5, 5)) / 25).shape == (2, 5, 1, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "expected scale or shape"),
        ({"scale": -1.0}, "positive finite"),
        ({"scale": 2.0, "kernel": "sinc"}, "cubic"),
        ({"scale": 2.0, "kernel": np.ones((3, 3))}, "at most 1"),
        ({"scale": 0.5, "kernel": np.ones(3)}, "2-D"),
        ({"scale": 2.0, "shape": (0, 4)}, "positive sizes"),
        ({"scale": 2.0, "antialias": "horizontal"}, "antialias"),
        ({"scale": 2.0, "border": "zero"}, "border: expected one of mirror, clamp"),
    ],
)
def test_bad_arguments_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        imresize(torch.rand(1, 3, 4, 4), **arguments)
    with pytest.raises(ValueError, match="N, C, H, W"):
        imresize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 2.0)
