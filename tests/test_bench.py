"""The benchmarks' own arithmetic, on made-up times and rows: nothing here measures a speed."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsr
from bench import goals, networks, peers, profile, races, report, results, timing, work
from bench.__main__ import parser, rows_at
from bench.compare import Change, resolve
from bench.results import Row
from fastsr import _library
from fastsr.train.trainer import PlainOperators

RACE = "2026-01-01T00:00:00.000+00:00"


def row(engine: str, median_us: float | None = 1000.0, name: str = "carn", **values) -> Row:
    given = {"commit": "abc", "device": "A Processor", "threads": 2, "kind": "network", "sample": "128x128"}
    return Row(**{"race": RACE, **given, "name": name, "engine": engine, "median_us": median_us, **values})


# Timing.


class Clock:
    """Time that passes only in calls: each contender takes what it is told to."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.order, self.pauses = 0.0, [], 0
        self.runs = {name: self._run(name, taken) for name, taken in seconds.items()}

    def _run(self, name: str, taken: float):
        def run() -> None:
            self.order.append(name)
            self.now += taken

        return run

    def time(self, run) -> float:
        before = self.now
        run()
        return self.now - before

    def pause(self, seconds: float) -> None:
        assert seconds >= 0.01
        self.pauses += 1


def test_a_race_times_every_contender_as_often_and_in_turns():
    clock = Clock(a=0.1, b=0.3)
    times = timing.race(clock.runs, timing.Plan(3, 3, 0.0), clock.time, clock.pause)
    assert {name: [pytest.approx(s) for s in t.seconds] for name, t in times.items()} == {
        "a": [0.1] * 3, "b": [0.3] * 3
    }  # fmt: skip
    assert clock.pauses == 6
    warm = ["a", "a", "b", "b"]  # a first call and one that tells how long it takes
    assert clock.order == [*warm, "a", "a", "b", "b", "b", "b", "a", "a", "a", "a", "b", "b"]


def test_a_long_call_has_no_untimed_one_before_it():
    clock = Clock(slow=2 * timing.LONG)
    timing.race(clock.runs, timing.Plan(2, 2, 0.0), clock.time, clock.pause)
    assert len(clock.order) == 2 + 2


def test_a_race_ends_at_its_most_rounds_and_not_before_its_least():
    clock = Clock(a=0.01)
    assert len(timing.race(clock.runs, timing.Plan(4, 9, -1.0), clock.time, clock.pause)["a"].seconds) == 4
    assert len(timing.race(clock.runs, timing.Plan(4, 9, 1e9), clock.time, clock.pause)["a"].seconds) == 9


def test_quantiles_are_interpolated():
    times = timing.Times((4.0, 1.0, 3.0, 2.0))
    assert (times.quantile(0.0), times.median, times.quantile(1.0)) == (1.0, 2.5, 4.0)
    assert timing.Times((7.0,)).quantile(0.2) == 7.0


# What is raced.


def test_the_graph_that_rivals_get_computes_what_the_module_does():
    network = fastsr.create("idn", scale=2, blocks=1)
    module = networks.Enlarge(network.requires_grad_(False), 2, False).eval()
    subject = peers.Subject(module, (torch.rand(1, 1, 9, 8),))
    with torch.inference_mode():
        expected = races.exact(subject)
        assert races.relative_error(subject.graph(*subject.inputs), expected) < 1e-6
    targets = {str(node.target) for node in subject.exported.graph.nodes if node.op == "call_function"}
    assert targets and not [t for t in targets if "fastsr" in t]


