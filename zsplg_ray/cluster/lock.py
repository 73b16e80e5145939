"""One run at a time in one folder.

On a disk it is a lock of the file `.lock`, which the system drops with the process that holds it.
That holds between machines too where the disk's network protocol has locks (NFS 4, Lustre with
`flock`); on NFS 3 mounted with `nolock` each machine has locks of its own, and nothing stops two
machines from writing to one folder at the same time. In an object store it is a lease, see lease.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from zsplg_ray.cluster.lease import HeldLease
from zsplg_ray.filesystems import StoreError
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import complain


@contextlib.contextmanager
def only_run(folder: RunFolder) -> Iterator[None]:
    """One run at a time in one folder; meanwhile `folder` and its copies are guarded.

    Raises: ValueError if another run is there, or the folder cannot be written.
    """
    with _locked(folder) if folder.local else _leased(folder):
        yield


@contextlib.contextmanager
def _leased(folder: RunFolder) -> Iterator[None]:
    """In an object store."""
    lease = HeldLease(folder)
    try:
        lease.take()
    except StoreError as e:  # nothing has been written, and nothing can be
        raise ValueError(str(e)) from e
    folder.guard = lease
    try:
        yield
    finally:
        folder.guard = None
        lease.release()


@contextlib.contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    """On a disk; the lock goes with the process that holds it."""
    path = Path(folder.path)
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as e:
        fix = "wait for the other one, or stop it"
        raise ValueError(complain("out", "used by one run at a time", folder.uri, fix)) from e
    try:
        yield
    finally:
        if not (path / "run.json").exists():  # bad input leaves nothing behind
            (path / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.rmdir()
        lock.release()
