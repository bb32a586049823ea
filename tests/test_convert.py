"""The normal form: written from every network's files, read back to the same outputs, and never trusted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fastsr
from conftest import parity_case, parity_names
from fastsr.models import NETWORKS
from test_models import PROCEDURES, hints

CASES = [n for n in parity_names() if n not in PROCEDURES]
SMALL = {"channels": 1, "features": 8, "blocks": 2, "block_widths": (6, 4, 8, 8, 6, 11), "slice": 3, "groups": 2,
         "upsample_kernel": 9}  # fmt: skip


def small_cases() -> list[str]:
    """The cases of up to 5 million values, and the smallest of every network and dialect that has none."""
    sizes = {n: sum(math.prod(s) for _, s, _ in parity_case(n).about["state_dict"]) for n in CASES}
    chosen, seen = [], set()
    for name in sorted(CASES, key=lambda n: sizes[n]):
        keys = {key: None for key, _, _ in parity_case(name).about["state_dict"]}
        kind = next((network, dialect) for network in NETWORKS if (dialect := network.detect(keys)))
        if sizes[name] < 5_000_000 or kind not in seen:
            chosen.append(name)
        seen.add(kind)
    return chosen


def metadata(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.fixture
def idn(tmp_path):
    """A file of a narrow IDN's weights, whose scale it does not say."""
    torch.manual_seed(0)
    torch.save(fastsr.create("idn", **SMALL).state_dict(), tmp_path / "idn.pth")
    return tmp_path / "idn.pth"


@pytest.fixture
def normal(idn, tmp_path):
    fastsr.convert(idn, tmp_path / "idn.safetensors", scale=3)
    return tmp_path / "idn.safetensors"


def changed(path, *, tensors=None, **said):
    """The file once more, with other metadata; None leaves a key out."""
    with safe_open(path, framework="pt") as file:
        whole = {key: file.get_tensor(key) for key in file.keys()} if tensors is None else tensors  # noqa: SIM118
        about = {k: v for k, v in (file.metadata() | said).items() if v is not None}
    save_file(whole, path, about)
    return path


# Every network.


@pytest.mark.parametrize("name", small_cases())
def test_every_network_comes_back_whole(name, tmp_path):
    case = parity_case(name)
    save_file({k: v.contiguous() for k, v in case.state_dict().items()}, tmp_path / "a.safetensors")
    model = fastsr.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **hints(case))
    again = fastsr.load(tmp_path / "b.safetensors")
    assert type(again) is type(model) and again.config == model.config
    assert again.origin.variant == model.origin.variant and not any(v == "hint" for v in again.origin.fields.values())
    state = model.state_dict()
    assert list(again.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in again.state_dict().items())
    fastsr.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    assert metadata(tmp_path / "b.safetensors") == metadata(tmp_path / "c.safetensors")


@pytest.mark.parametrize("name", ("carn_m_x2", "rcan_tiny_x4", "esrgan_tiny_x4", "esrgan_basicsr_tiny_x2", "zssr_net"))
def test_outputs_are_equal_bit_for_bit(name, tmp_path):
    case = parity_case(name)
    torch.save(case.state_dict(), tmp_path / "a.pth")
    fastsr.convert(tmp_path / "a.pth", tmp_path / "b.safetensors", **hints(case))
    x = case.tensors["input"]
    with torch.inference_mode():
        expected = fastsr.load(tmp_path / "a.pth", **hints(case))(x)
        assert torch.equal(fastsr.load(tmp_path / "b.safetensors")(x), expected)


def test_a_hint_is_written_down(idn, normal):
    assert fastsr.load(idn).config.scale is None
    model = fastsr.load(normal)
    assert model.config.scale == 3 and model.origin.fields["scale"] == "file" and model.origin.variant == "caffe"
    assert fastsr.load(normal, scale=2).config.scale == 2  # a hint is the user's last word
    said = metadata(normal)
    assert said["network"] == "idn" and said["fastsr_version"] == fastsr.__version__
    assert said["source_sha256"] == hashlib.sha256(idn.read_bytes()).hexdigest()
    assert json.loads(said["config"])["block_widths"] == list(SMALL["block_widths"])


def test_origin_says_who_decided_what(idn):
    fields = fastsr.load(idn).origin.fields
    assert fields["scale"] == "assumed" and fields["leaky_slope"] == "definition" and fields["features"] == "file"
    assert fastsr.load(idn, scale=2).origin.fields["scale"] == "hint"
    assert fastsr.load(fastsr.load(idn, scale=2)).origin.fields["scale"] == "module"
    assert fastsr.create("idn").origin is None
    case = parity_case("rcan_tiny_x4")  # whose mean shift says its range, whatever the hint
    assert fastsr.load(case.state_dict(), rgb_range=7.0).origin.fields["rgb_range"] == "file"