class Tiny(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.fixture
def tiny(monkeypatch):
    """A subject that doubles its input, and peers whose results can be chosen."""
    subject = peers.Subject(Tiny(), (torch.rand(1, 1, 4, 4) + 0.1,))
    chosen = {}

    def add(name, result, dtype="f32", ours=False):
        chosen[name] = peers.Peer(name, dtype, lambda s: lambda: result(*s.inputs), ours)

    monkeypatch.setattr(races, "PEERS", chosen)
    return subject, add


def test_a_rival_with_a_wrong_result_is_left_out_and_fastsr_fails(tiny):
    subject, add = tiny
    add("eager", lambda x: 2 * x)
    add("wrong", lambda x: 2.01 * x)
    add("shape", lambda x: x[..., :2])
    add("nan", lambda x: x * math.nan)
    add("ours", lambda x: 2.001 * x, ours=True)
    add("broken", lambda x: x.no_such_thing)
    outcomes = races.Outcomes()
    runs, accuracy = races.prepare(
        subject, ["eager", "wrong", "shape", "nan", "ours", "broken"], races.exact(subject), outcomes
    )
    assert list(runs) == list(accuracy) == ["eager"]
    assert outcomes.absent.keys() == {"wrong", "shape", "nan", "broken"}
    assert "1.0e-04 is right" in outcomes.absent["wrong"]
    assert outcomes.failed.keys() == {"ours"}


def test_rows_of_a_race_hold_work_accuracy_and_times(tiny):
    subject, add = tiny
    add("eager", lambda x: 2 * x)
    add("bf16", lambda x: (2 * x).bfloat16(), dtype="bf16")
    found = races.hold("network", "n", "4x4", lambda: subject, ["eager", "bf16"], timing.Plan(2, 2, 0.01))
    assert not found.absent and not found.failed
    eager, half = found.rows["eager"], found.rows["bf16"]
    assert eager.error == 0 and eager.psnr_db == math.inf and eager.rounds == 2
    assert 0 < half.error < 1e-2 and 30 < half.psnr_db < 90
    assert eager.race == half.race and eager.extra == {"pixels": 16}
    assert eager.p20_us <= eager.median_us <= eager.p80_us
    untimed = races.hold("accuracy", "n", "4x4", lambda: subject, ["eager"], timing.Plan(0, 0, 0.0))
    assert untimed.rows["eager"].median_us is None and untimed.times == {}


def test_psnr_takes_the_range_of_the_truth_as_its_peak():
    truth = torch.tensor([-1.0, 3.0], dtype=torch.float64)
    assert races.psnr(truth + 0.04, truth) == pytest.approx(40.0)


def test_every_network_has_a_case_with_an_image_in_its_range():
    for case in networks.CASES.values():
        module = networks.build(case)
        image, *rest = networks.inputs_of(module, 8)
        black, white = module.network.value_range
        assert image.shape[2:] == (8, 8) and black <= image.min() < image.max() <= white
        assert image.is_contiguous() and image.dtype == torch.float32
        assert len(rest) == (case.name == "sftgan")
        assert not any(p.requires_grad for p in module.parameters())


# Work.


class Layers(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(shape) for shape, _ in layers])
        self.options = [options for _, options in layers]

    def forward(self, x):
        for w, options in zip(self.weights, self.options, strict=True):
            options = dict(options)
            x = (F.conv_transpose2d if options.pop("transposed", False) else F.conv2d)(x, w, **options)
        return x


