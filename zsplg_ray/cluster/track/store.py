"""MLflow: the store that runs are told to, how they are tagged, and how it may fail unnoticed.

What enters: a `MlflowConfig` and a run's folder. What leaves: a `Store`, through which run.py
(label, relabel, predict), train.py and study.py tell their runs. Only the driver talks to MLflow,
on a thread of its own, by the client alone: the fluent API has a global state. A folder's MLflow
run is found again by its tags, however often a command was started.

Tags, which say what was made from what:

    zsplg_ray.verb           label, relabel, predict, train, tune labels, tune train
    zsplg_ray.run            id of the folder's run (run.json, train.json, tune.json)
    zsplg_ray.out            its address
    zsplg_ray.state          complete, stopped (by a search), interrupted, failed, running
    zsplg_ray.version        of this package
    zsplg_ray.classes        the class names
    zsplg_ray.fingerprint    of what the run makes: segments, weights, predictions
    zsplg_ray.segments       fingerprint of the segments that the labels were composed from
    zsplg_ray.labels         fingerprint of the zero-shot labels that the run made, or rests on:
                             label and relabel made them; a training run fused them into its
                             targets; predict's model was trained with them; tune labels judged them
    zsplg_ray.labels_folder, zsplg_ray.labels_mlflow    where these are, and who made them
    zsplg_ray.fused          predict: fingerprint of the labels that were fused in
    zsplg_ray.predictions    predict: fingerprint of the labels that it made
    zsplg_ray.model          SHA-256 of a model's weights: of best.pt, or of what predict used
    zsplg_ray.weights_sam, zsplg_ray.weights_clip    label, relabel: SHA-256 of the weights
    zsplg_ray.init           SHA-256 of the weights that training started from
    zsplg_ray.training, zsplg_ray.training_folder, zsplg_ray.training_mlflow
                             predict: the run that trained the model
    zsplg_ray.study, zsplg_ray.trial    the study that a trial belongs to, and its number
    zsplg_ray.truth          tune labels: the masks that it judged by

So `tags.zsplg_ray.labels = 'X'` finds in one search the run that made labels X, the models trained
with them and their predictions.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsplg_ray import __version__
from zsplg_ray.config import MlflowConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.runinfo import masked, user_name
from zsplg_ray.storage import Place

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

OFF = "off"
PREFIX = "zsplg_ray."
"""Of every tag."""
TAG = f"{PREFIX}run"
"""Tag by which the MLflow run of a folder is found again."""
STATUS = {
    "complete": "FINISHED",
    "stopped": "FINISHED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}
"""How a run ended -> MLflow's status."""

IMPATIENCE_S = 10.0
"""How long the end of a run waits for MLflow where somebody waits for that end: it was interrupted,
has failed, or is a trial among many."""

_SQLITE = "sqlite:///"
_NO_DATABASE = (
    "%s is no place for a database: MLflow runs are in %s; give --mlflow.uri where they must "
    "outlive this machine"
)
_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Else MLflow's page takes the experiment for one of language models."""
_AT_ONCE = {"metrics": 1000, "params": 100, "tags": 100}
"""What MLflow takes in one go."""
_PARAM_CHARS = 500
_TAG_CHARS = 5000
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a repeated "create" makes two; we look first
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # which is for results
}
"""Environment for MLflow's client where nobody has set it otherwise: seconds, and tries."""


