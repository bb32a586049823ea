"""What is made of parameters is never stale: every way to change a weight, on plain and on frozen modules."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn

import fastsr
from conftest import require_backend
from fastsr import packing
from fastsr.nn import ConvAct


@pytest.fixture
def made(monkeypatch):
    """The number of times that something was packed."""
    require_backend("cpu")
    count = []
    pack = torch.ops.fastsr_cpu.pack

    def counted(*args):
        count.append(args[1].shape)
        return pack(*args)

    monkeypatch.setattr(torch.ops.fastsr_cpu, "pack", counted)
    return count


def layer(**options) -> ConvAct:
    torch.manual_seed(0)
    return ConvAct(16, 16, **options).requires_grad_(False)


X = torch.randn(1, 16, 6, 7, generator=torch.Generator().manual_seed(1))


def agrees(module: nn.Module) -> bool:
    """Whether the kernels compute what the definition does with the weights that the module has now."""
    with fastsr.use("cpu"):
        result = module(X)
    with fastsr.use("eager"):
        return torch.allclose(result, module(X), rtol=1e-4, atol=1e-5)


def replace_data(m):
    m.weight.data = torch.randn_like(m.weight)


def write_through_numpy(m):
    m.weight.numpy()[3, 2] = 5


def load_other(m):
    m.load_state_dict(layer_like(m).state_dict())


def replace_parameter(m):
    m.weight = nn.Parameter(torch.randn_like(m.weight), requires_grad=False)


def replace_bias_at_its_address(m):
    """The old bias is freed and the allocator likes to give its memory to the next tensor of its size."""
    m.bias = None
    gc.collect()
    m.bias = nn.Parameter(torch.full((16,), 9.0), requires_grad=False)


def layer_like(m):
    other = copy.deepcopy(m)
    with torch.no_grad():
        other.weight.normal_()
        other.bias.fill_(-1)
    return other


def train_a_step(m):
    m.requires_grad_(True)
    optimizer = torch.optim.SGD(m.parameters(), lr=0.3)
    m(X).square().mean().backward()
    optimizer.step()
    m.requires_grad_(False)


def train_a_fused_step(m):
    m.requires_grad_(True)
    optimizer = torch.optim.Adam(m.parameters(), lr=0.3, fused=True)
    m(X).square().mean().backward()
    optimizer.step()
    m.requires_grad_(False)


CHANGES = {
    "in place": lambda m: m.weight.mul_(2),
    "in place through data": lambda m: m.weight.data.mul_(-2),
    "one element through data": lambda m: m.weight.data[0, 0, 0].fill_(3),
    "bias through data": lambda m: m.bias.data.add_(1),
    "data exchanged": replace_data,
    "numpy": write_through_numpy,
    "load_state_dict": load_other,
    "parameter exchanged": replace_parameter,
    "bias at the same address": replace_bias_at_its_address,
    "layout": lambda m: m.to(memory_format=torch.channels_last),
    "there and back": lambda m: m.double().float().weight.data.add_(1),
    "training": train_a_step,
    "fused training": train_a_fused_step,
    "swapped bytes": lambda m: m.weight.data.copy_(m.weight.flip(0)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_plain_module_follows_every_change(change, made):
    m = layer()
    assert agrees(m) and agrees(m) and len(made) == 1
    change(m)
    assert agrees(m)


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("deepcopy", "pickle"))
def test_a_copied_plain_module_follows_its_own_changes(copied, made):
    m = layer()
    assert agrees(m)
    other = copied(m)
    m.weight.data.mul_(2)
    assert agrees(other) and agrees(m)
    other.weight.data.neg_()
    assert agrees(other) and agrees(m)


SEEN = ("in place", "data exchanged", "load_state_dict", "parameter exchanged", "there and back", "training")


@pytest.mark.parametrize("change", SEEN)
def test_a_frozen_module_follows_what_it_promises(change, made):
    m = fastsr.optimize(layer())
    assert agrees(m) and agrees(m) and len(made) == 1
    CHANGES[change](m)
    assert agrees(m)


def test_frozen_weights_are_not_read_again(made, monkeypatch):
    m = fastsr.optimize(layer())
    assert agrees(m)
    monkeypatch.setattr(packing, "_sum", None)
    assert agrees(m) and len(made) == 1
    m.weight.data.mul_(2)
    assert not agrees(m)  # this is what freezing means
    with pytest.raises(TypeError, match="not callable"):
        agrees(layer())


def test_every_version_of_the_same_weights_is_kept_once(made):
    """Scalars and sizes that change nothing in the packed weights cost nothing; others are packed beside."""
    m = layer()
    for _ in range(3):
        for size in (5, 9, 33):
            m(X.repeat(1, 1, size, size))
    assert len(made) == 1
    m.act = "relu"
    m(X)
    m.act = "none"
    m(X)
    kinds = len(made)
    for _ in range(3):
        for act, slope in (("none", 0.0), ("relu", 0.0), ("leaky", 0.1), ("leaky", 0.2)):
            m.act, m.slope = act, slope
            assert agrees(m)
    assert len(made) <= kinds + 2
    for slope in range(3 * packing.KEPT):
        m.slope = slope / 7
        m(X)
    assert len(packing._entries[id(m.weight)]) <= packing.KEPT


def test_weights_used_twice_are_packed_once(made):
    model = fastsr.create("carn", scale=2, mobile=True, group=4, features=16).eval()
    model(torch.rand(1, 3, 8, 8))
    unit = sum(len(list(b.b1.parameters())) // 2 for b in (model.b1, model.b2, model.b3))
    assert unit == 9 and len(made) == sum(p.dim() == 4 for p in model.parameters())


@pytest.mark.parametrize("dtype", (None, torch.bfloat16))
def test_copies_and_pickles_carry_nothing(dtype, made):
    m = fastsr.optimize(layer(), dtype=dtype)
    m(X)
    assert len(pickle.dumps(m)) < 2 * sum(p.nbytes for p in m.parameters()) + 3000
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        before = len(made)
        assert torch.equal(other(X), m(X)) and len(made) == before + 1
        assert packing.frozen(other.weight)[1:] == packing.frozen(m.weight)[1:]


def test_a_copied_network_is_frozen_before_its_first_call():
    low = fastsr.optimize(fastsr.create("rcan", groups=1, blocks=1, features=16), dtype=torch.bfloat16)
    for other in (copy.deepcopy(low), pickle.loads(pickle.dumps(low))):
        assert {packing.frozen(p).products for p in other.parameters()} == {"bfloat16"}
        assert torch.equal(other.global_part(X[:, :3]), low.global_part(X[:, :3]))


def test_nothing_stays_when_the_tensors_go():
    require_backend("cpu")
    gc.collect()
    before = len(packing._entries), len(packing._frozen)
    modules = [layer(), fastsr.optimize(layer()), fastsr.optimize(fastsr.create("srfeat", features=8, blocks=1))]
    for m in modules:
        m(X[:, : 3 if m is modules[-1] else 16])
    assert len(packing._entries) > before[0]
    del m, modules
    gc.collect()
    assert (len(packing._entries), len(packing._frozen)) == before


def test_freed_tensors_do_not_haunt_those_at_their_address():
    require_backend("cpu")
    for round_ in range(40):
        m = ConvAct(16, 16, bias=round_ % 2 == 0).requires_grad_(False)
        assert agrees(m), round_


def test_threads_share_and_never_see_the_other_weights():
    require_backend("cpu")
    modules = [layer() for _ in range(2)]
    modules[1].weight.data.neg_()
    with fastsr.use("eager"):
        expected = [m(X) for m in modules]
    wrong = []

    def work(number):
        for i in range(60):
            m, e = modules[(i + number) % 2], expected[(i + number) % 2]
            if i % 10 == number:
                m.weight.data = m.weight.data.clone()  # the same values elsewhere
            if not torch.allclose(m(X), e, rtol=1e-4, atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_folded_batch_norms_follow_their_sources():
    model = fastsr.create("srfeat", features=16, blocks=1).eval()
    x = X[:, :3]
    bn = model.blocks[0].bn2
    for tensor in (bn.weight, bn.running_mean, bn.bias, bn.running_var):
        tensor.data.add_(1)
        with torch.inference_mode():
            made = model(x)
        with fastsr.use("eager"):
            torch.testing.assert_close(made, model(x), rtol=1e-4, atol=1e-5)
    model(x).sum().backward()  # what was folded in inference mode is of no harm here
    assert model.blocks[0].bn1.weight.grad.abs().sum() > 0


def test_what_is_derived_is_kept_and_frozen_like_its_sources():
    require_backend("cpu")
    calls = []

    def double(t, factor):
        calls.append(factor)
        return t * factor

    t = torch.ones(3)
    first = packing.derived(double, t, 2)
    assert packing.derived(double, t, 2) is first and packing.derived(double, t, 3) is not first and calls == [2, 3]
    assert packing.frozen(first) is None
    t.data.add_(1)
    assert packing.derived(double, t, 2).tolist() == [4, 4, 4]
    packing.freeze([t], "bfloat16")
    t.add_(1)
    assert packing.frozen(packing.derived(double, t, 2)).products == "bfloat16"
    p = nn.Parameter(torch.ones(3))
    assert packing.derived(double, p, 2).requires_grad


def test_what_is_made_again_of_frozen_tensors_goes_into_the_same_buffers():
    """A CUDA graph reads them. Tensors that are no longer the parameter's are left alone."""
    p = nn.Parameter(torch.ones(3), requires_grad=False)
    packing.freeze([p])

    def made():
        with packing.uses() as uses:
            value = packing.kept("key", [p], lambda: (p.detach(), p * 2))
        assert len(uses) == 1 and uses[0] is value
        return value

    itself, doubled = made()
    for factor in (2, 3):
        p.mul_(factor)
        version = p._version
        assert made()[0] is itself and made()[1] is doubled and torch.equal(doubled, p * 2)
        assert p._version == version
    p.data = torch.full((3,), 5.0)
    assert made()[1] is not doubled and made()[1].tolist() == [10, 10, 10]
    p.add_(1)
    assert made()[1].tolist() == [12, 12, 12]
    assert itself.tolist() == [6, 6, 6] and doubled.tolist() == [12, 12, 12]
    with torch.inference_mode():
        p.mul_(2)
        kept = made()[1]
    p.mul_(2)
    assert made()[1] is kept and kept.tolist() == [48, 48, 48]


