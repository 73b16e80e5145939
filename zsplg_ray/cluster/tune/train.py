"""`zsplg tune train` on Ray Tune over Ray Train: training settings tried out, the best one kept.

What enters: a `TuneTrainConfig`. What leaves: a study's folder (train_study.py), tuned.yaml in it,
and what its tune.json says.

    driver: Ray Tune asks for trials (train_search.py), ASHA stops those that are behind
      trial x at once: a `zsplg train` each (trial.py), with workers of its own

A trial has one worker unless `workers.num` says otherwise, and as many run at once as the cluster
has GPUs for; without GPUs one after the other, each with all CPUs, unless `search.concurrent` or
`workers.cpus` says otherwise. The trials judge by the images that choose the best epoch too, so the
best of many is better on them than it would be elsewhere: what it is worth only other images tell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.error import TuneError

from zsplg_ray.cluster.crew import Crew, check_batches, plan_crew
from zsplg_ray.cluster.lock import only_run
from zsplg_ray.cluster.nodes import Cluster, look_around
from zsplg_ray.cluster.progress import Progress
from zsplg_ray.cluster.session import cluster_address, last_line, ray_session
from zsplg_ray.cluster.track.store import OFF, PREFIX
from zsplg_ray.cluster.track.study import StudyTracker
from zsplg_ray.cluster.train import anywhere, check_model, describe
from zsplg_ray.cluster.tune.quiet import quiet_tune
from zsplg_ray.cluster.tune.train_report import study_metrics, summary, tuned_header, tuned_values
from zsplg_ray.cluster.tune.train_search import Ears, Halving, Searching, scheduler
from zsplg_ray.cluster.tune.train_space import Dim, search_space
from zsplg_ray.cluster.tune.train_study import FILE, Study, describe_study, refuse_other_study
from zsplg_ray.cluster.tune.trial import Gate, TrialRun
from zsplg_ray.cluster.tune.tuned import NAME, write_tuned
from zsplg_ray.config import TrainConfig, TuneTrainConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.runinfo import recorded
from zsplg_ray.settings import WorkError, complain, override
from zsplg_ray.shapes.recipe import with_weights
from zsplg_ray.storage import Place
from zsplg_ray.student.data import TrainingData
from zsplg_ray.student.state import Schedule

__all__ = ["summary", "tune_train"]

log = logging.getLogger(__name__)

PARENT_S = 30.0
"""How long the first trial waits for MLflow's parent run."""

_PLACES = ("labeled", "labeled_masks", "unlabeled", "zeroshot", "val", "val_masks", "root", "out")


