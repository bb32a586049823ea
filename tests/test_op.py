"""The operator boundary itself, on operators planted here: dispatch, forcing, plans, layouts, results, gradients."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import fastsr
from fastsr.op import OPS, PLAN_LIMIT, Backend, empty_image, expect, is_channels_last, op


@op
def planted_scale(x: Tensor, factor: float = 2.0, offset: Tensor | None = None) -> Tensor:
    """x * factor + offset."""
    y = x * factor
    return y if offset is None else y + offset


@planted_scale.check
def _(x, factor, offset):
    expect(x.dim() == 4, "x is (N, C, H, W)", x=x)


@planted_scale.alloc
def _(x, factor, offset):
    return empty_image(x, x.shape)


@op
def planted_split(parts: list[Tensor], unused: Tensor | None = None, times: int = 1) -> tuple[Tensor, Tensor]:
    """(sum of the parts, product of the first with itself) * times; the second in float64."""
    return sum(parts[1:], parts[0]) * times, (parts[0] * parts[0]).double() * times


@planted_split.alloc
def _(parts, unused, times):
    return torch.empty_like(parts[0]), torch.empty_like(parts[0], dtype=torch.float64)


@op
def planted_argmax(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(2 x, where it is largest, other squared)."""
    return x * 2, x.argmax(1), other * other


@planted_argmax.alloc
def _(x, other):
    n, _, h, w = x.shape
    return torch.empty_like(x), x.new_empty((n, h, w), dtype=torch.int64), torch.empty_like(other)


for planted in (planted_scale, planted_split, planted_argmax):
    del OPS[planted.name]  # not fastsr's: the tests over all operators leave them out


def fill_with(value: float):
    return lambda out, *args: out.fill_(value)


@pytest.fixture
def two_backends():
    """planted_scale with a backend that takes float32 only and writes 7, and one that is never there."""
    planted_scale.backends(
        cuda=Backend(lambda *a: None, fill_with(9.0), missing=lambda: "no such device"),
        cpu=Backend(
            lambda x, *a: None if x.dtype == torch.float32 else f"dtype={x.dtype} (needs float32)", fill_with(7)
        ),
    )
    yield
    planted_scale.backends()


IMAGE = torch.ones(1, 2, 3, 4)


def ran(*args, **kwargs) -> str:
    return fastsr.explain(planted_scale, *args, **kwargs)[0].backend


def test_the_first_backend_without_a_reason_runs(two_backends):
    assert torch.equal(planted_scale(IMAGE), torch.full_like(IMAGE, 7))
    assert torch.equal(planted_scale(IMAGE.double()), IMAGE.double() * 2)
    call = fastsr.explain(planted_scale, IMAGE.double())[0]
    assert call.op == "planted_scale" and call.backend == "eager"
    none = "no triton kernel is written for planted_scale"
    needs = "dtype=torch.float64 (needs float32)"
    assert call.refused == {"cuda": "no such device", "triton": none, "cpu": needs}
    assert planted_scale.available() == {"cuda": "no such device", "triton": none, "cpu": None, "eager": None}
    assert planted_scale.reasons(IMAGE)["cpu"] is None


def test_use_forces_or_raises_the_reason(two_backends):
    with fastsr.use("eager"):
        assert torch.equal(planted_scale(IMAGE), IMAGE * 2)
    with fastsr.use("cpu"), pytest.raises(RuntimeError, match=r"fastsr::planted_scale: backend 'cpu' rejected: dtype="):
        planted_scale(IMAGE.double())
    with fastsr.use("cuda"), pytest.raises(RuntimeError, match="no such device"):
        planted_scale(IMAGE)
    with fastsr.use("triton"), pytest.raises(RuntimeError, match="no triton kernel is written for planted_scale"):
        planted_scale(IMAGE)
    with pytest.raises(ValueError, match="expected backend to be one of cuda, triton, cpu, eager or None; got 'typo'"):
        fastsr.use("typo").__enter__()
    with fastsr.use("eager"), fastsr.use(None):
        assert ran(IMAGE) == "cpu"
    assert ran(IMAGE) == "cpu"


def test_backends_are_preferred_in_the_order_given(two_backends):
    able = Backend(lambda *args: None, fill_with(3))
    planted_scale.backends(cpu=able, cuda=able)
    assert ran(IMAGE) == "cpu"
    planted_scale.backends(cuda=able, cpu=able)
    assert ran(IMAGE) == "cuda" and list(planted_scale.reasons(IMAGE)) == ["cuda", "cpu", "triton", "eager"]
    with pytest.raises(ValueError, match=r"planted_scale: expected backends out of .* got \['vulkan', 'eager'\]"):
        planted_scale.backends(vulkan=able, eager=able)


def test_a_forced_backend_reaches_worker_threads(two_backends):
    with ThreadPoolExecutor(1) as started_before:
        started_before.submit(lambda: None).result()
        with fastsr.use("eager"):
            assert started_before.submit(ran, IMAGE).result() == "eager"
            with ThreadPoolExecutor(1) as started_inside:
                assert started_inside.submit(ran, IMAGE).result() == "eager"
        assert started_before.submit(ran, IMAGE).result() == "cpu"


