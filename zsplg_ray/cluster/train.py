"""`zsplg train` on Ray Train: few labelled and many unlabelled images in, a trained model out.

What enters: a `TrainConfig`. What leaves: a run's folder (trainrun.py) with best.pt, and what its
train.json says.

    driver: checks everything, then starts Ray Train and watches
      worker x N: student.loop.fit -> checkpoints        controller: train.json, best.pt, last.pt
    driver's threads: train.json -> progress on stderr, MLflow

The same command again goes on from the last checkpoint, whoever was killed: a worker (Ray starts it
again), the driver, or all. No line here differs between laptop and cluster.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError
from ray.train import (
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer

from zsplg_ray.cluster.crew import Crew, check_batches, plan_crew
from zsplg_ray.cluster.lock import only_run
from zsplg_ray.cluster.nodes import look_around
from zsplg_ray.cluster.notes import GONE_S, noting
from zsplg_ray.cluster.preview import preview
from zsplg_ray.cluster.session import cluster_address, last_line, ray_session
from zsplg_ray.cluster.track.train import Tracker, send_finished
from zsplg_ray.cluster.training import Training
from zsplg_ray.cluster.trainrun import (
    CHECKPOINTS,
    describe_training,
    identify,
    images_per_s,
    is_finished,
    new_attempt,
    put_models,
    read_training,
    refuse_other_training,
    start_of,
    sweep,
    write_training,
)
from zsplg_ray.cluster.waiting import telling_of_waits
from zsplg_ray.cluster.watch import Watcher
from zsplg_ray.cluster.worker import Job, Keeper, Stopped, work
from zsplg_ray.config import TrainConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import WorkError, complain, override
from zsplg_ray.shapes.recipe import with_weights
from zsplg_ray.signals import interrupts_are_told
from zsplg_ray.storage import Place
from zsplg_ray.student.checkpoint import load_init
from zsplg_ray.student.data import TrainingData
from zsplg_ray.student.model import DeepLabV3Plus
from zsplg_ray.student.state import Schedule, first_learning_rate, images_a_step

log = logging.getLogger(__name__)

CHECKPOINTS_KEPT = 2


def train(
    config: TrainConfig,
    *,
    tags: Mapping[str, str] | None = None,
    callbacks: Sequence[UserCallback] = (),
    progress: Training | None = None,
) -> dict[str, Any]:
    """Train a model, or go on with a run that was interrupted.

    Args:
        config: What to train, on what.
        tags: Further ones for the MLflow run, such as `mlflow.parentRunId`.
        callbacks: Told, beside ours, of every report that has been stored. One that raises
            `Stopped` ends the run early, in the state "stopped".
        progress: What shows how far it is; None: one of its own.

    Returns:
        The content of train.json.

    Raises:
        ValueError: Bad input; nothing has been written.
        WorkError: The work failed; the last checkpoint is kept.
    """
    with progress or Training(show=not config.quiet) as progress:
        return _train(config, tags, callbacks, progress)


def _train(
    config: TrainConfig,
    tags: Mapping[str, str] | None,
    callbacks: Sequence[UserCallback],
    progress: Training,
) -> dict[str, Any]:
    """`train`, under way."""
    folder = RunFolder(config.out)
    progress.waits("listing the images")
    data = TrainingData.open(config)
    schedule = Schedule.of(config, len(data.labelled), len(data.unlabelled))
    run = describe(config, data, schedule, {})
    old = refuse_other_training(folder, run)  # before any download
    if old is not None and is_finished(old) and old["state"] == "complete":
        log.info("%s is finished: nothing to do", folder.uri)
        send_finished(config.mlflow, folder, old, tags)
        return old
    progress.waits("building the model")
    run = describe(config, data, schedule, check_model(with_weights(config), len(data.classes)))
    refuse_other_training(folder, run)
    with only_run(folder):
        run = _continued(run, refuse_other_training(folder, run))
        start = start_of(folder, run)
        tracker = Tracker.of(config.mlflow, folder, run, tags)
        job = Job(anywhere(config), data, schedule, folder, run["attempt"], start)
        _work(job, run, Watcher(folder, tracker, progress), callbacks)
    return run


def anywhere(config: TrainConfig) -> TrainConfig:
    """The settings as workers take them, who have another working directory."""
    init = config.student.init
    if init is None or with_weights(config) != config:  # none, or what comes with the package
        return config
    return override(config, {"student.init": Place.parse(init).uri})


def check_model(config: TrainConfig, n_classes: int) -> dict[str, str | None]:
    """Build the model once, so that workers will not fail at it, and every download is done.

    Returns: What it starts from -> SHA-256 of the weights.

    Raises: ValueError if the backbone or the weights to start from cannot be had.
    """
    student = config.student
    try:
        pretrained = student.pretrained and student.init is None
        model = DeepLabV3Plus(student, n_classes, pretrained=pretrained)
    except ValueError:
        raise
    except Exception as e:  # whatever timm, the hub and the network have to say
        rule = f"weights of {student.backbone} that can be had"
        fix = f"connect, or use --student.no-pretrained ({last_line(e)[:200]})"
        raise ValueError(complain("student.pretrained", rule, "true", fix)) from e
    return {"init": load_init(model, student.init) if student.init is not None else None}


def describe(
    config: TrainConfig,
    data: TrainingData,
    schedule: Schedule,
    weights: Mapping[str, str | None],
) -> dict[str, Any]:
    """The content of train.json at the start of a run; see `describe_training`."""
    tables = (data.labelled, data.unlabelled, data.validation)
    ids = [table["image_id"].to_pylist() for table in tables]
    parts = {
        "labelled": identify(ids[0]),
        "unlabelled": identify(ids[1], zeroshot=data.zeroshot_fingerprint),
        "validation": identify(ids[2]),
    }
    lengths = {
        "steps_per_epoch": schedule.steps_per_epoch,
        "epochs": schedule.epochs,
        "steps": schedule.steps,
        "images_per_step": images_a_step(config),
    }
    return describe_training(config, data.classes, parts, lengths, weights)


def _continued(run: dict[str, Any], old: dict[str, Any] | None) -> dict[str, Any]:
    """The run as it goes on: what the folder's run has reached, a new attempt."""
    if old is not None:
        kept = ("id", "history", "failures", "last", "best", "seconds", "mlflow", "preview")
        run |= {k: old[k] for k in kept if k in old}
        if old["last"] is not None:
            done = f"epoch {old['last']['epoch']} of {run['schedule']['epochs']}"
            log.info("going on after %s", done)
    run["attempt"] = new_attempt()
    return run