@pytest.mark.parametrize(
    ("channels", "weight", "options", "multiplications", "gain_f32", "gain_bf16"),
    [
        (64, (64, 64, 3, 3), {"padding": 1}, 100 * 9 * 64 * 64, 4, 4),
        (64, (64, 16, 3, 3), {"padding": 1, "groups": 4}, 100 * 9 * 16 * 64, 4, 4),
        (64, (64, 64, 5, 5), {"padding": 2}, 100 * 25 * 64 * 64, 225 / 49, 100 / 36),
        (3, (64, 3, 3, 3), {"padding": 1}, 100 * 9 * 3 * 64, 1, 0.5),
        (64, (32, 64, 1, 1), {}, 100 * 64 * 32, 1, 1),
        (64, (64, 64, 8, 8), {"stride": 4, "padding": 2, "transposed": True}, 100 * 64 * 64 * 64, 64 / 25, 36 / 16),
        (64, (64, 64, 6, 6), {"stride": 2, "padding": 2}, 25 * 36 * 64 * 64, 4, 4),
    ],
)
def test_work_of_a_layer(channels, weight, options, multiplications, gain_f32, gain_bf16):
    found = work.layers(Layers([(weight, options)]), (torch.zeros(1, channels, 10, 10),))
    assert work.gflop(found) * 1e9 == pytest.approx(2 * multiplications)
    assert work.gflop(found) / work.floor_gflop(found, "f32") == pytest.approx(gain_f32)
    assert work.gflop(found) / work.floor_gflop(found, "bf16") == pytest.approx(gain_bf16)


def test_work_of_a_network_counts_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    module = networks.build(networks.CASES["dbpn"])
    inputs = networks.inputs_of(module, 4)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), PlainOperators():
        module(*inputs)
    assert work.gflop(work.layers(module, inputs)) == pytest.approx(counter.get_total_flops() / 1e9)
    outside = work.layers(module, inputs)
    with torch.inference_mode():  # as races are held
        assert work.layers(module, inputs) == outside


# Results.


def test_rows_are_appended_and_read_back(tmp_path):
    path = tmp_path / "deep" / "file.csv"
    first = row("eager", 1234.5, error=1.5e-7, psnr_db=120.25, rounds=7, extra={"pixels": 9}, versions="torch=2")
    second = row("fastsr-f32", None, sample="with, comma", psnr_db=math.inf)
    results.append([first], path)
    results.append([second], path)
    assert results.read(path) == [first, second]
    assert len(path.read_text().splitlines()) == 3
    path.write_text(path.read_text().replace("median_us", "median_ms"))
    with pytest.raises(ValueError, match="expected the columns race"):
        results.read(path)


def test_rows_are_read_from_the_json_of_pytest_benchmark(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"benchmarks": [
        {"extra_info": {"row": dataclasses.asdict(row("eager"))}}, {"extra_info": {}},
    ]}))  # fmt: skip
    assert results.read(path) == [row("eager")]


def test_the_last_race_of_a_case_replaces_the_earlier_whole():
    later = RACE.replace("2026", "2027")
    rows = [row("eager"), row("ncnn"), row("eager", 5.0, race=later), row("eager", sample="48x48")]
    assert results.latest(rows) == rows[2:]
    memory = [row("eager", None, kind="memory"), row("fastsr-f32", None, kind="memory", race=later)]
    assert results.latest(memory) == memory  # measured one by one


def test_a_device_is_a_file_name():
    assert results.slug("AMD EPYC 9B14 (2 cores)") == "amd-epyc-9b14-2-cores"


# Goals.


def test_speedups_are_over_the_fastest_rival_of_the_same_dtype_and_race():
    rows = [row("eager", 900.0), row("openvino-f32", 600.0), row("openvino-bf16", 300.0), row("fastsr-f32", 200.0),
            row("fastsr-module", 100.0), row("fastsr-bf16", 100.0), row("fastsr-f32", 1.0, threads=1)]  # fmt: skip
    table = goals.Table(rows)
    key = table.full("carn")
    assert table.threads == 2
    assert table.speedup(key, "f32") == pytest.approx(3.0)
    assert table.speedup(key, "f32", "eager") == pytest.approx(4.5)
    assert table.speedup(key, "bf16") == pytest.approx(3.0)
    assert table.speedup(key, "f32", "ncnn") is None
    assert table.speedup(("carn", "48x48"), "f32") is None


def verdict(rows, start):
    (found,) = [v for v in goals.verdicts(rows) if v.goal.startswith(start)]
    return found


