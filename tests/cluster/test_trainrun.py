"""A training run's folder: what it records, whom it refuses, what a kill may leave."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.training import config
from zsplg_ray.cluster.training import Training
from zsplg_ray.cluster.trainrun import (
    NOT_IN_WEIGHTS,
    check_attempt,
    commit,
    describe_training,
    identify,
    images_per_s,
    is_finished,
    note_failure,
    put_models,
    read_training,
    refuse_other_training,
    start_of,
    sweep,
    weight_settings,
    write_training,
)
from zsplg_ray.cluster.watch import Watcher
from zsplg_ray.config import TrainConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import WorkError, flatten
from zsplg_ray.vocab import class_list

SCHEDULE = {"steps_per_epoch": 5, "epochs": 4, "steps": 20, "images_per_step": 4}


def describe(out, data=None, init=None, classes="shapes", **changes) -> dict:
    data = data or {"labelled": identify(["a", "b"]), "unlabelled": identify("cde", zeroshot=None)}
    settings = config("world", out, **changes)
    return describe_training(settings, class_list(classes), data, SCHEDULE, {"init": init})


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """A run at its start, attempt "one"."""
    folder = RunFolder(str(tmp_path / "run"))
    write_training(folder, {**describe(folder.uri), "attempt": "one"})
    return folder


def report(folder: RunFolder, epoch: int, miou: float, best: int, attempt="one") -> dict:
    """A checkpoint as Ray has stored it, committed."""
    name = f"step-{5 * epoch:08d}"
    path = Path(folder.path, "checkpoints", attempt, name)
    path.mkdir(parents=True)
    (path / "student.pt").write_text(f"model of {epoch}")
    (path / "state.pt").write_text(f"state of {epoch}")
    entry = {"epoch": epoch, "step": 5 * epoch, "val_miou": miou, "images_per_s": 10.0}
    entry |= {"loss": 1.0, "time": 100.0 + epoch}
    told = {"entry": entry, "best": {"epoch": best, "step": 5 * best, "val_miou": miou}}
    return commit(folder, attempt, told, name)


def models(folder: RunFolder) -> dict[str, str]:
    return {path.stem: path.read_text() for path in Path(folder.path).glob("*.pt")}


def test_a_report_becomes_the_record_and_the_models(folder):
    run = report(folder, 1, 0.2, best=1)
    assert run == read_training(folder)
    assert models(folder) == {"best": "model of 1", "last": "model of 1"}
    report(folder, 2, 0.1, best=1)
    run = report(folder, 3, 0.3, best=3)
    assert [entry["epoch"] for entry in run["history"]] == [1, 2, 3]
    checkpoint = "one/step-00000015"
    assert run["last"] == {"epoch": 3, "step": 15, "val_miou": 0.3, "checkpoint": checkpoint}
    assert models(folder) == {"best": "model of 3", "last": "model of 3"}
    run = report(folder, 4, 0.25, best=3)
    assert models(folder) == {"best": "model of 3", "last": "model of 4"}
    assert is_finished(run) and not is_finished({**run, "last": None})
    assert images_per_s(run) == pytest.approx(10.0) and images_per_s(describe("x")) is None


def test_a_kill_between_the_record_and_the_models_is_mended(folder, monkeypatch):
    report(folder, 1, 0.2, best=1)
    with monkeypatch.context() as patch:
        patch.setattr("zsplg_ray.cluster.trainrun.put_models", lambda *_: None)
        run = report(folder, 2, 0.3, best=2)
    assert models(folder) == {"best": "model of 1", "last": "model of 1"}
    Path(folder.path, "_best.pt." + "0" * 32).write_text("torn")
    Path(folder.path, "_mine").write_text("not ours")
    sweep(folder)
    put_models(folder, run)
    assert models(folder) == {"best": "model of 2", "last": "model of 2"}
    left = {path.name for path in Path(folder.path).glob("_*")}
    assert left == {"_mine"}


def test_work_that_is_done_again_stands_once(folder):
    report(folder, 1, 0.2, best=1)
    report(folder, 2, 0.3, best=2)
    write_training(folder, {**read_training(folder), "attempt": "two"})  # type: ignore[dict-item]
    run = report(folder, 2, 0.3, best=2, attempt="two")
    assert [entry["step"] for entry in run["history"]] == [5, 10]
    kept = {path.name for path in Path(folder.path, "checkpoints").iterdir()}
    assert kept == {"two"}, "of earlier attempts nothing is needed any more"


def test_failures_are_noted_and_told(folder, caplog):
    report(folder, 1, 0.2, best=1)
    note_failure(folder, "one", 1, "ActorDiedError: gone")
    note_failure(folder, "another", 0, "not ours")
    run = read_training(folder)
    assert run is not None and len(run["failures"]) == 1
    assert run["failures"][0] | {"time": 0} == {"worker": 1, "error": "ActorDiedError: gone"} | {
        "epoch": 1,
        "time": 0,
    }
    watcher = Watcher(folder, Tracker(), Training(show=False))  # type: ignore[arg-type]
    watcher.start({**run, "failures": [], "workers": {"num": 1}})
    assert watcher.stop()
    assert "worker 1 died (ActorDiedError: gone): going on after epoch 1" in caplog.text


def test_workers_of_a_dead_driver_are_refused(folder):
    before = report(folder, 1, 0.2, best=1)
    write_training(folder, {**before, "attempt": "heir"})
    with pytest.raises(WorkError, match="another run has gone on in"):
        report(folder, 2, 0.9, best=2)
    assert read_training(folder) == {**before, "attempt": "heir"}
    assert models(folder)["best"] == "model of 1"


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path):
    with pytest.raises(ValueError, match="out must be a folder that every worker sees"):
        check_attempt(RunFolder(str(tmp_path)), "one")


def test_a_run_starts_where_its_last_checkpoint_is(folder):
    assert start_of(folder, describe("x")) is None
    run = report(folder, 1, 0.2, best=1)
    assert start_of(folder, run) == "one/step-00000005"
    shutil.rmtree(Path(folder.path, "checkpoints"))
    with pytest.raises(ValueError, match="out must be a folder with its last checkpoint, got"):
        start_of(folder, run)


# Who may go on -----------------------------------------------------------------------------------


def test_the_same_run_may_go_on_wherever_its_data_and_workers_are_now(folder):
    other = {"labeled": "/moved", "workers.num": 2, "train.loader_workers": 3, "mlflow.uri": None}
    old = refuse_other_training(folder, describe(folder.uri, **other))
    assert old is not None and old["attempt"] == "one"
    assert refuse_other_training(RunFolder("/no/such"), describe("x")) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optim.lr": 0.5}, r"optim.lr must be 0.001 as in .*, got 0.5; give the same value, or"),
        ({"train.epochs": 5}, "train.epochs must be 80 as in"),
        ({"fusion.rule": "agree"}, "fusion.rule must be model_else_zeroshot as in"),
        ({"classes": "cat,dog"}, "classes must be .*circle.* as in .*, got .*dog"),
        ({"init": "ab12"}, "weights of init must be None as in .*, got ab12"),
        (
            {"data": {"labelled": identify("ab"), "unlabelled": identify("cdef", zeroshot=None)}},
            "number of unlabelled images must be 3 as in .*, got 4",
        ),
        (
            {"data": {"labelled": identify("ax"), "unlabelled": identify("cde", zeroshot=None)}},
            "ids of labelled images must be",
        ),
        (
            {"data": {"labelled": identify("ab"), "unlabelled": identify("cde", zeroshot="12")}},
            "zeroshot of unlabelled images must be None as in .*, got 12",
        ),
    ],
)
def test_what_the_weights_depend_on_must_be_the_same(folder, changes, told):
    with pytest.raises(ValueError, match=told) as caught:
        refuse_other_training(folder, describe(folder.uri, **changes))
    assert "\n" not in str(caught.value)


def test_every_setting_is_either_compared_or_known_not_to_matter():
    settings = set(flatten(TrainConfig(labeled="a", out="b")))
    compared = set(weight_settings(describe("x")))
    rest = settings - compared - NOT_IN_WEIGHTS
    assert settings >= NOT_IN_WEIGHTS
    names = {"labeled", "labeled_masks", "unlabeled", "zeroshot", "val", "val_masks", "out"}
    names |= {"classes", "root", "device", "quiet", "json"}
    assert {name for name in rest if "." not in name} == names
    assert {name.split(".")[0] for name in rest - names} == {"workers", "mlflow", "ray"}


def test_the_fingerprint_follows_what_the_weights_depend_on():
    changes: list[dict[str, Any]] = [{"workers.num": 3}, {"optim.lr": 0.5}]
    same, other = (describe("x", **change) for change in changes)
    assert describe("x")["fingerprint"] == same["fingerprint"] != other["fingerprint"]


@pytest.mark.parametrize("text", ["{", "[]", '{"state": "running"}'])
def test_a_file_that_no_run_has_written_is_refused(folder, text):
    Path(folder.path, "train.json").write_text(text)
    with pytest.raises(ValueError, match=r"train.json must be"):
        refuse_other_training(folder, describe(folder.uri))


def test_folders_of_other_runs_are_refused(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="out must be a folder without other runs"):
        refuse_other_training(RunFolder(str(tmp_path)), describe("x"))
    with pytest.raises(ValueError, match="out must be a folder, got"):
        refuse_other_training(RunFolder(str(tmp_path / "run.json")), describe("x"))


# What a person sees ------------------------------------------------------------------------------


class Tracker:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def sync(self, run: dict) -> None:
        self.told.append(len(run["history"]))


def test_the_watcher_tells_what_is_new(folder, capsys):
    tracker, progress = Tracker(), Training(show=True)
    before = report(folder, 1, 0.2, best=1) | {"workers": {"num": 1}}
    with progress:
        watcher = Watcher(folder, tracker, progress)  # type: ignore[arg-type]
        watcher.start(before)
        report(folder, 2, 0.3, best=2)
        assert watcher.stop(), "it has come to its end"
    out, err = capsys.readouterr()
    assert out == "" and tracker.told[-1] == 2
    (told,) = err.splitlines()
    assert told.startswith("train: 10/20 steps, epoch 2/4, loss 1.0000, val mIoU 0.3000 (the best)")


def test_a_watcher_that_was_never_started_can_be_stopped(folder):
    assert Watcher(folder, Tracker(), Training()).stop()  # type: ignore[arg-type]
