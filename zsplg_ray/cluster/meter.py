"""CPU seconds and memory of this process and of all that it started, by what they are.

What enters: /proc, once a second (so on Linux only). What leaves: CPU seconds by role (driver,
ledger, actors, ...) and the most memory that the driver took.
"""

from __future__ import annotations

import math
import os
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROLES = (
    ("ray::DashboardAgent", "agents"),
    ("ray::RuntimeEnvAgent", "agents"),
    ("ray::LedgerBook", "ledger"),
    ("ray::MapWorker", "actors"),
    ("ray::_MapWorker", "actors"),
    ("ray::", "other workers"),
    ("raylet/raylet", "raylets"),
    ("gcs_server", "gcs"),
)
"""What a process's command line holds -> what it is; the first that fits. Others are "agents"."""
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Meter:
    """Measures from `with` to its end; figures may be asked for in between."""

    def __init__(self, every_s: float = 1.0) -> None:
        self.every_s = every_s
        self._seconds: dict[int, float] = {}
        self._role: dict[int, str] = {}
        self._looks: list[tuple[float, dict[str, float]]] = []
        self.driver_mib: list[float] = []
        """Memory of this process at each look."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Meter:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self._look()

    def cpu_s(self, since: float = 0.0, until: float = math.inf) -> dict[str, float]:
        """CPU seconds by role between two times of the clock, to the look next after each."""
        times = [at for at, _ in self._looks[:-1]]
        first, last = (self._looks[bisect_left(times, at)][1] for at in (since, until))
        return {name: seconds - first.get(name, 0.0) for name, seconds in last.items()}

    def _watch(self) -> None:
        while not self._end.wait(self.every_s):
            self._look()

    def _look(self) -> None:
        me = os.getpid()
        parents = dict(_parents())
        for pid in parents:
            above = pid
            while above not in (me, 0, 1):
                above = parents.get(above, 0)
            if above == me:
                self._note(pid, me)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.driver_mib.append(pages * _PAGE / 2**20)
        total: dict[str, float] = defaultdict(float)
        for pid, seconds in self._seconds.items():
            total[self._role[pid]] += seconds
        self._looks.append((time.time(), total))

    def _note(self, pid: int, me: int) -> None:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            return  # it has ended; what was seen of it last counts
        self._role[pid] = "driver" if pid == me else role(command)
        self._seconds[pid] = (int(fields[11]) + int(fields[12])) / _TICKS


def role(command: str) -> str:
    """What the process of a command line is."""
    return next((name for part, name in ROLES if part in command), "agents")


def _parents() -> Iterator[tuple[int, int]]:
    """(process, its parent) of all processes."""
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                stat = Path(entry.path, "stat").read_text()
            except OSError:
                continue
            yield int(entry.name), int(stat.rpartition(")")[2].split()[1])
