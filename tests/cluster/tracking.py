"""What MLflow holds, read for tests; a server of its own; and a trial that tracks itself."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from zsplg_ray.cluster.track.train import Tracker
from zsplg_ray.cluster.trainrun import read_training
from zsplg_ray.config import MlflowConfig
from zsplg_ray.rundir import RunFolder


def runs(uri: str, experiment: str, wanted: str = "") -> list[Run]:
    """Runs of an experiment, oldest first."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    order = ["attributes.start_time ASC"]
    return list(client.search_runs([found.experiment_id], wanted, max_results=2000, order_by=order))


def artefacts(uri: str, run_id: str, path: str | None = None) -> set[str]:
    """Paths of a run's files."""
    found = MlflowClient(uri).list_artifacts(run_id, path)
    below = (artefacts(uri, run_id, f.path) for f in found if f.is_dir)
    return {f.path for f in found if not f.is_dir}.union(*below)


def read_json(uri: str, run_id: str, path: str) -> dict:
    return json.loads(Path(MlflowClient(uri).download_artifacts(run_id, path)).read_text())


def table(uri: str, run_id: str, path: str) -> dict[str, list]:
    """Column -> values of a table."""
    split = read_json(uri, run_id, path)
    columns = zip(*split["data"], strict=True)
    return {name: list(c) for name, c in zip(split["columns"], columns, strict=True)}


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """A real `mlflow server` over a database in `folder`: its address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artefacts")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # it starts uvicorn by name
    log = (folder / "server.log").open("w")
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=log,
        cwd=folder,
        env={**os.environ, **quiet, "PATH": path, "MLFLOW_TRACKING_URI": ""},
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                told = (folder / "server.log").read_text()[-2000:]
                assert process.poll() is None and time.monotonic() < deadline, told
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait(30)


def track_trial(uri: str, parent: str, number: int, place: str) -> None:
    """What a trial in a process of its own does: it tells each epoch, then the end."""
    tags = {"mlflow.parentRunId": parent, "mlflow.runName": f"trial {number}"}
    tags |= {"zsplg_ray.trial": str(number)}
    folder = RunFolder(place)
    run = read_training(folder)
    assert run is not None
    tracker = Tracker(MlflowConfig(uri=uri, experiment="server"), folder, tags=tags)
    for epoch in range(1, len(run["history"]) + 1):
        tracker.sync({**run, "state": "running", "history": run["history"][:epoch]})
    assert tracker.finish(run, None)
