"""Images through a pool of actors into a run's folder, each exactly once, whatever the verb.

What enters: a manifest of images, a `Task`, and run.json as it starts. What leaves: parts in the
folder, and run.json as it ends.

    manifest blocks -> decode_block (CPU tasks) -> ImageActor (the models) -> parts
                                                      `-> counts -> driver

What stands in valid parts is not done again, so the same command goes on after a crash, picks up
images added since, and tries failed ones again. No line here differs between laptop and cluster.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import uuid
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError

from zsplg_ray.cluster.actor import ImageActor, Job, Task, unseen
from zsplg_ray.cluster.decode import decode_block
from zsplg_ray.cluster.ledger import Ledger
from zsplg_ray.cluster.nodes import Cluster, look_around
from zsplg_ray.cluster.notes import GONE_S, interval_s, listening
from zsplg_ray.cluster.progress import STARTING, Actors, Progress
from zsplg_ray.cluster.session import (
    Plan,
    cluster_address,
    last_line,
    plan_actors,
    quiet_ray_data,
    ray_session,
)
from zsplg_ray.cluster.track.run import RunTracker
from zsplg_ray.cluster.waiting import telling_of_waits
from zsplg_ray.config import LabelConfig, PredictConfig
from zsplg_ray.exactly_once import anti_join, forget_errors, repair
from zsplg_ray.part_index import PartIndex, Written
from zsplg_ray.rundir import RunFolder
from zsplg_ray.runinfo import part_meta, refuse_other_run
from zsplg_ray.settings import WorkError, complain, override

log = logging.getLogger(__name__)

DECODE_MEMORY = 256 * 2**20
"""Bytes that a reading task asks of Ray, a photograph several times over. It is also what keeps Ray
from fusing reading into the actors, whose time is dear: it fuses only what asks for the same."""


INDEX_EVERY_S = 600.0
"""Seconds after which the index of parts is written again, so that a driver that is killed does not
cost the reading of all parts of a long run."""


def run_images(
    config: LabelConfig | PredictConfig,
    task: Task,
    folder: RunFolder,
    manifest: pa.Table,
    run: dict[str, Any],
    progress: Progress,
) -> None:
    """Do every image of the manifest that is not done yet, and keep run.json true.

    Args:
        config: Resolved; paths in it hold on every node.
        task: What is done to an image.
        folder: Where; to be held by `lock.only_run`.
        manifest: `sources.MANIFEST`, and columns that the task wants of `decode.DECODED`.
        run: The content of run.json, changed in place.
        progress: What shows how far it is, under way.

    Raises:
        ValueError: The folder holds another run, or the cluster cannot hold the actors; nothing
            has been written.
        WorkError: The work failed; what is finished is kept.
    """
    refuse_other_run(folder, run)
    progress.waits("looking at what is done")
    index = PartIndex.load(folder)
    found = repair(folder, task.verb, index)
    todo = anti_join(manifest, found.done)
    progress.plan(len(manifest), len(manifest) - len(todo))
    job = Job(config, task, folder, part_meta(run), run["weights"])
    old = folder.read_run() or {}
    run["id"] = old.get("id") or uuid.uuid4().hex
    run["mlflow"] = old.get("mlflow")
    tracker = RunTracker(config.mlflow, folder, task.verb)
    if run["mlflow"] and not len(todo) and old["state"] != "complete":
        tracker.start(run)  # it was killed between its last part and its end
    before = _Before(index, len(found.done), found.failed)
    del found  # its ids of a million images are not needed any more
    _work(job, todo, run, progress, tracker, before)


@dataclass(frozen=True)
class _Before:
    """What stands in the folder before the work, but for `index`, which is kept up with it."""

    index: PartIndex
    done: int
    """Images that are done."""
    failed: set[str]
    """Ids of the images that stand in errors/."""


def _work(
    job: Job,
    todo: pa.Table,
    run: dict[str, Any],
    progress: Progress,
    tracker: RunTracker,
    before: _Before,
) -> None:
    """Do `todo`, and keep run.json and MLflow true, however this ends."""

    def numbers() -> dict[str, float]:
        done = before.done + progress.labelled
        return {"labelled": done, "images_per_s": progress.rate()}

    began = time.monotonic()
    state = "failed"
    try:
        if len(todo):
            progress.waits("starting Ray")
            with ray_session(job.config.ray):
                plan = plan_for(job.config, _cluster(job.config))
                progress.waits(STARTING)
                job.folder.write_run(run)
                tracker.start(run, numbers)
                if before.failed:
                    again = before.failed.intersection(todo["image_id"].to_pylist())
                    forget_errors(job.folder, again, before.index)
                needs = [plan.need, {"CPU": plan.decode_cpus, "memory": DECODE_MEMORY}]
                with telling_of_waits(needs, moved=lambda: progress.last):
                    _do_blocks(job, todo, plan, progress, before.index)
        state = "complete"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        progress.waits("writing down what was done")
        run["state"] = state
        run["seconds"] = round(time.monotonic() - began, 3)
        run["images_per_s"] = round(progress.rate(), 3)
        if not len(todo) or job.folder.read_run() is not None:
            _settle(job, todo, run, progress, tracker, before)


def _cluster(config: LabelConfig | PredictConfig) -> Cluster:
    """The cluster we are connected to."""
    return look_around(local=cluster_address(config.ray) == "local")


def plan_for(config: LabelConfig | PredictConfig, cluster: Cluster) -> Plan:
    """Actors that fit a cluster. Raises: ValueError if none do."""
    actors = config.actors
    if config.device == "cpu" and actors.gpus is None:
        actors = override(actors, {"gpus": 0.0})
    plan = plan_actors(actors, cluster)
    if config.device == "cuda" and not plan.gpus:
        fix = "set --actors.gpus, or --device cpu"
        raise ValueError(complain("device", "cpu where actors get no GPU", "cuda", fix))
    return plan


def _settle(
    job: Job,
    todo: pa.Table,
    run: dict[str, Any],
    progress: Progress,
    tracker: RunTracker,
    before: _Before,
) -> None:
    """Mend what a crash may have left, count, write run.json, and end the MLflow run; never hides
    why work failed.

    Raises: WorkError if the work ended well, but run.json cannot be written or images are missing.
    """
    folder, missing = job.folder, 0
    try:
        after = repair(folder, job.task.verb, before.index)
        if run["state"] == "complete":
            missing = len(anti_join(todo, after.done | after.failed))
            run["state"] = "failed" if missing else "complete"
        for name in after.unlabelled:
            job.task.mend(folder, name, job.meta)
        run["counts"] = {
            "images": progress.total,
            "labelled": len(after.done),
            "quarantined": len(after.failed),
            "skipped_as_done": progress.skipped,
            "labelled_now": len(after.done) - before.done,
            **run.get("counts", {}),
        }
        folder.write_run(run)
        if tracker.started:
            tracker.finish(run, run["state"])
            folder.write_run(run)
    except OSError as e:
        if run["state"] == "complete":
            raise WorkError(f"run.json could not be written: {e}") from e
        log.warning("run.json could not be written: %s", e)
    if missing:
        told = f"{missing} of {len(todo)} images were done but are not there"
        raise WorkError(f"{told}: {unseen(folder)}")


def _do_blocks(job: Job, todo: pa.Table, plan: Plan, progress: Progress, index: PartIndex) -> None:
    """Run the pipeline over the manifest rows `todo`; `progress` and `index` are kept up with it.

    Raises: WorkError once more than `max_errors` images have failed.
    """
    quiet_ray_data()
    size = job.config.actors.in_flight
    blocks = [todo.slice(start, size) for start in range(0, len(todo), size)]
    least, most = plan.pool(len(blocks))
    progress.actors = Actors(most, plan.gpus > 0)
    ledger = Ledger.start()
    # Not `from_arrow`: it starts a task for each block at once, whatever there is room for, which
    # takes minutes for a million images, and a cluster that grows would start every node it may.
    dataset = ray.data.from_blocks(blocks).map_batches(
        functools.partial(decode_block, max_px=job.config.max_pixels, ledger=ledger),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=plan.decode_cpus,
        memory=DECODE_MEMORY,
    )
    dataset = dataset.map_batches(
        ImageActor,
        batch_size=size,  # None is refused where there are GPUs
        batch_format="pyarrow",
        zero_copy_batch=True,
        fn_constructor_args=(job, plan, ledger),
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus,
        resources=dict(plan.resources),
    )
    rare_s = interval_s(plan.max_actors)
    hears = listening(ledger, progress.hear, max(GONE_S, 5 * rare_s))
    try:
        with hears if progress.show else contextlib.nullcontext():
            _take_in(job, dataset, progress, index)
    except RayError as e:
        raise WorkError(last_line(e)) from e
    except ExecutionTimeoutError as e:
        told = "nothing moves; see whether the cluster can place the actors (`ray status`)"
        raise WorkError(told) from e
    finally:
        with contextlib.suppress(RayError):
            ledger.close()


def _take_in(job: Job, dataset: ray.data.Dataset, progress: Progress, index: PartIndex) -> None:
    """Count the blocks as they come. Raises: WorkError once too many images have failed."""
    saved = time.monotonic()
    for counts in dataset.iter_rows():
        progress.add(counts["labelled"], counts["failed"], counts)
        index.tell(Written(**part) for part in counts["written"])
        if time.monotonic() - saved > INDEX_EVERY_S:
            index.save(job.folder, look=True)
            saved = time.monotonic()
        limit = job.config.max_errors
        if limit is not None and progress.failed > limit:
            raise WorkError(
                f"max_errors must be >= the images that fail, got {limit}; "
                f"{progress.failed} failed so far, see {job.folder.uri}/errors"
            )
