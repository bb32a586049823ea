"""The goals, as data, and what the results say of each. Nothing here measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.networks import CASES
from bench.peers import OURS, PEERS
from bench.results import Row

PATCH = "48x48"
OWN = {"f32": "fastsr-f32", "bf16": "fastsr-bf16"}
SMALLER = ("rdn", "esrgan")  # where memory is to be at most SHARE of eager's
SHARE = 0.6

Key = tuple[str, str]
"""A network and a sample."""


class Table:
    """Rows of whole networks at one number of threads, by network and sample, then by engine."""

    def __init__(self, rows: Sequence[Row], threads: int | None = None) -> None:
        timed = [r for r in rows if r.kind == "network" and r.median_us is not None]
        self.threads = max((r.threads for r in timed), default=0) if threads is None else threads
        self.rows: dict[Key, dict[str, Row]] = {}
        for row in timed:
            if row.threads == self.threads:
                self.rows.setdefault((row.name, row.sample), {})[row.engine] = row

    def full(self, name: str) -> Key:
        """The key of a network at the size of its goals."""
        return name, f"{CASES[name].size}x{CASES[name].size}"

    def rivals(self, key: Key, dtype: str) -> dict[str, Row]:
        """Who else computed it in that dtype."""
        others = self.rows.get(key, {})
        return {n: r for n, r in others.items() if not PEERS[n].ours and PEERS[n].dtype == dtype}

    def best(self, key: Key, dtype: str) -> Row | None:
        """The fastest of the rivals."""
        return min(self.rivals(key, dtype).values(), key=time_of, default=None)

    def speedup(self, key: Key, dtype: str, rival: str | None = None) -> float | None:
        """fastsr's speed over a rival's, by default the fastest of that dtype; None where one is missing."""
        ours = self.rows.get(key, {}).get(OWN[dtype])
        theirs = self.best(key, dtype) if rival is None else self.rows.get(key, {}).get(rival)
        return None if ours is None or theirs is None else time_of(theirs) / time_of(ours)


def time_of(row: Row) -> float:
    """The median, in µs, of a row that was timed."""
    assert row.median_us is not None
    return row.median_us


def mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean of what is there; None of nothing."""
    found = [v for v in values if v is not None]
    return math.exp(sum(map(math.log, found)) / len(found)) if found else None


@dataclass(frozen=True)
class Verdict:
    """A goal and what was measured: text as it stands in the report; met is None where nothing was measured."""

    goal: str
    wanted: str
    measured: str
    met: bool | None


def _at_least(goal: str, wanted: float, found: float | None, note: str = "") -> Verdict:
    met = None if found is None else found >= wanted
    return Verdict(goal, f"{wanted:.2f}x", "not measured" if found is None else f"{found:.2f}x{note}", met)


CARN = 3.0  # over OpenVINO in float32
FLOAT = {
    "rcan": 2.6, "esrgan": 2.6, "rdn": 2.6, "enhancenet": 2.6, "srfeat": 2.6, "memnet": 2.6, "msrn": 2.8, "sftgan": 2.3,
    "carn_m": 2.2, "dbpn": 2.0, "idn": 2.0, "zssr": 2.0,
}  # fmt: skip
"""Speed-ups over the fastest float32 rival; CARN's goals name their rivals."""

