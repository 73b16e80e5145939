"""MLflow: what arrives there, and that nothing that happens there matters to a run."""

import base64
import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from tests.cluster.training import config
from zsplg_ray.cluster.track import PAUSE_S, TAG, Tracker, entry_metrics, store_uri
from zsplg_ray.cluster.trainrun import describe_training, identify, write_training
from zsplg_ray.config import MlflowConfig
from zsplg_ray.images import decode_image
from zsplg_ray.records import decode_png
from zsplg_ray.rundir import RunFolder
from zsplg_ray.shapes.scenes import make_scene, write_voc
from zsplg_ray.student.checkpoint import build, load_student, pack
from zsplg_ray.student.predict import Predictor
from zsplg_ray.vocab import class_list

CLASSES = class_list("shapes")


def entry(epoch: int, **more) -> dict:
    iou = {"background": 0.9, "circle": 0.1 * epoch, "heart": None}
    told = {"epoch": epoch, "step": 6 * epoch, "loss": 1.0 / epoch, "images_per_s": 10.0}
    return {**told, "val_miou": 0.1 * epoch, "iou": iou, "time": 1.7e9 + epoch, **more}


def training(folder: Path, epochs: int = 2, **changes) -> tuple[RunFolder, dict]:
    """A folder as a finished run leaves it, with a model of random weights."""
    out = RunFolder(str(folder))
    settings = config(folder / "world", folder, **changes)
    data = {"unlabelled": identify(["a", "b"], zeroshot="0123abcd")}
    schedule = {"steps_per_epoch": 6, "epochs": 2, "steps": 12, "images_per_step": 4}
    run = describe_training(settings, CLASSES, data, schedule, {"init": None})
    run["history"] = [entry(epoch) for epoch in range(1, epochs + 1)]
    run["state"] = "complete"
    write_training(out, run)
    model = build(settings.student, len(CLASSES))
    out.write_bytes("best.pt", pack(model.state_dict(), settings.student, CLASSES))
    return out, run


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run tracked over two attempts, the first one killed after one epoch: folder, run, id."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        here = tmp_path_factory.mktemp("elsewhere")
        patch.chdir(here)
        folder, run = training(tmp_path_factory.mktemp("tracked"))
        first = Tracker(MlflowConfig(), folder)
        first.sync({**run, "state": "running", "history": run["history"][:1]})
        again = Tracker(MlflowConfig(), folder)
        again.sync({**run, "state": "running"})
        assert again.run_id == first.run_id, "found again by its tag"
        again.finish(run, b"a picture")
        assert not list(here.iterdir()), "nothing is left where the command was started"
    return folder, run, again


def test_what_a_run_tells_mlflow(tracked):
    folder, run, tracker = tracked
    client = MlflowClient(tracker.uri)
    found = client.get_run(tracker.run_id)
    assert found.info.status == "FINISHED" and found.info.run_name == Path(folder.path).name
    assert found.data.params["student.backbone"] == "test_byobnet"
    assert set(found.data.params) == set(run["config"])
    tags = found.data.tags
    assert tags["state"] == "complete" and tags["zeroshot"] == "0123abcd" and tags[TAG] == run["id"]
    steps = [(m.step, m.value) for m in client.get_metric_history(tracker.run_id, "iou/circle")]
    assert steps == [(6, pytest.approx(0.1)), (12, pytest.approx(0.2))], "each once"
    assert found.data.metrics["val_miou"] == pytest.approx(0.2) and "epoch" in found.data.metrics
    assert "iou/heart" not in found.data.metrics and "time" not in found.data.metrics
    names = {f.path for f in client.list_artifacts(tracker.run_id)}
    assert {"train.json", "best.png"} <= names
    here = client.download_artifacts(tracker.run_id, "train.json")
    assert json.loads(Path(here).read_text()) == run
    models = client.search_logged_models([found.info.experiment_id])
    assert [m.source_run_id for m in models] == [tracker.run_id]


def test_the_logged_model_gives_a_mask(tracked, tmp_path, monkeypatch):
    folder, _, tracker = tracked
    write_voc(tmp_path, 1, seed=3)
    image = next(tmp_path.glob("JPEGImages/*")).read_bytes()
    # By the environment: set_tracking_uri would leave its mark there for all later tests.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    model = mlflow.pyfunc.load_model(f"runs:/{tracker.run_id}/model")
    out = model.predict(pd.DataFrame({"image": [image, image]}))
    expected, _ = Predictor(load_student(folder.uri)).predict(decode_image(image))
    assert (decode_png(out["label_png"][1]) == expected).all()
    row = out.iloc[0]
    assert (row["width"], row["height"]) == (128, 128)
    assert list(row["classes"]) == list(CLASSES.names)
    assert model.metadata.signature.inputs.input_names() == ["image"]
    with pytest.raises(Exception, match="image"):
        model.predict(pd.DataFrame({"picture": [image]}))


