"""`zsplg doctor`: what this machine can do and what to mend, before a long job finds out.

What enters: which models and places are meant to be used. What leaves: findings, each ok, warn or
fail, with the fix. Nothing is downloaded and nothing is left behind.

What may hang (a store, a cluster, a server) is looked at beside the rest, each for some seconds at
most. Only what `label` cannot do without may fail; the rest warns.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import ray

from zsplg_ray.cluster.doctor import cluster, machine, models, places
from zsplg_ray.cluster.doctor.finding import Finding, met
from zsplg_ray.cluster.session import cluster_address
from zsplg_ray.config import DoctorConfig

Look = Callable[[DoctorConfig], Finding]

NEEDED: dict[str, Look] = {
    "packages": machine.packages,
    "machine": machine.machine,
    "gpu": machine.gpu,
    "sam": models.sam,
    "memory": models.memory,
    "clip": models.clip,
    "cache": models.cache,
    "storage": places.storage,
    "ray": cluster.ray_here,
}
"""What `label` cannot do without."""
HELPFUL: dict[str, Look] = {
    "shm": machine.shared_memory,
    "files": machine.open_files,
    "token": cluster.token,
    "dashboard": cluster.dashboard,
    "sent": places.sent,
    "mlflow": places.mlflow,
}
"""What other verbs want, or what is slow or lost without it."""
BESIDE = {"storage", "dashboard", "sent", "mlflow"}
"""Looks that wait for others, or for a disk; they touch nothing that is shared."""


def examine(config: DoctorConfig) -> list[Finding]:
    """Look at everything; each finding has what, state, told and fix."""
    looks = NEEDED | HELPFUL
    beside = set(BESIDE)
    if cluster_address(config.ray) != "local" and not ray.is_initialized():
        looks["ray"] = cluster.ray_there
        beside.add("ray")
    with ThreadPoolExecutor(len(beside)) as pool:
        waiting = {what: pool.submit(_look, what, looks[what], config) for what in beside}
        here = [what for what in looks if what not in beside]
        found = {what: _look(what, looks[what], config) for what in here}
        found |= {what: later.result() for what, later in waiting.items()}
    return [{"what": what, **found[what]} for what in looks]


def _look(what: str, look: Look, config: DoctorConfig) -> Finding:
    try:
        found = look(config)
    except Exception as e:  # a finding, not a reason to stop looking
        found = met(e)
    if found["state"] == "fail" and what not in NEEDED:
        found["state"] = "warn"
    return found
