"""fastsr.optimize: a frozen copy with the same call."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastsr
from conftest import parity_case, relative_error


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
    assert torch.equal(frozen(x), model.eval()(x)) and torch.equal(frozen(x, scale=2), frozen(x))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert frozen(x).abs().sum() > 0


def test_dtype_is_cast_at_the_door(model):
    x = parity_case("carn_m_x2").tensors["input"]
    low = fastsr.optimize(model, dtype=torch.bfloat16)
    made = low(x)
    assert made.dtype == torch.bfloat16 and 0 < relative_error(made, model(x)) < 0.05
    assert torch.equal(pickle.loads(pickle.dumps(low))(x), made) and torch.equal(copy.deepcopy(low)(x), made)


def test_pairs_and_modules_without_parameters_are_cast_too():
    network = fastsr.create("sftgan", blocks=1, features=4, condition=2, hidden=2, cond_hidden=2)
    low, pair = fastsr.optimize(network, dtype=torch.bfloat16), (torch.rand(1, 3, 2, 2), torch.rand(1, 8, 8, 8))
    assert torch.equal(low(pair), low(*pair)) and low(pair).dtype == torch.bfloat16
    assert fastsr.optimize(torch.nn.ReLU(), dtype=torch.float64)(torch.ones(1)).dtype == torch.float64


def test_any_module_and_clear_errors(model):
    layer = fastsr.optimize(torch.nn.Conv2d(1, 1, 1))
    assert not layer.weight.requires_grad
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module; got str"):
        fastsr.optimize("rcan.pth")
    with pytest.raises(TypeError, match=r"floating-point dtype; got torch\.int8"):
        fastsr.optimize(model, dtype=torch.int8)
