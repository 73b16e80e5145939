"""A training run in MLflow: what arrives, and that nothing that happens there matters to it."""

import base64
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from tests.cluster.tracking import artefacts, read_json, table
from tests.cluster.training import config
from zsplg_ray.cluster.track import train as track_train
from zsplg_ray.cluster.track.model import register
from zsplg_ray.cluster.track.store import TAG
from zsplg_ray.cluster.track.train import (
    PAUSE_S,
    Tracker,
    best_iou,
    entry_metrics,
    send_finished,
)
from zsplg_ray.cluster.trainrun import (
    describe_training,
    identify,
    read_training,
    write_training,
)
from zsplg_ray.config import MlflowConfig, ModelMlflowConfig
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
        config = ModelMlflowConfig(register="shapes student")
        first = Tracker(config, folder)
        first.sync({**run, "state": "running", "history": run["history"][:1]})
        again = Tracker(config, folder)
        again.sync({**run, "state": "running"})
        assert again.run_id == first.run_id, "found again by its tag"
        assert again.finish(run, b"a picture")
        again.note(run, whole=True)
        write_training(folder, run)
        assert not list(here.iterdir()), "nothing is left where the command was started"
    return folder, run, again


def test_what_a_run_tells_mlflow(tracked):
    folder, run, tracker = tracked
    client = MlflowClient(tracker.store.uri)
    found = client.get_run(tracker.run_id)
    assert found.info.status == "FINISHED" and found.info.run_name == Path(folder.path).name
    assert found.data.params["student.backbone"] == "test_byobnet"
    assert set(found.data.params) == set(run["config"])
    tags = found.data.tags
    assert tags["zsplg_ray.state"] == "complete" and tags[TAG] == run["id"]
    assert tags["zsplg_ray.labels"] == "0123abcd" and tags["zsplg_ray.verb"] == "train"
    assert tags["zsplg_ray.model"] == load_student(folder.uri).sha256
    steps = [(m.step, m.value) for m in client.get_metric_history(tracker.run_id, "iou/circle")]
    assert steps == [(6, pytest.approx(0.1)), (12, pytest.approx(0.2))], "each once"
    assert found.data.metrics["val_miou"] == pytest.approx(0.2) and "epoch" in found.data.metrics
    assert "iou/heart" not in found.data.metrics and "time" not in found.data.metrics
    assert artefacts(tracker.store.uri, tracker.run_id) == {
        "train.json",
        "best.png",
        "iou.png",
        "iou.json",
    }
    sent = read_json(tracker.store.uri, tracker.run_id, "train.json")
    assert sent == {**run, "mlflow": None}
    iou = table(tracker.store.uri, tracker.run_id, "iou.json")
    assert iou == {"class": ["background", "circle", "heart"], "iou": [0.9, 0.2, None]}
    models = client.search_logged_models([found.info.experiment_id])
    assert [m.source_run_id for m in models] == [tracker.run_id]


def test_the_logged_model_gives_a_mask(tracked, tmp_path, monkeypatch):
    folder, _, tracker = tracked
    write_voc(tmp_path, 1, seed=3)
    image = next(tmp_path.glob("JPEGImages/*")).read_bytes()
    # By the environment: set_tracking_uri would leave its mark there for all later tests.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.store.uri)
    model = mlflow.pyfunc.load_model("models:/shapes student@champion")
    out = model.predict(pd.DataFrame({"image": [image, image]}))
    expected, _ = Predictor(load_student(folder.uri)).predict(decode_image(image))
    assert (decode_png(out["label_png"][1]) == expected).all()
    row = out.iloc[0]
    assert (row["width"], row["height"]) == (128, 128)
    assert list(row["classes"]) == list(CLASSES.names)
    assert model.metadata.signature.inputs.input_names() == ["image"]
    with pytest.raises(Exception, match="image"):
        model.predict(pd.DataFrame({"picture": [image]}))


def test_a_finished_run_sends_only_what_is_missing(tracked):
    folder, _, tracker = tracked
    run = read_training(folder)
    assert run is not None and run["mlflow"]["model"] == "shapes student/1"
    client = tracker.store.client
    before = client.get_run(tracker.run_id).to_dictionary()
    config = ModelMlflowConfig(uri=tracker.store.uri, register="shapes student")
    send_finished(config, folder, run)
    assert client.get_run(tracker.run_id).to_dictionary() == before
    run["mlflow"]["whole"] = False  # as if the server had gone before the end
    send_finished(config, folder, run)
    assert read_training(folder) == run and run["mlflow"]["whole"]
    assert run["mlflow"]["run_id"] == tracker.run_id
    versions = client.search_model_versions("name = 'shapes student'")
    assert [version.run_id for version in versions] == [tracker.run_id], "registered once"
    assert len(client.search_logged_models([before["info"]["experiment_id"]])) == 1
    assert len(client.get_metric_history(tracker.run_id, "loss")) == 2


