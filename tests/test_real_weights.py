"""The weights that the networks' authors released, on photographs: the figures that were published with them."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

import fastsr
from conftest import parity_case, relative_error

FILES = ("IDN_x2.caffemodel", "IDN_x4.caffemodel", "enhancenet_pat_x4.ckpt", "carn_m.pth")


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("folder", ["Set5", "Set14"])
def test_idn_reaches_the_published_figures(scale, folder, shared):
    published = json.loads((shared / "parity" / "published_psnr_idn.json").read_text())
    expected = published["per_image"][folder][f"IDN_x{scale}"]
    made = fastsr.evaluate(shared / "weights" / f"IDN_x{scale}.caffemodel", shared / "images" / folder, scale=scale)
    assert made["protocol"] == "idn" and made["images"].keys() == expected.keys()
    for name, figures in made["images"].items():
        assert figures["psnr_y"] == pytest.approx(expected[name]["psnr"], abs=0.002)
        assert figures["ssim_y"] == pytest.approx(expected[name]["ssim"], abs=2e-5)
        assert figures["bicubic"]["psnr_y"] == pytest.approx(expected[name]["psnr_bicubic"], abs=0.002)
        assert figures["bicubic"]["ssim_y"] == pytest.approx(expected[name]["ssim_bicubic"], abs=2e-5)
    if folder == "Set5":
        paper = next(r for r in published["results"] if r["dataset"] == folder and r["scale"] == scale)
        assert made["mean"]["psnr_y"] == pytest.approx(paper["paper_psnr"], abs=0.02)
    print(f"IDN x{scale} on {folder}: {made['mean']['psnr_y']:.4f} dB, SSIM {made['mean']['ssim_y']:.5f}")


def test_enhancenet_reaches_the_published_figure(shared):
    made = fastsr.evaluate(shared / "weights" / "enhancenet_pat_x4.ckpt", shared / "images" / "Set5")
    print(f"EnhanceNet-PAT x4 on Set5: {made['mean']['psnr_y']:.4f} dB, SSIM {made['mean']['ssim_y']:.4f}")
    assert made["protocol"] == "enhancenet" and made["scale"] == 4
    assert made["mean"]["psnr_y"] == pytest.approx(28.56, abs=0.03)
    assert made["mean"]["ssim_y"] == pytest.approx(0.8093, abs=1e-4)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_carn_m_reaches_the_measured_figures(scale, shared):
    """By the customary protocol; no protocol reproduces all of what was printed (`conclusion` of the stored file)."""
    target = json.loads((shared / "parity" / "published_psnr_carn_m.json").read_text())["recommended_target"]
    expected = target["values"][f"Set5 x{scale}"]
    made = fastsr.evaluate(shared / "weights" / "carn_m.pth", shared / "images" / "Set5", scale=scale)
    print(f"CARN-M x{scale} on Set5: {made['mean']['psnr_y']:.4f} dB, SSIM {made['mean']['ssim_y']:.4f}")
    assert made["protocol"] == "benchmark"
    assert made["mean"]["psnr_y"] == pytest.approx(expected["psnr"], abs=0.005)
    assert made["mean"]["ssim_y"] == pytest.approx(expected["ssim"], abs=1e-4)


@pytest.mark.parametrize("name", ["idn_x2", "idn_x4", "enhancenet_x4"])
def test_stored_outputs_of_the_released_weights(name, shared):
    case = parity_case(name)
    model = fastsr.load(shared.parent / case.about["weights"])
    x = case.tensors["input"]
    with torch.inference_mode():
        made, wide = model(x), model.double()(x.double())
    assert (made - case.tensors["output"]).abs().max() <= 1e-5
    assert relative_error(wide, case.tensors["output"]) <= 1e-5
    assert model.parameter_count == case.about["parameters"]


@pytest.mark.parametrize("name", FILES)
def test_a_converted_file_gives_the_same_outputs_bit_for_bit(name, shared, tmp_path):
    source = shared / "weights" / name
    made = fastsr.convert(source, tmp_path / "a.safetensors")
    again = fastsr.load(tmp_path / "a.safetensors")
    assert again.config == made.config and again.scales == made.scales
    assert again.origin.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    x = torch.rand(1, 1 if made.colour == "y" else 3, 13, 18, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for scale in made.scales:
            assert torch.equal(again.super_resolve(x, scale), made.super_resolve(x, scale))
