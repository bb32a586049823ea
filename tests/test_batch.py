"""Many files at once: every outcome in one folder, what a run that was stopped or killed leaves, and how it goes on."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import fastsr
from fastsr import cli
from fastsr.image import batch, io, journal
from fastsr.image.batch import Work, find_jobs, upscale_files
from fastsr.image.io import Picture
from fastsr.image.journal import Entry, Journal

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of untrained weights: CARN at two scales, narrow."""
    path = tmp_path_factory.mktemp("weights") / "carn.pth"
    torch.manual_seed(0)
    torch.save(fastsr.create("carn", scales=(2, 3), features=8).state_dict(), path)
    return str(path)


def made(channels: int = 3, dtype: type = np.uint8, height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype)


def contents(folder: Path) -> dict[str, bytes]:
    """All files in it and below, but for the journal."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != journal.NAME
    }


def run(capsys, *arguments: object) -> tuple[int, dict[str, dict], dict]:
    """(exit status, the last event of every image by its file's name, the end)."""
    capsys.readouterr()
    status = cli.main(["upscale", *map(str, arguments)])
    *events, end = map(json.loads, capsys.readouterr().out.splitlines())
    return status, {Path(event["input"]).name: event for event in events}, end


# Every outcome, in one folder.


def test_a_folder_of_everything(tmp_path, weights, capsys):
    pytest.importorskip("imagecodecs", reason="16 bits a channel need the extra fastsr[images]")
    source, results = tmp_path / "in", tmp_path / "out"
    (source / "trip" / "day 1").mkdir(parents=True)
    (source / ".hidden").mkdir()
    plain = made()
    alpha = np.dstack([plain, np.repeat(np.uint8([[0, 0, 0, 9, 255, 255, 255, 255]]), 6, 0)])
    io.write(source / "eight.png", Picture(plain))
    io.write(source / "sixteen.png", Picture(made(3, np.uint16)))
    io.write(source / "sixteen.tiff", Picture(made(4, np.uint16)))
    io.write(source / "gray.png", Picture(made(1)))
    io.write(source / "gray sixteen.png", Picture(made(1, np.uint16)))
    io.write(source / "alpha.webp", Picture(alpha))
    Image.fromarray(plain).quantize(8).save(source / "palette.png", transparency=0)
    Image.fromarray(plain).quantize(8).save(source / "frame.gif")
    turned = Image.Exif()
    turned[0x0112], turned[271] = 6, "A camera"
    Image.fromarray(plain).save(source / "trip" / "rotated.JPG", exif=turned, quality=95)
    io.write(source / "trip" / "day 1" / "profiled.png", Picture(plain, icc=PROFILE, dpi=(300.0, 300.0)))
    io.write(source / ".hidden" / "hidden.png", Picture(plain))
    Image.fromarray(plain).convert("CMYK").save(source / "inks.tiff")
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (source / "huge.png").write_bytes(huge + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    (source / "truncated.jpg").write_bytes((source / "trip" / "rotated.JPG").read_bytes()[:-60])
    (source / "fake.png").write_text("no image")
    (source / "notes.txt").write_text("left alone")
    before = contents(source)

    status, said, end = run(capsys, source, "-o", results, "--model", weights, "-s", 2)
    assert status == 1 and (end["done"], end["failed"], end["all"]) == (10, 4, 14)
    assert contents(source) == before
    expected = ["eight.png", "sixteen.png", "sixteen.tiff", "gray.png", "gray sixteen.png", "alpha.webp", "palette.png"]
    expected += ["frame.png", "trip/rotated.JPG", "trip/day 1/profiled.png"]
    assert sorted(contents(results)) == sorted(expected)

    model = fastsr.load(weights)
    for name in ("eight.png", "sixteen.png", "sixteen.tiff", "gray.png", "gray sixteen.png", "alpha.webp"):
        old, new = (io.read(folder / name).pixels for folder in (source, results))
        assert new.dtype == old.dtype and new.shape == (12, 16, old.shape[2])
        larger = fastsr.upscale(old if old.shape[2] > 1 else old[..., 0], model, scale=2)
        np.testing.assert_array_equal(new, larger.reshape(new.shape))
    assert io.read(results / "palette.png").pixels.shape == (12, 16, 4)
    assert io.read(results / "frame.png").pixels.shape == (12, 16, 3)
    rotated = io.read(results / "trip" / "rotated.JPG")
    assert rotated.pixels.shape == (16, 12, 3) and said["rotated.JPG"]["size"] == [12, 16]
    kept = Image.Exif()
    kept.load(rotated.exif)
    assert kept.get(0x0112, 1) == 1 and kept[271] == "A camera"
    profiled = io.read(results / "trip" / "day 1" / "profiled.png")
    assert profiled.icc == PROFILE and profiled.dpi == pytest.approx((300, 300), rel=1e-4)
    for name, words in {
        "inks.tiff": "CMYK", "huge.png": "pixels", "truncated.jpg": "cannot be read", "fake.png": "cannot be read"
    }.items():  # fmt: skip
        assert said[name]["event"] == "failed" and words in said[name]["error"] and name in said[name]["error"]

    status, said, end = run(capsys, source, "-o", results, "--model", weights, "-s", 2, "--resume")
    assert status == 1 and (end["done"], end["skipped"], end["failed"]) == (0, 10, 4)


# The command's words.


def test_flags_that_users_of_others_know(tmp_path, weights, capsys):
    io.write(tmp_path / "a.bmp", Picture(made()))
    io.write(tmp_path / "b.tif", Picture(made()))
    command = ["-i", tmp_path / "a.bmp", "-i", tmp_path / "b.tif", "-o", tmp_path / "out", "-n", weights]
    status, said, _ = run(
        capsys, *command, "-s", 2.5, "--suffix", "large", "--ext", "webp", "--fp32", "--device", "cpu"
    )
    assert status == 0 and sorted(contents(tmp_path / "out")) == ["a_large.webp", "b_large.webp"]
    assert said["a.bmp"]["size"] == [20, 15] and said["a.bmp"]["scale"] == 2.5
    expected = fastsr.upscale(made(), weights, scale=2.5)
    np.testing.assert_array_equal(io.read(tmp_path / "out" / "a_large.webp").pixels, expected)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("--dtype bfloat16", {"dtype": torch.bfloat16}),
        ("-t 4 --tile_pad 1", {"tile": 4, "tile_pad": 1}),
        ("--tile 4 --tile-pad exact --deterministic", {"tile": 4, "tile_pad": "exact", "deterministic": True}),
        ("-t 0 --self-ensemble", {"tile": None, "self_ensemble": True}),
    ],
)
def test_options_reach_the_network(tmp_path, weights, monkeypatch, capsys, flags, options):
    given = {}

    def upscale(image, model, **named):
        given.update(named, dtype=model.dtype)
        return fastsr.upscale(image, model, **named)

    monkeypatch.setattr(cli, "upscale", upscale)
    io.write(tmp_path / "a.png", Picture(made()))
    command = [tmp_path / "a.png", "-o", tmp_path / "b.png", "--model", weights, "-s", 2]
    assert run(capsys, *command, *flags.split())[0] == 0
    assert given.items() >= options.items()
    expected = fastsr.upscale(made(), weights, scale=2, **options)
    np.testing.assert_array_equal(io.read(tmp_path / "b.png").pixels, expected)


