"""Every operator, every sample: against its definition in float64, opcheck, gradcheck, compile, layouts, recipes."""

from __future__ import annotations

import itertools

import pytest
import torch

from conftest import BACKENDS, relative_error, require_backend, rms_error
from fastsr import recipes, use
from fastsr.op import OPS, _replace, _tensors

SMALL = 2000  # elements of all tensors of a sample up to which gradcheck is affordable
FLOORS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}  # a convolution, Winograd's share included
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def maker(seed: int = 0, dtype: torch.dtype = torch.float64, layout: str = "contiguous", grad: bool = False):
    """`make(*shape)` for samples: normal values from one generator, 4-D tensors in the layout asked for."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 4:  # keep deep products of random weights near one
            t = t / max(1.0, (shape[1] * shape[2] * shape[3]) ** 0.5) if shape[2] == shape[3] else t
            t = t.to(memory_format=LAYOUTS[layout])
        return t.to(dtype).requires_grad_(grad)

    return make


def samples(name: str, **options):
    return list(OPS[name].samples_of(maker(**options)))


def size(sample) -> int:
    return sum(t.numel() for t in _tensors(sample))


def results(value):
    return value if isinstance(value, tuple) else (value,)


def convolutions(op, sample) -> int:
    """How many follow each other in an operator, at most."""
    return 1 if op.recipe_of is None else len(op.recipe_of(*op._bind(sample)).steps)


CASES = [(name, i) for name in OPS for i in range(len(samples(name)))]
SMALL_CASES = [(name, i) for name, i in CASES if size(samples(name)[i]) <= SMALL]


def test_every_operator_is_complete():
    for name, op in OPS.items():
        assert op.eager.__doc__, name
        assert op.samples_of is not None and op._alloc is not None, name
        assert any(n == name for n, _ in SMALL_CASES), f"{name} has no sample small enough for gradcheck"
        assert (op.recipe_of is not None) == (name != "resize_bicubic"), name  # which is no list of convolutions


@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_is_the_definition(backend, layout, dtype):
    require_backend(backend)
    for name, i in CASES:
        op, sample = OPS[name], samples(name, dtype=dtype, layout=layout)[i]
        exact = results(op.eager(*_replace(sample, [t.double() for t in _tensors(sample)])))
        plain = results(op.eager(*sample))
        with use(backend):
            if op.reasons(*sample)[backend]:
                continue
            made = results(op(*sample))
        promised = results(op._alloc(*op._bind(sample)))
        for m, p, e, a in zip(made, plain, exact, promised, strict=True):
            assert (m.dtype, m.stride(), m.shape) == (a.dtype, a.stride(), a.shape), (name, i)
            assert rms_error(m, e) <= 2 * rms_error(p, e) + FLOORS[dtype] * convolutions(op, sample), (name, i)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, layout):
    small = [s for s in samples(name, layout=layout, dtype=torch.float64, grad=True) if size(s) <= SMALL]
    for sample in small:
        outcome = torch.library.opcheck(OPS[name].default, sample)
        assert set(outcome.values()) == {"SUCCESS"}, outcome


@pytest.mark.parametrize(("name", "i"), SMALL_CASES)
def test_gradients(name, i):
    sample = samples(name, grad=True)[i]
    assert torch.autograd.gradcheck(lambda *t: OPS[name](*_replace(sample, t)), _tensors(sample))


@pytest.mark.parametrize("name", OPS)
def test_second_gradients(name):
    sample = next(s for s in samples(name, grad=True) if size(s) <= SMALL)
    assert torch.autograd.gradgradcheck(lambda *t: OPS[name](*_replace(sample, t)), _tensors(sample))


@pytest.mark.parametrize("name", OPS)
def test_gradients_only_where_needed(name):
    sample = next(s for s in samples(name) if size(s) <= SMALL)
    first = _tensors(sample)[0].requires_grad_()
    results(OPS[name](*sample))[0].sum().backward()
    assert first.grad is not None and all(t.grad is None for t in _tensors(sample)[1:])


@pytest.mark.parametrize("name", OPS)
def test_compiles_into_one_graph(name):
    torch._dynamo.reset()
    sample = next(s for s in samples(name, dtype=torch.float32, grad=True) if size(s) <= SMALL)

    def loss(*tensors):
        return results(OPS[name](*_replace(sample, tensors)))[0].square().sum()

    eager = torch.autograd.grad(loss(*_tensors(sample)), _tensors(sample))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for made, expected in zip(torch.autograd.grad(compiled(*_tensors(sample)), _tensors(sample)), eager, strict=True):
        torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("name", OPS)
def test_autocast_casts_like_a_convolution(name):
    sample = next(s for s in samples(name, dtype=torch.float32) if size(s) <= SMALL)
    lowered = _replace(sample, [t.bfloat16() for t in _tensors(sample)])
    with torch.autocast("cpu", torch.bfloat16):
        made = results(OPS[name](*sample))
        double = results(OPS[name](*_replace(sample, [t.double() for t in _tensors(sample)])))
    for m, e, d in zip(made, results(OPS[name](*lowered)), double, strict=True):
        assert m.dtype == torch.bfloat16 and torch.equal(m, e) and d.dtype == torch.float64


@pytest.mark.parametrize(("name", "i"), CASES)
def test_slices_and_batches_give_the_same(name, i):
    """Inputs that are slices of something larger, NaN on both sides, and the same call again: the same bits."""
    sample = samples(name, dtype=torch.float32)[i]
    expected = results(OPS[name](*sample))

    def surrounded(t):
        if t.dim() != 4:
            return t
        big = torch.full((t.shape[0], t.shape[1] + 2, t.shape[2] + 2, t.shape[3] + 3), torch.nan)
        inner = big[:, 1:-1, 1:-1, 1:-2]
        return inner.copy_(t)

    for made, e in zip(results(OPS[name](*_replace(sample, map(surrounded, _tensors(sample))))), expected, strict=True):
        torch.testing.assert_close(made, e, rtol=1e-5, atol=1e-6)
    for made, e in zip(results(OPS[name](*sample)), expected, strict=True):
        assert torch.equal(made, e)


@pytest.mark.parametrize(("name", "i"), [(n, i) for n, i in CASES if OPS[n].recipe_of is not None])
def test_recipe_is_the_definition(name, i):
    op, sample = OPS[name], samples(name)[i]
    made = recipes.run(op.recipe_of(*op._bind(sample)))
    assert relative_error(made, op.eager(*sample)) < 1e-12


def test_border_sums_are_what_each_tap_reads():
    h = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    padded = torch.nn.functional.pad(h, (1, 1, 1, 1))
    for ky, kx in itertools.product(range(3), range(3)):
        read = padded[:, :, ky : ky + 4, kx : kx + 5].sum((2, 3))
        torch.testing.assert_close(recipes.border_sums(h)[:, :, ky, kx], read)
