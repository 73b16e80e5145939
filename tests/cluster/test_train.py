"""`zsplg train`: Ray Train around the loop. Few runs, each looked at from all sides."""

import logging
import os
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")

from tests.cluster.training import config, rig
from zsplg_ray.cluster.train import anywhere, train
from zsplg_ray.cluster.trainrun import read_training
from zsplg_ray.cluster.worker import is_final
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import WorkError
from zsplg_ray.shapes.scenes import write_voc
from zsplg_ray.student.checkpoint import load_student, read_weights
from zsplg_ray.student.data import WrongClass
from zsplg_ray.views.summaries import of_training

EPOCHS = 12
RESUMED = {"train.epochs": EPOCHS, "student.frozen_bn": False, "optim.ema_decay": 0.9}
"""Settings of the runs that are killed: all the state that there is."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """6 + 2 labelled scenes, 12 others: 6 steps an epoch."""
    folder = tmp_path_factory.mktemp("world")
    write_voc(folder / "labelled", 8, seed=0)
    write_voc(folder / "pool", 12, seed=500)
    return folder


@pytest.fixture(scope="module")
def straight(ray_local, world, tmp_path_factory):
    """A run that nobody disturbs."""
    out = tmp_path_factory.mktemp("straight") / "run"
    return out, train(config(world, out, **RESUMED))


def weights(out) -> dict[str, torch.Tensor]:
    return read_weights(str(out) if "://" in str(out) else f"{out}/last.pt").state


def differences(out, other) -> float:
    ours, theirs = weights(out), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[k].double() - theirs[k].double()).abs().max()) for k in ours)


def files(out) -> set[str]:
    return {p.name for p in Path(out).iterdir()}


# Runs --------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_run_from_end_to_end(straight, world, caplog):
    out, run = straight
    assert run == read_training(RunFolder(str(out)))
    assert run["state"] == "complete" and run["seconds"] > 0 and run["images_per_s"] > 0
    assert [entry["epoch"] for entry in run["history"]] == list(range(1, EPOCHS + 1))
    assert [entry["step"] for entry in run["history"]] == [6 * e for e in range(1, EPOCHS + 1)]
    entry = run["history"][-1]
    assert {"loss", "loss_x", "confident", "lr", "val_miou", "images_per_s"} <= entry.keys()
    assert set(entry["iou"]) == set(run["classes"]["names"])
    assert run["best"]["val_miou"] == max(e["val_miou"] for e in run["history"])
    assert run["last"]["step"] == run["schedule"]["steps"] == 6 * EPOCHS
    assert run["data"]["labelled"]["images"] == 6 and run["data"]["validation"]["images"] == 2
    assert files(out) == {"train.json", "best.pt", "last.pt", "checkpoints", "preview.png"}
    assert len(list(out.glob("checkpoints/*/step-*"))) == 2, "old checkpoints are in the way"
    told = of_training(run, config(world, out))
    assert f"model     {out}/best.pt" in told and "mIoU" in told
    assert f"zsplg predict --model {out} --images" in told

    student = load_student(str(out))
    assert list(student.classes.names) == run["classes"]["names"]
    assert student.config.backbone == "test_byobnet" and student.conf_thresh == 0.95
    best, last = (read_weights(f"{out}/{name}.pt").extra for name in ("best", "last"))
    assert best["step"] == run["best"]["step"] and best["val_miou"] == run["best"]["val_miou"]
    assert last["step"] == run["last"]["step"]

    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    caplog.set_level(logging.INFO)
    assert train(config(world, out, **RESUMED)) == run, "a finished run is left alone"
    assert "is finished" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    for change, told in [
        ({"optim.lr": 0.01}, "optim.lr must be 0.001 as in"),
        ({"train.epochs": EPOCHS + 1}, f"train.epochs must be {EPOCHS} as in"),
        ({"unlabeled": f"{world}/labelled"}, "number of unlabelled images must be 12 as in"),
        ({"train.seed": 1}, "train.seed must be 0 as in"),
    ]:
        with pytest.raises(ValueError, match=told) as caught:
            train(config(world, out, **{**RESUMED, **change}))
        assert "\n" not in str(caught.value)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_do_what_one_does_and_out_may_be_an_object_store(
    ray_local, world, tmp_path, bucket, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    three_steps = {"train.epochs": 1, "train.batch_unlabeled": 4, "train.batch_labeled": 4}
    one = train(config(world, tmp_path / "one", **three_steps, **{"mlflow.uri": None}))
    there = bucket.uri("model", keys="a:b@")  # the workers need no other key
    two = train(config(world, there, **three_steps, **{"workers.num": 2}))
    assert one["last"]["step"] == two["last"]["step"] == 3
    assert two["workers"]["num"] == 2
    for name in ("loss", "loss_x", "loss_s1", "loss_s2", "loss_fp", "val_miou"):
        assert two["history"][0][name] == pytest.approx(one["history"][0][name], abs=1e-5), name
    assert differences(tmp_path / "one", there) < 1e-5
    folder = RunFolder(there)
    assert read_training(folder) == two
    assert folder.read_bytes("last.pt") is not None and folder.read_bytes("preview.png")

    client = MlflowClient(one["mlflow"]["uri"])
    tracked = client.get_run(one["mlflow"]["run_id"])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["val_miou"] == one["history"][0]["val_miou"]
    names = {file.path for file in client.list_artifacts(tracked.info.run_id)}
    assert {"train.json", "best.png"} <= names
    assert two["mlflow"] is None


@pytest.mark.ray
def test_what_would_fail_again_is_not_tried_again(ray_local, world, tmp_path, monkeypatch):
    rig(monkeypatch, tmp_path / "notes", 15, "fail")
    with pytest.raises(ValueError, match=r"masks must be of class indices 0 to 8, got 77"):
        train(config(world, tmp_path / "run", **RESUMED))
    assert len((tmp_path / "notes").read_text().splitlines()) == 15
    run = read_training(RunFolder(str(tmp_path / "run")))
    assert run is not None and run["state"] == "failed"
    assert run["last"]["epoch"] == 1 and {"last.pt", "best.pt"} <= files(tmp_path / "run")


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"labeled": "/no/such"}, "labeled|source|images"),
        ({"student.backbone": "resnot18"}, "student.backbone must be"),
        ({"student.init": "/no/such.pt"}, "student.init must be"),
        ({"classes": "cat,dog"}, "must be"),
        ({"zeroshot": "/no/such"}, "zeroshot must be"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(world, tmp_path, changes, told):
    with pytest.raises(ValueError, match=told) as caught:
        train(config(world, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"workers.num": 5}, r"workers.cpus must be within the 4 CPUs there are, got 1 for each"),
        ({"workers.gpus": 1.0}, "workers.gpus must be within the 0 GPUs"),
        ({"workers.num": 3}, r"train.batch_labeled must be >= 3, one for each of 3 workers, got 2"),
        ({"train.accumulate": 3}, r"times train.accumulate \(3\), got 2"),
    ],
)
def test_what_the_cluster_cannot_hold_is_refused_at_once(ray_local, world, tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        train(config(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("old/best.pt", "{here}/old/best.pt"),
        ("/old/best.pt", "/old/best.pt"),
        ("s3://bucket/old/best.pt", "s3://bucket/old/best.pt"),
        ("shapes", "shapes"),
        (None, None),
    ],
)
def test_workers_look_for_the_first_weights_where_the_user_does(
    tmp_path, monkeypatch, given, meant
):
    monkeypatch.chdir(tmp_path)
    found = anywhere(config("world", "out", **{"student.init": given})).student.init
    assert found == (meant and meant.format(here=tmp_path))


def test_which_errors_are_tried_again():
    assert not is_final(RuntimeError("Connection closed by peer"))
    assert not is_final(ConnectionResetError("gone"))
    assert is_final(WorkError("20 images in a row")) and is_final(WrongClass("77"))
    assert is_final(torch.OutOfMemoryError("no")) and is_final(KeyError("a bug"))
