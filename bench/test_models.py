"""Whole networks, image in to image out: fastsr's module as loaded and optimised, contiguous and channels_last.

`pytest bench/test_models.py -k carn` measures float32 at 64x64 on the CPU, or at 256x256 on a GPU where there is one.
Untrained weights: speed does not depend on them. The optimised form has to agree with the plain one before it is timed.
"""

from __future__ import annotations

import pytest
import torch

import fastsr

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 256 if DEVICE == "cuda" else 64
NETWORKS = {
    "carn": {"scale": 4},
    "carn_m": {"scale": 4, "mobile": True, "group": 4},
    "rcan": {"scale": 4},
    "esrgan": {"scale": 4},
    "rdn": {"scale": 4},
    "dbpn": {"scale": 4},
    "msrn": {"scale": 4},
    "idn": {"scale": 4},
    "srfeat": {},
    "enhancenet": {},
}
FORMS = {"module": lambda m: m, "optimized": fastsr.optimize}


def build(name: str) -> fastsr.Network:
    """The untrained network, the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fastsr.create(name.removesuffix("_m"), **NETWORKS[name]).to(DEVICE)


@torch.inference_mode()
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_model(benchmark, name, form, layout):
    plain = build(name)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = FORMS[form](plain).to(memory_format=memory_format)
    generator = torch.Generator().manual_seed(0)
    channels = 1 if model.colour == "y" else 3
    x = torch.rand(1, channels, SIZE, SIZE, generator=generator).to(DEVICE).to(memory_format=memory_format)
    expected = plain(x)
    assert (model(x) - expected).norm() / expected.norm() < 1e-5

    def run():
        model(x)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = name
    benchmark.extra_info.update(form=form, layout=layout, device=DEVICE, shape=list(x.shape), torch=torch.__version__)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
