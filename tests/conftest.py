"""For all tests: one thread for tensors this small, before anything imports torch; no MLflow runs;
in which order files are run, and how long a Ray session lives.

More threads gain nothing here, and where other programs run they wait for each other. Tests of
tracking name a store of their own. Ray reports to nobody that it was used.

Files are handed to the processes in the order in which they are collected, so the long ones come
first: at the end there are only short ones left, and all processes end together. Files that share
`ray_local` stand together, and a session stays for the next of them in its process: to start one
takes as long as many a test.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MLFLOW_TRACKING_URI"] = "off"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.s3 import bucket, faulty, module_bucket, s3_server  # noqa: F401 (fixtures)

SLOW_S, RAY_S, OTHER_S = 20.0, 5.0, 0.05
"""What a test takes, about, to tell long files from short ones."""
SHARING = pytest.StashKey[set[Path]]()
"""Files with tests that want `ray_local`."""


def pytest_collection_modifyitems(session, items):
    """Files with a Ray of their own, then those that share one, then others; long ones first."""
    seconds, rays = defaultdict(float), set()
    sharing = session.stash[SHARING] = set()
    for item in items:
        names = {mark.name for mark in item.iter_markers()}
        seconds[item.path] += SLOW_S if "slow" in names else RAY_S if "ray" in names else OTHER_S
        if "ray" in names:
            rays.add(item.path)
        if "ray_local" in item.fixturenames:
            sharing.add(item.path)

    def turn(item) -> tuple[int, float, Path]:
        ray = 1 if item.path in sharing else 0 if item.path in rays else 2
        return ray, -seconds[item.path], item.path

    items.sort(key=turn)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A session that earlier files have shared ends before a file that knows nothing of it."""
    if item.path not in item.session.stash[SHARING]:
        end_ray()


def pytest_sessionfinish():
    end_ray()


def end_ray() -> None:
    """End this process's session with Ray, if it has one."""
    if (ray := sys.modules.get("ray")) and ray.is_initialized():
        ray.shutdown()


@pytest.fixture
def reads(monkeypatch):
    """Kind and name of the parts of run folders that this process opens."""
    from zsplg_ray.rundir import RunFolder

    opened = []
    read_part = RunFolder.read_part

    def noting(self, kind, name, columns=None):
        opened.append((kind, name))
        return read_part(self, kind, name, columns)

    monkeypatch.setattr(RunFolder, "read_part", noting)
    return opened
