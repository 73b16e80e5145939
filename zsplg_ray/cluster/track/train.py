"""What a training run tells MLflow.

What enters: the content of train.json as it grows, at the end the best model and pictures. What
leaves: one MLflow run for one folder (see store.py for its tags). It is told on a thread of the
driver; no worker waits for it.

A server that is down or slow costs nothing but its entries: every call has a short timeout and is
guarded, train.json holds the whole history, and whatever is missing is sent with the next
validation that gets through, or at the end; and if not then, by the same command once more.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from zsplg_ray.cluster.track.model import publish
from zsplg_ray.cluster.track.store import IMPATIENCE_S, PREFIX, TAG, Store, in_short, run_name
from zsplg_ray.cluster.trainrun import write_training
from zsplg_ray.config import MlflowConfig, ModelMlflowConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.storage import Place

log = logging.getLogger(__name__)

PAUSE_S = 60.0
"""Seconds after a failure in which nothing is tried."""
PATIENCE_S = 300.0
"""How long the end of a run waits for MLflow, which gets a model then."""


class Tracker:
    """The MLflow run of a folder. No method but `catch_up` and `end` raises because of MLflow.

    Args:
        config: Where to track.
        folder: The training run's folder.
        run_id: The MLflow run, where train.json knows it.
        tags: Further ones for the run, such as `mlflow.parentRunId`.
    """

    def __init__(
        self,
        config: MlflowConfig,
        folder: RunFolder,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.folder, self.run_id = config, folder, run_id
        self.store = Store(config, folder)
        self.model: str | None = None
        """`NAME/VERSION` of the registered model."""
        self._tags = dict(tags or {})
        self._opened = False
        self._sent = -1
        """Step of the last entry of the history that MLflow has."""
        self._missing: list[str] = []
        """What MLflow has not got yet of the end of the run."""
        self._warned = False
        self._pause_until = 0.0

    @classmethod
    def of(
        cls,
        config: MlflowConfig,
        folder: RunFolder,
        run: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
    ) -> Tracker:
        """The tracker of a run by its train.json, which may know the MLflow run."""
        tracker = cls(config, folder, tags=tags)
        known = run.get("mlflow") or {}
        if known.get("uri") == tracker.store.shown:  # else a tag finds it
            tracker.run_id = known.get("run_id")
        return tracker

    @property
    def on(self) -> bool:
        """Whether there is any tracking."""
        return self.store.on

    def sync(self, run: Mapping[str, Any]) -> None:
        """Find or make the MLflow run, and send the entries of the history that it has not got.

        After a failure nothing is tried for a while: whoever calls this has other things to do.
        """
        if self.on and time.monotonic() >= self._pause_until:
            self._guarded(lambda: self.catch_up(run))

    @property
    def _of_study(self) -> bool:
        """Whether this is a trial of a study, which sees at its end to what is missing here."""
        return f"{PREFIX}study" in self._tags

    def patience_s(self, state: str) -> float:
        """How long the end of a run waits for MLflow. `state`: how it ended."""
        return PATIENCE_S if state == "complete" and not self._of_study else IMPATIENCE_S

    def finish(self, run: Mapping[str, Any], pictures: bytes | None) -> bool:
        """Send what is missing; end the MLflow run; send train.json, pictures and the best model.

        In this order: a run that has ended must not look as if it went on, whatever becomes of its
        files.

        Returns: Whether MLflow has all of it.
        """
        if not self.on:
            return True
        parts = self._parts(run, pictures)
        self._missing = list(parts)
        thread = threading.Thread(target=self._finish, args=(run, parts), daemon=True)
        thread.start()
        thread.join(self.patience_s(run["state"]))
        missing = list(self._missing)
        left = sum(entry["step"] > self._sent for entry in run["history"])
        missing[:0] = [f"{left} of {len(run['history'])} validations"] if left else []
        if not missing and not self._opened:
            missing.append("its settings")
        if missing:
            then = "the same command sends it again"
            then = "the study sees to its validations and end" if self._of_study else then
            told = "MLflow at %s has not got %s; the run's folder holds all of it, and %s"
            log.warning(told, self.store.shown, ", ".join(missing), then)
        return not missing

    def _parts(
        self, run: Mapping[str, Any], pictures: bytes | None
    ) -> dict[str, Callable[[], object]]:
        """What the end of a run is made of: name -> what sends it, in this order."""
        config = self.config
        parts: dict[str, Callable[[], object]] = {
            "the end of the run": lambda: self.end(run),
            "its files": lambda: self._send_files(run, pictures),
            "its figures": lambda: self._send_figures(run),
        }
        if run["state"] == "complete":
            parts["the tag of its model"] = self._send_sha256
            if isinstance(config, ModelMlflowConfig) and config.log_model:
                parts["its model"] = lambda: self._send_model(config)
        return parts

    def _finish(self, run: Mapping[str, Any], parts: Mapping[str, Callable[[], object]]) -> None:
        """Each part on its own, as long as the store is there."""
        if not self._guarded(lambda: self.catch_up(run)) and not self.store.answers(self.run_id):
            return
        for name, call in parts.items():
            if self._guarded(call):
                self._missing.remove(name)
            elif not self.store.answers(self.run_id):
                return

    def note(self, run: dict[str, Any], whole: bool) -> None:
        """Put into train.json where the MLflow run is. `whole`: whether MLflow has all of it."""
        if self.run_id is not None:
            run["mlflow"] = {"uri": self.store.shown, "run_id": self.run_id, "whole": whole}
            run["mlflow"] |= {"model": self.model} if self.model else {}

    # What may fail -------------------------------------------------------------------------------

    def _guarded(self, call: Callable[[], object]) -> bool:
        """Whether it went well."""
        try:
            call()
            return True
        except Exception as e:  # MLflow's own, the database's, the network's
            why = in_short(e)
            if not self._warned:
                told = "MLflow at %s does not answer as it should (%s); training goes on without it"
                log.warning(told, self.store.shown, why)
            self._warned = True
            self._pause_until = time.monotonic() + PAUSE_S
            return False

    def catch_up(self, run: Mapping[str, Any]) -> None:
        """As `sync`, at once; raises what MLflow raises."""
        if not self._opened:
            self._open(run)
        for entry in run["history"]:
            if entry["step"] > self._sent:
                metrics = entry_metrics(entry)
                self.store.send(self._run, metrics=metrics, at_s=entry["time"], step=entry["step"])
                self._sent = entry["step"]

    @property
    def _run(self) -> str:
        assert self.run_id is not None
        return self.run_id

    def _open(self, run: Mapping[str, Any]) -> None:
        store = self.store
        store.open()
        tags = training_tags(run, self.folder) | self._tags
        if self.run_id is None:
            name = run_name(self.config, self.folder)
            self.run_id, _ = store.begin(name, {TAG: run["id"]}, tags)
        else:
            store.client.update_run(self.run_id, status="RUNNING")
        store.send(self.run_id, tags=tags)
        if "mlflow.runName" in tags:
            store.client.update_run(self.run_id, name=tags["mlflow.runName"])
        store.send_missing_params(self.run_id, run["config"])
        sent = store.client.get_metric_history(self.run_id, "loss")
        self._sent = max((metric.step for metric in sent), default=-1)
        self._opened = True

    def _send_files(self, run: Mapping[str, Any], pictures: bytes | None) -> None:
        files = {"train.json": json.dumps(run, indent=1).encode()}
        files |= {"best.png": pictures} if pictures is not None else {}
        self.store.send_files(self._run, files)

    def _send_figures(self, run: Mapping[str, Any]) -> None:
        iou = best_iou(run)
        if not iou:
            return
        from zsplg_ray.views.figures import iou_bars  # it loads matplotlib

        columns = {"class": list(iou), "iou": list(iou.values())}
        self.store.send_table(self._run, "iou.json", columns)
        self.store.send_files(self._run, {"iou.png": iou_bars({"best epoch": iou})})

    def _send_model(self, config: ModelMlflowConfig) -> None:
        self.model = publish(self.store, self._run, self.folder, config) or self.model

    def _send_sha256(self) -> None:
        """The tag by which predictions of this model are found."""
        from zsplg_ray.student.checkpoint import read_weights, state_sha256

        sha256 = state_sha256(read_weights(self.folder.uri).state)
        self.store.client.set_tag(self._run, f"{PREFIX}model", sha256)

    def end(self, run: Mapping[str, Any]) -> None:
        """End the MLflow run; raises what MLflow raises."""
        at_s = run["history"][-1]["time"] if run["history"] else time.time()
        self.store.end(self._run, run["state"], at_s)


def send_finished(
    config: ModelMlflowConfig,
    folder: RunFolder,
    run: dict[str, Any],
    tags: Mapping[str, str] | None = None,
) -> None:
    """Send a finished run again where MLflow has not got all of it, or is to register its model.

    Nothing where the run was not tracked and is not to be registered. `run` is changed in place,
    and written if anything has been sent.
    """
    known = run.get("mlflow") or {}
    registered = str(known.get("model", "")).startswith(f"{config.register}/")
    wanted = config.register is not None and not registered
    tracker = Tracker.of(config, folder, run, tags)
    if not tracker.on or not (wanted or (known and not known.get("whole", True))):
        return
    whole = tracker.finish(run, folder.read_bytes("preview.png"))  # whatever train.json names
    tracker.note(run, whole)
    write_training(folder, run)


def training_tags(run: Mapping[str, Any], folder: RunFolder) -> dict[str, str]:
    """What a training run was made from, see store.py. `run`: content of train.json."""
    data = run["data"].get("unlabelled", {})
    tags = {
        "verb": "train",
        "out": Place.parse(folder.uri).uri,
        "state": run["state"],
        "fingerprint": run["fingerprint"],
        "classes": ", ".join(run["classes"]["names"]),
        "labels": data.get("zeroshot"),
        "init": run["weights"].get("init"),
    }
    if tags["labels"] and run["config"].get("zeroshot"):
        tags |= labels_tags(run["config"]["zeroshot"])
    return {f"{PREFIX}{k}": v for k, v in tags.items() if v}


def labels_tags(uri: str) -> dict[str, str | None]:
    """Where the labels of a run's folder come from, without the prefix; what can be told of it."""
    place = Place.parse(uri)
    tags: dict[str, str | None] = {"labels_folder": place.uri}
    try:
        run = RunFolder(uri).read_run() or {}
    except (OSError, ValueError):  # it may have gone since
        return tags
    tags["labels_mlflow"] = (run.get("mlflow") or {}).get("run_id")
    tags["segments"] = run.get("fingerprint") if run.get("verb", "label") == "label" else None
    return tags


def best_iou(run: Mapping[str, Any]) -> dict[str, float | None]:
    """IoU by class at the best epoch of train.json, the last one if nothing was validated."""
    step = (run["best"] or run["last"] or {"step": None})["step"]
    entries = [entry for entry in run["history"] if entry["step"] == step] or run["history"][-1:]
    return dict(entries[0].get("iou") or {}) if entries else {}


def entry_metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an entry of the history; IoU of a class is `iou/NAME`."""
    values = {k: v for k, v in entry.items() if k not in ("step", "time", "iou")}
    values |= {f"iou/{name}": value for name, value in (entry.get("iou") or {}).items()}
    return {k: float(v) for k, v in values.items() if v is not None}
