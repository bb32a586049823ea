"""Every network against the outputs of its authors' code, on every backend, and what `load` promises."""

from __future__ import annotations

import argparse
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastsr
from conftest import Case, parity_case, parity_names, relative_error
from fastsr.models import NETWORKS, WRAPPINGS

# Full-size networks whose activations explode with synthetic weights: float32 itself is no better.
LOOSE = ("rcan_x", "esrgan_x4", "esrgan_basicsr_x4", "rdn_edsr")
PROCEDURES = ("zssr_final_test", "dbpn_units")  # tested by test_zssr.py, and unit by unit


def outputs(case: Case, model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a case that the model's call produces, by their stored names."""
    x = case.tensors["input"].to(dtype)
    if case.name.startswith("carn") and "multi" in case.name:
        return {f"output_x{s}": model(x, scale=s) for s in case.about["scale"]}
    if case.name == "dbpn_discriminator":
        return {"output": model(x), "logit": model.logit(x)}
    if case.name.startswith("sft_net"):
        return {"output": model(x, case.tensors["condition"].to(dtype))}
    if case.name == "esrgan_discriminator_128":
        return {"output": model(x), "features": model.features(x)}
    if "input_unit" in case.tensors:
        return {"output": model(x), "output_unit": model(case.tensors["input_unit"].to(dtype))}
    if case.name == "outdoor_scene_seg":
        return {"logits": model.logits(x)}  # the softmax of these activations is nearly one-hot
    if case.name.startswith("idn"):  # the scale is in no file
        scale, block1 = case.about["scale"], model.block(model.conv2(model.conv1(x)), 1)
        parts = {"residual": model.upsample(model.features(x), scale), "bicubic": model.bicubic(x, scale)}
        made = {"output": model(x, scale=scale), "block1": block1, **parts}
        return {name: value for name, value in made.items() if name in case.tensors}
    if case.name.startswith("srfeat_disc"):
        return {"output": model(x), "output_sigmoid": model(x).sigmoid()}
    if case.name == "srfeat_vgg":
        target = case.tensors["target"].to(dtype)
        return {"output": model(x), "output_target": model(target), "vgg_loss": model.loss(x, target)[None]}
    if case.name.startswith("enhancenet"):
        output, mean = model(x), x.new_tensor(model.config.rgb_mean)[:, None, None]
        bicubic = model.interpolate(x - mean) + mean
        return {"output": output, "bicubic": bicubic, "residual": output - bicubic}
    return {"output": model(x)}


def hints(case: Case) -> dict[str, object]:
    """What the case's authors passed to their constructor and no file can say."""
    return {k: v for k, v in case.about.get("build", {}).items() if k in ("img_range", "res_scale", "rgb_mean")}


def limit(case: Case, key: str, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 1e-6
    loose = case.name.startswith(LOOSE) and key != "output_unit"  # the same network, fed with 0..1: no explosion
    return 2e-3 if loose else 1e-4


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", [n for n in parity_names() if n not in PROCEDURES])
def test_parity(name, dtype, backend):
    if dtype == torch.float64 and backend != "eager":
        pytest.skip("kernels compute in float32 and below")
    case = parity_case(name)
    model = fastsr.load(case.state_dict(), dtype=dtype, **hints(case))
    with torch.inference_mode():
        made = outputs(case, model, dtype)
    for key, value in made.items():
        expected = case.tensors[key]
        assert value.shape == expected.shape
        assert relative_error(value, expected) <= limit(case, key, dtype), key


@pytest.mark.parametrize("name", [n for n in parity_names() if n not in PROCEDURES])
def test_state_dict_is_the_authors(name):
    """What was loaded can be saved and loaded again: same keys, same tensors, same parameter count."""
    case = parity_case(name)
    model = fastsr.load(case.state_dict())
    again = fastsr.load(model.state_dict())
    assert again.config == model.config
    theirs = again.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())


def test_unknown_keys_name_the_networks_considered():
    with pytest.raises(fastsr.LoadError, match=r"(?s)none of the networks.*odd\.weight.*carn.*entry\.weight"):
        fastsr.load({"odd.weight": torch.zeros(3)})
    with pytest.raises(fastsr.LoadError) as caught:
        fastsr.load({f"{'x' * 100_000}.{n}": torch.zeros(3) for n in range(9)})
    assert "x" * 200 + "..., x" in str(caught.value) and len(str(caught.value)) < 10_000


def test_a_missing_key_is_named():
    state = parity_case("carn_m_x2").state_dict()
    del state["b2.b1.body.2.weight"]
    with pytest.raises(fastsr.LoadError, match=r"looks like carn.*missing keys: b2\.b1\.body\.2\.weight"):
        fastsr.load(state)


def test_a_file_without_its_upsampler_says_so():
    state = fastsr.create("carn", scale=2, features=4).state_dict()
    with pytest.raises(fastsr.LoadError, match=r"looks like carn \(official\) but it has no upsampler"):
        fastsr.load({k: v for k, v in state.items() if not k.startswith("upsample.")})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(1, 5, 5), r"expected inputs are \(N, C, H, W\), an image alone as x\[None\]; got .*\[1, 5, 5\]"),
        (torch.rand(1, 3, 5, 5), "expected inputs of 1 channels together, as weight and groups say; got"),
        (torch.rand(1, 1, 5, 5).double(), "got inputs=float64.* and weight=float32.*; convert one of them with .to"),
    ],
)
def test_images_that_do_not_fit_a_network_are_refused_in_words(image, message):
    idn = fastsr.create("idn", scale=2)
    with pytest.raises(ValueError, match=message):
        idn(image)


