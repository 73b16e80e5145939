"""Ray: where it comes from, and how much of it an actor takes.

What enters: `RayConfig`, `ActorsConfig`, and the cluster as `nodes` sees it. What leaves: a session
that is shut down by whoever started it, and a `Plan` of actors that fits the cluster, or an error
instead of the silent wait for resources that Ray would do.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.util.client import ray as client

from zsplg_ray.cluster.headwatch import watched_head
from zsplg_ray.cluster.hush import start_line_held_back
from zsplg_ray.cluster.loopback import loopback_only
from zsplg_ray.cluster.nodes import ROUNDING, Cluster, share, standing_room
from zsplg_ray.config import ActorsConfig, RayConfig
from zsplg_ray.settings import WorkError, complain
from zsplg_ray.signals import sigterm_kept

log = logging.getLogger(__name__)

KNOCK_S = 10.0
"""How long a cluster may take to answer at all."""


def cluster_address(config: RayConfig) -> str:
    """The cluster's address; "local" is a Ray of our own, which cannot grow."""
    return config.address or os.environ.get("RAY_ADDRESS") or "local"


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Use the running session if there is one, else connect or start Ray, and end it afterwards.

    Raises:
        ValueError: The address cannot be reached.
        WorkError: Ray cannot be started here.
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
        with contextlib.ExitStack() as stack:
            stack.enter_context(sigterm_kept())
            if address == "local":  # of a cluster, others must reach this driver
                stack.enter_context(loopback_only())
            else:
                _knock(address)
            if not talk:
                stack.enter_context(start_line_held_back())
            ray.init(
                address=address,
                log_to_driver=talk,
                logging_level=logging.INFO if talk else logging.ERROR,
                **local,  # type: ignore[arg-type]
            )
    except Exception as e:  # Ray raises plain Exceptions too, where its start takes too long
        raise _no_session(address, e) from e
    try:
        with contextlib.ExitStack() as stack:
            if talk:  # Ray prints what workers print; stdout is for results
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            if not client.is_connected():  # from afar nobody but its proxy is to be reached
                stack.enter_context(watched_head(ray.get_runtime_context().gcs_address))
            yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Whether anybody answers there, before Ray tries for minutes. Raises: OSError if nobody does.

    `address`: HOST:PORT, `ray://HOST:PORT`, or a word such as `auto`, which is Ray's to find.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), KNOCK_S).close()


def _no_session(address: str, error: Exception) -> Exception:
    """What to say of a Ray that cannot be connected to, or started."""
    why = first_line(error)
    if address == "local":
        return WorkError(f"Ray could not be started here: {why}")
    if isinstance(error, AuthenticationError):
        rule = "a Ray cluster that takes our token"
        fix = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to its token"
    else:
        rule = "a running Ray cluster"
        fix = f"start it with `ray start --head`, or leave it out to start Ray here ({why})"
    return ValueError(complain("ray.address", rule, address, fix))


def quiet_ray_data() -> None:
    """No progress bars and no log of Ray Data, which are for its developers, unless we debug."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not log.isEnabledFor(logging.DEBUG):
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Plan:
    """What the pool of actors takes from the cluster."""

    min_actors: int
    max_actors: int
    gpus: float
    cpus: float
    decode_cpus: float
    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom resources of the nodes that an actor may stand on, amount by name."""
    grows: bool = False
    """Whether the cluster starts nodes for actors that have no place."""

    @property
    def threads(self) -> int:
        """Threads that torch may use in an actor; on a GPU they only feed it."""
        return max(1, math.floor(self.cpus))

    @property
    def need(self) -> dict[str, float]:
        """What an actor asks of Ray."""
        return {"CPU": self.cpus, "GPU": self.gpus, **self.resources}

    def pool(self, blocks: int) -> tuple[int, int]:
        """Fewest and most actors for so many blocks of work, of which each takes one at a time.

        An actor without a place is what makes a cluster grow, and Ray Data only asks for as many
        as there is room for: there the pool has its full size from the start.
        """
        most = max(1, min(self.max_actors, blocks))
        return (most if self.grows else min(self.min_actors, most)), most


