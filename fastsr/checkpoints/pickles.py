"""Pickles, read without running anything.

A pickle is a program for a stack machine. Python's machine imports the names in it and calls them, which is how a file
of weights can start any command. This one neither imports nor calls: a name stays a `Name`, a call stays a `Call` with
its arguments, a reference to bytes elsewhere a `Reference`. What they mean is decided by the reader of a format, which
knows the few that stand for tensors and arrays. Nothing recurses, so that no nesting is too deep; every step takes a
byte of the file and makes at most one small object, and steps are limited.
"""

from __future__ import annotations

import codecs
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsr.checkpoints.errors import CheckpointError, damaged

MOST_STEPS = 2_000_000  # a pickled RCAN takes 400,000
LONGEST_LINE = 1 << 20
LONGEST_NUMBER = 1000  # digits, or bytes
LONGEST_KEY = 10_000  # characters
MOST_AXES = 32
INSTEAD = "save the module's state_dict() instead"

# Not what makes this safe, since nothing is ever called: files that would call these are refused by name.
# fmt: off
HOSTILE_MODULES = frozenset({
    "_pickle", "asyncio", "code", "commands", "ctypes", "http", "importlib", "marshal", "multiprocessing", "nt", "os",
    "pickle", "platform", "popen2", "posix", "pty", "requests", "runpy", "shutil", "socket", "subprocess", "sys",
    "urllib", "webbrowser",
})
HOSTILE_BUILTINS = frozenset({
    "__import__", "breakpoint", "compile", "delattr", "eval", "exec", "execfile", "globals", "input", "open", "vars",
})
# fmt: on


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names; nothing was imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:200]


@dataclass(eq=False, repr=False, slots=True)
class Call:
    """What Python would have got by calling `function`, had this been Python: see `function`, `arguments`, the `state`
    it would have been given then, the `items` appended to it and the `entries` set in it."""

    function: Any
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.function) if isinstance(self.function, Name) else "computed function"


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Reference:
    """A persistent id: what it names is outside the pickle."""

    id: Any


@dataclass(frozen=True)
class Loaded:
    """`value` of the pickle, the position `end` behind it, and all `references` in it."""

    value: Any
    end: int
    references: list[Reference]


def load(data: memoryview, at: int = 0) -> Loaded:
    """Reads the pickle, of any protocol, that starts at a position. Raises CheckpointError."""
    machine = _Machine(data, at)
    try:
        value = machine.run()
    except CheckpointError:
        raise
    except (ValueError, OverflowError, struct.error) as error:  # a number or a text that is none
        raise damaged(f"a pickle holds something unreadable ({str(error)[:100]})") from error
    return Loaded(value, machine.at, machine.references)


class _Machine:
    """The stack machine. `marks` are the heights of the stack at which lists of values begin."""

    def __init__(self, data: memoryview, at: int) -> None:
        self.data, self.at = data, at
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.references: list[Reference] = []
        self.pairs = 0

    def run(self) -> Any:
        for _ in range(MOST_STEPS):
            if self.at >= len(self.data):
                raise damaged("a pickle without an end")
            opcode = chr(self.data[self.at])
            self.at += 1
            if opcode == ".":
                return self.pop()
            step = _STEPS.get(opcode)
            if step is None:
                raise damaged(f"a pickle holds the unknown instruction {opcode!r}")
            step(self)
        raise CheckpointError(f"a pickle of more than {MOST_STEPS:,} steps; {INSTEAD}")

    # Bytes.

    def take(self, count: int) -> memoryview:
        if not 0 <= count <= len(self.data) - self.at:
            raise damaged(f"a pickle claims {count:,} bytes where {max(len(self.data) - self.at, 0):,} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self, longest: int = LONGEST_LINE) -> str:
        size = 64
        while True:
            piece = bytes(self.data[self.at : self.at + min(size, longest + 1)])
            end = piece.find(b"\n")
            if end >= 0:
                self.at += end + 1
                return piece[:end].decode("latin-1")
            if len(piece) < size:
                raise damaged("a pickle holds a line without an end")
            size *= 4

    # The stack.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise damaged("a pickle takes a value where there is none")
        return self.stack.pop()

    def top(self) -> Any:
        self.push(value := self.pop())
        return value

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise damaged("a pickle ends a list that did not begin")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise damaged(f"a pickle asks for value {index}, which it did not keep")
        self.push(self.memo[index])

    # Objects.

    def name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise damaged("a pickle names something by what is no text")
        self.push(Name(module, name))

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise damaged("a pickle calls something without a tuple of arguments")
        if isinstance(function, Name):
            builtin = function.module in ("builtins", "__builtin__") and function.name in HOSTILE_BUILTINS
            if builtin or function.module.split(".")[0] in HOSTILE_MODULES:
                raise CheckpointError(f"the file wants to call {function}, which weights never need; nothing was run")
        made = Call(function, arguments)
        if function in DICTS and arguments and isinstance(arguments[0], list):  # by Python 2
            self.pairs += len(arguments[0])
            if self.pairs > MOST_STEPS:
                raise CheckpointError(f"dicts of more than {MOST_STEPS:,} pairs, many times the same; {INSTEAD}")
            made.entries = _of_pairs(arguments[0])
        self.push(made)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, Call):
            raise damaged(f"a pickle gives a state to a {type(target).__name__}")
        target.state = state

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, (list, Call)):
            raise damaged(f"a pickle appends to a {type(target).__name__}")
        (target.items if isinstance(target, Call) else target).extend(values)

    def update(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, (dict, Call)) or len(values) % 2:
            raise damaged(f"a pickle sets entries of a {type(target).__name__}")
        entries = target.entries if isinstance(target, Call) else target
        entries.update((_key(k), v) for k, v in zip(values[::2], values[1::2]))

    def refer(self, id: Any) -> None:
        self.references.append(Reference(id))
        self.push(self.references[-1])


