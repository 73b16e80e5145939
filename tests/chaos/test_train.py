"""Training that is killed: the same weights in the end, bit for bit. Its "images" are steps."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos.figures import Fault, tell
from tests.cluster.conftest import ray_local
from tests.cluster.test_train import EPOCHS, RESUMED, differences, files, straight, world
from tests.cluster.training import config, rig
from zsplg_ray.cluster.train import train
from zsplg_ray.cluster.trainrun import read_training
from zsplg_ray.rundir import RunFolder

__all__ = ["ray_local", "straight", "world"]  # fixtures
pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = 6
"""Of an epoch, each with two labelled images; after each epoch there is a checkpoint."""


def numbers(run) -> list[dict]:
    """The history without what differs from time to time."""
    return [
        {k: v for k, v in entry.items() if k not in ("time", "images_per_s")}
        for entry in run["history"]
    ]


def settle(
    fault: str, run: dict, straight: dict, again: int, fault_at: float, since: float = 0.0
) -> None:
    """Tell what a fault has cost a run, by its steps, and that it has learnt what it should.

    `since`: when the next driver was started; only its epochs are a recovery.
    """
    there = [entry["step"] for entry in run["history"]]
    wanted = [entry["step"] for entry in straight["history"]]
    after = [entry["time"] for entry in run["history"] if entry["time"] > max(fault_at, since)]
    told = Fault(
        fault=fault,
        times=1,
        images=STEPS * EPOCHS,
        lost=STEPS * len(set(wanted) - set(there)),
        duplicated=STEPS * (len(there) - len(set(there))),
        recomputed=again,
        recover_s=min(after) - fault_at,
        note="steps instead of images",
    )
    tell(told)
    assert (told.lost, told.duplicated) == (0, 0)
    # The last checkpoint may have been on its way when the worker died.
    assert again <= 2 * STEPS, "from a late checkpoint, not from the start"
    assert numbers(run) == numbers(straight)


def test_a_killed_worker_is_started_again_and_goes_on(
    straight, world, tmp_path, monkeypatch, caplog
):
    rig(monkeypatch, tmp_path / "notes", 30, "kill")
    run = train(config(world, tmp_path / "run", **RESUMED))
    readers = (tmp_path / "notes").read_text().splitlines()
    assert len(set(readers)) == 2, "one was killed, one took its place"
    assert differences(tmp_path / "run", straight[0]) == 0
    (note,) = run["failures"]
    epoch = note["epoch"]
    assert epoch in (1, 2)
    assert "worker 0 died" in caplog.text and f"going on after epoch {epoch}" in caplog.text
    again = len(readers) // 2 - STEPS * EPOCHS
    assert len(readers) == 30 + (EPOCHS - epoch) * 2 * STEPS
    settle("kill -9 of a training worker", run, straight[1], again, note["time"])


def driver(world, out) -> subprocess.Popen:
    changes = {**RESUMED, "ray.num_cpus": 1, "quiet": False}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.training", str(world), str(out), json.dumps(changes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )


def wait_for(process: subprocess.Popen, out: Path, epoch: int) -> None:
    """Until the run has finished that many epochs."""
    deadline = time.monotonic() + 240
    while True:
        run = read_training(RunFolder(str(out)))
        if run is not None and run["last"] is not None and run["last"]["epoch"] >= epoch:
            return
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)


def test_ctrl_c_and_kill_9_of_the_driver(straight, world, tmp_path, caplog):
    out = tmp_path / "run"
    first = driver(world, out)
    wait_for(first, out, 1)
    first.send_signal(signal.SIGINT)
    told, errors = first.communicate(timeout=120)
    assert first.returncode == 130 and told == "", errors
    assert "the same command goes on" in errors and "Traceback" not in errors
    assert re.search(rf"train: \d+/\d+ steps, epoch \d+/{EPOCHS}, loss \d", errors), errors
    run = read_training(RunFolder(str(out)))
    assert run is not None and run["state"] == "interrupted"
    done = run["last"]["epoch"]
    assert 1 <= done < EPOCHS - 2

    second = driver(world, out)
    wait_for(second, out, done + 1)
    fault_at = time.time()
    second.kill()
    second.communicate(timeout=60)
    run = read_training(RunFolder(str(out)))
    assert run is not None and run["state"] == "running" and run["last"]["epoch"] < EPOCHS
    (out / "_last.pt.0123456789abcdef0123456789abcdef").write_bytes(b"torn")

    caplog.set_level(logging.INFO)
    began = time.time()
    run = train(config(world, out, **RESUMED))
    assert "going on after epoch" in caplog.text
    assert differences(out, straight[0]) == 0, "bit for bit"
    assert files(out) == files(straight[0])
    attempts = list(out.glob("checkpoints/*"))
    assert len(attempts) == 1, "checkpoints of earlier attempts are removed"
    name = "kill -9 of the training driver (recomputed: at most)"
    settle(name, run, straight[1], STEPS, fault_at, since=began)
