"""IDN: the scale that no file says, the border its network does not make, other sizes, files that do not fit."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastsr
from conftest import parity_case, relative_error
from fastsr.models.idn import IDN

SMALL = {"channels": 1, "features": 8, "blocks": 2, "block_widths": (6, 4, 8, 8, 6, 11), "slice": 3, "groups": 2,
         "upsample_kernel": 9}  # fmt: skip


def small(**changed) -> IDN:
    torch.manual_seed(0)
    return fastsr.create("idn", **(SMALL | changed)).double()


def image(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def restated(state, x, scale: int, bicubic, *, blocks: int, kept: int, groups: int):
    """The network once more, in torch's own functions, from its description; `bicubic` has the full size."""

    def conv(name, x, groups=1):
        weight = state[f"{name}.weight"]
        y = F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2, groups=groups)
        return torch.where(y > 0, y, 0.05 * y)

    h = conv("conv2", conv("conv1", x))
    for n in range(3, 3 + blocks):
        short = conv(f"conv{n}_3", conv(f"conv{n}_2", conv(f"conv{n}_1", h), groups))
        long = conv(f"conv{n}_6", conv(f"conv{n}_5", conv(f"conv{n}_4", short[:, kept:]), groups))
        h = conv(f"down{n - 2}", long + torch.cat([h, short[:, :kept]], 1))
    weight = state["upsample.weight"]
    y = F.conv_transpose2d(h, weight, state["upsample.bias"], stride=scale, padding=weight.shape[-1] // 2)
    return y + bicubic[:, :, scale - 1 :, scale - 1 :]


# The scale.


def test_a_call_that_knows_no_scale_says_how_to_give_it():
    model = small()
    assert model.scales == (2, 3, 4) and "scale=None" in repr(model)
    with pytest.raises(ValueError, match=r"idn: the scale is not known.*model\(x, scale=4\).*load\(file, scale=4\)"):
        model(image(1, 1, 3, 4))
    assert model(image(1, 1, 3, 4), scale=2).shape == (1, 1, 5, 7)
    assert model(image(1, 1, 3, 4), scale=3).shape == (1, 1, 7, 10)


@pytest.mark.parametrize("scale", (2, 3, 4))
def test_the_scale_as_a_hint(scale):
    case = parity_case("idn_x3" if scale == 3 else f"idn_synthetic_x{scale}")
    model = fastsr.load(case.state_dict(), dtype=torch.float64, scale=scale)
    assert model.scales == (scale,) and f"scale={scale}" in repr(model) and model.parameter_count == 552_769
    with torch.inference_mode():
        assert relative_error(model(case.tensors["input"].double()), case.tensors["output"]) <= 1e-6


def test_a_module_keeps_its_scale():
    assert fastsr.load(small(scale=3)).config.scale == 3
    assert fastsr.load(small(scale=3), scale=2).config.scale == 2


@pytest.mark.parametrize(("known", "asked"), [(2, 4), (None, 0), (None, 2.0), (None, "2")])
def test_a_wrong_scale_is_refused(known, asked):
    with pytest.raises(ValueError, match=r"idn: expected scale.*got '?" + str(asked)):
        small(scale=known)(image(1, 1, 3, 3), scale=asked)
    with pytest.raises(ValueError, match=r"idn: expected scale.*got '?" + str(asked)):
        small(scale=known).super_resolve(image(1, 1, 3, 3), asked)


def test_a_wrong_scale_is_refused_when_loading():
    with pytest.raises(fastsr.LoadError, match=r"looks like idn.*expected scale to be a positive integer; got 2\.5"):
        fastsr.load(small().state_dict(), scale=2.5)


# Images.


@pytest.mark.parametrize("name", ("idn_synthetic_x2", "idn_x3", "idn_synthetic_x4"))
def test_super_resolve_is_the_authors_output_from_its_first_pixel_on(name):
    case = parity_case(name)
    scale, x = case.about["scale"], case.tensors["input"].double()
    model = fastsr.load(case.state_dict(), dtype=torch.float64)
    with torch.inference_mode():
        made = model.super_resolve(x, scale)
    assert made.shape == (*x.shape[:2], x.shape[2] * scale, x.shape[3] * scale)
    assert relative_error(made[:, :, scale - 1 :, scale - 1 :], case.tensors["output"]) <= 1e-6


@pytest.mark.parametrize("scale", (2, 3, 4))
def test_super_resolve_has_the_bicubic_image_before_it(scale):
    case = parity_case(f"idn_x{scale}")  # its bicubic image depends on no weights
    made, expected = small().super_resolve(case.tensors["input"].double(), scale), case.tensors["bicubic"]
    assert relative_error(made[:, :, : scale - 1], expected[:, :, : scale - 1]) <= 1e-6
    assert relative_error(made[:, :, :, : scale - 1], expected[:, :, :, : scale - 1]) <= 1e-6


@pytest.mark.parametrize("scale", (2, 3, 4))
@pytest.mark.parametrize("size", ((1, 1), (1, 6), (5, 3)), ids=str)
def test_super_resolve_of_any_size(size, scale):
    made = small().super_resolve(image(2, 1, *size), scale)
    assert made.shape == (2, 1, size[0] * scale, size[1] * scale) and torch.isfinite(made).all()


@pytest.mark.parametrize("shape", ((7, 5), (7, 5, 3)), ids=("gray", "colour"))
def test_photographs(shape):
    photograph = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    model = small(scale=2).float()
    assert model.colour == "y" and fastsr.upscale(photograph, model).shape == (14, 10, *shape[2:])
    with pytest.raises(ValueError, match="has the scales 2, 3, 4"):
        fastsr.upscale(photograph, small().float())


# Other sizes.


@pytest.mark.parametrize("scale", (1, 2, 3, 5))
@pytest.mark.parametrize(
    "sizes", ({}, {"channels": 3, "blocks": 1}, {"groups": 1, "slice": 1, "block_widths": (5, 3, 4, 2, 1, 9)}), ids=str
)
def test_other_configurations(sizes, scale):
    model = small(**sizes)
    loaded = fastsr.load(dict(model.state_dict()), dtype=torch.float64)
    c = loaded.config
    assert c == model.config and loaded.colour == ("rgb" if c.channels == 3 else "y")
    x = image(2, c.channels, 4, 5)
    bicubic = model.bicubic(x, scale)
    expected = restated(model.state_dict(), x, scale, bicubic, blocks=c.blocks, kept=c.slice, groups=c.groups)
    assert relative_error(loaded(x, scale=scale), expected) < 1e-12


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"scale": -1}, "scale to be a positive integer"),
        ({"blocks": 0}, "every size to be at least 1"),
        ({"slice": 8}, r"block_widths\[2\] > slice"),
        ({"block_widths": (6, 4, 8, 8, 6, 10)}, r"block_widths\[5\] = features \+ slice"),
        ({"block_widths": (7, 4, 8, 8, 6, 11)}, "multiples of groups"),
        ({"upsample_kernel": 8}, "an odd upsample_kernel"),
    ],
)
def test_impossible_sizes(sizes, message):
    with pytest.raises(ValueError, match="idn: expected .*" + message):
        small(**sizes)


