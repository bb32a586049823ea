"""The networks, one file each, and `load` and `create`, which pick one."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastsr.checkpoints import reader_of
from fastsr.checkpoints.normal import Normal, plain
from fastsr.models.carn import CARN
from fastsr.models.dbpn import DBPN, DDBPN, DBPNDiscriminator
from fastsr.models.enhancenet import EnhanceNet
from fastsr.models.esrgan import ESRGAN, ESRGANDiscriminator
from fastsr.models.idn import IDN
from fastsr.models.memnet import MemNet, OriginalMemNet
from fastsr.models.msrn import MSRN, MSRNOld
from fastsr.models.network import LoadError, Network, Origin, State
from fastsr.models.rcan import RCAN, RCANBasicSR
from fastsr.models.rdn import RDN, RDNOriginal, RDNPlain
from fastsr.models.sftgan import OutdoorSceneSeg, SFTNet
from fastsr.models.srfeat import SRFeat, SRFeatDiscriminator, SRFeatVGG
from fastsr.models.zssr import ZSSR

NETWORKS: tuple[type[Network], ...] = (
    CARN,
    ZSSR,
    MemNet,
    OriginalMemNet,
    RCAN,
    RCANBasicSR,
    DBPN,
    DDBPN,
    DBPNDiscriminator,
    ESRGAN,
    ESRGANDiscriminator,
    RDN,
    RDNOriginal,
    RDNPlain,
    SFTNet,
    OutdoorSceneSeg,
    IDN,
    SRFeat,
    SRFeatDiscriminator,
    SRFeatVGG,
    MSRN,
    MSRNOld,
    EnhanceNet,
)
"""Every network, in the order in which `load` considers them."""

WRAPPINGS = (
    "params_ema", "params", "state_dict", "model", "model_state_dict", "ema", "g_ema", "generator", "netG", "net_g",
    "net", "network", "weights",
)  # fmt: skip
"""The names under which training code puts a state dict into a file, those preferred first."""

PREFIXES = ("module.", "_orig_mod.")
"""What nn.DataParallel and torch.compile put in front of every key."""

MOST_PREFIXES = 2
"""How many other names in front of every key are looked behind, where no network has the keys."""

LONGEST_SHOWN = 200
"""Characters of a key in a message."""

HINTS = tuple(sorted({field for network in NETWORKS for field in network.Config.__dataclass_fields__}))
"""What `load` accepts as a hint for any network: every field of every configuration."""


def create(name: str, **config: Any) -> Network:
    """Builds an untrained network, in evaluation mode.

    name: the network's name ("rcan", "esrgan", ...). config: fields of its Config dataclass; `scale=4` stands for
    `scales=(4,)` where the network has one factor a model. Raises ValueError for an unknown name, TypeError for an
    unknown field; both name what exists.
    """
    networks = {n.name: n for n in NETWORKS}
    if name not in networks:
        close = difflib.get_close_matches(name, networks, 1)
        guess = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"create: expected name to be one of {', '.join(networks)}; got {name!r}{guess}")
    network = networks[name]
    fields = list(network.Config.__dataclass_fields__)
    if "scale" in config and "scale" not in fields and "scales" in fields:
        config["scales"] = (config.pop("scale"),)
        if "multi_scale" in fields:
            config.setdefault("multi_scale", False)
    unknown = [k for k in config if k not in fields]
    if unknown:
        raise TypeError(f"create: {name} has no field {', '.join(unknown)}; its fields are {', '.join(fields)}")
    return network(network.Config(**config)).eval()


def load(
    source: str | os.PathLike[str] | State | nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **hints: Any,
) -> Network:
    """Loads trained weights into the network they belong to, recognised by its keys and shapes.

    source: a file of any format in `fastsr.checkpoints.FORMATS`; a state dict; or a module (somebody's implementation,
        also wrapped by spandrel), whose state dict is read. Wrappings under the names in `WRAPPINGS`, nn.DataParallel's
        prefix `module.`, torch.compile's `_orig_mod.` and, where the keys fit no network, any other prefix of all keys
        (`generator.`, `net_g.`, ...) are taken off.
    device, dtype: of the result. Default: a module's own; else the CPU and float32.
    hints: fields of the networks' configurations (`rgb_range`, `img_range`, `res_scale`, `scale`, ...). Each is used by
        a network that has it and whose file cannot say it (`Network.hints`), and has no effect otherwise. Where no
        hint is given, a module's own attributes of these names are used, and what a file says beside its tensors.

    Returns the network in evaluation mode; its call is the authors' forward in the authors' value range, and its repr
    shows what was decided. Raises LoadError (a ValueError) if no network fits, with the networks considered and the
    keys that did not fit; CheckpointError (a ValueError) for a file that is damaged or not read; FileNotFoundError;
    TypeError for an unknown hint or source.
    """
    unknown = [k for k in hints if k not in HINTS]
    if unknown:
        raise TypeError(f"load: no network knows the hint {', '.join(unknown)}; known are {', '.join(HINTS)}")
    found = _open(source)
    module = _module_of(source)
    if module is not None:
        first = next(module.parameters(), None)
        device = first.device if device is None and first is not None else device
        dtype = first.dtype if dtype is None and first is not None else dtype
    state = found.state
    for _ in range(MOST_PREFIXES):
        if not any(network.detect(state) for network in NETWORKS):
            state = _without_prefix(state)
    for network in NETWORKS:
        dialect = network.detect(state)
        if dialect is not None:
            said = found.hints if module is None else network.hints_of(module)
            if found.normal is not None:
                _check_values(found, network)
            model = _build(network, dialect, state, said | hints, found.name, dtype or torch.float32)
            sayers = dict.fromkeys(said, found.sayer) | dict.fromkeys(hints, "hint")
            origin = Origin(found.name, found.format, dialect, _deciders(model, dialect, sayers))
            if found.normal is not None:
                _check_normal(found, model, hints)
                origin = replace(origin, variant=found.normal.variant, sha256=found.normal.source_sha256)
            model.origin = origin
            return model.to(device=device or "cpu").eval()
    raise LoadError(_nothing_fits(found.state, found.name))


def interpolate(
    a: str | os.PathLike[str] | State | nn.Module, b: str | os.PathLike[str] | State | nn.Module, factor: float
) -> Network:
    """The network whose every tensor is (1 - factor) * a + factor * b: network interpolation, ESRGAN section 3.4.

    a, b: anything `load` takes, of one network and configuration, in any of its key dialects. ESRGAN's authors have the
        network trained for PSNR as `a` and the one trained with the discriminator as `b`.
    factor: 0 gives a, 1 gives b; other finite values extrapolate.

    The result has a's device and dtype, and is in evaluation mode; integer tensors (batch norm's counters) are a's.
    Raises ValueError for two different networks or configurations or a factor that is not finite, and what `load` does.
    """
    if not math.isfinite(factor):
        raise ValueError(f"interpolate: expected a finite factor, 0 for a and 1 for b; got {factor}")
    mixed, other = load(a), load(b)
    if type(mixed) is not type(other) or mixed.config != other.config:
        raise ValueError(
            "interpolate: expected two checkpoints of one network and configuration; got "
            f"a = {mixed.summary()} and b = {other.summary()}"
        )
    theirs = other.state_dict()
    for key, ours in mixed.state_dict().items():  # these share memory with the network
        if ours.is_floating_point():
            ours.copy_((1 - factor) * ours + factor * theirs[key].to(ours))
    return mixed


def _module_of(source: Any) -> nn.Module | None:
    """The module that a source is or wraps: spandrel's descriptors hold theirs as `model`; nn.DataParallel and
    torch.compile have theirs as the only child, whose name is in front of every key."""
    module = source if isinstance(source, nn.Module) else getattr(source, "model", None)
    if not isinstance(module, nn.Module):
        return None
    while True:
        children = dict(module.named_children())
        if list(children) not in (["module"], ["_orig_mod"]):
            return module
        (module,) = children.values()


@dataclass(frozen=True)
class _Found:
    """A source, opened: its flat state dict without wrappings and prefixes, what to call it in messages, its format,
    the hints that it holds beside its tensors, who says these, and the metadata of a normal form."""

    state: State
    name: str
    format: str
    sayer: str = "file"
    hints: Mapping[str, Any] = field(default_factory=dict)
    normal: Normal | None = None


def _open(source: Any) -> _Found:
    module = _module_of(source)
    if module is not None:
        name = type(module).__name__
        return _Found(unwrap(module.state_dict(), name), name, "module", "module")
    if isinstance(source, Mapping):
        name = "the state dict"
        return _Found(unwrap(source, name), name, "state dict", hints=getattr(source, "hints", {}))
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        reader = reader_of(source)
        content = reader.read(Path(source))
        beside = {"hints": getattr(content, "hints", {}), "normal": getattr(content, "normal", None)}
        return _Found(unwrap(content, name), name, reader.DESCRIPTION, **beside)
    raise TypeError(f"load: expected a path, a state dict or a module; got {type(source).__name__}")


def _check_values(found: _Found, network: type[Network]) -> None:
    """Raises LoadError unless the values in a normal form's metadata that keys and shapes will not confirm, those of
    hints, are of the type of their fields, and finite."""
    for f in fields(network.Config):
        value = found.hints.get(f.name)
        if f.name in network.hints and f.name in found.hints and not _is_a(value, str(f.type)):
            raise LoadError(
                f"load: {found.name}: its metadata gives {network.name} {f.name} = {str(value)[:40]!r}; expected "
                f"{f.type}; convert the source file again"
            )


def _is_a(value: Any, annotation: str) -> bool:
    """Whether a value is of an annotated type of hints: bool, int, float, int | None, or a tuple of numbers."""
    if isinstance(value, tuple):
        return annotation.startswith("tuple") and all(_is_a(v, "float") for v in value)
    if value is None or isinstance(value, bool):
        return ("None" if value is None else "bool") in annotation
    kinds = (int,) if annotation.startswith("int") else (int, float)
    return not annotation.startswith(("tuple", "bool")) and isinstance(value, kinds) and abs(value) < 2**53


def _check_normal(found: _Found, model: Network, hints: Mapping[str, Any]) -> None:
    """Raises LoadError unless a normal form's metadata is what its tensors, and the hints of the call, made of it."""
    said = found.normal
    again = "convert the source file again"
    if said.network != model.name:
        known = "" if any(said.network == n.name for n in NETWORKS) else ", which does not exist"
        raise LoadError(
            f"load: {found.name}: its metadata names the network {said.network!r}{known}; its tensors are those of "
            f"{model.name!r}; {again}"
        )
    made = plain(asdict(model.config))
    other = [f for f in made.keys() | said.config.keys() if f not in hints and made.get(f) != said.config.get(f)]
    if other or made.keys() != said.config.keys():
        differing = sorted(other or made.keys() ^ said.config.keys())
        raise LoadError(
            f"load: {found.name}: its metadata does not agree with its tensors, which give {model.summary()}; "
            f"differing: {_some(differing)}; {again}"
        )


