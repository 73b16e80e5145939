"""The end of a study: what MLflow has of its trials, and whose files go."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.cluster.track.test_track_train import training
from tests.cluster.tracking import runs
from zsplg_ray.cluster.track.study import StudyTracker
from zsplg_ray.cluster.track.train import Tracker
from zsplg_ray.cluster.trainrun import read_training, write_training
from zsplg_ray.cluster.tune.train import _forget_tune, _ray_tune, _settle
from zsplg_ray.cluster.tune.train_study import Study
from zsplg_ray.config import MlflowConfig
from zsplg_ray.rundir import RunFolder


def study_in(out: Path) -> Study:
    """A study with one trial, which has done one epoch and still runs, as far as is known."""
    folder, run = training(out / "trials" / "0000", epochs=1)
    write_training(folder, run | {"state": "running", "attempt": "first"})
    record: dict[str, Any] = {"id": "0123", "verb": "tune train", "state": "running"}
    record |= {"trials": [], "best": None, "seconds": 0.0, "mlflow": None, "config": {}, "data": {}}
    study = Study(RunFolder(str(out)), record)
    study.begin({"optim.lr": 0.1})
    return study


def test_a_trial_in_flight_ends_in_mlflow_too(mlflow_store, tmp_path):
    """As after Ctrl-C: nobody is left who could end its MLflow run."""
    config = MlflowConfig(uri=mlflow_store, experiment="in flight")
    study = study_in(tmp_path)
    tracker = StudyTracker(config, study.folder, study.record)
    tracker.start()
    parent = tracker.parent(60)
    trial = RunFolder(study.place(0))
    run = read_training(trial)
    assert run is not None
    Tracker(config, trial, tags={"mlflow.parentRunId": str(parent)}).sync(run)
    nested = f"tags.`mlflow.parentRunId` = '{parent}'"
    assert [r.info.status for r in runs(mlflow_store, "in flight", nested)] == ["RUNNING"]

    _settle(study, "interrupted", tracker)
    (ended,) = runs(mlflow_store, "in flight", nested)
    assert ended.info.status == "KILLED" and ended.info.run_name == "trial 0"
    record = json.loads((tmp_path / "tune.json").read_text())
    assert record["state"] == "interrupted" and record["mlflow"]["run_id"] == parent


def test_nothing_of_a_user_is_deleted(tmp_path):
    study: Any = SimpleNamespace(folder=RunFolder(str(tmp_path)), record={"id": "0123"})
    theirs = [tmp_path / name / "notes.txt" for name in ("tune", "_ray_tune", "_ray_tune_4567")]
    ours = tmp_path / _ray_tune(study) / "trial" / "params.json"
    for file in (*theirs, ours):
        file.parent.mkdir(parents=True)
        file.write_text("x")
    for _ in range(2):  # the second time there is nothing
        _forget_tune(study)
    assert all(file.exists() for file in theirs) and not (tmp_path / _ray_tune(study)).exists()
