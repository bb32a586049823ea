"""CUDA graphs of optimized modules: the same results, nobody's result overwritten, no stale weight; on a recording that
stands for CUDA (recorded.py), and, where there is a GPU, on CUDA itself."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import fastsr
from conftest import relative_error, require_backend
from fastsr import graphs
from fastsr.graphs import GRAPHS, KNOWN, Graphs
from fastsr.nn import ConvAct
from recorded import Recorder, Recording

TINY = {
    "enhancenet": {"blocks": 1, "features": 16},
    "memnet": {"channels": 16, "num_memblock": 2, "num_resblock": 2},
    "dbpn": {"scale": 2, "features": 16, "width": 16, "stages": 3},
    "idn": {"scale": 2, "features": 16, "blocks": 1, "block_widths": (12, 8, 16, 16, 12, 20), "slice": 4, "groups": 4},
    "rdn": {"scale": 2, "D": 2, "C": 2, "G": 16, "G0": 16},
    "rcan": {"scale": 2, "groups": 1, "blocks": 2, "features": 16, "hidden": 2},
    "rcan_basicsr": {"scale": 2, "groups": 1, "blocks": 2, "features": 16, "hidden": 2},
    "msrn": {"scale": 2, "blocks": 2, "features": 16},
    "carn": {"scale": 2, "features": 16},
    "carn_m": {"scale": 2, "features": 16, "mobile": True, "group": 4},
    "zssr": {"channels": 3, "width": 16, "depth": 4},
    "sftgan": {"blocks": 1, "features": 16, "condition": 8, "hidden": 8, "cond_hidden": 8},
    "srfeat": {"features": 16, "blocks": 2},
    "esrgan": {"scale": 4, "features": 16, "blocks": 1, "growth": 8},
}


def tiny(name):
    """A small network of each kind, with weights that let a signal through."""
    torch.manual_seed(0)
    return fastsr.create(name.removesuffix("_m"), **TINY[name]).eval().requires_grad_(False)


def example(name, seed=0):
    """What a network takes: an image, and SFTGAN's probabilities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 1 if name in ("memnet", "idn") else 3, 9, 10, generator=generator)
    return (x, torch.rand(1, 8, 36, 40, generator=generator)) if name == "sftgan" else (x,)


@pytest.fixture(params=("eager", "cpu"))
def backend(request):
    require_backend(request.param)
    with fastsr.use(request.param):
        yield request.param


