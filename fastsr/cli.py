"""The command `fastsr`: enlarge photographs, measure networks, convert files of weights and say what they hold."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastsr
from fastsr import progress
from fastsr.checkpoints.normal import tuples
from fastsr.convert import convert
from fastsr.evaluate import PROTOCOLS, evaluate
from fastsr.image import io, tiles
from fastsr.image.batch import Event, Work, find_jobs, upscale_files
from fastsr.image.journal import network_digest
from fastsr.image.stream import upscale_to_tiff
from fastsr.image.upscale import (
    ZSSR,
    ZSSR_SCALES,
    as_network,
    as_segmentation,
    check_scale,
    default_device,
    next_scale,
    upscale,
)
from fastsr.info import DECIDERS, describe, info
from fastsr.models import Network, load
from fastsr.models.embedded import DEFAULT, DEFAULT_SCALE, EMBEDDED, is_embedded, weights_of
from fastsr.models.sftgan import SFTNet
from fastsr.optimize import optimize
from fastsr.progress import printable
from fastsr.tune import SECONDS, tune

DTYPES = ("float32", "bfloat16", "float16")


class Refused(Exception):
    """Something the user asked for that cannot be done; the message is for them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (sys.argv by default); returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    args = _parser().parse_args(arguments)
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except Refused as error:
        print(f"fastsr: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who read our output has gone, as in `| head`; the interpreter's last flush must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastsr", description="Super-resolution networks, made fast.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_upscale(commands)

    about = commands.add_parser("info", help="what a file of weights holds, or without FILE what is installed here")
    about.add_argument("file", nargs="?", type=Path, metavar="FILE")
    _add_hints(about)
    about.add_argument("--json", action="store_true", help="for a FILE: one JSON object")
    about.set_defaults(run=_info)

    change = commands.add_parser(
        "convert", help="write any file of weights in one form",
        description="Writes a network as safetensors under its own keys, with all that it takes to load it again.",
    )  # fmt: skip
    change.add_argument("source", type=Path, metavar="IN", help="a file of weights, of any format that is read")
    change.add_argument("target", type=Path, metavar="OUT.safetensors")
    _add_hints(change)
    change.set_defaults(run=_convert)

    measure = commands.add_parser(
        "evaluate", help="PSNR and SSIM on a folder of images",
        description="Shrinks the images of a folder, enlarges them again and compares, beside bicubic.",
    )  # fmt: skip
    measure.add_argument("model", type=Path, metavar="MODEL", help="a file of weights")
    measure.add_argument("folder", type=Path, metavar="FOLDER", help="8-bit images in their full size")
    measure.add_argument("--scale", type=int, metavar="N", help="the factor; needed where a file has several")
    measure.add_argument(
        "--protocol", choices=list(PROTOCOLS),
        help="how images are shrunk and compared; by default as the network's authors published it",
    )  # fmt: skip
    measure.add_argument(
        "--segmentation", metavar="FILE", help="for SFTGAN: the weights of the outdoor scene segmentation network"
    )
    measure.add_argument("--json", action="store_true", help="one JSON object")
    measure.set_defaults(run=_evaluate)

    faster = commands.add_parser(
        "tune", help="measure which kernels are fastest on this GPU",
        description="Runs a network on an image of noise, measures what can compute its operators, PyTorch's own "
        "kernels among it, and remembers in the cache directory what was fastest. From then on fastsr chooses by it on "
        "this device, with these versions, for networks as they are loaded and for what fastsr.optimize makes of them.",
    )  # fmt: skip
    faster.add_argument("model", metavar="WEIGHTS", help="a file of weights, or carn_m, which comes with fastsr")
    faster.add_argument(
        "--size", required=True, type=_height_width, metavar="HxW", help="of the small image, as 720x1280"
    )
    faster.add_argument("--scale", type=int, metavar="N", help="the factor; by default each that the file has")
    faster.add_argument("--dtype", choices=DTYPES, help="the network's (default: as the file has it)")
    faster.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1 ...")
    faster.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S",
        help="after which nothing new is begun (default %(default)g)",
    )  # fmt: skip
    faster.set_defaults(run=_tune)
    return parser