# The work ----------------------------------------------------------------------------------------


def _work(
    job: Job, run: dict[str, Any], watcher: Watcher, callbacks: Sequence[UserCallback]
) -> None:
    """Train, and keep train.json true, however this ends."""
    folder = job.folder
    progress = watcher.progress
    began = time.monotonic()
    state = "failed"
    try:
        progress.waits("starting Ray")
        with ray_session(job.config.ray):
            crew = _crew(job.config)
            check_batches(job.config, crew)
            _begin(job, run, crew, watcher)
            if not is_finished(run):
                progress.waits("starting workers")
                with noting(progress.hear, GONE_S, progress.show) as notes:
                    here = replace(job, gpus=crew.gpus, threads=crew.threads, notes=notes)
                    _fit(here, crew, callbacks)
        state = "complete"
    except Stopped:
        state = "stopped"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        progress.waits("writing down what was done")
        if _ours(folder, run):
            _settle(job, run, state, time.monotonic() - began, watcher)


def _crew(config: TrainConfig) -> Crew:
    """Workers that fit the cluster we are connected to. Raises: ValueError if none do."""
    cluster = look_around(local=cluster_address(config.ray) == "local")
    return plan_crew(config.workers, cluster, config.device)


def _begin(job: Job, run: dict[str, Any], crew: Crew, watcher: Watcher) -> None:
    """The first thing that is written."""
    run["workers"] = {"num": crew.num, "gpus": crew.gpus, "cpus": crew.cpus}
    write_training(job.folder, run)
    sweep(job.folder)
    put_models(job.folder, run)  # a kill may have come before
    watcher.start(run)
    _tell(job, run)