def last_line(error: BaseException) -> str:
    """Kind and last line of one of Ray's long messages; of what our code raised, if it tells."""
    text, advice, _ = str(error).partition("\nFailed to apply UDF transform")  # of Ray Data
    chain = text.split("\nThe above exception was the direct cause of")
    if len(chain) > 1 and "UserCodeException" in chain[-1]:
        chain.pop()
    lines = chain[-1].strip().splitlines() or ["no message"]
    if advice:  # before it the last line of a traceback, such as `package.module.Kind: message`
        return re.sub(r"^[\w.]*\.(?=\w+(:|$))", "", lines[-1])
    return f"{type(error).__name__}: {lines[-1]}"


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def plan_actors(config: ActorsConfig, cluster: Cluster) -> Plan:
    """Fill in what `config` leaves open and check that the cluster can hold it.

    Where the cluster grows, what counts are the nodes that it may come to have. Where these are
    not known, what is missing is only warned of.

    Raises: ValueError that names the setting which does not fit.
    """
    where = standing_room("actors.resources", config.resources, cluster)
    gpus = config.gpus if config.gpus is not None else float(where.total("GPU") >= 1)
    fitting = where.room({"GPU": gpus, **config.resources}) if gpus else 1
    most = config.max if config.max is not None else max(config.min, fitting)
    decode = config.decode_cpus
    if cluster.known:
        decode = min(decode, max(cluster.total("CPU") / 2, 0.01))
    cpus = config.cpus
    if cpus is None:
        free = cluster.for_cpus().total("CPU") - decode
        cpus = 0.0 if gpus else share(where.for_cpus(), most, config.resources, free / most)
    plan = Plan(config.min, most, gpus, cpus, decode, config.resources, cluster.grows)
    _check(plan, where, cluster)
    _tell(config, plan, cluster)
    return plan


def _check(plan: Plan, where: Cluster, cluster: Cluster) -> None:
    """The actors that must run find room `where` they may stand. Raises: ValueError."""
    least, cpus, gpus = plan.min_actors, plan.cpus, plan.gpus
    whose = "the cluster's"
    needs = [("actors.gpus", least * gpus, where.total("GPU"), "GPUs", whose)]
    asked_cpus = least * cpus + plan.decode_cpus
    needs += [("actors.cpus", asked_cpus, cluster.total("CPU"), "CPUs", whose)]
    for name, need, unit in (("actors.gpus", gpus, "GPUs"), ("actors.cpus", cpus, "CPUs")):
        needs += [(name, need, where.largest(unit[:-1]), unit, "the largest node's")]
    needs += [("actors.min", least, where.room(plan.need), "actors", "the")]
    for name, need, have, unit, whose in needs:
        if need <= have + ROUNDING:
            continue
        asked = f"{need:g} {unit}"
        if whose == "the cluster's":
            asked += f" in all ({least} actors and one image-reading task)"
        if cluster.known:
            fix = f"lower {name}, actors.min or actors.decode_cpus, or add a node"
            each = " that find room, each on one node" if unit == "actors" else ""
            raise ValueError(complain(name, f"within {whose} {have:g} {unit}{each}", asked, fix))
        log.warning("%s: %s asked for, %g there now; waiting for the cluster", name, asked, have)


def _tell(config: ActorsConfig, plan: Plan, cluster: Cluster) -> None:
    """What was planned on a cluster that grows, in one line, and how to change it."""
    if not cluster.grows:
        return
    each = f"{plan.gpus:g} GPU" if plan.gpus else f"{plan.cpus:g} CPU"
    told = f"up to {plan.max_actors} actors of {each} on a cluster that grows"
    if cluster.known:
        log.info("%s from %d to %d nodes", told, len(cluster.up), cluster.size)
        return
    guessed = [("actors.gpus", config.gpus, "1"), ("actors.max", config.max, "N")]
    left = " ".join(f"--{name} {value}" for name, given, value in guessed if given is None)
    if left:
        why = "which nodes it may start is not known here, so this follows from those that are up"
        log.warning("%s; %s: set %s to have it start more", told, why, left)
