"""Where SAM's and CLIP's weights come from, and how they are checked and loaded.

What enters: `SamConfig` and `ClipConfig`. What leaves: models in eval mode on a device, and SHA-256
fingerprints of the weights. Checkpoints are read with `weights_only` (no code in a file is run).
The tiny models of the embedded world take the very path that ViT-H and ViT-B-16 take.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import pickle
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pyarrow as pa
import torch
from filelock import FileLock
from open_clip.factory import get_model_config
from safetensors.torch import load_file
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam

from zsplg_ray.config import ClipConfig, LabelConfig, SamConfig
from zsplg_ray.settings import complain, nearest, override
from zsplg_ray.storage import Place, cache_dir

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OfficialFile:
    """A released checkpoint: its name at the official address, size in bytes and SHA-256."""

    name: str
    size: int
    sha256: str

    @property
    def url(self) -> str:
        """The official address."""
        return f"https://dl.fbaipublicfiles.com/segment_anything/{self.name}"


OFFICIAL = {
    "vit_h": OfficialFile(
        "sam_vit_h_4b8939.pth",
        2_564_550_879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    "vit_l": OfficialFile(
        "sam_vit_l_0b3195.pth",
        1_249_524_607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_b": OfficialFile(
        "sam_vit_b_01ec64.pth",
        375_042_383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
}
"""Checkpoints released with segment-anything (Apache-2.0)."""


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(url: str, to: Path, sha256: str | None, size: int | None = None) -> Path:
    """Bring a file here once; processes that ask at the same time wait for the first.

    Args:
        url: https://, s3://, gs:// or file:// address; http:// only of this machine.
        to: Where the file is kept.
        sha256: What its hash must be; None accepts any.
        size: Its size in bytes, to be told before the download starts.

    Raises: ValueError if it cannot be fetched or its hash is another; no part of it is kept.
    """
    refuse_plain_http(url)
    to.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{to}.lock"):
        if to.exists():
            return to
        told = f" ({size / 2**20:,.0f} MiB)" if size else ""
        log.info("downloading %s%s to %s", url, told, to)
        part = to.with_name(f"{to.name}.part")
        try:
            _copy(url, part)
            found = sha256_file(part)
            if sha256 is not None and found != sha256:
                fix = f"{url} gave another file; download it again or give --sam-checkpoint"
                raise ValueError(complain("weights", f"of SHA-256 {sha256}", found, fix))
            part.replace(to)
        except (OSError, http.client.HTTPException, pa.ArrowException) as e:
            fix = "give a local file with --sam-checkpoint, or check the network"
            rule = "a file that can be downloaded"
            raise ValueError(complain("sam.checkpoint", rule, f"{url} ({e})", fix)) from e
        finally:
            part.unlink(missing_ok=True)
    return to


def refuse_plain_http(url: str) -> None:
    """Raise ValueError if others on the way could put another file in the place of this one."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
        fix = "nobody can tell then whose weights come; download it yourself and check its hash"
        raise ValueError(complain("sam.checkpoint", "an https:// address", url, fix))


def _copy(url: str, to: Path) -> None:
    if url.lower().startswith(("http://", "https://")):
        with urllib.request.urlopen(url, timeout=60) as source, to.open("wb") as sink:
            refuse_plain_http(source.geturl())  # where redirects have led
            while block := source.read(2**20):
                sink.write(block)
            told, got = source.headers.get("Content-Length"), sink.tell()
        if told is not None and int(told) != got:
            raise OSError(f"cut short after {got} of {told} bytes")
        return
    with Place.parse(url).open() as source, to.open("wb") as sink:
        while block := source.read(2**20):
            sink.write(block)


# SAM ---------------------------------------------------------------------------------------------


def sam_checkpoint(config: SamConfig) -> Path | None:
    """The local file with SAM's weights, fetched if need be; None for random weights.

    Raises: ValueError that names `sam.checkpoint` if there is none.
    """
    if config.random_weights:
        return None
    if config.checkpoint is None:
        if config.model == "shapes":
            from zsplg_ray.shapes.sam import WEIGHTS

            return WEIGHTS
        official = OFFICIAL[config.model]
        target = cache_dir() / official.name
        return fetch(official.url, target, official.sha256, official.size)
    if "://" in config.checkpoint:
        return fetch(config.checkpoint, kept_at(config.checkpoint), None)
    path = Path(config.checkpoint).expanduser()
    if not path.is_file():
        fix = "give the path of SAM's .pth file, or leave it out to download the official one"
        raise ValueError(complain("sam.checkpoint", "a file", config.checkpoint, fix))
    return path


def kept_at(uri: str) -> Path:
    """Where a checkpoint from an address is kept on this machine."""
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return cache_dir() / f"{name}{Path(uri.partition('?')[0]).suffix}"


def sam_sha256(config: SamConfig) -> str:
    """SHA-256 of SAM's checkpoint, or "random"."""
    path = sam_checkpoint(config)
    return sha256_file(path) if path else "random"


