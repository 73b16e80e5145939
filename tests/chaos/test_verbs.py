"""Other verbs that are killed: `predict`, whose commit is labels/, and `relabel`."""

import random
import time
from pathlib import Path

import pytest

from tests.chaos.conftest import IN_FLIGHT
from tests.chaos.figures import settle
from tests.chaos.runs import GOOD, LoadStudent
from tests.student.models import write_model
from zsplg_ray.views.evaluate import open_labels

pytestmark = pytest.mark.ray


def test_predict_is_killed(standing, start_run, seed, tmp_path):
    rng = random.Random(seed)
    model = write_model(tmp_path / "best.pt")
    run = start_run(standing, [GOOD] * 60, "--model", str(model), "--actors.cpus", "1")
    run.load = LoadStudent(run.load.notes)
    driver = run.start()
    driver.wait_for(rng.randint(5, 30))
    fault_at = driver.kill()
    run.start().end()
    assert not run.folder.parts("segments")
    fault = run.settle("kill -9 of the driver of predict", 1, fault_at)
    assert fault.recomputed <= IN_FLIGHT


def test_relabel_is_killed(standing, start_run, seed):
    """While it replaces labels, part by part; until it is done readers refuse the mixture."""
    few = ("--actors.cpus", "1", "--actors.in-flight", "4")
    run = start_run(standing, [GOOD] * 300, *few, seconds=0.0)
    run.start().end()
    folder, started = run.folder, len(run.notes())
    old = {path: path.stat().st_mtime_ns for path in Path(folder.path, "labels").glob("part-*")}
    assert len(old) == 75
    relabel = ["relabel", "--run", folder.uri, "--ray.address", standing, "--quiet"]
    driver = run.other(*relabel, "--compose.min-similarity", "0.9")

    def replaced() -> int:
        return sum(path.stat().st_mtime_ns != was for path, was in old.items())

    driver.until(lambda: replaced() > random.Random(seed).randint(0, 20))
    fault_at, before = driver.kill(), replaced()
    state = folder.read_run()
    assert state is not None and state["labels_state"] == "relabelling"
    with pytest.raises(ValueError, match="zsplg relabel --run"):
        open_labels(folder.uri)
    heir = run.other(*relabel)
    heir.until(lambda: replaced() > before or not heir.process.is_alive())
    recover_s = time.time() - fault_at
    heir.end()
    state = folder.read_run()
    assert state is not None and state["labels_state"] == "complete"
    made_with = {
        folder.part_meta("labels", n)["labels_fingerprint"] for n in folder.parts("labels")
    }
    assert made_with == {state["labels_fingerprint"]}
    name, note = "kill -9 of the driver of relabel", f"{before} of {len(old)} parts were new"
    fault = settle(folder, run.ids, started, name, 1, recover_s, note)
    assert fault.recomputed == 0