def _key(key: Any) -> Any:
    """A key of a dict whose hash takes neither deep recursion nor long, nor is that of many others. A tuple, by which
    nobody looks anything up, becomes a key of its own."""
    if isinstance(key, (str, bytes)):
        plain = len(key) <= LONGEST_KEY
    elif isinstance(key, int):
        plain = abs(key) < 1 << 64
    else:
        plain = key is None or isinstance(key, (float, tuple, Name, Call, Reference))
    if not plain:
        raise CheckpointError(f"a pickle has a {type(key).__name__} as a key; expected short texts and numbers")
    return object() if isinstance(key, tuple) else key


def _of_pairs(pairs: list[Any]) -> dict[Any, Any]:
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise damaged("an OrderedDict is not made of pairs")
    return {_key(key): value for key, value in pairs}


def _text(data: memoryview) -> str:
    return bytes(data).decode("utf-8", "surrogatepass")


def _latin(data: memoryview) -> str:
    """A string of Python 2, which may be text or bytes; `content_of` turns it back."""
    return bytes(data).decode("latin-1")


def _quoted(text: str) -> str:
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        raise damaged("a pickle holds a string without quotes")
    return codecs.escape_decode(text[1:-1].encode("latin-1"))[0].decode("latin-1")  # type: ignore[attr-defined]


def _integer(text: str) -> int | bool:
    return {"00": False, "01": True}[text] if text in ("00", "01") else int(text)


def _long(machine: _Machine, size: int) -> int:
    if size > LONGEST_NUMBER:
        raise CheckpointError(f"a pickle holds a whole number of {size:,} bytes; weights need none of that size")
    return int.from_bytes(machine.take(size), "little", signed=True)


def _unsupported(machine: _Machine) -> None:
    raise CheckpointError(f"a pickle refers to buffers or extensions outside it; {INSTEAD}")


def _new(function: Name) -> Callable[[_Machine], None]:
    return lambda m: m.push(Call(function, ()))


SET, FROZENSET = Name("builtins", "set"), Name("builtins", "frozenset")


def _instance(machine: _Machine) -> None:
    """INST, of protocol 0: a class by name, called with what lies since the mark."""
    machine.name(machine.line(), machine.line())
    function = machine.pop()
    machine.call(function, tuple(machine.since_mark()))


def _object(machine: _Machine) -> None:
    """OBJ, of protocol 1: class and arguments lie since the mark."""
    function, *arguments = machine.since_mark() or [None]
    machine.call(function, tuple(arguments))


def _reduce(machine: _Machine) -> None:
    arguments = machine.pop()
    machine.call(machine.pop(), arguments)


def _new_with_keywords(machine: _Machine) -> None:
    machine.pop()
    _reduce(machine)


def _global_from_stack(machine: _Machine) -> None:
    name = machine.pop()
    machine.name(machine.pop(), name)


def _pop_or_mark(machine: _Machine) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.pop()


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(tuple([m.pop() for _ in range(count)][::-1]))


