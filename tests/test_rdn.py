"""RDN beyond the parity cases: both ports' keys, other sizes, the Torch7 original's form, wrong files."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastsr
from conftest import PARITY, parity_case, relative_error

DIALECTS = json.loads((PARITY / "rdn_key_dialects.json").read_text())["scales"]
SMALL = {"D": 3, "C": 2, "G": 5, "G0": 4}


def random(name, **config):
    """A small network in float64 whose biases are as large as its activations."""
    torch.manual_seed(0)
    model = fastsr.create(name, **config).double()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "Mean" not in key:
                value.copy_(torch.randn_like(value) / max(1, value[0].numel()) ** 0.5)
    return model


def restated(state, x, scale, C, D):
    """The paper's network in plain torch, given a state dict with EDSR-PyTorch's keys."""

    def conv(name, x):
        weight, bias = state[name + ".weight"], state[name + ".bias"]
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    first = conv("SFENet1", x)
    x = conv("SFENet2", first)
    results = []
    for d in range(D):
        grown = x
        for c in range(C):
            grown = torch.cat([grown, conv(f"RDBs.{d}.convs.{c}.conv.0", grown).clamp(min=0)], 1)
        x = x + conv(f"RDBs.{d}.LFF", grown)
        results.append(x)
    x = conv("GFF.1", conv("GFF.0", torch.cat(results, 1))) + first
    shuffles = {1: [], 2: [2], 3: [3], 4: [2, 2], 8: [2, 2, 2]}[scale]
    for i, r in enumerate(shuffles):
        x = F.pixel_shuffle(conv(f"UPNet.{2 * i}", x), r)
    return conv(f"UPNet.{2 * len(shuffles)}", x)


@pytest.mark.parametrize("scale", [2, 4])
def test_each_port_gives_the_others_output(scale):
    """The two ports are one network: the weights of one under the keys of the other give the stored output."""
    pairs = DIALECTS[str(scale)]["pairs"]
    for case, column in ((parity_case(f"rdn_yjn870_x{scale}"), 1), (parity_case(f"rdn_edsr_b_x{scale}"), 0)):
        names = {pair[column]: pair[1 - column] for pair in pairs}
        model = fastsr.load({names[k]: v for k, v in case.state_dict().items()})
        assert model.name == ("rdn", "rdn_plain")[1 - column]
        assert list(model.state_dict()) == [pair[1 - column] for pair in pairs]
        with torch.inference_mode():
            assert relative_error(model(case.tensors["input"]), case.tensors["output"]) < 1e-4


def test_the_keys_tell_the_value_range():
    pairs = DIALECTS["3"]["pairs"]
    shapes = {0: "rdn", 1: "rdn_plain"}
    ranges = {"rdn": (0.0, 255.0), "rdn_plain": (0.0, 1.0)}
    for column, name in shapes.items():
        model = fastsr.load({pair[column]: torch.zeros(pair[2]) for pair in pairs})
        assert (model.name, model.value_range, model.scales) == (name, ranges[name], (3,))


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("sizes", [SMALL, {"D": 1, "C": 3, "G": 2, "G0": 6, "kernel": 5}, SMALL | {"channels": 1}])
def test_other_sizes(scale, sizes):
    model = random("rdn", scale=scale, **sizes)
    loaded = fastsr.load(model.state_dict(), dtype=torch.float64)
    assert loaded.config == model.config
    x = 255 * torch.rand(2, model.config.channels, 4, 5, dtype=torch.float64)
    with torch.inference_mode():
        expected = restated(model.state_dict(), x, scale, sizes["C"], sizes["D"])
        assert relative_error(model(x), expected) < 1e-12


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_plain_form_of_other_sizes(scale):
    model = random("rdn_plain", scale=scale, D=2, C=3, G=4, channels=1)
    assert fastsr.load(model.state_dict()).config == model.config
    last = f"UPNet.{4 if scale == 4 else 2}."
    edsr = {}
    for key, value in model.state_dict().items():
        for ours, theirs in (("sfe", "SFENet"), ("rdbs", "RDBs"), ("layers", "convs"), (".conv.", ".conv.0."),
                             (".lff", ".LFF"), ("gff", "GFF"), ("upscale", "UPNet"), ("output.", last)):  # fmt: skip
            key = key.replace(ours, theirs)
        edsr[key] = value
    x = torch.rand(1, 1, 5, 3, dtype=torch.float64)
    with torch.inference_mode():
        assert relative_error(model(x), restated(edsr, x, scale, C=3, D=2)) < 1e-12


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_original_form_shifts_the_mean_around_the_network(scale):
    """The original is the restated network of its keys, with its mean colour taken off and added: inside, zero
    padding is the mean colour, so nothing of the shift may end up in the weights."""
    model = random("rdn_original", scale=scale, **SMALL, block_width=7)
    x = 255 * torch.rand(2, 3, 4, 5, dtype=torch.float64)
    mean = (255 * torch.tensor([0.4488, 0.4371, 0.4040])).double()[:, None, None]  # held in float32
    with torch.inference_mode():
        made = model(x)
        expected = restated(model.state_dict(), x - mean, scale, SMALL["C"], SMALL["D"]) + mean
    assert made.shape == (2, 3, 4 * scale, 5 * scale)
    assert relative_error(made, expected) < 1e-12


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_original_form_is_read_from_its_keys(scale):
    model = random("rdn_original", scale=scale, **SMALL, block_width=7, rgb_range=1.0)
    loaded = fastsr.load(model.state_dict(), dtype=torch.float64)
    assert loaded.config == model.config
    assert loaded.value_range == (0.0, 1.0)
    assert model.state_dict()["RDBs.0.LFF.weight"].shape[:2] == (7, 7 + 2 * 5)
    if scale > 1:  # the upsampler keeps G0 channels, where EDSR-PyTorch's has G
        assert model.state_dict()["UPNet.0.weight"].shape[1] == 4
        assert model.state_dict()["UPNet.2.weight"].shape[1] == 4


def test_original_form_has_the_tensors_of_the_authors_model():
    for scale, rows in DIALECTS.items():
        if "lua_order" in rows:
            keys = fastsr.create("rdn_original", scale=int(scale)).state_dict()
            assert sorted(keys) == sorted(rows["lua_order"])


@pytest.mark.parametrize("size", [(1, 1), (5, 3)])
@pytest.mark.parametrize("name", ["rdn", "rdn_plain", "rdn_original"])
def test_any_image_size(name, size):
    config = {"G": 4} if name == "rdn_plain" else {"G": 5, "G0": 4}
    model = fastsr.create(name, scale=3, D=2, C=2, **config)
    h, w = size
    assert model.super_resolve(torch.rand(2, 3, h, w), 3).shape == (2, 3, 3 * h, 3 * w)
    assert fastsr.upscale(np.zeros((h, w, 3), np.uint8), model).shape == (3 * h, 3 * w, 3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x = torch.rand(1, 3, h, w)
        assert torch.equal(twin(x), model(x))


def test_rgb_range_is_a_hint():
    state = random("rdn", **SMALL).state_dict()
    assert fastsr.load(state).value_range == (0.0, 255.0)
    assert fastsr.load(state, rgb_range=1.0).value_range == (0.0, 1.0)


def test_sizes_that_make_no_network_are_refused():
    for name, wrong in (("rdn", {"scale": 5}), ("rdn", {"D": 0}), ("rdn", {"kernel": 2}), ("rdn_plain", {"scale": 8}),
                        ("rdn_original", {"scale": 6}), ("rdn_original", {"block_width": 0})):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected"):
            fastsr.create(name, **wrong)


def test_nearly_right_files_say_what_is_wrong():
    state = random("rdn", **SMALL).state_dict()
    short = {k: v for k, v in state.items() if k != "RDBs.1.LFF.bias"}
    with pytest.raises(fastsr.LoadError, match=r"looks like rdn \(edsr\).*missing keys: RDBs\.1\.LFF\.bias"):
        fastsr.load(short)
    with pytest.raises(fastsr.LoadError, match="between 20 and 3 channels there is no shuffle by 2 or 3"):
        fastsr.load(state | {"UPNet.2.weight": torch.zeros(3, 3, 3, 3)})
    half = {k: v for k, v in state.items() if not k.startswith("UPNet.2")}
    with pytest.raises(fastsr.LoadError, match=r"expected scale to be one of \(2, 3, 4\); got 1"):
        fastsr.load(half)
    with pytest.raises(fastsr.LoadError, match=r"looks like rdn_original .* but the key 'subMean\.bias' is missing"):
        fastsr.load({**state, "subMean.weight": torch.zeros(3, 3, 1, 1)})
    plain = random("rdn_plain", D=2, C=2, G=4).state_dict()
    wide = plain | {"rdbs.0.layers.0.conv.weight": torch.zeros(6, 4, 3, 3)}
    with pytest.raises(fastsr.LoadError, match=r"wrong shapes: rdbs\.0\.layers\.0\.conv\.weight"):
        fastsr.load(wide)
