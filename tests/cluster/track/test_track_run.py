"""Runs of label, relabel and predict in MLflow, and the tags that link all that came of labels."""

import json
import socket
import time

import numpy as np
import pyarrow as pa
import pytest

from tests.cluster.rigged import config as rigged
from tests.cluster.track.test_track_train import training
from tests.cluster.tracking import artefacts, read_json, runs, table
from zsplg_ray.cluster.label import label
from zsplg_ray.cluster.relabel import relabel
from zsplg_ray.cluster.track import run as track_run
from zsplg_ray.cluster.track.run import RunTracker, look_at_labels
from zsplg_ray.cluster.track.train import Tracker
from zsplg_ray.config import LabelConfig, MlflowConfig, PredictConfig, RelabelConfig
from zsplg_ray.records import LABELS, encode_png
from zsplg_ray.rundir import RunFolder
from zsplg_ray.runinfo import describe_prediction, describe_run, relabelled
from zsplg_ray.settings import from_mapping
from zsplg_ray.shapes.scenes import write_voc
from zsplg_ray.student.checkpoint import load_student
from zsplg_ray.vocab import class_list

CLASSES = class_list("cat,dog")


def labelled(folder, images=None, **changes) -> tuple[RunFolder, dict]:
    """A folder as a finished `label` leaves it: two images, of which one has no confidence."""
    out = RunFolder(str(folder))
    values = {"images": "photos", "classes": "cat,dog", "out": str(folder), **changes}
    config = from_mapping(LabelConfig, values)
    run = describe_run(config, config, CLASSES, {"sam": "s" * 64, "clip": "c" * 64})
    run |= {"id": f"id of {folder}", "state": "complete", "seconds": 3.0, "images_per_s": 1.5}
    run["counts"] = {"images": 3, "labelled": 2, "quarantined": 1, "skipped_as_done": 0}
    row = {"width": 128, "height": 128, "score_png": b"", "source": "zeroshot"}
    row["label_png"] = encode_png(np.zeros((128, 128), np.uint8))
    uris = [str(path) for path in images or ["gone.jpg", "gone too.jpg"]]
    px = [[60, 40, 0], [100, 0, 0]]
    rows = [
        {**row, "image_id": str(i), "uri": uris[i], "class_px": px[i], "confidence": [0.5, None][i]}
        for i in range(2)
    ]
    for i, one in enumerate(rows):
        part = pa.Table.from_pylist([one], schema=LABELS)
        out.write_part("labels", f"part-{i:020}", part, {})
    out.write_run(run)
    return out, run


def track(config: MlflowConfig, folder: RunFolder, run: dict, verb: str = "label") -> str:
    tracker = RunTracker(config, folder, verb)
    tracker.start({**run, "state": "running"})
    tracker.finish(run, run["state"])
    folder.write_run(run)
    return run["mlflow"]["run_id"]


def test_what_a_run_tells_mlflow(mlflow_store, tmp_path):
    config = MlflowConfig(uri=mlflow_store, experiment="labels")
    write_voc(tmp_path / "world", 2, seed=3)
    images = sorted((tmp_path / "world").glob("JPEGImages/*"))
    folder, run = labelled(tmp_path / "my labels", images)
    run_id = track(config, folder, {**run, "state": "interrupted"})
    again = track(config, folder, run)
    assert again == run_id, "the same folder, the same labels: the same run"
    (found,) = runs(mlflow_store, "labels")
    assert found.info.run_name == "my labels" and found.info.status == "FINISHED"
    assert found.data.params["compose.min_margin"] == "0.0"
    assert set(found.data.params) == set(run["resolved"])
    metrics = {"images": 3, "labelled": 2, "quarantined": 1, "skipped_as_done": 0, "seconds": 3}
    metrics |= {"images_per_s": 1.5, "mean_confidence": 0.5}
    shares = {"share/background": 0.8, "share/cat": 0.2, "share/dog": 0.0}
    assert found.data.metrics == pytest.approx(metrics | shares)
    files = {"run.json", "preview.png", "class_shares.png", "class_shares.json"}
    assert artefacts(mlflow_store, run_id) == files
    sent = read_json(mlflow_store, run_id, "run.json")
    assert sent == run and sent["mlflow"] == {"uri": mlflow_store, "run_id": run_id}
    assert table(mlflow_store, run_id, "class_shares.json")["px"] == [160, 40, 0]