def test_the_build_of_a_case_creates_it():
    case = parity_case("idn_x3")
    model = fastsr.create("idn", **case.about["build"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {k: s for k, s, _ in case.about["state_dict"]}
    assert list(model.state_dict()) == [key for key, _, _ in case.about["state_dict"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv4_5.bias"), r"missing keys: conv4_5\.bias"),
        (lambda s: s.pop("conv3_4.weight"), r"the key 'conv3_4\.weight' is missing"),
        (lambda s: s.update({"conv9.weight": torch.zeros(1)}), r"unexpected keys: conv9\.weight"),
        (lambda s: s.update({"conv4_2.weight": torch.zeros(4, 6, 3, 3)}), r"wrong shapes: conv4_2\.weight"),
        (lambda s: s.update({"upsample.weight": torch.zeros(8, 1, 8, 8)}), "an odd upsample_kernel"),
    ],
)
def test_a_file_that_nearly_fits(change, message):
    state = dict(small().state_dict())
    change(state)
    with pytest.raises(fastsr.LoadError, match="looks like idn.*" + message):
        fastsr.load(state)


# As a module.


def test_copies_and_pickles():
    model, x = small(scale=2), image(1, 1, 4, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    torch.testing.assert_close(fastsr.optimize(model)(x), model(x))


def test_gradients_reach_everything():
    model, x = small(scale=3), image(1, 1, 3, 4).requires_grad_()
    c = model.config
    made = model(x)
    made.square().sum().backward()
    state = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    again = x.detach().clone().requires_grad_()
    expected = restated(state, again, 3, model.bicubic(again, 3), blocks=c.blocks, kept=c.slice, groups=c.groups)
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad)


def test_compiles_into_one_graph():
    model, x = small(scale=2), image(1, 1, 4, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


# The operator.


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (3, (8, 8, 3, 3), "fourth weight reads some of the third's channels"),
        (1, (4, 5, 3, 3), r"weights\[1\] fits 6 channels"),
        (5, (10, 6, 3, 3), r"makes 8 \+ 3 channels"),
        (2, (8, 4, 2, 2), "odd k"),
    ],
)
def test_distillation_block_says_what_does_not_fit(index, shape, message):
    model = small()
    layers = [getattr(model, n) for n in (*(f"conv3_{i}" for i in range(1, 7)), "down1")]
    weights, biases = [m.weight.detach() for m in layers], [m.bias.detach() for m in layers]
    weights[index], biases[index] = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0], dtype=torch.float64)
    with pytest.raises(ValueError, match="fastsr::distillation_block: expected .*" + message):
        fastsr.ops.distillation_block(image(1, 8, 3, 3), weights, biases)
