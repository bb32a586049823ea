"""A race: one subject, several peers. Each is prepared and held to float64; then all are timed in turns."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastsr
from bench import results, timing, work
from bench.peers import PEERS, Absent, Peer, Result, Subject
from bench.results import Row

WRONG = {"f32": 1e-4, "bf16": 0.1}  # relative error from which a rival's conversion is wrong
EXCESS = {"f32": 5e-6, "bf16": 0.05}  # what fastsr may add to twice the error of torch's float32


@dataclass
class Outcomes:
    """What came of a race, by peer: a row with its times, or why there is none."""

    rows: dict[str, Row] = field(default_factory=dict)
    times: dict[str, timing.Times] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    pixels: int = 0  # of the result


def exact(subject: Subject) -> Tensor:
    """What the module computes in float64, by the operators' definitions."""
    module = copy.deepcopy(subject.module).double()
    with fastsr.use("eager"):
        return module(*(x.double() for x in subject.inputs))


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    return ((result.double() - truth).norm() / truth.norm()).item()


def psnr(result: Tensor, truth: Tensor) -> float:
    """In dB, the peak being the range of the truth."""
    error = (result.double() - truth).square().mean().item()
    peak = (truth.max() - truth.min()).item()
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def expected_error(peer: Peer, eager_error: float) -> float:
    """The most that a peer may be off, relative."""
    return 2 * eager_error + EXCESS[peer.dtype] if peer.ours else WRONG[peer.dtype]


@torch.inference_mode()
def prepare(
    subject: Subject, peers: Sequence[str], truth: Tensor | None, outcomes: Outcomes
) -> tuple[dict[str, Result], dict[str, dict[str, float]]]:
    """The runs of those that take part and their accuracy; the others' reasons go into `outcomes`. Without a truth,
    eager's result is it."""
    runs, accuracy = {}, {}
    eager_error = 0.0
    for name in peers:
        peer = PEERS[name]
        try:
            run = peer.prepare(subject)
            result = run()
        except Absent as reason:
            outcomes.absent[name] = str(reason)
            continue
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
            if not peer.ours:
                outcomes.absent[name] = f"{name} cannot run it: {text[:300]}"
            elif "rejected" in text:
                outcomes.absent[name] = text.partition(": ")[2]  # a backend's own reason
            else:
                outcomes.failed[name] = text
            continue
        result = result.clone()  # it may be a buffer of the peer's
        if truth is None:
            truth = result.double()
        if result.shape != truth.shape:
            where = outcomes.failed if peer.ours else outcomes.absent
            where[name] = f"expected a result of {list(truth.shape)}; {name} returns {list(result.shape)}"
            continue
        error = relative_error(result, truth)
        if name == "eager":
            eager_error = error
        limit = expected_error(peer, eager_error)
        if not error <= limit:
            where = outcomes.failed if peer.ours else outcomes.absent
            where[name] = f"{name}: relative error {error:.1e} against float64, at most {limit:.1e} is right"
            continue
        runs[name] = run
        accuracy[name] = {"error": error, "psnr_db": psnr(result, truth)}
        outcomes.pixels = math.prod(result.shape[-2:])
    return runs, accuracy


@torch.inference_mode()
def hold(
    kind: str,
    name: str,
    sample: str,
    make: Callable[[], Subject],
    peers: Sequence[str],
    plan: timing.Plan,
    *,
    against_float64: bool = True,
) -> Outcomes:
    """Races peers over what `make` returns. Rows hold the work of the convolutions and the accuracy, and are not yet
    written anywhere. A budget of 0 times nothing: the rows then hold the accuracy alone."""
    began, outcomes = results.now(), Outcomes()
    subject = make()
    runs, accuracy = prepare(subject, peers, exact(subject) if against_float64 else None, outcomes)
    found = work.layers(subject.module, subject.inputs)
    others = timing.Others()
    clock = timing.wall
    if subject.device.type == "cuda":
        runs, clock = {name: timing.graphed(run) for name, run in runs.items()}, timing.cuda_clock()
    if plan.budget > 0:
        outcomes.times = timing.race(runs, plan, clock)
    busy = others.processors()
    for peer in runs:
        row = results.new(
            began, kind, name, sample, peer, gflop=work.gflop(found),
            floor_gflop=work.floor_gflop(found, PEERS[peer].dtype), extra={"pixels": outcomes.pixels},
            **(accuracy[peer] if against_float64 else {}),
        )  # fmt: skip
        if peer in outcomes.times:
            times = outcomes.times[peer]
            row = dataclasses.replace(
                row, median_us=times.median * 1e6, p20_us=times.quantile(0.2) * 1e6, p80_us=times.quantile(0.8) * 1e6,
                min_us=min(times.seconds) * 1e6, rounds=len(times.seconds), others=busy,
            )  # fmt: skip
        outcomes.rows[peer] = row
    del runs, subject
    gc.collect()
    return outcomes
