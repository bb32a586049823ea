"""RCAN beyond the stored outputs: key dialects, what a file cannot say, variants, wrong files, the attention."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, pixel_shuffle

import fastsr
from conftest import PARITY, parity_case, relative_error
from fastsr.models.network import FLICKR2K_MEAN, RGB_MEAN
from fastsr.ops import channel_attention, rcab

SMALL = {"groups": 2, "blocks": 3, "features": 12, "hidden": 2}
ROWS = json.loads((PARITY / "rcan_key_dialects.json").read_text())["rows"]


def reference(x: torch.Tensor, state: dict[str, torch.Tensor], groups: int, blocks: int, steps: list[int]):
    """The network between the mean shifts, from the paper, on the authors' keys; `steps` are the PixelShuffles."""

    def conv(h, name):
        weight = state[f"{name}.weight"]
        return conv2d(h, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    head = x = conv(x, "head.0")
    for g in range(groups):
        group = x
        for b in range(blocks):
            body = f"body.{g}.body.{b}.body"
            y = conv(conv(x, f"{body}.0").relu(), f"{body}.2")
            gate = conv(conv(y.mean((2, 3), keepdim=True), f"{body}.3.conv_du.0").relu(), f"{body}.3.conv_du.2")
            x = x + y * gate.sigmoid()
        x = group + conv(x, f"body.{g}.body.{blocks}")
    x = head + conv(x, f"body.{groups}")
    for i, r in enumerate(steps):
        x = pixel_shuffle(conv(x, f"tail.0.{2 * i}"), r)
    return conv(x, "tail.1")


def official_state() -> dict[str, torch.Tensor]:
    return parity_case("rcan_tiny_x4").state_dict()


def basicsr_state() -> dict[str, torch.Tensor]:
    """The official weights under BasicSR's keys, which have no entry for the mean shift."""
    state = official_state()
    return {basicsr: state[official] for official, basicsr, _ in ROWS if basicsr is not None}


def test_the_keys_are_those_of_the_dialect_table():
    assert list(fastsr.load(official_state()).state_dict()) == [row[0] for row in ROWS]
    own = fastsr.load(basicsr_state()).state_dict()
    assert list(own) == [row[1] for row in ROWS if row[1] is not None]
    assert [list(v.shape) for v in own.values()] == [row[2] for row in ROWS if row[1] is not None]


def test_both_dialects_compute_the_same():
    official = fastsr.load(official_state(), dtype=torch.float64)
    basicsr = fastsr.load(basicsr_state(), dtype=torch.float64)
    assert official.value_range == (0, 255) and basicsr.value_range == (0, 1)
    x = torch.rand(1, 3, 7, 6, dtype=torch.float64)
    with torch.inference_mode():
        assert relative_error(basicsr(x), official(255 * x) / 255) < 1e-6  # the file's means are float32


def test_hints_are_used_where_the_file_cannot_say_and_only_there():
    official = fastsr.load(official_state(), rgb_range=1, img_range=1.0, res_scale=0.1, rgb_mean=(0, 0, 0))
    assert official.config == fastsr.load(official_state()).config
    plain = fastsr.load(basicsr_state(), rgb_range=1)
    assert plain.config.img_range == 255 and plain.config.res_scale == 1 and plain.config.rgb_mean == RGB_MEAN
    hinted = fastsr.load(basicsr_state(), img_range=1.0, res_scale=0.5, rgb_mean=[0.1, 0.2, 0.3])
    for said in ("img_range=1.0", "res_scale=0.5", "rgb_mean=(0.1, 0.2, 0.3)"):
        assert said in repr(hinted)
    assert "rgb_range=255.0" in repr(official)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("mean", (RGB_MEAN, FLICKR2K_MEAN))
@pytest.mark.parametrize("rgb_range", (1.0, 255.0, 0.5))
def test_the_range_is_read_from_the_mean_shift(rgb_range, mean, dtype):
    state = fastsr.create("rcan", scale=2, rgb_range=rgb_range, mean=mean, **SMALL).to(dtype).state_dict()
    config = fastsr.load(state, rgb_range=77).config
    assert config.mean == mean and config.rgb_range == pytest.approx(rgb_range, rel=1e-3)


def test_another_mean_takes_the_range_of_the_hint():
    state = fastsr.create("rcan", scale=2, rgb_range=10, mean=(0.5, 0.1, 0.9), **SMALL).state_dict()
    assert fastsr.load(state).value_range == (0, 255)
    assert fastsr.load(state, rgb_range=10).config.mean == pytest.approx((0.5, 0.1, 0.9))


@pytest.mark.parametrize(("scale", "steps"), ((1, []), (2, [2]), (3, [3]), (4, [2, 2]), (8, [2, 2, 2])))
def test_official_variants_against_the_paper(scale, steps):
    torch.manual_seed(0)
    model = fastsr.create("rcan", scale=scale, channels=1, mean=(), rgb_range=1, **SMALL).double()
    loaded = fastsr.load(model.state_dict(), dtype=torch.float64)
    assert loaded.config == model.config and loaded.scales == (scale,) and loaded.colour == "y"
    x = torch.rand(2, 1, 5, 4, dtype=torch.float64)
    expected = reference(x, model.state_dict(), SMALL["groups"], SMALL["blocks"], steps)
    assert relative_error(loaded(x), expected) < 1e-12


@pytest.mark.parametrize("name", ("rcan", "rcan_basicsr"))
@pytest.mark.parametrize(("height", "width"), ((1, 1), (1, 6), (7, 3)))
def test_sizes_and_copies(name, height, width):
    model = fastsr.create(name, scale=3, **SMALL)
    x = torch.rand(2, 3, height, width)
    made = model.super_resolve(x, 3)
    assert made.shape == (2, 3, 3 * height, 3 * width) and made.isfinite().all()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), made) and other.config == model.config