def test_one_search_finds_all_that_came_of_labels(mlflow_store, tmp_path):
    config = MlflowConfig(uri=mlflow_store, experiment="links")
    folder, run = labelled(tmp_path / "labels")
    zeroshot = run["labels_fingerprint"]
    label_id = track(config, folder, run)

    other = {**run, "labels_fingerprint": "f" * 16}  # other thresholds
    assert track(config, folder, other, "relabel") != label_id
    folder.write_run(run)

    model, told = training(tmp_path / "model", zeroshot=str(tmp_path / "labels"))
    told["data"]["unlabelled"]["zeroshot"] = zeroshot
    told["mlflow"] = {"run_id": "its run"}
    model.write_bytes("train.json", json.dumps(told).encode())
    assert Tracker(config, model).finish(told, None)

    values = {"model": str(tmp_path / "model"), "images": "photos", "out": str(tmp_path / "out")}
    given = from_mapping(PredictConfig, values)
    student = load_student(values["model"])
    weights = {"model": student.sha256}
    predicted = describe_prediction(given, given, student.classes, weights, None)
    predicted |= {"id": "p", "state": "complete", "counts": {}}
    predict_id = track(config, RunFolder(values["out"]), predicted, "predict")

    found = runs(mlflow_store, "links", f"tags.zsplg_ray.labels = '{zeroshot}'")
    assert [r.data.tags["zsplg_ray.verb"] for r in found] == ["label", "train", "predict"]
    of_model = runs(mlflow_store, "links", f"tags.zsplg_ray.model = '{student.sha256}'")
    assert [r.data.tags["zsplg_ray.verb"] for r in of_model] == ["train", "predict"]
    of_segments = runs(mlflow_store, "links", f"tags.zsplg_ray.segments = '{run['fingerprint']}'")
    verbs = [r.data.tags["zsplg_ray.verb"] for r in of_segments]
    assert verbs == ["label", "relabel", "train", "predict"]
    tags = {r.data.tags["zsplg_ray.verb"]: r.data.tags for r in found}
    assert tags["train"]["zsplg_ray.labels_mlflow"] == label_id
    assert tags["train"]["zsplg_ray.labels_folder"] == str(tmp_path / "labels")
    assert found[-1].info.run_id == predict_id
    links = {"training": told["id"], "training_folder": str(tmp_path / "model")}
    links |= {"training_mlflow": "its run", "predictions": predicted["labels_fingerprint"]}
    assert {f"zsplg_ray.{k}": v for k, v in links.items()}.items() <= tags["predict"].items()


def test_predictions_of_a_foreign_model_name_the_labels_fused_in(tmp_path):
    fused, labels = labelled(tmp_path / "labels")
    source = {"uri": fused.uri, "labels_fingerprint": labels["labels_fingerprint"]}
    given = from_mapping(
        PredictConfig, {"model": str(tmp_path / "m.pth"), "images": "x", "out": "y"}
    )
    run = describe_prediction(given, given, CLASSES, {"model": "m"}, source)
    tags = track_run.run_tags(run | {"id": "p"}, RunFolder(str(tmp_path / "y")), "predict")
    assert tags["zsplg_ray.fused"] == tags["zsplg_ray.labels"] == labels["labels_fingerprint"]
    assert tags["zsplg_ray.segments"] == labels["fingerprint"]
    assert "zsplg_ray.training" not in tags


def test_how_far_a_run_is_can_be_seen_meanwhile(mlflow_store, tmp_path, monkeypatch):
    monkeypatch.setattr(track_run, "EVERY_S", 0.01)
    folder, run = labelled(tmp_path / "labels")
    tracker = RunTracker(MlflowConfig(uri=mlflow_store, experiment="far"), folder, "label")
    asked = []

    def numbers():
        asked.append(1)
        return {"labelled": 10.0 * len(asked), "images_per_s": 2.0}

    tracker.start({**run, "state": "running"}, numbers)
    deadline = time.monotonic() + 60
    while len(asked) < 3:
        assert time.monotonic() < deadline
        tracker._ended.wait(0.01)
    tracker.finish(run, "failed")
    (found,) = runs(mlflow_store, "far")
    assert found.info.status == "FAILED"
    history = tracker.store.client.get_metric_history(found.info.run_id, "labelled")
    assert [(m.step, m.value) for m in history][:2] == [(10, 10.0), (20, 20.0)]