BF16 = {"carn": 2.4, "msrn": 1.9, "dbpn": 1.45}
"""Speed-ups over OpenVINO in bfloat16."""


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every goal, in the order in which they are stated."""
    table = Table(rows)
    return [*_speeds(table), *_accuracy(table), *_memory(rows), _slower(rows)]


def _speeds(table: Table) -> list[Verdict]:
    carn = table.full("carn")
    found = [
        _at_least("fp32 CARN over OpenVINO f32", CARN, table.speedup(carn, "f32", "openvino-f32"), " (floor 2.70x)"),
        _at_least("fp32 CARN over eager", 4.5, table.speedup(carn, "f32", "eager")),
    ]
    for name, wanted in FLOAT.items():
        key = table.full(name)
        best = table.best(key, "f32")
        note = "" if best is None else f" ({best.engine})"
        found.append(_at_least(f"fp32 {name} over the best rival", wanted, table.speedup(key, "f32"), note))

    def over_all(keys: Callable[[str], Key], dtype: str) -> tuple[float | None, str]:
        measured = [table.speedup(keys(name), dtype) for name in CASES]
        return mean(measured), f" (of {len(measured) - measured.count(None)} networks)"

    found.append(_at_least("fp32 geometric mean over the best rivals", 2.4, *over_all(table.full, "f32")))
    for name, wanted in BF16.items():
        measured = table.speedup(table.full(name), "bf16", "openvino-bf16")
        found.append(_at_least(f"bf16 {name} over OpenVINO bf16", wanted, measured))
    found.append(_at_least("bf16 geometric mean over the best rivals", 2.0, *over_all(table.full, "bf16")))
    for dtype, text in (("f32", "fp32"), ("bf16", "bf16")):
        measured = over_all(lambda name: (name, PATCH), dtype)
        found.append(_at_least(f"{text} at 48x48, geometric mean over the best rivals", 2.0, *measured))
    return found


def _accuracy(table: Table) -> list[Verdict]:
    worse, compared = [], 0
    for name in CASES:
        at = table.rows.get(table.full(name), {})
        ours, theirs = (at[n].psnr_db if n in at else None for n in ("fastsr-bf16", "autocast-bf16"))
        if ours is not None and theirs is not None:
            compared += 1
            if ours < theirs:
                worse.append(f"{name} {ours:.1f} < {theirs:.1f} dB")
    text = "; ".join(worse) or f"on none of {compared} networks" if compared else "not measured"
    goal = "bf16 PSNR against float64 below autocast's"
    return [Verdict(goal, "on no network", text, not worse if compared else None)]


def working_memory(row: Row) -> int:
    """Bytes of activations, workspace and output of a row of memory: all that a call takes or leaves behind, without
    packed weights."""
    return row.extra["call"] + row.extra["kept"] - row.extra["packed"]


def memory_shares(rows: Sequence[Row]) -> dict[tuple[str, str, str], float]:
    """Working memory over eager's, by network, sample and engine of fastsr's."""
    at = {(r.name, r.sample, r.engine): r for r in rows if r.kind == "memory"}
    return {
        (name, sample, engine): working_memory(row) / working_memory(at[name, sample, "eager"])
        for (name, sample, engine), row in at.items()
        if PEERS[engine].ours and (name, sample, "eager") in at
    }


def _memory(rows: Sequence[Row]) -> list[Verdict]:
    shares = memory_shares(rows)
    found = []
    for goal, limit, chosen in (
        ("memory over eager's", 1.0, shares),
        (f"memory over eager's, {' and '.join(SMALLER)}", SHARE, {k: v for k, v in shares.items() if k[0] in SMALLER}),
    ):
        most = max(chosen, key=lambda k: chosen[k], default=None)
        text = "not measured" if most is None else f"{chosen[most]:.0%} at most ({most[0]} {most[1]}, {most[2]})"
        found.append(Verdict(goal, f"at most {limit:.0%}", text, None if most is None else chosen[most] <= limit))
    return found


def below_eager(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Every cell of fastsr's that is slower than eager in its race, with its speed over eager's; the slowest first."""
    eager = {row.case: time_of(row) for row in rows if row.engine == "eager" and row.median_us is not None}
    ours = [r for r in rows if r.median_us is not None and PEERS[r.engine].ours and r.case in eager]
    slow = [(r, eager[r.case] / time_of(r)) for r in ours if time_of(r) > eager[r.case]]
    return sorted(slow, key=lambda cell: cell[1])


def _slower(rows: Sequence[Row]) -> Verdict:
    timed = {peer.name for peer in OURS} & {r.engine for r in rows if r.median_us is not None}
    slow = below_eager(rows)
    text = f"{len(slow)} cells, listed below" if slow else "none" if timed else "not measured"
    return Verdict("cells slower than eager", "none", text, not slow if timed else None)
