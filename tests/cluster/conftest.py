"""A small Ray session that test modules share, or have of their own."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

import pytest
import ray

from zsplg_ray.cluster.loopback import loopback_only
from zsplg_ray.shapes.scenes import write_voc


def start_ray(times: int = 3) -> None:
    """Four logical CPUs, whatever the machine has.

    Ray gives a node 30 s to start, which cannot be changed: a busy machine gets another try.
    """
    try:
        with loopback_only():
            ray.init(
                address="local",
                num_cpus=4,
                include_dashboard=False,
                object_store_memory=200 * 2**20,
                log_to_driver=False,
            )
    except Exception as e:
        if times == 1 or "timed out during startup" not in str(e):
            raise
        ray.shutdown()
        start_ray(times - 1)


@pytest.fixture(scope="module")
def ray_local():
    """A session, which the module before may have used; who ends it see in tests/conftest.py."""
    if not ray.is_initialized():
        start_ray()


@pytest.fixture(scope="module")
def ray_new():
    """A session of this module's own, with the environment as it is now."""
    assert not ray.is_initialized()
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory):
    """The address of a database for MLflow; made once, for that takes seconds."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    MlflowClient(uri).search_experiments()  # makes it, lest a test's own patience be spent on that
    return uri


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """24 scenes in VOC layout."""
    folder = tmp_path_factory.mktemp("world") / "scenes"
    write_voc(folder, 24, seed=0)
    return folder
