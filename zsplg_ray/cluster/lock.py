"""One run at a time in one folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import complain


@contextlib.contextmanager
def only_run(folder: RunFolder) -> Iterator[None]:
    """One run at a time on one local folder; the lock goes with the process that holds it."""
    if not folder.local:
        yield
        return
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
