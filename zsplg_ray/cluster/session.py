"""Ray: where it comes from, and how much of it an actor takes.

What enters: `RayConfig`, `ActorsConfig`. What leaves: a session that is shut down by whoever
started it, and a `Plan` of actors that fits the cluster, or an error instead of the silent wait for
resources that Ray would do.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ray

from zsplg_ray.config import ActorsConfig, RayConfig
from zsplg_ray.settings import complain

log = logging.getLogger(__name__)


def cluster_address(config: RayConfig) -> str:
    """The cluster's address; "local" is a Ray of our own, which cannot grow."""
    return config.address or os.environ.get("RAY_ADDRESS") or "local"


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Use the running session if there is one, else connect or start Ray, and end it afterwards.

    Raises: ValueError if the address cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = cluster_address(config)
    talk = log.isEnabledFor(logging.DEBUG)
    if not talk:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    local: dict[str, object] = {}
    if address == "local":
        os.environ.setdefault("RAY_worker_niceness", "0")  # nobody else's cluster: no need to yield
        local = {"num_cpus": config.num_cpus, "include_dashboard": False}
        if config.object_store_gib is not None:
            local["object_store_memory"] = int(config.object_store_gib * 2**30)
    try:
        ray.init(
            address=address,
            log_to_driver=talk,
            logging_level=logging.INFO if talk else logging.ERROR,
            **local,  # type: ignore[arg-type]
        )
    except (ConnectionError, RuntimeError) as e:
        fix = "start it with `ray start --head`, or leave it out to start Ray here"
        raise ValueError(complain("ray.address", "a running Ray cluster", address, fix)) from e
    try:
        yield
    finally:
        ray.shutdown()


def quiet_ray_data() -> None:
    """No progress bars and no log of Ray Data, which are for its developers, unless we debug."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not log.isEnabledFor(logging.DEBUG):
        logging.getLogger("ray.data").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Plan:
    """What the pool of actors takes from the cluster."""

    min_actors: int
    max_actors: int
    gpus: float
    cpus: float
    decode_cpus: float

    @property
    def threads(self) -> int:
        """Threads that torch may use in an actor; on a GPU they only feed it."""
        return max(1, math.floor(self.cpus))


def last_line(error: BaseException) -> str:
    """Kind and last line of one of Ray's long messages."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[-1]}"


def plan_actors(
    config: ActorsConfig,
    resources: Mapping[str, float],
    growing: bool,
    largest: Mapping[str, float] | None = None,
) -> Plan:
    """Fill in what `config` leaves open and check that the cluster can hold it.

    Args:
        config: The actors asked for.
        resources: What the cluster has now: {"CPU": 8.0, "GPU": 2.0}.
        growing: Whether it may grow (an autoscaler): then what is missing is only warned of.
        largest: The most that one node has; an actor stands on one. None: there is one node.

    Raises: ValueError that names the setting which does not fit.
    """
    largest = largest or resources
    have_cpus, have_gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    gpus = config.gpus if config.gpus is not None else float(have_gpus >= 1)
    fitting = math.floor(have_gpus / gpus) if gpus else 1
    most = config.max if config.max is not None else max(config.min, fitting)
    decode = config.decode_cpus if growing else min(config.decode_cpus, max(have_cpus / 2, 0.01))
    cpus = config.cpus
    if cpus is None:
        share = min((have_cpus - decode) / most, largest.get("CPU", 0.0))
        whole = float(math.floor(share)) if share >= 1 else 1.0 if growing else max(share, 0.01)
        cpus = 0.0 if gpus else whole
    plan = Plan(config.min, most, gpus, cpus, decode)
    needs = [("actors.gpus", config.min * gpus, have_gpus, "GPUs", "the cluster's")]
    needs += [("actors.cpus", config.min * cpus + decode, have_cpus, "CPUs", "the cluster's")]
    needs += [("actors.gpus", gpus, largest.get("GPU", 0.0), "GPUs", "the largest node's")]
    needs += [("actors.cpus", cpus, largest.get("CPU", 0.0), "CPUs", "the largest node's")]
    for name, need, have, unit, whose in needs:
        if need <= have + 1e-9:
            continue
        asked = f"{need:g} {unit}"
        if whose == "the cluster's":
            asked += f" in all ({config.min} actors and one image-reading task)"
        if not growing:
            fix = f"lower {name}, actors.min or actors.decode_cpus, or add a node"
            raise ValueError(complain(name, f"within {whose} {have:g} {unit}", asked, fix))
        log.warning("%s: %s asked for, %g there now; waiting for the cluster", name, asked, have)
    return plan
