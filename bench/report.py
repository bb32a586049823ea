"""`python -m bench report`: a self-contained HTML page, charts as PNG, and README's table, from rows of results."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench import charts, goals
from bench.goals import Table, below_eager, time_of, verdicts, working_memory
from bench.networks import CASES, ROOT, SCALE
from bench.peers import KERNELS, PEERS
from bench.profile import lines_of
from bench.results import Row, latest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

README_CHART = "docs/images/speedup_f32.png"
MARKERS = ("<!-- bench -->", "<!-- /bench -->")
OWN = {peer.name for peer in KERNELS if peer.dtype == "f32"}
BUSY = 0.1  # processors; with more than that taken by others a race is marked

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2.2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; margin: .8em 0; }
th, td { padding: .2em .7em; text-align: right; white-space: nowrap; } th { border-bottom: 1px solid #999; }
th:first-child, td:first-child, td.text { text-align: left; } tr.first td { border-top: 1px solid #ddd; }
tr.ours td { font-weight: 600; } .met { color: #2a7d4f; } .missed { color: #b3261e; } .open, .note { color: #777; }
img { max-width: 100%; }
"""


@dataclass(frozen=True)
class Cell:
    """A table's cell with a class of STYLE."""

    text: str
    style: str = ""


def of(value: float | None, form: str, none: str = "") -> str:
    """A number as text."""
    return none if value is None else format(value, form)


def table_html(head: Sequence[str], body: Iterable[tuple[str, Sequence[str | Cell]]]) -> str:
    """A table; each line of the body has a class of its own."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"]
    for style, cells in body:
        found = [c if isinstance(c, Cell) else Cell(c) for c in cells]
        inner = "".join(f'<td class="{c.style}">{html.escape(c.text)}</td>' for c in found)
        lines.append(f'<tr class="{style}">{inner}</tr>')
    return "\n".join(lines) + "</table>"


def style_of(row: Row) -> str:
    """The class of a line: fastsr's stand out."""
    return "ours" if PEERS[row.engine].ours else ""


def ceilings_of(rows: Sequence[Row]) -> dict[str, float]:
    """The machine's last measured rates: f32, bf16 (1e9 operations a second) and copy (1e9 bytes); empty if none."""
    found = [r for r in rows if r.kind == "ceiling"]
    threads = max((r.threads for r in found), default=0)
    return max((r for r in found if r.threads == threads), key=lambda r: r.race).extra if found else {}


def network_lines(rows: Sequence[Row], base: Sequence[Row] = ()) -> list[tuple[str, Sequence[str | Cell]]]:
    """Every network, size and engine: the lines of the largest table, at the most threads measured."""
    ceilings, table = ceilings_of(rows), Table(rows)
    before = Table(base, table.threads) if base else None
    lines: list[tuple[str, Sequence[str | Cell]]] = []
    for name in CASES:
        for key in sorted((k for k in table.rows if k[0] == name), key=lambda k: int(k[1].partition("x")[0])):
            engines = sorted(table.rows[key].values(), key=time_of)
            for i, row in enumerate(engines):
                ours = PEERS[row.engine].ours
                rate = None if row.gflop is None else row.gflop / time_of(row) * 1e6
                ceiling = ceilings.get(PEERS[row.engine].dtype)
                eager = table.rows[key].get("eager")
                best = table.best(key, PEERS[row.engine].dtype) if ours else None
                cells: list[str | Cell] = [
                    charts.TITLES[name] if i == 0 else "",
                    key[1] if i == 0 else "",
                    Cell(row.engine, "text"),
                    of(time_of(row) / 1e3, ".1f"),
                    f"{(row.p20_us or 0) / 1e3:.1f} to {(row.p80_us or 0) / 1e3:.1f}",
                    of(charts.pixels_per_second(row), ".2f"),
                    of(rate, ".0f"),
                    of(rate / ceiling if rate and ceiling else None, ".0%"),
                    of(charts.over_floor(row, ceiling) if ceiling and row.floor_gflop else None, ".2f"),
                    of(time_of(eager) / time_of(row) if eager else None, ".2f"),
                    of(time_of(best) / time_of(row) if best else None, ".2f"),
                    of(row.psnr_db, ".1f"),
                    Cell(of(row.others, ".2f"), "missed" if (row.others or 0) > BUSY else ""),
                ]
                if before is not None:
                    old = before.rows.get(key, {}).get(row.engine)
                    cells.append(of(time_of(old) / time_of(row) if old else None, ".2f"))
                lines.append((f"{'first' if i == 0 else ''} {'ours' if ours else ''}", cells))
    return lines


