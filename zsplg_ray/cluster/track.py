"""MLflow: what a training run tells it, and how it may fail without anybody noticing but the log.

What enters: the content of train.json as it grows, at the end the best model and pictures. What
leaves: one MLflow run for one folder, however often the command was started: it is found again by a
tag. The driver alone talks to MLflow, on a thread of its own; no worker waits for it.

A server that is down or slow costs nothing but its entries: every call has a short timeout and is
guarded, train.json holds the whole history, and whatever is missing is sent with the next
validation that gets through, or at the end.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsplg_ray import __version__
from zsplg_ray.config import MlflowConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.storage import Place

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

OFF = "off"
TAG = "zsplg_ray.run"
"""Tag by which the MLflow run of a folder is found again."""
STATUS = {"complete": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
"""State of train.json -> MLflow's status."""

PAUSE_S = 60.0
"""Seconds after a failure in which nothing is tried."""

_SQLITE = "sqlite:///"
_PARAMS_AT_ONCE = 100
_PARAM_CHARS = 500
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Environment for MLflow's client where nobody has set it otherwise: seconds, and tries."""


class Tracker:
    """The MLflow run of a folder. No method raises because of MLflow.

    Args:
        config: Where to track.
        folder: The training run's folder.
        run_id: The MLflow run, where train.json knows it.
    """

    def __init__(self, config: MlflowConfig, folder: RunFolder, run_id: str | None = None) -> None:
        self.config, self.folder, self.run_id = config, folder, run_id
        self.uri = store_uri(config, folder)
        self._client: MlflowClient | None = None
        self._sent = -1
        """Step of the last entry of the history that MLflow has."""
        self._warned = False
        self._pause_until = 0.0

    @property
    def on(self) -> bool:
        """Whether there is any tracking."""
        return self.uri is not None

    def sync(self, run: Mapping[str, Any]) -> None:
        """Find or make the MLflow run, and send the entries of the history that it has not got.

        After a failure nothing is tried for a while: whoever calls this has other things to do.
        """
        if self.on and time.monotonic() >= self._pause_until:
            self._guarded(lambda: self._catch_up(run))

    def finish(self, run: Mapping[str, Any], pictures: bytes | None) -> None:
        """Send what is missing, train.json, pictures and the best model; end the MLflow run."""
        if not self.on:
            return
        calls = [lambda: self._catch_up(run), lambda: self._send_files(run, pictures)]
        if run["state"] == "complete" and self.config.log_model:
            calls.append(self._send_model)
        calls.append(lambda: self._end(run))
        for call in calls:
            if not self._guarded(call):
                break
        missing = sum(entry["step"] > self._sent for entry in run["history"])
        if missing:
            told = "MLflow at %s has not got %d of %d validations; they are in train.json"
            log.warning(told, self.uri, missing, len(run["history"]))

    # What may fail -------------------------------------------------------------------------------

    def _guarded(self, call: Callable[[], None]) -> bool:
        """Whether it went well."""
        try:
            call()
            return True
        except Exception as e:  # MLflow's own, the database's, the network's
            log.debug("MLflow failed", exc_info=True)
            if not self._warned:
                told = "MLflow at %s does not answer as it should (%s); training goes on without it"
                log.warning(told, self.uri, _in_short(e))
            self._warned = True
            self._pause_until = time.monotonic() + PAUSE_S
            return False

    def _catch_up(self, run: Mapping[str, Any]) -> None:
        if self._client is None:
            self._open(run)
        self._send(run)

    def _open(self, run: Mapping[str, Any]) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient  # after the environment is set; and it takes seconds

        _quiet()
        client = MlflowClient(tracking_uri=self.uri)
        experiment = self._experiment(client)
        if self.run_id is None:
            found = client.search_runs([experiment], f"tags.`{TAG}` = '{run['id']}'")
            self.run_id = found[0].info.run_id if found else None
        if self.run_id is None:
            name = self.config.run_name or Place.parse(self.folder.uri).name
            tags = {TAG: run["id"], "version": __version__, "out": self.folder.uri}
            self.run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
            self._send_params(client, self.run_id, run)
        else:
            client.update_run(self.run_id, status="RUNNING")
            sent = client.get_metric_history(self.run_id, "loss")
            self._sent = max((metric.step for metric in sent), default=-1)
        self._send_tags(client, self.run_id, run)
        self._client = client

    def _experiment(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self.config.experiment)
        if found is not None:
            return found.experiment_id
        place = None
        if self.uri is not None and self.uri.startswith(_SQLITE):  # else they go to ./mlruns
            database = Path(self.uri.removeprefix(_SQLITE)).absolute()
            place = database.with_name("mlflow-artifacts").as_uri()
        return client.create_experiment(self.config.experiment, artifact_location=place)

    def _send_params(self, client: MlflowClient, run_id: str, run: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        values = {k: str(v)[:_PARAM_CHARS] for k, v in run["config"].items()}
        params = [Param(_allowed(k), v) for k, v in values.items()]
        for first in range(0, len(params), _PARAMS_AT_ONCE):
            client.log_batch(run_id, params=params[first : first + _PARAMS_AT_ONCE])

    def _send_tags(self, client: MlflowClient, run_id: str, run: Mapping[str, Any]) -> None:
        tags = {"state": run["state"], "fingerprint": run["fingerprint"]}
        tags |= {"classes": ", ".join(run["classes"]["names"])}
        zeroshot = run["data"].get("unlabelled", {}).get("zeroshot")
        tags |= {"zeroshot": zeroshot} if zeroshot else {}
        for name, value in tags.items():
            client.set_tag(run_id, name, value[:5000])

    def _send(self, run: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        assert self._client is not None and self.run_id is not None
        for entry in run["history"]:
            if entry["step"] <= self._sent:
                continue
            at = int(entry["time"] * 1000)
            values = entry_metrics(entry)
            metrics = [Metric(_allowed(k), v, at, entry["step"]) for k, v in values.items()]
            self._client.log_batch(self.run_id, metrics=metrics)
            self._sent = entry["step"]

    def _send_files(self, run: Mapping[str, Any], pictures: bytes | None) -> None:
        assert self._client is not None and self.run_id is not None
        self._client.log_text(self.run_id, json.dumps(run, indent=1), "train.json")
        if pictures is not None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "best.png")
                path.write_bytes(pictures)
                self._client.log_artifact(self.run_id, str(path))

    def _send_model(self) -> None:
        """Log best.pt as a pyfunc; by the client alone, for the fluent API has a global state."""
        from mlflow import pyfunc
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        assert self._client is not None and self.run_id is not None
        best = self.folder.read_bytes("best.pt")
        if best is None:
            raise FileNotFoundError("best.pt")
        made = self._client.create_logged_model(
            self._client.get_run(self.run_id).info.experiment_id, "model", self.run_id
        )
        model = Model(made.artifact_location, self.run_id, model_id=made.model_id)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it misses an example input; there is a signature
            path = Path(folder, "best.pt")
            path.write_bytes(best)
            pyfunc.save_model(Path(folder, "model"), mlflow_model=model, **served(path))
            self._client.log_model_artifacts(made.model_id, str(Path(folder, "model")))
        self._client.finalize_logged_model(made.model_id, "READY")
        self._client.log_outputs(self.run_id, [LoggedModelOutput(made.model_id, step=0)])

    def _end(self, run: Mapping[str, Any]) -> None:
        assert self._client is not None and self.run_id is not None
        self._client.set_tag(self.run_id, "state", run["state"])
        status = STATUS[run["state"]]
        self._client.set_terminated(self.run_id, status, int(time.time() * 1000))


def store_uri(config: MlflowConfig, folder: RunFolder) -> str | None:
    """Where runs are tracked; None where they are not."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri == OFF:
        return None
    if uri:
        return uri
    if not folder.local:
        log.info("%s is no place for a database: MLflow runs are in ./mlflow.db", folder.uri)
        return f"{_SQLITE}{Path('mlflow.db').absolute()}"
    return f"{_SQLITE}{folder.path}/mlflow.db"


def entry_metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an entry of the history; IoU of a class is `iou/NAME`."""
    values = {k: v for k, v in entry.items() if k not in ("step", "time", "iou")}
    values |= {f"iou/{name}": value for name, value in (entry.get("iou") or {}).items()}
    return {k: float(v) for k, v in values.items() if v is not None}


def served(best: Path) -> dict[str, Any]:
    """What MLflow needs to log or save the model of a best.pt so that it can be served."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import Array, DataType

    columns = {"label_png": "binary", "width": "long", "height": "long"}
    outputs: list[Any] = [ColSpec(kind, name) for name, kind in columns.items()]
    outputs.append(ColSpec(Array(DataType.string), "classes"))
    return {
        "python_model": str(Path(__file__).with_name("served.py")),
        "artifacts": {"model": str(best)},
        "signature": ModelSignature(Schema([ColSpec("binary", "image")]), Schema(outputs)),
        "pip_requirements": [f"zsplg_ray=={__version__}"],
    }


def _quiet() -> None:
    """MLflow tells about its tables and its progress, unless we debug."""
    if not log.isEnabledFor(logging.DEBUG):
        for name in ("mlflow", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _allowed(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", name)[:250]


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