def test_a_registered_name_may_have_quotes(tracked):
    _, _, tracker = tracked
    client, name = tracker.store.client, 'Bob\'s "student"'
    made = client.get_run(tracker.run_id).outputs.model_outputs[0].model_id
    for _ in range(2):
        assert register(tracker.store, tracker.run_id, made, name, "champion") == "1", "once"
    assert client.get_model_version_by_alias(name, "champion").run_id == tracker.run_id


@pytest.mark.slow
def test_mlflow_models_serve_answers(tracked, tmp_path):
    folder, _, tracker = tracked
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["-m", f"runs:/{tracker.run_id}/model", "-p", str(port), "-h", "127.0.0.1"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # it starts uvicorn by name
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracker.store.uri, "PATH": path}
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
    assert not tracker.finish(run, None)
    assert len(caplog.records) == 2
    told = "has not got 2 of 2 validations, the end of the run, its files, its figures, the tag"
    assert told in caplog.text and "the same command sends it again" in caplog.text
    assert tracker.run_id is None


def test_what_a_server_missed_is_sent_once_it_is_back(tmp_path, monkeypatch):
    folder, run = training(tmp_path / "run", epochs=2)
    tracker = Tracker(MlflowConfig(uri="http://x"), folder)
    got: list[int] = []

    class Client:
        def log_batch(self, run_id, metrics, params, tags):
            if down:
                raise ConnectionError("down")
            got.append(metrics[0].step)

    tracker.store._client = Client()  # type: ignore[assignment]
    tracker.run_id, tracker._opened = "id", True
    down = True
    tracker.sync(run)
    down = False
    tracker.sync(run)
    assert got == [], "too soon"
    tracker._pause_until = 0.0
    tracker.sync(run)
    tracker.sync(run)
    assert got == [6, 12]


def test_artefacts_that_fail_leave_no_run_that_goes_on(mlflow_store, tmp_path, caplog, monkeypatch):
    folder, run = training(tmp_path / "run")
    tracker = Tracker(MlflowConfig(uri=mlflow_store, experiment="artefacts"), folder)

    def full(*_):
        raise PermissionError("no room for artefacts")

    with monkeypatch.context() as patch:
        patch.setattr(tracker.store, "send_files", full)
        assert not tracker.finish(run, None)
    found = tracker.store.client.get_run(str(tracker.run_id))
    assert found.info.status == "FINISHED" and found.data.metrics["epoch"] == 2
    assert found.data.tags["zsplg_ray.model"] == load_student(folder.uri).sha256
    told = "has not got its files, its figures; the run's folder"
    assert told in caplog.records[-1].message and "no room" in caplog.records[0].message
    assert tracker.finish(run, None), "and then all of it is there"


@pytest.mark.parametrize(
    ("state", "tags"), [("complete", {"zsplg_ray.study": "a"}), ("interrupted", {})]
)
def test_nobody_waits_for_long_where_others_wait(state, tags, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(track_train, "IMPATIENCE_S", 0.1)
    folder, run = training(tmp_path / "run")
    tracker = Tracker(MlflowConfig(uri="http://x"), folder, tags=tags)
    go_on = threading.Event()
    monkeypatch.setattr(tracker, "catch_up", lambda _: go_on.wait(60))
    began = time.monotonic()
    assert not tracker.finish({**run, "state": state}, None)
    assert time.monotonic() - began < 10
    assert ("the study sees to" in caplog.text) == (state == "complete")
    assert Tracker(tracker.config, folder).patience_s("complete") == track_train.PATIENCE_S
    go_on.set()


def test_tracking_can_be_off(tmp_path):
    folder, run = training(tmp_path / "run")
    tracker = Tracker(MlflowConfig(uri="off"), folder)
    tracker.sync(run)
    assert tracker.finish(run, None)
    assert tracker.store.uri is None and tracker.run_id is None
    assert not (tmp_path / "run" / "mlflow.db").exists()


def test_an_entry_becomes_numbers():
    values = entry_metrics(entry(2, confident=0.5))
    assert values["iou/circle"] == pytest.approx(0.2) and values["confident"] == 0.5
    assert not {"iou", "iou/heart", "time", "step"} & values.keys()
    assert entry_metrics(entry(1, val_miou=None)).keys().isdisjoint({"val_miou"})


def test_the_best_epoch_is_the_one_that_is_drawn():
    run = {"history": [entry(1), entry(2), entry(3)], "best": {"step": 12}, "last": {"step": 18}}
    assert best_iou(run)["circle"] == pytest.approx(0.2)
    assert best_iou({**run, "best": None})["circle"] == pytest.approx(0.3)
    assert best_iou({"history": [], "best": None, "last": None}) == {}
