"""Studies in MLflow: a parent, its trials, and servers that die, hang or come back."""

import json
import socket
import subprocess
import sys
import threading
import time
import uuid

import mlflow
import pandas as pd
import pytest

from tests.cluster.track.test_track_train import training
from tests.cluster.tracking import artefacts, runs, table
from zsplg_ray.cluster.track import study as track_study
from zsplg_ray.cluster.track.study import StudyTracker
from zsplg_ray.cluster.track.train import Tracker
from zsplg_ray.config import MlflowConfig, ModelMlflowConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.shapes.scenes import write_voc

BEGAN = 1.7e9


def study(**more) -> dict:
    settings = {"trials": 5, "compose.min_similarity": 0.2}
    return {"id": uuid.uuid4().hex, "verb": "tune labels", "config": settings, **more}


def tell(tracker: StudyTracker, *numbers: int, **more) -> None:
    for i in numbers:
        params = {"compose.min_similarity": 0.1 * i, "compose.order": "area"}
        metrics = {"miou": 0.1 * i, "coverage": 0.9}
        tracker.trial(
            i,
            params,
            metrics,
            **{"state": "complete", **more},
            began_s=BEGAN + i,
            ended_s=BEGAN + i + 2,
        )


def trials_of(uri: str, experiment: str, parent: str) -> dict[int, list]:
    """Number -> runs of that trial."""
    found: dict[int, list] = {}
    for run in runs(uri, experiment, f"tags.`mlflow.parentRunId` = '{parent}'"):
        found.setdefault(int(run.data.tags["zsplg_ray.trial"]), []).append(run)
    return found


def test_every_trial_is_nested_whole_and_once(mlflow_store, tmp_path):
    config = MlflowConfig(uri=mlflow_store, experiment="whole")
    told = study(tags={"zsplg_ray.labels": "0123"})
    folder = RunFolder(str(tmp_path / "my study"))
    first = StudyTracker(config, folder, told)
    first.start()
    tell(first, 0, 1, 2)
    tell(first, 3, state="failed")
    parent = first.parent(60)
    assert parent is not None
    sent = {"state": "interrupted"}
    assert first.finish(sent, {}, {}) == {"uri": mlflow_store, "run_id": parent}

    again = StudyTracker(config, folder, told)  # resumed: it tells some of them once more
    again.start()
    tell(again, 1, 2, 4)
    tell(again, 4, state="stopped")
    files = {"tuned.yaml": b"a: 1\n", "figures/iou.png": b"png"}
    columns = {"iou.json": {"class": ["a", "b"], "tuned": [0.5, None]}}
    sent = {"state": "complete", "tags": {"zsplg_ray.truth": "masks"}}
    found = again.finish(sent, {"miou": 0.7}, files, tables=columns)
    assert found == {"uri": mlflow_store, "run_id": parent}, "the same study, the same run"

    trials = trials_of(mlflow_store, "whole", parent)
    assert sorted(trials) == [0, 1, 2, 3, 4] and all(len(t) == 1 for t in trials.values())
    for i, (run,) in trials.items():
        assert run.info.run_name == f"trial {i}"
        assert run.data.params["compose.min_similarity"] == str(0.1 * i)
        assert run.data.metrics == {"miou": 0.1 * i, "coverage": 0.9, "seconds": 2.0}
        assert run.info.status == ("FAILED" if i == 3 else "FINISHED")
        assert run.info.end_time - run.info.start_time == 2000
        assert run.data.tags["zsplg_ray.study"] == told["id"]
    (run,) = [r for r in runs(mlflow_store, "whole") if r.info.run_id == parent]
    assert run.info.status == "FINISHED" and run.info.run_name == "my study tune labels"
    assert run.data.params["compose.min_similarity"] == "0.2"
    assert run.data.metrics["miou"] == 0.7
    links = {"zsplg_ray.labels": "0123", "zsplg_ray.truth": "masks", "zsplg_ray.state": "complete"}
    assert links.items() <= run.data.tags.items()
    assert artefacts(mlflow_store, parent) == {"tuned.yaml", "figures/iou.png", "iou.json"}
    assert table(mlflow_store, parent, "iou.json")["tuned"] == [0.5, None]


