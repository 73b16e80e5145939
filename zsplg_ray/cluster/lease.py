"""A lease of a folder in an object store: one run at a time where there are no file locks.

What enters: a run's folder that is not on a disk. What leaves: a `Lease`, which is `_lock.json` in
that folder, renewed by a thread as long as the run lives and removed at its end; or a refusal that
says whose the folder is.

Whoever finds a lease of somebody else watches it. If it is renewed, its owner lives: refused. If it
is not for `WATCH_S`, the owner was killed: taken over. A lease that is old already by the store's
own time is taken over at once, and so is one of a dead process of this machine. No clock of one
machine is ever compared with that of another.

What it guarantees. pyarrow cannot ask a store to write only if nothing is there, so a lease is
taken by writing it, waiting for `SETTLE_S`, and reading it back: of several that write, the last
one has it. Every process of a run looks, at most `CHECK_S` before it writes to the folder, whether
the lease is still its run's, and stops if not; so a run that was paused for minutes and lost its
lease meanwhile notices. What remains: a process that is paused in the very moment between looking
and writing may write one file late. That is a part of images that its heir may have done as well,
and images that stand twice are mended when the folder is opened next (see exactly_once).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from zsplg_ray.rundir import RunFolder
from zsplg_ray.runinfo import user_name
from zsplg_ray.safe_text import masked
from zsplg_ray.settings import WorkError, complain

log = logging.getLogger(__name__)

NAME = "_lock.json"
PROBE = "_lock.probe"
"""Written to learn the store's time; always the same, so that what a crash leaves is used again."""
BEAT_S = 10.0
"""Between two renewals."""
WATCH_S = 45.0
"""Without a renewal, as seen by somebody who waits, after which an owner counts as dead."""
FORGOTTEN_S = 300.0
"""Age by the store's own time at which nobody waits any more: longer than an owner tries again to
reach a store that is away."""
SETTLE_S = 1.0
"""What a write may take; one that took longer may have crossed another's."""
CHECK_S = 5.0
"""How long an answer of the store to "is it still mine?" holds."""
POLL_S = 1.0


class Lease:
    """A lease that a run holds. Other processes of the run get a copy, to `check` it.

    Args:
        uri: Of the folder.
        owner: Which run it is.
    """

    def __init__(self, uri: str, owner: str) -> None:
        self.uri, self.owner = uri, owner
        self._folder = RunFolder(uri)  # without a guard: it writes the lease itself
        self._checked = -CHECK_S
        self._lost: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Lease, (self.uri, self.owner)

    def check(self) -> None:
        """Return if the folder is this run's. Raises: WorkError if somebody has taken over."""
        if self._lost is None and _seconds() - self._checked >= CHECK_S:
            self._look()
        if self._lost is not None:
            told = f"another run, {self._lost}, has gone on in {masked(self.uri)}; this one stops"
            raise WorkError(told)

    def _look(self) -> None:
        """Ask the store."""
        asked = _seconds()
        found = read(self._folder)
        if found is not None and found["owner"] != self.owner:
            self._lost = whose(found)
        else:  # also if somebody has removed it, for then nobody else has it
            self._checked = asked