def test_a_server_that_hangs_holds_a_run_for_a_bounded_time(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(track_run, "PATIENCE_S", 0.2)
    folder, run = labelled(tmp_path / "labels")
    with socket.create_server(("127.0.0.1", 0)) as server:
        config = MlflowConfig(uri=f"http://me:word@127.0.0.1:{server.getsockname()[1]}")
        tracker = RunTracker(config, folder, "label")
        began = time.monotonic()
        tracker.start(run)
        tracker.finish(run, "complete")
        assert time.monotonic() - began < 5
    assert "has not got this run" in caplog.text and "word" not in caplog.text
    assert "mlflow" not in run and len(caplog.records) == 1


def test_no_tracking(tmp_path):
    folder, run = labelled(tmp_path / "labels")
    before = sorted(tmp_path.rglob("*"))
    tracker = RunTracker(MlflowConfig(uri="off"), folder, "label")
    tracker.start(run)
    with tracker.ending(run):
        pass
    assert not tracker.started and "mlflow" not in run
    assert sorted(tmp_path.rglob("*")) == before


def test_labels_are_looked_at_as_they_are(tmp_path):
    assert look_at_labels(RunFolder(str(tmp_path)), 3) is None
    folder, _ = labelled(tmp_path)
    found = look_at_labels(folder, 3)
    assert found is not None and found.px_K.tolist() == [160, 40, 0] and found.confidence == 0.5


def test_what_a_failed_relabel_leaves_is_not_looked_at(mlflow_store, tmp_path, caplog):
    folder, run = labelled(tmp_path / "labels")  # of three classes
    run |= {"classes": class_list("cat,dog,cow").to_dict(), "labels_state": "relabelling"}
    config = MlflowConfig(uri=mlflow_store, experiment="mixed")
    run_id = track(config, folder, {**run, "state": "failed"}, "relabel")
    (found,) = runs(mlflow_store, "mixed")
    assert found.info.status == "FAILED" and not caplog.records
    assert not [name for name in found.data.metrics if name.startswith("share/")]
    assert artefacts(mlflow_store, run_id) == {"run.json"}


def test_other_labels_are_of_another_mlflow_run(tmp_path):
    _, run = labelled(tmp_path)
    run["mlflow"] = {"uri": "x", "run_id": "of label"}
    same = from_mapping(RelabelConfig, {"run": str(tmp_path)})
    assert relabelled(run, same, same, CLASSES)["mlflow"] == run["mlflow"]
    other = from_mapping(RelabelConfig, {"run": str(tmp_path), "compose.min_similarity": 0.9})
    assert "mlflow" not in relabelled(run, other, other, CLASSES)
    assert "mlflow" not in relabelled(run, same, same, class_list("cat,cow"))
    assert run["mlflow"]["run_id"] == "of label", "left as it was"


@pytest.mark.ray
def test_label_and_relabel_tell_mlflow(ray_local, scenes, mlflow_store, tmp_path):
    out = str(tmp_path / "run")
    more = {"mlflow.uri": mlflow_store, "mlflow.experiment": "real"}
    images = f"{scenes}/JPEGImages/*[0-3].*"
    first = label(rigged(images, out, **more))
    n = first["counts"]["labelled"]
    stored = RunFolder(out).read_run()
    assert stored == first and n > 0
    assert label(rigged(images, out, **more))["mlflow"] == first["mlflow"], "nothing to do"
    values = {"run": out, "compose.min_similarity": 0.9, "mlflow.uri": mlflow_store, "quiet": True}
    second = relabel(from_mapping(RelabelConfig, {**values, "mlflow.experiment": "real"}))
    assert second == RunFolder(out).read_run() and second["id"] == first["id"]
    found = runs(mlflow_store, "real")
    assert [r.info.run_id for r in found] == [r["mlflow"]["run_id"] for r in (first, second)]
    for told, run, verb in zip(found, (first, second), ("label", "relabel"), strict=True):
        assert told.info.status == "FINISHED" and told.data.metrics["labelled"] == n
        assert told.data.tags["zsplg_ray.verb"] == verb
        assert told.data.tags["zsplg_ray.labels"] == run["labels_fingerprint"]
        assert told.data.params["compose.min_similarity"] == str(
            run["resolved"]["compose.min_similarity"]
        )
        assert "preview.png" in artefacts(mlflow_store, told.info.run_id)
    assert found[1].data.metrics["share/background"] == 1.0, "nothing is that similar"
    values |= {"compose.min_similarity": 0.1, "mlflow.uri": "off"}
    assert "mlflow" not in relabel(from_mapping(RelabelConfig, values)), "others made them"
