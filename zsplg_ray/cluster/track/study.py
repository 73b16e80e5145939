"""MLflow of a study: a parent run, and a nested one for each trial.

What enters: trials as they end, one call each, from the driver. What leaves: MLflow runs, made on
threads of their own. No call waits (but `parent` and `finish`, for as long as they say) and none
raises because of MLflow. A store that does not answer is tried again, ever more rarely; what is to
be sent waits in memory meanwhile. The study's tune.json holds all of it anyway.

A trial that tracks itself (a `zsplg train` in a process of its own) is only adopted: at the end it
is seen to, from its train.json, that MLflow has it whole, below the parent and ended.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from zsplg_ray.cluster.track.model import publish
from zsplg_ray.cluster.track.store import (
    PREFIX,
    STATUS,
    TAG,
    Store,
    in_short,
    is_refused,
    run_name,
)
from zsplg_ray.cluster.track.train import Tracker
from zsplg_ray.cluster.trainrun import read_training
from zsplg_ray.config import MlflowConfig, ModelMlflowConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.storage import Place

log = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""How long the end of a study waits for what MLflow has not got yet, while it answers."""
GRACE_S = 10.0
"""How long it waits for a store that has not answered last time, and in all for the end of a study
that is not complete."""
MOST_WAITING = 100_000
"""Trials kept in memory for a store that does not answer; further ones are not sent."""
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Before it is tried again; each pause is twice the one before."""

_SENDERS = 4
"""Trials sent at a time over the network; a database takes one after the other."""
_TRIES = 3
"""How often the end is tried with a store that is there, but takes something amiss."""
_END = "the study's end"
_ADOPTED = "trials that track themselves"

State = Literal["complete", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """A trial as it is to be told."""

    number: int
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    state: State
    began_s: float
    ended_s: float


class StudyTracker:
    """The MLflow runs of a study.

    Args:
        config: Where to track; a `ModelMlflowConfig` also says what becomes of the best model.
        folder: The study's folder.
        study: `id` (the same on resume), `verb`, `config` (flat settings), and optionally `tags`:
            links to what the study was made from, see store.py.
    """

    def __init__(self, config: MlflowConfig, folder: RunFolder, study: Mapping[str, Any]) -> None:
        self.config, self.folder, self.study = config, folder, dict(study)
        self.store = Store(config, folder)
        self._changed = threading.Condition()
        """Guards what follows."""
        self._waiting: dict[int, Trial] = {}
        self._adopted: dict[int, RunFolder] = {}
        self._runs: dict[int, str] = {}
        """Trial's number -> its MLflow run, of those that MLflow has whole."""
        self._begun: dict[int, str | None] = {}
        """Trials of which a run may have been begun -> its id, as far as that is known."""
        self._dropped = 0
        self._parent: str | None = None
        self._last: dict[str, Callable[[], object]] | None = None
        """What is still to be done of the end: name -> what does it. None: it has not come."""
        self._deadline = float("inf")
        self._tries = 0
        self._failed = False
        self._warned = False
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def on(self) -> bool:
        """Whether there is any tracking."""
        return self.store.on

    @property
    def uri(self) -> str | None:
        """The store, as other processes of this machine may use it; with its credentials."""
        return self.store.uri

    # Called by the study ------------------------------------------------------------------------

    def start(self) -> None:
        """Find or make the experiment and the parent run; returns at once."""
        if self.on and self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True, name="mlflow")
            self._thread.start()

    def parent(self, timeout_s: float) -> str | None:
        """The id of the parent run; None if MLflow has not answered in time."""
        with self._changed:
            if self._thread is not None:
                self._changed.wait_for(lambda: self._parent is not None, timeout_s)
            return self._parent

    def trial(
        self,
        number: int,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        state: State,
        began_s: float,
        ended_s: float,
    ) -> None:
        """Tell a trial that has ended; told twice, it is still one nested run.

        `began_s`, `ended_s`: seconds since 1970.
        """
        if not self.on:
            return
        told = Trial(number, dict(params), dict(metrics), state, began_s, ended_s)
        with self._changed:
            if len(self._waiting) >= MOST_WAITING and number not in self._waiting:
                self._dropped += 1
                return
            self._waiting[number] = told
            self._changed.notify_all()

    def adopt(self, number: int, folder: RunFolder) -> None:
        """Have a trial that tracks itself seen to at the end."""
        with self._changed:
            self._adopted[number] = folder

    def finish(
        self,
        study: Mapping[str, Any],
        metrics: Mapping[str, float],
        files: Mapping[str, bytes],
        *,
        tables: Mapping[str, Mapping[str, list[Any]]] | None = None,
        best: RunFolder | None = None,
    ) -> dict[str, Any] | None:
        """Send what is missing and end the parent run; waits for a bounded time, a short one
        unless the study is complete. Once it has been called, further calls are nothing.

        Args:
            study: As it ended: `state` (complete, interrupted, failed), and `tags` if there are
                further ones.
            metrics: Of the parent run.
            files: Its artefacts, by their paths there.
            tables: Artefact's path -> column -> values.
            best: The folder whose best.pt is the model of a complete study, logged and registered
                as the config says.

        Returns:
            `uri` (without credentials) and `run_id` for tune.json; None if there is no parent run.
        """
        if self._thread is None:
            return None

        complete = study["state"] == "complete"
        with self._changed:
            first = self._last is None
            if first:
                self._last = self._end_of(study, metrics, files, tables or {}, best)
                patient = complete and not self._failed
                self._deadline = time.monotonic() + (PATIENCE_S if patient else GRACE_S)
                self._changed.notify_all()
        if first:
            more_s = GRACE_S if complete else 0.0  # for what is under way
            while (left_s := self._deadline + more_s - time.monotonic()) > 0:
                if self._done.wait(min(left_s, 1.0)):  # the deadline may move
                    break
            self._tell_missing()
        if self._parent is None:
            return None
        return {"uri": self.store.shown, "run_id": self._parent}

    def _tell_missing(self) -> None:
        """One warning of what MLflow has not got."""
        with self._changed:
            waiting, adopted = len(self._waiting) + self._dropped, len(self._adopted)
            last = [name for name in self._last or () if name != _ADOPTED]
        total = waiting + len(self._runs)
        missing = [f"{waiting} of {total} trials"] if waiting else []
        missing += [f"the end of {adopted} {_ADOPTED}"] if adopted else []
        missing += last
        if missing:
            told = "MLflow at %s has not got %s; tune.json holds all of it"
            log.warning(told, self.store.shown, ", ".join(missing))

    # On the thread --------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Send whatever waits, until the end has been sent or its deadline is over."""
        pause_s = SHORTEST_PAUSE_S
        try:
            while time.monotonic() < self._deadline:
                try:
                    if self._step():
                        return
                    self._failed, pause_s = False, SHORTEST_PAUSE_S
                except Exception as e:  # MLflow's own, the database's, the network's
                    self._note(e)
                    with self._changed:
                        left_s = max(0.0, self._deadline - time.monotonic())
                        if self._changed.wait_for(self._ending, min(pause_s, left_s)):
                            self._changed.wait(
                                min(SHORTEST_PAUSE_S, left_s)
                            )  # a shorter pause, but one
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        finally:
            self._done.set()

    def _ending(self) -> bool:
        return self._last is not None

    def _note(self, error: Exception) -> None:
        if self._ending() and not self._failed:
            self._deadline = min(self._deadline, time.monotonic() + GRACE_S)
        self._failed = True
        why = in_short(error)
        if not self._warned:
            told = "MLflow at %s does not answer as it should (%s); the study goes on without it"
            log.warning(told, self.store.shown, why)
        self._warned = True

    def _step(self) -> bool:
        """Do what is to be done next; whether that was the end."""
        if self._parent is None:
            self._open()
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ending())
            trials = list(self._waiting.values())[: 50 * _SENDERS]
            ending, last = self._ending(), self._last or {}
        errors: list[Exception] = []
        if _END in last:  # first: whatever becomes of the rest, the run does not go on
            self._do(last, _END, errors)
        if trials and self._went_well(lambda: self._send_trials(trials), errors):
            return False
        for name in [name for name in last if name != _END]:
            self._do(last, name, errors)
        if not errors:
            return True
        self._tries += ending
        if self._tries >= _TRIES:
            return True
        raise errors[0]

    def _do(
        self, last: dict[str, Callable[[], object]], name: str, errors: list[Exception]
    ) -> None:
        """Do something of the end; what has gone well is not done again."""
        if self._went_well(last[name], errors):
            with self._changed:
                del last[name]

    def _went_well(self, call: Callable[[], object], errors: list[Exception]) -> bool:
        """Whether a call went well; its error joins `errors`, or is raised if the store is gone."""
        try:
            call()
            return True
        except Exception as e:  # MLflow's own, the database's, the network's
            if not self.store.answers(self._parent):
                raise
            errors.append(e)
            return False

    def _open(self) -> None:
        """The parent run, and which trials it has already."""
        self.store.open()
        # tune labels has its study in a folder that has a run of its own
        beside = "tune labels" if self.study["verb"] == "tune labels" else ""
        name = run_name(self.config, self.folder, beside)
        key = {TAG: self.study["id"], f"{PREFIX}verb": self.study["verb"]}
        tags = {f"{PREFIX}out": Place.parse(self.folder.uri).uri, f"{PREFIX}state": "running"}
        tags |= self.study.get("tags") or {}
        parent, new = self.store.begin(name, key, tags)
        if not new:
            self.store.send(parent, tags=tags)
            self._find_trials(parent)
        self.store.send_missing_params(parent, self.study["config"])
        with self._changed:
            self._parent = parent
            self._changed.notify_all()

    def _find_trials(self, parent: str) -> None:
        """What an earlier start has sent."""
        for run in self.store.find({"mlflow.parentRunId": parent}, most=50_000):
            number = run.data.tags.get(f"{PREFIX}trial", "")
            if number.isdecimal():
                self._begun[int(number)] = run.info.run_id

    def _send_trials(self, trials: list[Trial]) -> None:
        """Send some trials, those that go through are gone. Raises: the first error, if any.

        The threads are our own, for Python waits for those of an executor before it exits: a store
        that hangs would hold the process.
        """
        left, errors = deque(trials), []

        def send() -> None:
            while time.monotonic() <= self._deadline:
                try:
                    trial = left.popleft()
                except IndexError:
                    return
                try:
                    self._send_one(trial)
                except Exception as e:  # MLflow's own, the database's, the network's
                    errors.append(e)
                    if not self.store.answers(self._parent):
                        left.clear()

        if self.store.remote:
            n = min(_SENDERS, len(trials))
            threads = [threading.Thread(target=send, daemon=True) for _ in range(n)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            send()
        if errors or left:
            raise errors[0] if errors else ConnectionError("it takes too long")

    def _send_one(self, trial: Trial) -> None:
        """Send a trial; what MLflow refuses is dropped."""
        run_id = None
        try:
            run_id = self._send_trial(trial)
        except Exception as e:
            if not is_refused(e):
                raise
            log.debug("trial %d: %s", trial.number, in_short(e))
        with self._changed:
            if self._waiting.get(trial.number) is trial:
                del self._waiting[trial.number]
            if run_id is None:
                self._dropped += 1
            else:
                self._runs[trial.number] = run_id

    def _send_trial(self, trial: Trial) -> str:
        run_id = self._begun.get(trial.number)
        if run_id is None:
            look = trial.number in self._begun  # tried before: the answer may have been lost
            self._begun[trial.number] = None
            key = {"mlflow.parentRunId": str(self._parent), f"{PREFIX}trial": str(trial.number)}
            tags = {f"{PREFIX}study": self.study["id"], f"{PREFIX}state": trial.state}
            tags[f"{PREFIX}verb"] = self.study["verb"]
            name = f"trial {trial.number}"
            run_id, _ = self.store.begin(name, key, tags, trial.began_s, look)
            self._begun[trial.number] = run_id
        metrics = {"seconds": trial.ended_s - trial.began_s, **trial.metrics}
        self.store.send(run_id, trial.params, metrics, at_s=trial.ended_s)
        ended = int(trial.ended_s * 1000)
        self.store.client.set_terminated(run_id, STATUS[trial.state], ended)
        return run_id

    def _see_to_all(self) -> None:
        """See to the trials that track themselves. Raises: the first error, after the last one."""
        errors: list[Exception] = []
        for number, folder in list(self._adopted.items()):
            if time.monotonic() > self._deadline:
                raise ConnectionError("it takes too long")
            if self._went_well(partial(self._see_to, number, folder), errors):
                with self._changed:
                    self._adopted.pop(number)
        if errors:
            raise errors[0]

    def _see_to(self, number: int, folder: RunFolder) -> None:
        """Have a trial that tracks itself whole, nested and ended."""
        run = read_training(folder)
        if run is None:
            return  # it has not come to anything
        tags = {"mlflow.parentRunId": str(self._parent), f"{PREFIX}study": self.study["id"]}
        tags |= {f"{PREFIX}trial": str(number), "mlflow.runName": f"trial {number}"}
        config = MlflowConfig(uri=self.store.uri, experiment=self.config.experiment)
        tracker = Tracker(config, folder, tags=tags)
        tracker.catch_up(run)
        if run["state"] != "running":
            tracker.end(run)

    def _end_of(
        self,
        study: Mapping[str, Any],
        metrics: Mapping[str, float],
        files: Mapping[str, bytes],
        tables: Mapping[str, Mapping[str, list[Any]]],
        best: RunFolder | None,
    ) -> dict[str, Callable[[], object]]:
        """What the end is made of, in this order; called once there is a parent run."""

        def end() -> None:
            now, tags = time.time(), study.get("tags") or {}
            self.store.send(str(self._parent), metrics=metrics, tags=tags, at_s=now)
            self.store.end(str(self._parent), study["state"], now)

        def send_tables() -> None:
            for name, columns in tables.items():
                self.store.send_table(str(self._parent), name, columns)

        last: dict[str, Callable[[], object]] = {_END: end, _ADOPTED: self._see_to_all}
        if files:
            last["its files"] = lambda: self.store.send_files(str(self._parent), files)
        if tables:
            last["its tables"] = send_tables
        logged = isinstance(self.config, ModelMlflowConfig) and self.config.log_model
        if best is not None and logged and study["state"] == "complete":
            last["its model"] = partial(self._send_model, best)
        return last

    def _send_model(self, best: RunFolder) -> None:
        assert isinstance(self.config, ModelMlflowConfig)
        publish(self.store, str(self._parent), best, self.config)
