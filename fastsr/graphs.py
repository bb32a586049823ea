"""CUDA graphs of an optimized module: a kind of call that comes again is captured once and replayed from then on.

`attach` gives a module a `forward` of its own, a `Graphs`, which decides call by call. A replay launches all kernels of
a call at once; the host neither walks the network nor waits for the device.

* A kind of call is what decides which kernels run: shapes, strides, dtypes and other arguments, the stream,
  `fastsr.use`, torch's switches of determinism and float32 precision, autocast. Its first call runs plainly, the second
  captures, others replay. A module keeps `GRAPHS` captured kinds; one is given up for a kind that came twice since the
  last replay of it, so that more kinds in turn than there is room for do not capture again and again.
* Inputs are copied into buffers of the graph and results are copied out: what a caller holds is never written again.
* Graphs of one stream share one memory pool and are replayed in the order of that stream; graphs of two streams share
  nothing. A lock keeps two threads from mixing up the parts of a call.
* Before each replay the weights' addresses and versions are compared with those of the capture. After a change in
  place, as by `load_state_dict`, one call runs plainly, in which `packing` packs again into the same buffers; if it did
  so for all that the graph reads, the graph goes on. After any other change graphs are captured again. Attributes of
  modules that are neither weights nor modules must not be changed.
* A call runs plainly if a gradient is wanted, it is compiled, traced, explained or captured from outside, a submodule
  has hooks or is in training mode, an argument is not a plain value, or its image is large (`MOST_PIXELS`). A capture
  that fails warns with RuntimeWarning; that kind runs plainly from then on. `report` says the reason of each kind.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules import module as hooks_of_all
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from fastsr import packing
from fastsr.op import _PLAIN, _forced, _switches, _watcher, describe

GRAPHS = 8  # captured kinds of calls of one module
KNOWN = 64  # kinds of calls of one module that are remembered at all

# N * H * W of the first tensor. By arithmetic, not yet measured: a convolution of 64 channels takes an H200 86 us for
# 920,000 pixels at best, and the host some 40 us to launch from Python. Beyond half a million pixels it is the device
# that is late anyhow, and a graph would only hold memory that nobody else can use.
MOST_PIXELS = 2**19

_version, _training, _needs_gradient = map(operator.attrgetter, ("_version", "training", "requires_grad"))
_abandoned: list[Any] = []  # graphs whose capture was broken off: torch's allocators may go on asking them


class Unsuitable(Exception):
    """Why a call cannot be told from others, or not be captured."""


class Lane:
    """What the graphs of one stream share: the memory that they use in turn, and a stream to capture on."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.side, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


class Cuda:
    """What graphs ask of CUDA. Tests put something in its place that works on a CPU (`Graphs.engine`)."""

    kind = "cuda"  # of the devices that it is for
    _one_at_a_time = threading.Lock()

    def capturing(self, device: torch.device) -> bool:
        """Whether the device's current stream is being captured."""
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def stream(self, device: torch.device) -> Hashable:
        """What tells the device's current stream from others."""
        return torch.cuda.current_stream(device).cuda_stream

    def lane(self, device: torch.device) -> Lane:
        return Lane(device)

    def warm_up(self, lane: Lane, run: Callable[[], Any]) -> None:
        """Calls `run` on the stream of captures, for what libraries set up once for each stream."""
        with self._aside(lane):
            run()

    def capture(self, lane: Lane, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Captures `run`. Returns what launches the graph on the current stream, and what `run` returned, whose tensors
        each launch fills."""
        # Other threads may allocate memory meanwhile, hence "thread_local"; torch allows one capture at a time.
        with self._aside(lane), self._one_at_a_time:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # of the warm-up, whose memory no other stream could use
            graph = torch.cuda.CUDAGraph()
            try:
                graph.capture_begin(pool=lane.pool, capture_error_mode="thread_local")
                result = run()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # says that the capture is invalid; the first error says why
                    self._end(graph, lane)
                raise
            self._end(graph, lane)
        return graph.replay, result

    def _end(self, graph: torch.cuda.CUDAGraph, lane: Lane) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            _abandoned.append(graph)
            # Where the capture became invalid, torch leaves its allocator in the state of a capture.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), lane.pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), lane.pool)
            raise

    @contextlib.contextmanager
    def _aside(self, lane: Lane) -> Iterator[None]:
        with torch.cuda.device(lane.device):
            current = torch.cuda.current_stream()
            lane.side.wait_stream(current)
            try:
                with torch.cuda.stream(lane.side):
                    yield
            finally:
                current.wait_stream(lane.side)


class HostWaits(TorchDispatchMode):
    """Raises Unsuitable where the host would have to wait for the device. To find it out by a capture costs more: torch
    does not recover well from one that became invalid. What operators of fastsr do inside is not seen."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise Unsuitable(f"{func} makes the host wait for the device")
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args[:2], result) if isinstance(t, Tensor)]
        copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if copies and len({t.device.type for t in tensors}) > 1:
            raise Unsuitable(f"{func} moves data between the host and the device")
        return result


