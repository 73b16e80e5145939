"""Whether a place can be written and read. Runs in a process of its own (see child), so it imports
little and needs no torch.

What enters: `out` of the settings. What leaves: a finding. A file of some bytes is written, read
and removed; folders that are not there are not made.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from zsplg_ray import filesystems
from zsplg_ray.cluster.doctor.finding import Finding, finding
from zsplg_ray.config import DoctorConfig
from zsplg_ray.rundir import RunFolder

PATIENCE_S = 2.0
"""How long a store that fails is asked again here; a run has more."""
FREE_GIB = 5.0
"""With less on a disk we warn."""


def look(config: DoctorConfig) -> Finding:
    """Write, read and remove a small file. Raises: OSError, ValueError with what is wrong."""
    filesystems.PATIENCE_S = PATIENCE_S
    folder = RunFolder(config.out)
    if folder.local:
        return _local(config.out, Path(folder.path))
    missing = _missing(folder)
    if not _gives_back(folder):
        return finding("fail", f"{config.out} does not give back what was written", "use another")
    if missing is not None:
        _tidy(folder.fs, missing)
    return finding("ok", f"{config.out} can be written and read")


def _local(out: str, path: Path) -> Finding:
    """A folder of this machine, or the one above it that is there."""
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir():
        return finding("fail", f"{there} is a file", "give another folder")
    if not _gives_back(RunFolder(str(there))):
        return finding("fail", f"{out} does not give back what was written", "use another")
    free = shutil.disk_usage(there).free / 2**30
    told = f"{out} can be written and read, {free:.0f} GiB free"
    if free < FREE_GIB:
        return finding("warn", told, "make room; `zsplg estimate` tells how much a run takes")
    return finding("ok", told)


def _gives_back(folder: RunFolder) -> bool:
    """Whether what is written there is read there."""
    name = f"_doctor.{uuid.uuid4().hex[:8]}"
    try:
        folder.write_bytes(name, b"ok")
        return folder.read_bytes(name) == b"ok"
    finally:
        with contextlib.suppress(FileNotFoundError):
            folder.fs.delete_file(f"{folder.path}/{name}")


def _missing(folder: RunFolder) -> str | None:
    """The topmost folder above a store's place that is not there, or itself; None: all are."""
    parts, found = folder.path.split("/"), None
    while len(parts) > 1:  # the first is the bucket
        path = "/".join(parts)
        if folder.fs.get_file_info([path])[0].type != pafs.FileType.NotFound:
            break
        found, parts = path, parts[:-1]
    return found


def _tidy(fs: Any, path: str) -> None:
    """Remove the empty objects that stand for folders, which pyarrow makes when the last file in
    them goes; nothing if anybody has put a file there since.
    """
    below = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
    if not any(info.is_file for info in below):
        with contextlib.suppress(FileNotFoundError):
            fs.delete_dir(path)
