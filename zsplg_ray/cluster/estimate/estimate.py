"""`zsplg estimate`: what a long `label` will take, from a sample, before it starts.

What enters: the settings of `label`, how many images to try, a price. What leaves: a mapping of
plain values; nothing is written. The source is listed, the sample alone is read.

The sample goes through the code of an actor in this process: no Ray is started for it. Where the
settings name a cluster, it goes to one of its nodes instead, as one task that asks for what an
actor asks for: GPUs are there, not where the command is given.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError

from zsplg_ray.cluster.estimate.forecast import Work, forecast
from zsplg_ray.cluster.estimate.sample import Measured, measure, spread
from zsplg_ray.cluster.label import LabelTask, Load
from zsplg_ray.cluster.nodes import Cluster, look_around
from zsplg_ray.cluster.pipeline import plan_for
from zsplg_ray.cluster.progress import Progress
from zsplg_ray.cluster.session import Plan, cluster_address, last_line, ray_session
from zsplg_ray.cluster.waiting import telling_of_waits
from zsplg_ray.config import EstimateConfig, LabelConfig
from zsplg_ray.exactly_once import anti_join, done_ids
from zsplg_ray.flags import spelled
from zsplg_ray.label.compose import minimum_scores
from zsplg_ray.label.labeler import Labeler
from zsplg_ray.label.naming import prepare
from zsplg_ray.label.presets import resolve_label
from zsplg_ray.label.weights import absolute_paths
from zsplg_ray.rundir import RunFolder
from zsplg_ray.runinfo import describe_run, part_meta, refuse_other_run
from zsplg_ray.safe_text import masked
from zsplg_ray.settings import WorkError, complain, flatten, from_mapping
from zsplg_ray.sources import list_images
from zsplg_ray.vocab import class_list

PLACEHOLDER = "run/"
"""The folder of a run whose folder is not chosen yet."""
BUSY = 1.25
"""Times longer than its own work that a thread may take before it is told."""
SHORT_H = 1 / 6
"""Hours below which what is not counted in is worth telling."""
_OWN = ("sample", "price", "gpus", "json")
"""Settings that `label` has not, or that mean something else there."""


def estimate(
    config: EstimateConfig, *, load: Load = Labeler.load, progress: Progress | None = None
) -> dict[str, Any]:
    """Label a sample and tell what all of the source will take.

    Args:
        config: As the user gave it.
        load: What the models are loaded by.
        progress: What shows how far it is; None: one of its own.

    Returns:
        source, out, images, done, todo, command; and where there is something to do sample, device,
        pool, price, notes and what `forecast.forecast` returns. Seconds, hours, bytes, dollars.

    Raises:
        ValueError: Bad input, what `label` would refuse too.
        WorkError: None of the sampled images could be labelled, or the device is broken.
    """
    with progress or Progress("estimate", not config.quiet) as progress:
        return _estimate(config, load, progress)


def _estimate(config: EstimateConfig, load: Load, progress: Progress) -> dict[str, Any]:
    """`estimate`, under way."""
    progress.waits("listing the images")
    label = _as_label(config)
    classes = class_list(label.classes)
    manifest = list_images(label.images, root=label.root)
    resolved = resolve_label(label)
    minimum_scores(resolved.compose, classes)
    folder = RunFolder(label.out) if config.out is not None else None
    if folder is not None:
        refuse_other_run(folder, describe_run(label, resolved, classes, {}))
    done = done_ids(folder) if folder is not None else set()
    todo = anti_join(manifest, done)
    found: dict[str, Any] = {
        "source": masked(config.images),
        "out": masked(config.out) if config.out is not None else None,
        "images": len(manifest),
        "done": len(manifest) - len(todo),
        "todo": len(todo),
        "command": masked(shlex.join(["zsplg", "label", *spelled(label)])),
    }
    if not len(todo):
        return found
    rows = todo.take(spread(len(todo), config.sample)).to_pylist()
    local = cluster_address(config.ray) == "local"
    if not local:
        progress.waits("connecting to Ray")
    with contextlib.nullcontext() if local else ray_session(config.ray):
        has = _this_machine(config) if local else look_around(local=False)
        plan, cluster = _planned(config, label, has)  # before any download
        progress.waits("reading the models' weights")
        naming, weights = prepare(resolved, classes)
        run = describe_run(label, resolved, classes, weights)
        if folder is not None:
            refuse_other_run(folder, run)
        task = LabelTask(absolute_paths(resolved), naming, load)
        about = {"has_gpu": bool(plan.gpus), "threads": plan.threads}
        if local:
            measured = measure(task, rows, part_meta(run), progress=progress, **about)
        else:
            progress.waits("measuring on a node of the cluster")
            measured = _elsewhere(plan, task, rows, part_meta(run), **about)
    if len(measured.failed) == len(rows):
        first = measured.failed[0]
        told = f"{first['image_id']}: {first['stage']}: {first['error']}"
        raise WorkError(f"none of {len(rows)} sampled images could be labelled; {told}")
    return found | _numbers(config, label, measured, plan, cluster, len(todo))


def _as_label(config: EstimateConfig) -> LabelConfig:
    """The settings that `label` will have."""
    theirs = {k: v for k, v in flatten(config).items() if k not in _OWN}
    assert theirs.keys() <= flatten(from_mapping(LabelConfig, theirs | {"out": ""})).keys()
    return from_mapping(LabelConfig, theirs | {"out": config.out or PLACEHOLDER})


def _elsewhere(plan: Plan, *given: Any, **more: Any) -> Measured:
    """`measure` where an actor would stand. Raises: WorkError if cluster or device fail."""
    remote: Any = ray.remote
    one = remote(measure).options(
        num_cpus=plan.cpus,
        num_gpus=plan.gpus,
        resources=dict(plan.resources),
        max_retries=0,
    )
    try:
        with telling_of_waits([plan.need], moved=lambda: None):
            return ray.get(one.remote(*given, **more))
    except RayError as e:
        raise WorkError(last_line(e)) from e


def _planned(config: EstimateConfig, label: LabelConfig, has: Cluster) -> tuple[Plan, Cluster]:
    """The actors, and the cluster they will be on: the one there is, or with as many GPUs as asked.

    Raises: ValueError if they do not fit, or GPUs are asked for where there is none to measure on.
    """
    plan = plan_for(label, has)
    if config.gpus is None:
        return plan, has
    if not plan.gpus:
        fix = "leave it out, or run this on a node that has a GPU"
        rule = "left out where no GPU is there to measure on"
        raise ValueError(complain("gpus", rule, config.gpus, fix))
    wanted = with_gpus(has, config.gpus)
    return plan_for(label, wanted), wanted


def with_gpus(cluster: Cluster, gpus: int) -> Cluster:
    """Nodes like the one with the most GPUs, as many as it takes to have `gpus`; the last may be
    a part of one.
    """
    like = max(cluster.nodes, key=lambda node: node.get("GPU", 0.0))
    nodes, left = [], float(gpus)
    while left > 0:
        part = min(1.0, left / like["GPU"])
        amounts = ("CPU", "GPU")
        nodes.append({k: v * part if k in amounts else v for k, v in like.items()})
        left -= like["GPU"]
    return Cluster(tuple(nodes))


def _this_machine(config: EstimateConfig) -> Cluster:
    """What a Ray that `label` starts here would offer."""
    node = {"CPU": float(config.ray.num_cpus or _cpus())}
    if torch.cuda.is_available():
        node["GPU"] = float(torch.cuda.device_count())
    return Cluster((node,))


def _cpus() -> int:
    """CPUs as Ray counts them: in a container, those that it may use."""
    try:
        from ray._private.utils import get_num_cpus  # no stable interface

        return max(1, int(get_num_cpus()))
    except Exception:  # whatever a Ray of another version raises
        return os.cpu_count() or 1


def _numbers(
    config: EstimateConfig,
    label: LabelConfig,
    measured: Measured,
    plan: Plan,
    cluster: Cluster,
    todo: int,
) -> dict[str, Any]:
    """All that follows from the sample."""
    work = Work(
        images=todo,
        plan=plan,
        cpus=cluster.total("CPU"),
        gpus_asked=config.gpus,
        in_flight=label.actors.in_flight,
        flush_s=label.actors.flush_s,
        price=config.price,
    )
    numbers = forecast(measured, work)
    size_HW2 = np.array(measured.size_hw)
    order = np.argsort(size_HW2.prod(axis=1), kind="stable")
    middle, largest = (size_HW2[order[at]] for at in ((len(order) - 1) // 2, -1))
    return {
        "sample": {
            "images": len(measured.wall_s["sam"]),
            "median_wh": middle[::-1].tolist(),
            "largest_wh": largest[::-1].tolist(),
            "segments": float(np.mean(measured.segments)),
            "failed": measured.failed,
        },
        "device": {
            "name": measured.device,
            "threads": measured.threads,
            "images_at_once": measured.images_at_once,
            "start_s": measured.start_s,
        },
        "pool": {"actors": work.actors, "gpus": work.gpus, "cpus": work.cpus},
        "price": config.price,
        **numbers,
        "notes": list(_notes(config, measured, work, numbers)),
    }


def _notes(
    config: EstimateConfig, measured: Measured, work: Work, numbers: Mapping[str, Any]
) -> Iterator[str]:
    """What a reader of the numbers should know."""
    sampled, at_once = len(measured.wall_s["sam"]), measured.images_at_once
    if (times := numbers["slowed"]) > BUSY:
        quiet = numbers["hours"]["wall"]["mid"] / times
        told = f"other programs were at work: a step took {times:.1f} times its own CPU seconds"
        yield f"{told}; on a quiet machine count on {quiet * 3600:,.0f} s ({quiet:.2g} h)"
    if sampled < min(at_once, work.in_flight, work.images):
        least = min(at_once, work.in_flight)
        yield f"{least} images go through SAM at once: --sample {2 * least} tells the pace better"
    elif sampled < min(10, work.images):
        yield "the sample is small, and so the interval rough: give a larger --sample"
    if numbers["hours"]["wall"]["mid"] < SHORT_H:
        yield "the start of Ray and of its processes, some ten to sixty seconds, comes on top"
    if 0 < work.plan.gpus < 1:
        yield "actors that share a GPU are counted as one: what sharing gains was not measured"
    if work.gpus > work.actors * max(work.plan.gpus, 1e-9):
        used = work.actors * work.plan.gpus
        yield f"{used:g} of {work.gpus:g} GPUs will be used: see actors.max and actors.in_flight"
    limit = config.max_errors
    if limit is not None and numbers["failures"]["mid"] > limit:
        yield f"more images are likely to fail than max_errors, {limit}: the run would stop"