def test_trials_that_track_themselves_are_adopted(mlflow_store, tmp_path, monkeypatch):
    config = ModelMlflowConfig(uri=mlflow_store, experiment="adopted", register="tuned student")
    study_folder = RunFolder(str(tmp_path))
    tracker = StudyTracker(config, study_folder, study(verb="tune train"))
    tracker.start()
    parent = tracker.parent(60)
    assert parent is not None
    folders = {}
    for number, state in [(0, "complete"), (1, "stopped"), (2, "failed")]:
        folders[number], run = training(tmp_path / f"trials/{number}")
        run["state"] = state
        folders[number].write_bytes("train.json", json.dumps(run).encode())
        if number == 0:  # it was killed after its first epoch
            itself = Tracker(MlflowConfig(uri=mlflow_store, experiment="adopted"), folders[0])
            itself.sync({**run, "history": run["history"][:1]})
        tracker.adopt(number, folders[number])
    tracker.adopt(3, RunFolder(str(tmp_path / "never began")))
    best = folders[0].read_bytes("best.pt")
    assert best is not None
    study_folder.write_bytes("best.pt", best)
    assert tracker.finish({"state": "complete"}, {}, {}, best=study_folder)

    trials = trials_of(mlflow_store, "adopted", parent)
    assert sorted(trials) == [0, 1, 2] and all(len(t) == 1 for t in trials.values())
    for number, (run,) in trials.items():
        assert run.info.run_name == f"trial {number}"
        assert run.info.status == ("FAILED" if number == 2 else "FINISHED")
        history = tracker.store.client.get_metric_history(run.info.run_id, "val_miou")
        assert [metric.step for metric in history] == [6, 12]
    versions = tracker.store.client.search_model_versions("name = 'tuned student'")
    assert [version.run_id for version in versions] == [parent]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    model = mlflow.pyfunc.load_model("models:/tuned student@champion")
    write_voc(tmp_path / "world", 1, seed=3)
    image = next((tmp_path / "world").glob("JPEGImages/*")).read_bytes()
    assert model.predict(pd.DataFrame({"image": [image]})).iloc[0]["width"] == 128


def test_what_mlflow_refuses_does_not_stop_the_rest(mlflow_store, tmp_path, caplog):
    config = MlflowConfig(uri=mlflow_store, experiment="refused")
    tracker = StudyTracker(config, RunFolder(str(tmp_path)), study())
    tracker.start()
    parent = tracker.parent(60)
    tracker.trial(0, {"x" * 600: 1, "x" * 700: 2}, {}, "complete", BEGAN, BEGAN)  # one name, twice
    tell(tracker, 1, 2)
    tracker.finish({"state": "complete"}, {}, {})
    assert "has not got 1 of 3 trials; tune.json" in caplog.text
    trials = trials_of(mlflow_store, "refused", str(parent))
    assert trials[1][0].info.status == trials[2][0].info.status == "FINISHED"