def test_a_goal_is_met_missed_or_not_measured():
    rows = [row("openvino-f32", 299.0), row("fastsr-f32", 100.0), row("eager", 450.0)]
    assert verdict(rows, "fp32 CARN over OpenVINO").met is False
    assert verdict(rows, "fp32 CARN over eager").met is True
    assert verdict(rows, "fp32 rcan").met is None and verdict(rows, "fp32 rcan").measured == "not measured"
    mean = [*rows, row("eager", 200.0, "idn"), row("fastsr-f32", 100.0, "idn")]
    assert verdict(mean, "fp32 geometric").measured == "2.45x (of 2 networks)"


def test_accuracy_in_bfloat16_is_compared_with_autocast():
    rows = [row("autocast-bf16", psnr_db=55.8), row("fastsr-bf16", psnr_db=60.0),
            row("autocast-bf16", name="idn", psnr_db=50.0), row("fastsr-bf16", name="idn", psnr_db=49.0)]  # fmt: skip
    assert verdict(rows[:2], "bf16 PSNR").met is True
    assert verdict(rows, "bf16 PSNR").measured == "idn 49.0 < 50.0 dB"


def memory(engine, call, kept=0, packed=0, name="rdn"):
    extra = {"call": call, "kept": kept, "packed": packed, "prepared": 7, "output": 1}
    return row(engine, None, name, kind="memory", sample="256x256", extra=extra)


def test_memory_counts_what_stays_but_not_packed_weights():
    rows = [memory("eager", 100), memory("fastsr-f32", 50, kept=20, packed=15)]
    assert goals.memory_shares(rows) == {("rdn", "256x256", "fastsr-f32"): pytest.approx(0.55)}
    assert verdict(rows, "memory over eager's, rdn").met is True
    assert verdict([rows[0], memory("fastsr-f32", 61)], "memory over eager's, rdn").met is False


def test_cells_below_eager_are_listed_slowest_first():
    rows = [row("eager", 100.0), row("fastsr-f32", 99.0), row("fastsr-module", 125.0), row("ncnn", 900.0),
            row("eager", 10.0, "rcab", kind="operator"), row("fastsr-cpu-f32", 100.0, "rcab", kind="operator"),
            row("fastsr-f32", 500.0, sample="7x7")]  # fmt: skip
    found = [(r.engine, speed) for r, speed in goals.below_eager(rows)]
    assert found == [("fastsr-cpu-f32", pytest.approx(0.1)), ("fastsr-module", pytest.approx(0.8))]
    assert verdict(rows, "cells slower").met is False
    assert verdict(rows[:2], "cells slower").met is True


# The report and the command line.


@pytest.fixture
def rows():
    ceiling = row(
        "torch", None, "machine", kind="ceiling", sample="", extra={"f32": 200.0, "bf16": 400.0, "copy": 20.0}
    )
    made = [
        row(engine, time, gflop=51.7, floor_gflop=17.3, psnr_db=80.0, others=0.3, extra={"pixels": 512 * 512})
        for engine, time in (("eager", 4e5), ("openvino-f32", 3e5), ("fastsr-f32", 1e5), ("fastsr-module", 5e5))
    ]
    return [ceiling, *made, memory("eager", 100 << 20), memory("fastsr-f32", 50 << 20)]


def test_the_report_is_one_page_with_what_was_measured(rows, tmp_path):
    pytest.importorskip("matplotlib")
    path = report.write(rows, tmp_path / "new")
    text = path.read_text()
    assert text.count("data:image/png;base64,") == 3 and 'src="http' not in text
    assert {p.name for p in path.parent.iterdir()} == {"index.html", "speedup_f32.png", "floor.png", "memory.png"}
    assert "<h2>Slower than eager</h2>" in text and ">0.80<" in text
    assert "A Processor" in text and "GFLOP/s float32" in text
    assert ">2.62<" in text  # megapixels a second of fastsr-f32
    assert ">258%<" in text and ">1.16<" in text  # 517 GFLOP/s of 200; 0.1 s over 17.3 / 200 s
    with pytest.raises(ValueError, match="no rows"):
        report.write([], tmp_path)


