"""SRFeat beyond the stored evaluation outputs: training mode, sizes, variants, wrong files."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F

import fastsr
from conftest import PARITY, parity_case, relative_error
from fastsr.models.srfeat import SRFeat, SRFeatDiscriminator, SRFeatVGG

SMALL = {"features": 4, "blocks": 3, "kernel": 5}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64 with batch-normalisation values that are no identity."""
    generator = torch.Generator().manual_seed(3)
    model = model.double()
    for key, value in model.state_dict().items():
        if ".bn" in key or key.startswith("bn"):
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.copy_((0.3 * noise).exp() if key.endswith(("weight", "var")) else 0.3 * noise)
    return model


# The generator.


def normalised(x: torch.Tensor, bn: torch.nn.Module, batch: bool) -> torch.Tensor:
    """Batch normalisation written out."""
    mean, var = bn.running_mean, bn.running_var
    if batch:
        mean = x.mean((0, 2, 3))
        var = (x - mean[:, None, None]).square().mean((0, 2, 3))
    mean, var, weight, bias = (t[:, None, None] for t in (mean, var, bn.weight, bn.bias))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize("training", (False, True))
def test_generator_written_out(training):
    """Every branch on its own, TensorFlow's order of depth to space by its indices, unfolded batch normalisation."""
    model = randomised(fastsr.create("srfeat", channels=2, **SMALL)).train(training)
    x = torch.rand(2, 2, 4, 3, dtype=torch.float64) * 2 - 1
    h = F.conv2d(x, model.conv_in.weight, model.conv_in.bias, padding=2)
    results = []
    for block in model.blocks:
        y = normalised(F.conv2d(h, block.conv1.weight, padding=1), block.bn1, training)
        y = torch.where(y > 0, y, 0.2 * y)
        h = h + normalised(F.conv2d(y, block.conv2.weight, padding=1), block.bn2, training)
        results.append(h)
    h = results[-1] + sum(F.conv2d(r, s.weight) for r, s in zip(results[:-1], model.skips, strict=True))
    for up in (model.up1, model.up2):
        cells = F.conv2d(h, up.weight, up.bias, padding=1)
        n, c, height, width = cells.shape
        h = cells.new_empty(n, c // 4, 2 * height, 2 * width)
        for row in (0, 1):
            for column in (0, 1):
                first = (2 * row + column) * c // 4
                h[:, :, row::2, column::2] = cells[:, first : first + c // 4]
        h = torch.where(h > 0, h, 0.2 * h)
    expected = F.conv2d(h, model.conv_out.weight, model.conv_out.bias, padding=1)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_training_mode_moves_the_running_averages_by_a_tenth():
    model = fastsr.create("srfeat", **SMALL).double().train()
    x = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    seen = F.conv2d(model.conv_in(x), model.blocks[0].conv1.weight, padding=1).detach()
    model(x)
    bn = model.blocks[0].bn1
    torch.testing.assert_close(bn.running_mean, 0.1 * seen.mean((0, 2, 3)))
    biased = (seen - seen.mean((0, 2, 3), keepdim=True)).square().mean((0, 2, 3))
    torch.testing.assert_close(bn.running_var, 0.9 + 0.1 * biased)


@pytest.mark.parametrize("training", (False, True))
def test_gradients_reach_every_parameter(training):
    model = fastsr.create("srfeat", **SMALL).train(training)
    model(torch.rand(2, 3, 4, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("config", ({"scale": 2, "channels": 1}, {"scale": 8, "blocks": 1}, {"features": 6}))
@pytest.mark.parametrize(("height", "width"), ((1, 1), (3, 5)))
def test_generator_sizes_and_widths(config, height, width):
    model = fastsr.create("srfeat", **(SMALL | config))
    assert fastsr.load(model.state_dict()).config == model.config
    (scale,), c = model.scales, model.config.channels
    x = torch.rand(2, c, height, width) * 2 - 1
    made = model.super_resolve(x, scale)
    assert made.shape == (2, c, height * scale, width * scale) and made.isfinite().all()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), made)
    assert model.value_range == (-1.0, 1.0)


def test_files_of_ports_with_batch_counters_load():
    state = dict(fastsr.create("srfeat", **SMALL).state_dict())
    for i in range(3):
        state |= {f"blocks.{i}.bn{n}.num_batches_tracked": torch.tensor(7) for n in (1, 2)}
    assert fastsr.load(state).config.blocks == 3


def test_wrong_files_and_configurations():
    state = dict(fastsr.create("srfeat", **SMALL).state_dict())
    unused = state | {"skips.2.weight": torch.zeros(4, 4, 1, 1)}  # the reference's graph has it, its files do not
    with pytest.raises(fastsr.LoadError, match=r"looks like srfeat .*unexpected keys: skips\.2\.weight"):
        fastsr.load(unused)
    with pytest.raises(fastsr.LoadError, match=r"missing keys: blocks\.1\.bn2\.running_var"):
        fastsr.load({k: v for k, v in state.items() if k != "blocks.1.bn2.running_var"})
    with pytest.raises(ValueError, match="srfeat: expected scale to be 2, 4 or 8; got 3"):
        fastsr.create("srfeat", scale=3)
    with pytest.raises(ValueError, match="an odd kernel"):
        fastsr.create("srfeat", kernel=4)


# The discriminators.


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", ("srfeat_disc_image", "srfeat_disc_feature"))
def test_discriminator_in_training_mode(name, dtype):
    case = parity_case(name)
    model = fastsr.load(case.state_dict(), dtype=dtype).train()
    made = model(case.tensors["input"].to(dtype))
    limit = 1e-6 if dtype == torch.float64 else 1e-4
    assert relative_error(made, case.tensors["output_train"]) <= limit
    assert relative_error(model.bn1.running_mean, case.tensors["bn1_running_mean_after_train"]) <= limit
    assert relative_error(model.bn1.running_var, case.tensors["bn1_running_var_after_train"]) <= limit


def test_discriminator_is_tied_to_one_size():
    model = fastsr.create("srfeat_discriminator", channels=2, widths=(3, 4, 5, 6), hidden=7, cells=6)
    assert fastsr.load(model.state_dict()).config == model.config
    for height, width in ((8, 12), (5, 9), (7, 11)):  # 2 x 3 pixels, halves rounded up
        assert model(torch.rand(2, 2, height, width)).shape == (2, 1)
    with pytest.raises(ValueError, match=r"ends in 6 pixels; got one that ends in 3 x 3"):
        model(torch.rand(2, 2, 9, 12))
    model.train()(torch.rand(2, 2, 8, 12)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert pickle.loads(pickle.dumps(model)).config == model.config and model.scales == ()


def test_discriminator_wrong_files_and_configurations():
    model = fastsr.create("srfeat_discriminator", channels=2, widths=(3, 4), hidden=7, cells=6)
    state = dict(model.state_dict())
    with pytest.raises(fastsr.LoadError, match="fc1 has 25 inputs, which is no multiple of the 4 channels"):
        fastsr.load(state | {"fc1.weight": torch.zeros(7, 25)})
    with pytest.raises(fastsr.LoadError, match=r"missing keys: bn1\.bias"):
        fastsr.load({k: v for k, v in state.items() if k != "bn1.bias"})
    with pytest.raises(ValueError, match="two or more widths"):
        fastsr.create("srfeat_discriminator", widths=(3,))


# VGG.


def test_vgg_clips_and_rounds_up():
    model = fastsr.create("srfeat_vgg19", widths=(4, 5, 6), depths=(1, 2, 1)).double()
    assert fastsr.load(model.state_dict(), dtype=torch.float64).config == model.config
    x = torch.tensor([-1.5, 0.25, 1.5], dtype=torch.float64).repeat(3, 7, 3)[None].requires_grad_()
    features = model(x)
    assert features.shape == (1, 6, 2, 3)
    assert torch.equal(features, model(x.detach().clamp(-1, 1)))
    features.sum().backward()
    outside = x.detach().abs() > 1
    assert (x.grad[outside] == 0).all() and x.grad[~outside].abs().max() > 0
    assert model(torch.rand(1, 3, 1, 1).double()).shape == (1, 6, 1, 1)


def test_vgg_wrong_files_and_configurations():
    model = fastsr.create("srfeat_vgg19", widths=(4, 5), depths=(2, 1))
    state = dict(model.state_dict())
    with pytest.raises(fastsr.LoadError, match=r"looks like srfeat_vgg19.*unexpected keys: fc6\.weight"):
        fastsr.load(state | {"fc6.weight": torch.zeros(2, 2)})
    with pytest.raises(fastsr.LoadError, match=r"missing keys: conv1_2\.bias"):
        fastsr.load({k: v for k, v in state.items() if k != "conv1_2.bias"})
    with pytest.raises(ValueError, match="one width and one depth a block"):
        fastsr.create("srfeat_vgg19", widths=(4, 5))


@pytest.mark.parametrize("network", (SRFeat, SRFeatDiscriminator, SRFeatVGG))
def test_no_other_networks_files_are_mistaken_for_it(network):
    own = {"srfeat": "srfeat_x4", "srfeat_discriminator": "srfeat_disc", "srfeat_vgg19": "srfeat_vgg"}[network.name]
    for path in PARITY.glob("*.json"):
        keys = {entry[0]: None for entry in json.loads(path.read_text()).get("state_dict", [])}
        assert (network.detect(keys) is not None) == path.name.startswith(own), path.name
