"""How many training workers there are and what each takes, so that the cluster can hold them.

What enters: `WorkersConfig`, and what the cluster's nodes have. What leaves: a `Crew`, or an error
instead of the silent wait for resources that Ray would do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zsplg_ray.config import TrainConfig, WorkersConfig
from zsplg_ray.settings import complain

log = logging.getLogger(__name__)

Node = Mapping[str, float]
"""What a node has: {"CPU": 8.0, "GPU": 2.0}."""

MAX_CPUS_WITH_GPU = 8
"""CPUs beyond these would not make a GPU's images come sooner."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Crew:
    """The workers of a run."""

    num: int
    least: int | None
    """Fewest to go on with where nodes come and go; None: always `num`."""
    gpus: float
    cpus: float

    @property
    def threads(self) -> int:
        """Threads that torch may use in a worker."""
        return max(1, math.floor(self.cpus))

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for each worker."""
        gpus = {"GPU": self.gpus} if self.gpus else {}
        return {"CPU": self.cpus} | gpus

    @property
    def backend(self) -> str:
        """How workers exchange gradients; nccl wants whole GPUs."""
        return "nccl" if self.gpus >= 1 else "gloo"


def plan_crew(config: WorkersConfig, nodes: Sequence[Node], device: str, growing: bool) -> Crew:
    """Fill in what `config` leaves open and check that the cluster can hold it.

    Args:
        config: The workers asked for.
        nodes: What each node has now.
        device: auto, cpu or cuda.
        growing: Whether the cluster may grow (an autoscaler): then what is missing is only warned
            of.

    Raises: ValueError that names the setting which does not fit.
    """
    have_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    gpus = config.gpus
    if gpus is None:
        gpus = float(have_gpus >= 1 and device != "cpu")
    if device == "cpu" and gpus:
        raise ValueError(complain("workers.gpus", "0 with --device cpu", gpus, "leave it out"))
    if device == "cuda" and not gpus:
        fix = "set --workers.gpus, or --device cpu"
        raise ValueError(complain("device", "cpu where workers get no GPU", "cuda", fix))
    if gpus > 1 and gpus % 1:
        rule = "a whole number where it is over 1"
        raise ValueError(complain("workers.gpus", rule, gpus, "give a worker whole GPUs"))
    fitting = _capacity(nodes, 0.0, gpus) if gpus else 1
    num = config.num if config.num is not None else max(fitting, config.min or 1)
    cpus = config.cpus if config.cpus is not None else _share(nodes, num, gpus, growing)
    crew = Crew(num, config.min, gpus, cpus)
    _check_room(crew, nodes, growing)
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


def _capacity(nodes: Sequence[Node], cpus: float, gpus: float) -> int:
    """How many workers of that size the nodes hold; each stands on one node."""
    total = 0
    for node in nodes:
        wanted = ((cpus, node.get("CPU", 0.0)), (gpus, node.get("GPU", 0.0)))
        rooms = [math.floor(have / need + _ROUNDING) for need, have in wanted if need]
        total += min(rooms, default=0)
    return total


def _share(nodes: Sequence[Node], num: int, gpus: float, growing: bool) -> float:
    """CPUs of a worker: as many whole ones as `num` workers can have, else a part of one."""
    have = sum(node.get("CPU", 0.0) for node in nodes)
    share = have / num
    if gpus:
        share = min(share, MAX_CPUS_WITH_GPU)
    for cpus in range(math.floor(share + _ROUNDING), 0, -1):
        if _capacity(nodes, cpus, gpus) >= num:
            return float(cpus)
    return 1.0 if growing or not have else max(math.floor(share * 100) / 100, 0.01)


def _check_room(crew: Crew, nodes: Sequence[Node], growing: bool) -> None:
    """As many workers as must run find room. Raises: ValueError."""
    least = crew.least or crew.num
    name, unit, each = "workers.cpus", "CPUs", crew.cpus
    if crew.gpus and _capacity(nodes, 0.0, crew.gpus) < least:
        name, unit, each = "workers.gpus", "GPUs", crew.gpus
    elif _capacity(nodes, crew.cpus, crew.gpus) >= least:
        return
    have = sum(node.get(unit[:-1], 0.0) for node in nodes)
    where = f"on {len(nodes)} nodes" if len(nodes) > 1 else "there are"
    rule = f"within the {have:g} {unit} {where}"
    asked = f"{each:g} for each of {least} workers"
    if not growing:
        fix = f"lower {name} or workers.num, or add a node"
        raise ValueError(complain(name, rule, asked, fix))
    told = "%s: %s asked for, %g %s there now; waiting for the cluster"
    log.warning(told, name, asked, have, unit)
