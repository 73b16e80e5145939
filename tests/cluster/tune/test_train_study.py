"""A study's folder, and what Ray Tune is given; no Ray runs here."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from zsplg_ray.cluster.nodes import Cluster
from zsplg_ray.cluster.trainrun import describe_training
from zsplg_ray.cluster.tune.train import base_config, plan_room
from zsplg_ray.cluster.tune.train_report import summary, trial_line, tuned_header, tuned_values
from zsplg_ray.cluster.tune.train_search import Halving, Searching, scheduler
from zsplg_ray.cluster.tune.train_space import search_space
from zsplg_ray.cluster.tune.train_study import End, Study, describe_study, refuse_other_study
from zsplg_ray.cluster.tune.trial import trial_config
from zsplg_ray.cluster.tune.tuned import tuned_text
from zsplg_ray.config import AshaConfig, TrainConfig, TuneTrainConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import from_mapping
from zsplg_ray.vocab import class_list

EPOCHS = 9
SHAPES = class_list("shapes")


def config(**changes) -> TuneTrainConfig:
    given = {"labeled": "few.txt", "unlabeled": "pool", "out": "study", "trials": 4}
    return from_mapping(TuneTrainConfig, {**given, "train.epochs": EPOCHS, **changes})


def described(asked, images=6) -> dict:
    data = {"labelled": {"images": images, "ids": "x"}, "validation": {"images": 2, "ids": "y"}}
    schedule = {"steps_per_epoch": 2, "epochs": EPOCHS, "steps": 2 * EPOCHS, "images_per_step": 4}
    return describe_training(asked, SHAPES, data, schedule, {"init": None})


def new_study(out, asked) -> Study:
    study = Study(RunFolder(str(out)), describe_study(asked, described(asked)))
    study.write()
    return study


def trained(out, number, mious, state, at=0.0) -> None:
    """The folder of a trial whose validations had these mIoUs, one a second from `at`."""
    folder = Path(out, "trials", f"{number:04}")
    folder.mkdir(parents=True, exist_ok=True)
    history = [
        {"epoch": e, "step": 2 * e, "time": at + e, "val_miou": m, "loss": 1.0}
        for e, m in enumerate(mious, 1)
    ]
    best = max(history, key=lambda e: e["val_miou"], default=None)
    run = {"state": state, "attempt": "first", "config": {}, "data": {}, "schedule": {}}
    run |= {"history": history, "best": best, "last": history[-1] if history else None}
    (folder / "train.json").write_text(json.dumps({**run, "seconds": 10.0}))
    (folder / "best.pt").write_bytes(b"model %d" % number)


# The record --------------------------------------------------------------------------------------


def test_a_study_that_was_killed_is_read_again_as_it_was(tmp_path):
    asked = config()
    study = new_study(tmp_path, asked)
    for lr in (0.1, 0.2, 0.3, 0.4):
        study.begin({"optim.lr": lr})
    trained(tmp_path, 0, [0.2, 0.5, 0.4], "complete")
    trained(tmp_path, 1, [0.1], "running")  # killed before its process heard that it is to stop
    trained(tmp_path, 2, [0.3, 0.9], "failed")
    trained(tmp_path, 3, [0.3, 0.4], "running")
    assert study.end(0, "complete") and not study.end(1, "stopped")
    assert not study.end(2, "failed", "no memory"), "what failed is not the best"
    again = Study(study.folder, json.loads((tmp_path / "tune.json").read_text()))
    assert again.trials[:3] == study.trials[:3] and again.record["best"] == study.record["best"]
    assert again.curves == study.curves | {3: [(1, 1, 0.3), (2, 2, 0.4)]}
    assert [t.state for t in again.told()] == ["complete", "stopped", "failed", "running"]
    assert again.told()[3].curve == ((1, 0.3), (2, 0.4)) and again.told()[0].best == 0.5

    again.settle("interrupted")
    states = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("trials/*/train.json"))]
    assert [run["state"] for run in states] == ["complete", "stopped", "failed", "interrupted"]
    assert [run["attempt"] == "first" for run in states] == [True, False, True, False]
    record = json.loads((tmp_path / "tune.json").read_text())
    assert record["state"] == "interrupted" and record["best"]["number"] == 0
    assert record["best"]["val_miou"] == 0.5 and record["best"]["best_epoch"] == 2
    assert (tmp_path / "best.pt").read_bytes() == b"model 0"
    assert [t["epochs"] for t in record["trials"]] == [3, 1, 2, 2]
    assert record["trials"][2]["error"] == "no memory"


def test_trials_that_failed_are_tried_again(tmp_path):
    asked = config()
    study = new_study(tmp_path, asked)
    for number, state in enumerate(("complete", "failed", "failed", "stopped")):
        study.begin({"optim.lr": 0.1 + number})
        trained(tmp_path, number, [0.5], state)
        study.end(number, state, "no room" if state == "failed" else None)
    again = Study(study.folder, json.loads((tmp_path / "tune.json").read_text()))
    again.try_again()
    searcher = Searching(again, asked, search_space(asked), at_once=4)
    assert [searcher.suggest(name)["number"] for name in "ab"] == [1, 2]
    assert searcher.suggest("c") == Searcher.FINISHED
    assert [t["state"] for t in again.trials] == ["complete", "running", "running", "stopped"]
    assert again.trials[1]["error"] is None


def test_a_better_trial_takes_the_place_of_the_best(tmp_path):
    study = new_study(tmp_path, config())
    for number, miou in enumerate([0.5, 0.5, 0.6]):
        study.begin({"optim.lr": 0.1})
        trained(tmp_path, number, [miou], "stopped" if number == 2 else "complete")
        new = study.end(number, "stopped" if number == 2 else "complete")
        assert new == (number != 1)
    assert (tmp_path / "best.pt").read_bytes() == b"model 2"


def test_who_may_go_on_with_a_study(tmp_path):
    asked = config(**{"search.method": "random"})
    new_study(tmp_path, asked).begin({"optim.lr": 0.1})
    folder = RunFolder(str(tmp_path))

    def refused(images=6, **changes):
        now = config(**{"search.method": "random", "resume": True, **changes})
        return refuse_other_study(folder, described(now, images), now)

    found = refused(trials=9, quiet=True, **{"search.concurrent": 2, "workers.num": 2})
    assert found is not None and len(found["trials"]) == 1, "trials may grow"
    for told, changes in [
        ("out must be a folder without a study, got .*; add --resume", {"resume": False}),
        ("optim.lr must be 0.001 as in", {"optim.lr": 0.1}),
        ("search.method must be random as in", {"search.method": "tpe"}),
        ("search.over must be None as in", {"search.over": ["optim.lr"]}),
        ("asha.reduction must be 3 as in", {"asha.reduction": 2}),
        ("train.validate_epochs must be 1 as in", {"train.validate_epochs": 3}),
        ("number of labelled images must be 6 as in", {"images": 7}),
    ]:
        with pytest.raises(ValueError, match=told) as caught:
            refused(**changes)
        assert "\n" not in str(caught.value)
    study = Study(folder, found)
    study.begin({"optim.lr": 0.2})
    with pytest.raises(ValueError, match="trials must be >= 2"):
        refused(trials=1)
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(ValueError, match="out must be a folder without other runs"):
        refused()


def test_a_grid_does_not_grow(tmp_path):
    asked = config(**{"search.method": "grid", "resume": True})
    new_study(tmp_path, asked)
    larger = config(**{"search.method": "grid", "resume": True, "trials": 9})
    folder = RunFolder(str(tmp_path))
    assert refuse_other_study(folder, described(asked), asked) is not None
    with pytest.raises(ValueError, match="trials must be 4 as in"):
        refuse_other_study(folder, described(larger), larger)


# What Ray Tune is given --------------------------------------------------------------------------


def test_interrupted_trials_come_first_then_new_ones_each_once(tmp_path):
    asked = config()
    study = new_study(tmp_path, asked)
    for number, state in enumerate(("complete", "running")):
        study.begin({"optim.lr": 0.001, "unimatch.conf_thresh": 0.9 + number / 100})
        if state == "complete":
            trained(tmp_path, number, [0.5], state)
            study.end(number, "complete")
    searcher = Searching(study, asked, search_space(asked), at_once=2)
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert first == {"number": 1, "params": study.trials[1]["params"]}
    assert second["number"] == 2 and searcher.suggest("c") is None, "no room"
    on_disk = json.loads((tmp_path / "tune.json").read_text())["trials"]
    assert on_disk[2]["params"] == second["params"], "put down before it is handed out"
    searcher.on_trial_complete("a")
    assert searcher.suggest("c")["number"] == 3
    searcher.on_trial_complete("b")
    assert searcher.suggest("d") == Searcher.FINISHED
    assert len(study.trials) == 4


def tune_trial(number) -> Any:
    return SimpleNamespace(trial_id=f"of-ray-{number}", config={"number": number})


def test_asha_after_a_restart_decides_as_if_there_had_been_none(tmp_path):
    asked = config(**{"asha.grace_epochs": 1})
    curves = {0: [0.5, 0.5, 0.6], 1: [0.3], 2: [0.7, 0.7], 3: [0.2]}
    study = new_study(tmp_path, asked)
    for number, mious in curves.items():
        study.begin({"optim.lr": 0.1})
        trained(tmp_path, number, mious, "running", at=10.0 * number)
    study = Study(study.folder, study.record)
    asha = scheduler(asked.asha, EPOCHS)
    assert isinstance(asha, Halving)
    assert asha.replay(study) == [1, 3], "they were to stop, which nobody has put down"

    live: Any = scheduler(asked.asha, EPOCHS)
    for number, mious in curves.items():
        live.on_trial_add(None, tune_trial(number))
        for epoch, miou in enumerate(mious, 1):
            result = {"epoch": epoch, "val_miou": miou}
            live.on_trial_result(None, tune_trial(number), result)
    for number, epoch, miou, decision in [
        (2, 3, 0.61, "CONTINUE"),
        (2, 4, 0.1, "CONTINUE"),  # no milestone
        (4, 1, 0.4, "STOP"),
        (5, 1, 0.9, "CONTINUE"),
        (5, 3, 0.5, "STOP"),
    ]:
        for either in (live, asha):
            either.on_trial_add(None, tune_trial(number))
            result = {"epoch": epoch, "val_miou": miou}
            assert either.on_trial_result(None, tune_trial(number), result) == decision


def milestones(asha, epochs) -> list[int]:
    """The epochs at which a trial that has become worse than another one is stopped."""
    return [epoch for epoch in range(1, epochs) if is_stopped(scheduler(asha, epochs), epoch)]


def is_stopped(halving: Any, worse_at: int) -> bool:
    for number in (0, 1):
        halving.on_trial_add(None, tune_trial(number))
    decision = ""
    for epoch in range(1, worse_at + 1):
        good, bad = ({"epoch": epoch, "val_miou": miou} for miou in (0.9, 0.1))
        assert halving.on_trial_result(None, tune_trial(0), good) == "CONTINUE"
        decision = halving.on_trial_result(None, tune_trial(1), bad if epoch == worse_at else good)
    return decision == "STOP"


def test_asha_has_its_grace():
    assert isinstance(scheduler(AshaConfig(off=True), 9), FIFOScheduler)
    assert milestones(AshaConfig(), 81) == [9, 27]
    assert milestones(AshaConfig(), 5) == [1, 3]
    assert milestones(AshaConfig(grace_epochs=2, reduction=2), 10) == [2, 4, 8]
    with pytest.raises(ValueError, match=r"asha.grace_epochs must be <= train.epochs \(5\), got 6"):
        scheduler(AshaConfig(grace_epochs=6), 5)


CPU8, CPU2, GPUS = {"CPU": 8.0}, {"CPU": 2.0}, {"CPU": 32.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "changes", "at_once", "num", "cpus", "gpus"),
    [
        ([CPU2], {}, 1, 1, 2.0, 0.0),
        ([CPU2], {"search.concurrent": 4}, 4, 1, 0.5, 0.0),
        ([CPU8], {"search.concurrent": 4}, 4, 1, 2.0, 0.0),
        ([CPU8], {"workers.cpus": 3.0}, 2, 1, 3.0, 0.0),
        ([CPU8], {"workers.cpus": 2.0, "workers.num": 2}, 2, 2, 2.0, 0.0),
        ([CPU8], {"search.concurrent": 9}, 4, 1, 2.0, 0.0),  # there are four trials
        ([GPUS], {}, 4, 1, 8.0, 1.0),
        ([GPUS], {"workers.num": 2}, 2, 2, 8.0, 1.0),
        ([GPUS], {"workers.gpus": 0.5, "trials": 20}, 8, 1, 4.0, 0.5),
        ([GPUS, CPU8], {"search.concurrent": 1}, 1, 1, 8.0, 1.0),
    ],
)
def test_as_many_trials_at_once_as_there_is_room_for(nodes, changes, at_once, num, cpus, gpus):
    crew, found = plan_room(config(**changes), Cluster(tuple(nodes)))
    assert (found, crew.num, crew.cpus, crew.gpus) == (at_once, num, cpus, gpus)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"workers.num": 9, "workers.cpus": 1.0}, "workers.cpus must be within the 8 CPUs"),
        ({"workers.cpus": 3.0, "search.concurrent": 3}, "search.concurrent must be as many trials"),
        ({"workers.gpus": 1.0}, "workers.gpus must be within the 0 GPUs"),
    ],
)
def test_trials_that_find_no_room_are_refused(changes, told):
    with pytest.raises(ValueError, match=told) as caught:
        plan_room(config(**changes), Cluster((CPU8,)))
    assert "\n" not in str(caught.value)


def test_a_trial_runs_anywhere_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("cat\n")
    base = base_config(config(classes="names.txt", **{"student.init": "s3://bucket/a.pt"}))
    one = trial_config(base, 7, {"optim.lr": 0.5})
    assert one.labeled == f"{tmp_path}/few.txt" and one.unlabeled == f"{tmp_path}/pool"
    assert one.out == f"{tmp_path}/study/trials/0007" and one.optim.lr == 0.5
    assert one.classes == f"{tmp_path}/names.txt" and one.student.init == "s3://bucket/a.pt"
    remote = base_config(config(out="s3://bucket/study?region=x", classes="voc"))
    assert trial_config(remote, 0, {}).out == "s3://bucket/study/trials/0000?region=x"
    assert remote.classes == "voc"


# For people --------------------------------------------------------------------------------------


def test_what_is_told_of_a_study(tmp_path):
    asked = config(**{"augment.crop_px": 96, "student.init": "shapes"})
    study = new_study(tmp_path, asked)
    ends: list[tuple[float, End]] = [(0.25, "complete"), (0.75, "complete"), (0.5, "stopped")]
    for number, (miou, state) in enumerate(ends):
        study.begin({"optim.lr": 0.1 + number, "unimatch.conf_thresh": 0.9})
        trained(tmp_path, number, [miou], state)
        study.end(number, state)
    study.begin({"optim.lr": 9.0})
    study.end(3, "failed", "no memory")
    study.settle("complete")
    told = summary(study.record).splitlines()
    assert [row.split()[0] for row in told[1:4]] == ["1", "2", "0"]
    assert "0.7500" in told[1] and "lr 1.1" in told[1] and "stopped" in told[2]
    assert "4 trials" in told[4] and "2 complete, 1 stopped early, 1 failed" in told[4]
    assert "0.2500 with the settings given (trial 0), 0.7500 with those of trial 1" in told[5]
    assert "rests on 2 images" in told[6]
    assert "judge on others" in told[6] and "settings  study/tuned.yaml" in told[8]
    assert told[-1].startswith("  train  zsplg train --config study/tuned.yaml --labeled ")
    assert told[-1].endswith("--out MODEL")
    record = study.record["config"]
    assert trial_line(study.trials[2], 61, True, record) == (
        "trial 2 of 4 stopped: val mIoU 0.5000 (best), 1 of 9 epochs, 1 min 01 s; "
        "lr 2.1, conf_thresh 0.9"
    )
    assert "failed: no memory" in trial_line(study.trials[3], 61, False, record)

    study.record["config"]["out"] = "s3://a/b c?endpoint_override=x:1&scheme=http"
    *_, model, settings, _, judge, train = summary(study.record).splitlines()
    assert model.split() == ["model", "s3://a/b%20c/best.pt?endpoint_override=x:1&scheme=http"]
    file = "s3://a/b%20c/tuned.yaml?endpoint_override=x:1&scheme=http"
    assert settings.split() == ["settings", file] and f"train --config '{file}'" in train
    assert "zsplg evaluate 's3://a/b%20c/best.pt?" in judge
    study.record["config"]["out"] = "my study/"
    assert "zsplg evaluate 'my study/best.pt' --truth" in summary(study.record)

    text = tuned_text(tuned_values(study.record), tuned_header(study.record))
    assert "0.2500 with the settings given, 0.7500 with these, on the 2 images" in text
    sources = {"labeled": "few.txt", "unlabeled": "pool", "out": "model"}
    assert from_mapping(TrainConfig, {**sources, **yaml.safe_load(text)}) == from_mapping(
        TrainConfig,
        {
            **sources,
            "train.epochs": EPOCHS,
            "augment.crop_px": 96,
            "student.init": "shapes",
            "optim.lr": 1.1,
            "unimatch.conf_thresh": 0.9,
        },
    )