# Given up.


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", ("carn", "srfeat", "rcan", "memnet_original", "idn"))
def test_weights_can_be_given_up(name, dtype):
    require_backend("cpu")
    small = {
        "carn": {"scale": 2, "features": 16},
        "srfeat": {"features": 16, "blocks": 2},
        "rcan": {"groups": 1, "blocks": 2, "features": 16, "scale": 2},
        "memnet_original": {"channels": 16, "num_memblock": 2, "num_resblock": 2},
        "idn": {"scale": 2, "blocks": 1},
    }
    torch.manual_seed(0)
    model = fastsr.create(name, **small[name]).eval()
    lean, full = fastsr.optimize(model, dtype=dtype, keep_weights=False), fastsr.optimize(model, dtype=dtype)
    low, high = model.value_range
    images = [torch.rand(n, 1 if model.colour == "y" else 3, h, w) * (high - low) + low
              for n, h, w in ((1, 24, 25), (1, 24, 25), (2, 40, 9), (1, 7, 6))]  # fmt: skip
    assert lean.state_dict().keys() == full.state_dict().keys()
    before = sum(p.untyped_storage().nbytes() for p in lean.parameters())
    for x in images:
        with fastsr.use("cpu"), torch.inference_mode():
            torch.testing.assert_close(lean(x), full(x), rtol=0.05, atol=0.05 * full(x).abs().max().item())
    assert sum(p.untyped_storage().nbytes() for p in lean.parameters()) < 0.2 * before
    assert [tuple(p.shape) for p in lean.parameters()] == [tuple(p.shape) for p in model.parameters()]
    for action in (lean.state_dict, lambda: lean.load_state_dict(model.state_dict()), lambda: copy.deepcopy(lean),
                   lambda: pickle.dumps(lean)):  # fmt: skip
        with pytest.raises(RuntimeError, match="gave the weights up after the first call: this module cannot be saved"):
            action()
    with fastsr.use("eager"), torch.inference_mode():
        assert lean(images[0]).isnan().any()


def test_a_call_that_needs_what_was_given_up_says_so():
    require_backend("cpu")
    m = fastsr.optimize(layer(), keep_weights=False)
    m(X)
    with pytest.raises(RuntimeError, match="gave the weights up after the first call, but this call needs them"):
        m(X, prelu=torch.ones(1))