def _tell(job: Job, run: Mapping[str, Any]) -> None:
    """What is about to happen, in one line."""
    loop, schedule, workers = job.config.train, run["schedule"], run["workers"]
    images = schedule["images_per_step"]
    log.info(
        "%d epochs of %d steps; %d + %d images a step, so a learning rate of %g; %d x %s",
        schedule["epochs"],
        schedule["steps_per_epoch"],
        loop.batch_labeled,
        images - loop.batch_labeled,
        first_learning_rate(job.config),
        workers["num"],
        f"{workers['gpus']:g} GPU" if workers["gpus"] else f"{workers['cpus']:g} CPU",
    )


def _fit(job: Job, crew: Crew, callbacks: Sequence[UserCallback]) -> None:
    """Run Ray Train. Raises: WorkError, or ValueError for input that turned out to be bad."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # else a report takes 2 s
    if crew.least is None:
        # Importing torch from a shared disk takes its time, and Ray starts all over after a minute.
        # Elastic workers must not wait for long: they try the lost node's room once more first.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    folder = job.folder
    num = crew.num if crew.least is None else (crew.least, crew.num)
    debug = log.isEnabledFor(logging.DEBUG)
    trainer = TorchTrainer(
        functools.partial(work, job),
        torch_config=TorchConfig(backend=crew.backend),
        scaling_config=ScalingConfig(
            num_workers=num, use_gpu=crew.gpus > 0, resources_per_worker=crew.resources
        ),
        run_config=RunConfig(
            name=job.attempt,
            storage_path=f"{folder.path}/{CHECKPOINTS}",
            storage_filesystem=folder.plain_fs,
            failure_config=FailureConfig(max_failures=job.config.workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            callbacks=[Keeper(folder, job.attempt), *callbacks],
            logging_config=LoggingConfig(log_level="DEBUG" if debug else "CRITICAL"),
        ),
    )
    try:
        waits = telling_of_waits([crew.resources], functools.partial(_reached, folder))
        with waits, interrupts_are_told():
            trainer.fit()
    except ControllerError as e:
        cause = e.controller_failure
        if isinstance(cause, ValueError | WorkError):
            raise cause from e
        raise WorkError(last_line(cause)) from e
    except (TrainingFailedError, RayError) as e:
        raise WorkError(_why(e)) from e


def _reached(folder: RunFolder) -> object:
    """Something that changes whenever training gets on."""
    with contextlib.suppress(OSError, ValueError):
        found = read_training(folder)
        return found and (len(found["history"]), len(found.get("failures", [])))
    return None


def _why(error: BaseException) -> str:
    """What to say of an error that Ray gave up at."""
    failures = getattr(error, "worker_failures", None) or {}
    told = {rank: last_line(failure) for rank, failure in sorted(failures.items())}
    if not told:
        return last_line(error)
    rank, text = next(iter(told.items()))
    return f"worker {rank} failed more than workers.max_failures times, last with {text}"


def _ours(folder: RunFolder, run: Mapping[str, Any]) -> bool:
    """Whether anything of this attempt has been written, and nobody has taken over."""
    with contextlib.suppress(OSError, ValueError):
        found = read_training(folder)
        return found is not None and found["attempt"] == run["attempt"]
    return False


def _settle(job: Job, run: dict[str, Any], state: str, seconds: float, watcher: Watcher) -> None:
    """Bring train.json and MLflow to an end; never hides why the work failed."""
    folder = job.folder
    tracker = watcher.tracker
    usable = watcher.stop(tracker.patience_s(state))
    try:
        found = read_training(folder)
        assert found is not None
        run |= {k: found[k] for k in ("history", "failures", "last", "best")}
        run["state"] = state
        run["seconds"] = round(run["seconds"] + seconds, 3)
        run["images_per_s"] = images_per_s(run)
        tracker.note(run, whole=False)
        done = state == "complete"
        pictures = preview(folder, job.data, job.config.zeroshot) if done else None
        if pictures is not None:
            folder.write_bytes("preview.png", pictures)
            run["preview"] = "preview.png"
        write_training(folder, run)
        if usable and tracker.on:
            tracker.note(run, tracker.finish(run, pictures))
            write_training(folder, run)
    except OSError as e:
        if state == "complete":
            raise WorkError(f"train.json could not be written: {e}") from e
        log.warning("train.json could not be written: %s", e)
