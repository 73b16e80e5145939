"""The machine itself: packages, CPUs and memory, GPUs, shared memory, open files.

What enters: settings, of which few matter here. What leaves: findings.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import torch
from packaging.requirements import Requirement

from zsplg_ray.cluster.doctor.finding import Finding, finding
from zsplg_ray.config import DoctorConfig
from zsplg_ray.runinfo import PACKAGES

NEED_GIB = {"vit_h": 7, "vit_l": 5, "vit_b": 3, "shapes": 2}
"""Memory by SAM: twice its weights while they are read; CLIP and the rest."""
STORE_SHARE = 0.3
"""Part of the machine's memory that Ray takes for its object store unless told."""
LEAST_STORE_GIB = 1.0
"""A smaller one holds few photographs that wait for an actor."""
FILES = 8192
"""Open files that Ray recommends; it warns below half of it."""


def packages(config: DoctorConfig) -> Finding:
    """Versions, and whether they are those that this package asks for."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    told = f"Python {sys.version.split()[0]}, {', '.join(found)}"
    wrong = []
    for need in map(Requirement, importlib.metadata.requires("zsplg_ray") or []):
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(have, prereleases=True):
            wrong.append(f"{need.name} is {have}, not {need.specifier}")
    if wrong:
        return finding("fail", f"{told}; {', '.join(wrong)}", "pip install --upgrade zsplg_ray")
    return finding("ok", told)


def machine(config: DoctorConfig) -> Finding:
    """CPUs and memory."""
    total, free = memory_gib()
    told = f"{os.cpu_count()} CPUs, {total:.0f} GiB of memory, {free:.0f} free"
    need = NEED_GIB[config.sam.model]
    if free < need:
        fix = f"{config.sam.model} wants about {need} GiB"
        better = "end other programs" if total >= need else "choose a smaller --sam"
        return finding("warn", told, f"{fix}; {better}")
    return finding("ok", told)


def memory_gib() -> tuple[float, float]:
    """Memory of this machine, or of the container that we are in, and what is free of it."""
    page = os.sysconf("SC_PAGE_SIZE") / 2**30
    total = os.sysconf("SC_PHYS_PAGES") * page
    free = os.sysconf("SC_AVPHYS_PAGES") * page
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable")) / 2**20
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) / 2**30
        if limit != "max" and int(limit) / 2**30 < total:
            total = int(limit) / 2**30
            free = min(free, max(0.0, total - used))
    except (OSError, ValueError, StopIteration):
        pass  # not Linux, or no container
    return total, free


def gpu(config: DoctorConfig) -> Finding:
    """GPUs that torch can use; why not, where a driver is there."""
    if not torch.cuda.is_available():
        told, fix = no_gpu()
        slow = "with vit_b to vit_h count on half a minute to minutes an image"
        return finding("warn", told, f"{fix}{slow}; --sam shapes is quick")
    told, fix = [], ""
    built = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        version = f"{card.major}.{card.minor}"
        told.append(f"{card.name}, {free:.0f} of {total:.0f} GiB free, compute {version}")
        if not runs_on((card.major, card.minor), built):
            fix = f"this torch is built for {' '.join(built)}: install one for compute {version}"
            return finding("fail", "; ".join(told), fix)
        if free < total / 2:
            fix = "other programs hold most of its memory: see nvidia-smi"
    versions = f"driver {driver() or 'unknown'}, torch for CUDA {torch.version.cuda}"
    return finding("warn" if fix else "ok", f"{'; '.join(told)}; {versions}", fix)


def runs_on(compute: tuple[int, int], built: list[str]) -> bool:
    """Whether code for these architectures (`sm_90`, or `compute_90`, which is compiled when it is
    loaded) runs on a GPU of that compute capability. Source: NVIDIA's CUDA C++ programming guide.
    """
    for name in built:
        kind, _, number = name.rstrip("af").partition("_")
        if not number.isdecimal():
            continue
        major, minor = int(number[:-1]), int(number[-1])
        if kind == "sm" and major == compute[0] and minor <= compute[1]:
            return True
        if kind == "compute" and (major, minor) <= compute:
            return True
    return not built


def no_gpu() -> tuple[str, str]:
    """Why torch sees no GPU, and what to do, if there are signs of one."""
    told = "no GPU that torch can use"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return f"{told}: CUDA_VISIBLE_DEVICES hides them", "unset CUDA_VISIBLE_DEVICES; else "
    version = driver()
    if version is None and not Path("/dev/nvidiactl").exists() and not shutil.which("nvidia-smi"):
        return told, ""
    told += f", though NVIDIA's driver {version or ''} is here".replace("  ", " ")
    if torch.version.cuda is None:
        return f"{told}: this torch is built without CUDA", "install a torch with CUDA; else "
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        return told, "give this container its GPUs (docker run --gpus all); else "
    try:
        torch.cuda.init()
        why = "it counts none"
    except (RuntimeError, AssertionError) as e:
        why = str(e).splitlines()[0]
    fix = f"update the driver, or install a torch for an older CUDA than {torch.version.cuda}"
    return f"{told}: {why}", f"{fix}; else "


def driver() -> str | None:
    """Version of NVIDIA's driver; None if there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", text)
    return found.group(1) if found else None


def shared_memory(config: DoctorConfig) -> Finding:
    """Room for the object store of a Ray that is started here."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return finding("ok", "no /dev/shm; Ray keeps its objects in /tmp")
    size = shutil.disk_usage(place).total / 2**30
    asked = config.ray.object_store_gib
    want = asked or min(memory_gib()[0] * STORE_SHARE, 200.0)
    told = f"/dev/shm holds {size:.1f} GiB, Ray's object store wants {want:.1f}"
    fix = "give the container more (docker run --shm-size=8g)"
    if asked and asked > size:
        return finding("warn", told, f"{fix}, or a smaller --ray.object-store-gib")
    if size < want and size < LEAST_STORE_GIB:
        return finding("warn", f"{told}: it would use the disk, which is slow", fix)
    return finding("ok", told)


def open_files(config: DoctorConfig) -> Finding:
    """How many files a process may hold open; Ray raises the soft limit by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = float("inf") if hard == resource.RLIM_INFINITY else hard
    shown = "without limit" if most == float("inf") else f"up to {most:,.0f}"
    told = f"{soft:,} open files, {shown} if Ray asks" if soft >= 0 else "open files without limit"
    if most < FILES:
        fix = f"raise it (ulimit -Hn {FILES}, or LimitNOFILE, docker run --ulimit nofile={FILES})"
        return finding("warn", f"{told}; Ray recommends {FILES:,}", fix)
    return finding("ok", told)