def images(count, *shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two convolutions, a batch norm's kind of derived weight, and a switch; returns an image and a list."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = ConvAct(3, 16, act="relu"), ConvAct(16, 3)

    def forward(self, x, gain: float = 1.0, more=None):
        y = self.second(self.first(x)) * gain
        return y if more is None else (y, [y + more["image"], 7])


def recorded(module=None, **options):
    """An optimized module, and the recorder that stands for CUDA."""
    fast = fastsr.optimize(Two() if module is None else module, **options)
    fast.forward.engine = Recorder()
    return fast, fast.forward.engine


@pytest.fixture
def fast(backend):
    fast, engine = recorded()
    return fast, engine


def truth(fast, x, **kwargs):
    return type(fast).forward(fast, x, **kwargs)


def test_the_second_call_captures_and_all_give_the_same(fast):
    fast, engine = fast
    for number, x in enumerate(images(4, 1, 3, 6, 7)):
        with torch.no_grad():
            assert torch.equal(fast(x), truth(fast, x))
        assert (engine.captures, engine.launches) == (min(number, 1), number)
    assert graphs.report(fast) == ["float32[1, 3, 6, 7] on cpu: replayed"]


def test_the_recording_reads_memory_not_variables():
    """What the other tests rely on: without care, a launch overwrites results and misses what is packed anew."""
    with torch.no_grad():
        weight, x = torch.ones(2), torch.ones(2)
        launch, result = Recorder().capture(Recorder().lane(None), lambda: x * weight)
        x.fill_(3)
        assert result.tolist() == [1, 1]
        launch()
        assert result.tolist() == [3, 3]
        weight = torch.zeros(2)
        launch()
        assert result.tolist() == [3, 3]


def test_a_replay_never_overwrites_a_result_that_is_held(fast):
    fast, engine = fast
    x = images(6, 1, 3, 6, 7)
    held = [fast(one) for one in x]
    before = [one.clone() for one in held]
    fast(x[0])
    assert engine.launches == 6
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
    held[-1].fill_(torch.nan)  # nor does a caller spoil the graph
    assert torch.equal(fast(x[1]), before[1])


def test_structures_go_in_and_out(fast):
    fast, engine = fast
    for x in images(3, 1, 3, 6, 7):
        y, (total, seven) = fast(x, gain=2.0, more={"image": x})
        expected = truth(fast, x, gain=2.0)
        assert torch.equal(y, expected) and torch.equal(total, expected + x) and seven == 7
    assert engine.launches == 2
    for _ in range(2):
        assert torch.equal(fast(x.double()), truth(fast, x).double())  # what is cast at the door is the same kind
        assert torch.equal(fast(x), truth(fast, x))


def test_whatever_decides_about_kernels_makes_another_kind(fast):
    fast, engine = fast
    x = images(1, 2, 3, 6, 7)[0]
    fast(x), fast(x)
    others = [
        lambda: fast(x[:1]),
        lambda: fast(x.contiguous(memory_format=torch.channels_last)),
        lambda: fast(x, 2.0),
        lambda: fast(x, 2),
        lambda: fast(x, gain=2.0),
        lambda: fast(x[:, :, ::2]),
    ]
    for number, call in enumerate(others):
        plain = call()
        assert engine.launches == 1 + number, "its first call is plain"
        assert torch.equal(call(), plain)
        assert engine.launches == engine.captures == 2 + number
    with fastsr.use(None):
        fast(x)
    torch.use_deterministic_algorithms(True)
    try:
        fast(x)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.autocast("cpu", torch.bfloat16):
        low = fast(x)
        assert engine.launches == engine.captures == 7
        assert torch.equal(fast(x), low)
    assert not torch.equal(low, truth(fast, x))
    engine.here.stream = 1
    fast(x)
    assert engine.launches == engine.captures == 8
    engine.here.stream = 0
    assert torch.equal(fast(x), truth(fast, x)) and engine.launches == 9


def test_weights_that_autocast_casts_are_cast_in_each_replay():
    """torch keeps the copies of weights that require gradients until autocast ends, as no graph may."""
    fast, engine = recorded(nn.Conv2d(3, 4, 3))
    fast.requires_grad_(True)
    x = images(1, 1, 3, 6, 7)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast(x), fast(x)
        fast.weight.mul_(2)
        fast(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), truth(fast, x).float())
    assert (engine.captures, engine.launches) == (1, 2)


def test_modes_of_autograd_share_graphs_and_keep_their_kinds_of_tensors(fast):
    fast, engine = fast
    x = images(1, 1, 3, 6, 7)[0]
    with torch.inference_mode():
        assert fast(x).is_inference() and fast(x).is_inference()
    with torch.no_grad():
        assert not fast(x).is_inference()
    y = fast(x)
    assert not y.is_inference() and not y.requires_grad and y.add_(1) is y
    with torch.inference_mode():
        inside = x * 1
    assert torch.equal(fast(inside), truth(fast, x))
    assert engine.captures == 1 and engine.launches == 4


