"""What a run of `label`, `relabel` or `predict` tells MLflow.

What enters: run.json as the run starts and as it ends, and how far it is meanwhile. What leaves:
an MLflow run (see store.py for its tags). The same command again goes on with the same MLflow run;
`relabel` has one of its own, beside that of the `label` run in the same folder: each names the
labels that it made, and those are others.

All of it happens on a thread of the driver, begun once the folder is (MLflow takes seconds to load,
a new database some more); the end of a run waits for it for a bounded time. Every number stands in
run.json anyway.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from zsplg_ray.cluster.track.store import IMPATIENCE_S, PREFIX, TAG, Store, in_short, run_name
from zsplg_ray.cluster.track.train import labels_tags
from zsplg_ray.config import MlflowConfig
from zsplg_ray.rundir import RunFolder, made_by
from zsplg_ray.storage import Place

log = logging.getLogger(__name__)

EVERY_S = 30.0
"""Seconds between two looks at how far a run is."""
PATIENCE_S = 30.0
"""How long the end of a run waits for MLflow."""

Numbers = Callable[[], Mapping[str, float]]


class RunTracker:
    """The MLflow run of a folder's labels. No method raises because of MLflow.

    Args:
        config: Where to track.
        folder: The run's folder.
        verb: `label`, `relabel` or `predict`.
    """

    def __init__(self, config: MlflowConfig, folder: RunFolder, verb: str) -> None:
        self.config, self.folder, self.verb = config, folder, verb
        self.store = Store(config, folder)
        self._run_id: str | None = None
        self._at_end: dict[str, Any] | None = None
        self._stop, self._ended = threading.Event(), threading.Event()
        self._missing = "this run"
        """What MLflow has not got yet."""
        self._error = ""
        self._thread: threading.Thread | None = None

    @property
    def started(self) -> bool:
        """Whether there is any tracking, and it has begun."""
        return self._thread is not None

    def start(self, run: Mapping[str, Any], numbers: Numbers | None = None) -> None:
        """Find or make the MLflow run; returns at once.

        Args:
            run: Content of run.json, with `id`.
            numbers: How far the run is, asked for now and then.
        """
        if self.store.on and self._thread is None:
            args = (json.loads(json.dumps(run)), numbers)
            self._thread = threading.Thread(target=self._serve, args=args, daemon=True)
            self._thread.start()

    @contextlib.contextmanager
    def ending(self, run: dict[str, Any]) -> Iterator[None]:
        """Tell how it ended, however that was."""
        state = "failed"
        try:
            yield
            state = "complete"
        except KeyboardInterrupt:
            state = "interrupted"
            raise
        finally:
            self.finish(run, state)

    def finish(self, run: dict[str, Any], state: str) -> None:
        """Tell how the run ended; waits for a bounded time. Puts `mlflow` into `run`.

        `state`: complete, interrupted or failed.
        """
        if self._thread is None:
            return
        self._at_end = {**json.loads(json.dumps(run)), "state": state}
        self._stop.set()
        patience_s = PATIENCE_S if state == "complete" else IMPATIENCE_S
        self._ended.wait(patience_s)
        if self._missing:
            told = "MLflow at %s has not got %s (%s); run.json holds all that is of weight"
            why = self._error or f"it takes more than {patience_s:.0f} s"
            log.warning(told, self.store.shown, self._missing, why)
        if self._run_id is not None:
            run["mlflow"] = {"uri": self.store.shown, "run_id": self._run_id}

    # On the thread --------------------------------------------------------------------------------

    def _serve(self, run: Mapping[str, Any], numbers: Numbers | None) -> None:
        try:
            self._guarded(lambda: self._open(run))
            while not self._stop.wait(EVERY_S):
                self._guarded(lambda: self._send_numbers(run, numbers))
            self._guarded(lambda: self._send_end(run, self._at_end or {}))
        finally:
            self._ended.set()

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as e:  # MLflow's own, the database's, the network's
            self._error = in_short(e)

    def _open(self, run: Mapping[str, Any]) -> str:
        """The MLflow run's id."""
        if self._run_id is None:
            store = self.store
            store.open()
            tags = run_tags(run, self.folder, self.verb)
            key = {k: tags[k] for k in (TAG, f"{PREFIX}verb")}
            if self.verb != "predict":  # other labels, another run
                key[f"{PREFIX}labels"] = tags[f"{PREFIX}labels"]
            beside = "relabel" if self.verb == "relabel" else ""
            name = run_name(self.config, self.folder, beside)
            run_id, _ = store.begin(name, key, tags)
            store.send(run_id, tags=tags)
            store.send_missing_params(run_id, run["resolved"])
            self._run_id = run_id
        return self._run_id

    def _send_numbers(self, run: Mapping[str, Any], numbers: Numbers | None) -> None:
        run_id = self._open(run)
        if numbers is not None:
            values = numbers()
            step = int(values.get("labelled", 0))
            self.store.send(run_id, metrics=values, at_s=time.time(), step=step)

    def _send_end(self, run: Mapping[str, Any], at_end: dict[str, Any]) -> None:
        run_id = self._open(run)
        now = time.time()
        at_end["mlflow"] = {"uri": self.store.shown, "run_id": run_id}
        counts = at_end.get("counts", {})
        values: dict[str, float | None] = {k: v for k, v in counts.items() if v is not None}
        seconds = "relabel_seconds" if self.verb == "relabel" else "seconds"
        values["seconds"] = at_end.get(seconds)
        if self.verb != "relabel":
            values["images_per_s"] = at_end.get("images_per_s")
        step = int(counts.get("labelled", 0))
        self._missing = "the numbers of this run's end"
        self.store.send(run_id, metrics=values, at_s=now, step=step)
        self.store.end(run_id, at_end["state"], now)
        self._missing = "files of this run"
        self.store.send_files(run_id, {"run.json": json.dumps(at_end, indent=1).encode()})
        if at_end["labels_state"] == "complete":  # else they are of two settings, even two K
            self._send_labels(run_id, at_end["classes"]["names"], step)
        self._missing = ""

    def _send_labels(self, run_id: str, names: list[str], step: int) -> None:
        """What the labels are like."""
        found = look_at_labels(self.folder, len(names))
        if found is None:
            return
        from zsplg_ray.views.figures import class_shares  # it loads matplotlib
        from zsplg_ray.views.pictures import write_preview

        share_K = found.px_K / max(1, int(found.px_K.sum()))
        shares = dict(zip(names, share_K.tolist(), strict=True))
        metrics = {f"share/{name}": share for name, share in shares.items()}
        metrics |= {"mean_confidence": found.confidence}
        self.store.send(run_id, metrics=metrics, at_s=time.time(), step=step)
        files = {"class_shares.png": class_shares(shares)}
        preview = write_preview(self.folder)
        data = self.folder.read_bytes(preview) if preview else None
        files |= {"preview.png": data} if data else {}
        self.store.send_files(run_id, files)
        columns = {"class": names, "share of pixels": share_K.tolist(), "px": found.px_K.tolist()}
        self.store.send_table(run_id, "class_shares.json", columns)


