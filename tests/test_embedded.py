"""The weights that come with fastsr: found by name, the default, and as good as their model card says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import fastsr
from fastsr import cli
from fastsr.evaluate import evaluate
from fastsr.models.embedded import DEFAULT, EMBEDDED, weights_of

GAINS = {2: 2.86, 3: 2.53, 4: 2.45}  # over bicubic on Set5, luma PSNR in dB, of docs/model-card-carn_m.md


@pytest.fixture
def colour() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)


def test_the_weights_are_a_small_carn_m():
    network = fastsr.load(weights_of("carn_m"))
    config = network.config
    assert (network.name, config.mobile, config.group, config.features) == ("carn", True, 4, 64)
    assert network.scales == (2, 3, 4)
    assert sum(file.stat().st_size for file in EMBEDDED.values()) < 2_000_000
    assert weights_of("model.pth") == "model.pth" and weights_of(network) is network


def test_upscale_uses_them_by_default(colour):
    network = fastsr.load(EMBEDDED[DEFAULT])
    assert np.array_equal(fastsr.upscale(colour), fastsr.upscale(colour, network, scale=2))
    for scale in (2, 3, 4):
        assert np.array_equal(fastsr.upscale(colour, scale=scale), fastsr.upscale(colour, network, scale=scale))
    tensor = torch.rand(1, 3, 5, 6)
    assert torch.equal(fastsr.upscale(tensor, "carn_m"), fastsr.upscale(tensor, network, scale=2))
    with pytest.raises(ValueError, match="has the scales 2, 3, 4, got 5"):
        fastsr.upscale(colour, scale=5)
    with pytest.raises(TypeError, match='config and progress are for model="zssr"'):
        fastsr.upscale(colour, progress=print)


def test_the_commands_know_them(colour, tmp_path, capsys):
    source = tmp_path / "in.png"
    Image.fromarray(colour).save(source)
    assert cli.main(["upscale", str(source), "-o", str(tmp_path / "out.png")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), fastsr.upscale(colour, scale=2))
    done = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (done["network"], done["scale"]) == ("CARN", 2)
    assert cli.main(["info", "carn_m"]) == 0
    assert "scales: x2, x3, x4" in capsys.readouterr().out
    assert cli.main(["info", "carn_x"]) == 1
    assert "without a file, carn_m is known" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_set5_as_on_the_model_card(scale, shared):
    mean = evaluate(DEFAULT, shared / "images" / "Set5", scale=scale)["mean"]
    gain = mean["psnr_y"] - mean["bicubic"]["psnr_y"]
    print(f"Set5 x{scale}: {mean['psnr_y']:.2f} dB, {gain:.2f} over bicubic")
    assert gain == pytest.approx(GAINS[scale], abs=0.01)
