"""SFTGAN beyond the stored outputs: its condition, the segmentation that makes it, sizes, variants, wrong files."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

import fastsr
from conftest import PARITY, parity_case, relative_error
from fastsr.models import sftgan
from fastsr.models.sftgan import BGR_MEAN, CLASSES, OutdoorSceneSeg, SFTNet

SMALL = {"blocks": 2, "features": 6, "condition": 4, "hidden": 3, "cond_hidden": 5}
SMALL_SEG = {"stem": (4, 4, 8), "blocks": (1, 2, 1, 1), "widths": (2, 3, 4, 5), "outs": (9, 10, 12, 14), "head": 6}


def probabilities(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).softmax(1)


@pytest.mark.parametrize("name", ("sft_net", "sft_net_torch"))
def test_a_pair_is_taken_as_the_authors_pass_it(name):
    case = parity_case(name)
    model = fastsr.load(case.state_dict())
    with torch.inference_mode():
        made = model((case.tensors["input"], case.tensors["condition"]))
        again = model.super_resolve(case.tensors["input"], 4, case.tensors["condition"])
    assert relative_error(made, case.tensors["output"]) < 1e-4 and torch.equal(made, again)


def test_the_variants_are_told_apart_though_their_trunks_agree():
    states = {name: parity_case(name).state_dict() for name in ("sft_net", "sft_net_torch")}
    assert [fastsr.load(s).config.paper for s in states.values()] == [False, True]
    trunks = [{k: v.shape for k, v in s.items() if not k.startswith("HR_branch")} for s in states.values()]
    assert trunks[0] == trunks[1]
    mixed = states["sft_net"] | {"HR_branch.1.weight": torch.zeros(64, 64, 3, 3)}
    with pytest.raises(fastsr.LoadError, match=r"looks like sftgan \(SFT_Net\).*unexpected keys: HR_branch\.1\.weight"):
        fastsr.load(mixed)


@pytest.mark.parametrize("paper", (False, True))
@pytest.mark.parametrize(("height", "width"), ((1, 1), (1, 6), (5, 3)))
def test_sizes_and_widths(paper, height, width):
    model = fastsr.create("sftgan", paper=paper, channels=1, classes=3, **SMALL)
    assert fastsr.load(model.state_dict()).config == model.config
    x, condition = torch.rand(2, 1, height, width), probabilities(2, 3, 4 * height, 4 * width)
    made = model.super_resolve(x, 4, condition)
    assert made.shape == (2, 1, 4 * height, 4 * width) and made.isfinite().all()
    assert not torch.equal(made, model.super_resolve(x, 4, condition.flip(1)))  # the condition matters
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.super_resolve(x, 4, condition), made)


@pytest.mark.parametrize("paper", (False, True))
def test_a_layer_without_influence_of_the_condition(paper):
    """With the last weights of all branches zero each transform is the identity, which leaves plain residual blocks."""
    model = fastsr.create("sftgan", paper=paper, **SMALL).double()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "SFT_" in key and "conv1" in key:
                value.fill_(1.0 if key.endswith("scale_conv1.bias") and paper else 0.0)
    x, condition = torch.rand(1, 3, 4, 5).double(), probabilities(1, 8, 16, 20).double()
    conv, relu = torch.nn.functional.conv2d, torch.relu
    head = h = conv(x, model.conv0.weight, model.conv0.bias, padding=1)
    for i in range(SMALL["blocks"]):
        a, b = model.sft_branch[str(i)].conv0, model.sft_branch[str(i)].conv1
        middle = relu(conv(relu(h) if paper else h, a.weight, a.bias, padding=1))
        h = h + conv(middle, b.weight, b.bias, padding=1)
    last = model.sft_branch[str(SMALL["blocks"] + 1)]
    trunk = head + conv(h, last.weight, last.bias, padding=1)
    y = trunk
    for i in (1, 4) if paper else (0, 3):
        layer = model.HR_branch[str(i)]
        if paper:
            y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
        y = conv(y, layer.weight, layer.bias, padding=1)
        y = relu(y if paper else torch.pixel_shuffle(y, 2))
    first, end = model.HR_branch["6"], model.HR_branch["8"]
    y = conv(relu(conv(y, first.weight, first.bias, padding=1)), end.weight, end.bias, padding=1)
    torch.testing.assert_close(model(x, condition), y)


def test_a_missing_or_wrong_condition_says_where_to_get_one():
    model = fastsr.create("sftgan", **SMALL)
    x = torch.rand(1, 3, 4, 5)
    with pytest.raises(ValueError, match=r"sftgan: expected a condition of shape \[1, 8, 16, 20\].*OutdoorSceneSeg"):
        model.super_resolve(x, 4)
    for shape in ((1, 8, 4, 5), (2, 8, 16, 20), (1, 7, 16, 20), (8, 16, 20)):
        with pytest.raises(ValueError, match="expected a condition of shape"):
            model(x, torch.rand(shape))
    with pytest.raises(ValueError, match="sizes of at least 1"):
        fastsr.create("sftgan", blocks=0)


@pytest.mark.parametrize("network", ("sftgan", "outdoor_scene_seg"))
def test_gradients_reach_every_parameter(network):
    model = fastsr.create(network, **(SMALL if network == "sftgan" else SMALL_SEG)).train()
    images = torch.rand(2, 3, 16, 16)
    made = model(images, probabilities(2, 8, 64, 64)) if network == "sftgan" else model.logits(images)
    made.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Segmentation.


def test_segmentation_gives_the_authors_probabilities():
    case = parity_case("outdoor_scene_seg")
    state = {k: v for k, v in case.state_dict().items() if not k.endswith("num_batches_tracked")}  # as old files are
    model = fastsr.load(state)
    with torch.inference_mode():
        made = model(case.tensors["input"])
    assert relative_error(made, case.tensors["output"]) < 1e-4
    torch.testing.assert_close(made.sum(1), torch.ones(2, 40, 56))
    with pytest.raises(fastsr.LoadError, match=r"looks like outdoor_scene_seg.*missing keys: feature\.20\.res\.3"):
        fastsr.load({k: v for k, v in state.items() if k != "feature.20.res.3.weight"})
    with pytest.raises(fastsr.LoadError, match="looks like outdoor_scene_seg"):
        fastsr.load({k: v for k, v in state.items() if ".proj." not in k})


def test_segmentation_of_other_sizes():
    model = fastsr.create("outdoor_scene_seg", channels=4, classes=3, **SMALL_SEG)
    assert fastsr.load(model.state_dict()).config == model.config
    assert model(torch.randn(1, 4, 16, 24)).shape == (1, 3, 16, 24)
    assert pickle.loads(pickle.dumps(model)).config == model.config
    assert model.scales == ()
    with pytest.raises(ValueError, match="outdoor_scene_seg: expected 3 stem sizes"):
        fastsr.create("outdoor_scene_seg", stem=(4, 4))
    with pytest.raises(ValueError, match="expected each stage to change the number of channels; got .*outs=\\(8, 8"):
        fastsr.create("outdoor_scene_seg", outs=(8, 8, 16, 32))


def test_segmentation_of_other_sizes_gives_a_multiple_of_eight():
    model = fastsr.create("outdoor_scene_seg", **SMALL_SEG)
    with torch.inference_mode():
        for height in range(11, 28):
            assert model(torch.rand(1, 3, height, 16)).shape[2] == 8 * ((height + 5) // 8)


def test_condition_feeds_the_segmentation_as_the_authors_script_does():
    """A flat colour, which bicubic enlargement keeps: BGR in 0..255 minus the means, in multiples of 8."""
    seen = []

    def segmentation(bgr):
        seen.append(bgr)
        return torch.arange(bgr[0, 0].numel()).view(1, 1, *bgr.shape[2:]).expand(1, 8, -1, -1)

    image = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, 3, 5)
    made = sftgan.condition(segmentation, image)
    assert seen[0].shape == (1, 3, 16, 24)
    for channel, value, mean in zip(range(3), (0.75, 0.5, 0.25), BGR_MEAN, strict=True):
        expected = torch.full((16, 24), 255 * value - mean, dtype=torch.float64)
        torch.testing.assert_close(seen[0][0, channel], expected)
    rows, columns = torch.arange(12)[:, None], torch.arange(20)
    assert torch.equal(made[0, 0], 24 * rows + columns)  # the top left corner of what the segmentation returned
    with pytest.raises(ValueError, match=r"condition: image: expected \(N, 3, H, W\)"):
        sftgan.condition(segmentation, image[:, :1])


@pytest.mark.parametrize(("height", "width"), ((1, 1), (3, 2), (4, 5)))
def test_condition_and_network_together(height, width):
    segmentation, model = fastsr.create("outdoor_scene_seg", **SMALL_SEG), fastsr.create("sftgan", **SMALL)
    image = torch.rand(2, 3, height, width)
    with torch.inference_mode():
        condition = sftgan.condition(segmentation, image)
        made = model(image, condition)
    assert condition.shape == (2, len(CLASSES), 4 * height, 4 * width) and made.shape == (2, 3, 4 * height, 4 * width)
    torch.testing.assert_close(condition.sum(1), torch.ones(2, 4 * height, 4 * width))


@pytest.mark.parametrize("network", (SFTNet, OutdoorSceneSeg))
def test_no_other_networks_files_are_mistaken_for_it(network):
    own = {"sftgan": ("sft_net",), "outdoor_scene_seg": ("outdoor",)}[network.name]
    for path in PARITY.glob("*.json"):
        keys = {entry[0]: None for entry in json.loads(path.read_text()).get("state_dict", [])}
        assert (network.detect(keys) is not None) == path.name.startswith(own), path.name
