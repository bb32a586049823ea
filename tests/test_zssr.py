"""ZSSR: the network and the inference half against the authors' code, and the learning procedure against its rules."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastsr.train.zssr as procedure
from conftest import parity_case
from fastsr.image.resize import imresize, kernel_shift
from fastsr.models.zssr import ZSSR
from fastsr.models.zssr import ZSSRConfig as NetworkConfig
from fastsr.train.zssr import LearningRate, ZSSRConfig, final_test, random_father, untrained, zssr

FINAL = parity_case("zssr_final_test")
TINY = ZSSRConfig(width=8, depth=4, max_iters=3, crop_size=16, back_projection_iters=(1,))


def stored_network(dtype: torch.dtype) -> ZSSR:
    state = parity_case("zssr_final_test").state_dict()
    network = ZSSR(ZSSR.config_from(state, "port", {}))
    network.load_state_dict(state)
    return network.to(dtype)


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()


def photo(height: int, width: int, channels: int = 3, dtype=torch.float32) -> torch.Tensor:
    """A smooth picture with edges, in 0..1."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rings = torch.sin(0.02 * (x - width / 3) ** 2 + 0.03 * (y - height / 2) ** 2)
    planes = [0.5 + 0.3 * rings * torch.cos(0.3 * c * y) + 0.1 * (x > width / 2) for c in range(channels)]
    return torch.stack(planes)[None].to(dtype).clamp(0, 1)


# The network and the inference half.


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_network_is_the_ports(dtype, tolerance):
    stored = parity_case("zssr_net").tensors
    with torch.no_grad():
        got = stored_network(dtype)(stored["input"].to(dtype))
    assert (got - stored["output"]).abs().max() <= tolerance * rms(stored["output"])


def test_original_form_adds_the_raw_input_and_agrees_where_nothing_is_negative():
    port = stored_network(torch.float64)
    original = ZSSR(replace(port.config, relu_input=False)).double()
    original.load_state_dict(port.state_dict())
    x = torch.rand(1, 3, 9, 8, dtype=torch.float64) - 0.3
    with torch.no_grad():
        assert torch.equal(original(x.relu()), port(x))
        first = torch.relu(torch.nn.functional.conv2d(x, port.input.weight, padding=1))
        for n in range(1, 7):
            first = torch.relu(torch.nn.functional.conv2d(first, getattr(port, f"conv{n}").weight, padding=1))
        want = torch.nn.functional.conv2d(first, port.output.weight, padding=1) + x
        torch.testing.assert_close(original(x), want, rtol=0, atol=1e-12)


def test_sizes_are_read_from_the_state_dict():
    config = NetworkConfig(channels=1, width=5, depth=4)
    state = ZSSR(config).state_dict()
    assert list(state) == ["input.weight", "conv1.weight", "conv2.weight", "output.weight"]
    assert ZSSR.detect(state) == "port"
    assert ZSSR.config_from(state, "port", {}) == replace(config, relu_input=True)
    assert ZSSR.config_from(state, "port", {"relu_input": False}) == config
    with pytest.raises(ValueError, match="depth"):
        NetworkConfig(depth=2)