@pytest.mark.parametrize("name", [n for n in parity_names() if n not in PROCEDURES])
def test_exactly_one_network_recognises_a_state_dict(name):
    state = parity_case(name).state_dict()
    assert sum(network.detect(state) is not None for network in NETWORKS) == 1


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
def test_what_create_builds_load_recognises(network):
    """From the keys and shapes alone, in the default configuration; the fields no file can say are given as hints."""
    model = fastsr.create(network.name)
    if model.parameter_count > 30_000_000:
        pytest.skip(f"{model.parameter_count:,} parameters in the default configuration")
    loaded = fastsr.load(model.state_dict(), **{hint: getattr(model.config, hint) for hint in network.hints})
    assert type(loaded) is network and loaded.config == model.config
    assert repr(loaded.config)[len(type(loaded.config).__name__) : -1] in repr(loaded)


def test_hints_are_for_every_network_and_never_overrule_the_file():
    state = parity_case("carn_m_x2").state_dict()
    assert fastsr.load(state, scale=4, rgb_range=255, res_scale=0.1, features=7).config == fastsr.load(state).config


def test_create_names_what_exists():
    with pytest.raises(ValueError, match=r"name to be one of .*esrgan.*; got 'esrgn'; did you mean 'esrgan'\?"):
        fastsr.create("esrgn")
    with pytest.raises(TypeError, match=r"carn has no field blocks; its fields are scales, multi_scale"):
        fastsr.create("carn", blocks=3)


def test_load_reads_files_wrappings_and_modules(tmp_path):
    state = parity_case("carn_m_x2").state_dict()
    expected = fastsr.load(state).state_dict()
    half = {f"module.{k}": v.half() for k, v in state.items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"iter": 3, "params": {}, "params_ema": state}, tmp_path / "ema.pth")
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "parallel.pth")
    for name in ("a.safetensors", "a.pth", "old.pt", "ema.pth", "parallel.pth"):
        loaded = fastsr.load(tmp_path / name)
        assert not loaded.training and all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
    theirs = torch.nn.DataParallel(fastsr.load(state, dtype=torch.float64))
    assert fastsr.load(theirs).dtype == torch.float64
    assert fastsr.load(torch.compile(theirs)).dtype == torch.float64
    assert fastsr.load({f"_orig_mod.{k}": v for k, v in half.items()}).config == theirs.module.config
    assert fastsr.load(half).dtype == torch.float32 and fastsr.load(half, dtype=torch.float16).dtype == torch.float16


