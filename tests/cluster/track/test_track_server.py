"""Studies on a real `mlflow server`, in a process of its own."""

import multiprocessing
import time

import pytest

from tests.cluster.track.test_track_study import study, tell, trials_of
from tests.cluster.track.test_track_train import training
from tests.cluster.tracking import artefacts, server, track_trial
from zsplg_ray.cluster.track import study as track_study
from zsplg_ray.cluster.track.study import StudyTracker
from zsplg_ray.config import ModelMlflowConfig
from zsplg_ray.rundir import RunFolder


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with server(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.mark.slow
def test_four_processes_and_a_driver_log_into_one_study(served, tmp_path):
    uri, _ = served
    config = ModelMlflowConfig(uri=uri, experiment="server", register="served student")
    tracker = StudyTracker(config, RunFolder(str(tmp_path)), study(verb="tune train"))
    tracker.start()
    folders = {i: training(tmp_path / f"trials/{i}", epochs=3)[0] for i in range(4)}
    parent = tracker.parent(60)
    assert parent is not None
    apart = multiprocessing.get_context("forkserver")
    apart.set_forkserver_preload(["tests.cluster.tracking", "mlflow", "zsplg_ray.views.figures"])
    processes = [
        apart.Process(target=track_trial, args=(uri, parent, i, folder.path))
        for i, folder in folders.items()
    ]
    for process in processes:
        process.start()
    tell(tracker, *range(4, 24))
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    for i, folder in folders.items():
        tracker.adopt(i, folder)
    files = {"tuned.yaml": b"a: 1\n"}
    found = tracker.finish({"state": "complete"}, {"miou": 0.5}, files, best=folders[0])
    assert found == {"uri": uri, "run_id": parent}

    trials = trials_of(uri, "server", parent)
    assert sorted(trials) == list(range(24)) and all(len(t) == 1 for t in trials.values())
    assert all(run.info.status == "FINISHED" for (run,) in trials.values())
    for i in range(4):
        client = tracker.store.client
        history = client.get_metric_history(trials[i][0].info.run_id, "iou/circle")
        assert [(m.step, m.value) for m in history] == [
            (6 * epoch, pytest.approx(0.1 * epoch)) for epoch in (1, 2, 3)
        ]
    assert all(trials[i][0].data.metrics["miou"] == 0.1 * i for i in range(4, 24))
    assert "tuned.yaml" in artefacts(uri, parent)
    version = tracker.store.client.get_model_version_by_alias("served student", "champion")
    assert version.run_id == parent and version.status == "READY"


@pytest.mark.slow
def test_a_server_that_is_stopped_in_the_middle_stops_no_study(
    served, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(track_study, "GRACE_S", 3.0)
    uri, process = served
    config = ModelMlflowConfig(uri=uri, experiment="stopped")
    tracker = StudyTracker(config, RunFolder(str(tmp_path)), study())
    tracker.start()
    tell(tracker, *range(10))
    assert tracker.parent(60) is not None
    deadline = time.monotonic() + 60
    while len(tracker._runs) < 10:
        assert time.monotonic() < deadline
        tracker._done.wait(0.01)
    process.terminate()
    process.wait(30)
    began = time.monotonic()
    tell(tracker, *range(10, 30))
    found = tracker.finish({"state": "complete"}, {"miou": 0.5}, {})
    assert time.monotonic() - began < 60
    assert found is not None and found["run_id"] == tracker.parent(0)
    assert "has not got 20 of 30 trials, the study's end; tune.json holds all" in caplog.text