def load_sam(config: SamConfig, device: str = "cpu") -> Sam:
    """SAM with its weights, in eval mode.

    Raises: ValueError if the checkpoint is missing, unreadable, or of another model.
    """
    path = check_sam(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sam = _sam_builders()[config.model]()
    if path is not None:
        sam.load_state_dict(read_state(path))
    return sam.eval().requires_grad_(False).to(device)


def blank_sam(model: str) -> Sam:
    """A SAM of that name without weights (on torch's `meta` device), to ask for its sizes."""
    with torch.device("meta"):
        return _sam_builders()[model]()


def absolute_paths(config: LabelConfig) -> LabelConfig:
    """The same with local weights by absolute path, for workers that start in another folder."""
    changes: dict[str, str] = {}
    checkpoint, clip = config.sam.checkpoint, config.clip.model
    if checkpoint is not None and "://" not in checkpoint:
        changes["sam.checkpoint"] = str(Path(checkpoint).expanduser().absolute())
    scheme, _, folder = clip.rpartition("local-dir:")
    model, _, file = clip.partition("/")
    if folder != clip and not scheme:
        changes["clip.model"] = f"local-dir:{Path(folder).expanduser().absolute()}"
    elif not clip.startswith("hf-hub:") and Path(file).expanduser().is_file():
        changes["clip.model"] = f"{model}/{Path(file).expanduser().absolute()}"
    return override(config, changes)


def check_sam(config: SamConfig) -> Path | None:
    """The file of `sam_checkpoint`, once its names and shapes were looked at; nothing is computed.

    Raises: ValueError if there is no checkpoint or if it belongs to another model.
    """
    path = sam_checkpoint(config)
    if path is None:
        return None
    wanted = {k: v.shape for k, v in blank_sam(config.model).state_dict().items()}
    found = {k: v.shape for k, v in read_state(path).items()}
    if wanted != found:
        wrong = sorted(k for k in {*wanted, *found} if wanted.get(k) != found.get(k))
        told = f"{path} (differs in {len(wrong)} tensors, such as {wrong[0]})"
        fix = "give the file that belongs to --sam, or another --sam"
        raise ValueError(complain("sam.checkpoint", f"the weights of {config.model}", told, fix))
    return path


def _sam_builders() -> dict[str, Callable[..., Sam]]:
    from zsplg_ray.shapes.sam import build_sam_shapes

    return {**sam_model_registry, "shapes": build_sam_shapes}


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from .safetensors or a torch file, as float32 on the CPU.

    Raises: ValueError if the file is not a state dict, or holds code.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            zipped = zipfile.is_zipfile(path)  # what torch >= 1.6 writes; then nothing is copied
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    except Exception as e:  # each reader has exceptions of its own
        fix = "download it again; only plain tensors are read, never code"
        name, rule = "sam.checkpoint", "a .pth or .safetensors state dict"
        raise ValueError(complain(name, rule, f"{path} ({_in_short(e)})", fix)) from e


def _in_short(error: Exception) -> str:
    """The first line of what a reader of weights says."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is cut short or holds other things than tensors"  # torch would advise to run it
    return (str(error).splitlines() or [""])[0] or type(error).__name__


# CLIP --------------------------------------------------------------------------------------------


def clip_source(config: ClipConfig) -> tuple[str, str | None]:
    """open_clip's (model name, pretrained tag or file). Raises: ValueError for an unknown model."""
    if config.model == "shapes":
        from zsplg_ray.shapes.clip import local_dir

        return f"local-dir:{local_dir()}", None
    if config.model.startswith(("hf-hub:", "local-dir:")):
        return config.model, None
    model, _, pretrained = config.model.partition("/")
    if model not in open_clip.list_models():
        near = nearest(model, open_clip.list_models())
        fix = f"did you mean {near}?" if near else "see open_clip.list_models()"
        raise ValueError(complain("clip.model", "MODEL/PRETRAINED of open_clip", config.model, fix))
    if config.random_weights:
        return model, None
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags and not Path(pretrained).expanduser().is_file():
        fix = f"PRETRAINED is a file or one of {', '.join(tags) or 'none'}"
        raise ValueError(complain("clip.model", "MODEL/PRETRAINED of open_clip", config.model, fix))
    return model, pretrained if pretrained in tags else str(Path(pretrained).expanduser())


def _refuse_code(name: str) -> None:
    """Raise ValueError if what describes a model asks to run code that comes with it."""
    if name.startswith(("hf-hub:", "local-dir:")):
        described = get_model_config(name) or {}
        if "trust_remote_code" in json.dumps(described):
            rule, fix = "a model without code of its own", "only weights are read, never code"
            raise ValueError(complain("clip.model", rule, name, fix))


def load_clip(config: ClipConfig, device: str = "cpu") -> tuple[Any, Any]:
    """(open_clip model in eval mode, tokenizer).

    Raises: ValueError if the model is unknown or its weights cannot be had.
    """
    name, pretrained = clip_source(config)
    if pretrained is not None and not Path(pretrained).is_file():
        log.info("CLIP %s: open_clip downloads it from its hub unless it is cached", config.model)
    try:
        _refuse_code(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.create_model(
                name,
                pretrained=pretrained,
                load_weights=not config.random_weights,
                require_pretrained=not config.random_weights,
                device=device,
            )
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as e:  # open_clip and the hub client raise many kinds
        fix = "check the network, or give MODEL/FILE or local-dir:PATH"
        rule = "a model whose weights can be loaded"
        shown = f"{config.model} ({_in_short(e)})"
        raise ValueError(complain("clip.model", rule, shown, fix)) from e
    return model.eval().requires_grad_(False), tokenizer


def state_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over names and bytes of all parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
