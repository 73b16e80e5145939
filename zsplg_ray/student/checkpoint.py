"""A model in a file: how `zsplg train` writes one, and every kind of file that one is read from.

What enters: a path or URI. What leaves: a `Student`, that is the model with its settings and its
class list, without which the numbers that it gives mean nothing. Read are our own files, a run's
folder (best.pt in it, else last.pt), checkpoints that UniMatch released (weights under `model`,
names that may begin with `module.`), plain state dicts, and .safetensors.

Only tensors and plain values are ever read, never code. The widths of the decoder and the number of
classes are read off the weights, and so is the backbone where the file does not tell it: the same
file always makes the same model, whatever the defaults are by then.

Source: UniMatch (Yang et al., CVPR 2023; github.com/LiheYoung/UniMatch, unimatch.py, MIT) for the
layout of its checkpoints.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from zsplg_ray.config import StudentConfig
from zsplg_ray.settings import complain, flatten, from_mapping
from zsplg_ray.storage import Place
from zsplg_ray.student.convolutions import make_lean
from zsplg_ray.student.model import DeepLabV3Plus
from zsplg_ray.vocab import ClassList, class_list

log = logging.getLogger(__name__)

FORMAT = 1
"""Number of the layout of our own files; a change that older versions cannot read raises it."""

IN_A_RUN = ("best.pt", "last.pt")
"""Which file of a training run's folder is meant by the folder, the first that is there."""

GUESSED = (
    *("resnet50s", "resnet101s", "resnet18", "resnet34", "resnet50", "resnet101", "xception65"),
    *("test_byobnet", "test_resnet", "mobilenetv3_small_050"),
)
"""Backbones tried where a file does not name its own. UniMatch's ResNets are timm's with an `s`."""

_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before the names."""

_SHOWN = 3


@dataclass
class Student:
    """A trained model and what its outputs mean."""

    model: DeepLabV3Plus
    """In evaluation mode, on the CPU."""
    config: StudentConfig
    """The settings that `model` was built with."""
    classes: ClassList
    """Class k of the logits is `classes.names[k]`."""
    sha256: str
    """Of the weights, see `weights_sha256`."""
    conf_thresh: float | None = None
    """`unimatch.conf_thresh` of the training run; None if the file does not tell."""


@dataclass(frozen=True)
class Weights:
    """What a file holds."""

    state: dict[str, Tensor]
    """Parameter name -> tensor on the CPU, names without wrappers."""
    uri: str
    """The file itself."""
    config: StudentConfig | None = None
    """None if the file is not one of ours."""
    classes: ClassList | None = None
    extra: dict[str, Any] = field(default_factory=dict)


# Writing -----------------------------------------------------------------------------------------


def pack(
    model_state: Mapping[str, Tensor],
    config: StudentConfig,
    classes: ClassList,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """The bytes of a checkpoint, tensors and plain values only.

    Args:
        model_state: A model's state dict, on any device; wrappers in its names are taken off.
        config: The settings that the model was built with.
        classes: What its outputs mean.
        extra: More plain values; `conf_thresh` is what `Student.conf_thresh` becomes.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in _unwrapped(model_state).items()}
    content = {
        "format": FORMAT,
        "model": state,
        "student": flatten(config),
        "classes": classes.to_dict(),
        "extra": dict(extra or {}),
    }
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


# Reading -----------------------------------------------------------------------------------------


def load_student(
    uri: str,
    *,
    classes: str | ClassList | None = None,
    backbone: str | None = None,
    otherwise: ClassList | None = None,
    name: str = "model",
) -> Student:
    """The model in a file or in a training run's folder.

    Args:
        uri: Path or URI; see the module's text for what it may be.
        classes: Class names (SPEC), for files that carry none; else they must be the file's.
        backbone: timm's name of the backbone, for files that do not tell it.
        otherwise: The class list where neither the file nor `classes` tells one.
        name: Name of the setting that `uri` comes from, for errors.

    Raises:
        ValueError: There is no such file, it holds no such model, or its classes are not known.
    """
    weights = read_weights(uri, name)
    _check_parts(weights, name)
    told = class_list(classes) if isinstance(classes, str) else classes
    known = _classes(weights, told, otherwise, name)
    config = weights.config or _read_off(weights, backbone, name)
    if backbone is not None and backbone != config.backbone:
        fix = "leave --backbone out"
        raise ValueError(complain("backbone", f"{config.backbone} as in {uri}", backbone, fix))
    model = build(config, len(known))
    _load_strictly(model, weights, config.backbone, name)
    threshold = weights.extra.get("conf_thresh")
    return Student(model.eval(), config, known, weights_sha256(model), threshold)