def test_what_fails_at_the_end_leaves_the_rest_whole(mlflow_store, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(track_study, "SHORTEST_PAUSE_S", 0.01)
    config = ModelMlflowConfig(uri=mlflow_store, experiment="trouble")
    tracker = StudyTracker(config, RunFolder(str(tmp_path)), study())
    send_files = tracker.store.send_files

    def full(run_id, files):
        if "tuned.yaml" in files:
            raise PermissionError("no room for artefacts")
        send_files(run_id, files)

    monkeypatch.setattr(tracker.store, "send_files", full)
    tracker.start()
    parent = str(tracker.parent(60))
    tell(tracker, 0)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.json").write_text("{")
    tracker.adopt(1, RunFolder(str(tmp_path / "broken")))
    tracker.adopt(2, training(tmp_path / "whole")[0])
    tables = {"iou.json": {"class": ["a"], "iou": [0.5]}}
    files = {"tuned.yaml": b""}
    best = RunFolder(str(tmp_path / "no best.pt"))
    tracker.finish({"state": "complete"}, {"miou": 0.5}, files, tables=tables, best=best)
    run = tracker.store.client.get_run(parent)
    assert run.info.status == "FINISHED" and run.data.metrics["miou"] == 0.5
    assert artefacts(mlflow_store, parent) == {"iou.json"}
    trials = trials_of(mlflow_store, "trouble", parent)
    assert {n: [t.info.status for t in of] for n, of in trials.items()} == {
        0: ["FINISHED"],
        2: ["FINISHED"],
    }
    told = "the end of 1 trials that track themselves, its files, its model; tune.json"
    assert told in caplog.records[-1].message and len(caplog.records) == 2


def test_only_the_first_end_counts(mlflow_store, tmp_path, caplog):
    config = MlflowConfig(uri=mlflow_store, experiment="twice")
    tracker = StudyTracker(config, RunFolder(str(tmp_path)), study())
    tracker.start()
    found = tracker.finish({"state": "complete"}, {}, {})
    began = time.monotonic()
    assert found and tracker.finish({"state": "failed"}, {}, {}) == found
    assert time.monotonic() - began < 1 and not caplog.records
    assert runs(mlflow_store, "twice")[0].info.status == "FINISHED"


def test_no_tracking(tmp_path):
    tracker = StudyTracker(MlflowConfig(uri="off"), RunFolder(str(tmp_path)), study())
    tracker.start()
    tell(tracker, 0)
    tracker.adopt(1, RunFolder(str(tmp_path)))
    assert not tracker.on and tracker.uri is None and tracker.parent(60) is None
    assert tracker.finish({"state": "complete"}, {}, {}) is None
    assert not list(tmp_path.iterdir())


# Servers that are not there ----------------------------------------------------------------------


class Fake:
    """A store whose server can be away; what it is sent is kept."""

    on, remote = True, False
    shown = "http://***@fake"

    def __init__(self) -> None:
        self.up, self.got, self.client = True, [], self
        self.lose_answer = False

    def __call__(self, *_):
        if not self.up:
            raise ConnectionError("no http://me:word@fake/api")

    open = set_terminated = send_missing_params = send_files = end = __call__

    def answers(self, run_id):
        return self.up

    def find(self, tags, most=1):
        return []

    def begin(self, name, key, tags=None, began_s=None, look=True):
        self()
        number = key.get("zsplg_ray.trial")
        known = {run for run, _ in self.got}
        if number is None or (look and number in known):
            return number or "parent", False
        self.got.append((number, look))
        if self.lose_answer:
            self.lose_answer = False
            raise TimeoutError("no answer")
        return number, True

    def send(self, run_id, *_, **__):
        self()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A tracker and its fake store; pauses are short."""
    monkeypatch.setattr(track_study, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(track_study, "SHORTEST_PAUSE_S", 0.01)
    monkeypatch.setattr(track_study, "GRACE_S", 0.3)
    tracker = StudyTracker(MlflowConfig(uri="http://x"), RunFolder(str(tmp_path)), study())
    store = Fake()
    tracker.store = store  # type: ignore[assignment]
    return tracker, store


def wait_for(tracker: StudyTracker, what) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def test_what_a_server_missed_is_sent_once_it_is_back(fake, caplog):
    tracker, store = fake
    store.up = False
    tracker.start()
    tell(tracker, 0, 1)
    assert tracker.parent(0.05) is None
    wait_for(tracker, lambda: caplog.records)
    store.up = True
    assert tracker.parent(20) == "parent"
    wait_for(tracker, lambda: len(store.got) == 2)
    store.up = False
    tell(tracker, 2, 3)
    wait_for(tracker, lambda: tracker._failed)
    store.up = True
    assert tracker.finish({"state": "complete"}, {}, {}) is not None
    assert sorted(number for number, _ in store.got) == ["0", "1", "2", "3"]
    assert len(caplog.records) == 1 and "word" not in caplog.text


def test_an_answer_that_is_lost_makes_no_second_run(fake):
    tracker, store = fake
    tracker.start()
    store.lose_answer = True
    tell(tracker, 0)
    assert tracker.finish({"state": "complete"}, {}, {}) is not None
    assert [number for number, _ in store.got] == ["0"]


def test_a_trial_that_always_fails_keeps_no_other(fake, caplog, monkeypatch):
    tracker, store = fake
    sent = []

    def send(run_id, *_, **__):
        if run_id == "0":
            raise RuntimeError("somebody has deleted it")
        sent.append(run_id)

    monkeypatch.setattr(store, "send", send)
    tracker.start()
    tell(tracker, 0, 1, 2)
    tracker.finish({"state": "complete"}, {}, {"tuned.yaml": b""})
    assert set(sent) == {"parent", "1", "2"}
    assert "has not got 1 of 3 trials; tune.json" in caplog.records[-1].message


def test_the_end_waits_for_a_bounded_time_and_says_what_is_missing(fake, caplog, monkeypatch):
    tracker, store = fake
    monkeypatch.setattr(track_study, "MOST_WAITING", 3)
    tracker.start()
    assert tracker.parent(20)
    store.up = False
    tell(tracker, 0, 1, 2, 3)
    tracker.adopt(4, RunFolder("/nowhere"))
    wait_for(tracker, lambda: tracker._failed)
    began = time.monotonic()
    assert tracker.finish({"state": "complete"}, {}, {}) == {"uri": store.shown, "run_id": "parent"}
    assert time.monotonic() - began < 5
    text = caplog.records[-1].message
    assert (
        "has not got 4 of 4 trials, the end of 1 trials that track themselves, the study's" in text
    )
    assert len(caplog.records) == 2


def test_a_study_that_is_not_complete_does_not_wait_for_long(fake, monkeypatch):
    tracker, store = fake
    held, go_on = threading.Event(), threading.Event()

    def send(run_id, *_, **__):
        if run_id == "0":
            held.set()
            go_on.wait(60)

    monkeypatch.setattr(store, "send", send)
    tracker.start()
    tell(tracker, 0)
    assert held.wait(20)
    began = time.monotonic()
    assert tracker.finish({"state": "interrupted"}, {}, {}) is not None
    assert time.monotonic() - began < 10, "it is a matter of minutes if the study is complete"
    go_on.set()


def test_the_run_of_a_study_ends_before_what_is_left_is_sent(fake, monkeypatch):
    tracker, store = fake
    ended, seen = threading.Event(), []
    held, go_on = threading.Event(), threading.Event()

    def send(run_id, *_, **__):
        if run_id == "0":
            held.set()
            go_on.wait(60)
        if run_id == "1":
            seen.append(ended.is_set())

    monkeypatch.setattr(store, "send", send)
    monkeypatch.setattr(store, "end", lambda *_: ended.set())
    tracker.start()
    tell(tracker, 0)
    assert held.wait(20)
    tell(tracker, 1)
    finish = threading.Thread(target=tracker.finish, args=({"state": "complete"}, {}, {}))
    finish.start()
    wait_for(tracker, tracker._ending)
    go_on.set()
    finish.join(30)
    assert seen == [True]


HANGS = """
import sys, threading
from zsplg_ray.cluster.track import study
from zsplg_ray.config import MlflowConfig
from zsplg_ray.rundir import RunFolder

study.PATIENCE_S = study.GRACE_S = 0.2

class Hangs:
    on, shown, remote = True, "fake", False
    def open(self): pass
    send = send_missing_params = answers = lambda self, *_, **__: True
    def begin(self, name, *_, **__):
        if name.startswith("trial"):
            begun.set()
            threading.Event().wait()
        return "parent", True

for remote in (False, True):
    begun = threading.Event()
    told = {"id": "a", "verb": "tune labels", "config": {}}
    tracker = study.StudyTracker(MlflowConfig(uri="x"), RunFolder(sys.argv[1]), told)
    tracker.store = Hangs()
    tracker.store.remote = remote
    tracker.start()
    tracker.trial(0, {}, {}, "complete", 0.0, 1.0)
    assert begun.wait(20)
    assert tracker.finish({"state": "complete"}, {}, {}) is not None
print("at the end")
"""


def test_a_store_that_hangs_does_not_hold_the_process(tmp_path):
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "at the end\n", ended.stderr[-2000:]


def test_a_server_that_hangs_holds_nobody(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(track_study, "GRACE_S", 0.5)
    monkeypatch.setattr(track_study, "PATIENCE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, never answers
        config = MlflowConfig(uri=f"http://127.0.0.1:{server.getsockname()[1]}")
        tracker = StudyTracker(config, RunFolder(str(tmp_path)), study())
        tracker.start()
        began = time.monotonic()
        tell(tracker, *range(1000))
        assert time.monotonic() - began < 1
        assert tracker.finish({"state": "complete"}, {}, {}) is None
        assert time.monotonic() - began < 5
    assert "has not got 1000 of 1000 trials" in caplog.text