@pytest.mark.parametrize("borders", ["output", "mirrored"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", FINAL.about["cases"], ids=lambda c: c["name"])
def test_final_test(case, dtype, tolerance, borders):
    stored = FINAL.tensors
    kernel = case["kernel"]
    got = final_test(
        stored_network(dtype),
        stored["input"].to(dtype).permute(2, 0, 1)[None],
        case["sf"],
        kernel=stored[kernel].double() if kernel.startswith("kernel:") else kernel,
        output_flip=case["output_flip"],
        back_projection_iters=case["back_projection_iters"],
        official_resize=borders == "output",
    )
    want = stored[f"{borders}:{case['name']}"].permute(2, 0, 1)[None]
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * rms(want)


# What the network learns from.


def test_a_father_as_is_is_a_crop():
    config = ZSSRConfig(crop_size=12, augment_leave_as_is_probability=1.0)
    source, rng = torch.rand(1, 3, 15, 20), np.random.default_rng(0)
    corners = set()
    for _ in range(40):
        father = random_father([source], [1.0], config, rng)
        found = [
            corner
            for corner in itertools.product(range(4), range(9))
            if torch.allclose(source[..., corner[0] : corner[0] + 12, corner[1] : corner[1] + 12], father, atol=1e-4)
        ]
        assert len(found) == 1
        corners.update(found)
    assert len(corners) > 15


def test_a_father_without_interpolation_is_turned_and_mirrored_by_whole_pixels():
    config = ZSSRConfig(crop_size=8, augment_leave_as_is_probability=0.0, augment_no_interpolate_probability=1.0)
    source, rng = torch.rand(1, 1, 8, 8), np.random.default_rng(0)
    kinds = set()
    for _ in range(60):
        father = random_father([source], [1.0], config, rng)
        for k, mirror in itertools.product(range(4), (False, True)):
            turned = torch.rot90(source.flip(3) if mirror else source, k, (2, 3))
            # turning about (4, 4) and not (3.5, 3.5) may move the picture by one pixel; black comes in there
            padded = torch.nn.functional.pad(turned, (1, 1, 1, 1))
            for y, x in itertools.product(range(3), repeat=2):
                if torch.allclose(padded[..., y : y + 8, x : x + 8], father, atol=1e-4):
                    kinds.add((k, mirror))
    assert len(kinds) == 8
    still = replace(config, augment_allow_rotation=False)
    assert torch.allclose(random_father([source], [1.0], still, rng), source, atol=1e-4)


def keys(x: float, a: float = -0.75) -> float:
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def test_warp_is_opencvs_cubic_with_black_outside():
    image = torch.rand(1, 2, 9, 7, dtype=torch.float64)
    matrix, shift = np.array([[0.9, -0.4], [0.5, 0.7]]), np.array([2.3, -1.1])
    got = procedure._warp(image, matrix, shift, 8)
    back = np.linalg.inv(matrix)
    for v, u in itertools.product(range(8), repeat=2):
        x, y = back @ (np.array([u, v]) - shift)
        want = sum(
            keys(x - i) * keys(y - j) * image[0, :, j, i]
            for j in range(math.floor(y) - 1, math.floor(y) + 3)
            for i in range(math.floor(x) - 1, math.floor(x) + 3)
            if 0 <= j < 9 and 0 <= i < 7
        )
        torch.testing.assert_close(got[0, :, v, u], torch.zeros(2, dtype=torch.float64) + want, rtol=0, atol=1e-12)


def test_an_affine_father_of_known_parameters():
    """With no randomness left but the scale, the father is the source shrunk about its middle."""
    config = ZSSRConfig(
        crop_size=16,
        augment_leave_as_is_probability=0.0,
        augment_no_interpolate_probability=0.0,
        augment_scale_diff_sigma=0.0,
        augment_shear_sigma=0.0,
        augment_allow_rotation=False,
    )
    source = torch.ones(1, 1, 16, 16)
    sums = [random_father([source], [1.0], config, np.random.default_rng(i)).sum().item() for i in range(50)]
    assert 0.5**2 * 256 * 0.8 < min(sums) < 0.45 * 256 and 0.8 * 256 < max(sums) <= 256 * 1.05


def test_larger_results_become_sources_for_larger_scales():
    sources = [torch.full((1, 1, s, s), v) for s, v in ((20, 0.2), (30, 0.5), (40, 0.8))]
    config = ZSSRConfig(
        crop_size=8,
        augment_leave_as_is_probability=0.0,
        augment_no_interpolate_probability=1.0,
        augment_allow_rotation=False,
    )
    rng = np.random.default_rng(0)
    values = [random_father(sources, [1.0, 1.5, 2.0], config, rng).mean().item() for _ in range(300)]
    shares = [sum(abs(v - want) < 1e-3 for v in values) / 300 for want in (0.2, 0.5, 0.8)]
    assert sum(shares) == 1  # the scale is uniform in 0.5..2 and picks the first source that has it
    assert abs(shares[0] - 1 / 3) < 0.09 and abs(shares[1] - 1 / 3) < 0.09


def test_fathers_are_no_larger_than_the_image_needs():
    rng = np.random.default_rng(0)
    assert random_father([torch.rand(1, 3, 20, 31)], [1.0], ZSSRConfig(), rng).shape == (1, 3, 31, 31)
    assert random_father([torch.rand(1, 3, 200, 31)], [1.0], ZSSRConfig(), rng).shape == (1, 3, 128, 128)


# The learning rate.


def run_rate(errors):
    """The iterations at which the rate is cut, given the test error at each test."""
    rate, cuts = LearningRate(ZSSRConfig()), []
    for iteration in range(3000):
        if iteration % 50 == 0:
            rate.errors.append(next(errors))
        before = rate.value
        rate.update(iteration)
        if rate.value != before:
            assert rate.value == pytest.approx(before / 10)
            cuts.append(iteration)
        if rate.finished:
            break
    return cuts


def test_rate_is_cut_three_times_on_a_plateau_and_then_learning_ends():
    flat = (1e-3 + 1e-6 * v for v in itertools.cycle([1.0, -1.0, 0.5, -0.5, 0.3, 0.1, -0.4]))
    assert run_rate(flat) == [299, 599, 899]


def test_rate_is_kept_while_the_error_falls():
    assert run_rate(1e-3 - 1e-7 * n + 1e-9 * (-1) ** n for n in itertools.count()) == []


@pytest.mark.parametrize("factor, cut", [(0.999, False), (1.001, True)])
def test_the_deviation_of_the_slope_is_that_of_n_minus_2(factor, cut):
    x = np.arange(1, 6) * 50.0
    wiggle = np.array([1.0, -2.0, 2.0, -2.0, 1.0])  # sums to 0 and is orthogonal to x - mean: leaves the slope alone
    deviation = math.sqrt((wiggle**2).sum() / 3 / ((x - x.mean()) ** 2).sum())
    slope = -1.0
    wiggle *= factor * 1.5 / deviation  # -1.5 * slope is just above or below the deviation
    errors = [0.0, *(slope * x + wiggle)]
    rate = LearningRate(ZSSRConfig())
    rate.errors = list(errors)
    rate.update(299)
    assert (rate.value < 1e-3) == cut


# The whole.


def test_learning_beats_bicubic_on_a_picture_like_itself():
    y, x = torch.meshgrid(torch.arange(384.0) - 191.5, torch.arange(384.0) - 191.5, indexing="ij")
    angle, radius = torch.atan2(y, x), torch.hypot(y, x)
    spokes = (torch.sin(8 * angle + 3 * torch.log(radius + 1)) > 0).float()  # looks alike at every scale
    scene = torch.stack([spokes, 1 - spokes, spokes * 0.5 + 0.2])[None]
    large, small = imresize(scene, 1 / 4).clamp(0, 1), imresize(scene, 1 / 8).clamp(0, 1)
    losses = []
    config = ZSSRConfig(width=32, depth=6, max_iters=250)
    with torch.inference_mode():  # a caller's mode must not reach the learning
        result = zssr(small, 2, config=config, progress=lambda p: losses.append(p["loss"]))
    assert result.shape == large.shape and result.min() >= 0 and result.max() <= 1

    def psnr(a):
        return -10 * math.log10((a.clamp(0, 1) - large)[..., 4:-4, 4:-4].square().mean())

    assert sum(losses[-50:]) < 0.7 * sum(losses[:50])
    assert psnr(result) > psnr(imresize(small, 2)) + 0.5


def test_equal_seeds_give_equal_results_and_no_global_generator_is_touched():
    image = photo(18, 22)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first, again, other = (zssr(image, 2, config=TINY, seed=s) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale, shape", [(2, (26, 34)), (1.5, (20, 26)), ((3, 2), (39, 34)), (1.1, (15, 19))])
def test_shapes_and_dtypes(channels, scale, shape):
    for dtype in (torch.float32, torch.float64):
        result = zssr(photo(13, 17, channels, dtype), scale, config=replace(TINY, max_iters=1))
        assert result.shape == (1, channels, *shape) and result.dtype == dtype


@pytest.mark.parametrize("form", ["original", "port"])
def test_learning_computes_what_the_network_computes(form):
    learner = procedure._Learner(photo(8, 9).double(), replace(TINY, form=form), np.random.default_rng(0))
    x = torch.rand(1, 3, 11, 7, dtype=torch.float64) - 0.2
    torch.testing.assert_close(learner.train_forward(x), learner.network(x), rtol=0, atol=1e-12)
    learner.network.config = replace(learner.network.config, residual=False)
    torch.testing.assert_close(learner.train_forward(x), learner.network(x), rtol=0, atol=1e-12)


def test_strips_give_the_same_as_the_whole(monkeypatch):
    learner = procedure._Learner(photo(8, 9).double(), replace(TINY, init_variance=2.0), np.random.default_rng(0))
    x = torch.rand(1, 3, 41, 23, dtype=torch.float64)
    whole = learner.apply(x)
    monkeypatch.setattr(procedure, "STRIP_PIXELS", 23 * 6)
    torch.testing.assert_close(learner.apply(x), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["original", "port"])
def test_initial_weights(form):
    network = untrained(3, ZSSRConfig(form=form, width=48), np.random.default_rng(0))
    for name, weight in network.named_parameters():
        outputs, inputs = weight.shape[:2]
        variance = 2 / (9 * outputs) if form == "port" else 0.1 / (9 * inputs)
        assert weight.var().item() == pytest.approx(variance, rel=0.15), name
        assert abs(weight.mean().item()) < 0.15 * variance**0.5, name


@pytest.mark.parametrize("form", ["original", "port"])
def test_what_adam_gets_to_see(form, monkeypatch):
    made, rates = [], []

    class Adam(torch.optim.Adam):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Adam)

    def cut_at_every_second(self, iteration):
        self.value /= 10 if iteration % 2 == 1 else 1

    monkeypatch.setattr(LearningRate, "update", cut_at_every_second)
    two_steps = replace(TINY, form=form, scale_factors=((1.5, 1.5), (2.0, 2.0)), max_iters=50, min_learning_rate=9e-5)
    zssr(photo(12, 13), 2, config=two_steps)
    if form == "original":  # one Adam, whose moments live on; it sees the lowered rates
        assert len(made) == 1
        assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4] * 2)
    else:  # one for each step, always at the first rate
        assert len(made) == 2
        assert rates == pytest.approx([1e-3] * 8)