class Watch:
    """What a graph takes for granted of a module: its submodules, parameters and buffers, and where these lie.

    A look at all of it takes 0.3 ms for RCAN, which has the most, 1,634 parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = [m for m in module.modules() if m is not module]  # without it: this must not keep it alive
        everything = [module, *self.modules]
        self.tables = [d for m in everything for d in (m._parameters, m._buffers, m._modules) if d]
        self.hooks = [d for m in self.modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self.members = self._members()
        found = {id(t): t for t in self.members if isinstance(t, Tensor)}.values()
        self.tensors = [t for t in found if type(t) in (Tensor, nn.Parameter)]
        self.foreign = next((type(t).__name__ for t in found if type(t) not in (Tensor, nn.Parameter)), None)
        self.counted = [t for t in self.tensors if not t.is_inference()]  # others have no version
        self.devices = {t.device for t in self.tensors}
        self.addresses = self._addresses()

    def holds(self) -> bool:
        members = self._members()
        same = len(members) == len(self.members) and all(map(operator.is_, members, self.members))
        return same and self._addresses() == self.addresses

    def versions(self) -> list[int]:
        return list(map(_version, self.counted))

    def _members(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self.tables)))

    def _addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.tensors))


class Graph:
    """A captured call: its own inputs and results, and what else it reads."""

    def __init__(self, engine: Any, lane: Any, run: Callable[..., Any], args: Any, kwargs: Any, versions: list[int]):
        self.lane, self.versions = lane, versions
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # weights cast by autocast must not outlive the graph's memory
        try:
            with _ordinary():
                args, kwargs = _mapped((args, kwargs), lambda t: torch.empty_like(t, requires_grad=False).copy_(t))
                with HostWaits():
                    engine.warm_up(lane, lambda: run(*args, **kwargs))
                with packing.uses() as self.uses:
                    self.launch, self.result = engine.capture(lane, lambda: run(*args, **kwargs))
        finally:
            torch.set_autocast_cache_enabled(cached)
        self.inputs = list(_tensors((args, kwargs)))
        _mapped(self.result, lambda t: t)  # raises Unsuitable if there is something that cannot be copied

    def replay(self, args: Any, kwargs: Any) -> Any:
        """The result of a call of the same kind."""
        with _ordinary():
            for own, given in zip(self.inputs, _tensors((args, kwargs)), strict=True):
                own.copy_(given)
        self.launch()
        return _mapped(self.result, torch.clone)

    def reads(self, uses: list[Any]) -> bool:
        """Whether what `packing` handed out to a plain call is what this graph reads."""
        return len(uses) == len(self.uses) and all(map(operator.is_, uses, self.uses))


@dataclass
class Kind:
    """A kind of call.

    about: its arguments, for people; last: the number of its last call; ran: whether a plain call has come to its end;
    reason: why the last call was not replayed, or None; failure: why it cannot be captured, or None.
    """

    about: str
    last: int = 0
    ran: bool = False
    graph: Graph | None = None
    reason: str | None = None
    failure: str | None = None


@dataclass
class _State:
    """What is known of a module's calls. A copy of the module starts anew."""

    lock: Any = field(default_factory=threading.RLock)  # a forward may call its own module
    number: int = 0  # of calls
    kinds: dict[Hashable, Kind] = field(default_factory=dict)
    lanes: weakref.WeakValueDictionary[Hashable, Any] = field(default_factory=weakref.WeakValueDictionary)
    watch: Watch | None = None