def _add_upscale(commands: Any) -> None:
    parser = commands.add_parser(
        "upscale", help="enlarge photographs",
        description="Enlarges images of 8 or 16 bits, also with alpha; profile, EXIF data and resolution are kept. "
        "A terminal gets a progress bar, a pipe or file one JSON object a line.",
    )  # fmt: skip
    parser.add_argument("inputs", nargs="*", type=Path, metavar="IN", help="an image, or a folder with all it holds")
    parser.add_argument("-i", "--input", action="append", default=[], type=Path, metavar="IN", help="the same")
    parser.add_argument(
        "-o", "--output", required=True, type=str, metavar="OUT",
        help="for a single IN a file, whose extension sets the format; else a folder, made if missing",
    )  # fmt: skip
    parser.add_argument(
        "--model", "-n", "--model_name", default=DEFAULT, metavar="NAME|FILE",
        help="a file of weights; or carn_m (default), which comes with fastsr; or zssr, which learns from the image",
    )  # fmt: skip
    parser.add_argument(
        "--scale", "-s", "--outscale", type=_number, metavar="N",
        help="the factor; needed where a file has several, 2 by default without a file. Between those that it has, "
        "the next larger is shrunk",
    )  # fmt: skip
    parser.add_argument(
        "--segmentation", metavar="FILE", help="for SFTGAN: the weights of the outdoor scene segmentation network"
    )
    parser.add_argument(
        "--iterations", type=int, metavar="N", help="for zssr: learn for at most so long (default 3000), less is faster"
    )
    parser.add_argument("--suffix", default="", metavar="WORD", help="in a folder, photo.png becomes photo_WORD.png")
    parser.add_argument(
        "--ext", default="auto", choices=("auto", *(e.removeprefix(".") for e in io.FORMATS)), metavar="EXT",
        help="in a folder, the format of all results: %(choices)s; auto (default) is that of each image",
    )  # fmt: skip
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ...; by default a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="the network's (default: as the file has it)")
    parser.add_argument("--fp32", dest="dtype", action="store_const", const="float32", help="--dtype float32")
    parser.add_argument(
        "--tile", "-t", type=_size, default=tiles.AUTO, metavar="N",
        help="pixels a side of the parts in which an image is enlarged; 0 is the whole image; auto (default) is that "
        "where it fits into memory, too",
    )  # fmt: skip
    parser.add_argument(
        "--tile-pad", "--tile_pad", type=_size, metavar="N",
        help="pixels around each part that it is computed with; exact is as far as the network looks, which is also "
        "the default but for ESRGAN and RDN",
    )  # fmt: skip
    parser.add_argument(
        "--self-ensemble",
        action="store_true",
        help="the mean of eight results, turned and mirrored: eight times as long",
    )
    parser.add_argument("--deterministic", action="store_true", help="the same bits, however much memory is free")
    parser.add_argument(
        "--resume", action="store_true",
        help="leave out what the journal in the folder of results proves done: the same input, model and options",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="JSON lines on a terminal, too")
    parser.set_defaults(run=_upscale)


def _size(text: str) -> int | str:
    return text if text in (tiles.AUTO, tiles.EXACT) else int(text)


def _height_width(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if int(height) < 1 or int(width) < 1:
        raise ValueError
    return int(height), int(width)


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _add_hints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hint", action="append", default=[], type=_hint, metavar="FIELD=VALUE",
        help="what no file says of a network's configuration, such as scale=3 or rgb_range=1; may be repeated",
    )  # fmt: skip


def _hint(text: str) -> tuple[str, Any]:
    field, _, value = text.partition("=")
    try:
        return field, tuples(json.loads(value))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE with a JSON value, got {text!r}") from error