CHANGES = {
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "load_state_dict of a submodule": lambda m: m.first.load_state_dict(
        {k: v * 2 for k, v in m.first.state_dict().items()}
    ),
    "in place": lambda m: m.second.weight.mul_(2),
    "a bias in place": lambda m: m.second.bias.add_(3),
    "data exchanged": lambda m: setattr(m.first.weight, "data", m.first.weight.data + 1),
    "parameter exchanged": lambda m: setattr(m.first, "weight", nn.Parameter(m.first.weight + 1, False)),
    "assigned": lambda m: m.load_state_dict({k: v - 1 for k, v in m.state_dict().items()}, assign=True),
    "submodule exchanged": lambda m: setattr(m, "first", nn.Conv2d(3, 16, 3, padding=1).eval()),
    "there and back": lambda m: m.double().float().second.weight.add_(1),
}
IN_PLACE = ("load_state_dict", "load_state_dict of a submodule", "in place", "a bias in place")


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(fast, change):
    fast, engine = fast
    x, other = images(1, 1, 3, 6, 7)[0], images(1, 1, 3, 5, 5)[0]
    for _ in range(2):
        fast(x), fast(other)
    addresses = buffers(fast)
    for number in range(3):
        with torch.no_grad():
            old = fast(x)
        with torch.no_grad():
            CHANGES[change](fast)
            for _ in range(3):
                assert torch.equal(fast(x), truth(fast, x)) and not torch.equal(fast(x), old)
                assert torch.equal(fast(other), truth(fast, other))
        if change in IN_PLACE:
            assert engine.captures == 2 and buffers(fast) == addresses, "it is packed into the same buffers"
        else:
            assert engine.captures == 2 * (number + 2)
    assert engine.launches > 12


def buffers(fast) -> list[int]:
    """The addresses of what the graphs of a module read of packed weights."""
    kinds = fast.forward._state.kinds.values()
    lists = [[part for part in use if isinstance(part, torch.Tensor)] for k in kinds for use in k.graph.uses]
    return [t.data_ptr() for tensors in lists for t in tensors]


def test_what_is_packed_into_other_buffers_is_captured_again(monkeypatch):
    require_backend("cpu")
    with fastsr.use("cpu"):
        fast, engine = recorded()
        x = images(1, 1, 3, 6, 7)[0]
        fast(x), fast(x)
        graph = next(iter(fast.forward._state.kinds.values())).graph
        monkeypatch.setattr(fastsr.packing, "_refilled", lambda old, new: new)
        with torch.no_grad():
            fast.first.weight.mul_(2)
        assert torch.equal(fast(x), truth(fast, x)) and engine.launches == 1
        assert "other buffers" in graphs.report(fast)[0]
        assert torch.equal(fast(x), truth(fast, x)) and engine.captures == engine.launches == 2
        assert next(iter(fast.forward._state.kinds.values())).graph is not graph


def test_folded_weights_are_packed_again_in_place_too():
    """SRFeat's folded batch norms and MemNet's affine maps are made of parameters, and packed weights of them."""
    require_backend("cpu")
    with fastsr.use("cpu"):
        for name in ("memnet", "srfeat"):
            fast, engine = recorded(tiny(name))
            x = example(name)
            fast(*x), fast(*x)
            with torch.no_grad():
                state = {k: v * 1.5 if v.is_floating_point() else v for k, v in fast.state_dict().items()}
                fast.load_state_dict(state)
            for _ in range(3):
                assert torch.equal(fast(*x), type(fast).forward(fast, *x)), name
            assert engine.captures == 1 and engine.launches == 3, name


def test_another_shape_and_a_full_table_of_packed_weights_do_not_free_what_a_graph_reads(monkeypatch):
    require_backend("cpu")
    with fastsr.use("cpu"):
        fast, engine = recorded()
        x = images(1, 1, 3, 6, 7)[0]
        fast(x), fast(x)
        expected = truth(fast, x)
        fastsr.packing._entries.pop(id(fast.first.weight))
        gc.collect()
        assert torch.equal(fast(x), expected) and engine.launches == 2
        with torch.no_grad():
            fast.first.weight.mul_(2)
        for _ in range(3):
            assert torch.equal(fast(x), truth(fast, x))
        assert engine.captures == 2


