"""SAM and CLIP: whether their weights are here, what their hashes are, whether there is room.

What enters: `sam` and `clip` of the settings. What leaves: findings. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import constants, try_to_load_from_cache
from open_clip.pretrained import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME, get_pretrained_cfg

from zsplg_ray.cluster.doctor.finding import Finding, finding
from zsplg_ray.config import ClipConfig, DoctorConfig, SamConfig
from zsplg_ray.label.budget import images_at_once, memory_gib, needed_gib, points_together
from zsplg_ray.label.presets import resolve_sam
from zsplg_ray.label.weights import (
    OFFICIAL,
    blank_sam,
    check_sam,
    clip_source,
    kept_at,
    sha256_file,
)
from zsplg_ray.storage import cache_dir

CLIP_BYTES = 2**30
"""Room that is allowed for a CLIP that is not here: ViT-B-16 takes 600 MB."""


def sam(config: DoctorConfig) -> Finding:
    """SAM's weights."""
    model, checkpoint = config.sam.model, config.sam.checkpoint
    if config.sam.random_weights:
        return finding("ok", f"{model} with random weights: its masks mean nothing")
    if checkpoint is not None and "://" not in checkpoint:
        path = Path(checkpoint).expanduser()
        if not path.is_file():
            return finding("fail", f"no file {checkpoint}", "give another --sam-checkpoint")
        check_sam(config.sam)
        return finding("ok", f"{checkpoint}, SHA-256 {sha256_file(path)}")
    missing = sam_to_fetch(config.sam)
    if missing is not None:
        url, size = missing
        much = f"{size / 2**20:,.0f} MiB " if size else ""
        fix = f"the first run downloads {much}from {url}, or give --sam-checkpoint"
        return finding("warn", f"{checkpoint or model} is not here yet", fix)
    if checkpoint is None and model != "shapes":
        here = cache_dir() / OFFICIAL[model].name
        if sha256_file(here) != OFFICIAL[model].sha256:
            return finding("fail", f"{here} is not the official file", f"delete {here}")
        return finding("ok", f"{here}, SHA-256 {OFFICIAL[model].sha256} as released")
    found = check_sam(config.sam)
    assert found is not None, "only random weights have no file"
    name = "the tiny SAM that comes with the package" if model == "shapes" else str(found)
    return finding("ok", f"{name}, SHA-256 {sha256_file(found)}")


def sam_to_fetch(config: SamConfig) -> tuple[str, int | None] | None:
    """Address, and bytes if known, of what a first run would download; None: it is here."""
    if config.random_weights:
        return None
    if config.checkpoint is not None:
        if "://" not in config.checkpoint or kept_at(config.checkpoint).exists():
            return None
        return config.checkpoint, None
    if config.model == "shapes" or (cache_dir() / OFFICIAL[config.model].name).exists():
        return None
    return OFFICIAL[config.model].url, OFFICIAL[config.model].size


def memory(config: DoctorConfig) -> Finding:
    """How much memory SAM gets here and what that is enough for."""
    model, device = blank_sam(config.sam.model), "cuda" if torch.cuda.is_available() else "cpu"
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    settings = resolve_sam(config.sam)
    gib = memory_gib(model, settings, device, taken_gib=weights)
    images = images_at_once(model, settings, gib, device)
    points = points_together(model, settings.points_per_batch, device)
    told = f"sam.memory_gib {gib:.1f} on {device}: {images} images, {points} points of each at once"
    told += " (and at most actors.in_flight)" if images > 1 else ""
    wanted = needed_gib(model, settings, device)
    if wanted > gib:
        fix = f"one image may want {wanted:.1f} GiB; fewer points are tried when memory runs out"
        return finding("warn", told, fix)
    return finding("ok", told)


