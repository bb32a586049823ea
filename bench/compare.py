"""`python -m bench compare --base REV`: an earlier commit and the files as they are now, in turns.

Each side is a process with its own copy of fastsr, the earlier one built in a temporary worktree, with this commit's
benchmarks. The two never compute at the same time: one is asked for a time, then the other.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.networks import CASES, ROOT, build, inputs_of


def resolve(revision: str) -> str:
    """The full hash of a revision. Raises ValueError if there is none of that name."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"--base: expected a commit, branch or tag of this repository; got {revision!r}")
    return done.stdout.strip()


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A temporary worktree of a commit, compiled, with this commit's `bench`."""
    folder = Path(tempfile.mkdtemp(prefix="fastsr-base-"))
    tree = folder / "tree"
    subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(tree), commit], cwd=ROOT, check=True)
    try:
        shutil.rmtree(tree / "bench", ignore_errors=True)
        shutil.copytree(ROOT / "bench", tree / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
        build_command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        environment = os.environ | ({} if torch.cuda.is_available() else {"FASTSR_CUDA": "0"})
        subprocess.run(build_command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
        yield tree
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
        shutil.rmtree(folder, ignore_errors=True)


class Side:
    """A process that prepares cases and times single calls of them when asked."""

    def __init__(self, tree: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(tree)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.compare"], cwd=tree, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, *question: Any) -> Any:
        """The answer to a question, as `answer` gives it. Raises RuntimeError with the side's message."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with status {self._process.wait()}; its message is above")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["value"]

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


@dataclass(frozen=True)
class Change:
    """A case's times before and now, in turns."""

    name: str
    size: int
    peer: str
    before: timing.Times
    now: timing.Times

    @property
    def speedup(self) -> float:
        """How many times faster it is now."""
        return self.before.median / self.now.median

    @property
    def spread(self) -> tuple[float, float]:
        """The 20 and 80 percent quantiles of the ratios of neighbouring calls."""
        ratios = timing.Times(tuple(b / n for b, n in zip(self.before.seconds, self.now.seconds, strict=True)))
        return ratios.quantile(0.2), ratios.quantile(0.8)


def compare(
    base: str, names: Sequence[str], sizes: Sequence[int], peers: Sequence[str], plan: timing.Plan
) -> Iterator[Change]:
    """Yields the change of each case; an empty `sizes` is the size of each network's goals."""
    with checkout(resolve(base)) as tree, contextlib.ExitStack() as stack:
        sides = [Side(tree), Side(ROOT)]
        for side in sides:
            stack.callback(side.close)
        for name in names:
            for size in sizes or (CASES[name].size,):
                for peer in peers:
                    for side in sides:
                        side.ask("prepare", name, size, peer)
                    runs = {i: functools.partial(side.ask, "time") for i, side in enumerate(sides)}
                    found = _turns(runs, plan)
                    yield Change(name, size, peer, *found)


def _turns(runs: dict[int, Any], plan: timing.Plan) -> tuple[timing.Times, timing.Times]:
    """Asks both in turns, the one that is first changing, until the plan is done."""
    times: dict[int, list[float]] = {0: [], 1: []}
    began = time.perf_counter()
    for done in range(plan.most):
        if done >= plan.rounds and time.perf_counter() - began > plan.budget:
            break
        for i in (0, 1) if done % 2 == 0 else (1, 0):
            times[i].append(runs[i]())
    return timing.Times(tuple(times[0])), timing.Times(tuple(times[1]))


class _Worker:
    """The other end of a Side."""

    def prepare(self, name: str, size: int, peer: str) -> None:
        """Builds a case and calls it twice."""
        from bench.peers import PEERS, Subject

        module = build(CASES[name])
        self._run = PEERS[peer].prepare(Subject(module, inputs_of(module, size)))
        self._run()
        self._last = timing.wall(self._run)

    def time(self) -> float:
        """Seconds of one call, after a pause and an untimed one."""
        time.sleep(timing.PAUSE)
        if self._last < timing.LONG:
            self._run()
        self._last = timing.wall(self._run)
        return self._last


def _serve() -> None:
    worker = _Worker()
    with torch.inference_mode():
        for line in sys.stdin:
            what, *arguments = json.loads(line)
            try:
                reply = {"value": getattr(worker, what)(*arguments)}
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _serve()
