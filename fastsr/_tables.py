"""Tables of measurements: how long each backend took for an operator's arguments, and launch configurations of kernels.

Two files can speak for a device. The user's own lies in the cache directory, is made by `fastsr tune` or
`fastsr.optimize(model, tune=True)` for the device by its name, and counts only for the versions of fastsr, torch and
triton that it was measured with. The committed one, `fastsr/tuned/<arch>.json`, is made by `python -m bench tune` and
counts for every device of its architecture. The user's is asked first, entry by entry. What neither has is left to the
rules: `fastsr._triton.advice` for backends, `default_config` of a kernel for its launch configuration.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.metadata
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1
COMMITTED = Path(__file__).with_name("tuned")


class TableError(ValueError):
    """A file of measurements that cannot be understood; the message names it."""


class Identity(NamedTuple):
    """A device to tables: its name, as "NVIDIA H200", and its architecture, as "sm90"."""

    name: str
    arch: str


@dataclass(frozen=True)
class Table:
    """One file. times: by `_triton.choice_key`, microseconds of each backend whose result was right, eager's always;
    configs: by the key of a kernel's shape, its launch configuration."""

    path: Path
    device: str
    versions: dict[str, str]
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    configs: dict[str, dict[str, int]] = field(default_factory=dict)


class Trial:
    """What is tried instead of what the tables say, by the key of a shape; and the shapes that were asked for, each
    with its kernel and the configuration that it got."""

    def __init__(self, configs: dict[str, dict[str, int]]) -> None:
        self.configs = configs
        self.asked: dict[str, tuple[Any, Any, dict[str, int]]] = {}


_trial: contextvars.ContextVar[Trial | None] = contextvars.ContextVar("fastsr_trial", default=None)


@functools.cache
def versions() -> dict[str, str]:
    """The versions that a user's measurements depend on."""
    import torch

    import fastsr

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    return {"fastsr": fastsr.__version__, "torch": torch.__version__, "triton": triton}


def cache_directory() -> Path:
    """The user's cache directory of fastsr by the XDG rules: in $XDG_CACHE_HOME where that is an absolute path, else in
    ~/.cache. A relative path for a user without a home."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path(os.path.expanduser("~/.cache"))) / "fastsr"


def users(device: Identity) -> Path:
    """The path of the user's own table of a device."""
    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return cache_directory() / "tuned" / f"{name}-{device.arch}.json"


def committed(arch: str) -> Path:
    """The path of the committed table of an architecture."""
    return COMMITTED / f"{arch}.json"


def read(path: Path) -> Table | None:
    """The table in a file; None if there is none that can be read. Raises TableError, which names the file."""
    try:
        text = path.read_bytes()
    except OSError:
        return None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise _malformed(path, f"JSON ({error})") from error
    names = {"format", *(f.name for f in fields(Table))} - {"path"}
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.keys() != names:
        raise _malformed(path, f"an object of format {FORMAT} with {', '.join(sorted(names))}")
    if not isinstance(content["device"], str) or not _is_table(content["versions"], str):
        raise _malformed(path, "a device and versions as text")
    for name, kind in (("times", (int, float)), ("configs", int)):
        entries = content[name]
        if not isinstance(entries, dict) or not all(_is_table(e, kind) for e in entries.values()):
            raise _malformed(path, f"{name} to be an object of objects of numbers")
    for key, row in content["times"].items():
        if "eager" not in row or not all(math.isfinite(t) and t > 0 for t in row.values()):
            raise _malformed(path, f"microseconds, eager's among them, at times of {key!r}; got {row}")
    del content["format"]
    return Table(path, **content)


def _malformed(path: Path, expected: str) -> TableError:
    return TableError(f"{path}: not a table of measurements: expected {expected}; delete the file or measure again")


def _is_table(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, dict) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value.values())


def write(table: Table) -> None:
    """Writes a table's file, complete or not at all, and lets dispatch know. Raises OSError."""
    content: dict[str, Any] = {"format": FORMAT, **asdict(table)}
    del content["path"]
    table.path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=table.path.parent, prefix=f".{table.path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, table.path)
    except BaseException:
        os.unlink(partial)
        raise
    forget()


def forget() -> None:
    """Lets the next call of every operator read the tables anew and choose again."""
    from fastsr.op import OPS

    tables.cache_clear()
    for op in OPS.values():
        op.forget_plans()


def stale(table: Table) -> str | None:
    """Why a user's table does not count any more, or None."""
    changed = [
        f"{name} {table.versions.get(name, 'of no version')}, this is {version}"
        for name, version in versions().items()
        if table.versions.get(name) != version
    ]
    return "measured with " + "; ".join(changed) if changed else None


@functools.cache
def tables(device: Identity) -> tuple[Table, ...]:
    """The tables that count for a device, in the order in which they are asked. Raises TableError."""
    own, shared = read(users(device)), read(committed(device.arch))
    own = None if own is None or stale(own) else own
    return tuple(t for t in (own, shared) if t is not None)


def times(device: Identity, key: str) -> tuple[dict[str, float], Path] | None:
    """The measured times of a key, and the file that has them; None if there are none."""
    return next(((t.times[key], t.path) for t in tables(device) if key in t.times), None)


def config(device: Identity, kernel: Any, shape: Any) -> dict[str, int]:
    """The launch configuration of a shape: what is being tried, else that of the tables, else `kernel.default_config`.

    kernel: a module with `default_config(shape)` and `allowed(shape)`, the values that each number may have.
    Raises TableError for a tuned configuration that the kernel does not allow.
    """
    key, trial = shape.key(), _trial.get()
    if trial is not None and key in trial.configs:
        found = trial.configs[key]
    else:
        tuned = next(((t.configs[key], t.path) for t in tables(device) if key in t.configs), None)
        found = kernel.default_config(shape) if tuned is None else tuned[0]
        if tuned is not None:
            allowed = kernel.allowed(shape)
            if found.keys() != allowed.keys() or any(found[name] not in allowed[name] for name in allowed):
                raise _malformed(tuned[1], f"at configs of {key!r} one of {allowed}; got {found}")
    if trial is not None:
        trial.asked[key] = kernel, shape, found
    return found


@contextlib.contextmanager
def trying(configs: dict[str, dict[str, int]]) -> Iterator[Trial]:
    """Inside, this thread launches kernels with these configurations."""
    trial = Trial(configs)
    token = _trial.set(trial)
    try:
        yield trial
    finally:
        _trial.reset(token)


def summary(device: Identity) -> str:
    """One line for people: what chooses between the backends of a device. It raises nothing."""
    said = []
    for path, whose in ((users(device), "your own"), (committed(device.arch), "committed")):
        try:
            table = read(path)
        except TableError as error:
            return str(error)
        why = stale(table) if table is not None and whose == "your own" else None
        if table is not None:
            count = f"{len(table.times)} {whose} measurements, {len(table.configs)} launch configurations ({path})"
            said.append(f"{whose} measurements ignored: {why}; measure again ({path})" if why else count)
    rule = "the rule of fastsr._triton.advice"
    return "; ".join([*said, f"{rule} where they say nothing" if said else f"{rule}, as nothing is measured"])
