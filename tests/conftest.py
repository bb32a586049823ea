"""Fixtures shared by the tests: the data folder, the parity cases, and the backends to answer for."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fastsr
from fastsr import _triton
from fastsr.op import OPS

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when fastsr.kernels is imported
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads that wait for each other's small products

ROOT = Path(__file__).resolve().parents[1]
PARITY = Path(__file__).parent / "parity"
BACKENDS = ("eager", "cpu", "triton", "cuda")

_spec = importlib.util.spec_from_file_location("parity_fill", PARITY / "fill.py")
assert _spec is not None and _spec.loader is not None
_fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fill)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of images and trained weights beside the repository; skips where it is not there."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}: images and trained weights are not part of the repository")
    return folder


@dataclass(frozen=True)
class Case:
    """A stored output of the authors' code: what it is (`about`), its tensors, and the weights it was made with."""

    name: str
    about: dict[str, Any]
    tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, made by the rule of fill.py or stored under `const:<key>`."""
        return {key: self._entry(key, shape, kind) for key, shape, kind in self.about["state_dict"]}

    def _entry(self, key: str, shape: list[int], kind: str) -> Tensor:
        if kind.startswith("const:"):
            return self.tensors[kind].reshape(shape)
        return torch.from_numpy(_fill.fill(key, shape, kind)).clone()


@cache
def parity_case(name: str) -> Case:
    """Reads tests/parity/<name>.json and .safetensors."""
    return Case(name, json.loads((PARITY / f"{name}.json").read_text()), load_file(PARITY / f"{name}.safetensors"))


def parity_names(*, with_weights: bool = True) -> list[str]:
    """All cases, or those that list a state dict."""
    names = sorted(p.stem for p in PARITY.glob("*.safetensors"))
    return [n for n in names if not with_weights or "state_dict" in json.loads((PARITY / f"{n}.json").read_text())]


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The largest error over the root mean square of what was expected. NaN if either holds one."""
    expected = expected.double()
    return ((result.double() - expected).abs().max() / expected.square().mean().sqrt()).item()


def rms_error(result: Tensor, expected: Tensor) -> float:
    """The root mean square of the error over that of what was expected. NaN if either holds one."""
    expected = expected.double()
    return ((result.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


def require_backend(name: str) -> None:
    """Skips, with the reason, where no operator can use this backend."""
    if name == "triton" and _triton.interpreted():
        pytest.skip("Triton runs in its interpreter here, which is slow: test_triton.py has the cases for it")
    reasons = [op.available()[name] for op in OPS.values()]
    if all(reasons):
        pytest.skip(f"backend '{name}' runs no operator here: {reasons[0]}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    """Runs the test with every operator forced onto one backend; skips, with the reason, those not usable here."""
    require_backend(request.param)
    with fastsr.use(request.param):
        yield request.param
