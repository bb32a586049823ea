"""Where the time of a network goes on a CPU: every step of every operator, timed by the engine as it walks its program.

Each operator call is walked twice, the second time as usual. What the steps do not take of the time of a call is
Python, torch's own operators between fastsr's, and the memory that they are given.
"""

from __future__ import annotations

import collections
import ctypes
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import results, timing, work
from bench.networks import CASES, build, inputs_of
from bench.peers import PEERS, Subject
from bench.results import Row
from fastsr import _cpu
from fastsr.op import watch

ROUNDS = 9
NAMES = {_cpu.COPY: "copy", _cpu.SUMS: "sums of borders", _cpu.GATE: "gate", _cpu.MEAN: "mean", _cpu.SCALE: "scale"}


@dataclass(frozen=True)
class Line:
    """Steps that are alike. label: the operator and what it does. count: in one call of the network. ms: of all of them
    together, the median. gflop, floor_gflop: of all of them together, as `bench.work` counts; 0 without arithmetic."""

    label: str
    count: int
    ms: float
    gflop: float
    floor_gflop: float


def steps_of(code: Tensor, dtype: str) -> list[tuple[str, float, float]]:
    """What a program does, step by step: a label, the work, and what known algorithms leave of it, 1e9 operations."""
    data, at, found = code.numpy().tobytes(), ctypes.sizeof(_cpu.Header), []
    while at < len(data):
        step = _cpu.Step.from_buffer_copy(data, at)
        at += ctypes.sizeof(_cpu.Step)
        if step.kind == _cpu.CONV:
            found.append(_convolution(_cpu.ConvStep.from_buffer_copy(data, at), dtype))
        else:
            found.append((NAMES[step.kind], 0.0, 0.0))
        at += step.bytes
    return found


def _convolution(step: Any, dtype: str) -> tuple[str, float, float]:
    s = step.shape
    height, width = (step.height, step.width) if s.transposed else (step.out_height, step.out_width)
    layer = work.Layer(s.cin, s.cout, s.kernel, s.stride, s.groups, bool(s.transposed), step.n * height * width)
    how = [f" / {s.stride}"] if s.stride > 1 else []
    how += [" transposed"] if s.transposed else []
    how += [f", groups {s.groups}"] if s.groups > 1 else []
    how += [f", nearest {s.upsample}"] if s.upsample > 1 else []
    how += [f", shuffle {s.shuffle}"] if s.shuffle > 1 else []
    how += [", bfloat16"] if s.bf16_products else []
    label = f"{s.kernel}x{s.kernel} {s.cin}->{s.cout}{''.join(how)} at {height}x{width}, {_cpu.FORMS[s.form]}"
    return label, work.gflop([layer]), work.floor_gflop([layer], dtype)


def measure(subject: Subject, engine: str, rounds: int = ROUNDS) -> tuple[list[Line], float]:
    """The lines of one of fastsr's engines, the longest first, and the milliseconds of a call of the network."""
    run, dtype = PEERS[engine].prepare(subject), PEERS[engine].dtype
    times: dict[tuple[str, float, float], list[float]] = collections.defaultdict(list)

    def walk(op: Any, args: Sequence[Any], plan: Any) -> None:
        if isinstance(plan.run, _cpu.Runner):
            spec = plan.results[0]
            out = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype)
            tensors, program = plan.run.tensors(out, *args)
            seconds = torch.ops.fastsr_cpu.profile(tensors, program.code)
            for (label, *amount), t in zip(steps_of(program.code, dtype), seconds, strict=True):
                times[(f"{op.name}: {label}", *amount)].append(t)

    with torch.inference_mode():
        run()
        whole = statistics.median(timing.wall(run) for _ in range(rounds))
        with watch(walk):
            for _ in range(rounds):
                run()
    lines = []
    for (label, gflop, floor), t in times.items():
        per_call = len(t) / rounds
        ms = statistics.median(t) * per_call * 1e3
        lines.append(Line(label, len(t) // rounds, ms, gflop * per_call, floor * per_call))
    return sorted(lines, key=lambda line: -line.ms), whole * 1e3


def profile(name: str, size: int | None, engine: str) -> Row:
    """A row of kind "profile": `extra` holds the milliseconds of a call and the lines, each as a list."""
    module = build(CASES[name])
    size = size or CASES[name].size
    lines, whole = measure(Subject(module, inputs_of(module, size)), engine)
    extra = {"ms": whole, "lines": [[x.label, x.count, x.ms, x.gflop, x.floor_gflop] for x in lines]}
    return results.new(results.now(), "profile", name, f"{size}x{size}", engine, extra=extra)


def lines_of(row: Row) -> list[Line]:
    """The lines of a row."""
    return [Line(*values) for values in row.extra["lines"]]
