"""Many image files at once: which result goes where, and what happens when one of them, or the whole run, goes wrong.

What can be refused is refused before the first long computation, by the headers of the files. An image that fails is
noted and the others are done. A result is complete or not there, and a run that was stopped or killed can be resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastsr.image import io
from fastsr.image.journal import Entry, Journal, options_digest
from fastsr.image.resize import scaled_shape
from fastsr.image.upscale import check_size
from fastsr.op import explain

STREAMED = 2**25  # pixels of a result; smaller ones are rather compressed
LOOKED_FOR = (*io.FORMATS, ".gif")  # in folders
Event = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One image file and the file to write."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Work:
    """What is done to every image.

    enlarge: takes the NumPy image that `fastsr.upscale` takes and a function for the progress of this one image (a
        share from 0 to 1, and words), and returns the larger one.
    factor: the network's scale. scale: that of the result. model, options: what decides about results, as hashes.
    about: what is said with each result, such as the network's name.
    stream: writes the result into a TIFF without ever holding all of it, for those of more than STREAMED pixels.
    """

    enlarge: Callable[[Any, Callable[[float, str], None]], Any]
    factor: int
    scale: float
    model: str
    options: Mapping[str, Any]
    about: Mapping[str, Any]
    stream: Callable[[Path, io.Picture], None] | None = None


class Stopped(BaseException):
    """The process was asked to end. Not an Exception, so that nothing takes it for the failure of one image."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def find_jobs(
    inputs: Sequence[Path], output: str, *, suffix: str = "", extension: str = "auto"
) -> tuple[list[Job], Path | None]:
    """What is to be done, and the folder of results, None where `output` is the one file to write.

    Folders are searched with all folders in them, but for hidden ones, links and the folder of results, and their
    structure is kept. Names are kept, with `_suffix` before the extension, and so are extensions ("auto") where such
    files can be written, else it is png; `extension` is another one, without its point.
    Raises ValueError where there is nothing to be found, or a folder cannot be read, where two results would meet in
    one file, or one would replace an input.
    """
    if "/" in suffix:
        raise ValueError(f"suffix: expected part of a file's name, got {suffix!r}")
    out = Path(output)
    is_file = out.suffix.lower() in io.FORMATS and not out.is_dir() and not output.endswith("/")
    if is_file and (len(inputs) > 1 or inputs[0].is_dir()):
        raise ValueError(f"{out}: several images need a folder to go to, and this looks like a file")
    if is_file and (suffix or extension != "auto"):
        raise ValueError(f"{out}: a suffix and an extension are for a folder of results; this names the file itself")
    if out.exists() and not is_file and not out.is_dir():
        raise ValueError(f"{out}: expected a folder, or a file with one of the extensions {', '.join(io.FORMATS)}")

    sources: list[tuple[Path, Path]] = []  # and the name in the folder of results
    for path in inputs:
        if path.is_dir():
            found = list(_images_in(path, out))
            if not found:
                raise ValueError(f"{path}: no images in this folder (looked for {', '.join(LOOKED_FOR)})")
            sources += [(source, source.relative_to(path)) for source in found]
        elif path.is_file():
            sources.append((path, Path(path.name)))
        else:
            raise ValueError(f"{path}: no such file or folder")
    jobs = [Job(source, out if is_file else out / _renamed(name, suffix, extension)) for source, name in sources]

    inodes = {(s.st_dev, s.st_ino) for s in (job.source.stat() for job in jobs)}
    first_for: dict[Path, Path] = {}
    for job in jobs:
        other = first_for.setdefault(job.target, job.source)
        if other is not job.source:
            raise ValueError(f"{job.target}: both {other} and {job.source} would be written here; use two calls")
        if job.target.exists() and (job.target.stat().st_dev, job.target.stat().st_ino) in inodes:
            raise ValueError(f"{job.target}: this result would replace an input; choose another -o")
    return jobs, None if is_file else out


def _images_in(folder: Path, results: Path) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise ValueError(f"{error.filename}: this folder cannot be read: {error.strerror}") from error

    for here, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not _same(Path(here, f), results))
        for name in sorted(files):
            path = Path(here, name)
            if not name.startswith(".") and path.suffix.lower() in LOOKED_FOR and path.is_file():
                yield path


def _same(a: Path, b: Path) -> bool:
    return b.exists() and a.samefile(b)


def _renamed(name: Path, suffix: str, extension: str) -> Path:
    if extension != "auto":
        kind = f".{extension}"
    else:
        kind = name.suffix if name.suffix.lower() in io.FORMATS else ".png"
    return name.with_name(name.stem + (f"_{suffix}" if suffix else "") + kind)