def test_gradual_steps_and_a_change_of_base():
    image, seen = photo(13, 11), []
    config = replace(
        TINY, scale_factors=((1.0, 1.5), (1.5, 1.5), (2.0, 2.0)), base_change_sfs=((1.5, 1.5),), max_iters=2
    )
    result = zssr(image, 2, config=config, progress=seen.append)
    assert result.shape == (1, 3, 26, 22)
    assert [(p["step"], p["iteration"]) for p in seen] == [(s, i) for s in range(3) for i in range(2)]
    assert set(seen[0]) == {"step", "steps", "iteration", "max_iters", "loss", "learning_rate", "test_mse"}
    fresh = zssr(image, 2, config=replace(config, init_net_for_each_sf=True))
    assert not torch.equal(fresh, result)


def test_presets():
    assert len(ZSSRConfig.gradual().scale_factors) == len(ZSSRConfig.gradual().back_projection_iters) == 6
    assert ZSSRConfig.real().noise_std == 0.0125 and not ZSSRConfig.real().output_flip
    assert ZSSRConfig.kernel().back_projection_iters == (2,)
    learner = procedure._Learner(photo(9, 9), ZSSRConfig.real(), np.random.default_rng(0))
    flat = torch.full((1, 3, 64, 64), 0.5)
    assert learner.shrink(flat, (2.0, 2.0), "cubic").std().item() == pytest.approx(0.0125, rel=0.1)


