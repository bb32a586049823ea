"""The charts of the report, drawn from rows: one colour an engine, a line where both are equally fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.goals import BF16, CARN, FLOAT, OWN, Table, memory_shares, time_of
from bench.networks import CASES
from bench.peers import PEERS
from bench.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "eager": "#7f7f7f",
    "channels_last": "#b08d57",
    "compile": "#8c6bb1",
    "onnxruntime": "#2a9d8f",
    "openvino-f32": "#1f6fb4",
    "openvino-bf16": "#1f6fb4",
    "ncnn": "#c77cba",
    "autocast-bf16": "#7f7f7f",
    "fastsr-module": "#f2a65a",
    "fastsr-f32": "#d1495b",
    "fastsr-bf16": "#7a1f3d",
    "fastsr-e4m3": "#3c0d1f",
}
"""The two dtypes of one engine share a colour where they never stand in one chart."""

GREY, FAINT, MISSED = "#555555", "#dddddd", "#b3261e"
TITLES = {
    "carn": "CARN", "carn_m": "CARN-M", "idn": "IDN", "zssr": "ZSSR", "enhancenet": "EnhanceNet", "sftgan": "SFTGAN",
    "msrn": "MSRN", "srfeat": "SRFeat", "dbpn": "DBPN", "memnet": "MemNet", "rcan": "RCAN", "esrgan": "ESRGAN",
    "rdn": "RDN",
}  # fmt: skip


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    """A figure and its axes, without a frame above and to the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=GREY, length=0)
    axes.set_axisbelow(True)
    return figure, axes


def _title(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=24)
    axes.annotate(below, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", color=GREY, fontsize=9)


def _ticks(axes: Any, values: Sequence[float], form: str, lowest: float, highest: float) -> None:
    """Marks on a logarithmic x axis, those of `values` that lie inside."""
    axes.set_xscale("log")
    axes.set_xlim(lowest, highest)
    inside = [v for v in values if lowest <= v <= highest]
    axes.set_xticks(inside, [form.format(v) for v in inside])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)


def _legend(figure: Figure, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linestyle="", marker="o", color=COLOURS[n], label=n) for n in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9,
                  handletextpad=0.1, columnspacing=1.2)  # fmt: skip


def _beside(axes: Any, y: float, text: str, colour: str = "black") -> None:
    """A bold text in line y, right of the axes."""
    axes.annotate(text, (1, y), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                  fontsize=9, fontweight="bold", color=colour)  # fmt: skip


def speedups(rows: Sequence[Row], dtype: str, sample: str | None = None) -> Figure | None:
    """fastsr's speed over each rival's, a row a network, at the sizes of the goals or at `sample`."""
    table = Table(rows)
    found = {}
    for name in CASES:
        key = table.full(name) if sample is None else (name, sample)
        ratios = {rival: table.speedup(key, dtype, rival) for rival in table.rivals(key, dtype)}
        if ratios and None not in ratios.values():
            found[name] = ratios
    if not found:
        return None
    names = sorted(found, key=lambda n: min(found[n].values()))
    figure, axes = _figure(8.5, 1.6 + 0.36 * len(names))
    every = [v for ratios in found.values() for v in ratios.values()]
    for y, name in enumerate(names):
        ratios = found[name]
        axes.plot([min(ratios.values()), max(ratios.values())], [y, y], color=FAINT, linewidth=2, zorder=1)
        for rival, ratio in ratios.items():
            axes.plot(ratio, y, "o", color=COLOURS[rival], markersize=7, zorder=3)
        goal = None if sample else (FLOAT | {"carn": CARN} if dtype == "f32" else BF16).get(name)
        if goal is not None:
            axes.plot(goal, y, "|", color="black", markersize=13, markeredgewidth=1.4, zorder=2)
        missed = goal is not None and min(ratios.values()) < goal
        _beside(axes, y, f"{min(ratios.values()):.2f}x", MISSED if missed else "black")
    axes.set_yticks(range(len(names)), [TITLES[n] for n in names])
    axes.axvline(1.0, color="black", linewidth=1)
    _ticks(axes, (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64), "{:g}x", min(0.95, *every) * 0.9,
           max(2.0, *every) * 1.15)  # fmt: skip
    precision = {"f32": "float32", "bf16": "bfloat16"}[dtype]
    size = "" if sample is None else f", {sample} images"
    below = "whole networks, x4; the number is against the fastest rival" + ("" if sample else ", | is the goal")
    _title(axes, f"How many times faster fastsr is, {precision}{size}", below)
    _legend(figure, [n for n in PEERS if any(n in ratios for ratios in found.values())])
    return figure


