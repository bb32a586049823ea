"""fastsr.optimize: a frozen copy with the same call."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastsr
from conftest import parity_case, relative_error, rms_error
from fastsr import _library
from fastsr.op import is_channels_last


@pytest.fixture
def model():
    return fastsr.load(parity_case("carn_m_x2").state_dict())


def test_same_call_same_pixels_and_the_argument_untouched(model):
    model.train()
    x = parity_case("carn_m_x2").tensors["input"]
    frozen = fastsr.optimize(model)
    assert type(frozen) is type(model) and not frozen.training and model.training
    assert not any(p.requires_grad for p in frozen.parameters())
    assert any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(frozen(x), model.eval()(x))
    assert torch.equal(frozen(x, scale=2), frozen(x))
    assert frozen.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in frozen.state_dict().items())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert frozen(x).abs().sum() > 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_any_dtype_goes_in_and_comes_out(model, dtype):
    x = parity_case("carn_m_x2").tensors["input"]
    frozen = fastsr.optimize(model, dtype=dtype)
    expected = model(x)
    for given in (torch.float32, torch.float64, torch.bfloat16):
        made = frozen(x.to(given))
        assert made.dtype == given
        assert relative_error(made, expected) < (0.05 if torch.bfloat16 in (dtype, given) else 1e-4)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), frozen(x))
    assert torch.equal(copy.deepcopy(frozen)(x), frozen(x))


def test_bfloat16_is_a_mode_on_a_cpu(model):
    x = parity_case("carn_m_x2").tensors["input"]
    low = fastsr.optimize(model, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    assert all(torch.equal(p, q) for p, q in zip(low.parameters(), model.parameters(), strict=True))
    error = relative_error(low(x), model(x))
    if _library.isa() == "avx512_bf16":
        assert 1e-5 < error < 0.05
        assert relative_error(low.super_resolve(x, 2), low(x)) == 0
    else:
        assert error < 1e-5
    with fastsr.use("eager"):
        assert relative_error(low(x), model(x)) < 1e-5
    again = fastsr.optimize(low, dtype=torch.float32)
    assert torch.equal(again(x), fastsr.optimize(model)(x))
    assert len(again._forward_hooks) == len(again._forward_pre_hooks) == 1


def test_activations_are_channels_last(model):
    frozen, x = fastsr.optimize(model), parity_case("carn_m_x2").tensors["input"]
    assert x.is_contiguous() and is_channels_last(frozen.entry(x)) and is_channels_last(frozen(x))
    memnet = fastsr.optimize(fastsr.create("memnet", channels=8, num_memblock=1, num_resblock=1))
    assert is_channels_last(memnet.feature_extractor(torch.rand(1, 1, 4, 5)))


def test_pairs_and_modules_without_parameters_are_cast_too():
    network = fastsr.create("sftgan", blocks=1, features=4, condition=2, hidden=2, cond_hidden=2)
    low, pair = fastsr.optimize(network, dtype=torch.float64), (torch.rand(1, 3, 2, 2), torch.rand(1, 8, 8, 8))
    assert torch.equal(low(pair), low(*pair)) and low(pair).dtype == torch.float32
    seen = []
    relu = torch.nn.ReLU()
    relu.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    relu = fastsr.optimize(relu, dtype=torch.float64)
    relu.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert relu(torch.ones(1)).dtype == torch.float32 and seen == [torch.float32, torch.float64]


def test_exceptions_leave_nothing_behind(model):
    frozen, x = fastsr.optimize(model, dtype=torch.float64), parity_case("carn_m_x2").tensors["input"]
    for _ in range(2):
        with pytest.raises(ValueError, match="an image alone as x"):
            frozen(x[0].bfloat16())
        assert frozen(x).dtype == torch.float32


def test_it_compiles_into_one_graph(model):
    torch._dynamo.reset()
    frozen, x = fastsr.optimize(model, dtype=torch.bfloat16), parity_case("carn_m_x2").tensors["input"].double()
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    assert compiled(x).dtype == torch.float64 and torch.equal(compiled(x), frozen(x))


def test_any_module_and_clear_errors(model):
    layer = fastsr.optimize(torch.nn.Conv2d(1, 1, 1))
    assert not layer.weight.requires_grad
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module; got str"):
        fastsr.optimize("rcan.pth")
    with pytest.raises(TypeError, match=r"floating-point dtype; got torch\.int8"):
        fastsr.optimize(model, dtype=torch.int8)


def test_float8_is_refused_with_a_reason(model):
    with pytest.raises(ValueError, match=r"a network with float8_parts .* got CARNM?; use dtype=torch.bfloat16"):
        fastsr.optimize(model, dtype=torch.float8_e4m3fn)
    narrow = fastsr.create("esrgan", scale=2, features=16, growth=32, blocks=1)
    with pytest.raises(ValueError, match=r"multiples of 32 channels .* got ESRGAN with a convolution 16 -> 32"):
        fastsr.optimize(narrow, dtype=torch.float8_e4m3fn)
    fitting = fastsr.create("rdn", D=1, C=1)
    with pytest.raises(ValueError, match="GPU of compute capability 9.0 .* got RDN: cpu is no CUDA device; move"):
        fastsr.optimize(fitting, dtype=torch.float8_e4m3fn)


def test_float8_is_for_the_parts_that_a_network_names(monkeypatch):
    monkeypatch.setattr(fastsr._cuda_engine, "float8_missing", lambda device: None)
    network = fastsr.create("esrgan", scale=2, blocks=1)
    low = fastsr.optimize(network, dtype=torch.float8_e4m3fn)
    for made in (low, copy.deepcopy(low), pickle.loads(pickle.dumps(low)), fastsr.optimize(low)):
        assert [b.float8 for b in made.modules() if hasattr(b, "float8")] == [True] * 3
    for other in (network, fastsr.optimize(low, dtype=torch.bfloat16)):
        assert not any(b.float8 for b in other.modules() if hasattr(b, "float8"))
    x = torch.rand(1, 3, 8, 8)
    error = rms_error(low(x), network(x))
    assert low(x).dtype == torch.float32 and 0 < error < 0.05