class HeldLease(Lease):
    """A lease with the thread that renews it: `take`, and then `release` whatever happens."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(folder.uri, uuid.uuid4().hex)
        self._content = describe(self.owner)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="zsplg lease")

    def take(self) -> None:
        """Wait until the lease is ours. Raises: ValueError if somebody alive has it."""
        try:
            while not self._try():
                """Somebody else's has come between."""
        except BaseException:
            self._remove()
            raise
        self._thread.start()

    def release(self) -> None:
        """End it; never raises."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(BEAT_S)
        self._remove()

    def _try(self) -> bool:
        """Whether we have it after one try."""
        began = _seconds()
        found = read(self._folder)
        if found is not None and found["owner"] != self.owner:
            _wait_until_free(self._folder, found)
            began = _seconds()
        self._write()
        # A write this slow may have replaced that of somebody who looked before it came. He sees
        # ours when he looks next, so then he must have had the time for it.
        slow = _seconds() - began > SETTLE_S
        time.sleep(1.5 * BEAT_S + SETTLE_S if slow else SETTLE_S)
        self._look()
        if self._lost is not None:
            self._lost = None
            return False
        return True

    def _write(self) -> None:
        self._content["beat"] += 1
        text = json.dumps(self._content, indent=1, ensure_ascii=False) + "\n"
        self._folder.write_bytes(NAME, text.encode())

    def _renew(self) -> None:
        """The heart."""
        while not self._end.wait(BEAT_S):
            try:
                self._look()
                if self._lost is not None:
                    log.warning("%s is used by another run now: %s", masked(self.uri), self._lost)
                    return
                self._write()
            except OSError as e:  # it was told already that the store fails, and tried for long
                log.debug("the lease was not renewed: %s", e)

    def _remove(self) -> None:
        """Take it away if it is ours. A store that is away is not waited for: it grows old."""
        fs, path = self._folder.plain_fs, f"{self._folder.path}/{NAME}"
        try:
            with fs.open_input_file(path) as stream:
                found = parse(stream.read())
            if found is not None and found["owner"] == self.owner:
                fs.delete_file(path)
        except OSError as e:
            log.debug("%s was not removed: %s", NAME, e)


def describe(owner: str) -> dict[str, Any]:
    """What a lease says of its owner, for people and for other runs."""
    job = None
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        asked = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        job = asked.get("metadata", {}).get("job_submission_id")
    now = datetime.datetime.now(datetime.UTC)
    return {
        "owner": owner,
        "host": socket.gethostname(),
        "user": user_name(),
        "pid": os.getpid(),
        "job": job,
        "since": now.isoformat(timespec="seconds"),
        "process": process_mark(os.getpid()),
        "beat": 0,
    }


def whose(found: dict[str, Any]) -> str:
    """The owner of a lease, for people."""
    job = f", Ray job {found['job']}" if found.get("job") else ""
    who = f"{found.get('user', '?')}@{found.get('host', '?')}, process {found.get('pid', '?')}"
    return f"{who}{job}, since {found.get('since', '?')}"


def read(folder: RunFolder) -> dict[str, Any] | None:
    """The lease in a folder, None if there is none or it is nobody's."""
    return parse(folder.read_bytes(NAME) or b"")


def parse(data: bytes) -> dict[str, Any] | None:
    """The lease in a file, None if that holds none."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(data)
        if isinstance(found, dict) and isinstance(found.get("owner"), str):
            return found
    return None


def _wait_until_free(folder: RunFolder, found: dict[str, Any]) -> None:
    """Return once nobody alive has the lease. Raises: ValueError if its owner lives."""
    lives = is_alive(found.get("process"))
    if lives is False:
        return
    if lives is None:
        if age_s(folder) >= FORGOTTEN_S:
            return
        told = "%s was in use by %s: waiting for up to %.0f s to see whether it still is"
        log.info(told, masked(folder.uri), whose(found), WATCH_S)
        until = _seconds() + WATCH_S
        now = found
        while now == found:
            if _seconds() >= until:
                return
            time.sleep(POLL_S)
            now = read(folder)
        if now is None:
            return
        found = now
    fix = "wait for the other one, or stop it"
    shown = f"{masked(folder.uri)}, in use by {whose(found)}"
    raise ValueError(complain("out", "used by one run at a time", shown, fix))


def age_s(folder: RunFolder) -> float:
    """How long ago the lease was written, by the store's own time."""
    paths = [f"{folder.path}/{name}" for name in (NAME, PROBE)]
    try:
        folder.write_bytes(PROBE, b"")
        lease, now = folder.fs.get_file_info(paths)
    finally:
        with contextlib.suppress(FileNotFoundError):  # another's look, or an answer that got lost
            folder.fs.delete_file(paths[1])
    if lease.mtime_ns is None or now.mtime_ns is None:  # gone meanwhile, or a store without times
        return 0.0
    return (now.mtime_ns - lease.mtime_ns) / 1e9


def process_mark(pid: int) -> str | None:
    """A name of a process that no other has, on any machine; None where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = Path("/proc/self/ns/pid").readlink()
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else f"{boot} {space} {pid} {fields[18]}"


def is_alive(mark: object) -> bool | None:
    """Whether the process of a mark lives; None if it is not for this machine to say."""
    ours = process_mark(os.getpid())
    if not isinstance(mark, str) or ours is None or mark.split()[:2] != ours.split()[:2]:
        return None
    return process_mark(int(mark.split()[2])) == mark


def _seconds() -> float:
    """A clock that goes on while the machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