# By the codes that Python's pickletools lists, with its descriptions.
_STEPS: dict[str, Callable[[_Machine], Any]] = {
    # constants and numbers
    "N": lambda m: m.push(None),
    "\x88": lambda m: m.push(True),
    "\x89": lambda m: m.push(False),
    "I": lambda m: m.push(_integer(m.line(LONGEST_NUMBER))),
    "L": lambda m: m.push(int(m.line(LONGEST_NUMBER).removesuffix("L"))),
    "J": lambda m: m.push(m.number("<i")),
    "K": lambda m: m.push(m.number("<B")),
    "M": lambda m: m.push(m.number("<H")),
    "\x8a": lambda m: m.push(_long(m, m.number("<B"))),
    "\x8b": lambda m: m.push(_long(m, m.number("<I"))),
    "F": lambda m: m.push(float(m.line(LONGEST_NUMBER))),
    "G": lambda m: m.push(m.number(">d")),
    # texts and bytes
    "V": lambda m: m.push(m.line().encode("latin-1").decode("raw-unicode-escape")),
    "X": lambda m: m.push(_text(m.take(m.number("<I")))),
    "\x8c": lambda m: m.push(_text(m.take(m.number("<B")))),
    "\x8d": lambda m: m.push(_text(m.take(m.number("<Q")))),
    "S": lambda m: m.push(_quoted(m.line())),
    "U": lambda m: m.push(_latin(m.take(m.number("<B")))),
    "T": lambda m: m.push(_latin(m.take(m.number("<i")))),
    "C": lambda m: m.push(bytes(m.take(m.number("<B")))),
    "B": lambda m: m.push(bytes(m.take(m.number("<I")))),
    "\x8e": lambda m: m.push(bytes(m.take(m.number("<Q")))),
    "\x96": lambda m: m.push(bytes(m.take(m.number("<Q")))),
    # containers; sets are calls, as they are in protocols without instructions for them
    "}": lambda m: m.push({}),
    "]": lambda m: m.push([]),
    ")": lambda m: m.push(()),
    "\x8f": _new(SET),
    "d": lambda m: (values := m.since_mark(), m.push({}), m.update(values)),
    "l": lambda m: m.push(m.since_mark()),
    "t": lambda m: m.push(tuple(m.since_mark())),
    "\x85": _tuple_of(1),
    "\x86": _tuple_of(2),
    "\x87": _tuple_of(3),
    "\x91": lambda m: m.push(Call(FROZENSET, (m.since_mark(),))),
    "a": lambda m: m.append([m.pop()]),
    "e": lambda m: m.append(m.since_mark()),
    "\x90": lambda m: m.append(m.since_mark()),
    "s": lambda m: (value := m.pop(), m.update([m.pop(), value])),
    "u": lambda m: m.update(m.since_mark()),
    # the stack and the memo
    "(": lambda m: m.marks.append(len(m.stack)),
    "0": _pop_or_mark,
    "1": lambda m: m.since_mark(),
    "2": lambda m: m.push(m.top()),
    "p": lambda m: m.remember(int(m.line(LONGEST_NUMBER))),
    "q": lambda m: m.remember(m.number("<B")),
    "r": lambda m: m.remember(m.number("<I")),
    "\x94": lambda m: m.remember(len(m.memo)),
    "g": lambda m: m.recall(int(m.line(LONGEST_NUMBER))),
    "h": lambda m: m.recall(m.number("<B")),
    "j": lambda m: m.recall(m.number("<I")),
    # names and calls
    "c": lambda m: m.name(m.line(), m.line()),
    "\x93": _global_from_stack,
    "i": _instance,
    "o": _object,
    "R": _reduce,
    "\x81": _reduce,
    "\x92": _new_with_keywords,
    "b": lambda m: m.build(),
    # references
    "P": lambda m: m.refer(m.line()),
    "Q": lambda m: m.refer(m.pop()),
    "\x82": _unsupported,
    "\x83": _unsupported,
    "\x84": _unsupported,
    "\x97": _unsupported,
    "\x98": _unsupported,
    # framing
    "\x80": lambda m: m.take(1),
    "\x95": lambda m: m.take(8),
}


# What names and calls mean.


@dataclass
class Budget:
    """How many bytes tensors may take, which is a matter of how many bytes there are."""

    left: int

    def spend(self, count: int) -> None:
        """Raises CheckpointError if a file describes more than it holds."""
        self.left -= count
        if self.left < 0:
            raise CheckpointError(
                "the file describes far more numbers than it holds; it was not made by saving weights"
            )