def test_a_profile_tells_all_of_the_work_and_the_report_most_of_the_time():
    if _library.isa() in (None, "baseline"):
        pytest.skip("no CPU kernels here")
    module = networks.build(networks.CASES["dbpn"])
    inputs = networks.inputs_of(module, 8)
    lines, whole = profile.measure(peers.Subject(module, inputs), "fastsr-f32", rounds=2)
    found = work.layers(module, inputs)
    assert sum(x.gflop for x in lines) == pytest.approx(work.gflop(found))
    assert sum(x.floor_gflop for x in lines) == pytest.approx(work.floor_gflop(found, "f32"))
    assert whole > 0 and all(x.ms > 0 and x.count >= 1 for x in lines)

    made = [["a: long", 3, 6.0, 2.0, 1.0], ["b: short", 1, 3.0, 0.0, 0.0], ["c: left out", 1, 0.1, 0.0, 0.0]]
    rates = row("torch", None, "machine", kind="ceiling", sample="", extra={"f32": 200.0, "bf16": 400.0, "copy": 20.0})
    text = report.page([rates, row("fastsr-f32", None, kind="profile", extra={"ms": 10.0, "lines": made})], {})
    assert "Where the time goes" in text and ">333<" in text and ">5.0<" in text  # GFLOP/s and the floor of the first
    assert "b: short" in text and "c: left out" not in text and ">0.9<" in text  # what no step takes


def test_a_base_is_a_column_of_the_report(rows):
    before = [dataclasses.replace(r, race="2025", median_us=2 * r.median_us) for r in rows if r.median_us]
    text = report.page(rows, {}, before, "v1")
    assert "<th>vs v1</th>" in text and ">2.00<" in text


def test_the_table_of_the_readme_stands_between_its_markers(rows):
    table = report.summary(rows)
    assert "| CARN | 128x128 | 100.0 | 3.00x (openvino-f32) | 4.00 | - | - | - (-) |" in table
    text = f"a\n{report.MARKERS[0]}\nold\n{report.MARKERS[1]}\nb\n"
    new = report.between_markers(text, table)
    assert new.startswith("a\n") and new.endswith("\nb\n") and "old" not in new and table in new
    with pytest.raises(ValueError, match="once each"):
        report.between_markers("nothing here", table)


def test_base_is_a_revision_of_the_repository():
    try:
        head = resolve("HEAD")
    except ValueError:
        pytest.skip("not a git repository")
    assert len(head) == 40 and resolve(head[:12]) == head
    with pytest.raises(ValueError, match="--base: expected a commit, branch or tag"):
        resolve("no-such-revision")


def test_rows_of_a_base_are_those_of_its_clean_commit():
    rows = [row("eager", commit="abcdef0123"), row("eager", commit="abcdef0123+"), row("eager", commit="1111111111")]
    assert rows_at(rows, "abcdef0123" + 30 * "4") == rows[:1]
    with pytest.raises(ValueError, match="no rows of 2222222222"):
        rows_at(rows, 40 * "2")


def test_the_command_line():
    args = parser().parse_args(["compare", "--base", "main", "-n", "carn", "-n", "idn", "-s", "48"])
    assert (args.base, args.network, args.size, args.peer) == ("main", ["carn", "idn"], [48], None)
    assert parser().parse_args(["report", "--base", "v1"]).base == "v1"
    with pytest.raises(SystemExit):
        parser().parse_args(["compare"])


def test_a_change_is_the_ratio_of_medians_with_the_spread_of_neighbours():
    change = Change("carn", 48, "fastsr-f32", timing.Times((2.0, 4.0, 6.0)), timing.Times((1.0, 2.0, 2.0)))
    assert change.speedup == 2.0
    assert change.spread == (2.0, pytest.approx(2.6))
