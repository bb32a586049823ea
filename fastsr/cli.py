"""The command `fastsr`: enlarge photographs, measure networks, convert files of weights and say what they hold."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastsr.checkpoints.normal import tuples
from fastsr.convert import convert
from fastsr.evaluate import PROTOCOLS, evaluate
from fastsr.image import io
from fastsr.image.upscale import (
    ZSSR,
    ZSSR_SCALES,
    as_network,
    as_segmentation,
    check_scale,
    check_size,
    default_device,
    image_size,
    upscale,
)
from fastsr.info import DECIDERS, describe, info
from fastsr.models import Network, load
from fastsr.op import Call, explain


class Refused(Exception):
    """Something the user asked for that cannot be done; the message is for them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (sys.argv by default); returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except Refused as error:
        print(f"fastsr: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastsr", description="Super-resolution networks, made fast.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    enlarge = commands.add_parser("upscale", help="enlarge photographs", description="Enlarges 8-bit images.")
    enlarge.add_argument("inputs", nargs="+", type=Path, metavar="IN", help="an image file, or a folder of them")
    enlarge.add_argument(
        "-o", "--output", required=True, type=str, metavar="OUT",
        help="for a single IN a file, whose extension sets the format; else a folder, made if missing",
    )  # fmt: skip
    enlarge.add_argument(
        "--model", default="zssr", metavar="NAME|FILE",
        help="a file of weights, or zssr (default), which learns from the image itself",
    )  # fmt: skip
    enlarge.add_argument("--scale", type=int, metavar="N", help="the factor; needed where a file has several")
    enlarge.add_argument(
        "--segmentation", metavar="FILE", help="for SFTGAN: the weights of the outdoor scene segmentation network"
    )
    enlarge.add_argument(
        "--iterations", type=int, metavar="N", help="for zssr: learn for at most so long (default 3000), less is faster"
    )
    enlarge.set_defaults(run=_upscale)

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
    return parser


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


def _figures(figures: dict[str, Any]) -> str:
    psnr = {c: "inf" if figures[f"psnr_{c}"] is None else f"{figures[f'psnr_{c}']:.4f}" for c in ("y", "rgb")}
    return "  ".join(f"{psnr[c]:>7} {figures[f'ssim_{c}']:.4f}" for c in ("y", "rgb"))


def _load(file: str | Path, device: str, hints: Sequence[tuple[str, Any]] = ()) -> Network:
    try:
        return load(file, device=device, **dict(hints))
    except (ValueError, TypeError, OSError) as error:
        known = "" if Path(file).exists() else " (fastsr upscale knows zssr without a file)"
        raise Refused(f"{error}{known}") from error


def _upscale(args: argparse.Namespace) -> int:
    jobs = _jobs(args.inputs, args.output)
    device = str(default_device(None))
    network = None if args.model == ZSSR else _load(args.model, device)
    segmentation = None if args.segmentation is None else _load(args.segmentation, device)
    try:
        if network is None:
            if segmentation is not None:
                raise TypeError("--segmentation is for SFTGAN, not for ZSSR")
            name, scale = "ZSSR", check_scale("ZSSR", ZSSR_SCALES, args.scale or ZSSR_SCALES[0])
        else:
            name = type(as_network(network)).__name__
            scale = check_scale(name, network.scales, args.scale)
            as_segmentation(network, segmentation)
    except (ValueError, TypeError) as error:
        raise Refused(f"{args.model}: {error}") from error

    failed: dict[Path, str] = {}

    def fails(source: Path, error: Exception) -> None:
        failed[source] = str(error)
        print(f"fastsr: {error}" if str(source) in str(error) else f"fastsr: {source}: {error}", file=sys.stderr)

    for source, target in jobs:  # what can be refused is refused before the first long computation
        try:
            height, width = image_size(io.read_image(source))
            check_size(height, width, scale)
            io.check_writable(target, width * scale, height * scale)
        except (OSError, ValueError) as error:
            fails(source, error)
    for source, target in jobs:
        if source in failed:
            continue
        try:
            image = io.read_image(source)
            started = time.perf_counter()
            made, calls = _enlarge(image, network, segmentation, scale, _Progress(source.name), args)
            seconds = time.perf_counter() - started
            target.parent.mkdir(parents=True, exist_ok=True)
            io.write_image(target, made)
        except Exception as error:  # one bad image must not take the results of the others with it
            fails(source, error)
            continue
        backends = ", ".join(sorted({call.backend for call in calls}))
        sizes = [f"{w}x{h}" for w, h in (image.size, made.size)]
        print(
            f"{source} ({sizes[0]}) -> {target} ({sizes[1]}): "
            f"{name} x{scale} on {device}, backend {backends}, {seconds:.1f} s"
        )
    if failed:
        print(f"fastsr: {len(failed)} of {len(jobs)} not done:", *failed, sep="\n  ", file=sys.stderr)
    return 1 if failed else 0


def _enlarge(
    image: Image.Image,
    network: Network | None,
    segmentation: Network | None,
    scale: int,
    progress: _Progress,
    args: argparse.Namespace,
) -> tuple[Image.Image, list[Call]]:
    """The larger image, and the operator calls that made it."""
    made: list[Image.Image] = []
    if network is not None:
        calls = explain(lambda: made.append(upscale(image, network, scale=scale, segmentation=segmentation)))
    else:
        from fastsr.train.zssr import ZSSRConfig

        config = ZSSRConfig() if args.iterations is None else ZSSRConfig(max_iters=args.iterations)
        with progress:
            calls = explain(lambda: made.append(upscale(image, ZSSR, scale=scale, config=config, progress=progress)))
    return made[0], calls


def _jobs(inputs: Sequence[Path], output: str) -> list[tuple[Path, Path]]:
    """(image file, file to write) for every input, folders opened. Raises Refused where two would meet in one file, or
    a result would replace an input."""
    sources: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in io.FORMATS and p.is_file())
            if not found:
                raise Refused(f"{path}: no images in this folder (looked for {', '.join(io.FORMATS)})")
            sources += found
        elif path.exists():
            sources.append(path)
        else:
            raise Refused(f"{path}: no such file or folder")

    out = Path(output)
    is_file = out.suffix.lower() in io.FORMATS and not out.is_dir() and not output.endswith("/")
    if is_file and (len(inputs) > 1 or inputs[0].is_dir()):
        raise Refused(f"{out}: several images need a folder to go to, and this looks like a file")
    if out.exists() and not is_file and not out.is_dir():
        raise Refused(f"{out}: expected a folder, or a file with one of the extensions {', '.join(io.FORMATS)}")
    targets = [out] if is_file else [out / source.name for source in sources]

    jobs = list(zip(sources, targets, strict=True))
    first_for: dict[Path, Path] = {}
    for source, target in jobs:
        if target in first_for:
            raise Refused(f"{target}: both {first_for[target]} and {source} would be written here; use two calls")
        first_for[target] = source
        if target.exists() and any(target.samefile(other) for other in sources):
            raise Refused(f"{target}: this result would replace an input; choose another -o")
    return jobs


class _Progress:
    """A bar on stderr, redrawn in place on a terminal; elsewhere one line every tenth of the way."""

    WIDTH = 30

    def __init__(self, label: str) -> None:
        self.label = label
        self.terminal = sys.stderr.isatty()
        self.tenths = -1
        self.drawn = False

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.drawn and self.terminal:
            print(file=sys.stderr)

    def __call__(self, state: dict[str, Any]) -> None:
        done, most = state["iteration"] + 1, state["max_iters"]
        share = (state["step"] + done / most) / state["steps"]
        error = state["test_mse"] ** 0.5 * 255
        text = f"{self.label}: ZSSR has learnt for {done} of at most {most} iterations, error {error:.2f} levels"
        if self.terminal:
            filled = round(share * self.WIDTH)
            print(f"\r[{'#' * filled}{'.' * (self.WIDTH - filled)}] {text} ", end="", file=sys.stderr, flush=True)
            self.drawn = True
        elif int(share * 10) > self.tenths:
            self.tenths = int(share * 10)
            print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
