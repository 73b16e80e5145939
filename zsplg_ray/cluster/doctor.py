"""`zsplg doctor`: what this machine can do and what to mend, before a long job finds out.

What enters: which models are meant to be used. What leaves: findings, each ok, warn or fail, with
the fix. Nothing is downloaded and nothing is left behind.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import ray
import torch

from zsplg_ray.cluster.session import ray_session
from zsplg_ray.config import DoctorConfig
from zsplg_ray.label.budget import images_at_once, memory_gib, needed_gib, points_together
from zsplg_ray.label.presets import resolve_sam
from zsplg_ray.label.weights import OFFICIAL, blank_sam, clip_source, sha256_file
from zsplg_ray.rundir import RunFolder
from zsplg_ray.runinfo import PACKAGES
from zsplg_ray.storage import cache_dir

Finding = dict[str, str]


def examine(config: DoctorConfig) -> list[Finding]:
    """Look at everything that `label` needs; each finding has what, state, told and fix."""
    looks: dict[str, Callable[[DoctorConfig], Finding]] = {
        "packages": _packages,
        "machine": _machine,
        "gpu": _gpu,
        "sam": _sam,
        "memory": _memory,
        "clip": _clip,
        "storage": _storage,
        "ray": _ray,
    }
    findings = []
    for what, look in looks.items():
        try:
            found = look(config)
        except Exception as e:  # a finding, not a reason to stop looking
            found = _finding("fail", f"{type(e).__name__}: {e}", "see the message")
        findings.append({"what": what, **found})
    return findings


def report(findings: list[Finding]) -> str:
    """The findings as lines."""
    lines = []
    for f in findings:
        lines.append(f"{f['state']:<5} {f['what']:<9} {f['told']}")
        if f["fix"]:
            lines.append(f"{'':<16}-> {f['fix']}")
    return "\n".join(lines)


def _finding(state: str, told: str, fix: str = "") -> Finding:
    return {"state": state, "told": " ".join(told.split()), "fix": fix}


def _packages(config: DoctorConfig) -> Finding:
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return _finding("ok", f"Python {sys.version.split()[0]}, {', '.join(found)}")


def _machine(config: DoctorConfig) -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    told = f"{os.cpu_count()} CPUs, {memory:.0f} GiB of memory"
    # Twice SAM's weights while they are read; CLIP and the rest.
    need = {"vit_h": 7, "vit_l": 5, "vit_b": 3, "shapes": 2}[config.sam.model]
    if memory < need:
        fix = f"{config.sam.model} wants about {need} GiB; choose a smaller --sam"
        return _finding("warn", told, fix)
    return _finding("ok", told)


def _gpu(config: DoctorConfig) -> Finding:
    if not torch.cuda.is_available():
        fix = (
            "with vit_b to vit_h count on half a minute to minutes an image; --sam shapes is quick"
        )
        return _finding("warn", "no GPU that torch can use", fix)
    names = [
        f"{p.name} {p.total_memory / 2**30:.0f} GiB"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return _finding("ok", ", ".join(names))


def _sam(config: DoctorConfig) -> Finding:
    model, checkpoint = config.sam.model, config.sam.checkpoint
    if checkpoint is not None:
        if "://" in checkpoint:
            return _finding("ok", f"{checkpoint} will be fetched once")
        path = Path(checkpoint).expanduser()
        if not path.is_file():
            return _finding("fail", f"no file {checkpoint}", "give another --sam-checkpoint")
        return _finding("ok", f"{checkpoint}, SHA-256 {sha256_file(path)}")
    if model == "shapes":
        return _finding("ok", "the tiny SAM that comes with the package")
    official = OFFICIAL[model]
    here = cache_dir() / official.name
    if not here.exists():
        size = f"{official.size / 2**20:,.0f} MiB"
        fix = f"the first run downloads {size} from {official.url}, or give --sam-checkpoint"
        return _finding("warn", f"{model} is not here yet", fix)
    if sha256_file(here) != official.sha256:
        return _finding("fail", f"{here} is not the official file", "delete it")
    return _finding("ok", f"{here}, SHA-256 as released")


def _memory(config: DoctorConfig) -> Finding:
    """How much memory SAM gets here and what that is enough for."""
    sam, device = blank_sam(config.sam.model), "cuda" if torch.cuda.is_available() else "cpu"
    weights = sum(p.numel() * p.element_size() for p in sam.parameters()) / 2**30
    settings = resolve_sam(config.sam)
    gib = memory_gib(sam, settings, device, taken_gib=weights)
    images = images_at_once(sam, settings, gib, device)
    points = points_together(sam, settings.points_per_batch, device)
    told = f"sam.memory_gib {gib:.1f} on {device}: {images} images, {points} points of each at once"
    told += " (and at most actors.in_flight)" if images > 1 else ""
    wanted = needed_gib(sam, settings, device)
    if wanted > gib:
        fix = f"one image may want {wanted:.1f} GiB; fewer points are tried when memory runs out"
        return _finding("warn", told, fix)
    return _finding("ok", told)


def _clip(config: DoctorConfig) -> Finding:
    name, pretrained = clip_source(config.clip)
    if name.startswith("local-dir:") or (pretrained and Path(pretrained).is_file()):
        return _finding("ok", f"{config.clip.model} is here")
    fix = "the first run downloads it unless open_clip has it in its cache, or give MODEL/FILE"
    return _finding("ok", f"{config.clip.model} is known to open_clip", fix)


def _storage(config: DoctorConfig) -> Finding:
    folder = RunFolder(config.out)
    made = folder.local and not Path(folder.path).exists()
    name = f"_doctor.{uuid.uuid4().hex[:8]}"
    folder.write_bytes(name, b"ok")
    back = folder.read_bytes(name)
    folder.fs.delete_file(f"{folder.path}/{name}")
    if made:
        Path(folder.path).rmdir()
    if back != b"ok":
        return _finding("fail", f"{config.out} does not give back what was written", "use another")
    if not folder.local:
        return _finding("ok", f"{config.out} can be written and read")
    there = next(p for p in (Path(folder.path), *Path(folder.path).parents) if p.exists())
    free = shutil.disk_usage(there).free / 2**30
    told = f"{config.out} can be written and read, {free:.0f} GiB free"
    return _finding("ok" if free > 5 else "warn", told, "" if free > 5 else "make room")


def _ray(config: DoctorConfig) -> Finding:
    with ray_session(config.ray):
        have = ray.cluster_resources()
        nodes = sum(node["Alive"] for node in ray.nodes())
        told = f"{nodes} nodes, {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"
    if have.get("CPU", 0) < 2:
        return _finding("warn", told, "reading and labelling want a CPU each; give Ray 2 or more")
    return _finding("ok", told)