def test_threads_and_tasks_keep_their_own_choice(two_backends):
    def own() -> str:
        with fastsr.use("eager"):
            return ran(IMAGE)

    async def task(backend: str) -> str:
        with fastsr.use(backend):
            await asyncio.sleep(0.01)
            return ran(IMAGE)

    async def both() -> list[str]:
        return list(await asyncio.gather(task("eager"), task("cpu")))

    with fastsr.use("cpu"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(own).result() == "eager" and ran(IMAGE) == "cpu"
    assert asyncio.run(both()) == ["eager", "cpu"]


def test_plans_are_bounded_and_distinguish_what_reasons_read():
    seen = []
    planted_scale.backends(cpu=Backend(lambda *args: seen.append(args) or "only looking", fill_with(0)))
    buffer = torch.ones(1, 2, 3, 4 + 1)
    calls = [
        lambda: planted_scale(IMAGE),
        lambda: planted_scale(IMAGE, 3.0),
        lambda: planted_scale(IMAGE.double()),
        lambda: planted_scale(IMAGE.to(memory_format=torch.channels_last)),
        lambda: planted_scale(IMAGE, offset=IMAGE),
        lambda: planted_scale(buffer[..., 1:]),
        lambda: planted_scale(buffer[..., :-1]),  # same strides, other alignment
    ]
    for n, call in enumerate(calls, 1):
        for _ in range(3):
            call()
        assert len(seen) == n
    torch.use_deterministic_algorithms(True)
    try:
        planted_scale(IMAGE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(seen) == len(calls) + 1
    for width in range(1, PLAN_LIMIT + 50):
        planted_scale(torch.ones(1, 1, 1, width))
    assert len(planted_scale._plans) == PLAN_LIMIT
    planted_scale.backends()


def test_bad_arguments_name_the_operator_and_what_came():
    with pytest.raises(ValueError, match=r"fastsr::planted_scale: expected x is \(N, C, H, W\); got x=float32\[3\]"):
        planted_scale(torch.ones(3))


def test_tuples_lists_and_results_in_the_layout_of_alloc():
    parts = [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(3)]
    total, square = planted_split(parts, times=2)
    torch.testing.assert_close(total, 2 * (parts[0] + parts[1] + parts[2]))
    assert square.dtype == torch.float64 and is_channels_last(square) and is_channels_last(total)
    transposed = torch.randn(2, 3, 5, 4).transpose(2, 3)  # eager keeps these strides, alloc does not
    assert planted_scale(transposed).stride() == empty_image(transposed, transposed.shape).stride()


def test_tuple_results_and_lists_pass_opcheck_and_give_gradients():
    parts = [torch.randn(1, 2, 2, 2, dtype=torch.double, requires_grad=True) for _ in range(2)]
    assert set(torch.library.opcheck(planted_split.default, (parts,)).values()) == {"SUCCESS"}
    assert torch.autograd.gradcheck(lambda *p: planted_split(list(p)), parts)
    needed, spared = parts[0], parts[1].detach()
    planted_split([needed, spared])[1].sum().backward()
    torch.testing.assert_close(needed.grad, 2 * needed.detach())
    assert spared.grad is None


def test_an_argument_the_result_does_not_depend_on_gets_a_zero_gradient():
    x, unused = torch.randn(1, 1, 2, 2, requires_grad=True), torch.randn(3, requires_grad=True)
    planted_split([x], unused)[0].sum().backward()
    assert unused.grad is None or not unused.grad.any()


def test_results_without_a_gradient_leave_those_of_the_others():
    x, other = (torch.randn(1, 3, 2, 2, dtype=torch.double, requires_grad=True) for _ in range(2))
    doubled, where, _ = planted_argmax(x, other.detach())  # the third result depends on nothing that needs a gradient
    assert not where.requires_grad
    (made,) = torch.autograd.grad(doubled.sum(), x)
    assert torch.equal(made, torch.full_like(x, 2))
    made, none = torch.autograd.grad(planted_argmax(x, other)[2].sum(), (other, x), allow_unused=True)
    assert torch.equal(made, 2 * other) and (none is None or not none.any())
    assert set(torch.library.opcheck(planted_argmax.default, (x, other.detach())).values()) == {"SUCCESS"}


def test_plans_follow_the_precision_of_float32_however_it_is_set():
    seen = []
    planted_scale.backends(cpu=Backend(lambda *args: seen.append(args) or "only looking", fill_with(0)))
    conv = torch.backends.mkldnn.conv
    matmul, before = torch.get_float32_matmul_precision(), conv.fp32_precision
    try:
        planted_scale(IMAGE)
        torch.set_float32_matmul_precision("medium" if matmul == "highest" else "highest")
        planted_scale(IMAGE)
        conv.fp32_precision = "bf16"  # from here on torch.get_float32_matmul_precision may raise
        planted_scale(IMAGE)
    finally:
        conv.fp32_precision = before
        torch.set_float32_matmul_precision(matmul)
        planted_scale.backends()
    assert len(seen) == 3


def test_explain_lists_the_calls_of_a_whole_network():
    model = fastsr.create("carn", scale=2, mobile=True, group=4)
    calls = fastsr.explain(model, torch.rand(1, 3, 8, 8))
    assert sum(c.op == "residual_e" for c in calls) == 9 and len({c.backend for c in calls}) == 1
    with fastsr.use("eager"):
        assert {c.backend for c in fastsr.explain(model, torch.rand(1, 3, 8, 8))} == {"eager"}
    with fastsr.use("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' rejected: "):
        model(torch.rand(1, 3, 8, 8))
