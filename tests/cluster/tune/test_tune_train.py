"""`zsplg tune train`: Ray Tune over Ray Train. One study, killed in every way and gone on with."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from ray.util import placement_group_table

os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")

from tests.cluster.tuning import config
from zsplg_ray.cluster.trainrun import read_training, write_training
from zsplg_ray.cluster.tune.train import summary, tune_train
from zsplg_ray.config import TrainConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import WorkError, from_mapping
from zsplg_ray.shapes.scenes import write_voc
from zsplg_ray.student.checkpoint import load_student

EPOCHS, GRACE = 4, 3
STUDY = {
    "trials": 2,
    "train.epochs": EPOCHS,
    "asha.grace_epochs": GRACE,
    "asha.reduction": 2,
    "search.seed": 5,  # a second learning rate that is far too low
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """6 + 2 labelled scenes, 8 others: 4 steps an epoch."""
    folder = tmp_path_factory.mktemp("world")
    write_voc(folder / "labelled", 8, seed=0)
    write_voc(folder / "pool", 8, seed=500)
    return folder


def trial(out, number) -> dict:
    run = read_training(RunFolder(f"{out}/trials/{number:04}"))
    return run if run is not None else {"last": None, "history": []}


def wait_for(out, number, epoch, goes_on) -> None:
    """Until a trial has done that many epochs."""
    deadline = time.monotonic() + 240
    while (trial(out, number)["last"] or {"epoch": 0})["epoch"] < epoch:
        assert goes_on(), "it ended before its time"
        assert time.monotonic() < deadline, "the study does not get on"
        time.sleep(0.01)


def stamps(folder) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in Path(folder).rglob("*")}


def ray_processes(*names) -> list[int]:
    """Processes of this session's Ray that do such things."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            if title.startswith("ray::") and any(name in title for name in names):
                found += [int(folder.name)] if is_ours(int(folder.name)) else []
    return found


def is_ours(pid: int) -> bool:
    """Whether a process comes from this one."""
    while pid > 1 and pid != os.getpid():
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid == os.getpid()


