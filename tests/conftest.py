"""For all tests: one thread for tensors this small, before anything imports torch; no MLflow runs.

More threads gain nothing here, and where other programs run they wait for each other. Tests of
tracking name a store of their own.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MLFLOW_TRACKING_URI"] = "off"

import pytest

from tests.s3 import bucket, faulty, module_bucket, s3_server  # noqa: F401 (fixtures)


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