NETWORK_HEAD = ("network", "small image", "engine", "ms", "20 to 80 %", "MP/s", "GFLOP/s", "of ceiling", "over floor",
                "vs eager", "vs best rival", "PSNR, dB", "others busy")  # fmt: skip


def operator_lines(rows: Sequence[Row]) -> list[tuple[str, Sequence[str | Cell]]]:
    """Operators: a line a sample, a column an engine, µs."""
    engines = operator_engines(rows)
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.kind == "operator" and row.median_us is not None:
            cases.setdefault((row.name, row.sample), {})[row.engine] = row
    lines = []
    for (name, sample), at in sorted(cases.items()):
        eager, own = at.get("eager"), [time_of(r) for e, r in at.items() if e in OWN]
        ratio = time_of(eager) / min(own) if own and eager else None
        cells: list[str | Cell] = [f"{name} {sample}"]
        cells += [of(time_of(at[e]) if e in at else None, ".0f") for e in engines]
        lines.append(("", [*cells, Cell(of(ratio, ".2f"), "missed" if ratio is not None and ratio < 1 else "")]))
    return lines


def operator_engines(rows: Sequence[Row]) -> list[str]:
    """The engines that operators were measured with, in the order of PEERS."""
    found = {row.engine for row in rows if row.kind == "operator"}
    return [name for name in PEERS if name in found]


def _accuracy_lines(rows: Sequence[Row]) -> list[tuple[str, Sequence[str | Cell]]]:
    found = sorted((r for r in rows if r.kind == "accuracy"), key=lambda r: (r.name, -(r.psnr_db or 0)))
    return [
        (
            style_of(r),
            [r.name, Cell(r.engine, "text"), of(r.error, ".1e"), of(r.psnr_db, ".1f")],
        )
        for r in found
    ]


def _memory_lines(rows: Sequence[Row]) -> list[tuple[str, Sequence[str | Cell]]]:
    def mib(value: float) -> str:
        return f"{value / 2**20:.1f}"

    found = sorted((r for r in rows if r.kind == "memory"), key=lambda r: (list(CASES).index(r.name), r.sample))
    eager = {(r.name, r.sample): r for r in found if r.engine == "eager"}
    lines = []
    for r in found:
        baseline = eager.get((r.name, r.sample))
        share = of(working_memory(r) / working_memory(baseline) if baseline else None, ".0%")
        cells = [f"{charts.TITLES[r.name]} {r.sample}", Cell(r.engine, "text"), mib(working_memory(r)), share,
                 mib(r.extra["packed"]), mib(r.extra["prepared"]), mib(r.extra["output"])]  # fmt: skip
        lines.append((style_of(r), cells))
    return lines


def _latency_lines(rows: Sequence[Row]) -> list[tuple[str, Sequence[str | Cell]]]:
    found = sorted(
        (r for r in rows if r.kind == "latency"), key=lambda r: (r.name, r.extra["prepare"] + r.extra["first"])
    )
    return [
        (
            style_of(r),
            [f"{charts.TITLES[r.name]} {r.sample}", Cell(r.engine, "text"),
             *(f"{r.extra[what] * 1e3:.0f}" for what in ("prepare", "first", "later", "unseen"))],
        )
        for r in found
    ]  # fmt: skip


