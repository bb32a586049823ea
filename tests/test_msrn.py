"""MSRN beyond the stored outputs: variants and widths against the paper, fusion order, sizes, wrong files."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn.functional import conv2d, pixel_shuffle

import fastsr
from conftest import parity_case, relative_error
from fastsr.ops import multi_scale_block

SMALL = {"blocks": 3, "features": 4}


def conv(x: torch.Tensor, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    weight = state[f"{name}.weight"]
    return conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)


def blocks(x: torch.Tensor, state: dict[str, torch.Tensor], names: list[str]) -> list[torch.Tensor]:
    """The outputs of the blocks, from equations 1 to 5 of the paper."""
    outputs = []
    for name in names:
        first = torch.cat([conv(x, state, f"{name}.conv_{k}_1").relu() for k in (3, 5)], 1)
        second = torch.cat([conv(first, state, f"{name}.conv_{k}_2").relu() for k in (3, 5)], 1)
        x = x + conv(second, state, f"{name}.confusion")
        outputs.append(x)
    return outputs


@pytest.mark.parametrize(("scale", "steps"), ((1, []), (2, [2]), (3, [3]), (4, [2, 2]), (8, [2, 2, 2])))
def test_variants_against_the_paper(scale, steps):
    torch.manual_seed(0)
    model = fastsr.create("msrn", scale=scale, channels=1, mean=(0.4,), rgb_range=2.0, **SMALL).double()
    state = model.state_dict()
    loaded = fastsr.load(state, dtype=torch.float64, rgb_range=2.0)
    assert loaded.scales == (scale,) and loaded.value_range == (0, 2) and loaded.colour == "y"
    x = 2 * torch.rand(2, 1, 5, 4, dtype=torch.float64)
    head = conv(x - 0.8, state, "head.0")
    y = torch.cat([*blocks(head, state, [f"body.{i}" for i in range(3)]), head], 1)  # the head comes last
    y = conv(conv(y, state, "tail.0"), state, "tail.1")
    for i, r in enumerate(steps):
        y = pixel_shuffle(conv(y, state, f"tail.2.{2 * i}"), r)
    assert relative_error(loaded(x), conv(y, state, "tail.3") + 0.8) < 1e-7  # the mean is stored from float32


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("upsampling", ("conv", "conv_2x"))
@pytest.mark.parametrize("scale", (2, 3, 4, 5))
def test_old_variants_against_the_paper(scale, upsampling, bias):
    torch.manual_seed(0)
    model = fastsr.create("msrn_old", scale=scale, channels=3, bias=bias, upsampling=upsampling, **SMALL).double()
    state = model.state_dict()
    loaded = fastsr.load({f"module.{k}": v for k, v in state.items()}, dtype=torch.float64)
    assert loaded.config == model.config and loaded.scales == (scale,) and loaded.colour == "rgb"
    assert any(k.startswith("bottle.bias") for k in state) == bias
    x = torch.rand(1, 3, 5, 4, dtype=torch.float64)
    first = conv(x, state, "conv_input")
    y = torch.cat([first, *blocks(first, state, [f"residual{i}.0" for i in (1, 2, 3)])], 1)  # the input comes first
    y = pixel_shuffle(conv(conv(y, state, "bottle"), state, upsampling), scale)
    assert relative_error(loaded(x), conv(y, state, "conv_output")) < 1e-12


def test_what_the_official_files_are():
    new, old = (fastsr.load(parity_case(name).state_dict()) for name in ("msrn_x2", "msrn_old_x3"))
    example = fastsr.load(parity_case("msrn_old_example_x3").state_dict())
    assert new.value_range == (0, 255) and new.colour == "rgb" and new.scales == (2,)
    assert old.value_range == (0, 1) and old.colour == "y" and old.scales == (3,)
    assert example.scales == (3,) and not example.config.bias and example.config.upsampling == "conv_2x"
    assert fastsr.load(parity_case("msrn_x2").state_dict(), rgb_range=1).config == new.config  # the file says it


@pytest.mark.parametrize("name", ("msrn", "msrn_old"))
@pytest.mark.parametrize(("height", "width"), ((1, 1), (1, 6), (7, 3)))
def test_sizes_and_copies(name, height, width):
    model = fastsr.create(name, scale=3, **SMALL)
    x = torch.rand(2, model.config.channels, height, width)
    made = model.super_resolve(x, 3)
    assert made.shape == (*x.shape[:2], 3 * height, 3 * width) and made.isfinite().all()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), made) and other.config == model.config


def test_wrong_files_are_named():
    state = fastsr.create("msrn", **SMALL).state_dict()
    with pytest.raises(fastsr.LoadError, match=r"msrn \(official\).*wrong shapes: tail\.0\.weight"):
        fastsr.load({k: v for k, v in state.items() if not k.startswith("body.2.")})
    with pytest.raises(fastsr.LoadError, match=r"msrn \(official\) but the key 'sub_mean\.bias' is missing"):
        fastsr.load({k: v for k, v in state.items() if k != "sub_mean.bias"})
    old = fastsr.create("msrn_old", **SMALL).state_dict()
    with pytest.raises(fastsr.LoadError, match=r"msrn_old \(old\).*missing keys: .*conv_output\.bias"):
        fastsr.load({k: v for k, v in old.items() if k != "conv_output.bias"})
    with pytest.raises(fastsr.LoadError, match=r"msrn_old \(old\) but the key 'conv\.weight' is missing"):
        fastsr.load({k: v for k, v in old.items() if not k.startswith("conv.")})


@pytest.mark.parametrize(
    ("name", "config", "message"),
    (
        ("msrn", {"scale": 6}, "scale to be 3 or a power of two; got 6"),
        ("msrn", {"channels": 1}, "a mean of 1 values"),
        ("msrn", {"features": 0}, "sizes of at least 1"),
        ("msrn_old", {"upsampling": "conv_3x"}, 'upsampling to be "conv" or "conv_2x"'),
    ),
)
def test_wrong_configurations(name, config, message):
    with pytest.raises(ValueError, match=message):
        fastsr.create(name, **config)


def test_wrong_arguments_of_the_operator():
    x = torch.zeros(1, 2, 4, 4)
    shapes = [(3, 2, 3, 3), (4, 6, 3, 3), (3, 2, 5, 5), (4, 6, 5, 5), (2, 8, 1, 1)]

    def call(index, shape):
        weights = [torch.zeros(shape if i == index else s) for i, s in enumerate(shapes)]
        return multi_scale_block(x, *(t for w in weights for t in (w, None)))

    assert call(None, None).shape == x.shape
    for index, shape, message in (
        (1, (4, 3, 3, 3), r"small2 is \(Cout, 6, k, k\)"),
        (2, (3, 2, 4, 4), r"large1 is \(Cout, 2, k, k\) with odd k"),
        (4, (3, 8, 1, 1), "as many channels as it takes"),
    ):
        with pytest.raises(ValueError, match=f"multi_scale_block: expected .*{message}"):
            call(index, shape)
