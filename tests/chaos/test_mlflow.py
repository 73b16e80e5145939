"""The MLflow server dies in the middle of a run: the run does not."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.chaos.runs import GOOD
from tests.cluster.tracking import server

pytestmark = pytest.mark.ray


def below(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    told = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [found for child in map(int, told) for found in (*below(child), child)]


def test_mlflow_is_gone(standing, start_run, seed, tmp_path):
    with server(tmp_path) as (uri, process):
        tracked = ("--mlflow.uri", uri, "--mlflow.experiment", "gone")
        run = start_run(standing, [GOOD] * 200, "--actors.cpus", "1", *tracked, seconds=0.03)
        driver = run.start()
        driver.wait_for(random.Random(seed).randint(5, 60))
        fault_at = time.time()
        for pid in (*below(process.pid), process.pid):
            os.kill(pid, signal.SIGKILL)
        told = driver.end()
    assert "200 images labelled" in told and "Traceback" not in told
    assert "MLflow" in told, "it is told that something is missing there"
    fault = run.settle("kill -9 of the MLflow server", 1, fault_at)
    assert fault.recomputed == 0