def _info(args: argparse.Namespace) -> int:
    if args.file is None:
        if args.json or args.hint:
            raise Refused("info: --json and --hint are for a FILE of weights; name one")
        print(info())
        return 0
    network = _load(args.file, "cpu", args.hint)
    if args.json:
        print(json.dumps(describe(network), indent=2))
        return 0
    origin = network.origin
    scales = ", ".join(f"x{scale}" for scale in network.scales) or "none, it does not enlarge images"
    low, high = network.value_range
    print(f"{args.file}: {network.summary()}")
    print(f"scales: {scales}; colour: {network.colour}; values: {low:g}..{high:g}")
    print(f"variant: {origin.variant}; format: {origin.format}")
    for decider, meaning in DECIDERS.items():
        fields = [f"{f}={getattr(network.config, f)!r}" for f, who in origin.fields.items() if who == decider]
        if fields:
            print(f"{meaning}: {', '.join(fields)}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    try:
        network = convert(args.source, args.target, **dict(args.hint))
    except (ValueError, TypeError, OSError) as error:
        raise Refused(str(error)) from error
    print(f"{args.source} -> {args.target}: {network.summary()}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        raise Refused(f"{args.folder}: expected a folder of images; there is none")
    device = str(default_device(None))
    network = _load(args.model, device)
    segmentation = None if args.segmentation is None else _load(args.segmentation, device)

    def line(name: str, figures: dict[str, Any]) -> None:
        if not args.json:
            shown = "   ".join(_figures(f) for f in (figures, figures["bicubic"]))
            print(f"{shown}   {name}", flush=True)

    if not args.json:
        print("Y: PSNR  SSIM    RGB: PSNR SSIM   bicubic: Y       bicubic: RGB     image")
    try:
        result = evaluate(
            network, args.folder, scale=args.scale, protocol=args.protocol, segmentation=segmentation, progress=line
        )
    except (ValueError, TypeError, OSError) as error:
        raise Refused(str(error)) from error
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    line(f"mean of {len(result['images'])}", result["mean"])
    name = result["protocol"]
    print(f"{result['model']} x{result['scale']}, protocol {name}: {PROTOCOLS[name].summary}")
    return 0


def _tune(args: argparse.Namespace) -> int:
    try:
        device = torch.device(args.device or default_device(None))
        if device.type != "cuda" or not torch.cuda.is_available():
            raise Refused(f"tune: expected a CUDA device to measure; got {device}, and CUDA devices are "
                          f"{torch.cuda.device_count()}; a CPU's kernels need no tuning")  # fmt: skip
        network = as_network(_load(args.model, str(device)), dtype=args.dtype and getattr(torch, args.dtype))
        scales = network.scales if args.scale is None else [check_scale(network.name, network.scales, args.scale)]
        found = tune(_noise(network, scales, *args.size), network.device, seconds=args.seconds)
        print(found, *(f"not kept: {why}" for why in found.rejected), sep="\n  ")
    except (ValueError, TypeError, RuntimeError, OSError) as error:  # RuntimeError: torch, about a device
        raise Refused(f"tune: {error}") from error
    return 0


def _noise(network: Network, scales: Sequence[int], height: int, width: int) -> Callable[[], None]:
    """A call that enlarges an image of noise, by the network as it is and as fastsr.optimize makes it."""
    black, white = network.value_range
    like = {"device": network.device, "dtype": network.dtype}
    x = black + (white - black) * torch.rand(1, 1 if network.colour == "y" else 3, height, width, **like)
    more = {}
    if isinstance(network, SFTNet):
        size = network.config.classes, height * scales[0], width * scales[0]
        more["condition"] = torch.rand(1, *size, **like).softmax(1)
    networks = network, optimize(network)

    def run() -> None:
        for each in networks:
            for scale in scales:
                each.super_resolve(x, scale, **more)

    return run


def _figures(figures: dict[str, Any]) -> str:
    psnr = {c: "inf" if figures[f"psnr_{c}"] is None else f"{figures[f'psnr_{c}']:.4f}" for c in ("y", "rgb")}
    return "  ".join(f"{psnr[c]:>7} {figures[f'ssim_{c}']:.4f}" for c in ("y", "rgb"))


def _load(file: str | Path, device: str, hints: Sequence[tuple[str, Any]] = ()) -> Network:
    try:
        return load(weights_of(str(file)), device=device, **dict(hints))
    except (ValueError, TypeError, OSError) as error:
        names = f" (without a file, {', '.join(EMBEDDED)} is known, and to fastsr upscale zssr)"
        known = "" if Path(file).exists() else names
        raise Refused(f"{error}{known}") from error


def _upscale(args: argparse.Namespace) -> int:
    inputs = [*args.inputs, *args.input]
    if not inputs:
        raise Refused("no image to enlarge: expected IN or -i IN")
    try:
        jobs, folder = find_jobs(inputs, args.output, suffix=args.suffix, extension=args.ext)
    except ValueError as error:
        raise Refused(str(error)) from error
    if args.resume and folder is None:
        raise Refused(f"{args.output}: --resume needs a folder of results, in which it finds its journal")
    try:
        work = _zssr(args) if args.model == ZSSR else _network(args)
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: torch, about a device
        raise Refused(f"{args.model}: {error}") from error
    return upscale_files(jobs, work, folder, resume=args.resume, report=_Report(len(jobs), args.json))


def _network(args: argparse.Namespace) -> Work:
    device = args.device or str(default_device(None))
    network = as_network(_load(args.model, device), dtype=None if args.dtype is None else getattr(torch, args.dtype))
    given = None if args.segmentation is None else _load(args.segmentation, device)
    segmentation = as_segmentation(network, given)
    if args.iterations is not None:
        raise TypeError("--iterations are for zssr; this network has learnt")
    scale = DEFAULT_SCALE if args.scale is None and is_embedded(args.model) else args.scale
    factor, scale = next_scale(type(network).__name__, network.scales, scale)
    how = {"tile": args.tile or None, "tile_pad": args.tile_pad, "deterministic": args.deterministic}
    tiles.check(how["tile"], how["tile_pad"])

    def enlarge(image: Any, progress: Any) -> Any:
        return upscale(image, network, scale=scale, segmentation=segmentation, self_ensemble=args.self_ensemble, **how)

    def stream(path: Path, picture: io.Picture) -> None:
        upscale_to_tiff(path, picture, network, scale=factor, segmentation=segmentation, **how)

    options = {**how, "self_ensemble": args.self_ensemble}
    options["segmentation"] = None if segmentation is None else network_digest(segmentation)
    work = _work(enlarge, type(network).__name__, factor, scale, network_digest(network), device, options)
    return work if args.self_ensemble else dataclasses.replace(work, stream=stream)


def _zssr(args: argparse.Namespace) -> Work:
    from fastsr.train.zssr import ZSSRConfig  # here because training is not needed by anything else

    for name in ("segmentation", "dtype", "tile_pad", "self_ensemble", "deterministic"):
        if getattr(args, name):
            raise TypeError(f"--{name.replace('_', '-')} is for networks with weights, not for ZSSR")
    if args.tile not in (0, tiles.AUTO):
        raise TypeError("--tile is for networks with weights; ZSSR learns from the whole image")
    device = str(torch.device(args.device or default_device(None)))
    config = ZSSRConfig() if args.iterations is None else ZSSRConfig(max_iters=args.iterations)
    factor, scale = next_scale("ZSSR", ZSSR_SCALES, ZSSR_SCALES[0] if args.scale is None else args.scale)

    def enlarge(image: Any, progress: Any) -> Any:
        def learning(state: dict[str, Any]) -> None:
            done, most = state["iteration"] + 1, state["max_iters"]
            error = state["test_mse"] ** 0.5 * 255
            words = f"ZSSR has learnt for {done} of at most {most} iterations, error {error:.2f} levels"
            progress((state["step"] + done / most) / state["steps"], words)

        return upscale(image, ZSSR, scale=scale, config=config, progress=learning, device=device)

    options = {"config": dataclasses.asdict(config)}
    return _work(enlarge, "ZSSR", factor, scale, ZSSR, device, options)


def _work(enlarge: Any, name: str, factor: int, scale: float, model: str, device: str, options: dict[str, Any]) -> Work:
    options = {**options, "fastsr": fastsr.__version__, "scale": scale, "device": torch.device(device).type}
    return Work(enlarge, factor, scale, model, options, {"network": name, "scale": scale, "device": device})


class _Report:
    """Tells what happens: as JSON lines on stdout, or, where that is a terminal, in words and with a bar on stderr."""

    def __init__(self, jobs: int, as_json: bool) -> None:
        self.jobs = jobs
        self.json = as_json or not sys.stdout.isatty()
        self.bar = sys.stderr.isatty()
        self.finished = 0
        self.failed: list[str] = []
        self.tenths: tuple[str, int] = ("", -1)

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind in ("start", "progress"):
            share, words = event.get("share", 0.0), f": {event['words']}" if "words" in event else ""
            if self.bar:
                self._draw(share, f"{Path(event['input']).name}{words}")
            tenth = (event["input"], int(share * 10))
            if self.json and kind == "progress" and tenth != self.tenths:
                self._line(event)
            self.tenths = tenth
            return
        if self.bar:
            progress.clear()
        if self.json:
            self._line(event)
        elif kind == "done":
            sizes = ["x".join(map(str, event[key])) for key in ("size_before", "size")]
            print(
                printable(f"{event['input']} ({sizes[0]}) -> {event['output']} ({sizes[1]}): {event['network']} "
                       f"x{event['scale']} on {event['device']}, backend {', '.join(event['backends']) or 'none'}, "
                       f"{event['seconds']:.1f} s"),
                *(f"  note: {note}" for note in event["notes"]), sep="\n", flush=True,
            )  # fmt: skip
        elif kind == "skipped":
            print(printable(f"{event['input']} -> {event['output']}: done already"), flush=True)
        if kind == "failed":
            self.failed.append(event["error"])
        if kind == "end":
            self._end(event)
        else:
            self.finished += 1

    def _line(self, event: Event) -> None:
        print(json.dumps(event), flush=True)

    def _draw(self, share: float, words: str) -> None:
        progress.draw((self.finished + share) / self.jobs, f"{self.finished} of {self.jobs} {words}")

    def _end(self, event: Event) -> None:
        if "stopped" in event:
            done = event["done"] + event["skipped"]
            print(f"fastsr: stopped by {event['stopped']} after {done} of {event['all']}", file=sys.stderr)
        if self.failed:
            count = f"{len(self.failed)} of {event['all']} not done"
            print(f"fastsr: {count}:", *map(printable, self.failed), sep="\n  ", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
