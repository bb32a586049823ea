"""One way to time: contenders take turns in one process, and a machine that is busy with other things is noticed.

Each turn is a pause, an untimed call and a timed one. The pause lets the threads of the contender before fall asleep:
OpenMP workers spin for milliseconds after a parallel region, and would take a core from whoever is next. The untimed
call wakes the contender's own threads and fills the caches with its own data. The order rotates from round to round.
On a GPU the second cache is emptied before each timed call, events on the stream measure, and a contender is replayed
as a CUDA graph where it can be captured.
"""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Run = Callable[[], object]
Clock = Callable[[Run], float]

PAUSE = 0.012  # seconds
LONG = 0.5  # seconds; a call that takes longer has no untimed one before it, which could change it by some ms
SHORT = 0.002  # seconds; a shorter call is repeated until a timing lasts this long


@dataclass(frozen=True)
class Times:
    """The timed calls of one contender, seconds each, in the order in which they were made."""

    seconds: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """The q-quantile, 0..1, interpolated linearly."""
        ordered = sorted(self.seconds)
        position = q * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    @property
    def median(self) -> float:
        return self.quantile(0.5)


@dataclass(frozen=True)
class Plan:
    """How long to measure: `rounds` at least, then on until `budget` seconds are spent, `most` rounds at most."""

    rounds: int = 5
    most: int = 30
    budget: float = 30.0


def wall(run: Run) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def repeated(run: Run, count: int) -> Run:
    """`count` calls as one."""

    def many() -> None:
        for _ in range(count):
            run()

    return run if count == 1 else many


def race(
    contenders: Mapping[str, Run], plan: Plan, clock: Clock = wall, pause: Callable[[float], None] = time.sleep
) -> dict[str, Times]:
    """Times all contenders in turns, as the module's docstring says. The first call of each is a warm-up."""
    counts, last = {}, {}
    for name, run in contenders.items():
        run()
        last[name] = clock(run)
        counts[name] = max(1, int(SHORT / max(last[name], 1e-9))) if clock is wall else 1  # once: caches stay cold
    found: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    began = time.perf_counter()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for done in range(plan.most):
            if done >= plan.rounds and time.perf_counter() - began > plan.budget:
                break
            for name in order:
                pause(PAUSE)
                if last[name] < LONG:
                    contenders[name]()
                last[name] = clock(repeated(contenders[name], counts[name])) / counts[name]
                found[name].append(last[name])
            order = order[1:] + order[:1]
    finally:
        if collecting:
            gc.enable()
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}


class Others:
    """How many processors were busy with anything but this process and its children, on average, since it was made."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        try:
            line = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return 0.0, 0.0, time.monotonic()
        user, nice, system, _, _, irq, softirq, steal = (int(n) / os.sysconf("SC_CLK_TCK") for n in line)
        own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        mine = sum(u.ru_utime + u.ru_stime for u in own)
        return user + nice + system + irq + softirq + steal, mine, time.monotonic()

    def processors(self) -> float:
        """The average; 0.0 where the system does not tell."""
        busy, mine, now = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return max(0.0, (busy - mine) / now) if now > 0 else 0.0


def graphed(run: Run) -> Run:
    """`run` as the replay of a CUDA graph; `run` itself where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay


def cuda_clock() -> Clock:
    """A clock of the current CUDA device: events around one call, after the second cache was overwritten."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(2 * max(size, 2**25), dtype=torch.uint8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(run: Run) -> float:
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock
