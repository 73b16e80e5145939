"""What a cluster is made of, and what its autoscaler may still add to it.

What enters: a connected Ray. What leaves: a `Cluster`, which the planning of actors (session) and
of training workers (crew) goes by.

Ray tells every driver which nodes are up and whether an autoscaler gave them their types. Which
nodes might be started it tells nobody as such. Two places may have it: the cluster's own settings
in its control store, where the platform puts them there, and on the head, where `zsplg submit` lets
drivers run, the file that `ray up` leaves. Where both are silent, `Cluster.more` is None.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.util.client import ray as client

from zsplg_ray.settings import complain

log = logging.getLogger(__name__)

Node = Mapping[str, float]
"""What a node has: {"CPU": 8.0, "GPU": 2.0, "label_node": 1.0}."""

HEAD_CONFIG = "~/ray_bootstrap_config.yaml"
"""Where `ray up` leaves the cluster's settings on the head."""
MANY = 1000
"""Nodes of a type to plan with where there is no upper bound."""
STATUS_TIMEOUT_S = 10
HEAD = "node:__internal_head__"
"""Ray's own resource that the head has."""
ROUNDING = 1e-9
"""Amounts that differ by less are the same."""


@dataclass(frozen=True)
class NodeType:
    """A kind of node that an autoscaler starts, at most `most` of it."""

    name: str
    has: Node
    most: int


@dataclass(frozen=True)
class Cluster:
    """A cluster's nodes."""

    up: tuple[Node, ...]
    """What each node has that is up now."""
    grows: bool = False
    """Whether there is an autoscaler, which may start more."""
    more: tuple[Node, ...] | None = ()
    """What it may start, node for node; None: that cannot be learnt."""
    bound: int | None = None
    """Most nodes at a time beside the head, of all types together; None: all of `nodes`."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes that are known of: those that are up, then those that may be started."""
        return self.up + (self.more or ())

    @property
    def size(self) -> int:
        """How many nodes there can be at a time."""
        return round(self._at_best(lambda node: 1.0))

    @property
    def known(self) -> bool:
        """Whether there can be no nodes beyond `nodes`."""
        return self.more is not None

    def total(self, name: str) -> float:
        """How much of a resource there can be at a time."""
        return self._at_best(lambda node: node.get(name, 0.0))

    def largest(self, name: str) -> float:
        """How much of a resource one node can have."""
        return max((node.get(name, 0.0) for node in self.nodes), default=0.0)

    def room(self, need: Mapping[str, float]) -> int:
        """How many processes with that need it can hold, see `room`."""
        return round(self._at_best(lambda node: room([node], need)))

    def having(self, fits: Callable[[Node], bool]) -> Cluster:
        """The part of it whose nodes fit."""
        more = None if self.more is None else tuple(filter(fits, self.more))
        return replace(self, up=tuple(filter(fits, self.up)), more=more)

    def for_cpus(self) -> Cluster:
        """Where processes without a GPU stand: no node with GPUs is to be started for them."""
        plain = self.having(lambda node: not node.get("GPU"))
        return plain if self.grows and plain.total("CPU") else self

    def _at_best(self, worth: Callable[[Node], float]) -> float:
        """Of the head, and of the best others that there can be: idle nodes make place for them."""
        heads = [worth(node) for node in self.nodes if HEAD in node]
        others = [worth(node) for node in self.nodes if HEAD not in node]
        return sum(heads) + sum(sorted(others, reverse=True)[: self.bound])


def room(nodes: Iterable[Node], need: Mapping[str, float]) -> int:
    """How many processes with that need the nodes hold; each stands on one node, on whole GPUs or
    on a part of one GPU. Needing nothing counts as no room.
    """
    count = 0
    for node in nodes:
        fitting = []
        for name, amount in need.items():
            have = node.get(name, 0.0)
            if name == "GPU" and 0 < amount < 1:
                fitting.append(math.floor(have + ROUNDING) * math.floor(1 / amount + ROUNDING))
            elif amount:
                fitting.append(math.floor(have / amount + ROUNDING))
        count += min(fitting, default=0)
    return count


def share(cluster: Cluster, num: int, need: Mapping[str, float], most: float = math.inf) -> float:
    """CPUs of each of `num` processes: as many whole ones as all of them find room with, else an
    even share (or one, where there may be nodes that are not known).

    Args:
        cluster: The nodes that they may stand on.
        num: How many there are to be.
        need: What else each takes, amount by name.
        most: CPUs that none is to go beyond.
    """
    have = cluster.total("CPU")
    each = min(have / num, cluster.largest("CPU"), most)
    for cpus in range(math.floor(each + ROUNDING), 0, -1):
        if cluster.room({**need, "CPU": cpus}) >= num:
            return float(cpus)
    if not cluster.known or not have:
        return 1.0
    return float(math.floor(each)) if each >= 1 else max(math.floor(each * 100) / 100, 0.01)


def standing_room(setting: str, resources: Mapping[str, float], cluster: Cluster) -> Cluster:
    """The part of the cluster that has the custom resources which a process asks for.

    Args:
        setting: Name of the setting that asks for them.
        resources: Custom resources, amount by name.
        cluster: Where.

    Raises: ValueError that names the resources there are, if no node has them nor can be started.
    """
    fitting = cluster.having(
        lambda node: all(node.get(n, 0.0) + ROUNDING >= amount for n, amount in resources.items())
    )
    if fitting.nodes or not resources:
        return fitting
    asked = told_need(resources)
    there = sorted({name for node in cluster.nodes for name in node if _is_custom(name)})
    if not cluster.known:
        told = "%s: %s asked for, no node that is up has it; waiting for the cluster"
        log.warning(told, setting, asked)
        return fitting
    rule = f"what one node has ({', '.join(there)})" if there else "empty: no node has any"
    fix = "name those of the node type, see available_node_types in cluster.yaml"
    raise ValueError(complain(setting, rule, asked, fix))


def look_around(local: bool) -> Cluster:
    """The cluster we are connected to.

    Args:
        local: Whether it is a Ray of our own on this machine, which has no autoscaler.
    """
    up = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    if local:
        return Cluster(up)
    names = _type_names(cluster_status())
    if names is None:
        return Cluster(up, grows=True, more=None)
    if not names:
        return Cluster(up)
    types, bound = _published_types(), None
    if types is None:
        types, bound = _types_on_head(names) or (None, None)
    if types is None:
        return Cluster(up, grows=True, more=None)
    return Cluster(up, grows=True, more=_startable(types, names), bound=bound)


def cluster_status() -> Any | None:
    """What the autoscaler last told the cluster (`ray.autoscaler.v2.schema.ClusterStatus`).

    None where that cannot be had: this is no stable interface of Ray's, and a driver that is
    connected by `ray://` does not reach it.
    """
    if client.is_connected():
        return None
    try:
        from ray.autoscaler.v2.sdk import get_cluster_status

        address = ray.get_runtime_context().gcs_address
        return get_cluster_status(address, timeout=STATUS_TIMEOUT_S)
    except Exception:  # whatever a Ray of another version raises
        log.debug("the cluster's status cannot be read", exc_info=True)
        return None


def _type_names(status: Any | None) -> Counter[str] | None:
    """How many nodes of each type are up; none where no autoscaler is at work, None if that cannot
    be learnt. Names alone are no sign of one: some platforms give them to a fixed cluster too.
    """
    if status is None:
        return None
    try:
        nodes = [*status.active_nodes, *status.idle_nodes]
        names = Counter(n.ray_node_type_name for n in nodes if n.ray_node_type_name)
        without = {f"node_{n.node_id}" for n in nodes}  # the name of a node that nobody has named
        reports = status.stats.autoscaler_version not in (None, "0")
    except Exception:  # see cluster_status
        log.debug("the cluster's status cannot be understood", exc_info=True)
        return None
    older = _older_names(without)
    if not reports and not older:
        return Counter()
    return Counter({k: v for k, v in names.items() if k not in without}) or older


def _older_names(without: set[str]) -> Counter[str]:
    """The same from what an autoscaler before version 2 reports."""
    try:
        from ray.experimental.internal_kv import _internal_kv_get

        report = json.loads(_internal_kv_get("__autoscaling_status") or b"{}")
        names = report.get("autoscaler_report", {}).get("active_nodes", {})
        return Counter({str(k): int(v) for k, v in names.items() if k not in without})
    except Exception:  # see cluster_status
        log.debug("the older autoscaler's report cannot be read", exc_info=True)
        return Counter()


def _published_types() -> list[NodeType] | None:
    """Node types from the control store, where the platform has put them there."""
    try:
        from ray._private.state import state  # as Ray Data does

        config = state.get_cluster_config()
        groups = list(config.node_group_configs) if config else []
        types = [
            NodeType(g.name, dict(g.resources), g.max_count if g.max_count >= 0 else MANY)
            for g in groups
        ]
    except Exception:  # see cluster_status
        log.debug("the cluster's node types cannot be read", exc_info=True)
        return None
    return types or None


def _types_on_head(
    names: Iterable[str], path: str = HEAD_CONFIG
) -> tuple[list[NodeType], int] | None:
    """Node types from the file that `ray up` leaves on the head, if that is this machine, and how
    many nodes of all these types together there may be.

    A file that does not know the types of the nodes that are up is another cluster's.
    """
    try:
        config = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
        types, head = config["available_node_types"], config["head_node_type"]
        if not set(names) <= set(types):
            return None
        bound = int(config.get("max_workers", MANY))
        workers = [
            NodeType(
                name,
                {k: float(v) for k, v in (what.get("resources") or {}).items()},
                min(int(what.get("max_workers", bound)), bound),
            )
            for name, what in types.items()
            if name != head
        ]
        return workers, bound
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None


def _startable(types: Iterable[NodeType], up: Mapping[str, int]) -> tuple[Node, ...]:
    """The nodes that may still be started, node for node."""
    return tuple(
        type_.has for type_ in types for _ in range(min(type_.most, MANY) - up.get(type_.name, 0))
    )


def _is_custom(name: str) -> bool:
    """Whether a resource is one that the cluster's makers have thought up."""
    return name not in {"CPU", "GPU", "memory", "object_store_memory"} and ":" not in name


def told_need(need: Mapping[str, float]) -> str:
    """What a process asks for, in one line: "GPU 1, label_node 0.001"."""
    return ", ".join(told_amount(name, amount) for name, amount in need.items() if amount)


def told_amount(name: str, amount: float) -> str:
    """How much of a resource, in words; Ray counts memory in bytes."""
    return f"{name} {amount / 2**30:.3g} GiB" if name == "memory" else f"{name} {amount:g}"
