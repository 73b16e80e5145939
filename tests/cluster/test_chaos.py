"""kill -9 of drivers and actors in the middle of a run: nothing lost, nothing twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zsplg_ray.rundir import RunFolder
from zsplg_ray.shapes.scenes import write_voc

IN_FLIGHT = 8


class Driver:
    """A run of tests.cluster.rigged in a process of its own."""

    def __init__(self, images, out, notes) -> None:
        self.notes = notes
        settings = json.dumps({"actors.in_flight": IN_FLIGHT, "ray.num_cpus": 2})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.rigged", str(images), str(out), notes, settings],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )

    def calls(self) -> list[dict]:
        """One entry for every image that any actor started on."""
        try:
            with Path(self.notes).open() as lines:
                return [json.loads(line) for line in lines]
        except FileNotFoundError:
            return []

    def wait_for(self, more: int) -> int:
        """Until that many more images were started on; the process that did the last."""
        goal = len(self.calls()) + more
        deadline = time.monotonic() + 240
        while len(self.calls()) < goal:
            assert self.process.poll() is None, self.process.communicate()[1].decode()[-2000:]
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.02)
        return self.calls()[-1]["pid"]


@pytest.mark.ray
@pytest.mark.slow
def test_three_drivers_and_two_actors_killed_in_a_run_of_200_images(tmp_path, capsys):
    rng = random.Random(0)
    write_voc(tmp_path / "scenes", 200, seed=0)
    out, notes = tmp_path / "run", str(tmp_path / "notes")
    folder = RunFolder(str(out))
    for _ in range(3):
        driver = Driver(tmp_path / "scenes", out, notes)
        driver.wait_for(rng.randint(15, 45))
        driver.process.kill()
        driver.process.wait()
    last = Driver(tmp_path / "scenes", out, notes)
    for _ in range(2):
        os.kill(last.wait_for(rng.randint(5, 20)), signal.SIGKILL)
    _, told = last.process.communicate(timeout=400)
    assert last.process.returncode == 0, told.decode()[-2000:]

    ids = {kind: folder.read(kind, ["image_id"]) for kind in ("segments", "labels", "errors")}
    assert ids["errors"] is None or len(ids["errors"]) == 0
    for kind in ("segments", "labels"):
        table = ids[kind]
        assert table is not None
        found = table["image_id"].to_pylist()
        assert len(found) == 200 and len(set(found)) == 200
    recomputed = len(last.calls()) - 200
    with capsys.disabled():
        print(f"\n3 drivers and 2 actors killed: 200 of 200 once, {recomputed} recomputed")
    assert 0 <= recomputed <= 5 * IN_FLIGHT


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(tmp_path):
    write_voc(tmp_path / "scenes", 60, seed=0)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "zsplg_ray.cli", "label", "--images", str(tmp_path / "scenes")]
    command += ["--classes", "shapes", "--out", str(out), "--sam", "shapes", "--clip", "shapes"]
    command += ["--sam.points-per-side", "4", "--actors.in-flight", "4", "--ray.num-cpus", "2"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not list(out.glob("segments/part-*")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    stdout, stderr = first.communicate(timeout=120)
    assert first.returncode == 130 and stdout == "", stderr
    assert "the same command goes on" in stderr and "Traceback" not in stderr
    run = RunFolder(str(out)).read_run()
    assert run is not None and run["state"] == "interrupted"
    done = run["counts"]["labelled"]
    assert 0 < done < 60
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    counts = json.loads(again.stdout)["counts"]
    assert (counts["labelled"], counts["skipped_as_done"]) == (60, done)
