"""What Ray Tune is given to run a study: a searcher, ASHA, and ears.

What enters: a `Study` (train_study.py). What leaves: Ray Tune's own kinds of objects, which hold
nothing that is not in the study: what Ray Tune saves of itself is never needed again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from zsplg_ray.cluster.progress import Progress
from zsplg_ray.cluster.tune.left_behind import remove_left_behind
from zsplg_ray.cluster.tune.train_report import trial_line
from zsplg_ray.cluster.tune.train_space import Dim, propose
from zsplg_ray.cluster.tune.train_study import Study
from zsplg_ray.cluster.tune.trial import ENDED, METRIC, TIME
from zsplg_ray.config import AshaConfig, TuneTrainConfig
from zsplg_ray.settings import complain

log = logging.getLogger(__name__)

MOST_SHOWN = 4
"""Trials under way of which a person is told."""

LOOK_S = 60.0
"""How long after the death of a trial's process its placement groups are looked for."""


class Searching(Searcher):
    """Hands out trials: those that were interrupted, then new ones.

    Args:
        study: Where trials are put down before they are handed out.
        config: How to search, and how many trials.
        space: What is searched.
        at_once: Most trials that run at a time.
    """

    def __init__(
        self, study: Study, config: TuneTrainConfig, space: tuple[Dim, ...], at_once: int
    ) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.study, self.config, self.space, self.at_once = study, config, space, at_once
        self.again = [t["number"] for t in study.trials if t["state"] == "running"]
        self.running: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """Number and settings of a trial; None while there is no room, FINISHED after the last."""
        if len(self.running) >= self.at_once:
            return None
        number = self.again.pop(0) if self.again else self._new()
        if number is None:
            return Searcher.FINISHED
        self.running.add(trial_id)
        return {"number": number, "params": self.study.trials[number]["params"]}

    def _new(self) -> int | None:
        told = self.study.told()
        if len(told) >= self.config.trials:
            return None
        rule = self.config.fusion.rule
        params = propose(self.space, self.config.search, self.config.trials, told, rule)
        return self.study.begin(params) if params is not None else None

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """There is room again; what came of it stands in the study."""
        self.running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


def scheduler(config: AshaConfig, epochs: int) -> TrialScheduler:
    """ASHA as it is asked for, or nothing that stops trials.

    Raises: ValueError if the grace is longer than the training.
    """
    if config.off:
        return FIFOScheduler()
    grace = config.grace_epochs or max(1, epochs // 9)
    if grace > epochs:
        rule = f"<= train.epochs ({epochs})"
        raise ValueError(complain("asha.grace_epochs", rule, grace, "lower it"))
    return Halving(
        time_attr=TIME,
        metric=METRIC,
        mode="max",
        max_t=epochs,
        grace_period=grace,
        reduction_factor=config.reduction,
    )


class Halving(ASHAScheduler):
    """Ray Tune's ASHA, which knows trials by their number: the same after a restart."""

    def replay(self, study: Study) -> list[int]:
        """Hear again all validations of a study, as they came.

        Returns: Interrupted trials whose last validation it would have stopped them at.
        """
        trials = {t["number"]: t for t in study.trials}
        for number in trials:
            self.on_trial_add(None, _numbered(number))  # type: ignore[arg-type]
        decisions: dict[int, str] = {}
        heard = sorted((*e, number) for number, curve in study.curves.items() for e in curve)
        for _, epoch, miou, number in heard:
            if epoch < self._max_t:
                result = {TIME: epoch, METRIC: miou}
                trial: Any = _numbered(number)
                decisions[number] = self.on_trial_result(None, trial, result)  # type: ignore[arg-type]
        stop = [n for n, decision in decisions.items() if decision == TrialScheduler.STOP]
        return [n for n in stop if trials[n]["state"] == "running"]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """As ASHA."""
        super().on_trial_add(tune_controller, _by_number(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """As ASHA."""
        return super().on_trial_result(tune_controller, _by_number(trial), result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict) -> None:
        """As ASHA."""
        super().on_trial_complete(tune_controller, _by_number(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """As ASHA."""
        super().on_trial_remove(tune_controller, _by_number(trial))


def _numbered(number: int) -> Any:
    return SimpleNamespace(trial_id=str(number))


def _by_number(trial: Any) -> Any:
    return _numbered(trial.config["number"]) if hasattr(trial, "config") else trial


class Ears(Callback):
    """Puts down what becomes of trials, and tells a person.

    Args:
        study: Where it is put down.
        progress: Shows a person how far the study is.
        ended: Called with the number of a trial that has ended.
    """

    def __init__(self, study: Study, progress: Progress, ended: Callable[[int], None]) -> None:
        self.study, self.progress, self.ended = study, progress, ended
        self.began: dict[int, float] = {}
        self._look_until = self._looked = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """A process was started for it."""
        self.began.setdefault(trial.config["number"], time.monotonic())
        self._show()

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        """A validation; the last result, which repeats it, is not one."""
        if ENDED not in result:
            self.study.heard(trial.config["number"], result[TIME], result[METRIC])
            self._show()

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Its process died; Ray Tune starts another."""
        self._look_until = time.monotonic() + LOOK_S
        told = "trial %d: its process ended (%s); another goes on"
        log.warning(told, trial.config["number"], _why(trial))

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        """Several times a second: give back what a dead process held, as soon as Ray knows."""
        now = time.monotonic()
        if now < self._look_until and now > self._looked + 1:
            self._looked = now
            if remove_left_behind() is None:
                self._look_until = 0.0  # told once

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Before Ray Tune acts on it: the run of a trial that is stopped goes on until then."""
        last = trial.last_result or {}
        self._end(trial, last.get(ENDED, "stopped"), last.get("error"))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Its process died more often than allowed."""
        self._look_until = time.monotonic() + LOOK_S
        more = "its process ended more than workers.max_failures times, last with"
        self._end(trial, "failed", f"{more} {_why(trial)}")

    def _end(self, trial: Any, state: Any, error: str | None) -> None:
        number = trial.config["number"]
        best = self.study.end(number, state, error)
        self.ended(number)
        seconds = time.monotonic() - self.began.pop(number, time.monotonic())
        text = trial_line(self.study.trials[number], seconds, best, self.study.record["config"])
        self.progress.display.say(text)
        self.progress.add(int(state != "failed"), int(state == "failed"))
        self._show()

    def _show(self) -> None:
        """How the study stands: which trials run and how far they are, the best so far."""
        self.progress.waits(None)
        epochs = self.study.record["config"]["train.epochs"]
        told = []
        for number in sorted(self.began):
            curve = self.study.curves[number]
            told.append(f"trial {number} at epoch {curve[-1][1] if curve else 0}/{epochs}")
        more = [f"and {len(told) - MOST_SHOWN} more"] if len(told) > MOST_SHOWN else []
        best = self.study.record["best"]
        if best is not None:
            more.append(f"best val mIoU {best['val_miou']:.4f} (trial {best['number']})")
        self.progress.more = tuple(told[:MOST_SHOWN] + more)


def _why(trial: Any) -> str:
    """What Ray says of the end of a trial's process: the last line of the text that it keeps, for
    the pickle beside it, unpickled, may run code."""
    with contextlib.suppress(Exception):  # no such file, or no path
        lines = Path(trial.error_file).read_text(encoding="utf-8", errors="replace").split("\n")
        return next(line.strip() for line in reversed(lines) if line.strip())[:300]
    return "nobody knows why"
