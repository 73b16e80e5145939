"""A trial of a study: a `zsplg train` in a process of Ray Tune's, which hears whether to go on.

What enters: a trial's number and settings, from the searcher. What leaves: a training run's folder,
and a result for each validation.

    trial's process: train(), on a thread        driver: Ray Tune, ASHA
      controller: Listener -- validation --> Gate --> step() --> result --> go on or not?
                  Listener <---------------- Gate <--------------- answer -----'

A function of Ray Tune's would be killed where it stands when its trial is to stop. Here the run's
controller asks after each validation and waits for the answer (a moment), so a run that is stopped
ends as any other: its workers and their place in the cluster are gone, its train.json says so.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
from filelock import FileLock, Timeout
from ray import tune

from zsplg_ray.cluster.session import last_line
from zsplg_ray.cluster.train import train
from zsplg_ray.cluster.trainrun import read_training
from zsplg_ray.cluster.tune.train_space import Params
from zsplg_ray.cluster.tune.train_study import trial_place
from zsplg_ray.cluster.worker import Stopped
from zsplg_ray.config import TrainConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import WorkError, override

log = logging.getLogger(__name__)

METRIC, TIME = "val_miou", "epoch"
"""Names in the results of a trial: what is to be high, and the time it took."""
ENDED = "ended"
"""Name in a trial's last result: how it ended, complete or failed."""

LOCK_S = 60.0
"""How long a trial waits for the processes of a killed one to leave its folder."""
END_S = 300.0
"""How long a stopped run may take to end; then its process is killed."""


class Gate:
    """An actor between the trials and those who listen to their runs; one for a study."""

    def __init__(self) -> None:
        self._told: dict[int, asyncio.Queue] = defaultdict(asyncio.Queue)
        self._answers: dict[int, asyncio.Queue] = defaultdict(asyncio.Queue)

    async def open(self, number: int) -> None:
        """A trial starts; what an earlier process of it has left is void."""
        await self.close(number)

    async def close(self, number: int) -> None:
        """A trial's process has ended: whoever still waits is let go. An actor takes only so many
        calls at a time, so none must be left behind.
        """
        if (told := self._told.pop(number, None)) is not None:
            told.put_nowait(None)
        if (answers := self._answers.pop(number, None)) is not None:
            answers.put_nowait(False)

    async def tell(self, number: int, result: Mapping[str, Any]) -> bool:
        """A validation; whether to go on after it."""
        await self._told[number].put(result)
        return await self._answers[number].get()

    async def hear(self, number: int) -> Mapping[str, Any] | None:
        """The next validation; None if there will be none, for this process of the trial."""
        return await self._told[number].get()

    async def answer(self, number: int, go_on: bool) -> None:
        """Let the run go on, or have it stopped at this or its next validation."""
        await self._answers[number].put(go_on)


class Listener(ray.train.UserCallback):
    """Tells the gate of each validation but the last, and ends the run if the answer is no."""

    def __init__(self, gate: Any, number: int, epochs: int) -> None:
        self.gate, self.number, self.epochs = gate, number, epochs

    def after_report(
        self,
        run_context: Any,
        metrics: list[dict[str, Any]],
        checkpoint: ray.train.Checkpoint | None,
    ) -> None:
        """On the run's controller, once the checkpoint counts."""
        entry, best = metrics[0]["entry"], metrics[0]["best"]
        if entry["epoch"] >= self.epochs or entry.get("val_miou") is None:
            return
        result = {k: entry[k] for k in (TIME, METRIC, "loss")}
        result["best_miou"] = best["val_miou"]
        if not ray.get(self.gate.tell.remote(self.number, result)):
            raise Stopped(f"trial {self.number} is behind the others")


def trial_config(base: TrainConfig, number: int, params: Params) -> TrainConfig:
    """The settings of a trial's run. `base`: those of all trials; `out` is the study's folder."""
    ours = {"out": trial_place(base.out, number), "quiet": True, "json": False}
    ours |= {"mlflow.run_name": f"trial {number}"}
    return override(base, {**ours, **params})


class TrialRun(tune.Trainable):
    """What Ray Tune runs: `step` is one validation, the last is the end of the run."""

    def setup(
        self,
        config: dict[str, Any],
        base: TrainConfig | None = None,
        tags: Mapping[str, str] | None = None,
        gate: Any = None,
    ) -> None:
        """Start training, or go on with it, on a thread.

        Args:
            config: From the searcher: a trial's `number` and `params`.
            base: The settings of all trials.
            tags: For its MLflow run.
            gate: The study's `Gate`.
        """
        assert base is not None and tags is not None, "as Ray Tune was given them"
        self.base, self.tags, self.gate = base, tags, gate
        self._start(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Do another trial in this process, which has had its long start."""
        self.cleanup()
        self._start(new_config)
        return True

    def _start(self, config: dict[str, Any]) -> None:
        self.number = config["number"]
        self.run_config = trial_config(self.base, self.number, config["params"])
        self.folder = RunFolder(self.run_config.out)
        self.error: str | None = None
        self.waiting: ray.ObjectRef | None = None
        self.asked = False
        ray.get(self.gate.open.remote(self.number))
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def step(self) -> dict[str, Any]:
        """Wait for a validation, or for the end."""
        if self.asked:
            self.gate.answer.remote(self.number, True)
            self.asked = False
        while True:
            waiting = self.waiting = self.waiting or self.gate.hear.remote(self.number)
            if ray.wait([waiting], timeout=0.5)[0]:
                self.waiting, result = None, ray.get(waiting)
                if result is None:
                    raise WorkError(f"another process has gone on with trial {self.number}")
                self.asked = True
                return dict(result)
            if not self.thread.is_alive():
                return self._end()

    def cleanup(self) -> None:
        """Wait for a run that was told to stop."""
        self.thread.join(END_S)

    def _train(self) -> None:
        listener = Listener(self.gate, self.number, self.run_config.train.epochs)
        tags = {**self.tags, "zsplg_ray.trial": str(self.number)}
        try:
            _wait_for(self.folder)
            train(self.run_config, tags=tags, callbacks=[listener])
        except (ValueError, WorkError) as e:
            self.error = str(e)
        except Exception as e:  # whatever it is, it is this trial's end, not the study's
            log.exception("trial %d", self.number)
            self.error = last_line(e)

    def _end(self) -> dict[str, Any]:
        """The last result: what train.json says."""
        self.gate.close.remote(self.number)
        self.waiting = None
        result: dict[str, Any] = {"done": True, ENDED: "complete"}
        run = read_training(self.folder)
        if self.error is None and (run is None or run["state"] != "complete"):
            self.error = "training ended before its time"
        if self.error is not None:
            return result | {ENDED: "failed", "error": self.error}
        assert run is not None
        return result | {TIME: run["last"]["epoch"], METRIC: run["last"]["val_miou"]}


def _wait_for(folder: RunFolder) -> None:
    """Wait until whoever is in a trial's folder has gone: it can only be what was killed.

    Raises: WorkError if it stays.
    """
    lock = Path(folder.path, ".lock")
    if folder.local and lock.exists():
        try:
            with FileLock(lock, timeout=LOCK_S):
                pass
        except Timeout as e:
            raise WorkError(f"a killed trial has not left {folder.uri} in {LOCK_S:g} s") from e
