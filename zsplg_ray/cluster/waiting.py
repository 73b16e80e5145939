"""Says what a job waits for where Ray would wait in silence.

What enters: what the job's processes need, and how far the job is. What leaves: a line in the log
for each minute in which nothing moves while such a process has no place. It names what is missing,
what is free, and which nodes are being started or have failed to start.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from zsplg_ray.cluster.nodes import cluster_status, told_amount, told_need

log = logging.getLogger(__name__)

EVERY_S = 60.0
_CLOSE = 1e-6


@contextlib.contextmanager
def telling_of_waits(
    needs: Sequence[Mapping[str, float]], moved: Callable[[], object], every_s: float = EVERY_S
) -> Iterator[None]:
    """Watch over a job while it runs.

    Args:
        needs: What each kind of its processes asks of Ray: {"GPU": 1.0, "label_node": 0.001}.
        moved: Something that changes whenever the job gets on.
        every_s: Seconds without a change until the first line, and from line to line.
    """
    over = threading.Event()
    watch = threading.Thread(
        target=_watch, args=(needs, moved, every_s, over), name="waiting", daemon=True
    )
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def _watch(
    needs: Sequence[Mapping[str, float]],
    moved: Callable[[], object],
    every_s: float,
    over: threading.Event,
) -> None:
    last, since, told = moved(), time.monotonic(), 0
    while not over.wait(every_s / 12):
        now = moved()
        if now != last:
            last, since, told = now, time.monotonic(), 0
        waited = time.monotonic() - since
        if waited < every_s * (told + 1):
            continue
        told += 1
        try:
            missing = what_is_missing(cluster_status(), needs)
        except Exception:  # the status of a Ray of another version may be anything
            log.debug("what the job waits for cannot be read", exc_info=True)
            continue
        if missing is not None:
            log.warning("waiting for resources since %.0f s: %s", waited, missing)


def what_is_missing(status: Any | None, needs: Sequence[Mapping[str, float]]) -> str | None:
    """One line about those of `needs` that find no place; None if all do, or nobody knows.

    Args:
        status: As `nodes.cluster_status` gives it.
        needs: What each kind of process asks for.
    """
    if status is None:
        return None
    waiting = _waiting(status, needs)
    if not waiting:
        return None
    told = [
        ", ".join(f"{count} x ({told_need(need)})" for need, count in waiting) + " have no place"
    ]
    names = sorted({name for need, _ in waiting for name, amount in need.items() if amount})
    have, free = status.total_resources(), status.available_resources()
    there = [
        f"{told_amount(n, free.get(n, 0.0))} of {told_amount(n, have[n])}"
        for n in names
        if have.get(n)
    ]
    lacking = [n for n in names if not have.get(n)]
    if there:
        told.append(f"free: {', '.join(there)}")
    if lacking:
        told.append(f"no node has {', '.join(lacking)}")
    for what, launches in (
        ("being started", status.pending_launches),
        ("failed to start", status.failed_launches),
    ):
        counts: Counter[str] = Counter()
        for launch in launches:
            reason = f" ({' '.join(launch.details.split())[:200]})" if launch.details else ""
            counts[f"{launch.ray_node_type_name}{reason}"] += launch.count
        if counts:
            told.append(f"{what}: {', '.join(f'{n} x {name}' for name, n in counts.items())}")
    return "; ".join(told)


def _waiting(
    status: Any, needs: Sequence[Mapping[str, float]]
) -> list[tuple[Mapping[str, float], int]]:
    """Those of `needs` that the cluster has noted as without a place, and how often."""
    demands = status.resource_demands
    bundles = [
        (entry.bundle, entry.count)
        for demand in (*demands.ray_task_actor_demand, *demands.placement_group_demand)
        for entry in demand.bundles_by_count
    ]
    found = []
    for need in needs:
        count = sum(n for bundle, n in bundles if _same(bundle, need))
        if count:
            found.append((need, count))
    return found


def _same(bundle: Mapping[str, float], need: Mapping[str, float]) -> bool:
    """Whether a demand is one of ours; Ray leaves out what is zero."""
    names = {name for name, amount in (*bundle.items(), *need.items()) if amount}
    return all(abs(bundle.get(name, 0.0) - need.get(name, 0.0)) < _CLOSE for name in names)
