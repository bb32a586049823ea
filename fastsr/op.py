"""The operator boundary: registration, dispatch, fake tensors, autograd and autocast of every fastsr operator.

An operator is its eager definition, decorated. `@op` reads the schema from the type hints and registers
`torch.ops.fastsr.<name>`; `check`, `alloc`, `samples`, `recipe` and `backends` complete it. Below the dispatcher a
*plan* picks the first backend that gives no reason against itself, so `torch.compile` sees one opaque operator
whichever kernel runs. The rules that hold for every operator:

* Arguments are `Tensor`, `Tensor | None`, `list[Tensor]`, `list[int]` and scalars; results are `Tensor` or a tuple of
  them.
* Results have the shape, dtype and strides of `alloc`, on every backend, eager included.
* Gradients are made for the inputs that need them and only for those. They are the vector-Jacobian product of the
  eager definition, recomputed in the backward pass; second derivatives work in eager mode.
* Autocast: every floating-point argument except float64 is cast to the autocast dtype, which is then the dtype of
  the result, as `torch.autocast` does for convolutions.
* A plan is remembered by (forced backend, global switches, dtype, device, shape, stride and alignment of every
  tensor, every scalar). That is all a backend's reason may read. At most `PLAN_LIMIT` plans are kept an operator.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

PLAN_LIMIT = 512
BACKENDS = ("cuda", "triton", "cpu", "eager")
ALIGNMENT = 64  # bytes; a plan may rely on the alignment its tensors had up to a cache line

LIBRARY = torch.library.Library("fastsr", "DEF")
OPS: dict[str, Op[..., Any]] = {}

_UNSET = object()
_PLAIN = frozenset({type(None), bool, int, float, str})
_HOLE = torch.empty(0)  # stands where a saved tensor goes
_forced_here: contextvars.ContextVar[Any] = contextvars.ContextVar("fastsr_forced_backend", default=_UNSET)
_forced_everywhere: list[tuple[object, str | None]] = []
_forced_lock = threading.Lock()
_watcher: contextvars.ContextVar[Watcher | None] = contextvars.ContextVar("fastsr_watcher", default=None)


@dataclass(frozen=True)
class Backend:
    """One way to compute an operator.

    reason: takes the operator's arguments; returns None if this backend can compute them, else a sentence saying why
        not. It may read the arguments' metadata only (dtype, device, shape, stride, alignment, scalars).
    run: takes the output made by `alloc`, then the operator's arguments, and fills the output.
    missing: returns why the backend cannot be used on this machine at all (not built, no device), or None.
    prepare: takes the operator's arguments when a plan is made for them, and returns the `run` of that plan; for
        backends with work to do once a shape. Like `reason`, it may read metadata only. What it returns may have a
        method `workspace`, which takes the arguments too: see `Op.workspace`.
    advice: takes the operator's arguments; returns None, or a sentence saying why the backends after this one are
        expected to be faster for them. It is heeded unless this backend is forced.
    """

    reason: Callable[..., str | None]
    run: Callable[..., None] | None = None
    missing: Callable[[], str | None] = lambda: None
    prepare: Callable[..., Callable[..., None]] | None = None
    advice: Callable[..., str | None] = lambda *args: None


@dataclass(frozen=True)
class Call:
    """One operator call as reported by `explain`: what ran, and why the backends before it did not."""

    op: str
    backend: str
    refused: dict[str, str]
    shapes: tuple[Any, ...]


@dataclass(frozen=True)
class _Spec:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Plan:
    name: str
    run: Callable[..., None] | None  # None: the eager definition
    refused: dict[str, str]
    results: tuple[_Spec, ...]
    several: bool  # results, which are a tuple then
    device: torch.device


@contextlib.contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Forces every operator called inside onto one backend: "cuda", "triton", "cpu" or "eager"; None lets each choose.

    An operator that the backend cannot compute raises RuntimeError with the reason instead of running elsewhere; an
    unknown name raises ValueError at once.
    The choice holds for this thread (and asyncio task) and for every other thread that has made none of its own, so
    that the worker threads of a data loader, a pool or autograd follow it.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"use: expected backend to be one of {', '.join(BACKENDS)} or None; got {backend!r}")
    entry = (object(), backend)
    token = _forced_here.set(backend)
    with _forced_lock:
        _forced_everywhere.append(entry)
    try:
        yield
    finally:
        with _forced_lock:
            _forced_everywhere.remove(entry)
        _forced_here.reset(token)


def _forced() -> str | None:
    here = _forced_here.get()
    if here is not _UNSET:
        return here
    with _forced_lock:
        return _forced_everywhere[-1][1] if _forced_everywhere else None


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Call]:
    """Runs `function(*args, **kwargs)` (an operator, a layer, a network) and returns the operator calls it made in
    this thread, each with the backend that ran and the reasons of those that refused."""
    calls: list[Call] = []

    def note(op: Op, args: tuple[Any, ...], plan: _Plan) -> None:
        calls.append(Call(op.name, plan.name, plan.refused, _shapes(args)))

    with watch(note):
        function(*args, **kwargs)
    return calls


Watcher = Callable[["Op[..., Any]", tuple[Any, ...], _Plan], None]


@contextlib.contextmanager
def watch(watcher: Watcher | None) -> Iterator[None]:
    """Inside, `watcher(op, args, plan)` is told of every operator call of this thread before it runs, args with
    defaults filled in; None tells nobody."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def describe(value: Any) -> str:
    """A short form of an argument for messages: `float32[1, 64, 48, 48]` for tensors, `repr` for the rest."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(describe(v) for v in value) + "]"
    return repr(value)


def expect(condition: bool, expectation: str, /, **got: Any) -> None:
    """Raises ValueError("expected <expectation>; got name=value, ...") unless the condition holds. For `check`."""
    if not condition:
        raise ValueError(f"expected {expectation}; got " + ", ".join(f"{k}={describe(v)}" for k, v in got.items()))


def expect_alike(**tensors: Any) -> None:
    """Raises ValueError unless all tensors, lists opened and None left out, have one dtype and device. For `check`."""
    named = [(name, t) for name, value in tensors.items() for t in _tensors([value])]
    name, first = named[0]
    for other, t in named:
        if (t.dtype, t.device) != (first.dtype, first.device):
            raise ValueError(
                f"expected one dtype and device for all tensors; got {name}={describe(first)} and "
                f"{other}={describe(t)}; convert one of them with .to()"
            )


def is_channels_last(x: Tensor) -> bool:
    """True for a 4-D tensor stored N, H, W, C, also for a slice of its channels; False for a single pixel. Of one
    channel it is told by the strides, in which torch sees no difference."""
    return x.dim() == 4 and x.stride(1) == 1 and x.stride(3) >= x.shape[1] and x.shape[2] * x.shape[3] > 1


def empty_image(like: Tensor, shape: Sequence[int], *, channels_last: bool | None = None) -> Tensor:
    """An uninitialised (N, C, H, W) tensor with the dtype and device of `like`, and its layout unless stated."""
    channels_last = is_channels_last(like) if channels_last is None else channels_last
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=memory_format)


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """All tensors among the arguments, lists opened, in order."""
    found: list[Tensor] = []
    for a in args:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            found.extend(t for t in a if isinstance(t, Tensor))
    return found


def _is_list(a: Any) -> bool:
    """True for a list of tensors."""
    return isinstance(a, (list, tuple)) and all(isinstance(t, Tensor) for t in a)


def _replace(args: Sequence[Any], tensors: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments with their tensors, in the order of `_tensors`, exchanged for those given."""
    new = iter(tensors)

    def one(a: Any) -> Any:
        if isinstance(a, Tensor):
            return next(new)
        if isinstance(a, (list, tuple)):
            return [next(new) if isinstance(t, Tensor) else t for t in a]
        return a

    return tuple(one(a) for a in args)


