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

import pyarrow.fs as pafs

from zsplg_ray import filesystems
from zsplg_ray.cluster.doctor.finding import Finding, finding
from zsplg_ray.config import DoctorConfig
from zsplg_ray.rundir import RunFolder

_NOTHING = pafs.FileType.NotFound
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
    missing = folder.fs.get_file_info([folder.path])[0].type == _NOTHING
    if not _gives_back(folder):
        return finding("fail", f"{config.out} does not give back what was written", "use another")
    told = f"{config.out} can be written and read"
    if missing and folder.fs.get_file_info([folder.path])[0].type != _NOTHING:
        # Stores know no folder; pyarrow leaves an empty object for one. It could only be removed
        # with all that others may have put below it since.
        told += "; an empty object stands for the folder now"
    return finding("ok", told)


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