def entries(value: Any) -> dict[Any, Any] | None:
    """The entries of a dict or of what stands for one (OrderedDict, defaultdict, ...); None for anything else."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Call):
        return None
    return value.entries if value.function in DICTS or value.entries else None


DICTS = tuple(Name(m, n) for m, n in (("collections", "OrderedDict"), ("collections", "defaultdict"),
                                      ("builtins", "dict"), ("__builtin__", "dict")))  # fmt: skip


def integers(value: Any) -> tuple[int, ...]:
    """Strides: whole numbers from 0 in a tuple, a list or a torch.Size."""
    if isinstance(value, Call) and value.function == Name("torch", "Size") and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, (tuple, list)) or len(value) > MOST_AXES:
        raise damaged(f"expected at most {MOST_AXES} sizes; got a {type(value).__name__}")
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in value):
        raise damaged("expected sizes from 0; got something else")
    return tuple(value)


def sizes_of(value: Any) -> tuple[int, ...]:
    """Sizes; of an empty tensor too they have to be such as tensors can have."""
    sizes = integers(value)
    if math.prod(max(n, 1) for n in sizes) >= 1 << 48:
        raise damaged(f"a tensor claims the sizes {sizes}")
    return sizes


ARRAYS = tuple(Name(m, "_reconstruct") for m in ("numpy.core.multiarray", "numpy._core.multiarray"))
BUFFERS = tuple(Name(m, "_frombuffer") for m in ("numpy.core.numeric", "numpy._core.numeric"))
ENCODE = Name("_codecs", "encode")
KINDS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "c8", "c16"}
PASSED = "USaMm"  # texts and dates, which files of training hold beside numbers


def array(value: Any, budget: Budget) -> Tensor | list[Any] | None:
    """A NumPy array as a tensor, or as the flat list of what an array of objects holds; None for anything else, also
    for arrays of texts and dates.

    Its sizes have to be those of the bytes that are there. Raises CheckpointError.
    """
    if not isinstance(value, Call):
        return None
    if value.function in ARRAYS and isinstance(value.state, tuple) and len(value.state) == 5:
        _, sizes, kind, fortran, content = value.state
        axes = []
    elif value.function in BUFFERS and len(value.arguments) in (4, 5):
        content, kind, sizes, order, *axes = value.arguments
        fortran = order == "F"
    else:
        return None
    sizes, code = sizes_of(sizes), _kind(kind)
    if code[0] in PASSED:
        return None
    if code == "O":
        if not isinstance(content, list) or len(content) != math.prod(sizes):
            raise damaged(f"an array of objects of sizes {sizes} does not hold as many")
        return content
    tensor = numbers(memoryview(content_of(content)), code, sizes, bool(fortran), budget)
    order = integers(axes[0]) if axes and axes[0] is not None else tuple(range(len(sizes)))
    if sorted(order) != list(range(len(sizes))):
        raise damaged(f"an array of sizes {sizes} has its axes in the order {order}")
    return tensor.permute(order)


def numbers(data: memoryview, code: str, sizes: tuple[int, ...], fortran: bool, budget: Budget) -> Tensor:
    """A tensor of its own memory from the bytes of a NumPy array. code: "<f4" and so on."""
    dtype = np.dtype(code)
    if math.prod(sizes) * dtype.itemsize != len(data):
        raise damaged(f"an array of sizes {sizes}, {dtype.itemsize} bytes each, has {len(data):,} bytes")
    budget.spend(len(data))
    flat = np.frombuffer(data, np.uint8) != 0 if dtype.kind == "b" else np.frombuffer(data, dtype)
    shaped = flat.reshape(sizes, order="F" if fortran else "C")
    return torch.from_numpy(np.array(shaped, dtype.newbyteorder("="), order="C"))


def _kind(value: Any) -> str:
    """The type string of a pickled numpy.dtype, without an order of bytes for those that are passed over."""
    known = isinstance(value, Call) and value.function == Name("numpy", "dtype") and value.arguments
    code = value.arguments[0] if known else None
    state = value.state if known and isinstance(value.state, tuple) and len(value.state) > 1 else (3, "|")
    if code in ("O", "O4", "O8"):
        return "O"
    if isinstance(code, str) and code[:1] in tuple(PASSED):
        return code
    if not isinstance(code, str) or code not in KINDS or state[1] not in ("<", ">", "|", "="):
        raise CheckpointError(f"an array of the type {str(code)[:20]!r}; expected plain numbers")
    return state[1] + code


def content_of(value: Any) -> bytes:
    """The bytes of an array or a storage, which protocols write in three ways."""
    if isinstance(value, Call) and value.function == ENCODE and value.arguments[1:] in (("latin1",), ("latin-1",)):
        value = value.arguments[0]
    if isinstance(value, str):
        try:
            return value.encode("latin-1")
        except UnicodeEncodeError as error:
            raise damaged("an array's numbers are text") from error
    if not isinstance(value, bytes):
        raise damaged(f"an array's numbers are a {type(value).__name__}")
    return value