def test_a_terminal_gets_words_and_a_bar(tmp_path, weights, monkeypatch, capsys):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    io.write(tmp_path / "a.png", Picture(made(), icc=PROFILE))
    (tmp_path / "bad.png").write_text("no image")
    command = ["upscale", str(tmp_path), "-o", str(tmp_path / "out"), "--model", weights, "--ext", "bmp", "-s", "3"]
    assert cli.main(command) == 1
    out, err = capsys.readouterr()
    assert f"{tmp_path}/a.png (8x6) -> {tmp_path}/out/a.bmp (24x18): CARN x3 on cpu, backend " in out
    assert "  note: the colour profile of the image does not fit this format" in out
    assert f"[{'#' * 15}{'.' * 15}] 1 of 2 a.png" in err
    assert "1 of 2 not done:\n" in err and "bad.png: cannot be read" in err
    assert cli.main([*command, "--resume"]) == 1
    assert "a.png -> " in (out := capsys.readouterr().out) and "done already" in out
    assert cli.main([*command, "--json"]) == 1
    assert all(json.loads(line) for line in capsys.readouterr().out.splitlines())


def test_results_in_the_folder_of_inputs_are_not_enlarged_again(tmp_path, weights, capsys):
    io.write(tmp_path / "a.png", Picture(made()))
    for _ in range(2):
        _, said, _ = run(capsys, tmp_path, "-o", tmp_path / "out", "--model", weights, "-s", 2)
        assert list(said) == ["a.png"]


