"""Every network against the outputs of its authors' code, on every backend, and what `load` promises."""

from __future__ import annotations

import pytest
import torch

import fastsr
from conftest import Case, parity_case, parity_names, relative_error

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
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_unknown_keys_name_the_networks_considered():
    with pytest.raises(fastsr.LoadError, match=r"(?s)none of the networks.*odd\.weight.*carn.*entry\.weight"):
        fastsr.load({"odd.weight": torch.zeros(3)})


def test_a_missing_key_is_named():
    state = parity_case("carn_m_x2").state_dict()
    del state["b2.b1.body.2.weight"]
    with pytest.raises(fastsr.LoadError, match=r"looks like carn.*missing keys: b2\.b1\.body\.2\.weight"):
        fastsr.load(state)


def test_unknown_hints_are_refused():
    with pytest.raises(TypeError, match="no network knows the hint rgb_rnage"):
        fastsr.load(parity_case("carn_m_x2").state_dict(), rgb_rnage=255)