def test_the_cache_is_bounded_and_more_kinds_than_it_holds_do_not_thrash(fast):
    fast, engine = fast
    kinds = [images(1, 1, 3, 4, 4 + n)[0] for n in range(GRAPHS + 3)]
    for _ in range(5):
        for x in kinds:
            assert torch.equal(fast(x), truth(fast, x))
    assert engine.captures == GRAPHS and engine.launches == 4 * GRAPHS
    assert sum("more often" in line for line in graphs.report(fast)) == 3
    newcomer = images(1, 1, 3, 9, 9)[0]
    for _ in range(3):  # the kinds before it come no more
        assert torch.equal(fast(newcomer), truth(fast, newcomer))
    assert engine.captures == GRAPHS + 1 and engine.launches == 4 * GRAPHS + 2
    assert sum(line.endswith("replayed") for line in graphs.report(fast)) == GRAPHS
    for n in range(2 * KNOWN):
        fast(images(1, 1, 3, 2, 3 + n)[0])
    assert len(graphs.report(fast)) == KNOWN and engine.captures == GRAPHS + 1


def test_a_lane_dies_with_its_last_graph(fast):
    """torch refuses to share a pool that no graph uses any more."""
    fast, _ = fast
    x = images(1, 1, 3, 6, 7)[0]
    fast(x), fast(x)
    (lane,) = fast.forward._state.lanes.values()
    fast(x[..., :5]), fast(x[..., :5])
    assert list(fast.forward._state.lanes.values()) == [lane], "graphs of one stream share their memory"
    lane = weakref.ref(lane)
    fast.first.weight = nn.Parameter(fast.first.weight + 1, False)
    fast(x)
    assert lane() is None


def from_two_threads(fast, engine, two_streams: bool) -> int:
    """How many results of two threads that call one module are wrong."""
    engine.delay = 0.002
    x = images(40, 1, 3, 6, 7)
    expected = [truth(fast, one) for one in x]
    wrong, selected = [], fastsr.op._forced()

    def work(number):
        engine.here.stream = number if two_streams else 0
        with fastsr.use(selected):
            for at in range(number, len(x), 2):
                if not torch.equal(fast(x[at]), expected[at]):
                    wrong.append(at)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(wrong)


@pytest.mark.parametrize("two_streams", (False, True))
def test_threads_get_their_own_results(fast, two_streams):
    fast, engine = fast
    assert from_two_threads(fast, engine, two_streams) == 0
    assert engine.overlaps == 0 and engine.launches >= 36
    assert engine.captures == (2 if two_streams else 1)


def test_a_lock_is_what_keeps_threads_apart(fast):
    """A planted fault: without it results get mixed up, so the test above would find it."""
    fast, engine = fast
    fast.forward._state.lock = contextlib.nullcontext()
    assert sum(from_two_threads(fast, engine, False) for _ in range(5)) > 0
    assert engine.overlaps > 0


class Waits(nn.Module):
    """Looks at its result on the host."""

    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_a_forward_that_waits_is_found_before_a_capture_and_runs_plainly():
    fast, engine = recorded(Waits())
    x = torch.ones(1, 1, 2, 2)
    fast(x)
    with pytest.warns(RuntimeWarning, match=r"no CUDA graph for float32\[1, 1, 2, 2\].*makes the host wait"):
        assert torch.equal(fast(x), x + 1)
    assert torch.equal(fast(-x), -x - 1) and engine.captures == 0
    assert "_local_scalar_dense" in graphs.report(fast)[0]


