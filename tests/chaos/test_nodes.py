"""Whole nodes go: of actors, with others in their place or without; and the head itself."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster

from tests.chaos.conftest import IN_FLIGHT
from tests.chaos.runs import GOOD

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SOON = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
"""Ray takes a silent node for dead after some seconds; by itself it waits for half a minute."""


class Nodes:
    """A head for the driver and the reading of images, and nodes with a pretended GPU each."""

    def __init__(self) -> None:
        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": SOON}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.working = []

    def add(self) -> None:
        self.working.append(self.cluster.add_node(num_cpus=0, num_gpus=1))

    def kill(self, node) -> float:
        """kill -9 of its raylet, the way a node goes: nobody is told. Returns when."""
        at = time.time()
        node.kill_raylet()
        self.working.remove(node)
        return at

    def of(self, pid: int):
        """The node that an actor's process stands on: its raylet is its parent."""
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            parent = int(stat.read().rpartition(")")[2].split()[1])
        (node,) = (n for n in self.cluster.worker_nodes if raylet(n) == parent)
        return node


def raylet(node) -> int | None:
    """Process id of a node's raylet; None if it was killed."""
    found = node.all_processes.get("raylet")
    return found[0].process.pid if found else None


@pytest.fixture(scope="module")
def one_head() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.cluster.shutdown()


@pytest.fixture
def nodes(one_head) -> Nodes:
    """Two of them work, whatever the test before has killed."""
    while len(one_head.working) < 2:
        one_head.add()
    return one_head


TWO = ("--actors.min", "2", "--actors.max", "2", "--actors.gpus", "1", "--device", "cpu")


def test_a_node_is_killed_and_another_comes(nodes, start_run, seed):
    rng = random.Random(seed)
    run = start_run(nodes.cluster.address, [GOOD] * 300, *TWO, crew=2, seconds=0.03)
    driver = run.start()
    victim = driver.wait_for(rng.randint(3, 30))
    first = {note.pid for note in run.notes()}
    fault_at = nodes.kill(nodes.of(victim))
    nodes.add()
    driver.end()
    assert {note.pid for note in run.notes()} - first, "an actor has come up on the new node"
    fault = run.settle("kill -9 of a node's raylet, another node added", 1, fault_at)
    assert fault.recomputed <= IN_FLIGHT


def test_a_node_is_killed_and_none_comes(nodes, start_run, seed):
    rng = random.Random(50 + seed)
    run = start_run(nodes.cluster.address, [GOOD] * 200, *TWO, crew=2, seconds=0.03)
    driver = run.start()
    victim = driver.wait_for(rng.randint(3, 30))
    fault_at = nodes.kill(nodes.of(victim))
    driver.end()
    fault = run.settle("kill -9 of a node's raylet, and nobody in its place", 1, fault_at)
    assert fault.recomputed <= IN_FLIGHT


def test_the_head_dies_and_a_new_one_takes_its_place(start_run, seed):
    """The driver, which has outlived it, ends by itself and says why."""
    head = {"num_cpus": 2, "include_dashboard": False}
    soon = {"gcs_rpc_server_reconnect_timeout_s": 15}  # 60 by itself
    first = Cluster(initialize_head=True, head_node_args={**head, "_system_config": soon})
    try:
        run = start_run(first.address, [GOOD] * 120, "--actors.cpus", "1")
        address, driver = first.address, run.start()
        driver.wait_for(random.Random(100 + seed).randint(5, 60))
        fault_at = time.time()
        assert first.head_node is not None
        first.head_node.kill_raylet()
        first.head_node.kill_gcs_server()
        told = driver.end(code=1)
    finally:
        first.shutdown()
    ended_s = time.time() - fault_at
    assert f"the head of the Ray cluster at {address} does not answer" in told
    assert "Traceback" not in told
    second = Cluster(initialize_head=True, head_node_args=head)
    try:
        at = run.flags.index("--ray.address") + 1
        run.flags = (*run.flags[:at], second.address, *run.flags[at + 1 :])
        run.start().end()
    finally:
        second.shutdown()
    note = f"the driver had ended after {ended_s:.0f} s"
    fault = run.settle("the head killed, a new one started", 1, fault_at, note)
    assert fault.recomputed <= IN_FLIGHT


def test_anything_at_any_time(nodes, start_run, seed):
    """Actors, drivers and nodes, in an order that the seed decides."""
    rng = random.Random(1000 + seed)
    run = start_run(nodes.cluster.address, [GOOD] * 400, *TWO, crew=2, seconds=0.02)
    driver, faults = run.start(), rng.sample(["actor", "node", "driver"], 3)
    fault_at = 0.0
    for fault in faults:
        victim = driver.wait_for(rng.randint(10, 40))
        fault_at = time.time()
        if fault == "actor":
            with contextlib.suppress(ProcessLookupError):  # it died with its node
                os.kill(victim, signal.SIGKILL)
        elif fault == "node":
            nodes.kill(nodes.of(victim))
            nodes.add()
        else:
            driver.kill()
            driver = run.start()
    driver.end()
    name = "an actor, a node and the driver killed in one run, in any order"
    told = run.settle(name, 3, fault_at, note=", ".join(faults))
    assert told.recomputed <= (1 + 1 + 2) * IN_FLIGHT  # the driver's death takes both its actors
