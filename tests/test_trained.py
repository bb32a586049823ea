"""The small trained networks kept for the tests are what their README says."""

from __future__ import annotations

from functools import cache

import pytest
from torch import nn

import fastsr
from conftest import ROOT
from fastsr.evaluate import evaluate

WEIGHTS = ROOT / "tests" / "weights"
SET5 = {"rcan_small_x2": 35.97, "rdn_small_x2": 36.48, "esrgan_small_x2": 35.78}  # dB, luma, of tests/weights/README.md


@cache
def network(name: str) -> nn.Module:
    return fastsr.load(WEIGHTS / f"{name}.safetensors")


def test_together_they_are_small():
    assert sum(file.stat().st_size for file in WEIGHTS.glob("*.safetensors")) < 8_000_000


@pytest.mark.parametrize("name", SET5)
def test_set5_as_stated(name, shared):
    mean = evaluate(network(name), shared / "images" / "Set5", scale=2)["mean"]
    assert mean["psnr_y"] == pytest.approx(SET5[name], abs=0.01)