def test_a_capture_that_fails_is_not_tried_again(fast):
    fast, engine = fast
    engine.failure = RuntimeError("operation not permitted when stream is capturing")
    x = images(1, 1, 3, 6, 7)[0]
    fast(x)
    with pytest.warns(RuntimeWarning, match="not permitted"):
        assert torch.equal(fast(x), truth(fast, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fast(x), truth(fast, x)) and engine.captures == 1
    assert graphs.report(fast) == ["float32[1, 3, 6, 7] on cpu: operation not permitted when stream is capturing"]
    assert not fast.forward._state.lanes
    engine.failure = None
    fast(x[..., :5]), fast(x[..., :5])
    assert engine.captures == 2 and engine.launches == 1


def test_calls_that_a_graph_cannot_stand_for_run_plainly(fast):
    fast, engine = fast
    x = images(1, 1, 3, 6, 7)[0]
    fast(x), fast(x)
    expected, before = truth(fast, x), engine.launches

    def plainly(call, reason):
        for _ in range(3):
            assert torch.equal(call(), expected)
        assert engine.launches == before and engine.captures == 1
        assert any(reason in line for line in graphs.report(fast)), graphs.report(fast)

    given = x.clone().requires_grad_()
    plainly(lambda: fast(given), "a gradient is wanted")
    assert fast(given).requires_grad
    seen = []
    hook = fast.first.register_forward_hook(lambda *args: seen.append(args))
    plainly(lambda: fast(x), "hooks")
    hook.remove()
    assert len(seen) == 3
    hook = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args))
    plainly(lambda: fast(x), "hooks")
    hook.remove()
    fast.second.train()
    plainly(lambda: fast(x), "training mode")
    fast.eval()
    assert [call.op for call in fastsr.explain(fast, x)] == ["conv_act", "conv_act"]
    with engine.captured():
        plainly(lambda: fast(x), "")
    large = torch.rand(1, 3, 1, graphs.MOST_PIXELS + 1)
    engine_before = engine.captures
    with fastsr.use("eager"):
        fast(large), fast(large)
    assert engine.captures == engine_before and "pay" in graphs.report(fast)[-1]
    assert torch.equal(fast(x), expected) and engine.launches == before + 1


def test_transforms_of_torch_are_of_the_plain_call():
    layer = nn.Conv2d(3, 4, 3)
    fast, engine = recorded(layer)
    x = images(2, 1, 3, 6, 7)
    fast(x[0]), fast(x[0])
    for function in (torch.func.grad(lambda t: fast(t).sum()), lambda t: torch.func.jvp(fast, (t,), (t,))[1]):
        assert function(x[0]).abs().sum() > 0
    assert torch.allclose(torch.func.vmap(fast)(x), torch.stack([layer(one) for one in x]), atol=1e-6)
    assert engine.launches == 1
    assert torch.allclose(fast(x[1]), layer(x[1]), atol=1e-6) and engine.launches == 2


def test_arguments_that_may_change_their_meaning_run_plainly():
    class Scaled(nn.Module):
        def forward(self, x, by):
            return x * by.value

    class By:
        value = 2

    fast, engine = recorded(Scaled())
    by, x = By(), torch.ones(1, 1, 2, 2)
    for by.value in range(4):
        assert torch.equal(fast(x, by), x * by.value)
    assert engine.captures == 0 and "an argument is a By" in graphs.report(fast)[0]


def test_results_that_cannot_be_copied_run_plainly():
    class Odd(nn.Module):
        def forward(self, x):
            return {"y": x + 1, "sizes": x.shape}

    fast, engine = recorded(Odd())
    x = torch.ones(1, 1, 2, 2)
    fast(x)
    with pytest.warns(RuntimeWarning, match="the result has a Size in it"):
        fast(x)
    first, second = fast(x), fast(-x)
    assert torch.equal(first["y"], x + 1) and torch.equal(second["y"], 1 - x)


def test_errors_are_those_of_the_plain_call(fast):
    fast, engine = fast
    for _ in range(3):
        with pytest.raises((ValueError, RuntimeError), match=r"channels"):
            fast(torch.ones(1, 5, 6, 7))
        with pytest.raises(TypeError, match="bias"):
            fast(torch.ones(1, 3, 6, 7), bias=3)
    x = images(1, 1, 3, 6, 7)[0]
    assert torch.equal(fast(x), truth(fast, x))


