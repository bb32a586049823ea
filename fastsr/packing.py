"""What is made of parameters, packed weights and folded batch norms, and kept while those stay the same.

A version counter does not see `p.data.mul_()`, `p.data = t` or a NumPy write, and addresses are used again. So things
are kept by the parameter itself, weakly, under one of two conditions:

* Plain tensors: as long as address, version, type, shape, strides and a 64-bit sum of the bytes of all that went in are
  those of then. The sum reads every byte, at the speed of memory.
* Frozen tensors, those of a module that `fastsr.optimize` made: as long as they are the same tensors, with the address
  and version of then. `load_state_dict`, `.to` and in-place operators change one of these; what changes neither is not
  seen, which is what freezing means.

Nothing is kept in attributes of modules or tensors, so copies and pickles carry nothing and start anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastsr import _library

T = TypeVar("T")

KEPT = 8  # things of one tensor: forms of its packed weights for maps of different sizes, types of products


class _Entry(NamedTuple):
    owners: tuple[weakref.ref[Tensor], ...]  # the first tensor alone, or all if they are frozen
    marks: list[Any]
    sums: list[int] | None  # None: all are frozen
    value: Any


_entries: dict[int, dict[Hashable, _Entry]] = {}  # by the id of the first tensor
_frozen: dict[int, tuple[weakref.ref[Tensor], str]] = {}


def freeze(tensors: Sequence[Tensor], products: str = "float32") -> None:
    """Marks tensors as owned by an optimized module, and how convolutions with them are to multiply: "float32" or
    "bfloat16". The mark ends with the tensor."""
    for t in tensors:
        number = id(t)
        _frozen[number] = (weakref.ref(t, lambda _, n=number: _frozen.pop(n, None)), products)


def products(t: Tensor) -> str | None:
    """How convolutions with a frozen tensor multiply; None for a tensor that is not frozen."""
    mark = _frozen.get(id(t))
    return mark[1] if mark is not None and mark[0]() is t else None


def kept(key: Hashable, tensors: Sequence[Tensor], make: Callable[[], T]) -> T:
    """What `make()` returns, or what it returned for the same key and these tensors, at least one, unchanged since.

    It is kept as long as the first tensor lives, along with at most KEPT - 1 others. Any thread may call this; two that
    find nothing both make it. Plain tensors that are not on the CPU, or without the compiled library, keep nothing.
    """
    first = tensors[0]
    entries = _entries.get(id(first))
    entry = None if entries is None else entries.get(key)
    marks = [_mark(t) for t in tensors]
    if entry is not None and entry.marks == marks and entry.owners[0]() is first:
        if entry.sums is None:
            if all(ref() is t for ref, t in zip(entry.owners, tensors, strict=True)):
                return entry.value
        elif entry.sums == [_sum(t) for t in tensors]:
            return entry.value
    frozen = all(products(t) for t in tensors)
    if not frozen and (_library.load() is not None or any(t.device.type != "cpu" for t in tensors)):
        return make()
    # Summed before it is made: what changes in between is noticed by the next call.
    sums = None if frozen else [_sum(t) for t in tensors]
    value = make()
    number = id(first)
    owners = [weakref.ref(first, lambda _, entries=_entries: entries.pop(number, None))]  # named: also as Python ends
    if frozen:
        owners += [weakref.ref(t) for t in tensors[1:]]
    entries = _entries.setdefault(number, {})
    entries.pop(key, None)
    while len(entries) >= KEPT:  # the oldest goes; pop's default covers another thread's pop
        entries.pop(next(iter(list(entries)), None), None)
    entries[key] = _Entry(tuple(owners), marks, sums, value)
    return value


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
        modes = [products(t) for t in tensors]
        if modes[0] is not None and None not in modes:
            freeze(made if isinstance(made, tuple) else (made,), modes[0])  # type: ignore[arg-type]
        return made

    return kept((make, *(a for a in args if not isinstance(a, Tensor))), tensors, ordinary)


def _mark(t: Tensor) -> Any:
    version = 0 if t.is_inference() else t._version  # those have no counter
    return t.data_ptr(), version, t.dtype, t.shape, t.stride()


def _sum(t: Tensor) -> int:
    return torch.ops.fastsr_cpu.checksum(t)