def _profile_lines(rows: Sequence[Row]) -> list[tuple[str, Sequence[str | Cell]]]:
    """The longest steps of each profile, until nine tenths of the time are told; then what no step takes."""
    ceilings = ceilings_of(rows)
    table: list[tuple[str, Sequence[str | Cell]]] = []
    for row in sorted((r for r in rows if r.kind == "profile"), key=lambda r: (list(CASES).index(r.name), r.engine)):
        lines, whole = lines_of(row), row.extra["ms"]
        ceiling, told = ceilings.get(PEERS[row.engine].dtype), 0.0
        floor = sum(x.floor_gflop for x in lines) / ceiling * 1e3 if ceiling else None
        steps = sum(x.ms for x in lines)
        title = f"{charts.TITLES[row.name]} {row.sample} {row.engine}"
        table.append(("first ours", [title, "", f"{whole:.1f}", "", "", of(floor, ".1f")]))
        for x in lines:
            if told < 0.9 * steps:
                least = x.floor_gflop / ceiling * 1e3 if ceiling and x.gflop else None
                rate = x.gflop / x.ms * 1e3 if x.gflop else None
                cells = [str(x.count), f"{x.ms:.1f}", f"{x.ms / whole:.0%}", of(rate, ".0f"), of(least, ".1f")]
                table.append(("", [Cell(x.label, "text"), *cells]))
            told += x.ms
        rest = whole - steps
        table.append(("", [Cell("outside of steps", "text"), "", f"{rest:.1f}", f"{rest / whole:.0%}", "", ""]))
    return table


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """The charts that the rows have something for, by file name without its ending."""
    ceilings = ceilings_of(rows)
    drawn: dict[str, Callable[[], Figure | None]] = {
        "speedup_f32": lambda: charts.speedups(rows, "f32"),
        "speedup_bf16": lambda: charts.speedups(rows, "bf16"),
        "speedup_f32_48": lambda: charts.speedups(rows, "f32", goals.PATCH),
        "speedup_bf16_48": lambda: charts.speedups(rows, "bf16", goals.PATCH),
        "floor": lambda: charts.floors(rows, ceilings),
        "sizes_carn_m": lambda: charts.curve(rows, "carn_m"),
        "sizes_idn": lambda: charts.curve(rows, "idn"),
        "threads": lambda: charts.scaling(rows, "carn"),
        "memory": lambda: charts.memory(rows),
    }
    made = {name: draw() for name, draw in drawn.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def png(figure: Figure) -> bytes:
    """A chart as a file, twice as fine as a page shows it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def page(rows: Sequence[Row], pictures: dict[str, bytes], base: Sequence[Row] = (), revision: str = "") -> str:
    """The HTML page of rows as `latest` returns them; `base` are those of an earlier commit, called `revision`."""

    def picture(name: str) -> str:
        data = pictures.get(name)
        return (
            f'<p><img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></p>' if data else ""
        )

    def section(title: str, *names: str) -> str:
        found = "".join(map(picture, names))
        return found and f"<h2>{title}</h2>{found}"

    newest = max(rows, key=lambda r: r.race)
    commits = ", ".join(sorted({r.commit for r in rows}))
    rates = "{f32:.0f} GFLOP/s float32, {bf16:.0f} GFLOP/s bfloat16, {copy:.1f} GB/s copying"
    ceilings = ceilings_of(rows)
    parts = [
        f"<h1>fastsr on {html.escape(newest.device)}</h1>",
        f"<p>{newest.race[:10]}, commit {html.escape(commits)}, {newest.threads} threads; "
        f"{html.escape(newest.versions)}.<br>Ceilings: {rates.format(**ceilings) if ceilings else 'not measured'}.</p>",
        '<p class="note">Medians of interleaved calls in one process; docs/performance.md says how, and what each '
        "column means. “Others busy” is how many processors other programs took during a race: rows above a tenth are "
        "not to be trusted.</p>",
        "<h2>Goals</h2>", _goals(rows), _slow(rows), picture("speedup_f32"), picture("speedup_bf16"), picture("floor"),
        section("Small images", "speedup_f32_48", "speedup_bf16_48"),
        section("Sizes and threads", "sizes_carn_m", "sizes_idn", "threads"),
        "<h2>Networks</h2>",
        table_html([*NETWORK_HEAD, *([f"vs {revision}"] if base else [])], network_lines(rows, base)),
    ]  # fmt: skip
    sections = (
        ("Accuracy of trained networks, against float64", ("network", "engine", "relative error", "PSNR, dB"),
         _accuracy_lines(rows), ""),
        ("Memory of a call, MiB", ("network", "engine", "working memory", "of eager's", "packed weights", "prepared",
                                   "output"), _memory_lines(rows), "memory"),
        ("First calls, ms", ("network", "engine", "prepare", "first call", "later call", "another size"),
         _latency_lines(rows), ""),
        ("Where the time goes", ("step", "times", "ms", "share", "GFLOP/s", "floor, ms"), _profile_lines(rows), ""),
        ("Imports, ms", ("package", "time"),
         [("", [r.name, f"{r.extra['seconds'] * 1e3:.0f}"]) for r in rows if r.kind == "import"], ""),
        ("Operators, µs", ("sample", *operator_engines(rows), "vs eager"), operator_lines(rows), ""),
    )  # fmt: skip
    for title, head, lines, chart in sections:
        if lines:
            parts += [f"<h2>{title}</h2>", picture(chart), table_html(head, lines)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>fastsr on {html.escape(newest.device)}</title>'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "</html>\n"
    )


def _goals(rows: Sequence[Row]) -> str:
    words = {True: Cell("met", "met"), False: Cell("missed", "missed"), None: Cell("", "open")}
    lines = [("", [v.goal, v.wanted, v.measured, words[v.met]]) for v in verdicts(rows)]
    return table_html(("goal", "wanted", "measured", ""), lines)


def _slow(rows: Sequence[Row]) -> str:
    lines = [
        ("", [f"{row.kind} {row.name}", row.sample, str(row.threads), Cell(row.engine, "text"), f"{speed:.2f}"])
        for row, speed in below_eager(rows)
    ]
    if not lines:
        return ""
    return "<h2>Slower than eager</h2>" + table_html(("what", "sample", "threads", "engine", "vs eager"), lines)


def readme_table(rows: Sequence[Row]) -> str:
    """The Markdown table of README: times, and speeds over the fastest rival and eager, at the sizes of the goals."""
    table = Table(rows)
    head = ("network, x4", "small image", "float32, ms", "vs best rival", "vs eager", "bfloat16, ms", "vs best rival",
            "PSNR of bfloat16, dB (autocast's)")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in CASES:
        key = table.full(name)
        at = table.rows.get(key, {})
        cells = [charts.TITLES[name], key[1]]
        for dtype, own in goals.OWN.items():
            row, best, speed = at.get(own), table.best(key, dtype), table.speedup(key, dtype)
            cells.append(of(time_of(row) / 1e3 if row else None, ".1f", "-"))
            cells.append(f"{speed:.2f}x ({best.engine})" if best and speed else "-")
            if dtype == "f32":
                cells.append(of(table.speedup(key, dtype, "eager"), ".2f", "-"))
        ours, theirs = (at[n].psnr_db if n in at else None for n in ("fastsr-bf16", "autocast-bf16"))
        cells.append(f"{of(ours, '.1f', '-')} ({of(theirs, '.1f', '-')})")
        if at:
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """The chart and the table for README, with a line that says where and how they were measured."""
    table = Table(rows)
    shown = [row for name in CASES for row in table.rows.get(table.full(name), {}).values()]
    newest, commits = max(shown, key=lambda r: r.race), ", ".join(sorted({r.commit for r in shown}))
    where = f"x{SCALE}, {newest.threads} threads of {newest.device}, commit {commits}"
    return (
        f"![How many times faster than others]({README_CHART})\n\nWhole networks, image in to image out, {where}; "
        f"medians of interleaved calls.\n\n{readme_table(rows)}\n"
    )


def between_markers(text: str, new: str) -> str:
    """A text with what stands between MARKERS exchanged. Raises ValueError if they are not there once."""
    before, start, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not start or not end or MARKERS[0] in rest:
        raise ValueError(f"expected {MARKERS[0]} and {MARKERS[1]} once each")
    return f"{before}{MARKERS[0]}\n{new}{MARKERS[1]}{after}"


def write(
    rows: Sequence[Row], folder: Path, base: Sequence[Row] = (), revision: str = "", readme: bool = False
) -> Path:
    """Writes index.html and the charts into a folder and returns the page's path; with `readme` also README's table and
    the chart beside it. Raises ValueError where there are no rows, or for README none of networks."""
    rows, base = latest(rows), latest(base)
    if not rows:
        raise ValueError("report: no rows; `pytest bench/` measures some")
    pictures = {name: png(figure) for name, figure in figures(rows).items()}
    if readme and "speedup_f32" not in pictures:
        raise ValueError("report: README's table needs rows of networks; `pytest bench/test_models.py` measures them")
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        (folder / f"{name}.png").write_bytes(data)
    path = folder / "index.html"
    path.write_text(page(rows, pictures, base, revision))
    if readme:
        file = ROOT / "README.md"
        file.write_text(between_markers(file.read_text(), summary(rows)))
        (ROOT / README_CHART).write_bytes(pictures["speedup_f32"])
    return path
