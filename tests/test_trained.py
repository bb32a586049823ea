"""The small trained networks kept for the tests are what their README says, and lose nothing in the fast forms."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

import fastsr
from conftest import ROOT
from fastsr import _float8
from fastsr.evaluate import evaluate
from fastsr.optimize import use_float8

WEIGHTS = ROOT / "tests" / "weights"
SET5 = {"rcan_small_x2": 35.97, "rdn_small_x2": 36.48, "esrgan_small_x2": 35.78}  # dB, luma, of tests/weights/README.md
RELEASED = {"carn_m.pth": 4, "IDN_x4.caffemodel": 4, "enhancenet_pat_x4.ckpt": 4}  # of the data folder, at these scales
LOST = {torch.float32: 0.001, torch.bfloat16: 0.02}  # dB that `optimize` may change


@cache
def network(name: str) -> nn.Module:
    return fastsr.load(WEIGHTS / f"{name}.safetensors")


def test_together_they_are_small():
    assert sum(file.stat().st_size for file in WEIGHTS.glob("*.safetensors")) < 8_000_000


@pytest.mark.parametrize("name", SET5)
def test_set5_as_stated(name, shared):
    mean = evaluate(network(name), shared / "images" / "Set5", scale=2)["mean"]
    assert mean["psnr_y"] == pytest.approx(SET5[name], abs=0.01)


@pytest.mark.parametrize("name", [*SET5, *RELEASED])
def test_set5_is_kept_by_optimize(name, shared):
    """Against the operators' definitions in float32."""
    model = network(name) if name in SET5 else fastsr.load(shared / "weights" / name)

    def psnr(module: nn.Module) -> float:
        return evaluate(module, shared / "images" / "Set5", scale=RELEASED.get(name, 2))["mean"]["psnr_y"]

    with fastsr.use("eager"):
        expected = psnr(model)
    found = {dtype: psnr(fastsr.optimize(model, dtype=dtype)) - expected for dtype in LOST}
    print(f"{name} on Set5: {expected:.4f} dB,", ", ".join(f"{d} {found[d]:+.5f}" for d in LOST))
    assert all(abs(change) <= LOST[dtype] for dtype, change in found.items()), found


def with_float8(name: str, shared) -> float:
    """Luma PSNR on Set5 with the network's `float8_parts` in e4m3. The definition rounds as the kernels do."""
    low = copy.deepcopy(network(name))
    use_float8(low, True)
    return evaluate(low, shared / "images" / "Set5", scale=2)["mean"]["psnr_y"]


@pytest.mark.parametrize("name", ["rdn_small_x2", "esrgan_small_x2"])
def test_float8_costs_at_most_a_tenth_of_a_decibel(name, shared):
    """What lets a network have `float8_parts`."""
    psnr = with_float8(name, shared)
    print(f"{name}: {psnr:.2f} dB with e4m3, {SET5[name]} in float32")
    assert psnr > SET5[name] - 0.1


def test_the_gate_of_float8_notices_a_wrong_scale(monkeypatch, shared):
    monkeypatch.setattr(_float8, "MAPS", 11)  # the largest values are cut
    assert with_float8("rdn_small_x2", shared) < SET5["rdn_small_x2"] - 0.1
