"""`python -m bench report` draws what was measured; `profile` says where the time of a network goes on a CPU;
`compare --base REV` measures against a commit; `tune` measures which kernels are fastest on this GPU, and writes the
table of its architecture, to be committed."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fastsr
from bench import results, timing
from bench.compare import compare, resolve
from bench.goals import OWN, verdicts
from bench.networks import CASES, ROOT, build, inputs_of
from bench.peers import OURS
from bench.profile import lines_of, profile
from bench.report import write
from fastsr import _tables, _triton
from fastsr import tune as tuning

TUNED_SIZES = (128, 512)  # maps of each class of `choice_key`
TUNED_DTYPES = ("bfloat16", "float16", "float32")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="an HTML page and charts from results")
    report.add_argument("files", nargs="*", type=Path, help="CSV, or JSON of --benchmark-json; default: this machine's")
    report.add_argument("--to", type=Path, default=ROOT / "out" / "bench", help="folder for the page and the charts")
    report.add_argument("--base", metavar="REV", help="a column: speed over the rows that this commit has")
    report.add_argument("--readme", action="store_true", help="write README's table too")
    change = commands.add_parser("compare", help="networks at an earlier commit and now, in turns")
    change.add_argument("--base", metavar="REV", required=True, help="commit, branch or tag to compare with")
    change.add_argument("-n", "--network", action="append", choices=CASES, help="several are possible; default: all")
    change.add_argument(
        "-s", "--size", action="append", type=int, help="of the small image; default: that of the goals"
    )
    change.add_argument("-p", "--peer", action="append", choices=[p.name for p in OURS], help="default: fastsr-f32")
    change.add_argument("--seconds", type=float, default=20.0, help="for each network, size and peer; default: 20")
    inside = commands.add_parser("profile", help="where the time of a network goes on a CPU; rows for the report")
    inside.add_argument("-n", "--network", action="append", choices=CASES, help="several are possible; default: all")
    inside.add_argument("-s", "--size", type=int, help="of the small image; default: that of the goals")
    inside.add_argument("-p", "--peer", action="append", choices=OWN.values(), help="default: both")
    inside.add_argument("--lines", type=int, default=8, help="how many to print of each; default: 8")
    tuning = commands.add_parser("tune", help="write fastsr/tuned/<arch>.json: which kernels are fastest on this GPU")
    tuning.add_argument("-n", "--network", action="append", choices=CASES, help="several are possible; default: all")
    tuning.add_argument(
        "-s", "--size", action="append", type=int, help="of the small image; default: small and large maps"
    )
    tuning.add_argument("-d", "--dtype", action="append", choices=TUNED_DTYPES, help="default: all")
    tuning.add_argument("--seconds", type=float, default=120.0, help="for each network, size and dtype; default: 120")
    return top


def rows_at(rows: Sequence[results.Row], commit: str) -> list[results.Row]:
    """The rows that a commit, given by its full hash, was measured with. Raises ValueError if there are none."""
    found = [r for r in rows if commit.startswith(r.commit)]
    if not found:
        raise ValueError(f"--base: no rows of {commit[:10]}; `python -m bench compare --base` measures it")
    return found


def report(args: argparse.Namespace) -> None:
    """Writes the page and prints where it is and how many goals are met."""
    rows = [row for path in args.files or [results.path_of()] for row in results.read(path)]
    base = rows_at(rows, resolve(args.base)) if args.base else []
    path = write(rows, args.to, base, args.base or "", args.readme)
    found = verdicts(results.latest(rows))
    print(f"{path}: {sum(v.met is True for v in found)} of {len(found)} goals met, "
          f"{sum(v.met is None for v in found)} not measured")  # fmt: skip
    for v in found:
        if v.met is False:
            print(f"  missed: {v.goal}: wanted {v.wanted}, measured {v.measured}")


def change(args: argparse.Namespace) -> None:
    """Prints a line a case as it is measured."""
    print(f"{'network':12} {'size':>5} {'engine':14} {'before, ms':>11} {'now, ms':>9} {'speed-up':>9}   20 to 80 %")
    plan = timing.Plan(5, 200, args.seconds)
    for c in compare(args.base, args.network or [*CASES], args.size or [], args.peer or ["fastsr-f32"], plan):
        low, high = c.spread
        print(f"{c.name:12} {c.size:5} {c.peer:14} {c.before.median * 1e3:11.1f} {c.now.median * 1e3:9.1f} "
              f"{c.speedup:8.2f}x   {low:.2f} to {high:.2f}", flush=True)  # fmt: skip


def inside(args: argparse.Namespace) -> None:
    """Prints the longest steps of each network, and appends a row for each to this machine's results."""
    for name in args.network or CASES:
        for engine in args.peer or OWN.values():
            row = profile(name, args.size, engine)
            results.append([row])
            lines = lines_of(row)
            print(f"{name} {row.sample} {engine}: {row.extra['ms']:.1f} ms, steps {sum(x.ms for x in lines):.1f} ms")
            for x in lines[: args.lines]:
                print(
                    f"  {x.ms:8.2f} ms  {x.count:4} times  {x.gflop / x.ms * 1e3:7.0f} GFLOP/s  {x.label}", flush=True
                )


def tune(args: argparse.Namespace) -> None:
    """Adds to the committed table what is not in it yet; prints a line for each network, size and dtype."""
    if not torch.cuda.is_available():
        raise RuntimeError("expected a CUDA device, whose kernels are measured; there is none")
    device = torch.device("cuda", torch.cuda.current_device())
    path = _tables.committed(_triton.identity(device).arch)
    for name in args.network or CASES:
        for dtype in args.dtype or TUNED_DTYPES:
            network = build(CASES[name]).to(device)
            network.network = fastsr.optimize(network.network, dtype=getattr(torch, dtype))
            for size in args.size or TUNED_SIZES:
                inputs = [x.to(device) for x in inputs_of(network, size)]
                run = functools.partial(network, *inputs)
                found = tuning.tune(run, device, seconds=args.seconds, again=False, path=path)
                lines = f"{name:12} {size:5} {dtype:9} {found}", *(f"  not kept: {why}" for why in found.rejected)
                print(*lines, sep="\n", flush=True)


def main() -> int:
    """Runs a command; a ValueError, FileNotFoundError or RuntimeError is a message on stderr and the status 1."""
    args = parser().parse_args()
    try:
        {"report": report, "profile": inside, "compare": change, "tune": tune}[args.command](args)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"python -m bench {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
