"""A cluster for faults, runs on it, and figures that reach the terminal though pytest captures."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

import pytest
from ray.cluster_utils import Cluster

from tests.chaos import figures, runs

IN_FLIGHT = 8
"""Images that a death may cost: what an actor takes at a time."""


def pytest_configure(config):
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        figures.terminal = capture.global_and_fixture_disabled


def pytest_generate_tests(metafunc):
    """Each fault is tried ZSPLG_CHAOS_TIMES times, with another seed each time."""
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(figures.TIMES))


@pytest.fixture(scope="session")
def standing():
    """Address of a cluster that stays up while drivers and actors on it come and go."""
    head = {"num_cpus": 3, "include_dashboard": False}  # two actors, and who reads for them
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def start_run(tmp_path, monkeypatch):
    """Makes a `Run` on the cluster at an address; what it leaves at work is ended."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    made = []

    def make(address, kinds, *flags, **options):
        flags = ("--ray.address", address, "--actors.in-flight", str(IN_FLIGHT), *flags)
        run = runs.Run(tmp_path / f"of_{len(made)}", kinds, *flags, **options)
        made.append(run)
        return run

    yield make
    for run in made:
        run.close()