class BasicSRLike(nn.Module):
    """A module with BasicSR's attributes: constants that its state dict does not hold."""

    def __init__(self, res_scale: float) -> None:
        super().__init__()
        self.inner = fastsr.create("rcan_basicsr", scale=2, **SMALL)
        self.img_range, self.mean = 2.0, torch.tensor([0.5, 0.25, 0.125]).view(1, 3, 1, 1)
        for block in self.inner.modules():
            if hasattr(block, "res_scale"):
                block.res_scale = res_scale

    def state_dict(self, *args, **kwargs):
        return self.inner.state_dict(*args, **kwargs)


def test_a_modules_attributes_say_what_its_state_dict_cannot():
    module = BasicSRLike(res_scale=0.25)
    config = fastsr.load(module).config
    assert (config.img_range, config.res_scale, config.rgb_mean) == (2.0, 0.25, (0.5, 0.25, 0.125))
    assert fastsr.load(module, img_range=3.0).config.img_range == 3.0  # the user's word counts first
    again = fastsr.load(fastsr.load(module))
    assert again.config == config


def test_wrong_files_are_named():
    state = official_state()
    del state["body.1.body.0.body.3.conv_du.0.bias"]
    with pytest.raises(fastsr.LoadError, match=r"rcan \(official\).*missing keys: body\.1\.body\.0\.body\.3\.conv_du"):
        fastsr.load(state)
    with pytest.raises(fastsr.LoadError, match=r"rcan \(official\).*wrong shapes: body\.0\.body\.0\.body\.0\.weight"):
        fastsr.load(official_state() | {"body.0.body.0.body.0.weight": torch.zeros(64, 64, 5, 5)})
    with pytest.raises(fastsr.LoadError, match=r"rcan_basicsr \(basicsr\).*unexpected keys: sub_mean\.bias"):
        fastsr.load(basicsr_state() | {"sub_mean.bias": torch.zeros(3)})
    with pytest.raises(fastsr.LoadError, match="rcan_basicsr.*expected rgb_mean.*one value for each of 1 channels"):
        fastsr.load(fastsr.create("rcan_basicsr", channels=1, rgb_mean=(0.5,), **SMALL).state_dict())


@pytest.mark.parametrize(
    ("config", "message"),
    (
        ({"scale": 5}, "scale to be 3 or a power of two; got 5"),
        ({"blocks": 0}, "sizes of at least 1"),
        ({"channels": 1}, "mean to have 1 values, or none"),
        ({"rgb_range": 0}, "rgb_range and input_gain above 0"),
    ),
)
def test_wrong_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        fastsr.create("rcan", **config)


def test_a_constant_gate_is_a_constant_factor():
    """With the gate's weights zero the attention multiplies by sigmoid of the last bias, whatever the image."""
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    zero = torch.zeros(2, 4, 1, 1, dtype=x.dtype), torch.zeros(2, dtype=x.dtype), torch.zeros(4, 2, 1, 1, dtype=x.dtype)
    expected = x * bias.sigmoid()[:, None, None]
    torch.testing.assert_close(channel_attention(x, *zero, bias), expected)


def test_wrong_arguments_of_the_operators():
    x, w, b = torch.zeros(1, 4, 5, 5), torch.zeros(4, 4, 3, 3), torch.zeros(4)
    gate = torch.zeros(2, 4, 1, 1), torch.zeros(2), torch.zeros(4, 2, 1, 1), torch.zeros(4)
    with pytest.raises(ValueError, match=r"rcab: expected 3x3 kernels"):
        rcab(x, w, b, torch.zeros(4, 4, 5, 5), b, *gate)
    with pytest.raises(ValueError, match=r"rcab: expected up_weight is \(4, 2, 1, 1\)"):
        rcab(x, w, b, w, b, gate[0], gate[1], torch.zeros(4, 3, 1, 1), b)
    with pytest.raises(ValueError, match="channel_attention: expected one dtype and device"):
        channel_attention(x, *(t.double() for t in gate))
