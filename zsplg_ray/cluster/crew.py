"""How many training workers there are and what each takes, so that the cluster can hold them.

What enters: `WorkersConfig`, and the cluster as `nodes` sees it. What leaves: a `Crew`, or an error
instead of the silent wait for resources that Ray would do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from zsplg_ray.cluster.nodes import Cluster, room, share, standing_room
from zsplg_ray.config import TrainConfig, WorkersConfig
from zsplg_ray.settings import complain

log = logging.getLogger(__name__)

MAX_CPUS_WITH_GPU = 8
"""CPUs beyond these would not make a GPU's images come sooner."""


@dataclass(frozen=True)
class Crew:
    """The workers of a run."""

    num: int
    least: int | None
    """Fewest to go on with where nodes come and go; None: always `num`."""
    gpus: float
    cpus: float
    custom: Mapping[str, float] = field(default_factory=dict)
    """Custom resources of the nodes that a worker may stand on, amount by name."""

    @property
    def threads(self) -> int:
        """Threads that torch may use in a worker."""
        return max(1, math.floor(self.cpus))

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for each worker."""
        gpus = {"GPU": self.gpus} if self.gpus else {}
        return {"CPU": self.cpus} | gpus | dict(self.custom)

    @property
    def backend(self) -> str:
        """How workers exchange gradients; nccl wants whole GPUs."""
        return "nccl" if self.gpus >= 1 else "gloo"


def plan_crew(config: WorkersConfig, cluster: Cluster, device: str) -> Crew:
    """Fill in what `config` leaves open and check that the cluster can hold it.

    Where the cluster grows, workers may be as large as the nodes that it may come to have allow.
    How many there are follows from the GPUs that are up: nobody asked for more machines.

    Args:
        config: The workers asked for.
        cluster: Where. What is missing is only warned of if not all its nodes are known.
        device: auto, cpu or cuda.

    Raises: ValueError that names the setting which does not fit.
    """
    where = standing_room("workers.resources", config.resources, cluster)
    gpus = config.gpus
    if gpus is None:
        gpus = float(where.total("GPU") >= 1 and device != "cpu")
    if device == "cpu" and gpus:
        raise ValueError(complain("workers.gpus", "0 with --device cpu", gpus, "leave it out"))
    if device == "cuda" and not gpus:
        fix = "set --workers.gpus, or --device cpu"
        raise ValueError(complain("device", "cpu where workers get no GPU", "cuda", fix))
    if gpus > 1 and gpus % 1:
        rule = "a whole number where it is over 1"
        raise ValueError(complain("workers.gpus", rule, gpus, "give a worker whole GPUs"))
    num = config.num
    if num is None:
        fitting = room(cluster.up, {"GPU": gpus, **config.resources}) if gpus else 1
        num = max(fitting, config.min or 1)
        if gpus and cluster.grows:
            told = "workers.num: %d, after the GPUs that are up; set it to have the cluster grow"
            log.warning(told, num)
    cpus = config.cpus
    if cpus is None:
        need, most = {"GPU": gpus, **config.resources}, MAX_CPUS_WITH_GPU if gpus else math.inf
        cpus = share(where if gpus else where.for_cpus(), num, need, most)
        if not cluster.known:
            told = "workers.cpus: %g, as nodes that may be started are not known here; set it"
            log.warning(told, cpus)
    crew = Crew(num, config.min, gpus, cpus, config.resources)
    _check_room(crew, where)
    return crew


def check_batches(config: TrainConfig, crew: Crew) -> None:
    """Every part of every worker's share of a step holds enough images. Raises: ValueError.

    One labelled image is enough beside an unlabelled one; alone it has no batch statistics. CutMix
    with another image of the batch takes two: with one, it is told that there will be none.
    """
    train = config.train
    least = crew.num * train.accumulate
    batches = {"train.batch_labeled": train.batch_labeled}
    if config.unlabeled is not None:
        batches["train.batch_unlabeled"] = train.batch_unlabeled
    for name, batch in batches.items():
        if batch < least:
            rule = f">= {least}, one for each of {crew.num} workers"
            rule += f" times train.accumulate ({train.accumulate})" if train.accumulate > 1 else ""
            fix = "raise it, or lower workers.num or train.accumulate"
            raise ValueError(complain(name, rule, batch, fix))
    alone = config.unlabeled is None and train.batch_labeled < 2 * least
    if alone and not config.student.frozen_bn:
        rule = f">= {2 * least}, two in each part of a step, for batch statistics"
        fix = "raise it, or set --student.frozen-bn"
        raise ValueError(complain("train.batch_labeled", rule, train.batch_labeled, fix))
    mixes = config.unlabeled is not None and config.augment.cutmix > 0
    if mixes and not config.unimatch.same_image and train.batch_unlabeled < 2 * least:
        log.warning(
            "train.batch_unlabeled %d: some parts of a step have one image and no other to paste "
            "from, so no CutMix; raise it, or set --unimatch.same-image",
            train.batch_unlabeled,
        )


def _check_room(crew: Crew, cluster: Cluster) -> None:
    """As many workers as must run find room. Raises: ValueError."""
    least = crew.least or crew.num
    name, unit, each = "workers.cpus", "CPUs", crew.cpus
    if crew.gpus and cluster.room({"GPU": crew.gpus, **crew.custom}) < least:
        name, unit, each = "workers.gpus", "GPUs", crew.gpus
    elif cluster.room(crew.resources) >= least:
        return
    have = cluster.total(unit[:-1])
    there = f"on {cluster.size} nodes" if cluster.size > 1 else "there are"
    rule = f"within the {have:g} {unit} {there}"
    asked = f"{each:g} for each of {least} workers"
    if cluster.known:
        fix = f"lower {name} or workers.num, or add a node"
        raise ValueError(complain(name, rule, asked, fix))
    told = "%s: %s asked for, %g %s there now; waiting for the cluster"
    log.warning(told, name, asked, have, unit)
