"""DBPN: its units, the two dialects of its keys, what files leave open, and what its scripts do around the network."""

from __future__ import annotations

import copy
import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import fastsr
from conftest import PARITY, parity_case, relative_error
from fastsr.models import NETWORKS
from fastsr.models.dbpn import IMAGENET_MEAN, IMAGENET_STD, Unit

SMALL = {"scale": 2, "features": 6, "width": 4, "stages": 3}
UNITS = [f"{kind}_x{scale}" for scale in (2, 4, 8) for kind in ("UpBlock", "DownBlock", "D_UpBlock", "D_DownBlock")]


def small(name: str = "dbpn", **changed):
    torch.manual_seed(0)
    return fastsr.create(name, **(SMALL | changed)).double()


def again(model, **hints):
    """What `load` makes of the model's state dict."""
    return fastsr.load(dict(model.state_dict()), dtype=model.dtype, **hints)


def image(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", UNITS)
def test_units(name, dtype, backend):
    if dtype == torch.float64 and backend != "eager":
        pytest.skip(f"backend '{backend}' has no float64 kernels")
    case = parity_case("dbpn_units")
    state = {k.removeprefix(name + "."): v for k, v in case.state_dict().items() if k.startswith(name + ".")}
    unit = Unit("Up" in name, 3 if name.startswith("D_") else 1, 8, int(name[-1])).to(dtype)
    unit.load_state_dict(state)
    x = case.tensors[f"input:{name}"].to(dtype)
    for inputs in ([x], x.split(8, 1)):  # one tensor, or the list that the network passes
        error = relative_error(unit(*inputs), case.tensors[f"output:{name}"])
        assert error <= (1e-6 if dtype == torch.float64 else 1e-5)


# The dialects.


def renamed(state, width: int, to_ddbpn: bool):
    """A state dict in the other dialect, by the stored table. Other depths than its 7 have fewer groups to reverse."""
    made = {}
    for ddbpn, official, transform in json.loads((PARITY / "dbpn_key_dialects.json").read_text())["pairs"]:
        source, target = (official, ddbpn) if to_ddbpn else (ddbpn, official)
        if official is None:
            if to_ddbpn:
                made[target] = torch.eye(3)[:, :, None, None] if ddbpn.endswith("weight") else torch.zeros(3)
            continue
        if source not in state:
            continue
        value = state[source]
        if transform.startswith("expand"):
            value = value.repeat(int(transform.split(":")[1])) if to_ddbpn else value[:1]
        elif transform.startswith("reverse_groups"):
            value = value.unflatten(1, (-1, width)).flip(1).flatten(1, 2)
        made[target] = value
    return made


def test_the_authors_weights_under_the_names_of_ddbpn():
    case = parity_case("dbpn_x2")
    model = fastsr.load(renamed(case.state_dict(), 64, to_ddbpn=True), dtype=torch.float64)
    assert type(model).__name__ == "DDBPN" and model.config.stages == 7 and model.value_range == (0.0, 1.0)
    with torch.inference_mode():
        assert relative_error(model(case.tensors["input"].double()), case.tensors["output"]) <= 1e-6


def test_weights_of_ddbpn_under_the_authors_names():
    """Possible where the slopes of each PReLU are equal and the mean is zero."""
    state = parity_case("ddbpn_edsr_x4").state_dict()
    slopes = [k for k, v in state.items() if v.dim() == 1 and k.replace(".weight", ".bias") not in state]
    for key in slopes:
        state[key] = state[key].mean().expand_as(state[key]).clone()
    for key in ("sub_mean.bias", "add_mean.bias"):
        state[key] = torch.zeros(3)
    converted = renamed(state, 32, to_ddbpn=False)
    x = image(1, 3, 5, 6)
    with torch.inference_mode():
        expected = fastsr.load(state, dtype=torch.float64)(x)
        made = fastsr.load(converted, dtype=torch.float64)(x)
        assert relative_error(made, expected) <= 1e-12
        converted["output_conv.conv.weight"] = state["reconstruction.0.weight"]  # the oldest first: the wrong order
        assert relative_error(fastsr.load(converted, dtype=torch.float64)(x), expected) > 1e-2


@pytest.mark.parametrize("name", ("dbpnll_x2", "dbpns_x4", "dbpn_res_mr64_3_x8", "ddbpn_edsr_x4", "dbpn_discriminator"))
def test_one_network_recognises_the_keys(name):
    state = parity_case(name).state_dict()
    assert [n.name for n in NETWORKS if n.detect(state)] == [
        "ddbpn" if "ddbpn" in name else "dbpn_discriminator" if "disc" in name else "dbpn"
    ]


def test_data_parallel_prefix():
    state = {f"module.{k}": v for k, v in parity_case("dbpns_x2").state_dict().items()}
    assert fastsr.load({"state_dict": state}).config.stages == 2


# What the file says, and what it leaves open.


@pytest.mark.parametrize(
    "sizes",
    (
        {"scale": 2, "channels": 1, "features": 5, "width": 3, "stages": 1},
        {"scale": 4, "channels": 3, "features": 6, "width": 4, "stages": 5},
        {"scale": 8, "channels": 4, "features": 3, "width": 2, "stages": 2},
        {"scale": 2, "channels": 3, "features": 6, "width": 4, "stages": 3, "iterations": 2, "residual": True},
        {"scale": 4, "channels": 1, "features": 6, "width": 4, "stages": 2, "iterations": 5, "residual": True},
        {"scale": 2, "channels": 3, "features": 6, "width": 4, "stages": 4, "iterations": 1, "residual": True},
    ),
)
def test_sizes_are_read(sizes):
    model = small(**sizes)
    loaded = again(model)
    x = image(2, sizes["channels"], 3, 4)
    assert loaded.config == model.config and loaded.scales == (sizes["scale"],)
    assert loaded(x).shape == (2, sizes["channels"], 3 * sizes["scale"], 4 * sizes["scale"])
    assert torch.equal(loaded(x), model(x))
    assert loaded.colour == ("y" if sizes["channels"] == 1 else "rgb")


def test_published_files_say_their_form():
    assert fastsr.load(parity_case("dbpn_res_mr64_3_x2").state_dict()).config.residual
    plain = fastsr.load(parity_case("dbpn_x2").state_dict()).config
    assert (plain.stages, plain.iterations, plain.residual, plain.imagenet) == (7, None, False, False)
    assert fastsr.load(parity_case("dbpn_x2").state_dict(), residual=True).config.residual


def test_as_many_iterations_as_stages_need_the_hint():
    """The same file is one pass of two stages, or two passes. Both put the first pass's last map in the same place if
    only the first map is read: newest first is that of stage 2, oldest first that of pass 1."""
    model = small(stages=2)
    weight = model.output_conv["conv"].weight.data
    x = image(1, 3, 4, 3)
    weight[:, 4:] = 0
    plain, iterative = again(model), again(model, iterations=2)
    assert plain.config.iterations is None and iterative.config.iterations == 2 and iterative.config.residual
    assert relative_error(iterative(x), plain(x)) <= 1e-12
    weight[:, 4:] = weight[:, :4]
    assert relative_error(again(model, iterations=2)(x), again(model)(x)) > 1e-3
    with pytest.raises(fastsr.LoadError, match=r"output_conv\.conv\.weight \[3, 8, 3, 3\] instead of \[3, 12, 3, 3\]"):
        again(model, iterations=3)


def test_value_range_of_ddbpn():
    state = parity_case("ddbpn_edsr_x4").state_dict()
    assert fastsr.load(state, rgb_range=1).value_range == (0.0, 255.0)  # the file says it
    half = {k: v.half() for k, v in state.items()}
    assert fastsr.load(half).value_range == (0.0, 255.0)
    unit = {k: v / 255 if k.endswith("mean.bias") else v for k, v in state.items()}
    assert fastsr.load(unit).value_range == (0.0, 1.0)
    zero = {k: v * 0 if k.endswith("mean.bias") else v for k, v in state.items()}
    assert fastsr.load(zero).value_range == (0.0, 1.0)
    assert fastsr.load(zero, rgb_range=255).value_range == (0.0, 255.0)


def test_sizes_of_ddbpn_are_read():
    model = small("ddbpn", scale=8, stages=4, rgb_range=1.0)
    assert again(model).config == model.config
    assert torch.equal(again(model)(image(1, 3, 2, 3)), model(image(1, 3, 2, 3)))


# What the authors' scripts do around the network.


def silent(**changed):
    """A network whose output is zero."""
    model = small(**changed)
    for parameter in model.output_conv.parameters():
        torch.nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("size", ((1, 1), (1, 7), (5, 4), (9, 11)))
@pytest.mark.parametrize("scale", (2, 4, 8))
def test_residual_is_pillows_bicubic(scale, size):
    levels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    shapes = ((size[1] * scale, size[0]), (size[1] * scale, size[0] * scale))  # Pillow's order: the width first
    exact = levels.astype(np.float32)
    for shape in shapes:
        exact = np.asarray(Image.fromarray(exact).resize(shape, Image.Resampling.BICUBIC)).clip(0, 255)
    rounded = np.asarray(Image.fromarray(levels).resize(shapes[1], Image.Resampling.BICUBIC))
    x = torch.from_numpy(levels)[None, None].double() / 255
    made = silent(scale=scale, channels=1, residual=True).super_resolve(x, scale)[0, 0].detach().numpy()
    np.testing.assert_allclose(made, exact / 255, atol=1e-6)
    np.testing.assert_allclose(made, rounded / 255, atol=1.5 / 255)  # rounded after each axis


@pytest.mark.parametrize("imagenet", (False, True))
def test_residual_stays_outside_the_call(imagenet):
    x = image(1, 3, 5, 4)
    assert not silent(residual=True, imagenet=imagenet)(x).any()
    model, bare = small(residual=True, imagenet=imagenet), small(imagenet=imagenet)
    added = model.super_resolve(x, 2) - silent(residual=True).super_resolve(x, 2)
    offset = torch.tensor(IMAGENET_MEAN)[:, None, None] if imagenet else 0
    torch.testing.assert_close(added, bare.super_resolve(x, 2) - offset, atol=1e-6, rtol=0)
    assert torch.equal(model(x), bare(x))


def test_imagenet_normalises_both_ends():
    case = parity_case("dbpns_x2")
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    model = fastsr.load(case.state_dict(), dtype=torch.float64, imagenet=True)
    with torch.inference_mode():
        made = model.super_resolve(case.tensors["input"].double() * std + mean, 2)
    assert relative_error((made - mean) / std, case.tensors["output"]) <= 1e-6


@pytest.mark.parametrize("size", ((1, 1), (1, 5), (7, 3)))
@pytest.mark.parametrize(
    "options", ({}, {"iterations": 2, "residual": True}, {"imagenet": True}, {"scale": 8}), ids=str
)
def test_super_resolve_takes_any_size(options, size):
    model = small(**options)
    scale = model.config.scale
    made = model.super_resolve(image(2, 3, *size), scale)
    assert made.shape == (2, 3, size[0] * scale, size[1] * scale) and made.isfinite().all()
    ddbpn = small("ddbpn", scale=scale)
    assert ddbpn.super_resolve(255 * image(1, 3, *size), scale).shape == (1, 3, size[0] * scale, size[1] * scale)


# The discriminator.


def test_discriminator_sizes_are_read():
    model = fastsr.create("dbpn_discriminator", image_size=32, channels=1, width=4)
    loaded = again(model)
    x = image(2, 1, 32, 32).float()
    assert loaded.config == model.config and loaded.scales == ()
    assert torch.equal(loaded(x), model(x)) and torch.equal(torch.sigmoid(model.logit(x)), model(x))
    with pytest.raises(ValueError, match=r"expected x of shape \(N, 1, 32, 32\); got \[2, 1, 32, 48\]; crop"):
        model(image(2, 1, 32, 48).float())


def test_discriminator_learns_from_the_batch():
    """In training an image's result depends on the others, and scaling all of them changes almost nothing."""
    torch.manual_seed(0)
    model = fastsr.create("dbpn_discriminator", image_size=16, width=4).double()
    x, y = image(4, 3, 16, 16), image(4, 3, 16, 16).flip(0)
    y[0] = x[0]
    assert torch.equal(model(x)[0], model(y)[0])
    model.train()
    assert not torch.allclose(model(x)[0], model(y)[0], rtol=1e-3)
    first = model.conv_blocks[0]["bn"]
    assert first.num_batches_tracked == 2 and first.running_mean.any()


# What is refused, and how.


def test_wrong_files_are_explained():
    state = parity_case("dbpns_x2").state_dict()
    seven = {k: v[..., :5, :5] if v.shape[-2:] == (6, 6) else v for k, v in state.items()}
    with pytest.raises(fastsr.LoadError, match=r"looks like dbpn .*expected scale 2, 4 or 8.*got 1"):
        fastsr.load(seven)
    with pytest.raises(fastsr.LoadError, match=r"missing keys: up2\.up_conv3\.act\.weight"):
        fastsr.load({k: v for k, v in state.items() if k != "up2.up_conv3.act.weight"})
    with pytest.raises(fastsr.LoadError, match=r"the key 'feat1\.conv\.weight' is missing|missing keys: feat1\.conv"):
        fastsr.load({k: v for k, v in state.items() if k != "feat1.conv.weight"})
    with pytest.raises(fastsr.LoadError, match=r"unexpected keys: up2\.conv\.conv\.weight"):
        fastsr.load(state | {"up2.conv.conv.weight": torch.zeros(32, 32, 1, 1)})


@pytest.mark.parametrize(
    ("name", "config", "message"),
    (
        ("dbpn", {"scale": 3}, "dbpn: expected scale 2, 4 or 8"),
        ("dbpn", {"stages": 0}, "at least 1"),
        ("dbpn", {"stages": 1, "iterations": 2}, "at least 2 stages"),
        ("dbpn", {"iterations": 0}, "iterations of at least 1"),
        ("dbpn", {"channels": 1, "imagenet": True}, "3 channels"),
        ("ddbpn", {"scale": 6}, "ddbpn: expected scale 2, 4 or 8"),
        ("ddbpn", {"rgb_range": 0}, "positive rgb_range"),
        ("dbpn_discriminator", {"image_size": 40}, "a multiple of 16; got 40"),
        ("dbpn_discriminator", {"width": 0}, "at least 1"),
    ),
)
def test_wrong_configurations_are_refused(name, config, message):
    with pytest.raises(ValueError, match=message):
        fastsr.create(name, **config)


def test_wrong_arguments_of_a_unit_are_refused():
    unit = small().down1
    with pytest.raises(ValueError, match=r"fastsr::down_projection: expected H and W .*multiple of the stride 2.*pad"):
        unit(image(1, 4, 6, 5))
    with pytest.raises(ValueError, match="one input of 4 channels, or a bottleneck"):
        unit(image(1, 4, 6, 6), image(1, 4, 6, 6))
    with pytest.raises(ValueError, match=r"bottleneck_weight is \(4, 4, 1, 1\)"):
        small().up3(image(1, 4, 3, 3))


def test_pickle_and_deepcopy():
    model, x = small(iterations=2, residual=True), image(1, 3, 3, 4)
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    for other in (pickle.loads(buffer.getvalue()), copy.deepcopy(model)):
        assert other.config == model.config and torch.equal(other(x), model(x))


def test_gradients_reach_every_parameter():
    model = small(iterations=2).train()
    model(image(1, 3, 4, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