def clip(config: DoctorConfig) -> Finding:
    """CLIP's weights."""
    model = config.clip.model
    if model == "shapes":
        from zsplg_ray.shapes.clip import WEIGHTS

        told = "the tiny CLIP that comes with the package"
        return finding("ok", f"{told}, SHA-256 {sha256_file(WEIGHTS)}")
    clip_source(config.clip)  # says so if there is no such model
    if config.clip.random_weights:
        return finding("ok", f"{model} with random weights: its names mean nothing")
    if model.startswith("local-dir:"):
        return _clip_folder(Path(model.removeprefix("local-dir:")).expanduser())
    here = clip_file(config.clip)
    if here is not None:
        return finding("ok", f"{model} is here, {here}, SHA-256 {sha256_file(here)}")
    told = f"{model} is known to open_clip and not here yet"
    if constants.HF_HUB_OFFLINE:
        fix = "unset HF_HUB_OFFLINE for the first run, or give MODEL/FILE"
        return finding("fail", f"{told}, and HF_HUB_OFFLINE forbids to download it", fix)
    return finding("warn", told, "the first run downloads it, or give MODEL/FILE")


def _clip_folder(folder: Path) -> Finding:
    """A model in a folder, as open_clip reads it."""
    weights = (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
    found = next((folder / name for name in weights if (folder / name).is_file()), None)
    if found is None or not (folder / "open_clip_config.json").is_file():
        fix = f"it wants open_clip_config.json and one of {', '.join(weights)}"
        return finding("fail", f"no model in {folder}", fix)
    return finding("ok", f"{found}, SHA-256 {sha256_file(found)}")


def clip_file(config: ClipConfig) -> Path | None:
    """The weights that open_clip would load without a network, where it looks for them itself.

    Source: open_clip.pretrained.download_pretrained.
    """
    name, pretrained = clip_source(config)
    if name.startswith("hf-hub:"):
        return _from_hub(name.removeprefix("hf-hub:"), HF_WEIGHTS_NAME)
    if pretrained is None:
        return None
    if Path(pretrained).is_file():
        return Path(pretrained)
    known = get_pretrained_cfg(name, pretrained)
    if hub := known.get("hf_hub"):
        repository, file = os.path.split(hub)
        return _from_hub(repository, file or HF_WEIGHTS_NAME)
    kept = Path("~/.cache/clip").expanduser() / Path(known.get("url", "")).name
    return kept if kept.is_file() else None


def _from_hub(repository: str, name: str) -> Path | None:
    """A file in the hub's cache, or its twin in the format that open_clip prefers."""
    plain = name == HF_WEIGHTS_NAME
    safe = HF_SAFE_WEIGHTS_NAME if plain else f"{name.rpartition('.')[0]}.safetensors"
    for file in (safe, name):
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return Path(found)
    return None


def cache(config: DoctorConfig) -> Finding:
    """Room for the weights that a first run would download."""
    missing = sam_to_fetch(config.sam)
    needs = [(cache_dir(), (missing[1] or 0) if missing else 0)]
    plain = config.clip.model == "shapes" or config.clip.model.startswith("local-dir:")
    if not plain and not config.clip.random_weights:
        with contextlib.suppress(ValueError):  # of a model that is none, `clip` tells
            if clip_file(config.clip) is None:
                needs.append((Path(constants.HF_HUB_CACHE), CLIP_BYTES))
    told, state, fixes = [], "ok", []
    for folder, need in needs:
        there = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(there).free
        told.append(f"{free / 2**30:.0f} GiB free for {folder}")
        if not need:
            continue
        told[-1] += f", {need / 2**30:.1f} to come"
        if not os.access(there, os.W_OK):
            state = "fail"
            fixes.append(f"{there} may not be written: set ZSPLG_CACHE or HF_HOME to another")
        elif free < 1.5 * need:  # the file, and what else is written meanwhile
            state = "fail"
            fixes.append("make room, or set ZSPLG_CACHE or HF_HOME to a larger disk")
    return finding("fail" if state == "fail" else "ok", "; ".join(told), "; ".join(fixes))