class Graphs:
    """The `forward` of a module that `fastsr.optimize` made: that of its class, replayed as CUDA graphs."""

    engine: Any = Cuda()

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._state = _State()
        forward = type(module).forward.__get__(module)
        self.__signature__ = inspect.signature(forward)  # inspect and torch.export take these two for granted
        self.__code__ = getattr(forward, "__code__", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return Graphs(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> Any:
        return Graphs, (self.module,)

    @property
    def module(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError("the optimized module is gone: keep it, not only its forward")
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self._plain
        if torch.compiler.is_compiling():
            return run(*args, **kwargs)
        first = next(_tensors((args, kwargs)), None)
        if first is None or first.device.type != self.engine.kind or self.engine.capturing(first.device):
            return run(*args, **kwargs)
        with self._state.lock:
            kind = self._known(first, args, kwargs)
            if kind.graph is not None and kind.reason is None:
                return self._replayed(kind, kind.graph, args, kwargs)
        result = run(*args, **kwargs)
        kind.ran = True
        return result

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        return type(module).forward(module, *args, **kwargs)

    def _replayed(self, kind: Kind, graph: Graph, args: Any, kwargs: Any) -> Any:
        assert self._state.watch is not None
        versions = self._state.watch.versions()
        if versions == graph.versions:
            return graph.replay(args, kwargs)
        with packing.uses() as uses:  # packs again
            result = self._plain(*args, **kwargs)
        if graph.reads(uses):
            graph.versions = versions
        else:
            kind.graph, kind.reason = None, "weights were packed into other buffers; its next call is captured"
        return result

    def _known(self, first: Tensor, args: Any, kwargs: Any) -> Kind:
        """The kind of a call, captured now if it is time to. Its reason is None if the call is to be replayed."""
        state, device = self._state, first.device
        if state.watch is None or not state.watch.holds():
            state.kinds.clear()
            state.watch = Watch(self.module)
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        where = (device, self.engine.stream(device))
        unsuitable = None
        try:
            key: Any = (where, _kind((args, kwargs)), _forced(), _switches(), autocast)
        except Unsuitable as error:
            unsuitable = str(error)
            key = (where, unsuitable)
        state.number += 1
        kind = state.kinds.pop(key, None)
        before = 0 if kind is None else kind.last
        if kind is None:
            about = [*map(describe, args), *(f"{name}={describe(value)}" for name, value in kwargs.items())]
            kind = Kind(", ".join(about))
        kind.last = state.number
        state.kinds[key] = kind
        for old in list(state.kinds)[:-KNOWN]:
            del state.kinds[old]
        kind.reason = unsuitable or kind.failure or self._reason(first, args, kwargs)
        if kind.reason is None and kind.graph is None:
            if not kind.ran:
                kind.reason = "it came once; its next call is captured"
            elif self._room(kind, before):
                self._capture(kind, where, args, kwargs)
        return kind

    def _reason(self, first: Tensor, args: Any, kwargs: Any) -> str | None:
        """Why a call cannot be captured or replayed, or None."""
        watch = self._state.watch
        assert watch is not None
        tensors = list(_tensors((args, kwargs)))
        if torch.is_grad_enabled() and any(map(_needs_gradient, chain(tensors, watch.tensors))):
            return "a gradient is wanted: an argument or a parameter requires it"
        if self.module.training or any(map(_training, watch.modules)):
            return "a module is in training mode"
        if any(watch.hooks) or hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
            return "submodules have hooks, which a replay would not call"
        if _watcher.get() is not None or _get_current_dispatch_mode() is not None or torch.jit.is_tracing():
            return "the call is explained, traced, or under a dispatch mode"
        if peek_interpreter_stack() is not None:
            return "the call is under a transform of torch.func"
        if watch.devices | {t.device for t in tensors} != {first.device}:
            return "arguments and parameters are on several devices"
        if watch.foreign is not None:
            return f"a parameter is a {watch.foreign}"
        if any(t.numel() == 0 for t in tensors):
            return "a tensor is empty"
        pixels = first.shape[0] * first.shape[2] * first.shape[3] if first.dim() == 4 else first.numel()
        if pixels > MOST_PIXELS:
            return f"{pixels:,} pixels (at most {MOST_PIXELS:,} pay)"
        return None

    def _room(self, kind: Kind, before: int) -> bool:
        """Makes room for one more graph, if need be by giving up that of the kind that came least recently. Says no if
        that one came since the last call of this kind."""
        captured = [k for k in self._state.kinds.values() if k.graph is not None]
        if len(captured) >= GRAPHS:
            if captured[0].last > before:  # they are in the order of their last calls
                kind.reason = f"{GRAPHS} kinds that come more often have graphs"
                return False
            captured[0].graph, captured[0].reason = None, f"its graph made room for another: a module has {GRAPHS}"
        return True

    def _capture(self, kind: Kind, where: tuple[torch.device, Hashable], args: Any, kwargs: Any) -> None:
        state = self._state
        assert state.watch is not None
        try:
            # A lane dies with its last graph: torch does not let a memory pool be used again that nothing uses.
            lane = state.lanes.get(where) or state.lanes.setdefault(where, self.engine.lane(where[0]))
            kind.graph = Graph(self.engine, lane, self._plain, args, kwargs, state.watch.versions())
        except Exception as error:
            kind.failure = kind.reason = str(error) or type(error).__name__
            warnings.warn(
                f"fastsr.optimize: no CUDA graph for {kind.about}, which runs kernel by kernel: {kind.reason}",
                RuntimeWarning,
                stacklevel=2,
            )


def attach(module: nn.Module, wanted: bool) -> None:
    """Makes a module replay its calls as CUDA graphs, or not. A module whose `forward` was replaced is left alone."""
    if isinstance(module.__dict__.get("forward"), Graphs):
        del module.forward
    if wanted and "forward" not in module.__dict__:
        module.forward = Graphs(module)


def report(model: nn.Module) -> list[str]:
    """What became of the calls of a module that `fastsr.optimize` made: a line for each kind of call on a GPU that came
    lately, with its arguments, and "replayed" or why it has no graph.

    Raises ValueError if the module has no graphs: optimize did not make it, or was told graphs=False.
    """
    graphs = model.__dict__.get("forward")
    if not isinstance(graphs, Graphs):
        raise ValueError("report: expected model to be a module that fastsr.optimize(graphs=True) made")
    with graphs._state.lock:
        kinds = list(graphs._state.kinds.values())
    return [f"{kind.about}: {kind.reason or 'replayed'}" for kind in kinds]


# Arguments and results.


@contextlib.contextmanager
def _ordinary() -> Iterator[None]:
    """Without gradients, but not in inference mode: its tensors could not be written elsewhere."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list, dict):
        for v in value.values() if type(value) is dict else value:
            yield from _tensors(v)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same with other tensors. Raises Unsuitable if there is more than tensors and plain values in it."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(v, function) for v in value)
    if type(value) is dict:
        return {k: _mapped(v, function) for k, v in value.items()}
    if type(value) not in _PLAIN:
        raise Unsuitable(f"the result has a {type(value).__name__} in it, which cannot be copied")
    return value


def _kind(value: Any) -> Hashable:
    """What of an argument decides about the kind of a call."""
    if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
        return value.dtype, value.device, tuple(value.shape), value.stride()
    if type(value) in (tuple, list):
        return type(value), *map(_kind, value)
    if type(value) is dict:
        return dict, *((k, _kind(v)) for k, v in value.items())
    if type(value) in _PLAIN:
        return type(value), value
    raise Unsuitable(f"an argument is a {type(value).__name__}, which may mean something else at each call")