def test_names_that_are_no_text(tmp_path, weights, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    io.write(tmp_path / name, Picture(made()))
    command = [tmp_path / name, "-o", tmp_path / "out", "--model", weights, "-s", 2]
    for expected in ("done", "skipped"):
        status, said, _ = run(capsys, *command, "--resume")
        assert status == 0 and said[name]["event"] == expected and (tmp_path / "out" / name).exists()


def test_all_jobs_and_their_targets(tmp_path):
    for name in ("in/a.png", "in/sub/a.png", "in/b.GIF", "b.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def targets(*inputs: str, **options: str) -> list[str]:
        jobs, folder = find_jobs([tmp_path / i for i in inputs], str(tmp_path / "out"), **options)
        assert folder == tmp_path / "out"
        return [job.target.relative_to(folder).as_posix() for job in jobs]

    assert targets("in", "b.jpeg") == ["a.png", "b.png", "sub/a.png", "b.jpeg"]
    assert targets("in", suffix="x4", extension="tif") == ["a_x4.tif", "b_x4.tif", "sub/a_x4.tif"]
    with pytest.raises(ValueError, match="both .*b.GIF and .*b.jpeg would be written here"):
        targets("in", "b.jpeg", extension="png")


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, folder, monkeypatch):
    original = os.scandir

    def denied(path):
        if Path(path) == folder / "c":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ValueError, match="c: this folder cannot be read: Permission denied"):
        find_jobs([folder], str(tmp_path / "out"))


# Resuming.