def floors(rows: Sequence[Row], ceilings: dict[str, float]) -> Figure | None:
    """Times over what the arithmetic alone would take at the machine's measured rate."""
    table = Table(rows)
    found: dict[str, dict[str, float]] = {}
    for name in CASES:
        at = table.rows.get(table.full(name), {})
        chosen = {OWN["f32"]: "f32", OWN["bf16"]: "bf16", "openvino-f32": "f32"}
        for engine, dtype in chosen.items():
            row = at.get(engine)
            if row is not None and row.floor_gflop and ceilings.get(dtype):
                found.setdefault(name, {})[engine] = over_floor(row, ceilings[dtype])
    if not found:
        return None
    names = sorted(found, key=lambda n: -found[n].get(OWN["f32"], 0))
    figure, axes = _figure(8.5, 1.6 + 0.36 * len(names))
    for y, name in enumerate(names):
        values = found[name]
        axes.plot([min(values.values()), max(values.values())], [y, y], color=FAINT, linewidth=2, zorder=1)
        for engine, value in values.items():
            axes.plot(value, y, "o", color=COLOURS[engine], markersize=7, zorder=3)
        if OWN["f32"] in values:
            _beside(axes, y, f"{values[OWN['f32']]:.2f}", COLOURS[OWN["f32"]])
    axes.set_yticks(range(len(names)), [TITLES[n] for n in names])
    axes.axvline(1.0, color="black", linewidth=1)
    every = [v for values in found.values() for v in values.values()]
    _ticks(
        axes, (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64), "{:g}", min(0.9, *every) * 0.9, max(2, *every) * 1.15
    )
    _title(axes, "Distance to the floor", "time over what the remaining arithmetic takes at this machine's peak")
    _legend(figure, [n for n in PEERS if any(n in values for values in found.values())])
    return figure


def over_floor(row: Row, rate: float) -> float:
    """A row's time over that of its floor at `rate`, 1e9 operations a second."""
    assert row.floor_gflop is not None
    return time_of(row) * 1e-6 * rate / row.floor_gflop


def pixels_per_second(row: Row) -> float:
    """Output megapixels a second."""
    return row.extra.get("pixels", 0) / time_of(row)


def curve(rows: Sequence[Row], name: str) -> Figure | None:
    """Output megapixels a second over the size of the small image."""
    at = {key: engines for key, engines in Table(rows).rows.items() if key[0] == name}
    sizes = sorted((int(sample.partition("x")[0]), engines) for (_, sample), engines in at.items())
    lines: dict[str, list[tuple[int, float]]] = {}
    for size, engines in sizes:
        for engine, row in engines.items():
            if engine != "fastsr-module" and engine in COLOURS and engine not in ("ncnn", "onnxruntime", "compile"):
                lines.setdefault(engine, []).append((size, pixels_per_second(row)))
    lines = {e: points for e, points in lines.items() if len(points) > 1 and points[-1][0] == sizes[-1][0]}
    if not lines:
        return None
    figure, axes = _figure(8.5, 4.2)
    ends = []
    for engine, points in lines.items():
        dashed = "--" if PEERS[engine].dtype == "bf16" else "-"
        axes.plot(*zip(*points), dashed, color=COLOURS[engine], marker="o", markersize=4)
        ends.append((points[-1][1], points[-1][0], engine))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _labels(axes, ends)
    axes.set_xticks([s for s, _ in sizes], [str(s) for s, _ in sizes])
    axes.set_xticks([], minor=True)
    axes.set_xlim(sizes[0][0] * 0.92, sizes[-1][0] * 1.6)
    _decades(axes, [v for points in lines.values() for _, v in points])
    axes.set_xlabel("height and width of the small image", color=GREY)
    _title(axes, f"{TITLES[name]} x4 from a patch to a photograph", "output megapixels a second; dashed is bfloat16")
    return figure