def build(config: StudentConfig, n_classes: int) -> DeepLabV3Plus:
    """The model of `config` with weights that are to be replaced; torch's generator is left alone.

    Raises: ValueError if timm has no such backbone.
    """
    with torch.random.fork_rng(devices=[]):
        model = DeepLabV3Plus(config, n_classes)
    make_lean(model)
    return model


def load_init(model: nn.Module, uri: str, name: str = "student.init") -> str:
    """Put the weights of a file into a model as far as they fit; the others stay as they are.

    A classifier of other classes does not fit. The weights may also be those of a bare backbone.

    Returns: SHA-256 of the weights in the file.

    Raises: ValueError if the file cannot be read or nothing in it fits.
    """
    state, wanted = read_weights(uri, name).state, model.state_dict()
    if not wanted.keys() & state.keys():
        state = {f"backbone.{key}": value for key, value in state.items()}
    fitting = {k: v for k, v in state.items() if k in wanted and v.shape == wanted[k].shape}
    if not fitting:
        fix = "give the weights of a model over the same backbone"
        raise ValueError(complain(name, "weights that fit this model", uri, fix))
    model.load_state_dict(fitting, strict=False)
    left = sorted(wanted.keys() - fitting.keys())
    if left:
        taken = f"{len(fitting)} of {len(wanted)} tensors taken from {uri}"
        log.warning("%s, the rest starts anew: %s", taken, _some(left))
    return state_sha256(state)


def read_weights(uri: str, name: str = "model") -> Weights:
    """What a file, or the best model of a training run's folder, holds.

    Raises: ValueError if there is none, or it holds no state dict.
    """
    place = _file(Place.parse(uri), uri, name)
    try:
        data = place.read()
        if place.suffix == ".safetensors":
            content: Any = safetensors.torch.load(data)
        else:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as e:  # each reader has exceptions of its own
        fix = "only tensors and plain values are read, never code"
        rule = "a checkpoint, a state dict or .safetensors"
        raise ValueError(complain(name, rule, f"{place.uri} ({_in_short(e)})", fix)) from e
    return _opened(content, place.uri, name)


def _file(place: Place, uri: str, name: str) -> Place:
    """The file that is meant."""
    kind = place.kind()
    if kind == "folder":
        for file in IN_A_RUN:
            if place.child(file).kind() == "file":
                return place.child(file)
        fix = "give the folder of a `zsplg train --out` run, or a file with weights"
        raise ValueError(complain(name, f"a folder with {' or '.join(IN_A_RUN)}", uri, fix))
    if kind is None:
        raise ValueError(complain(name, "something that exists", uri, "check the path"))
    return place


def _opened(content: Any, uri: str, name: str) -> Weights:
    """The parts of a file's content, whoever wrote it."""
    found = dict(content) if isinstance(content, Mapping) else {}
    ours = isinstance(found.get("format"), int) and "student" in found and "classes" in found
    if ours and found["format"] != FORMAT:
        fix = "read it with the version of zsplg_ray that wrote it, or a newer one"
        raise ValueError(complain(name, f"of format {FORMAT}", f"{uri}: {found['format']}", fix))
    named = (found.get(key) for key in ("model", "state_dict"))
    inner = next((state for state in named if isinstance(state, dict)), found)
    state = _unwrapped({k: v for k, v in inner.items() if isinstance(v, Tensor)})
    if not state:
        fix = "give a state dict, or a checkpoint that holds one under `model`"
        raise ValueError(complain(name, "a file with weights", f"{uri} (no tensors)", fix))
    if not ours:
        return Weights(state, uri)
    config = from_mapping(StudentConfig, found["student"])
    classes = ClassList.from_dict(found["classes"])
    return Weights(state, uri, config, classes, dict(found.get("extra", {})))


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put before all of them."""
    found = dict(state)
    while found and any(all(k.startswith(w) for k in found) for w in _WRAPPERS):
        found = {k.partition(".")[2]: v for k, v in found.items()}
    return found


# What weights tell of their model -----------------------------------------------------------------


def _check_parts(weights: Weights, name: str) -> None:
    """The tensors that tell a model's widths are there. Raises: ValueError."""
    for key in ("classifier.weight", "reduce.0.weight", "head.b0.0.weight"):
        if key not in weights.state or weights.state[key].ndim != 4:
            fix = "its tensors are called as in UniMatch's model; a bare backbone is not enough"
            shown = f"{weights.uri} (no {key})"
            raise ValueError(complain(name, "the weights of a DeepLabV3+", shown, fix))