def tune_train(config: TuneTrainConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Search for training settings, or go on with a study: with `--resume` trials that were
    interrupted or failed go on from their last checkpoint, then come those that are left.

    Args:
        config: As the user gave it.
        progress: What shows how far it is; None: one of its own.

    Returns:
        The content of tune.json.

    Raises:
        ValueError: Bad input; nothing has been written.
        WorkError: Every trial failed, or Ray did.
    """
    with progress or Progress("tune train", show=not config.quiet) as progress:
        return _tune_train(config, progress)


def _tune_train(config: TuneTrainConfig, progress: Progress) -> dict[str, Any]:
    """`tune_train`, under way."""
    folder, base, space = RunFolder(config.out), base_config(config), search_space(config)
    progress.waits("listing the images")
    asha = scheduler(config.asha, config.train.epochs)
    data = _data(base)
    steps = Schedule.of(base, len(data.labelled), len(data.unlabelled))
    run = describe(config, data, steps, {})
    refuse_other_study(folder, run, config)  # before any download
    progress.waits("building the model")
    run = describe(config, data, steps, check_model(with_weights(base), len(data.classes)))
    with only_run(folder):
        old = refuse_other_study(folder, run, config)
        study = Study(folder, describe_study(config, run) if old is None else old)
        study.try_again()
        if old is not None and old["state"] == "complete" and not _left(config, study):
            log.info("%s is finished: nothing to do", folder.uri)
            return old
        study.record["config"] = recorded(config)
        _work(config, base, space, study, asha, progress)
    return study.record


def base_config(config: TuneTrainConfig) -> TrainConfig:
    """The settings of all trials. A trial may run anywhere, so relative paths are made absolute."""
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    base = TrainConfig(**{name: getattr(config, name) for name in fields})
    changes: dict[str, Any] = {}
    for name in _PLACES:
        value = getattr(config, name)
        if value is not None:
            changes[name] = Place.parse(value).uri
    if config.classes is not None and Path(config.classes).is_file():
        changes["classes"] = str(Path(config.classes).absolute())
    return anywhere(override(base, changes))


def _data(base: TrainConfig) -> TrainingData:
    """What there is to train on. Raises: ValueError, also where nothing is left to judge by."""
    data = TrainingData.open(base)
    if len(data.validation):
        return data
    if base.val is None and base.train.holdout:
        fix = "add labelled images, or --val"
        raise ValueError(complain("labeled", "two images or more without --val", "one", fix))
    rule, fix = "over 0 where there is no --val", "raise it: trials are judged by what is held out"
    raise ValueError(complain("train.holdout", rule, base.train.holdout, fix))


def _left(config: TuneTrainConfig, study: Study) -> int:
    """How many trials there are still to run."""
    ended = sum(trial["state"] != "running" for trial in study.trials)
    return config.trials - ended


# The work ----------------------------------------------------------------------------------------


def _work(
    config: TuneTrainConfig,
    base: TrainConfig,
    space: tuple[Dim, ...],
    study: Study,
    asha: Any,
    progress: Progress,
) -> None:
    """Run what is left, and keep tune.json true, however this ends."""
    state = "failed"
    tracker: StudyTracker | None = None
    try:
        progress.waits("starting Ray")
        with ray_session(config.ray):
            crew, at_once = room(config)
            check_batches(base, crew)
            study.record |= {"state": "running", "workers": _workers(crew, at_once)}
            study.write()
            tracker = StudyTracker(config.mlflow, study.folder, _tracked(study))
            tracker.start()
            _replay(study, asha)
            _tell(config, study, space, at_once)
            common = _for_trials(base, crew, tracker)
            with quiet_tune():
                _search(config, common, space, study, asha, at_once, tracker, progress)
        state = "complete"
        if all(trial["state"] == "failed" for trial in study.trials):
            state = "failed"
            why = f"every trial failed, the last with: {study.trials[-1]['error']}"
            raise WorkError(f"{why} (--resume tries them again)")
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    except (TuneError, RayError) as e:
        raise WorkError(last_line(e)) from e
    finally:
        progress.waits("writing down what was found")
        if tracker is not None:  # else nothing has been written
            _settle(study, state, tracker)


def room(config: TuneTrainConfig) -> tuple[Crew, int]:
    """The workers of a trial, and how many trials at a time the cluster we are connected to holds.

    Raises: ValueError if not one finds room, or not as many as are asked for.
    """
    return plan_room(config, look_around(local=cluster_address(config.ray) == "local"))


def plan_room(config: TuneTrainConfig, cluster: Cluster) -> tuple[Crew, int]:
    """`room` on such a cluster."""
    workers = config.workers
    num = workers.num or workers.min or 1
    alone = plan_crew(replace(workers, num=num), cluster, config.device)
    asked = config.search.concurrent
    if asked is None:
        fitting = num
        if alone.gpus:
            sized = replace(workers, num=None, cpus=0.0, min=None)
            fitting = plan_crew(sized, cluster, config.device).num
        elif workers.cpus:  # nothing else says how many where there are no GPUs
            fitting = Cluster(cluster.up).room({"CPU": workers.cpus})
        at_once = max(1, fitting // num)
    else:
        at_once = asked
    at_once = min(at_once, config.trials)
    together = replace(workers, num=num * at_once, min=None)
    try:
        crew = plan_crew(together, cluster, config.device)
    except ValueError as e:
        rule = "as many trials as the cluster has room for"
        raise ValueError(complain("search.concurrent", rule, at_once, f"lower it ({e})")) from e
    return replace(crew, num=num, least=workers.min), at_once


def _workers(crew: Crew, at_once: int) -> dict[str, Any]:
    return {"num": crew.num, "gpus": crew.gpus, "cpus": crew.cpus, "trials_at_once": at_once}


def _for_trials(base: TrainConfig, crew: Crew, tracker: StudyTracker) -> TrainConfig:
    """Settings that trials have in common: their share of the cluster, the study's MLflow."""
    workers = {"num": crew.num, "gpus": crew.gpus, "cpus": crew.cpus}
    changes = {f"workers.{k}": v for k, v in workers.items()}
    changes |= {"mlflow.uri": tracker.uri or OFF, "mlflow.log_model": False}
    return override(base, {**changes, "mlflow.register": None})


def _replay(study: Study, asha: Any) -> None:
    """Let ASHA hear of what the study has learned before."""
    if isinstance(asha, Halving):
        for number in asha.replay(study):
            study.end(number, "stopped")


def _tell(config: TuneTrainConfig, study: Study, space: tuple[Dim, ...], at_once: int) -> None:
    """What is about to happen, in one line."""
    images = study.record["data"]["validation"]["images"]
    names = ", ".join(dim.name for dim in space)
    told = "%d trials of %d epochs, %d at a time, over %s; judged by %d images"
    log.info(told, _left(config, study), config.train.epochs, at_once, names, images)


def _search(
    config: TuneTrainConfig,
    base: TrainConfig,
    space: tuple[Dim, ...],
    study: Study,
    asha: Any,
    at_once: int,
    tracker: StudyTracker,
    progress: Progress,
) -> None:
    """Let Ray Tune run all trials that are left."""
    left = _left(config, study)
    if not left:
        return
    progress.plan(config.trials, config.trials - left, unit="trials")
    progress.waits("starting the first trials")
    _forget_tune(study)  # of a start that was killed
    gate: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Gate).remote()
    tags = {f"{PREFIX}study": study.record["id"]}
    parent = tracker.parent(PARENT_S) if tracker.on else None
    tags |= {"mlflow.parentRunId": parent} if parent is not None else {}

    def ended(number: int) -> None:
        if study.trials[number]["state"] == "stopped":
            gate.answer.remote(number, False)

    trainable: Any = tune.with_parameters(TrialRun, base=base, tags=tags, gate=gate)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"memory": 1}),  # nothing at all is refused
        tune_config=tune.TuneConfig(
            search_alg=Searching(study, config, space, at_once),
            scheduler=asha,
            num_samples=left,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=_ray_tune(study),
            storage_path=study.folder.path,
            storage_filesystem=study.folder.plain_fs,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # it has its own
            failure_config=tune.FailureConfig(max_failures=config.workers.max_failures),
            callbacks=[Ears(study, progress, ended)],
            verbose=0,
        ),
    )
    progress.pace.start()
    tuner.fit()


