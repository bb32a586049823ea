"""The main job on real input: CARN-M's released weights on Set5 give the PSNR that was measured with the authors' code.

Convention: 8-bit images bottom and right cropped to a multiple of the scale, shrunk by MATLAB's bicubic, rounded; the
result rounded to 8 bits; unrounded BT.601 luma, `scale` pixels shaved on every side; plain mean over the images.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import fastsr
from fastsr.image.colour import rgb_to_y
from fastsr.image.metrics import psnr
from fastsr.image.resize import imresize

CONVENTION = "symmetric (mirror) border|lr_uint8|sr_round"


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float64) / 255).permute(2, 0, 1)[None]


def _shrunk(high: np.ndarray, scale: int) -> np.ndarray:
    levels = imresize(_tensor(high), 1 / scale)[0].permute(1, 2, 0).numpy() * 255
    return np.floor(levels.clip(0, 255) + 0.5).astype(np.uint8)


@pytest.fixture(scope="module")
def model(shared):
    return fastsr.load(shared / "weights" / "carn_m.pth")


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_carn_m_reaches_the_measured_psnr(scale, model, shared):
    published = json.loads((shared / "parity" / "published_psnr_carn_m.json").read_text())
    expected = published["per_image"][f"Set5 x{scale}"]
    luma, rounded = [], []
    for name in expected["images"]:
        high = np.asarray(Image.open(shared / "images" / "Set5" / name))
        high = high[: high.shape[0] // scale * scale, : high.shape[1] // scale * scale]
        result = fastsr.upscale(_shrunk(high, scale), model, scale=scale)
        y = [rgb_to_y(_tensor(pixels)) for pixels in (result, high)]
        luma.append(psnr(*y, shave=scale))
        rounded.append(psnr(*((v * 255).round() / 255 for v in y), shave=scale))
    print(f"Set5 x{scale}: {np.mean(luma):.4f} dB, stored {published['means'][CONVENTION][f'Set5 x{scale}']['psnr_y']}")
    means = published["means"][CONVENTION][f"Set5 x{scale}"]
    assert np.mean(luma) == pytest.approx(means["psnr_y"], abs=0.01)
    assert np.mean(rounded) == pytest.approx(means["psnr_y_rounded"], abs=0.01)
    assert luma == pytest.approx(expected["lr_uint8|sr_round"]["psnr_y"], abs=0.01)
