"""What the benchmarks measure with: a clock, the highest memory, and glibc told to keep its own.

What enters: a device's name, something to run. What leaves: seconds, GiB. On a CPU seconds are CPU
seconds of this process, which other programs on the machine disturb least.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30),
    "MALLOC_TOP_PAD_": str(2**30),
}
"""glibc: never give memory back, so that no page is faulted in twice."""


def restart_with_tuned_malloc(module: str, argv: Sequence[str] | None) -> None:
    """Start `python -m module` again with `TUNED_MALLOC`; returns if it is in force already."""
    if any(os.environ.get(k) != v for k, v in TUNED_MALLOC.items()):
        again = [sys.executable, "-m", module, *(argv or sys.argv[1:])]
        os.execve(sys.executable, again, {**os.environ, **TUNED_MALLOC})


def clock_of(device: str) -> Callable[[], float]:
    """CPU seconds of this process, or seconds with everything on the GPU finished."""
    if torch.device(device).type != "cuda":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def peak_gib(run: Callable[[], Any], device: str) -> float:
    """GiB that a call takes at its highest, beyond what was taken before."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    before = _resident_gib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    run()
    return _resident_gib("VmHWM") - before


def _resident_gib(what: str) -> float:
    """A line of Linux's account of this process: VmRSS (now) or VmHWM (highest)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 2**20