def test_a_measured_kernel_is_what_sons_and_back_projection_use():
    blur = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64.0
    image = photo(16, 16)
    config = replace(TINY, back_projection_iters=(30,))
    with_kernel = zssr(image, 2, config=config, kernels=blur)
    assert not torch.equal(with_kernel, zssr(image, 2, config=config))
    shrunk = imresize(with_kernel, 0.5, kernel=kernel_shift(blur, 2))
    assert (shrunk - image).abs().mean() < (imresize(with_kernel, 0.5) - image).abs().mean()
    with pytest.raises(ValueError, match="kernels: expected one 2-D array or 1"):
        zssr(image, 2, config=config, kernels=[blur, blur])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image": torch.rand(2, 3, 8, 8)}, r"\(1, C, H, W\)"),
        ({"image": torch.rand(1, 2, 8, 8)}, "C = 1 or 3"),
        ({"image": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, "float32 or float64"),
        ({"image": torch.full((1, 3, 8, 8), 2.0)}, r"0\.\.1"),
        ({"image": torch.full((1, 3, 8, 8), math.nan)}, r"0\.\.1"),
        ({"scale": 0.5}, "at least 1"),
        ({"scale": 3, "config": ZSSRConfig.gradual()}, "the last to be scale"),
    ],
)
def test_bad_arguments_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        zssr(**{"image": torch.rand(1, 3, 8, 8), "scale": 2, **arguments})


@pytest.mark.parametrize(
    "fields",
    [
        {"form": "tf"},
        {"depth": 2},
        {"learning_rate_slope_range": 100},
        {"back_projection_iters": (1, 2)},
        {"base_change_sfs": ((1.5, 1.5),)},
        {"downscale_method": "area"},
        {"augment_min_scale": 0.0},
    ],
)
def test_bad_settings_are_explained(fields):
    with pytest.raises(ValueError, match="ZSSRConfig: expected"):
        ZSSRConfig(**fields)
