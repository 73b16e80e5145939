"""What runs on each of Ray Train's workers, and what their controller does with what they report.

What enters: a `Job`, the same for all workers. What leaves: checkpoints in the run's folder, and
train.json that names them (trainrun.py).

    worker: state from the last checkpoint -> fit() -> report(entry of the history, checkpoint)
    controller, once Ray has stored the checkpoint: commit() to train.json, last.pt, best.pt

The loop itself is student.loop and knows nothing of Ray; here is only what is different when it
runs there.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from zsplg_ray.cluster.notes import EVERY_S, Notes, keep_telling
from zsplg_ray.cluster.session import last_line
from zsplg_ray.cluster.trainrun import (
    CHECKPOINTS,
    STATE,
    STUDENT,
    check_attempt,
    commit,
    note_failure,
)
from zsplg_ray.config import TrainConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import WorkError
from zsplg_ray.shapes.recipe import with_weights
from zsplg_ray.student.checkpoint import pack
from zsplg_ray.student.data import TrainingData
from zsplg_ray.student.loader import batches
from zsplg_ray.student.loop import Pulse, Report, fit, validator
from zsplg_ray.student.state import Ranks, Schedule, TrainState

log = logging.getLogger(__name__)

GPU_LOADERS = 4
"""Loader processes of a worker with a GPU, which would wait for images otherwise."""


@dataclass(frozen=True)
class Job:
    """What every worker of a run needs to know."""

    config: TrainConfig
    data: TrainingData
    schedule: Schedule
    folder: RunFolder
    attempt: str
    start: str | None
    """Checkpoint of an earlier attempt to go on from, ATTEMPT/NAME below checkpoints/."""
    gpus: float = 0.0
    threads: int = 1
    notes: Notes | None = None
    """Where workers say how far they are; None: nobody wants to know."""


def work(job: Job) -> None:
    """Train on one worker, from the last checkpoint to the end.

    Raises:
        ValueError, WorkError: What another try would not mend.
    """
    torch.set_num_threads(job.threads)
    check_attempt(job.folder, job.attempt)
    ranks = this_rank(job.gpus)
    pulse = _pulse(job.notes, ranks) if job.notes is not None else None
    config, classes = with_weights(job.config), job.data.classes
    state = TrainState(config, len(classes), job.schedule, ranks, _saved(job))
    loaders = config.train.loader_workers
    source = batches(
        job.data,
        config,
        first_step=state.step,
        steps=job.schedule.steps - state.step,
        rank=ranks.rank,
        world=ranks.world,
        workers=loaders if loaders is not None else GPU_LOADERS if job.gpus else 0,
        pin_memory=job.gpus > 0,
    )
    validate = validator(job.data, config, ranks)
    report = _reporter(job, ranks)
    fit(config, state, source, ranks=ranks, validate=validate, report=report, pulse=pulse)


def _pulse(notes: Notes, ranks: Ranks) -> Pulse:
    """Says about once a second how far this worker is, from its start on, however long a step or
    a validation takes: who is silent counts as gone."""
    who = str(ranks.rank)
    said: dict[str, Any] = {}
    keep_telling(lambda: notes.note(who, said))
    last = -EVERY_S

    def pulse(step: int, loss: Callable[[], float], judging: bool) -> None:
        nonlocal last, said
        now = time.monotonic()
        if now - last < EVERY_S and not judging:
            return
        last = now
        more = {"loss": loss()} if ranks.lead else {}
        said = {"step": step, "judging": judging, **more}
        notes.note(who, said)

    return pulse


def this_rank(gpus: float) -> Ranks:
    """The place of this worker among the others."""
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if gpus else torch.device("cpu")
    return Ranks(context.get_world_rank(), context.get_world_size(), device)


def _saved(job: Job) -> dict[str, Any] | None:
    """The state to go on with: this attempt's last, else an earlier attempt's, else none."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None and job.start is not None:
        path = f"{job.folder.path}/{CHECKPOINTS}/{job.start}"
        checkpoint = ray.train.Checkpoint(path, filesystem=job.folder.plain_fs)
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        saved = torch.load(Path(folder, STATE), map_location="cpu", weights_only=True)
    return saved["state"]


def _reporter(job: Job, ranks: Ranks) -> Callable[[Report, TrainState], None]:
    def report(told: Report, state: TrainState) -> None:
        entry = {**state.history[-1], "time": round(time.time(), 3)}
        metrics = {"entry": entry, "best": state.best}
        name = f"step-{told.step:08d}"
        if not ranks.lead:
            ray.train.report(metrics, checkpoint_dir_name=name)
            return
        with tempfile.TemporaryDirectory(prefix="zsplg_") as folder:
            _write_checkpoint(Path(folder), job, state, told)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)

    return report


def _write_checkpoint(folder: Path, job: Job, state: TrainState, told: Report) -> None:
    """state.pt, and student.pt, the model as it is handed on."""
    config, classes = job.config, job.data.classes
    saved = {"format": 1, "state": state.save(), "classes": classes.to_dict()}
    torch.save(saved, folder / STATE)
    extra = {
        "conf_thresh": config.unimatch.conf_thresh,
        "epoch": told.epoch,
        "step": told.step,
        "val_miou": told.metrics.get("val_miou"),
        "attempt": job.attempt,
    }
    (folder / STUDENT).write_bytes(pack(state.weights(), config.student, classes, extra))


# On the controller -------------------------------------------------------------------------------


class Stopped(WorkError):
    """Whoever watches a run wants no more of it; a callback raises it. Its checkpoints stay."""


class Keeper(ray.train.UserCallback):
    """Keeps train.json, and ends a run that fails in a way that another try would not mend."""

    def __init__(self, folder: RunFolder, attempt: str) -> None:
        self.folder, self.attempt = folder, attempt

    def after_report(
        self,
        run_context: Any,
        metrics: list[dict[str, Any]],
        checkpoint: ray.train.Checkpoint | None,
    ) -> None:
        """All workers have reported and Ray has stored the checkpoint."""
        assert checkpoint is not None, "the first worker always brings one"
        commit(self.folder, self.attempt, metrics[0], Path(checkpoint.path).name)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raising here is what keeps Ray from trying again."""
        for error in worker_exceptions.values():
            if is_final(error):
                raise error
        worker, error = next(iter(sorted(worker_exceptions.items())))
        note_failure(self.folder, self.attempt, worker, last_line(error))


def is_final(error: BaseException) -> bool:
    """Whether the same would happen again.

    What may pass is the death of a process, and what it does to its neighbours: a broken
    connection is a RuntimeError or an OSError.
    """
    if isinstance(error, WorkError | torch.OutOfMemoryError | NotImplementedError):
        return True
    passing = isinstance(error, RuntimeError | OSError)
    return not passing and type(error).__module__.split(".")[0] != "ray"
