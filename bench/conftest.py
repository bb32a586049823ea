"""Options of `pytest bench/`, and the fixture that measures: the first test of a case races all peers that were asked
for, the case's other tests show their part of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import ceilings, results, timing
from bench.peers import PEERS, RIVALS, Subject
from bench.races import Outcomes, hold

PLANS = {
    "network": timing.Plan(5, 25, 15.0),
    "patch": timing.Plan(7, 25, 8.0),
    "operator": timing.Plan(7, 25, 2.0),
    "large": timing.Plan(3, 15, 20.0),
    "accuracy": timing.Plan(0, 0, 0.0),
}
QUICK = {
    "network": timing.Plan(3, 7, 3.0),
    "patch": timing.Plan(3, 7, 3.0),
    "operator": timing.Plan(3, 7, 0.5),
    "large": timing.Plan(3, 5, 3.0),
    "accuracy": timing.Plan(0, 0, 0.0),
}
WITHOUT = {"compile", "ncnn"}  # what --quick leaves out


def pytest_addoption(parser):
    group = parser.getgroup("fastsr")
    group.addoption("--quick", action="store_true", help="few networks, small images, few rounds: five minutes")
    group.addoption("--with-compile", action="store_true", help="race torch.compile too; it compiles for minutes")
    group.addoption("--peers", help="only these peers, comma-separated; eager takes part always")
    group.addoption("--resume", action="store_true", help="leave out cases that this clean commit has rows of")
    group.addoption("--results", type=Path, help="the CSV file to append to; 'none' for none")


class Session:
    """What the tests of one run share: the options, the rows so far, and the last race."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.quick = config.getoption("quick")
        chosen = config.getoption("results")
        self.path = results.path_of() if chosen is None else None if str(chosen) == "none" else chosen
        self._last: tuple[object, Outcomes] | None = None
        self._done: set[tuple] | None = None

    def write(self, *rows: results.Row) -> None:
        """Appends rows to the file of results."""
        if self.path is not None:
            results.append(rows, self.path)

    def done(self, kind: str, name: str, sample: str, threads: int, engine: str | None = None) -> bool:
        """Whether --resume was given and this commit has such a row, of any engine if None: a race is written whole."""
        clean = not results.commit().endswith("+")  # files changed since would be taken for those that were measured
        if not (clean and self.config.getoption("resume") and self.path is not None and self.path.exists()):
            return False
        if self._done is None:
            rows = results.read(self.path)
            mine = [row for row in rows if row.commit == results.commit()]
            self._done = {(*row.case, engine) for row in mine for engine in (row.engine, None)}
        return (kind, name, sample, threads, engine) in self._done

    def race(self, key: tuple, plan: str, make: Callable[[], Subject], peers: list[str], **options) -> Outcomes:
        """The outcomes of a race, held when its key is new."""
        if self._last is None or self._last[0] != key:
            self._last = None  # what it holds is not needed any more
            plans = QUICK if self.quick else PLANS
            outcomes = hold(*key[:3], make, peers, plans[plan], **options)
            self.write(*outcomes.rows.values())
            self._last = key, outcomes
        return self._last[1]


_session = pytest.StashKey[Session]()


def session_of(config: pytest.Config) -> Session:
    """The one session of a run."""
    if _session not in config.stash:
        config.stash[_session] = Session(config)
    return config.stash[_session]


def chosen_peers(config: pytest.Config, names: list[str]) -> list[str]:
    """Those of `names` that the options ask for, in the order of PEERS."""
    only = config.getoption("peers")
    if only is not None:
        unknown = sorted(set(only.split(",")) - set(PEERS))
        if unknown:
            raise pytest.UsageError(f"--peers: expected names out of {', '.join(PEERS)}; got {', '.join(unknown)}")
        return [n for n in names if n in only.split(",") or n == "eager"]
    left_out = WITHOUT if config.getoption("quick") else set() if config.getoption("with_compile") else {"compile"}
    return [n for n in names if n not in left_out]


_recorded: list[float] = []


def recorded() -> float:
    """A timer for pytest-benchmark that reads measured times instead of a clock: the race has taken them already."""
    return _recorded.pop(0)


@pytest.fixture
def show(request):
    """show(key, plan, make, peer, **options): races the case of `key` (kind, name, sample, ...) unless it was the last,
    and gives this peer's times to pytest-benchmark; skips or fails with the peer's reason. The tests of one case stand
    together, and their parameter `peer` says who takes part. A test that times is marked benchmark(timer=recorded)."""
    session = session_of(request.config)
    base = request.node.nodeid.split("[")[0]
    here = [item for item in request.session.items if item.nodeid.split("[")[0] == base]
    params = {k: v for k, v in request.node.callspec.params.items() if k != "peer"}

    def same(item: pytest.Item) -> bool:
        return all(item.callspec.params.get(k) == v for k, v in params.items())

    racing = [item.callspec.params["peer"] for item in here if same(item)]
    racing = [name for name in PEERS if name in racing or name == "eager"]

    def run(key, plan, make, peer, **options):
        if session.done(*key[:3], torch.get_num_threads()):
            pytest.skip(f"measured at this commit already: {' '.join(map(str, key))}")
        outcomes = session.race(key, plan, make, racing, **options)
        if peer in outcomes.failed:
            pytest.fail(outcomes.failed[peer], pytrace=False)
        if peer in outcomes.absent:
            pytest.skip(outcomes.absent[peer])
        if peer in outcomes.times:
            benchmark = request.getfixturevalue("benchmark")
            benchmark.group = " ".join(map(str, key[:3]))
            benchmark.extra_info["row"] = dataclasses.asdict(outcomes.rows[peer])
            seconds = outcomes.times[peer].seconds
            _recorded[:] = [t for s in seconds for t in (0.0, s)]
            benchmark.pedantic(lambda: None, rounds=len(seconds))

    return run


@pytest.fixture(scope="session", autouse=True)
def measured_ceilings(request):
    """Every run begins with the machine's ceilings, and they stand beside its rows."""
    session = session_of(request.config)
    if session.path is None or session.done("ceiling", "machine", "", torch.get_num_threads()):
        return
    found = ceilings.measure("cuda" if torch.cuda.is_available() else "cpu", 0.1 if session.quick else ceilings.SECONDS)
    session.write(results.new(results.now(), "ceiling", "machine", "", "torch", extra=found))


def peers_of(config: pytest.Config, ours: tuple) -> list[str]:
    """The rivals and fastsr's own that take part."""
    return chosen_peers(config, [peer.name for peer in (*RIVALS, *ours)])