def upscale_files(
    jobs: Sequence[Job], work: Work, folder: Path | None, *, resume: bool, report: Callable[[Event], None]
) -> int:
    """Does the jobs and returns the exit status: 0 done, 1 some failed, 128 + n when signal n stopped it.

    folder: where the journal is kept; None for none. resume: skip what the journal proves done.
    report: called with an event for all that happens; each has "event" and, but for the last, "input":
        "start"; "progress" (with "share" 0..1 and "words", while one image takes long); "done" (with "output",
        "size_before", "size" (width, height), "backends", "seconds", "notes" and what `work.about` holds); "skipped"
        (with "output"); "failed" (with "error"); and in the end "end" with the counts of the last three, "all" and, if
        so, "stopped".
    """
    counts = {"done": 0, "skipped": 0, "failed": 0}

    def tell(event: str, job: Job, **more: Any) -> None:
        if event in counts:
            counts[event] += 1
        report({"event": event, "input": str(job.source), **more})

    stopped = None
    with _Signals() as signals:
        try:
            for place in {job.target.parent for job in jobs} | ({folder} if folder else set()):
                if place.is_dir():
                    io.remove_temporaries(place)
            todo = []
            for job in jobs:
                error = _refusal(job, work)
                if error is None:
                    todo.append(job)
                else:
                    tell("failed", job, error=_named(error, job))
            journal = None if folder is None else Journal(folder)
            known = journal.entries() if journal and resume else {}
            for job in todo:
                try:
                    entry = _entry(job, work, folder)
                    before = known.get(entry.output)
                    same = before is not None and replace(entry, size=before.size, sha256=before.sha256) == before
                    if same and journal.holds(before):
                        tell("skipped", job, output=str(job.target))
                        continue
                    said = _one(job, work, entry, journal, signals, tell)
                except Exception as error:  # one bad image must not take the results of the others with it
                    tell("failed", job, error=_named(error, job))
                else:
                    tell("done", job, **said)
        except Stopped as error:
            stopped = error
    end = {"event": "end", **counts, "all": len(jobs)}
    report(end if stopped is None else {**end, "stopped": str(stopped)})
    if stopped is not None:
        return 128 + stopped.number
    return 1 if counts["failed"] else 0


def _named(error: Exception, job: Job) -> str:
    text = str(error) or type(error).__name__
    return text if str(job.source) in text else f"{job.source}: {text}"


def _refusal(job: Job, work: Work) -> Exception | None:
    """Why this image will not be done, as far as its header tells."""
    try:
        header = io.read_header(job.source)
        check_size(header.height, header.width, work.factor)
        height, width = scaled_shape(header.height, header.width, work.scale)
        io.check_writable(job.target, width, height, header.channels, header.depth)
    except (OSError, ValueError, ImportError) as error:
        return error
    return None


def _entry(job: Job, work: Work, folder: Path | None) -> Entry:
    """The line for the journal, but for what only the result tells."""
    output = job.target.name if folder is None else job.target.relative_to(folder).as_posix()
    return Entry(output, io.file_digest(job.source), work.model, options_digest(work.options), 0, "")


def _one(
    job: Job, work: Work, entry: Entry, journal: Journal | None, signals: _Signals, tell: Callable[..., None]
) -> Event:
    def progress(share: float, words: str) -> None:
        tell("progress", job, share=share, words=words)

    tell("start", job)
    started = time.perf_counter()
    made: list[tuple[bytes, tuple[str, ...]]] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        picture = io.read(job.source)
        if io.file_digest(job.source) != entry.input:
            raise OSError(f"{job.source}: changed while it was being read; run again")
        if _streams(job, picture, work):
            job.target.parent.mkdir(parents=True, exist_ok=True)
            calls = explain(work.stream, job.target, picture)
            entry = replace(entry, size=job.target.stat().st_size, sha256=io.file_digest(job.target))
        else:
            calls = explain(lambda: made.append(_encoded(job, picture, work, progress)))
    notes = [str(w.message) for w in warned if issubclass(w.category, (UserWarning, RuntimeWarning))]
    with signals.held():
        for encoded, lost in made:
            job.target.parent.mkdir(parents=True, exist_ok=True)
            io.write_atomically(job.target, encoded)
            entry = replace(entry, size=len(encoded), sha256=hashlib.sha256(encoded).hexdigest())
            notes += lost
        if journal is not None:
            journal.add(entry)
    height, width = picture.pixels.shape[:2]
    return {
        "output": str(job.target),
        "size_before": [width, height],
        "size": list(reversed(scaled_shape(height, width, work.scale))),
        **work.about,
        "backends": sorted({call.backend for call in calls}),
        "seconds": round(time.perf_counter() - started, 3),
        "notes": list(dict.fromkeys([*picture.notes, *notes])),
    }


def _streams(job: Job, picture: io.Picture, work: Work) -> bool:
    height, width, channels = picture.pixels.shape
    large = height * width * work.factor**2 > STREAMED and work.scale == work.factor
    return work.stream is not None and large and channels in (1, 3) and io.format_of(job.target).name == "TIFF"


def _encoded(
    job: Job, picture: io.Picture, work: Work, progress: Callable[[float, str], None]
) -> tuple[bytes, tuple[str, ...]]:
    """The file to write, and notes on what it cannot hold."""
    gray = picture.pixels.shape[2] == 1
    larger = work.enlarge(picture.pixels[..., 0] if gray else picture.pixels, progress)
    return io.encode(job.target, replace(picture, pixels=larger[..., None] if gray else larger))


class _Signals:
    """Turns the signals that ask a process to end into `Stopped`: at once, so that what is being computed is abandoned,
    but within `held` at its end, so that what is being written gets finished. Signals that are ignored stay so."""

    def __init__(self) -> None:
        self.holding = False
        self.waiting: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, frame: Any) -> None:
        if self.holding:
            self.waiting = number
        else:
            raise Stopped(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
            if self.waiting is not None:
                raise Stopped(self.waiting)