@pytest.mark.parametrize("name", small_cases())
def test_what_is_fixed_is_what_config_from_leaves_alone(name, monkeypatch):
    state = parity_case(name).state_dict()
    network, dialect = next((n, d) for n in NETWORKS if (d := n.detect(state)))
    given: set[str] = set()
    original = network.Config.__init__

    def spy(self, *values, **named):
        given.update([f.name for f in dataclasses.fields(network.Config)][: len(values)], named)
        original(self, *values, **named)

    monkeypatch.setattr(network.Config, "__init__", spy)
    network.config_from(network.convert(state, dialect), dialect, {})
    assert set(network.fixed) == {f.name for f in dataclasses.fields(network.Config)} - given - set(network.hints)


# What is refused.


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"network": "x"}, r"names the network 'x', which does not exist; its tensors are those of 'idn'"),
        ({"network": "carn"}, r"names the network 'carn'; its tensors are those of 'idn'"),
        ({"network": "y" * 101}, r"'network' of at most 100 characters, got 101"),
        ({"network": None}, r"expected 'network' beside"),
        ({"config": "{"}, r"'config' is not JSON"),
        ({"config": "[" * 9999}, r"'config' is not JSON"),
        ({"config": "[1]"}, r"'config' is a list"),
        ({"config": " " * 10_001}, r"at most 10000 characters"),
        ({"config": "{}"}, r"does not agree with its tensors.*differing: block_widths"),
        ({"source_sha256": "0"}, r"not 64 hexadecimal digits"),
    ],
)
def test_metadata_is_not_trusted(normal, said, message):
    with pytest.raises(ValueError, match=r"idn\.safetensors: .*" + message):
        fastsr.load(changed(normal, **said))


@pytest.mark.parametrize(
    ("field", "value"),
    [("features", 9), ("blocks", 10**12), ("scale", "2"), ("scale", [2]), ("scale", {"a": 1}), ("scale", 1e400),
     ("scale", True), ("scale", 10**30),
     ("leaky_slope", 0.1), ("nothing", 1), ("block_widths", [[]])],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_is_named(normal, field, value):
    config = json.loads(metadata(normal)["config"]) | {field: value}
    with pytest.raises(fastsr.LoadError, match=rf"idn\.safetensors.*{field}"):
        fastsr.load(changed(normal, config=json.dumps(config)))


@pytest.mark.parametrize("value", ("1", [1], None, True, 1e300, {}), ids=str)
def test_a_hint_of_the_wrong_type_is_named(tmp_path, value):
    torch.save(parity_case("rcan_basicsr_tiny_x4").state_dict(), tmp_path / "a.pth")
    fastsr.convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    config = json.loads(metadata(tmp_path / "b.safetensors")["config"]) | {"img_range": value}
    with pytest.raises(fastsr.LoadError, match=r"b\.safetensors.*rcan_basicsr img_range.*expected float"):
        fastsr.load(changed(tmp_path / "b.safetensors", config=json.dumps(config)))


def test_tensors_that_do_not_fit_are_named(normal):
    with pytest.raises(fastsr.LoadError, match="none of the networks"):
        fastsr.load(changed(normal, tensors={"odd.weight": torch.zeros(3)}))


@pytest.mark.parametrize("name", ("out.pth", "out", "idn.safetensors.bin"))
def test_other_endings_are_refused(idn, tmp_path, name):
    with pytest.raises(ValueError, match=r"expected a path that ends in \.safetensors"):
        fastsr.convert(idn, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_folder_that_is_missing_is_named(idn, tmp_path):
    with pytest.raises(ValueError, match=r"missing/out\.safetensors: .*; make .*missing first"):
        fastsr.convert(idn, tmp_path / "missing" / "out.safetensors")


def test_the_source_is_never_replaced(normal, tmp_path):
    before = normal.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(normal)
    for path in (normal, tmp_path / "link.safetensors"):
        with pytest.raises(ValueError, match="would replace the source"):
            fastsr.convert(normal, path)
    assert normal.read_bytes() == before


def test_a_failed_conversion_leaves_what_was_there(tmp_path, normal):
    (tmp_path / "bad.pth").write_text("no weights")
    before = normal.read_bytes()
    with pytest.raises(ValueError, match=r"bad\.pth"):
        fastsr.convert(tmp_path / "bad.pth", normal)
    with pytest.raises(FileNotFoundError):
        fastsr.convert(tmp_path / "missing.pth", normal)
    assert normal.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == [
        "bad.pth", "idn.pth", "idn.safetensors",
    ]  # fmt: skip