@pytest.fixture
def folder(tmp_path):
    """Three images of few pixels, one of them in a folder."""
    for number, name in enumerate(("a.png", "b.jpg", "c/d.png")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        io.write(tmp_path / "in" / name, Picture(made(seed=number)))
    return tmp_path / "in"


def test_resume_skips_what_is_proven_and_nothing_else(tmp_path, folder, weights, capsys):
    results = tmp_path / "out"
    command = [folder, "-o", results, "--model", weights, "-s", 2, "--resume"]

    def again(*more: object, arguments: list = command) -> list[str]:
        _, said, _ = run(capsys, *arguments, *more)
        return sorted(name for name, event in said.items() if event["event"] == "done")

    names = ["a.png", "b.jpg", "d.png"]
    assert again() == names and again() == []
    before = contents(results)
    (results / "a.png").write_bytes(before["a.png"][:-1] + b"x")
    assert again() == ["a.png"]
    (results / "b.jpg").unlink()
    assert again() == ["b.jpg"] and contents(results) == before
    io.write(folder / "c" / "d.png", Picture(made(seed=9)))
    assert again() == ["d.png"]
    assert again("--scale", 3) == names and again("--scale", 3) == []
    assert again("--dtype", "bfloat16") == names  # another model
    assert again("--self-ensemble") == names and again("--self-ensemble") == []
    other = tmp_path / "other.pth"
    state = torch.load(weights)
    state["exit.weight"] = state["exit.weight"] + 1e-3
    torch.save(state, other)
    assert again() == names
    assert again(arguments=[*command[:4], other, *command[5:]]) == names
    shutil.copy(weights, other)
    assert again() == names and again(arguments=[*command[:4], other, *command[5:]]) == []  # the name says nothing
    assert again(arguments=command[:-1]) == names  # without --resume all is done


def test_an_input_that_changes_meanwhile_is_not_journalled(tmp_path, folder, monkeypatch):
    def read(path):
        picture = io.Picture(made())
        path.write_bytes(b"changed")
        return picture

    monkeypatch.setattr(batch.io, "read", read)
    events = []
    jobs, out = find_jobs([folder / "a.png"], str(tmp_path / "out"))
    assert upscale_files(jobs, doubling(), out, resume=False, report=events.append) == 1
    assert "changed while it was being read" in events[1]["error"] and not out.exists()


def test_the_journal_survives_lines_that_were_cut_off(tmp_path):
    kept = Journal(tmp_path)
    entries = [Entry(f"{n}.png", "i", "m", "o", n, "s") for n in range(3)]
    kept.add(entries[0])
    whole = kept.path.read_bytes()
    for rest in (
        whole[: len(whole) // 2],
        b"\0" * 20,
        b"[" * 100_000,
        b'{"output": 1}',
        b"\xff",
        b"null",
        b'{"size":0}',
    ):
        kept.path.write_bytes(whole + rest)
        assert Journal(tmp_path).entries() == {"0.png": entries[0]}
        kept.add(entries[1])
        kept.add(entries[2])
        assert Journal(tmp_path).entries() == {e.output: e for e in entries}
    assert not kept.holds(entries[1])


def test_a_journal_that_cannot_be_written_fails_the_image_but_no_other(tmp_path, folder, capsys, weights):
    (tmp_path / "out" / journal.NAME).mkdir(parents=True)
    status, said, end = run(capsys, folder, "-o", tmp_path / "out", "--model", weights, "-s", 2)
    assert status == 1 and end["failed"] == 3 and journal.NAME in said["a.png"]["error"]


# Signals.


def doubling(action=lambda: None) -> Work:
    """Repeats every pixel, and does something meanwhile."""

    def enlarge(pixels, progress):
        action()
        return pixels.repeat(2, 0).repeat(2, 1)

    return Work(enlarge, 2, 2, "model", {}, {})


def ask_to_end(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def unmasked():
    """Signals as a program in a terminal has them, whoever started the tests: nohup and shells ignore some."""
    before = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("unmasked")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_abandons_what_is_being_computed(tmp_path, folder, number):
    jobs, out = find_jobs([folder], str(tmp_path / "out"))
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    count = iter(range(9))
    events = []
    work = doubling(lambda: ask_to_end(number) if next(count) == 1 else None)
    assert upscale_files(jobs, work, out, resume=False, report=events.append) == 128 + number
    assert events[-1] == {"event": "end", "done": 1, "skipped": 0, "failed": 0, "all": 3, "stopped": number.name}
    assert list(contents(out)) == ["a.png"] and list(Journal(out).entries()) == ["a.png"]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers
    assert upscale_files(jobs, doubling(), out, resume=True, report=events.append) == 0
    assert events[-1]["skipped"] == 1 and events[-1]["done"] == 2


@pytest.mark.parametrize("moment", ["open", "flock", "fsync", "replace", "write"])
def test_a_signal_while_writing_waits_until_it_is_written(tmp_path, folder, monkeypatch, moment):
    import fcntl

    jobs, out = find_jobs([folder], str(tmp_path / "out"))
    owner = fcntl if moment == "flock" else os
    original = getattr(owner, moment)

    def signalling(*arguments, **named):
        if moment != "open" or arguments[1] & os.O_CREAT:
            ask_to_end()
        return original(*arguments, **named)

    started = doubling(lambda: monkeypatch.setattr(owner, moment, signalling))
    assert upscale_files(jobs, started, out, resume=False, report=lambda event: None) == 128 + signal.SIGTERM
    monkeypatch.undo()
    entries = Journal(out).entries()
    assert list(contents(out)) == list(entries) == ["a.png"] and Journal(out).holds(entries["a.png"])


def test_large_tiffs_are_streamed(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(batch, "STREAMED", 100)
    streamed = []

    def stream(path, picture):
        streamed.append(path.name)
        if len(streamed) == 2:
            ask_to_end()
        io.write(path, picture)

    io.write(folder / "few.png", Picture(made(height=5, width=5)))
    io.write(folder / "alpha.png", Picture(made(channels=4)))
    jobs, out = find_jobs([folder], str(tmp_path / "out"), extension="tiff")
    events = []
    work = dataclasses.replace(doubling(), stream=stream)
    assert upscale_files(jobs, work, out, resume=True, report=events.append) == 128 + signal.SIGTERM
    assert upscale_files(jobs, work, out, resume=True, report=events.append) == 0
    assert streamed == ["a.tiff", "b.tiff", "b.tiff", "d.tiff"]
    entries = Journal(out).entries()
    assert entries.keys() == contents(out).keys() and all(map(Journal(out).holds, entries.values()))
    assert [e["size"] for e in events if e["event"] == "done"] == [[16, 12]] * 3 + [[10, 10]] + [[16, 12]]


def test_the_command_streams(tmp_path, folder, weights, monkeypatch, capsys):
    command = [folder, "--model", weights, "-s", 2, "--ext", "tiff"]
    assert run(capsys, *command, "-o", tmp_path / "whole")[0] == 0
    monkeypatch.setattr(batch, "STREAMED", 100)
    assert run(capsys, *command, "-o", tmp_path / "streamed")[0] == 0
    for name in ("a.tiff", "b.tiff", "c/d.tiff"):
        with Image.open(tmp_path / "streamed" / name) as image:
            assert image.tag_v2[322] == 256  # tiles
            np.testing.assert_array_equal(np.asarray(image), io.read(tmp_path / "whole" / name).pixels)


def test_warnings_are_noted_with_their_image(tmp_path, folder):
    jobs, out = find_jobs([folder / "a.png"], str(tmp_path / "out"))
    events = []
    for _ in range(2):
        work = doubling(lambda: [warnings.warn("computed again", stacklevel=1) for _ in range(2)])
        assert upscale_files(jobs, work, out, resume=False, report=events.append) == 0
    assert [e["notes"] for e in events if e["event"] == "done"] == [["computed again"]] * 2


def test_ignored_signals_stay_ignored(tmp_path, folder):
    jobs, out = find_jobs([folder], str(tmp_path / "out"))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        assert upscale_files(jobs, doubling(lambda: ask_to_end(signal.SIGHUP)), out, resume=False, report=print) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# Killing. The processes are forked from one that has imported everything, so that many of them take little time.


@pytest.fixture(scope="module")
def start():
    """Starts a function in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch.fx.experimental.symbolic_shapes"])  # torch imports it late
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server is not told otherwise where modules are
        multiprocessing.forkserver.ensure_running()

    def started(target, *arguments):
        process = context.Process(target=target, args=arguments)
        process.start()
        return process

    return started


def command_line(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the process ends with it)
    sys.exit(cli.main(arguments))


def resumed(source: Path, results: Path) -> int:
    jobs, out = find_jobs([source], str(results))
    return upscale_files(jobs, doubling(), out, resume=True, report=lambda event: None)


def dies_at(call: int, after: bool, source: Path, results: Path) -> None:
    """For a process that is killed right before or after the n-th call that changes the disk.

    Of a write before which it is killed, half has happened.
    """
    count = iter(range(1, 10_000))

    def deadly(function):
        def counted(*given, **named):
            last = next(count) == call
            if last and not after:
                if function is write:
                    write(given[0], given[1][: len(given[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*given, **named)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    write = os.write
    for name in ("write", "fsync", "replace"):
        setattr(os, name, deadly(getattr(os, name)))
    sys.exit(resumed(source, results))


def check_nothing_lies(results: Path, expected: dict[str, bytes]) -> None:
    """All that has a final name is complete, and what the journal says is so."""
    found = contents(results) if results.exists() else {}
    for name, data in found.items():
        assert data == expected.get(name) or name.endswith(".tmp"), f"{name} is neither complete nor temporary"
    kept = Journal(results)
    for name, entry in kept.entries().items():
        assert name in expected and kept.holds(entry), f"the journal lies about {name}"


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_step(tmp_path, folder, start, after):
    """Each time from nothing: killed at that step, then left alone."""
    (folder / "b.jpg").unlink()  # two images show it as well
    assert resumed(folder, tmp_path / "undisturbed") == 0
    expected, results = contents(tmp_path / "undisturbed"), tmp_path / "out"
    for call in range(1, 99):
        process = start(dies_at, call, after, folder, results)
        process.join()
        check_nothing_lies(results, expected)
        assert resumed(folder, results) == 0 and contents(results) == expected
        shutil.rmtree(results)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert call == 12  # five steps for each of the images, one more for the first line of the journal


def test_the_command_killed_at_random(tmp_path, folder, weights, start, capsys):
    """And asked to end, now and then."""
    assert run(capsys, folder, "-o", tmp_path / "undisturbed", "--model", weights, "-s", 2)[0] == 0
    expected, results = contents(tmp_path / "undisturbed"), tmp_path / "out"
    arguments = ["upscale", str(folder), "-o", str(results), "--model", weights, "--scale", "2", "--resume"]
    started = time.perf_counter()
    undisturbed = start(command_line, arguments)
    undisturbed.join()
    lasting = time.perf_counter() - started
    assert undisturbed.exitcode == 0 and contents(results) == expected
    shutil.rmtree(results)
    choose = random.Random(0)
    outcomes = set()
    for attempt in range(12):
        process = start(command_line, arguments)
        time.sleep(choose.uniform(0, lasting))
        (process.terminate if attempt % 3 == 2 else process.kill)()
        process.join()
        outcomes.add(process.exitcode)
        check_nothing_lies(results, expected)
        if contents(results).keys() == expected.keys():
            shutil.rmtree(results)
    assert -signal.SIGKILL in outcomes
    final = start(command_line, arguments)
    final.join()
    assert final.exitcode == 0 and contents(results) == expected