class Look(NamedTuple):
    """What the labels of a folder are like."""

    px_K: np.ndarray
    """int64 [K], pixels of each class."""
    confidence: float | None
    """Mean of the images' confidence."""


def look_at_labels(folder: RunFolder, n_classes: int) -> Look | None:
    """Pixels by class and mean confidence over all labels; None if there are none.

    Shapes: K classes, N images.
    """

    def one_part(name: str) -> tuple[np.ndarray, float, int]:
        table = folder.read_part("labels", name, ["class_px", "confidence"])
        column = table["class_px"].combine_chunks()
        assert isinstance(column, pa.ListArray)
        px_NK = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, n_classes)
        confidence_N = table["confidence"].drop_null().to_numpy()
        confidence_N = confidence_N[np.isfinite(confidence_N)]
        return px_NK.sum(axis=0), float(confidence_N.sum()), len(confidence_N)

    parts = list(folder.map_parts(folder.parts("labels"), one_part).values())
    if not parts:
        return None
    n = sum(count for _, _, count in parts)
    mean = sum(total for _, total, _ in parts) / n if n else None
    return Look(np.sum([px_K for px_K, _, _ in parts], axis=0), mean)


# Tags --------------------------------------------------------------------------------------------


def run_tags(run: Mapping[str, Any], folder: RunFolder, verb: str) -> dict[str, str]:
    """What a run was made from, see store.py. `run`: content of run.json, with `id`."""
    tags: dict[str, str | None] = {
        "verb": verb,
        "run": run["id"],
        "out": Place.parse(folder.uri).uri,
        "state": run["state"],
        "fingerprint": run["fingerprint"],
        "classes": ", ".join(run["classes"]["names"]),
    }
    if made_by(run) == "predict":
        tags |= _prediction_tags(run)
    else:
        tags |= {"segments": run["fingerprint"], "labels": run["labels_fingerprint"]}
        tags |= {f"weights_{name}": sha256 for name, sha256 in run["weights"].items()}
    return {f"{PREFIX}{k}": v for k, v in tags.items() if v}


def _prediction_tags(run: Mapping[str, Any]) -> dict[str, str | None]:
    """What predictions rest on: the model, its training run, its labels, those fused in."""
    tags: dict[str, str | None] = {
        "predictions": run["labels_fingerprint"],
        "model": run["weights"].get("model"),
    }
    fused = run.get("zeroshot")
    if fused:
        tags |= {"fused": fused["labels_fingerprint"], "labels": fused["labels_fingerprint"]}
    made = _model_tags(run["resolved"]["model"])
    if fused and "labels" not in made:
        tags |= labels_tags(fused["uri"])
    return tags | made


def _model_tags(model: str) -> dict[str, str | None]:
    """The run that trained a model, where it still lies in that run's folder."""
    place = Place.parse(model)
    place = place if place.kind() == "folder" else place.parent
    for name in ("train.json", "tune.json"):
        try:
            record = json.loads(place.child(name).read())
        except (OSError, ValueError):  # no such file, or none that a run has written
            continue
        tags: dict[str, str | None] = {"training": record.get("id"), "training_folder": place.uri}
        tags["training_mlflow"] = (record.get("mlflow") or {}).get("run_id")
        data = record.get("data", {}).get("unlabelled") or {}
        labels = data.get("zeroshot") or record.get("tags", {}).get(f"{PREFIX}labels")
        source = record.get("config", {}).get("zeroshot")
        if labels:
            tags |= {"labels": labels} | (labels_tags(source) if source else {})
        return tags
    return {}
