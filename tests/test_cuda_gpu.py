"""The CUDA kernels on a GPU: what the emulation cannot say. Fences, layouts as the hardware has them, races in time."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

import fastsr
from conftest import ROOT, relative_error, rms_error
from cuda_cases import CONVOLUTIONS, FLOAT8, FLOOR, convolution, dense, in_float64, maker
from fastsr import _cuda_engine
from fastsr.evaluate import evaluate
from fastsr.op import OPS, _replace, _tensors
from fastsr.ops.conv_act import conv_act

pytestmark = pytest.mark.gpu
GUARD = 1 << 16  # elements of NaN on both sides of every tensor


@pytest.fixture(scope="module", autouse=True)
def gpu():
    reason = _cuda_engine.missing()
    if reason is not None:
        pytest.skip(reason)


def guarded(t: torch.Tensor) -> torch.Tensor:
    """The tensor on the GPU with its strides, in the middle of NaN: a read outside it shows in the result."""
    span = 1 + sum((s - 1) * step for s, step in zip(t.shape, t.stride(), strict=True))
    memory = torch.full((2 * GUARD + math.ceil(span / 64) * 64,), torch.nan, dtype=t.dtype, device="cuda")
    return memory.as_strided(t.shape, t.stride(), GUARD).copy_(t)


def compare(op, args) -> None:
    args = op._bind(args)
    exact = op.eager(*_replace(args, [t.double() for t in _tensors(args)]))
    there = _replace(args, [guarded(t) for t in _tensors(args)])
    with fastsr.use("cuda"):
        made = [op(*there).cpu() for _ in range(10)]
    assert all(torch.equal(m, made[0]) for m in made[1:]), "a race: the same call gives different bits"
    bound = 2 * relative_error(op.eager(*args), exact) + FLOOR[made[0].dtype]
    assert relative_error(made[0], exact) <= bound


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case, dtype):
    compare(conv_act, convolution(case, maker(dtype)))


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.recipe_of is not None])
def test_operators(name, dtype):
    for sample in OPS[name].samples_of(maker(dtype)):
        compare(OPS[name], sample)


@pytest.mark.parametrize("size", [(1, 360, 639), (16, 48, 48)])
def test_large_maps(size):
    """Every thread block has several tiles, as in earnest."""
    make, (n, h, w) = maker(), size
    for outputs in (64, 32):
        inputs, weight, *rest = convolution("rcan" if outputs == 64 else "32 outputs, odd height", make)
        compare(conv_act, ([make(n, 64, h, w)], weight, *rest))


@pytest.fixture
def hopper():
    reason = _cuda_engine.float8_missing(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("case", [*FLOAT8, "large"])
def test_float8(case, hopper):
    """Tensor cores sum e4m3 products with fewer bits than float32 has, hence the wider bound."""
    block = fastsr.ops.dense_block
    args = dense(maker(), **FLOAT8.get(case, {"n": 2, "height": 300, "width": 301, "layers": 4}))
    there = _replace(args, [guarded(t) for t in _tensors(args)])
    made = [block(*there).cpu() for _ in range(10)]
    assert [c.backend for c in fastsr.explain(block, *there)] == ["cuda"]
    assert all(torch.equal(m, made[0]) for m in made[1:]), "a race: the same call gives different bits"
    exact = in_float64(block, args)
    assert rms_error(made[0], exact) < 3e-3 + 0.3 * rms_error(exact, in_float64(block, [*args[:-1], False]))


@pytest.mark.parametrize("name", ["rdn_small_x2", "esrgan_small_x2"])
def test_float8_costs_at_most_a_tenth_of_a_decibel(name, hopper, shared):
    network = fastsr.load(ROOT / "tests" / "weights" / f"{name}.safetensors").cuda()
    low = fastsr.optimize(network, dtype=torch.float8_e4m3fn)
    full, less = (evaluate(net, shared / "images" / "Set5", scale=2)["mean"]["psnr_y"] for net in (network, low))
    print(f"{name}: {full:.2f} dB in float32, {less:.2f} with e4m3")
    assert less > full - 0.1


def test_a_graph_replays_a_call():
    make = maker()
    args = [t.cuda() if isinstance(t, torch.Tensor) else t for t in convolution("rcan", make)[1:]]
    x = make(1, 64, 20, 21).cuda()
    with fastsr.use("cuda"), torch.inference_mode():
        expected = conv_act([x], *args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = conv_act([x], *args)
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    """On small cases, with an allocation for every tensor, so that writes beside one are seen too."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit")
    # Each main loop, with weights that stay in shared memory and that do not, and e4m3.
    cases = ("several tiles", "32 outputs, odd height", "192 inputs, streamed", "groups", "last of 96, tiles")
    tests = [f"{__file__}::test_convolutions[{case}-torch.bfloat16]" for case in cases]
    tests += [f"{__file__}::test_float8[{case}]" for case in ("tiles", "rdn")]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q",
               "-p", "no:cacheprovider", *tests]  # fmt: skip
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"{len(tests)} passed" in done.stdout or "skipped" in done.stdout, done.stdout