def _ray_tune(study: Study) -> str:
    """Folder of Ray Tune's own files while a study runs; none is needed afterwards, and as it is
    deleted, its name is one that nothing of a user's can have.
    """
    return f"_ray_tune_{study.record['id']}"


def _forget_tune(study: Study) -> None:
    with contextlib.suppress(FileNotFoundError):
        study.folder.fs.delete_dir(f"{study.folder.path}/{_ray_tune(study)}")


def _settle(study: Study, state: str, tracker: StudyTracker) -> None:
    """Bring tune.json, tuned.yaml and MLflow to an end; never hides why the work failed."""
    folder, record = study.folder, study.record
    try:
        study.settle(state)
        for trial in study.trials:  # those that were interrupted too, or MLflow has them running
            tracker.adopt(trial["number"], RunFolder(study.place(trial["number"])))
        _forget_tune(study)
        files: dict[str, bytes] = {}
        if record["best"] is not None:
            write_tuned(folder, tuned_values(record), tuned_header(record))
            files[NAME] = folder.read_bytes(NAME) or b""
        files[FILE] = folder.read_bytes(FILE) or b""
        told = tracker.finish(record, study_metrics(record), files, best=folder)
        if told is not None:
            record["mlflow"] = told
            study.write()
    except OSError as e:
        if state == "complete":
            raise WorkError(f"tune.json could not be written: {e}") from e
        log.warning("tune.json could not be written: %s", e)


def _tracked(study: Study) -> dict[str, Any]:
    record = study.record
    tags = {f"{PREFIX}fingerprint": record["fingerprint"]}
    labels = record["data"].get("unlabelled", {}).get("zeroshot")
    tags |= {f"{PREFIX}labels": labels} if labels else {}
    return {"id": record["id"], "verb": record["verb"], "config": record["config"], "tags": tags}
