"""EnhanceNet beyond the stored outputs: the bicubic branch of the released network, sizes, widths, wrong files."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn.functional import conv2d

import fastsr
from conftest import parity_case, relative_error
from fastsr.models.enhancenet import TRAINING_MEAN

SMALL = {"blocks": 2, "features": 6}


def filled(**config) -> fastsr.models.Network:
    """A small network with weights of ordinary size."""
    torch.manual_seed(0)
    return fastsr.create("enhancenet", **{**SMALL, **config}).double()


def zeroed(model, *names: str):
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).zero_()
    return model


def test_the_bicubic_branch_is_tensorflows():
    """With the last layer zero the output is the branch that the released network's own run stored."""
    case = parity_case("enhancenet_x4")
    assert tuple(case.about["mean"]) == TRAINING_MEAN
    model = zeroed(filled(), "Conv_8.weight", "Conv_8.bias")
    x = case.tensors["input"].double()
    assert relative_error(model(x), case.tensors["bicubic"]) < 1e-6
    residual = case.tensors["output"] - model(x)
    assert relative_error(residual, case.tensors["residual"]) < 1e-4


@pytest.mark.parametrize("channels", (1, 3))
def test_small_ones_against_the_paper(channels):
    mean = TRAINING_MEAN[:channels]
    model = filled(channels=channels, rgb_mean=mean)
    state = model.state_dict()
    loaded = fastsr.load(state, dtype=torch.float64, rgb_mean=mean)
    assert loaded.config == model.config and loaded.colour == ("y" if channels == 1 else "rgb")

    def conv(h, n):
        name = f"Conv_{n}" if n else "Conv"
        return conv2d(h, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def enlarge(h):
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

    x = torch.rand(2, channels, 5, 4, dtype=torch.float64)
    y = conv(x - torch.tensor(mean, dtype=x.dtype)[:, None, None], 0).relu()
    for n in (1, 3):
        y = y + conv(conv(y, n).relu(), n + 1)
    for n in (5, 6):
        y = conv(enlarge(y), n).relu()
    residual = conv(conv(y, 7).relu(), 8)
    assert relative_error(loaded(x) - loaded.interpolate(x), residual) < 1e-12


@pytest.mark.parametrize(("height", "width"), ((1, 1), (1, 6), (7, 3)))
def test_sizes_and_copies(height, width):
    model = fastsr.create("enhancenet", scale=4, **SMALL)
    x = torch.rand(2, 3, height, width)
    made = model.super_resolve(x, 4)
    assert made.shape == (2, 3, 4 * height, 4 * width) and made.isfinite().all()
    assert model.scales == (4,) and model.value_range == (0, 1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), made) and other.config == model.config


def test_the_mean_is_a_hint():
    state = filled().state_dict()
    assert fastsr.load(state).config.rgb_mean == TRAINING_MEAN
    assert "rgb_mean=(0.5, 0.25, 0.0)" in repr(fastsr.load(state, rgb_mean=[0.5, 0.25, 0.0]))
    one = filled(channels=1, rgb_mean=(0.5,))
    assert fastsr.load(one).config == one.config  # a module of our own says it
    with pytest.raises(fastsr.LoadError, match="expected rgb_mean.*one value for each of 1 channels"):
        fastsr.load(one.state_dict())


def test_wrong_files_are_named():
    state = filled().state_dict()
    with pytest.raises(fastsr.LoadError, match=r"enhancenet \(tensorflow\) but expected 5 layers and two for each"):
        fastsr.load({k: v for k, v in state.items() if not k.startswith("Conv_8")})
    with pytest.raises(fastsr.LoadError, match=r"enhancenet \(tensorflow\).*missing keys: Conv_4\.bias"):
        fastsr.load({k: v for k, v in state.items() if k != "Conv_4.bias"})
    with pytest.raises(fastsr.LoadError, match=r"enhancenet \(tensorflow\).*wrong shapes: Conv_3\.weight"):
        fastsr.load(state | {"Conv_3.weight": torch.zeros(6, 6, 5, 5)})


@pytest.mark.parametrize(
    ("config", "message"), (({"scale": 2}, "scale to be 4"), ({"blocks": 0}, "sizes of at least 1"))
)
def test_wrong_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        fastsr.create("enhancenet", **config)