def _switches() -> tuple[Any, ...]:
    """The global switches that a backend's reason may read: determinism, and how float32 may be rounded.

    `torch.get_float32_matmul_precision` raises where a program has set the precision of one backend alone; the getter
    below answers whichever way it was set.
    """
    precision = torch._C._get_fp32_precision_getter
    return (
        torch.are_deterministic_algorithms_enabled(),
        *(precision(device, kind) for device in ("cuda", "mkldnn") for kind in ("matmul", "conv")),
    )


def _key(value: Any) -> Any:
    if type(value) in _PLAIN:  # most arguments are, and asking whether one is a tensor takes longer
        return value
    if isinstance(value, Tensor):
        return value.dtype, value.device, value.shape, value.stride(), value.data_ptr() % ALIGNMENT
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    return value


def _shapes(value: Any) -> Any:
    """The arguments with tensors replaced by their shapes."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return type(value)(_shapes(v) for v in value) if isinstance(value, (list, tuple)) else value


def _conform(result: Tensor, spec: _Spec) -> Tensor:
    """The result in the dtype and strides promised by `alloc`, copied only if it has others."""
    if tuple(result.shape) != spec.shape:
        raise RuntimeError(f"alloc promises the shape {spec.shape} but the definition returns {tuple(result.shape)}")
    if result.dtype == spec.dtype and result.stride() == spec.stride:
        return result
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=result.device).copy_(result)


class Op(Generic[P, R]):
    """An operator; made by decorating its eager definition with `@op`. See the module's docstring for the rules.

    Attributes: `name`; `eager`, the undecorated definition; `default`, the `torch._ops.OpOverload`.
    """

    def __init__(self, eager: Callable[P, R]) -> None:
        self.eager = eager
        self.name = eager.__name__
        self.samples_of: Callable[..., Iterator[tuple[Any, ...]]] | None = None
        self.recipe_of: Callable[..., Any] | None = None
        self._signature = inspect.signature(eager)
        self._defaults = tuple(p.default for p in self._signature.parameters.values())
        self._required = sum(d is inspect.Parameter.empty for d in self._defaults)
        self._check: Callable[..., None] = lambda *args: None
        self._alloc: Callable[..., Any] | None = None
        self._backends: dict[str, Backend] = {}
        self._plans: dict[Any, _Plan] = {}
        functools.update_wrapper(self, eager)
        self._schema = torch.library.infer_schema(eager, mutates_args=())
        LIBRARY.define(self.name + self._schema)
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        self.default = getattr(torch.ops.fastsr, self.name).default
        for device in ("cpu", "cuda"):
            LIBRARY.impl(self.name, functools.partial(self._autocast, device), f"Autocast{device.upper()}")
        self._register_autograd()
        OPS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.default(*args, **kwargs)

    # What an operator's file adds to its definition.

    def check(self, function: Callable[..., None]) -> Callable[..., None]:
        """Decorator: raises ValueError (through `expect`) on bad arguments; runs once per new plan and when traced."""
        self._check = function
        return function

    def alloc(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: makes the output of every backend; it is the fake kernel too, so it reads metadata only."""
        self._alloc = function

        def fake(*args: Any, **kwargs: Any) -> Any:
            bound = self._bind(args, kwargs)
            self._checked(bound)
            return function(*bound)

        torch.library.register_fake(f"fastsr::{self.name}", fake, lib=LIBRARY)
        return function

    def samples(self, function: Callable[..., Iterator[tuple[Any, ...]]]) -> Callable[..., Iterator[tuple[Any, ...]]]:
        """Decorator: a generator of argument tuples, smallest first, given `make(*shape) -> Tensor`. Feeds tests,
        benchmarks and tuning."""
        self.samples_of = function
        return function

    def recipe(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: takes the operator's arguments, returns the `fastsr.recipes.Recipe` that computes them."""
        self.recipe_of = function
        return function

    def backends(self, **backends: Backend) -> None:
        """The kernels there are, by name, in order of preference: the first that gives no reason against itself runs.
        Eager is always last and needs no entry. Raises ValueError for a name that is not in BACKENDS."""
        wrong = [name for name in backends if name not in BACKENDS or name == "eager"]
        if wrong:
            raise ValueError(f"fastsr::{self.name}: expected backends out of cuda, triton and cpu; got {wrong}")
        self._backends = backends
        self.forget_plans()

    def forget_plans(self) -> None:
        """Lets the next call choose anew, as something that the choice depends on has changed."""
        self._plans.clear()

    # What others ask of it.

    def available(self) -> dict[str, str | None]:
        """Per backend: why it cannot be used on this machine, or None. "eager" is always there."""
        return {name: self._missing(name) for name in BACKENDS}

    def reasons(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, str | None]:
        """Per backend: why it cannot compute these arguments, or None. Raises ValueError on bad arguments."""
        bound = self._bind(args, kwargs)
        self._checked(bound)
        return self._reasons(bound)

    def workspace(self, *args: P.args, **kwargs: P.kwargs) -> int | None:
        """Bytes that the kernel which runs for these arguments takes beside its result; None where nobody knows, as of
        the eager definition. Raises ValueError on bad arguments."""
        bound = self._bind(args, kwargs)
        count = getattr(self._planned(bound).run, "workspace", None)
        return None if count is None else count(*bound)

    # Dispatch.

    def _bind(self, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> tuple[Any, ...]:
        if not kwargs and len(args) >= self._required:  # the dispatcher drops trailing arguments equal to their default
            return (*args, *self._defaults[len(args) :])
        bound = self._signature.bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        return bound.args

    def _checked(self, args: tuple[Any, ...]) -> None:
        try:
            self._check(*args)
        except ValueError as error:
            raise ValueError(f"fastsr::{self.name}: {error}") from None

    def _missing(self, name: str) -> str | None:
        if name == "eager":
            return None
        backend = self._backends.get(name)
        return backend.missing() if backend else f"no {name} kernel is written for {self.name}"

    def _reasons(self, args: tuple[Any, ...]) -> dict[str, str | None]:
        return {
            name: self._missing(name) or (self._backends[name].reason(*args) if name in self._backends else None)
            for name in (*self._backends, *(n for n in BACKENDS if n not in self._backends))
        }

    def _plan(self, forced: str | None, args: tuple[Any, ...]) -> _Plan:
        self._checked(args)
        reasons = self._reasons(args)
        if forced is not None and reasons[forced]:
            raise RuntimeError(f"fastsr::{self.name}: backend '{forced}' rejected: {reasons[forced]}")
        name = forced or "eager"
        refused = {n: r for n, r in reasons.items() if r is not None}
        if forced is None:
            for candidate in (n for n in self._backends if n not in refused):
                against = self._backends[candidate].advice(*args)
                if against is None:
                    name = candidate
                    break
                refused[candidate] = against
        chosen = self._backends.get(name)
        run = None if chosen is None else chosen.prepare(*args) if chosen.prepare is not None else chosen.run
        tensors = _tensors(args)
        # What `alloc` makes of these arguments, learnt on the meta device.
        shadows = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]
        made = self._allocate(_replace(args, shadows))
        several = isinstance(made, tuple)
        results = tuple(_Spec(tuple(m.shape), m.stride(), m.dtype) for m in (made if several else (made,)))
        return _Plan(name, run, refused, results, several, tensors[0].device)

    def _allocate(self, args: tuple[Any, ...]) -> Any:
        if self._alloc is None:
            raise RuntimeError(f"fastsr::{self.name}: the operator has no alloc; add one with @{self.name}.alloc")
        return self._alloc(*args)

    def _planned(self, bound: tuple[Any, ...]) -> _Plan:
        forced = _forced()
        key = (forced, _switches(), tuple(_key(a) for a in bound))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(forced, bound)
            while len(self._plans) >= PLAN_LIMIT:  # the oldest goes; pop's default covers another thread's pop
                self._plans.pop(next(iter(list(self._plans))), None)
            self._plans[key] = plan
        return plan

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._bind(args, kwargs)
        plan = self._planned(bound)
        watcher = _watcher.get()
        if watcher is not None:
            watcher(self, bound, plan)
        if plan.run is None:
            result: Any = self.eager(*bound)  # type: ignore[call-arg]
            if isinstance(result, tuple):
                return tuple(_conform(r, s) for r, s in zip(result, plan.results, strict=True))
            return _conform(result, plan.results[0])
        made = tuple(torch.empty_strided(r.shape, r.stride, dtype=r.dtype, device=plan.device) for r in plan.results)
        out: Any = made if plan.several else made[0]
        plan.run(out, *bound)
        return out

    def _autocast(self, device: str, *args: Any, **kwargs: Any) -> Any:
        bound = self._bind(args, kwargs)
        dtype = torch.get_autocast_dtype(device)
        cast = [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in _tensors(bound)]
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
        keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return self.default(*_replace(bound, cast))

    # Gradients.

    def _vjp(self, grads: Sequence[Tensor], needs: Sequence[bool], args: tuple[Any, ...], create_graph: bool) -> list:
        """Gradients of the eager definition for the tensors marked in `needs`; zeros for one it does not depend on."""
        with torch.enable_grad(), torch.autocast(grads[0].device.type, enabled=False):
            tensors = _tensors(args)
            if not create_graph:
                tensors = [t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
            result: Any = self.eager(*_replace(args, tensors))  # type: ignore[call-arg]
            results = result if isinstance(result, tuple) else (result,)
            pairs = [(r, g) for r, g in zip(results, grads, strict=True) if r.requires_grad]
            wanted = [t for t, n in zip(tensors, needs, strict=True) if n]
            if not pairs:
                return [torch.zeros_like(t) for t in wanted]
            outputs, given = zip(*pairs, strict=True)
            made = torch.autograd.grad(outputs, wanted, given, allow_unused=True, create_graph=create_graph)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(made, wanted, strict=True)]

    def _register_autograd(self) -> None:
        backward_name = f"{self.name}_backward"
        arguments = self._schema.split(" -> ")[0].removeprefix("(").removesuffix(")")
        LIBRARY.define(f"{backward_name}(Tensor[] grads, bool[] needs, {arguments}) -> Tensor[]")

        def backward_kernel(grads: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
            bound = self._bind(args)
            wanted = [t for t, n in zip(_tensors(bound), needs, strict=True) if n]
            made = self._vjp(grads, needs, bound, create_graph=False)
            likes = [torch.empty_like(t, device="meta") for t in wanted]
            return [_conform(g, _Spec(tuple(s.shape), s.stride(), s.dtype)) for g, s in zip(made, likes, strict=True)]

        def backward_fake(grads: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
            return [torch.empty_like(t) for t, n in zip(_tensors(self._bind(args)), needs, strict=True) if n]

        LIBRARY.impl(backward_name, backward_kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastsr::{backward_name}", backward_fake, lib=LIBRARY)
        backward_op = getattr(torch.ops.fastsr, backward_name).default

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            bound = self._bind(inputs)
            tensors = _tensors(bound)
            ctx.template = _replace(bound, [_HOLE] * len(tensors))
            ctx.save_for_backward(*tensors)

        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            args = _replace(ctx.template, ctx.saved_tensors)
            given = ctx.needs_input_grad  # one entry an argument, without the trailing ones that equal their default
            needs: list[bool] = []
            for a, need in zip(args, given, strict=False):
                needs.extend(need if _is_list(a) else [need] if isinstance(a, Tensor) else [])
            if torch.is_grad_enabled():  # create_graph=True: differentiate the definition itself once more
                made = iter(self._vjp(grads, needs, args, create_graph=True))
            else:
                made = iter(backward_op(list(grads), needs, *args))
            all_grads = _replace(args, [next(made) if need else None for need in needs])
            pairs = zip(all_grads, args, strict=True)
            return tuple(g if isinstance(a, Tensor) or _is_list(a) else None for g, a in pairs)[: len(given)]

        torch.library.register_autograd(f"fastsr::{self.name}", backward, setup_context=setup_context, lib=LIBRARY)


op = Op
