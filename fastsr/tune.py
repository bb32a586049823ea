"""Measures which backend and which launch configurations are fastest on a GPU, for the operator calls of a network.

    model = fastsr.optimize(model.cuda(), tune=True)     # during the first call, with what it is given
    $ fastsr tune WEIGHTS --size 720x1280                # for the shapes of one size of image
    $ python -m bench tune                               # the table of an architecture, to be committed

`tune` runs a network and stops at each operator call that is unlike those before (`_triton.choice_key`): every backend
that can compute it computes it, eager among them, and its result is compared with the definition in float64. Of those
that are right, the times are kept, and dispatch takes the fastest from then on. In the time that is left, Triton's
launch configurations are improved one number at a time, operators that take longest getting most of it.

What was found goes into one file (`_tables`), written when all is done, complete or not at all.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsr import _tables, _triton, progress
from fastsr._tables import Table
from fastsr.op import Op, _replace, _tensors, use, watch

Run = Callable[[], object]
Clock = Callable[[Run], float]
Show = Callable[[float, str], None]

SECONDS = 60.0
TURN = 0.2  # seconds that one contender is timed for, within the limits of ROUNDS
ROUNDS = (3, 30)
BETTER = 0.98  # of the best time: what is not faster than that may be chance

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float32: 2e-5}
"""The largest error over the root mean square of the result that is right, beside twice that of eager's."""
TF32_TOLERANCE = 4e-3


@dataclass
class Found:
    """What `tune` did. measured: operator calls whose times were taken; improved: launch configurations that are better
    than before; left: calls for which there was no time; rejected: contenders that failed or were wrong, each with its
    reason."""

    path: Path
    measured: int = 0
    improved: int = 0
    left: int = 0
    rejected: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        done = f"{self.measured} operator calls measured, {self.improved} launch configurations improved"
        return f"{done}, {self.left} calls left for lack of time ({self.path})"


class Wrong(Exception):
    """A result that is not right."""


def cuda_clock(device: torch.device) -> Clock:
    """A clock of a CUDA device, in seconds: events around one call, after the second cache was overwritten.

    Raises ValueError for another device.
    """
    if device.type != "cuda":
        raise ValueError(
            f"tuning chooses between kernels of a GPU; on {device} there is nothing to choose, so leave it out"
        )
    size = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * max(size, 2**25), dtype=torch.uint8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(run: Run) -> float:
        with torch.cuda.device(device):
            flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock


def tune(
    run: Run,
    device: torch.device,
    *,
    seconds: float = SECONDS,
    again: bool = True,
    path: Path | None = None,
    clock: Clock | None = None,
    now: Callable[[], float] = time.monotonic,
    show: Show | None = None,
) -> Found:
    """Measures the operator calls that `run()` makes on `device`, and writes the user's table of it.

    seconds: after so long nothing new is begun; what was begun, a kernel's compilation say, is finished. again=False
    leaves out calls that the table has. path: of another table, to which is added what is measured here; a table made
    with other versions is replaced. clock: seconds that a call takes; by default by CUDA events. show: is told the
    share that is done, in words too; by default a bar is drawn where stderr is a terminal.

    `run` is called several times and must make the same calls each time. Raises ValueError without a CUDA device,
    TableError (a ValueError) for a table that cannot be understood, and OSError where it cannot be written.
    """
    clock = cuda_clock(device) if clock is None else clock
    identity = _triton.identity(device)
    path = _tables.users(identity) if path is None else path
    known = set() if again else set(_saved(path).times)
    if not path.is_absolute():
        raise OSError(
            "tune: no place to remember what is measured: the user has no home; set XDG_CACHE_HOME to a folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)  # an error now, not after a minute
    bar = show is None and sys.stderr.isatty()
    show = (progress.draw if bar else lambda share, words: None) if show is None else show
    try:
        with torch.no_grad():
            tuner = _Tuner(run, Found(path), known, seconds, clock, now, show)
            found = tuner.tune()
    finally:
        if bar:
            progress.clear()
    if found.measured:
        before = _saved(path)  # again: another process may have written it meanwhile
        times, configs = before.times | tuner.times, before.configs | tuner.configs
        _tables.write(Table(path, identity.name, _tables.versions(), times, configs))
    return found


def _saved(path: Path) -> Table:
    """The table in a file, empty if there is none or it was measured with other versions."""
    found = _tables.read(path)
    return Table(path, "", {}) if found is None or _tables.stale(found) else found


@dataclass
class _Case:
    """An operator call among those like it. weight: seconds that all of them took with the fastest backend."""

    op: str
    count: int = 0
    weight: float = 0.0


class _Tuner:
    def __init__(
        self, run: Run, found: Found, known: set[str], seconds: float, clock: Clock, now: Callable[[], float],
        show: Show,
    ) -> None:  # fmt: skip
        self.run, self.found, self.known, self.clock, self.now, self.show = run, found, known, clock, now, show
        self.start, self.seconds = now(), seconds
        self.times: dict[str, dict[str, float]] = {}
        self.configs: dict[str, dict[str, int]] = {}  # that were found better
        self.searched: set[str] = set()  # keys of shapes

    def tune(self) -> Found:
        cases: dict[str, _Case] = {}

        def count(key: str, op: Op, args: tuple[Any, ...]) -> None:
            cases.setdefault(key, _Case(op.name)).count += 1

        self._visit(count)
        todo = {k: case for k, case in cases.items() if k not in self.known}
        if not todo:
            return self.found
        left = dict(todo)

        def backends(key: str, op: Op, args: tuple[Any, ...]) -> None:
            if key in left and not self._late():
                self._say(f"{len(todo) - len(left)} of {len(todo)}: {op.name}")
                row = self._backends(op, args)
                if row:
                    todo[key].weight = todo[key].count * min(row.values())
                    self.times[key] = row
                    self.found.measured += 1
                del left[key]

        self._visit(backends)
        self.found.left = len(left)
        left = {k: case for k, case in todo.items() if k not in left and "triton" in self.times.get(k, {})}

        def launches(key: str, op: Op, args: tuple[Any, ...]) -> None:
            if key in left and not self._late():
                self._say(f"launch configurations: {op.name}")
                share = left[key].weight / sum(case.weight for case in left.values())
                del left[key]
                self._launches(key, op, args, self.now() + share * (self.start + self.seconds - self.now()))

        if left and not self._late():
            self._visit(launches)
        self.found.improved = len(self.configs)
        return self.found

    def _visit(self, tell: Callable[[str, Op, tuple[Any, ...]], None]) -> None:
        """Runs the network by eager definitions, as what is to be measured may fail; `tell(key, op, args)` is told of
        each operator call that has backends to choose from."""

        def watcher(op: Op, args: tuple[Any, ...], plan: Any) -> None:
            with watch(None):
                if self._able(op, args):
                    tell(_triton.choice_key(op, args), op, args)

        with watch(watcher), use("eager"):
            self.run()

    def _able(self, op: Op, args: tuple[Any, ...]) -> list[str]:
        reasons = op.reasons(*args)
        return [name for name in ("triton", "cuda") if reasons[name] is None]

    def _late(self) -> bool:
        return self.now() >= self.start + self.seconds

    def _say(self, words: str) -> None:
        self.show((self.now() - self.start) / self.seconds, words)

    def _backends(self, op: Op, args: tuple[Any, ...]) -> dict[str, float]:
        """Microseconds of each backend that is right; nothing where that cannot be told."""
        try:
            judge = _Judge(op, args)
        except torch.OutOfMemoryError:
            self.found.rejected.append(f"{op.name}: not enough memory for the definition in float64")
            return {}
        contenders = {"eager": _call(op, args, "eager")}
        for name in self._able(op, args):
            contender = _call(op, args, name)
            if self._right(f"{op.name} by {name}", judge, contender):
                contenders[name] = contender
        return {name: seconds * 1e6 for name, seconds in self._race(contenders).items()}

    def _launches(self, key: str, op: Op, args: tuple[Any, ...], end: float) -> None:
        """Improves the launch configurations of an operator call, and takes Triton's time again if one has changed."""
        run = _call(op, args, "triton")
        with _tables.trying(self.configs) as trial:
            run()
        asked = trial.asked
        judge: _Judge | None = None
        for name, (kernel, shape, config) in asked.items():
            if name in self.searched:
                continue
            self.searched.add(name)
            judge = _Judge(op, args) if judge is None else judge
            best, least = config, self._timed(run, {})
            who, values, tried = f"{op.name} by triton", kernel.allowed(shape), [config]
            while (better := self._neighbour(who, name, values, best, least, tried, judge, run, end)) is not None:
                best, least = better
            if best != config:
                self.configs[name] = best
        if any(name in self.configs for name in asked):
            judge = _Judge(op, args) if judge is None else judge
            with _tables.trying(self.configs):
                if self._right(f"{op.name} by triton as tuned", judge, run):
                    self.times[key] |= {n: 1e6 * t for n, t in self._race({"triton": run}).items()}
                else:
                    del self.times[key]["triton"]

    def _neighbour(
        self, who: str, name: str, values: dict[str, tuple[int, ...]], best: dict[str, int], least: float,
        tried: list[dict[str, int]], judge: _Judge, run: Run, end: float,
    ) -> tuple[dict[str, int], float] | None:  # fmt: skip
        """The first configuration that differs from `best` in one number, is right and faster; None if none is, or time
        is up."""
        for parameter, allowed in values.items():
            for value in allowed:
                config = best | {parameter: value}
                if config in tried:
                    continue
                if self.now() >= end:
                    return None
                tried.append(config)
                with _tables.trying(self.configs | {name: config}):
                    if not self._right(f"{who}, {name} as {config}", judge, run):
                        continue
                seconds = self._timed(run, {name: config})
                if seconds < BETTER * least:
                    return config, seconds
        return None

    def _timed(self, run: Run, config: dict[str, dict[str, int]]) -> float:
        with _tables.trying(self.configs | config):
            return self._race({"": run})[""]

    def _right(self, who: str, judge: _Judge, run: Callable[[], Any]) -> bool:
        """Whether a contender computes the right result; if not, that is noted."""
        try:
            judge(run())
        except Exception as error:  # whatever a compiler or a driver raises
            first = str(error).strip().partition("\n")[0]
            self.found.rejected.append(f"{who}: {first or type(error).__name__}")
            return False
        return True

    def _race(self, contenders: dict[str, Run]) -> dict[str, float]:
        """The median of the seconds of each, timed in turns. All have run before."""
        times = {name: [self.clock(run)] for name, run in contenders.items()}
        longest = max(t for [t] in times.values())
        for _ in range(min(max(int(TURN / max(longest, 1e-9)), ROUNDS[0]), ROUNDS[1]) - 1):
            for name, run in contenders.items():
                times[name].append(self.clock(run))
        return {name: statistics.median(seconds) for name, seconds in times.items()}


def _call(op: Op, args: tuple[Any, ...], backend: str) -> Callable[[], Any]:
    def call() -> Any:
        with use(backend):
            return op.default(*args)

    return call


class _Judge:
    """Knows the result of an operator call in float64, and how far eager's is from it."""

    def __init__(self, op: Op, args: tuple[Any, ...]) -> None:
        first = _tensors(args)[0]
        self.exact = _results(op.eager(*_replace(args, [t.double() for t in _tensors(args)])))
        tolerance = TOLERANCE[first.dtype] if _triton.precision(first) == "ieee" else TF32_TOLERANCE
        self.bounds = [2 * error + tolerance for error in self._errors(_results(op.eager(*args)))]

    def __call__(self, made: Any) -> None:
        """Raises Wrong."""
        for error, bound in zip(self._errors(_results(made)), self.bounds, strict=True):
            if not error <= bound:  # NaN is not
                raise Wrong(f"wrong by {error:.1e}, at most {bound:.1e} is right")

    def _errors(self, made: tuple[Tensor, ...]) -> list[float]:
        """The largest error over the root mean square of what is right."""
        return [
            float((m.double() - e).abs().max() / e.square().mean().sqrt().clamp(min=1e-30))
            for m, e in zip(made, self.exact, strict=True)
        ]


def _results(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
