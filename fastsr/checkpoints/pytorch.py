"""PyTorch's own files: state dicts, training checkpoints and whole pickled modules; nothing in a file is executed.

Three layouts: a zip archive (since 1.6), pickles followed by the storages (0.1.10 to 1.5), and a tar archive (before).
Each holds the object as a pickle in which storages are references; `fastsr.checkpoints.pickles` reads it, and this
file knows the few calls in it that make tensors. A module is never built: its class may be gone or hostile; what its
attributes `_parameters`, `_buffers` and `_modules` hold is its state dict.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsr.checkpoints import pickles
from fastsr.checkpoints.archive import Archive
from fastsr.checkpoints.content import Content
from fastsr.checkpoints.errors import CheckpointError, damaged, opened
from fastsr.checkpoints.pickles import Budget, Call, Name, Reference, entries

DESCRIPTION = "PyTorch's files: state dicts, checkpoints, whole modules; zip, the form before 1.6, tar, plain pickles"
ENDINGS = (".pth", ".pt", ".bin", ".pkl", ".tar")
NETWORKS = (
    "carn", "dbpn", "ddbpn", "esrgan", "memnet", "msrn", "msrn_old", "outdoor_scene_seg", "rcan", "rcan_basicsr", "rdn",
    "rdn_plain", "sftgan", "zssr",
)  # fmt: skip
SEEN = "real files; tar: not seen a real file"

MAGIC = 0x1950A86A20F9469CFC6C  # first value of the form between zip and tar
SHARING = 32  # how often a file's bytes may be in tensors: weights shared by recursion are there once
MOST_VISITS = 500_000  # of modules, their attributes and their tensors; a pickled RCAN takes 60,000
MOST_TENSORS = 100_000  # in modules, where a file may repeat them by reference
LONGEST_NAME = 1000  # characters, of a tensor in a module
DEEPEST = 100  # modules in modules
WRAPPINGS = 10  # of a tensor in a Parameter in a subclass

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()}
REBUILD = {"_rebuild_tensor": 4, "_rebuild_tensor_v2": 4, "_rebuild_tensor_v3": 7}  # arguments that have to be there
STORED = Name("torch.storage", "_load_from_bytes")  # what plain pickles have storages in: torch.save's form, as bytes
WRAPPED = ("_rebuild_parameter", "_rebuild_parameter_with_state", "Parameter", "Variable")

Resolve = Callable[[Reference], Tensor]


def matches(data: memoryview) -> bool:
    """Whether a file is one of the three layouts, or at least begins as a pickle of protocol 2 or later."""
    if data[:4] == b"PK\x03\x04":
        return any(name.endswith("/data.pkl") for name in Archive(data).members)
    return _is_tar(data) or (data[:1] == b"\x80" and len(data) > 1 and 2 <= data[1] <= 5)


def read(path: Path) -> Content:
    """The dict in the file, or the state dict of the module in it: tensors on the CPU, dicts in it as dicts, texts and
    numbers; all else is left out. What numbers a module's attributes hold are `hints`, the first of each name.

    Raises CheckpointError if the file is damaged, hostile, or holds neither.
    """
    with opened(path) as data:
        if data[:2] == b"PK":
            value, resolve = _zip(data)
        elif _is_tar(data):
            value, resolve = _tar(data)
        else:
            value, resolve = _legacy(data)
        return _Collector(resolve, len(data)).content(value)


# The three layouts: each gives the pickled object, and what to make of references.


def _zip(data: memoryview) -> tuple[Any, Resolve]:
    archive = Archive(data)
    folders = [name.removesuffix("data.pkl") for name in archive.members if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise CheckpointError(f"expected one data.pkl in PyTorch's archive; found {len(folders)}")
    folder = folders[0]
    if folder + "constants.pkl" in archive.members:
        raise CheckpointError("a TorchScript program, which is not executed; save the module's state_dict() instead")
    if folder + "byteorder" in archive.members and archive.read(folder + "byteorder") != b"little":
        raise CheckpointError("numbers in big-endian order; load and save it once where it was written")
    storages: dict[str, Tensor] = {}

    def resolve(reference: Reference) -> Tensor:
        dtype, key, count = _storage_id(reference.id)
        name = f"{folder}data/{key}"
        if name not in archive.members:
            raise damaged(f"the archive does not hold the storage {key[:50]!r}")
        if name not in storages:
            storages[name] = _storage(archive.read(name), dtype)
        return _of(storages[name], dtype, count)

    return pickles.load(archive.read(folder + "data.pkl")).value, resolve


def _legacy(data: memoryview) -> tuple[Any, Resolve]:
    """Pickles of a magic number, a version, facts of the writing machine, the object and the keys of the storages; then
    each storage as a count and its numbers. Or one pickle of the object, by pickle.dump."""
    magic = pickles.load(data)
    if magic.value != MAGIC:
        return magic.value, _nowhere  # by pickle.dump
    version = pickles.load(data, magic.end)
    facts = pickles.load(data, version.end)
    if version.value != 1001 or (entries(facts.value) or {}).get("little_endian") is not True:
        raise CheckpointError("a version or a byte order of torch.save that is not known; load and save it once")
    loaded = pickles.load(data, facts.end)
    keys = pickles.load(data, loaded.end)
    if not isinstance(keys.value, list):
        raise damaged("the list of storages is missing")
    types = {}
    for reference in loaded.references:
        if not isinstance(reference.id, tuple) or reference.id[:1] != ("module",):  # a class, with its source
            dtype, key, _ = _storage_id(reference.id)
            types[key] = dtype
    storages, at = {}, keys.end
    for key in keys.value:
        if not isinstance(key, str) or key not in types:
            raise damaged("a storage that nothing refers to")
        content, at = _counted(data, at, types[key])
        storages[key] = _storage(content, types[key])

    def resolve(reference: Reference) -> Tensor:
        dtype, key, count = _storage_id(reference.id)
        if key not in storages:
            raise damaged(f"the file does not hold the storage {key[:50]!r}")
        view = reference.id[5] if len(reference.id) > 5 else None
        if view is None:
            return _of(storages[key], dtype, count)
        if not isinstance(view, tuple) or len(view) != 3:
            raise damaged("a view of a storage is not described by three values")
        return _part(storages[key], view[1], view[2])

    return loaded.value, resolve


def _nowhere(reference: Reference) -> Tensor:
    raise damaged("a plain pickle refers to storages, which are not there")


def _is_tar(data: memoryview) -> bool:
    return data[257:262] == b"ustar"


def _tar(data: memoryview) -> tuple[Any, Resolve]:
    """`storages`, `tensors` and `pickle` in a tar archive. The first two are pickled counts, followed by so many
    entries of a pickle and raw numbers; the third refers to storages and tensors by their keys."""
    files = _tar_members(data)
    missing = [name for name in ("storages", "tensors", "pickle") if name not in files]
    if missing:
        raise damaged(f"expected {', '.join(missing)} in PyTorch's tar archive")
    found: dict[Any, Tensor] = {}

    body = files["storages"]
    count = pickles.load(body)
    at = count.end
    for _ in range(_count(count.value, body)):
        entry = pickles.load(body, at)
        key, _, type_name = _parts(entry.value, 3)
        dtype = _dtype(type_name)
        content, at = _counted(body, entry.end, dtype)
        found[_tar_key(key)] = _storage(content, dtype)
    for view in _list(pickles.load(body, at).value):
        key, root, first, size = _parts(view, 4)
        found[_tar_key(key)] = _part(_found(found, root), first, size)

    body = files["tensors"]
    count = pickles.load(body)
    at, budget = count.end, Budget(SHARING * len(data))
    for _ in range(_count(count.value, body)):
        entry = pickles.load(body, at)
        key, root, _ = _parts(entry.value, 3)
        axes = _unpack(body, entry.end, "<i")[0]
        if not 0 <= axes <= pickles.MOST_AXES:
            raise damaged(f"a tensor of {axes} axes")
        at = entry.end + 8  # the number of axes once took eight bytes
        shape = _unpack(body, at, f"<{2 * axes + 1}q")
        at += 8 * len(shape)
        found[_tar_key(key)] = _view(_found(found, root), shape[-1], shape[:axes], shape[axes:-1], budget)

    return pickles.load(files["pickle"]).value, lambda reference: _found(found, reference.id)


def _tar_members(data: memoryview) -> dict[str, memoryview]:
    """Plain files in a tar archive, by their names without `./`."""
    members, at = {}, 0
    while at + 512 <= len(data) and data[at]:
        name = bytes(data[at : at + 100]).split(b"\0")[0].decode("latin-1").removeprefix("./")
        digits = bytes(data[at + 124 : at + 136]).strip(b"\0 ")
        if not digits.isdigit() or set(digits) - set(b"01234567"):
            raise damaged("a member of the tar archive has no size")
        size = int(digits, 8)
        if size > len(data) - at - 512:
            raise damaged(f"{name!r} in the tar archive claims {size:,} bytes, which are not there")
        if data[at + 156] in b"0\0":
            members[name] = data[at + 512 : at + 512 + size]
        at += 512 + (size + 511) // 512 * 512
    return members


def _tar_key(key: Any) -> str:
    if not isinstance(key, (int, str)):
        raise damaged(f"a {type(key).__name__} as the key of a storage or tensor")
    return str(key)


def _found(found: dict[Any, Tensor], key: Any) -> Tensor:
    if _tar_key(key) not in found:
        raise damaged(f"the file does not hold {str(key)[:50]!r}")
    return found[_tar_key(key)]


def _parts(value: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) != count:
        raise damaged(f"expected {count} values that describe a storage or tensor")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise damaged("expected the list of views of storages")
    return value


def _count(value: Any, body: memoryview) -> int:
    if not isinstance(value, int) or not 0 <= value <= len(body):
        raise damaged("expected the number of storages or tensors")
    return value


# Storages and tensors.


def _unpack(data: memoryview, at: int, form: str) -> tuple[int, ...]:
    if struct.calcsize(form) > len(data) - at:
        raise damaged("the file ends in the middle of a storage or tensor")
    return struct.unpack_from(form, data, at)


def _counted(data: memoryview, at: int, dtype: torch.dtype) -> tuple[memoryview, int]:
    """The bytes of a storage that begins with its count, and the position behind it."""
    count = _unpack(data, at, "<q")[0]
    size, at = count * dtype.itemsize, at + 8
    if not 0 <= size <= len(data) - at:
        raise damaged(f"a storage claims {count:,} numbers where {max(len(data) - at, 0):,} bytes are left")
    return data[at : at + size], at + size


def _storage(content: memoryview, dtype: torch.dtype) -> Tensor:
    """A flat tensor of a storage's numbers, in memory of its own."""
    whole = content[: len(content) // dtype.itemsize * dtype.itemsize]
    if not whole:
        return torch.empty(0, dtype=dtype)
    flat = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
    return flat != 0 if dtype == torch.bool else flat.view(dtype)


def _storage_id(id: Any) -> tuple[torch.dtype, str, int]:
    """(dtype, key, count) of a reference to a storage: ("storage", type, key, device, count, ...)."""
    if isinstance(id, str):
        raise CheckpointError("pickle protocol 0, from which torch itself cannot read; save with the default protocol")
    if not isinstance(id, tuple) or len(id) < 5 or id[0] != "storage":
        raise damaged("a reference to something else than a storage")
    _, type_name, key, _, count = id[:5]
    if not isinstance(key, (str, int)) or not isinstance(count, int):
        raise damaged("a reference to a storage without key and size")
    return _dtype(type_name), str(key), count


def _dtype(type_name: Any) -> torch.dtype:
    known = isinstance(type_name, Name) and type_name.module.split(".")[0] == "torch" and type_name.name in STORAGES
    if not known:
        raise CheckpointError(f"a storage of the type {str(type_name)[:100]!r}; expected plain numbers")
    return STORAGES[type_name.name]


def _of(storage: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """The storage, if it is what a reference claims it is."""
    if storage.dtype != dtype or not 0 <= count <= len(storage):
        raise damaged(f"a storage has {len(storage):,} numbers ({storage.dtype}) instead of {count:,} ({dtype})")
    return storage


def _part(storage: Tensor, first: Any, count: Any) -> Tensor:
    if not (isinstance(first, int) and isinstance(count, int) and 0 <= first <= first + count <= len(storage)):
        raise damaged("a view of a storage reaches beyond it")
    return storage[first : first + count]


def _view(storage: Tensor, first: Any, sizes: Any, strides: Any, budget: Budget) -> Tensor:
    """A tensor on a storage. What it claims has to lie inside, and may be there several times, within the budget."""
    sizes, strides = pickles.sizes_of(sizes), pickles.integers(strides)
    if len(sizes) != len(strides) or not isinstance(first, int) or first < 0:
        raise damaged(f"a tensor of sizes {sizes} has the strides {strides} and begins at {str(first)[:20]}")
    count = math.prod(sizes)
    last = first + sum((size - 1) * stride for size, stride in zip(sizes, strides))
    if count and last >= len(storage):
        raise damaged(f"a tensor of sizes {sizes} does not fit into its storage of {len(storage):,} numbers")
    budget.spend(count * storage.element_size())
    if not count:
        return torch.empty(sizes, dtype=storage.dtype)
    return storage.as_strided(sizes, strides, storage.storage_offset() + first)


# From the object to a state dict.


class _Collector:
    """Makes dicts of tensors of what a pickle holds. `size`: bytes of the file."""

    def __init__(self, resolve: Resolve, size: int) -> None:
        self.resolve, self.budget, self.visits = resolve, Budget(SHARING * size), 0
        self.arrays = Budget(size)
        self.tensors = 0
        self.stored: dict[int, Tensor] = {}
        self.made: dict[int, Any] = {}
        self.hints: dict[str, Any] = {}

    def content(self, value: Any) -> Content:
        value = self.unwrapped(value)
        content, made = Content(), self.value(value, 0)
        if not isinstance(made, dict):
            raise CheckpointError(
                f"expected a dict of tensors or a module; the file holds {_kind(value)}. "
                "Save the module's state_dict() instead"
            )
        content.update(made)
        content.hints.update(self.hints)
        return content

    def visit(self, depth: int, count: int = 1) -> None:
        self.visits += count
        if self.visits > MOST_VISITS or depth > DEEPEST:
            raise CheckpointError(
                f"more than {MOST_VISITS:,} attributes of modules, or {DEEPEST} modules in each other"
            )

    def unwrapped(self, value: Any) -> Any:
        """The tensor in a Parameter, the object behind a reference."""
        for _ in range(WRAPPINGS):
            if isinstance(value, Reference):
                value = self.resolve(value)
            elif isinstance(value, Call) and isinstance(value.function, Name) and value.arguments:
                if value.function.name == "_rebuild_from_type_v2" and len(value.arguments) == 4:
                    function, _, arguments, _ = value.arguments
                    value = Call(function, arguments if isinstance(arguments, tuple) else ())
                elif value.function == STORED:
                    return self.storage(value.arguments[0])
                elif value.function.module.startswith("torch.") and value.function.name in WRAPPED:
                    value = value.arguments[0]
                else:
                    return value
            else:
                return value
        return value

    def storage(self, content: Any) -> Tensor:
        """The storage in bytes that torch.save wrote."""
        if id(content) not in self.stored:
            written = pickles.content_of(content)
            self.arrays.spend(len(written))
            loaded, resolve = _legacy(memoryview(written))
            if not isinstance(loaded, Reference):
                raise damaged("a storage in a plain pickle is something else")
            self.stored[id(content)] = resolve(loaded)
        return self.stored[id(content)]

    def tensor(self, value: Any) -> Tensor | None:
        """The tensor that a value stands for, if it does."""
        value = self.unwrapped(value)
        if isinstance(value, Tensor):
            return value
        array = pickles.array(value, self.arrays)
        if isinstance(array, Tensor):
            return array
        if not isinstance(value, Call) or not isinstance(value.function, Name):
            return None
        name = value.function
        if name.module != "torch._utils" or not name.name.startswith("_rebuild_"):
            return None
        if len(value.arguments) < REBUILD.get(name.name, math.inf):
            raise CheckpointError(
                f"a tensor made by {name} (sparse, quantized or of another special kind); "
                "expected plain ones: save a dense state_dict()"
            )
        storage, first, sizes, strides, *rest = value.arguments
        storage = self.unwrapped(storage)
        if not isinstance(storage, Tensor):
            raise damaged("a tensor without a storage")
        if name.name == "_rebuild_tensor_v3":
            storage = _retyped(storage, rest[2])
        return _view(storage, first, sizes, strides, self.budget)

    def value(self, value: Any, depth: int) -> Any:
        """A tensor, a dict, a text or a number; None for anything else."""
        self.visit(depth)
        if value is None or isinstance(value, (str, int, float)):
            return value
        if id(value) in self.made:
            made = self.made[id(value)]
            if made is self:
                raise damaged("a dict that holds itself")
            return made
        self.made[id(value)] = self  # while it is being made
        made = self.tensor(value)
        if made is None and _is_module(value):
            made = {}
            self.module(value, "", made, depth)
        if made is None and (pairs := entries(value)) is not None:
            made = {k: self.value(v, depth + 1) for k, v in pairs.items() if isinstance(k, str)}
        self.made[id(value)] = made
        return made

    def module(self, module: Call, prefix: str, state: dict[str, Any], depth: int) -> None:
        """Adds the tensors of a module and of those in it to a state dict, in torch's order."""
        self.visit(depth)
        attributes = _attributes(module)
        self.hint(attributes)
        for attribute in attributes.values():  # an object of options, as `args` or `config`
            if not _is_module(attribute):
                self.hint(_attributes(attribute))
        members = _members(attributes.get("_non_persistent_buffers_set"))
        self.visit(depth, len(members))
        passing = {member for member in members if isinstance(member, str)}
        parts = [entries(attributes.get(part)) or {} for part in ("_parameters", "_buffers", "_modules")]
        parameters, buffers, modules = parts
        self.visit(depth, sum(map(len, parts)))
        for name, value in (parameters | {n: v for n, v in buffers.items() if n not in passing}).items():
            tensor = self.tensor(value)
            if tensor is not None:
                self.tensors += 1
                if self.tensors > MOST_TENSORS or len(prefix) + len(str(name)) > LONGEST_NAME:
                    raise CheckpointError(
                        f"more than {MOST_TENSORS:,} tensors, or a name of more than {LONGEST_NAME:,} characters"
                    )
                state[f"{prefix}{name}"] = tensor
        for name, child in modules.items():
            child = self.unwrapped(child)
            if _is_module(child):
                self.module(child, f"{prefix}{name}.", state, depth + 1)

    def hint(self, attributes: dict[Any, Any]) -> None:
        """Keeps numbers, truth values and short tuples of numbers among attributes, unless their name is known."""
        self.visit(0, len(attributes))
        for name, value in attributes.items():
            parts = value if isinstance(value, tuple) and 0 < len(value) <= 4 else (value,)
            plain = all(isinstance(part, (int, float)) for part in parts)
            if plain and isinstance(name, str) and not name.startswith("_"):
                self.hints.setdefault(name, value)


def _retyped(storage: Tensor, dtype: Any) -> Tensor:
    """The numbers of an untyped storage."""
    if not isinstance(dtype, Name) or dtype.module != "torch" or dtype.name not in DTYPES:
        raise CheckpointError(f"a tensor of the type {str(dtype)[:100]!r}; expected one of {', '.join(DTYPES)}")
    wanted = DTYPES[dtype.name]
    return storage[: len(storage) // wanted.itemsize * wanted.itemsize].view(wanted)


def _attributes(value: Any) -> dict[Any, Any]:
    """The attributes an object would have been given."""
    state = value.state if isinstance(value, Call) else None
    if isinstance(state, tuple) and state:  # attributes, and values of slots
        state = state[0]
    return entries(state) or {}


def _is_module(value: Any) -> bool:
    attributes = _attributes(value)
    return "_parameters" in attributes and "_modules" in attributes


def _members(value: Any) -> list[Any]:
    """What is in a set."""
    if not isinstance(value, Call):
        return []
    listed = value.arguments[0] if value.arguments and isinstance(value.arguments[0], list) else []
    return [*listed, *value.items]


def _kind(value: Any) -> str:
    return f"an object of {value}, which is not executed" if isinstance(value, Call) else f"a {type(value).__name__}"