def _deciders(model: Network, dialect: str, said: Mapping[str, str]) -> dict[str, str]:
    """`Origin.fields` of a network. `said`: who said a field, for those said beside keys and shapes."""

    def matters(hint: str) -> bool:
        """Whether another value of a hint would have made another configuration: some files overrule theirs."""
        value = getattr(model.config, hint)
        other = not value if isinstance(value, bool) else 3 if value is None else _one_more(value)
        hints = {h: getattr(model.config, h) for h in model.hints} | {hint: other}
        try:
            return model.config_from(model.state_dict(), dialect, hints) != model.config
        except ValueError:  # it was looked at, and refused
            return True

    deciders = {}
    for name in (f.name for f in fields(model.config)):
        if name in model.fixed:
            deciders[name] = "definition"
        elif name in model.hints and matters(name):
            deciders[name] = said.get(name, "assumed")
        else:
            deciders[name] = "file"
    return deciders


def _one_more(value: Any) -> Any:
    return tuple(map(_one_more, value)) if isinstance(value, tuple) else value + 1


def unwrap(content: Mapping[str, Any], origin: str) -> State:
    """Takes off the wrappings that training code puts around a state dict; raises LoadError if none is inside."""
    for wrapping in WRAPPINGS:
        inner = content.get(wrapping)
        if isinstance(inner, Mapping):
            return unwrap(inner, origin)
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    if not state:
        raise LoadError(f"load: {origin}: expected a state dict; found {_some(list(content))} and no tensor among them")
    if all(k == "n_averaged" or k.startswith("module.") for k in state):  # AveragedModel counts beside its module
        state.pop("n_averaged", None)
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _without_prefix(state: State) -> State:
    """A state dict without what is before the first point of its keys, if that is the same for all."""
    if len({key.partition(".")[0] for key in state}) > 1 or not all("." in key for key in state):
        return state
    return {key.partition(".")[2]: value for key, value in state.items()}