def _decades(axes: Any, values: Sequence[float]) -> None:
    """Marks 1, 2, 5 of each decade on a logarithmic y axis."""
    marks = [
        m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5) if min(values) * 0.7 <= m * 10.0**e <= max(values) * 1.4
    ]
    axes.set_yticks(marks, [f"{m:g}" for m in marks])
    axes.set_yticks([], minor=True)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)


def _labels(axes: Any, ends: list[tuple[float, float, str]], apart: float = 0.06) -> None:
    """The engines' names at the ends of their lines, (y, x, engine), moved apart by a share of the axis's height."""
    low, high = axes.transData.inverted().transform(axes.transAxes.transform([(0, 0), (0, 1)]))[:, 1]
    logarithmic = axes.get_yscale() == "log"

    def share(y: float) -> float:
        return math.log(y / low) / math.log(high / low) if logarithmic else (y - low) / (high - low)

    placed = -apart
    for y, x, engine in sorted(ends):
        placed = max(share(y), placed + apart)
        axes.annotate(engine, (x, placed), (8, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                      va="center", fontsize=9, color=COLOURS[engine])  # fmt: skip


def memory(rows: Sequence[Row]) -> Figure | None:
    """Working memory of fastsr over eager's."""
    shares = memory_shares(rows)
    if not shares:
        return None
    cases = sorted({(name, sample) for name, sample, _ in shares}, key=lambda c: -shares.get((*c, OWN["f32"]), 0))
    figure, axes = _figure(8.5, 1.6 + 0.36 * len(cases))
    for y, case in enumerate(cases):
        for engine in OWN.values():
            if (*case, engine) in shares:
                axes.plot(shares[(*case, engine)], y, "o", color=COLOURS[engine], markersize=7)
    axes.set_yticks(range(len(cases)), [f"{TITLES[name]}, {sample}" for name, sample in cases])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlim(0, max(1.1, *shares.values()) * 1.05)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    _title(axes, "Memory of a call over eager's", "activations, workspace and output; packed weights are not counted")
    _legend(figure, [n for n in OWN.values() if any(engine == n for _, _, engine in shares)])
    return figure


def scaling(rows: Sequence[Row], name: str) -> Figure | None:
    """Speed over one thread's, by threads."""
    counts = sorted({r.threads for r in rows if r.kind == "network" and r.name == name})
    tables = {n: Table(rows, n).rows for n in counts}
    samples = [s for (_, s) in tables[counts[0]] if all((name, s) in t for t in tables.values())] if counts else []
    if len(counts) < 2 or not samples:
        return None
    key = (name, samples[0])
    engines = [e for e in PEERS if all(e in tables[n][key] for n in counts) and e in COLOURS]
    figure, axes = _figure(6.5, 3.8)
    ends = []
    for engine in engines:
        speeds = [time_of(tables[counts[0]][key][engine]) / time_of(tables[n][key][engine]) for n in counts]
        dashed = "--" if PEERS[engine].dtype == "bf16" else "-"
        axes.plot(counts, speeds, dashed, color=COLOURS[engine], marker="o", markersize=4)
        ends.append((speeds[-1], counts[-1], engine))
    axes.plot(counts, [n / counts[0] for n in counts], color="black", linewidth=0.8, zorder=0)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set_xlim(counts[0] * 0.95, counts[-1] + 0.45 * (counts[-1] - counts[0]))
    _labels(axes, ends)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_xlabel("threads", color=GREY)
    _title(axes, f"{TITLES[name]} x4, {samples[0]}: speed over {counts[0]} thread's", "the black line is proportional")
    return figure
