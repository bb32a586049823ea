"""Every operator on every usable backend, against its eager definition: `pytest bench/test_ops.py -k conv_act`.

The result is compared with float64 before anything is timed. Only samples of a network's real width are measured.
"""

from __future__ import annotations

import pytest
import torch

import fastsr
from fastsr.op import OPS

LARGE = 20_000  # elements of all tensors of a sample from which a measurement says something


def samples(name: str):
    """The samples of an operator, float32, of a size worth measuring, with their index."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / max(1.0, float(torch.tensor(shape[1:4]).prod()) ** 0.5)

    for i, sample in enumerate(OPS[name].samples_of(make)):
        tensors = [t for a in sample for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
        if sum(t.numel() for t in tensors) >= LARGE:
            yield i, sample


def to_double(value):
    if isinstance(value, list):
        return [to_double(v) for v in value]
    return value.double() if isinstance(value, torch.Tensor) else value


CASES = [(name, i, backend) for name, op in OPS.items() for i, _ in samples(name) for backend in op.available()]


@pytest.mark.parametrize(("name", "i", "backend"), CASES)
def test_op(benchmark, name, i, backend):
    op, sample = OPS[name], dict(samples(name))[i]
    reason = op.reasons(*sample)[backend]
    if reason:
        pytest.skip(f"{name} on {backend}: {reason}")
    exact = op.eager(*map(to_double, sample))
    benchmark.group = f"{name} {i}"
    benchmark.extra_info.update(backend=backend, dtype="float32", torch=torch.__version__)
    with fastsr.use(backend):
        error = (op(*sample).double() - exact).norm() / exact.norm()
        assert error < 1e-5, f"{name} on {backend}: relative error {error:.1e} against float64"
        benchmark(op, *sample)