class _NoInit(TorchFunctionMode):
    """Skips the initialisation of parameters: on the meta device it computes nothing, slowly."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _build(
    network: type[Network], dialect: str, state: State, hints: Mapping[str, Any], origin: str, dtype: torch.dtype
) -> Network:
    """Builds the network a state dict was recognised as and fills it; every key has to fit."""
    try:
        converted = dict(network.convert(state, dialect))
        chosen = {k: v for k, v in hints.items() if k in network.hints}
        config = network.config_from(converted, dialect, chosen)
        with torch.device("meta"), _NoInit():
            model = network(config)
    except (KeyError, IndexError, StopIteration, RuntimeError, ValueError, TypeError, OverflowError) as error:
        cause = str(error) or type(error).__name__
        if isinstance(error, KeyError):
            cause = f"the key {error} is missing"
        elif isinstance(error, IndexError):
            cause = "one of its tensors has too few axes"
        raise LoadError(f"load: {origin} looks like {network.name} ({dialect}) but {cause}") from error
    own = model.state_dict()
    problems = {
        "missing keys": [k for k in own if k not in converted],
        "unexpected keys": [k for k in converted if k not in own],
        "wrong shapes": [
            f"{k} {list(converted[k].shape)} instead of {list(own[k].shape)}"
            for k in own
            if k in converted and converted[k].shape != own[k].shape
        ],
    }
    if any(problems.values()):
        details = "; ".join(f"{what}: {_some(keys)}" for what, keys in problems.items() if keys)
        raise LoadError(f"load: {origin} looks like {network.name} ({dialect}) but does not fit {config}: {details}")
    model = model.to_empty(device="cpu").to(dtype)  # a network holds no tensor outside its state dict
    model.load_state_dict(converted)
    return model


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    shown = [name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}..." for name in names[:most]]
    return ", ".join(shown) + more if names else "nothing"


def _nothing_fits(state: State, origin: str) -> str:
    """The message for a state dict that is none of the networks: each one with the keys it would need."""
    lines = []
    for network in NETWORKS:
        missing = [[k for k in keys if k not in state] for keys in network.dialects.values()]
        closest = min(missing, key=len)
        lines.append(f"  {network.name}: no {_some(closest, 3)}")
    return (
        f"load: {origin} is none of the networks known here. Its keys: {_some(list(state))}.\nConsidered:\n"
        + "\n".join(lines)
    )