def _read_off(weights: Weights, backbone: str | None, name: str) -> StudentConfig:
    """The settings of the model that weights belong to."""
    shapes = {key: tuple(value.shape) for key, value in weights.state.items()}
    if "backbone.block1.sepconv1.depthwise.weight" in shapes and backbone is None:
        fix = "its ResNets can be read; for this one use UniMatch's own code"
        rule = "a model over a timm backbone"
        raise ValueError(complain(name, rule, f"{weights.uri} (UniMatch's own Xception)", fix))
    (_, decoder, *_), (low, *_) = shapes["classifier.weight"], shapes["reduce.0.weight"]
    aspp, high, *_ = shapes["head.b0.0.weight"]
    config = StudentConfig(
        pretrained=False,
        aspp_channels=None if aspp == high // 8 else aspp,
        low_level_channels=low,
        decoder_channels=decoder,
    )
    wanted = {key: shape for key, shape in shapes.items() if key.startswith("backbone.")}
    for guess in (backbone,) if backbone else GUESSED:
        if backbone or _backbone_shapes(guess) == wanted:
            return replace(config, backbone=guess)
    fix = "give timm's name of it with --backbone"
    shown = f"{weights.uri} ({len(wanted)} tensors)"
    raise ValueError(complain(name, f"a model over one of {', '.join(GUESSED)}", shown, fix))


@functools.lru_cache(maxsize=len(GUESSED))
def _backbone_shapes(backbone: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a backbone's tensors; nothing is allocated."""
    with torch.device("meta"):
        model = DeepLabV3Plus(StudentConfig(backbone=backbone), 2)
    found = {f"backbone.{k}": v for k, v in model.backbone.state_dict().items()}
    return {key: tuple(value.shape) for key, value in found.items()}


def _classes(
    weights: Weights, told: ClassList | None, otherwise: ClassList | None, name: str
) -> ClassList:
    """The class list of a model: its own, else the one that the user tells."""
    if weights.classes is not None:
        if told is not None and told.names != weights.classes.names:
            rule = f"those of {weights.uri}, {', '.join(weights.classes.names)}"
            fix = "leave --classes out"
            raise ValueError(complain("classes", rule, ", ".join(told.names), fix))
        return weights.classes
    n_classes, told = len(weights.state["classifier.weight"]), told or otherwise
    if told is None:
        fix = f"{weights.uri} has {n_classes} classes with background: add --classes SPEC"
        raise ValueError(complain("classes", "given", f"a {name} without class names", fix))
    if len(told) != n_classes:
        rule = f"{n_classes} with background, as {weights.uri} has"
        fix = "give the class list that it was trained with, in its order"
        raise ValueError(complain("classes", rule, f"{len(told)}", fix))
    return told


def _load_strictly(model: nn.Module, weights: Weights, backbone: str, name: str) -> None:
    """Every tensor of the model is in the file, and none besides. Raises: ValueError."""
    wanted, state = model.state_dict(), weights.state
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    both = sorted(wanted.keys() & state.keys())
    shapes = [key for key in both if state[key].shape != wanted[key].shape]
    differences = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    told = "; ".join(f"{what}: {_some(keys)}" for what, keys in differences.items() if keys)
    if told:
        fix = "give the backbone that it was trained with (--backbone)"
        rule = f"the weights of a DeepLabV3+ over {backbone}"
        raise ValueError(complain(name, rule, f"{weights.uri} ({told})", fix))
    model.load_state_dict(state, strict=True)


# Names of weights ---------------------------------------------------------------------------------


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names and bytes of all parameters and buffers, in the order of their names."""
    return state_sha256(model.state_dict())


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(key.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


def _some(keys: list[str]) -> str:
    more = f", and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def _in_short(error: Exception) -> str:
    """The first line of what a reader of weights says."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is cut short or holds other things than tensors"  # torch would advise to run it
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
