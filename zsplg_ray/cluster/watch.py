"""What is told while training runs: how far it is, on stderr, and every validation to MLflow.

What enters: train.json, which grows on its own (trainrun.py), read once a second; and what the
workers say between two validations (notes.py). What leaves: a view for the display, and calls of a
`Tracker`. All of it happens on threads of the driver: whatever hangs here, training goes on.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping
from typing import Any

from zsplg_ray.cluster.track.train import Tracker
from zsplg_ray.cluster.training import Training
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
        progress: Told too.
    """

    def __init__(self, folder: RunFolder, tracker: Tracker, progress: Training) -> None:
        self.folder, self.tracker, self.progress = folder, tracker, progress
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failures = 0

    def start(self, run: Mapping[str, Any]) -> None:
        """Follow train.json; returns at once.

        `run`: what it is now; its history has been told before.
        """
        self.progress.begin(run)
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
        self.progress.validated(run)
        for note in run["failures"][self._failures :]:
            told = "worker %d died (%s): going on after epoch %d"
            log.warning(told, note["worker"], note["error"], note["epoch"])
        self._failures = len(run["failures"])