class Store:
    """An experiment of an MLflow server or database. Every method but `__init__` may raise.

    Args:
        config: Where to track.
        folder: The run's folder, which holds the database if nothing else is named.
    """

    def __init__(self, config: MlflowConfig, folder: RunFolder) -> None:
        self.config = config
        self.uri = store_uri(config, folder)
        self._client: MlflowClient | None = None
        self._experiment = ""

    @property
    def on(self) -> bool:
        """Whether there is any tracking."""
        return self.uri is not None

    @property
    def shown(self) -> str:
        """The address without credentials."""
        return masked(self.uri or OFF)

    @property
    def remote(self) -> bool:
        """Whether it answers over the network, several calls at a time."""
        return self.uri is not None and self.uri.startswith("http")

    @property
    def client(self) -> MlflowClient:
        """The client, of an open store."""
        assert self._client is not None
        return self._client

    def open(self) -> None:
        """Connect, and find or make the experiment; nothing if that is done."""
        if self._client is not None:
            return
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient  # after the environment is set; and it takes seconds

        _quiet()
        client = MlflowClient(tracking_uri=self.uri)
        found = client.get_experiment_by_name(self.config.experiment)
        if found is not None:
            self._experiment = found.experiment_id
        else:
            self._experiment = self._new_experiment(client)
        self._client = client

    def answers(self, run_id: str | None) -> bool:
        """Whether the store is there: it is asked for a run. Tells what one call took amiss, such
        as a full disk for artefacts, from a store that is gone. Never raises.
        """
        if self._client is None or run_id is None:
            return False
        try:
            self._client.get_run(run_id)
            return True
        except Exception as e:  # MLflow's own, the database's, the network's
            log.debug("%s", in_short(e))
            return False

    def _new_experiment(self, client: MlflowClient) -> str:
        name = self.config.experiment
        place = None
        if self.uri is not None and self.uri.startswith(_SQLITE):  # else they go to ./mlruns
            database = Path(self.uri.removeprefix(_SQLITE)).absolute()
            place = database.with_name("mlflow-artifacts").as_uri()
        try:
            return client.create_experiment(name, artifact_location=place, tags=_KIND)
        except Exception:  # somebody else may have been quicker
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id

    # A run --------------------------------------------------------------------------------------

    def find(self, tags: Mapping[str, str], most: int = 1) -> list[Run]:
        """Runs that carry all of these tags, newest first."""
        wanted = " and ".join(f"tags.`{k}` = '{v}'" for k, v in tags.items())
        return list(self.client.search_runs([self._experiment], wanted, max_results=most))

    def begin(
        self,
        name: str,
        key: Mapping[str, str],
        tags: Mapping[str, str] | None = None,
        began_s: float | None = None,
        look: bool = True,
    ) -> tuple[str, bool]:
        """The id of the run that carries the tags `key`, and whether it is new.

        Args:
            name: Its name, if it is new.
            key: Tags that are its alone.
            tags: Further ones for a new run.
            began_s: When it began, seconds since 1970. None: now.
            look: Whether there may be one already.
        """
        if look and (found := self.find(key)):
            self.client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id, False
        verb = key.get(f"{PREFIX}verb") or (tags or {}).get(f"{PREFIX}verb", "")
        values = {f"{PREFIX}version": __version__, "mlflow.source.name": f"zsplg {verb}".strip()}
        values["mlflow.user"] = user_name()
        values |= {**(tags or {}), **key}
        name = values.pop("mlflow.runName", name)
        at = None if began_s is None else int(began_s * 1000)
        values = {k: masked(v)[:_TAG_CHARS] for k, v in values.items()}
        run = self.client.create_run(self._experiment, at, values, run_name=name)
        return run.info.run_id, True

    def send(
        self,
        run_id: str,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float | None] | None = None,
        tags: Mapping[str, str] | None = None,
        at_s: float = 0.0,
        step: int = 0,
    ) -> None:
        """Put values into a run, in as few calls as may be.

        `at_s`: the time of the metrics, seconds since 1970; `step`: theirs. What is None is left
        out of them.
        """
        from mlflow.entities import Metric, Param, RunTag

        at = int(at_s * 1000)
        numbers = {k: v for k, v in (metrics or {}).items() if v is not None}
        batch: dict[str, list[Any]] = {
            "params": [Param(_allowed(k), _shown(v)) for k, v in (params or {}).items()],
            "metrics": [Metric(_allowed(k), float(v), at, step) for k, v in numbers.items()],
            "tags": [RunTag(k, masked(v)[:_TAG_CHARS]) for k, v in (tags or {}).items()],
        }
        while any(batch.values()):
            now = [batch[kind][:most] for kind, most in _AT_ONCE.items()]
            self.client.log_batch(run_id, metrics=now[0], params=now[1], tags=now[2])
            batch = {kind: rows[_AT_ONCE[kind] :] for kind, rows in batch.items()}

    def send_missing_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Put those params into a run that it has not got: MLflow lets none be changed."""
        known = self.client.get_run(run_id).data.params
        self.send(run_id, params={k: v for k, v in params.items() if _allowed(k) not in known})

    def send_files(self, run_id: str, files: Mapping[str, bytes]) -> None:
        """Put files into a run's artefacts, by their paths there; the same path is replaced."""
        if not files:
            return
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self.client.log_artifacts(run_id, folder)

    def send_table(self, run_id: str, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Put a table into a run's artefacts, as MLflow's page shows them; it is replaced.

        MLflow's own `log_table` would add its rows to those of an earlier start.
        """
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        text = json.dumps({"columns": list(columns), "data": rows}, ensure_ascii=False)
        self.send_files(run_id, {name: text.encode()})
        known = self.client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]")
        entry = {"path": name, "type": "table"}
        if entry not in (entries := json.loads(known)):
            self.client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([*entries, entry]))

    def end(self, run_id: str, state: str, ended_s: float) -> None:
        """End a run. `state`: a key of STATUS; `ended_s`: seconds since 1970."""
        self.client.set_tag(run_id, f"{PREFIX}state", state)
        self.client.set_terminated(run_id, STATUS[state], int(ended_s * 1000))


def run_name(config: MlflowConfig, folder: RunFolder, beside: str = "") -> str:
    """What a folder's MLflow run is called. `beside`: the verb of one that has company there."""
    name = config.run_name or Place.parse(folder.uri).name
    return f"{name} {beside}" if beside else name


def store_uri(config: MlflowConfig, folder: RunFolder) -> str | None:
    """Where runs are tracked, for any process of this machine; None where they are not."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri == OFF:
        return None
    if uri:
        if uri.startswith(_SQLITE):
            return f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).absolute()}"
        return uri
    if not folder.local:
        here = Path("mlflow.db").absolute()
        log.info(_NO_DATABASE, masked(folder.uri), here)
        return f"{_SQLITE}{here}"
    return f"{_SQLITE}{folder.path}/mlflow.db"


def in_short(error: BaseException) -> str:
    """One line of an error, without credentials."""
    log.debug("%s", masked("".join(traceback.format_exception(error))))
    return f"{type(error).__name__}: {masked((str(error).splitlines() or [''])[0])[:200]}"


def is_refused(error: BaseException) -> bool:
    """Whether MLflow answered, and would answer the same again."""
    return getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def _quiet() -> None:
    """MLflow tells about its tables and its progress, unless we debug."""
    if not log.isEnabledFor(logging.DEBUG):
        for name in ("mlflow", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _allowed(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", name)[:250]


def _shown(value: Any) -> str:
    """A setting's value as a param."""
    return masked(str(value))[:_PARAM_CHARS]