def kill_trial(out, number, ended: threading.Event) -> None:
    """Kill the process of a trial in the middle of it."""
    wait_for(out, number, 1, lambda: not ended.is_set())
    (process,) = ray_processes("Trainable", "TrialRun")
    os.kill(process, signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_every_trial_is_trained_once(
    ray_local, world, tmp_path, caplog, capsys
):
    out = tmp_path / "study"
    changes = json.dumps({**STUDY, "ray.num_cpus": 2})
    command = [sys.executable, "-m", "tests.cluster.tuning", str(world), str(out), changes]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(out, 0, 1, lambda: driver.poll() is None)
    driver.kill()
    driver.wait()
    first = trial(out, 0)
    assert first["state"] == "running" and first["last"]["epoch"] < EPOCHS
    with pytest.raises(ValueError, match="add --resume"):
        tune_train(config(world, out, **STUDY))

    ended = threading.Event()
    killer = threading.Thread(target=kill_trial, args=(out, 1, ended))
    killer.start()
    try:
        alone = {"workers.cpus": 3.0}  # of 4: what a killed one keeps is missing
        study = tune_train(config(world, out, **STUDY, **alone, resume=True, quiet=False))
    finally:
        ended.set()
        killer.join()

    assert study["state"] == "complete" and study == json.loads((out / "tune.json").read_text())
    assert [t["number"] for t in study["trials"]] == [0, 1]
    assert [t["state"] for t in study["trials"]] == ["complete", "stopped"]
    kept = len(first["history"])
    assert trial(out, 0)["history"][:kept] == first["history"], "gone on with, not from scratch"
    assert "trial 1: its process ended" in caplog.text
    for number, (state, last) in enumerate([("complete", EPOCHS), ("stopped", GRACE)]):
        run = trial(out, number)
        assert run["state"] == state
        assert [entry["epoch"] for entry in run["history"]] == list(range(1, last + 1))
        assert run["config"]["optim.lr"] == study["trials"][number]["params"]["optim.lr"]
        assert load_student(f"{out}/trials/{number:04}").config.backbone == "test_resnet"
    told = capsys.readouterr().err
    assert told.count("trial 0 of 2 complete") == told.count("trial 1 of 2 stopped") == 1

    assert {g["state"] for g in placement_group_table().values()} <= {"REMOVED"}
    deadline = time.monotonic() + 30
    while left := ray_processes("RayTrainWorker", "TrainController"):  # the last may be ending
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert study["best"]["number"] == 0
    assert (out / "best.pt").read_bytes() == (out / "trials" / "0000" / "best.pt").read_bytes()
    assert load_student(str(out)).config.backbone == "test_resnet"
    recipe = yaml.safe_load((out / "tuned.yaml").read_text())
    again = from_mapping(TrainConfig, {"labeled": "few", "out": "model", **recipe})
    assert again.optim.lr == 0.02 and again.augment.crop_px == 64
    assert "1 complete, 1 stopped early" in summary(study)
    assert not list(out.glob("_*")), "nothing of Ray Tune's is left"

    before = stamps(out)
    assert tune_train(config(world, out, **STUDY, resume=True)) == study
    assert stamps(out) == before, "a finished study is left alone"


def finish_trial(out, number, study) -> None:
    """A trial's folder as a training leaves it that is through; `study`: content of tune.json."""
    step = study["schedule"]["steps"]
    entry = {"epoch": 1, "step": step, "val_miou": 0.5, "loss": 1.0, "time": time.time()}
    run = {**study, "state": "complete", "attempt": "first", "history": [entry], "best": entry}
    run["last"] = {**entry, "checkpoint": f"first/step-{step}"}
    folder = RunFolder(f"{out}/trials/{number:04}")
    write_training(folder, run)
    folder.write_bytes("best.pt", b"a model")


@pytest.mark.ray
def test_a_study_fails_only_if_all_trials_do_and_they_are_tried_again(ray_local, world, tmp_path):
    """What a trial failed of is put down; once that is mended, the same study goes on."""
    out = tmp_path / "study"
    (out / "tune").mkdir(parents=True)
    (out / "tune" / "notes.txt").write_text("a user's own")
    wrong = [out / "trials" / f"{number:04}" / "run.json" for number in (0, 1)]
    for file in wrong:
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    failed = r"every trial failed, the last with: out must be .* \(--resume tries them again\)"
    with pytest.raises(WorkError, match=failed):
        tune_train(config(world, out, **{"trials": 1, "train.epochs": 1}))
    study = json.loads((out / "tune.json").read_text())
    assert study["state"] == "failed" and study["best"] is None
    (failure,) = study["trials"]
    assert failure["state"] == "failed" and "without other runs, got" in failure["error"]

    wrong[0].unlink()
    finish_trial(out, 0, study)
    mended = tune_train(config(world, out, **{"trials": 2, "train.epochs": 1}, resume=True))
    trial_0, trial_1 = mended["trials"]
    assert trial_1["state"] == "failed"
    assert mended["state"] == "complete" and mended["id"] == study["id"]
    assert (trial_0["state"], trial_0["epochs"], trial_0["error"]) == ("complete", 1, None)
    assert trial_0["params"] == failure["params"] and mended["best"]["number"] == 0
    assert (out / "best.pt").read_bytes() == b"a model"
    assert (out / "tune" / "notes.txt").read_text() == "a user's own"
    assert not list(out.glob("_*")), "nothing of Ray Tune's is left"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train.holdout": 0.0}, "train.holdout must be over 0 where there is no --val"),
        ({"asha.grace_epochs": 9, "train.epochs": 8}, "asha.grace_epochs must be <= train.epochs"),
        ({"search.over": ["optim.rl"]}, "search.over must be settings that can be searched"),
        ({"search.method": "grid", "trials": 1}, "trials must be enough for two levels"),
        ({"labeled": "/no/such"}, "labeled must be something that exists, got /no/such; "),
        ({"student.init": "/no/such.pt"}, "student.init must be"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(world, tmp_path, changes, told):
    with pytest.raises(ValueError, match=told) as caught:
        tune_train(config(world, tmp_path / "study", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "study").exists()