def test_a_wrapped_module_says_what_no_file_does():
    model = fastsr.create("idn", scale=3)
    for wrapped in (torch.nn.DataParallel(model), torch.compile(model), torch.compile(torch.nn.DataParallel(model))):
        assert fastsr.load(wrapped).config == model.config


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", ["rcan_tiny_x4", "msrn_x2", "ddbpn_edsr_x4", "carn_m_x2"])
def test_weights_on_a_gpu_load(name):
    state = parity_case(name).state_dict()
    loaded = fastsr.load({k: v.cuda() for k, v in state.items()})
    assert loaded.device.type == "cpu" and loaded.config == fastsr.load(state).config
    assert fastsr.load(loaded.cuda()).device.type == "cuda"


def test_loading_copies_and_leaves_the_random_state_alone():
    state = parity_case("carn_m_x2").state_dict()
    before = torch.get_rng_state()
    model = fastsr.load(state)
    assert torch.equal(before, torch.get_rng_state())
    state["exit.bias"].fill_(7)
    assert not (model.exit.bias == 7).any()


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings_and_prefixes_of_training_code(tmp_path, wrapping):
    """Under a name of a file, with what else training code saves; averaged, and as a part of a larger module."""
    state = parity_case("carn_m_x2").state_dict()
    torch.save({"epoch": 3, wrapping: state, "names": np.array(["x"])}, tmp_path / "a.pth")
    assert torch.equal(fastsr.load(tmp_path / "a.pth").exit.bias, state["exit.bias"])
    averaged = {"n_averaged": torch.tensor(3)} | {f"module.{key}": value for key, value in state.items()}
    for prefix in ("", f"{wrapping}.", f"trainer.{wrapping}."):
        prefixed = {f"{prefix}{key}": value for key, value in (state if prefix else averaged).items()}
        assert torch.equal(fastsr.load({"state_dict": prefixed}).exit.bias, state["exit.bias"])


