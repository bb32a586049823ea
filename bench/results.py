"""Rows of results: `bench/results/<device>.csv`, to which every measurement is appended at once.

Rows that share `race` were measured in turns in one process; only those are divided by each other.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.metadata
import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.networks import ROOT
from fastsr.info import _model_name

RESULTS = ROOT / "bench" / "results"
MEASURED = ("fastsr", "csrc", "kernels", "setup.py")  # what a commit's speed depends on
RACED = ("network", "operator", "accuracy")  # kinds whose engines take turns
PACKAGES = ("torch", "onnxruntime", "openvino", "ncnn", "numpy")


@dataclass(frozen=True)
class Row:
    """One measurement.

    race: when the race began, UTC; its name. commit: short, with "+" behind it where files it does not hold were
    measured. kind: "network", "operator", "accuracy", "memory", "latency", "profile", "import" or "ceiling". name: of
    the network or operator. sample: height and width of the small image ("128x128"), or an operator's sample. engine: a
    peer's name. Times in µs of `rounds` timed calls; others: processors that were busy with something else meanwhile.
    gflop: of the direct convolutions; floor_gflop: what is left of them by the formula in `bench.work`.
    error: root mean square against float64 over the reference's. psnr_db: against float64, whose range is the peak.
    extra: whatever else was measured. versions: of packages.
    """

    race: str
    commit: str
    device: str
    threads: int
    kind: str
    name: str
    sample: str
    engine: str
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    min_us: float | None = None
    rounds: int | None = None
    others: float | None = None
    gflop: float | None = None
    floor_gflop: float | None = None
    error: float | None = None
    psnr_db: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    versions: str = ""

    @property
    def case(self) -> tuple[str, str, str, int]:
        """What is measured, whoever computes it."""
        return self.kind, self.name, self.sample, self.threads


COLUMNS = tuple(f.name for f in dataclasses.fields(Row))
_INTEGERS = {"threads", "rounds"}
_NUMBERS = {"median_us", "p20_us", "p80_us", "min_us", "others", "gflop", "floor_gflop", "error", "psnr_db"}


def now() -> str:
    """The time to the millisecond, UTC: the name of a race."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@functools.cache
def commit() -> str:
    """The commit that is measured, as `Row.commit` has it; "unknown" outside a repository."""

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)

    head = git("rev-parse", "--short=10", "HEAD")
    if head.returncode != 0:
        return "unknown"
    changed = git("status", "--porcelain", "--", *MEASURED).stdout.strip()
    return head.stdout.strip() + ("+" if changed else "")


@functools.cache
def device() -> str:
    """The name of what is measured: the GPU's where there is one, else the processor's."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _model_name()


@functools.cache
def versions() -> str:
    """The installed packages that matter, `name=version`, separated by spaces."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package}={importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return " ".join(found)


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def path_of(name: str | None = None) -> Path:
    """The file of a device's results; by default of this machine's."""
    return RESULTS / f"{slug(name or device())}.csv"


def new(race: str, kind: str, name: str, sample: str, engine: str, **values: Any) -> Row:
    """A row of this machine and commit; threads are torch's unless given."""
    values = {"threads": torch.get_num_threads(), **values}
    return Row(race, commit(), device(), kind=kind, name=name, sample=sample, engine=engine, versions=versions(),
               **values)  # fmt: skip


def append(rows: Iterable[Row], path: Path | None = None) -> None:
    """Adds rows to a file, by default this machine's; makes it where it is missing."""
    path = path or path_of()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        writer.writerows([_text(column, getattr(row, column)) for column in COLUMNS] for row in rows)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, or of the JSON file that `pytest --benchmark-json` writes. Raises ValueError."""
    if path.suffix == ".json":
        found = [b["extra_info"]["row"] for b in json.loads(path.read_text())["benchmarks"] if "row" in b["extra_info"]]
        return [Row(**row) for row in found]
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}; got {reader.fieldnames}")
        return [Row(**{column: _value(column, line[column]) for column in COLUMNS}) for line in reader]


def _text(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "extra":
        return json.dumps(value, sort_keys=True) if value else ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(column: str, text: str) -> Any:
    if column == "extra":
        return json.loads(text) if text else {}
    if column in _INTEGERS | _NUMBERS:
        return None if not text else int(text) if column in _INTEGERS else float(text)
    return text


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of every case the rows of its last race; of what is measured one by one, the last of each engine. A case that is
    raced again replaces the earlier race whole, so that no ratio is taken of two races."""

    def key(row: Row) -> tuple[Any, ...]:
        return (*row.case, "" if row.kind in RACED else row.engine)

    last: dict[Any, str] = {}
    for row in rows:
        last[key(row)] = max(last.get(key(row), ""), row.race)
    return [row for row in rows if row.race == last[key(row)]]