def test_copies_and_pickles_start_anew(fast):
    fast, engine = fast
    x = images(1, 1, 3, 6, 7)[0]
    fast(x), fast(x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fastsr.optimize(fast)):
        assert type(other) is Two and isinstance(other.forward, Graphs) and other.forward.module is other
        assert other.state_dict().keys() == fast.state_dict().keys()
        assert graphs.report(other) == []
        other.forward.engine = Recorder()
        with torch.no_grad():
            other.first.weight.mul_(2)
        for _ in range(3):
            assert torch.equal(other(x), truth(other, x))
        assert other.forward.engine.launches == 2 and not torch.equal(other(x), fast(x))
    assert "forward" not in fastsr.optimize(fast, graphs=False).__dict__
    with pytest.raises(ValueError, match="graphs=True"):
        graphs.report(fastsr.optimize(fast, graphs=False))


def test_graphs_go_with_their_module():
    fast, _ = recorded()
    x = images(1, 1, 3, 6, 7)[0]
    with fastsr.use("eager"):
        fast(x), fast(x)
    gone, forward = weakref.ref(fast.forward), fast.forward
    gc.disable()  # no cycle keeps the memory of graphs
    try:
        del fast
        with pytest.raises(ReferenceError, match="keep it"):
            forward(x)
        del forward
        assert gone() is None
    finally:
        gc.enable()


def test_tools_of_torch_see_the_class_s_forward():
    fast, engine = recorded()
    x = images(1, 1, 3, 6, 7)[0]
    exported = torch.export.export(fast, (x,), {"gain": 2.0})
    assert torch.allclose(exported.module()(x, gain=2.0), fast(x, gain=2.0), atol=1e-6)
    assert exported.graph_signature.user_inputs[0] == "x"
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert torch.equal(compiled(x), fast(x))
    assert engine.launches == 2
    own = Two()
    own.forward = lambda x: x + 1  # somebody else's
    assert torch.equal(fastsr.optimize(own)(x), x + 1)


class FakeStream:
    """A stream that only has a name."""

    current: list[FakeStream] = []

    def __init__(self, device=None):
        self.device, self.cuda_stream, self.waits = device, id(self), []

    def wait_stream(self, other):
        self.waits.append(other)