@pytest.mark.slow
def test_mlflow_models_serve_answers(tracked, tmp_path):
    folder, _, tracker = tracked
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["-m", f"runs:/{tracker.run_id}/model", "-p", str(port), "-h", "127.0.0.1"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # it starts uvicorn by name
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracker.uri, "PATH": path}
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        image = base64.b64encode(_png(make_scene(5).image_HWC)).decode()
        body = json.dumps({"dataframe_split": {"columns": ["image"], "data": [[image]]}}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    rows = json.load(answer)["predictions"]
                break
            except urllib.error.HTTPError as e:
                raise AssertionError(e.read()[:500]) from e
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, _tail(tmp_path)
                time.sleep(0.2)
    finally:
        server.terminate()
        server.wait(30)
    label_HW = decode_png(base64.b64decode(rows[0]["label_png"]))
    expected, _ = Predictor(load_student(folder.uri)).predict(make_scene(5).image_HWC)
    assert (label_HW == expected).all()
    assert rows[0]["classes"] == list(CLASSES.names)


def _png(image_HWC: np.ndarray) -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, "PNG")
    return out.getvalue()


def _tail(folder: Path) -> str:
    return (folder / "log").read_text()[-3000:]


# When MLflow is not there ------------------------------------------------------------------------


def test_a_dead_server_is_told_of_once_and_at_the_end(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder, run = training(tmp_path / "run")
    tracker = Tracker(MlflowConfig(uri="http://127.0.0.1:9"), folder)
    caplog.set_level(logging.WARNING)
    began = time.monotonic()
    for _ in range(100):
        tracker.sync(run)
    assert time.monotonic() - began < PAUSE_S, "after a failure nothing is tried for a while"
    assert len(caplog.records) == 1 and "does not answer as it should" in caplog.text
    tracker.finish(run, None)
    assert len(caplog.records) == 2
    assert "has not got 2 of 2 validations; they are in train.json" in caplog.text
    assert tracker.run_id is None


def test_what_a_server_missed_is_sent_once_it_is_back(tmp_path, monkeypatch):
    folder, run = training(tmp_path / "run", epochs=2)
    tracker = Tracker(MlflowConfig(), folder)
    got: list[int] = []

    class Client:
        def log_batch(self, run_id, metrics):
            if down:
                raise ConnectionError("down")
            got.append(metrics[0].step)

    tracker._client, tracker.run_id = Client(), "id"  # type: ignore[assignment]
    down = True
    tracker.sync(run)
    down = False
    tracker.sync(run)
    assert got == [], "too soon"
    tracker._pause_until = 0.0
    tracker.sync(run)
    tracker.sync(run)
    assert got == [6, 12]


def test_tracking_can_be_off(tmp_path):
    folder, run = training(tmp_path / "run")
    tracker = Tracker(MlflowConfig(uri="off"), folder)
    tracker.sync(run)
    tracker.finish(run, None)
    assert tracker.uri is None and tracker.run_id is None
    assert not (tmp_path / "run" / "mlflow.db").exists()


def test_where_runs_are_tracked(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    here, there = RunFolder(str(tmp_path / "run")), RunFolder("s3://bucket/run?region=x")
    assert store_uri(MlflowConfig(), here) == f"sqlite:///{tmp_path}/run/mlflow.db"
    assert store_uri(MlflowConfig(), there) == f"sqlite:///{tmp_path}/mlflow.db"
    assert "./mlflow.db" in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert store_uri(MlflowConfig(), here) == "http://mlflow:5000"
    assert store_uri(MlflowConfig(uri="http://other"), here) == "http://other"
    assert store_uri(MlflowConfig(uri="off"), here) is None


def test_an_entry_becomes_numbers():
    values = entry_metrics(entry(2, confident=0.5))
    assert values["iou/circle"] == pytest.approx(0.2) and values["confident"] == 0.5
    assert not {"iou", "iou/heart", "time", "step"} & values.keys()
    assert entry_metrics(entry(1, val_miou=None)).keys().isdisjoint({"val_miou"})
