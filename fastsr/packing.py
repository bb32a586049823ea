"""What is made of parameters, packed weights and folded batch norms, and kept while those stay the same.

A version counter does not see `p.data.mul_()`, `p.data = t` or a NumPy write, and addresses are used again. So things
are kept by the parameter itself, weakly, under one of two conditions:

* Plain tensors: as long as address, version, type, shape, strides and a 64-bit sum of the bytes of all that went in are
  those of then. The sum reads every byte, at the speed of memory.
* Frozen tensors, those of a module that `fastsr.optimize` made: as long as they are the same tensors, with the address
  and version of then. `load_state_dict`, `.to` and in-place operators change one of these; what changes neither is not
  seen, which is what freezing means.

Nothing is kept in attributes of modules or tensors, so copies and pickles carry nothing and start anew.

What is made again of frozen tensors that were changed in place goes into the buffers that there are: a CUDA graph reads
these (`fastsr.graphs`). `uses` says which.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastsr import _library

T = TypeVar("T")

KEPT = 16  # things of one tensor: forms of its packed weights for maps of different sizes, types of products


class _Entry(NamedTuple):
    tensors: tuple[weakref.ref[Tensor], ...]
    marks: list[Any]
    sums: list[int] | None  # None: all are frozen
    value: Any


class Frozen(NamedTuple):
    """What `optimize` wants for a tensor. products: how convolutions with it multiply, "float32", "bfloat16", or
    "bfloat16 of float32", which rounds for each product but no map that is stored.
    any_size: what is packed has to serve images of every size, because the tensor is going to be released. released:
    its values are gone."""

    tensor: weakref.ref[Tensor]
    products: str
    any_size: bool
    released: bool = False


_entries: dict[int, dict[Hashable, _Entry]] = {}  # by the id of the first tensor
_frozen: dict[int, Frozen] = {}
_uses = threading.local()  # .found: the list of the innermost `uses` of this thread


def freeze(tensors: Sequence[Tensor], products: str = "float32", any_size: bool = False) -> None:
    """Marks tensors as owned by an optimized module; see `Frozen`. The mark ends with the tensor."""
    for t in tensors:
        number = id(t)
        ref = weakref.ref(t, lambda _, number=number, frozen=_frozen: frozen.pop(number, None))
        _frozen[number] = Frozen(ref, products, any_size)


def frozen(t: Tensor) -> Frozen | None:
    """The mark of a frozen tensor; None for another."""
    mark = _frozen.get(id(t))
    return mark if mark is not None and mark.tensor() is t else None


def kept(key: Hashable, tensors: Sequence[Tensor], make: Callable[[], T]) -> T:
    """What `make()` returns, or what it returned for the same key and these tensors, at least one, unchanged since.

    It is kept as long as the first tensor lives, along with at most KEPT - 1 others. Any thread may call this; two that
    find nothing both make it. Plain tensors that are not on the CPU, or without the compiled library, keep nothing, nor
    does a stream that is being captured. Raises RuntimeError if it has to be made of a tensor that was released.
    """
    first = tensors[0]
    key = (key, *map(id, tensors[1:]))
    entries = _entries.get(id(first))
    entry = None if entries is None else entries.get(key)
    marks = [_mark(t) for t in tensors]
    if (
        entry is not None
        and entry.marks == marks
        and all(ref() is t for ref, t in zip(entry.tensors, tensors, strict=True))
        and (entry.sums is None or entry.sums == [_sum(t) for t in tensors])
    ):
        return used(entry.value)
    modes = [frozen(t) for t in tensors]
    if any(mode is not None and mode.released for mode in modes):
        raise RuntimeError(
            "optimize(keep_weights=False) gave the weights up after the first call, but this call needs them, for an "
            "image of a few pixels or another setting of a layer; optimize with keep_weights=True"
        )
    all_frozen = None not in modes
    if not all_frozen and (_library.load() is not None or any(t.device.type != "cpu" for t in tensors)):
        return make()
    on_gpu = first.device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return make()  # nothing is computed before the first replay
    # Summed before it is made: what changes in between is noticed by the next call.
    sums = None if all_frozen else [_sum(t) for t in tensors]
    value = make()
    if all_frozen and entry is not None and entry.sums is None and _changed_in_place(entry, tensors):
        value = _refilled(entry.value, value)
    if on_gpu:
        torch.cuda.current_stream(first.device).synchronize()  # other streams may read it at once
    number = id(first)
    owner = weakref.ref(first, lambda _, entries=_entries: entries.pop(number, None))  # named: also as Python ends
    entries = _entries.setdefault(number, {})
    for k, e in list(entries.items()):
        if k == key or any(ref() is None for ref in e.tensors):
            entries.pop(k, None)
    while len(entries) >= KEPT:  # the oldest goes; pop's default covers another thread's pop
        entries.pop(next(iter(list(entries)), None), None)
    entries[key] = _Entry((owner, *map(weakref.ref, tensors[1:])), marks, sums, value)
    return used(value)


@contextlib.contextmanager
def uses() -> Iterator[list[Any]]:
    """A list that gets whatever this thread is given of what is kept, in order, until the end of the context."""
    outer = getattr(_uses, "found", None)
    _uses.found = found = []
    try:
        yield found
    finally:
        _uses.found = outer


def used(value: T) -> T:
    """The value, noted for `uses`; for what is kept on a device elsewhere, too."""
    found = getattr(_uses, "found", None)
    if found is not None:
        found.append(value)
    return value


def _changed_in_place(entry: _Entry, tensors: Sequence[Tensor]) -> bool:
    """Whether an entry is of these tensors, where they lie now."""
    same = all(ref() is t for ref, t in zip(entry.tensors, tensors, strict=True))
    return same and [mark[0] for mark in entry.marks] == [t.data_ptr() for t in tensors]


def _refilled(old: Any, new: Any) -> Any:
    """The old tensor or tensors, filled with the new ones; the new ones where they are of another kind."""
    pairs = [(old, new)] if isinstance(old, Tensor) else []
    if isinstance(old, (list, tuple)) and type(new) is type(old) and len(new) == len(old):
        pairs = list(zip(old, new, strict=True))
    if not pairs or not all(isinstance(a, Tensor) and isinstance(b, Tensor) and _alike(a, b) for a, b in pairs):
        return new
    with torch.inference_mode():  # some were made in it
        for a, b in pairs:
            if a.data_ptr() != b.data_ptr():  # as of a part that is the parameter itself
                a.copy_(b)
    return old


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def release(tensors: Iterable[Tensor]) -> None:
    """Gives up the values of those frozen weights on a CPU that something was made of, and of weights derived of them:
    they keep shape and dtype, and are NaN from then on. What was made stays."""
    used = {id(ref()): entry for entries in _entries.values() for entry in entries.values() for ref in entry.tensors}
    found = [t for t in tensors if t.dim() == 4 and t.device.type == "cpu" and id(t) in used and frozen(t)]
    ids = {id(t) for t in found}
    of_them = [e for entries in _entries.values() for e in entries.values() if any(id(r()) in ids for r in e.tensors)]
    for t in found:
        _, c, _, w = t.shape
        # The strides are those of few elements, and as channels-last as those of the weight were.
        t.data = torch.full((c * w,), torch.nan, dtype=t.dtype).as_strided(t.shape, (0, 1, 0, c))
        _frozen[id(t)] = _frozen[id(t)]._replace(released=True)
    for entry in of_them:
        entry.marks[:] = [_mark(t) for t in (ref() for ref in entry.tensors) if t is not None]
    derived_of_them = [t for e in of_them if isinstance(e.value, (tuple, list)) for t in e.value if frozen(t)]
    if derived_of_them:
        release(derived_of_them)


def derived(make: Callable[..., T], *args: Any) -> T:
    """make(*args), a tensor or a tuple of them, kept and frozen like the tensors among its arguments. `make` is a
    function of a module; the first argument is a tensor.

    It is simply computed while gradients or graphs are recorded.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return make(*args)

    def ordinary() -> T:
        with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not be used outside it
            made = make(*args)
        modes = [frozen(t) for t in tensors]
        if modes[0] is not None and None not in modes:
            results = made if isinstance(made, tuple) else (made,)
            freeze(results, modes[0].products, modes[0].any_size)  # type: ignore[arg-type]
        return made

    return kept((make, *(a for a in args if not isinstance(a, Tensor))), tensors, ordinary)


def _mark(t: Tensor) -> Any:
    version = 0 if t.is_inference() else t._version  # those have no counter
    return t.data_ptr(), version, t.dtype, t.shape, t.stride()


def _sum(t: Tensor) -> int:
    return torch.ops.fastsr_cpu.checksum(t)
