"""How far a training is, for the display.

What enters: train.json as it grows, and what workers say between two validations (notes.py). What
leaves: a `View`. Torch and Ray are not needed: a person sees it before these are loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from zsplg_ray.cluster.progress import Shown
from zsplg_ray.display import View


class Training(Shown):
    """How far a training is.

    Args:
        show: Whether anything is shown.
        clock: Seconds; `time.monotonic`, but for tests.
    """

    def __init__(self, show: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__("train", show, clock)
        self.schedule: Mapping[str, int] | None = None
        self.entry: Mapping[str, Any] = {}
        """The last validation, of the history."""
        self.best: Mapping[str, Any] | None = None
        self.workers = (0, 0)
        """Those that are up, of how many."""
        self._step = 0
        self._loss: float | None = None
        self._judging = False

    def begin(self, run: Mapping[str, Any]) -> None:
        """What train.json says at the start."""
        with self.lock:
            self.schedule = run["schedule"]
            self.workers = (0, run["workers"]["num"])
            self.validated(run)

    def validated(self, run: Mapping[str, Any]) -> None:
        """What train.json says now."""
        with self.lock:
            self.best = run["best"]
            if run["history"]:
                self.entry = run["history"][-1]
                self._at(max(self._step, self.entry["step"]))  # workers are further by now

    def hear(self, notes: Mapping[str, Mapping[str, Any]]) -> None:
        """What workers say, by rank: `step`; the first one also `loss` and `judging`."""
        if not notes:
            return
        with self.lock:
            self.workers = (len(notes), max(len(notes), self.workers[1]))
            lead = notes.get("0")
            if lead is None or "step" not in lead:
                return
            self.waits(None)
            self.pace.start(done=lead["step"])
            self._loss, self._judging = lead.get("loss", self._loss), lead["judging"]
            if not self._judging:
                self.pace.resume(max(0, lead["step"] - self._step))
            self._at(lead["step"])
            if self._judging:
                self.pace.pause()

    def _at(self, step: int) -> None:
        self._step = step
        if self.pace.began is not None:
            self.pace.seen(step)

    def view(self) -> View:
        """How things are."""
        with self.lock:
            elapsed_s = self.clock() - self.began
            if self.schedule is None:
                return View(self.verb, elapsed_s, self.waiting)
            steps, a_step = self.schedule["steps"], self.schedule["images_per_step"]
            left = None if self.over else self.pace.left_s(steps - self._step)
            waits = "validating" if self._judging and self.waiting is None else self.waiting
            waits = None if self.over else waits
            facts = self._facts()
            if (rate := self.pace.rate()) and not self.over:
                facts += [f"{rate:.2f} steps/s", f"{rate * a_step:.1f} images/s"]
            up, of = self.workers
            if of > 1:
                facts.append(f"{up}/{of} workers up")
            return View(self.verb, elapsed_s, waits, self._step, steps, "steps", tuple(facts), left)

    def _facts(self) -> list[str]:
        assert self.schedule is not None
        epoch = self._step // max(1, self.schedule["steps_per_epoch"])
        under_way = epoch + (self._step < self.schedule["steps"] and not self.over)
        told = [f"epoch {min(under_way, self.schedule['epochs'])}/{self.schedule['epochs']}"]
        loss = self.entry.get("loss") if self._loss is None or self.over else self._loss
        if loss is not None:
            told.append(f"loss {loss:.4f}")
        if (miou := self.entry.get("val_miou")) is not None:
            told.append(f"val mIoU {miou:.4f}")
            if self.best is not None and self.best["step"] == self.entry["step"]:
                told[-1] += " (the best)"
            elif self.best is not None and self.best["val_miou"] is not None:
                told[-1] += f" (best {self.best['val_miou']:.4f} at epoch {self.best['epoch']})"
        for name, what in (
            ("unreadable_images", "images"),
            ("val_unreadable_images", "validation images"),
        ):
            if self.entry.get(name):
                told.append(f"{self.entry[name]:.0f} {what} not readable")
        return told
