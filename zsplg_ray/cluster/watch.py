"""What is told while training runs: a line a validation on stderr, and MLflow.

What enters: train.json, which grows on its own (trainrun.py), read once a second. What leaves:
lines, and calls of a `Tracker`. All of it happens on a thread of the driver: whatever hangs here,
training goes on.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Mapping
from typing import Any

from zsplg_ray.cluster.track.train import Tracker
from zsplg_ray.cluster.trainrun import read_training
from zsplg_ray.rundir import RunFolder

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""How long the end of a run waits at most for a tracker that hangs."""


class Watcher:
    """Follows a run from its start to its end.

    Args:
        folder: The run's.
        tracker: Told of every validation.
        show: Whether anything is printed.
    """

    def __init__(self, folder: RunFolder, tracker: Tracker, show: bool) -> None:
        self.folder, self.tracker, self.show = folder, tracker, show
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._told = -1
        self._last: tuple[float, int] | None = None
        self._failures = 0

    def start(self, run: Mapping[str, Any]) -> None:
        """Follow train.json; returns at once.

        `run`: what it is now; its history has been told before.
        """
        if run["last"] is not None:
            self._told = run["last"]["step"]
        self._failures = len(run["failures"])
        self._thread = threading.Thread(target=self._follow, args=(dict(run),), daemon=True)
        self._thread.start()

    def stop(self, patience_s: float = PATIENCE_S) -> bool:
        """Tell what is left and end; whether the tracker can be used again.

        `patience_s`: how long it may take at most.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join(min(PATIENCE_S, patience_s))
            return not self._thread.is_alive()
        return True

    def _follow(self, run: dict[str, Any]) -> None:
        self.tracker.sync(run)
        stopped = False
        while not stopped:
            stopped = self._stop.wait(1.0 if self.folder.local else 5.0)
            with contextlib.suppress(OSError, ValueError):  # the next look may find it
                found = read_training(self.folder)
                if found is not None and found["id"] == run["id"]:
                    self._tell(found)
                    self.tracker.sync(found)

    def _tell(self, run: Mapping[str, Any]) -> None:
        for entry in run["history"]:
            if entry["step"] <= self._told:
                continue
            self._told = entry["step"]
            best = run["best"] is not None and run["best"]["step"] == entry["step"]
            text = line(entry, run["schedule"], best, self._last)
            self._last = (entry["time"], entry["step"])
            if self.show:
                sys.stderr.write(text + "\n")
                sys.stderr.flush()
        for note in run["failures"][self._failures :]:
            told = "worker %d died (%s): going on after epoch %d"
            log.warning(told, note["worker"], note["error"], note["epoch"])
        self._failures = len(run["failures"])


def line(
    entry: Mapping[str, Any],
    schedule: Mapping[str, int],
    best: bool,
    before: tuple[float, int] | None,
) -> str:
    """What a person sees of a validation.

    Args:
        entry: Of the history.
        schedule: Steps and epochs of the run.
        best: Whether it is the best so far.
        before: Time and step of the entry before; None for the first, whose speed is taken then.
    """
    parts = [f"epoch {entry['epoch']}/{schedule['epochs']}", f"loss {entry['loss']:.4f}"]
    if entry.get("val_miou") is not None:
        parts.append(f"val mIoU {entry['val_miou']:.4f}{' (best)' if best else ''}")
    for name in ("confident", "agreement"):
        if name in entry:
            parts.append(f"{name} {entry[name]:.0%}")
    parts.append(f"{entry['images_per_s']:.1f} images/s")
    if entry.get("unreadable_images"):
        parts.append(f"{entry['unreadable_images']:.0f} images not readable")
    if entry.get("val_unreadable_images"):
        parts.append(f"{entry['val_unreadable_images']:.0f} validation images not readable")
    left = schedule["steps"] - entry["step"]
    if left:
        each = schedule["images_per_step"] / entry["images_per_s"]
        if before is not None:
            each = (entry["time"] - before[0]) / (entry["step"] - before[1])
        parts.append(f"{duration(max(each * left, 0.0))} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """3 h 20 min, 5 min 10 s, 40 s."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {s:02} s" if minutes else f"{s} s"