def test_files_that_cannot_be_loaded_say_why(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth: expected a weight file; there is none"):
        fastsr.load(tmp_path / "nothing.pth")
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo(tmp_path / "pipe.pth")
    for name in ("folder.pth", "pipe.pth"):
        with pytest.raises(ValueError, match=rf"{name}: expected a weight file; this is a folder, a pipe or a device"):
            fastsr.load(tmp_path / name)
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.onnx: expected a file ending in .*\.pth"):
        fastsr.load(tmp_path / "a.onnx")
    torch.save(argparse.Namespace(scale=2), tmp_path / "object.pth")
    with pytest.raises(ValueError, match=r"object\.pth: expected a dict of tensors or a module; .*argparse\.Namespace"):
        fastsr.load(tmp_path / "object.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth: expected a dict of tensors or a module; the file holds a list"):
        fastsr.load(tmp_path / "list.pth")
    torch.save({"lr": 0.1}, tmp_path / "numbers.pth")
    with pytest.raises(fastsr.LoadError, match="expected a state dict; found lr and no tensor among them"):
        fastsr.load(tmp_path / "numbers.pth")
    whole = (tmp_path / "object.pth").read_bytes()
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{name}: .*damaged"):
            fastsr.load(tmp_path / name)
    with pytest.raises(TypeError, match="expected a path, a state dict or a module; got int"):
        fastsr.load(3)


@pytest.mark.parametrize("name", ("carn_m_x2", "rcan_tiny_x4", "esrgan_basicsr_tiny_x2", "memnet", "srfeat_x4"))
def test_networks_compile_into_one_graph(name):
    torch._dynamo.reset()
    case = parity_case(name)
    model = fastsr.load(case.state_dict())
    with torch.no_grad():
        made = torch.compile(model, fullgraph=True, backend="aot_eager")(case.tensors["input"])
    assert relative_error(made, case.tensors["output"]) < 1e-4


def test_unknown_hints_are_refused():
    with pytest.raises(TypeError, match="no network knows the hint rgb_rnage"):
        fastsr.load(parity_case("carn_m_x2").state_dict(), rgb_rnage=255)


UNUSUAL = [
    ("carn", {"scale": 3, "features": 16, "group": 2}),
    ("carn", {"scales": (2, 4), "mobile": True, "group": 2, "features": 8}),
    ("zssr", {"channels": 1, "width": 8, "depth": 4}),
    ("memnet", {"in_channels": 3, "channels": 8, "num_memblock": 2, "num_resblock": 3}),
    ("memnet_original", {"channels": 8, "num_memblock": 3, "num_resblock": 2}),
    ("rcan", {"scale": 8, "groups": 3, "blocks": 1, "features": 16, "hidden": 2}),
    ("rcan", {"scale": 3, "groups": 1, "blocks": 2, "features": 8, "channels": 1, "mean": (0.5,), "rgb_range": 1.0}),
    ("rcan_basicsr", {"scale": 2, "groups": 1, "blocks": 3, "features": 8, "res_scale": 0.3, "img_range": 1.0}),
    ("dbpn", {"scale": 2, "features": 16, "width": 8, "stages": 3}),
    ("dbpn", {"scale": 8, "features": 16, "width": 8, "stages": 4, "iterations": 2}),
    ("ddbpn", {"scale": 2, "features": 16, "width": 8, "stages": 4}),
    ("esrgan", {"scale": 2, "features": 8, "blocks": 1, "growth": 4, "unshuffle": 2}),
    ("esrgan", {"scale": 8, "features": 8, "blocks": 2, "growth": 4, "in_channels": 1, "out_channels": 1}),
    ("rdn", {"scale": 4, "D": 3, "C": 2, "G": 8, "G0": 16}),
    ("rdn_original", {"scale": 8, "D": 2, "C": 3, "G": 8, "G0": 16, "block_width": 12}),
    ("rdn_plain", {"scale": 3, "D": 3, "C": 2, "G": 8, "channels": 1}),
    (
        "idn",
        {"scale": 3, "features": 16, "blocks": 2, "block_widths": (12, 8, 16, 16, 12, 20), "slice": 4, "groups": 4},
    ),
    ("srfeat", {"features": 16, "blocks": 3}),
    ("msrn", {"scale": 8, "blocks": 2, "features": 8}),
    ("msrn_old", {"scale": 3, "blocks": 3, "features": 8}),
    ("enhancenet", {"blocks": 2, "features": 8}),
]


@pytest.mark.parametrize(("name", "config"), UNUSUAL, ids=lambda v: v if isinstance(v, str) else "")
def test_other_sizes_are_read_from_the_file_and_any_image_is_enlarged(name, config):
    """Sizes nobody published: load reads them, and images of odd sizes, one pixel and batches come out exact."""
    torch.manual_seed(0)
    model = fastsr.create(name, **config).double()
    loaded = fastsr.load(
        model.state_dict(), dtype=torch.float64, **{hint: getattr(model.config, hint) for hint in model.hints}
    )
    assert loaded.config == model.config
    channels = 1 if model.colour == "y" or config.get("channels") == 1 else 3
    low, high = model.value_range
    for scale in model.scales:
        for shape in ((2, channels, 7, 10), (1, channels, 1, 1), (1, channels, 1, 6)):
            x = torch.rand(shape, dtype=torch.float64) * (high - low) + low
            with torch.no_grad():
                made = model.super_resolve(x, scale)
                assert made.shape == (shape[0], channels, shape[2] * scale, shape[3] * scale)
                assert torch.equal(loaded.super_resolve(x, scale), made) and torch.isfinite(made).all()
                torch.testing.assert_close(model.super_resolve(x[-1:], scale), made[-1:], rtol=1e-9, atol=1e-9)
