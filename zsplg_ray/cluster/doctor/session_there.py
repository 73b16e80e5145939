"""Whether a Ray cluster can be connected to. Runs in a process of its own (see child): Ray itself
would try for minutes where something else answers.

What enters: `ray` of the settings. What leaves: a finding.
"""

from __future__ import annotations

import ray

from zsplg_ray.cluster.doctor.finding import Finding, finding
from zsplg_ray.cluster.session import ray_session
from zsplg_ray.config import DoctorConfig


def look(config: DoctorConfig) -> Finding:
    """Connect and count. Raises: ValueError, WorkError with what is wrong."""
    with ray_session(config.ray):
        have = ray.cluster_resources()
        nodes = sum(node["Alive"] for node in ray.nodes())
        cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
    told = f"{nodes} node" + "s" * (nodes != 1) + f", {cpus:g} CPUs, {gpus:g} GPUs"
    if cpus < 2:
        return finding("warn", told, "reading and labelling want a CPU each; give Ray 2 or more")
    return finding("ok", told)