class FakeGraph:
    """torch.cuda.CUDAGraph on a recording; `calls` has what was done to any."""

    calls: list[str] = []
    invalid: str | None = None

    def capture_begin(self, pool, capture_error_mode):
        assert FakeStream.current[-1].cuda_stream != FakeStream.current[0].cuda_stream
        assert pool == (0, 7) and capture_error_mode == "thread_local"
        self.calls.append("begin")
        self.recording = Recording()
        self.recording.__enter__()
        if self.invalid:
            raise RuntimeError(self.invalid)

    def capture_end(self):
        self.recording.__exit__(None, None, None)
        self.calls.append("end")
        if self.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self):
        self.recording.launch()


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda, as far as `graphs.Cuda` uses it, without a device."""

    @contextlib.contextmanager
    def on(stream):
        FakeStream.current.append(stream)
        try:
            yield
        finally:
            FakeStream.current.pop()

    monkeypatch.setattr(FakeStream, "current", [FakeStream()])
    monkeypatch.setattr(FakeGraph, "calls", [])
    monkeypatch.setattr(FakeGraph, "invalid", None)
    monkeypatch.setattr(graphs.Cuda, "kind", "cpu")
    pieces = {
        "device": lambda device: contextlib.nullcontext(), "Stream": FakeStream, "stream": on, "CUDAGraph": FakeGraph,
        "current_stream": lambda device=None: FakeStream.current[-1], "graph_pool_handle": lambda: (0, 7),
        "synchronize": lambda: FakeGraph.calls.append("synchronize"), "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: FakeGraph.calls[-1:] == ["begin"], "current_device": lambda: 3,
    }  # fmt: skip
    for name, piece in pieces.items():
        monkeypatch.setattr(torch.cuda, name, piece)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *args, n=name: FakeGraph.calls.append((n, *args)), raising=False)


def test_what_is_asked_of_cuda(fake_cuda, backend):
    fast = fastsr.optimize(Two())
    for x in images(4, 1, 3, 6, 7):
        assert torch.equal(fast(x), truth(fast, x))
    assert FakeGraph.calls == ["synchronize", "begin", "end"] and len(FakeStream.current) == 1
    assert captured(fast) == 1 and len(FakeStream.current[0].waits) == 2
    with torch.no_grad():
        fast.first.weight.mul_(2)
    for x in images(3, 1, 3, 6, 7):
        assert torch.equal(fast(x), truth(fast, x))
    assert FakeGraph.calls == ["synchronize", "begin", "end"]


def test_an_invalid_capture_is_cleaned_up(fake_cuda, backend):
    fast, x = fastsr.optimize(Two()), images(1, 1, 3, 6, 7)[0]
    fast(x)
    FakeGraph.invalid = "operation not permitted when stream is capturing"
    with pytest.warns(RuntimeWarning, match="not permitted"):
        assert torch.equal(fast(x), truth(fast, x))
    pool = (3, (0, 7))
    assert FakeGraph.calls[2:] == ["end", ("_cuda_endAllocateToPool", *pool), ("_cuda_releasePool", *pool)]
    assert len(FakeStream.current) == 1 and not fast.forward._state.lanes
    FakeGraph.invalid = None
    assert torch.equal(fast(x), truth(fast, x)) and captured(fast) == 0


# Networks.


@pytest.mark.parametrize("name", TINY)
def test_networks(name, backend):
    fast, engine = recorded(tiny(name))
    with torch.no_grad():
        for seed in range(3):
            x = example(name, seed)
            made, expected = fast(*x), type(fast).forward(fast, *x)
            assert torch.equal(made, expected) and made.stride() == expected.stride()
    assert engine.captures == 1 and engine.launches == 2


class OfNumbers(TorchFunctionMode):
    """Finds tensors that are made of numbers of the host, which a device without memory does not have sent."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func.__name__ not in ("new_tensor", "tensor", "as_tensor", "from_numpy"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TINY)
def test_no_network_makes_the_host_wait(name):
    """Its forward on a device without memory: nothing is read back, nothing is sent there."""
    fast = fastsr.optimize(tiny(name).to("meta"))
    x = [t.to("meta") for t in example(name)]
    with torch.no_grad():
        fast(*x)  # makes what is kept of weights
        with graphs.HostWaits(), OfNumbers():
            type(fast).forward(fast, *x)


# With a GPU.


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def captured(fast) -> int:
    """How many kinds of calls have graphs."""
    return sum(line.endswith(": replayed") for line in graphs.report(fast))


def on_gpu(name, dtype, **options):
    return fastsr.optimize(tiny(name).cuda(), dtype=dtype, **options)


def given(name, seed=0):
    return [t.cuda() for t in example(name, seed)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", TINY)
def test_networks_on_a_gpu(gpu, name, dtype):
    fast, plain = on_gpu(name, dtype), on_gpu(name, dtype, graphs=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for seed in range(4):
            x = given(name, seed)
            made, expected = fast(*x), plain(*x)
            assert made.dtype == expected.dtype and made.stride() == expected.stride()
            assert torch.equal(made, expected)
    finally:
        torch.use_deterministic_algorithms(False)
    assert captured(fast) == 1, graphs.report(fast)


@pytest.mark.gpu
def test_results_that_are_held_on_a_gpu(gpu):
    fast, plain = on_gpu("rcan", torch.float32), on_gpu("rcan", torch.float32, graphs=False)
    x = [given("rcan", seed)[0] for seed in range(8)]
    held = [fast(one) for one in x]
    torch.cuda.synchronize()
    for one, result in zip(x, held, strict=True):
        assert relative_error(result, plain(one)) < 1e-5
    assert captured(fast) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("streams", ("one stream", "two streams"))
def test_threads_on_a_gpu(gpu, streams):
    fast, plain = on_gpu("rcan", torch.float32), on_gpu("rcan", torch.float32, graphs=False)
    x = [given("rcan", seed)[0] for seed in range(64)]
    expected = [plain(one) for one in x]
    torch.cuda.synchronize()
    made: dict[int, torch.Tensor] = {}
    failures = []

    def work(number):
        try:
            stream = torch.cuda.Stream() if streams == "two streams" else torch.cuda.default_stream()
            with torch.cuda.stream(stream):
                for at in range(number, len(x), 2):
                    made[at] = fast(x[at])
            stream.synchronize()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(relative_error(made[at], one) < 1e-5 for at, one in enumerate(expected))
    assert captured(fast) == (2 if streams == "two streams" else 1), graphs.report(fast)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("rcan", "memnet", "srfeat", "enhancenet"))
def test_changed_weights_on_a_gpu(gpu, name):
    fast, x = on_gpu(name, torch.float32), given(name)
    for _ in range(3):
        fast(*x)
    launch = next(iter(fast.forward._state.kinds.values())).graph.launch
    for factor in (1.5, 0.5):
        fast.load_state_dict({k: v * factor if v.is_floating_point() else v for k, v in fast.state_dict().items()})
        for _ in range(3):
            assert relative_error(fast(*x), type(fast).forward(fast, *x)) < 1e-5
        assert next(iter(fast.forward._state.kinds.values())).graph.launch == launch, "the same graph goes on"
    fast.double().float()
    for _ in range(3):
        assert relative_error(fast(*x), type(fast).forward(fast, *x)) < 1e-5
    assert captured(fast) == 1


class WaitsInAnOperator(nn.Module):
    """Waits where nobody sees it before the capture does."""

    def forward(self, x):
        torch.cuda.current_stream().synchronize()
        return x + 1


@pytest.mark.gpu
@pytest.mark.parametrize("module", (Waits, WaitsInAnOperator))
def test_a_capture_that_fails_on_a_gpu_leaves_nothing_behind(gpu, module):
    fast, x = fastsr.optimize(module()), torch.ones(1, 1, 2, 2, device="cuda")
    fast(x)
    with pytest.warns(RuntimeWarning, match="no CUDA graph"):
        assert torch.equal(fast(x), x + 1)
    assert torch.equal(fast(x), x + 1) and captured(fast) == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # torch refuses it while it believes that something is being captured
    other = on_gpu("carn", torch.float32)
    for _ in range(3):
        other(*given("carn"))
    assert captured(other) == 1
    assert torch.equal(fast(x), x + 1)


@pytest.mark.gpu
def test_the_cache_on_a_gpu_is_bounded_and_memory_goes_with_the_module(gpu):
    plain = on_gpu("carn", torch.float32, graphs=False)
    plain(*given("carn"))
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    fast = on_gpu("carn", torch.float32)
    for height in range(8, 8 + GRAPHS + 4):
        x = torch.rand(1, 3, height, 9, device="cuda")
        for _ in range(3):
            assert relative_error(fast(x), plain(x)) < 1e-5
    assert captured(fast) == GRAPHS
    del fast
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**25  # what libraries keep for a stream


@pytest.mark.gpu
def test_a_capture_from_outside_holds_the_plain_call(gpu):
    fast, x = on_gpu("rcan", torch.float32), given("rcan")[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fast(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fast(x)
    expected = fast(x + 1)
    x.add_(1)
    graph.replay()
    assert relative_error(out, expected) < 1e-5


@pytest.mark.gpu
def test_another_gpu(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    with torch.cuda.device(1):
        fast = fastsr.optimize(tiny("carn").cuda())
        plain = fastsr.optimize(tiny("carn").cuda(), graphs=False)
        for seed in range(3):
            x = given("carn", seed)
            assert relative_error(fast(*x), plain(*x)) < 1e-5
    assert captured(fast) == 1
