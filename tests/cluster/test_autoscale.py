"""From no GPU node to as many as a job may have, and back, with the node types of cluster.yaml."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.cluster.growing import GrowingCluster
from zsplg_ray.rundir import RunFolder
from zsplg_ray.shapes.scenes import write_voc

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"
IMAGES, MOST = 24, 2


@pytest.fixture
def cluster(tmp_path):
    home = tmp_path / "h"
    home.mkdir()
    made = GrowingCluster(home, CLUSTER, idle_s=5, most={"label": MOST})
    try:
        made.wait_until_up()
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def driver(cluster, arguments: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """A run that goes on beside us, and ends with us; what it says goes into `log`."""
    command = [sys.executable, "-m", "tests.cluster.growing", *arguments]
    with log.open("wb") as said:
        running = subprocess.Popen(command, env=cluster.env, stderr=said)
        try:
            yield running
        finally:
            running.kill()  # nothing, once it has ended
            running.wait()


def test_a_driver_ends_with_the_test_that_fails(tmp_path):
    nowhere = SimpleNamespace(env=dict(os.environ))
    with pytest.raises(AssertionError), driver(nowhere, ["i", "o", "{}"], tmp_path / "log") as run:
        raise AssertionError
    assert run.poll() is not None


@pytest.mark.ray
@pytest.mark.slow
def test_label_nodes_come_when_there_is_work_and_go_afterwards(cluster, tmp_path, capsys):
    write_voc(tmp_path / "scenes", IMAGES, seed=0)
    out = tmp_path / "run"
    settings = {"actors.resources": {"label_node": 0.001}, "actors.in_flight": 4}
    arguments = [str(tmp_path / "scenes"), str(out), json.dumps(settings)]
    log = tmp_path / "driver.log"
    assert cluster.nodes() == {cluster.head_type: 1}, "it does not start from nothing"
    with driver(cluster, arguments, log) as run:
        began, seen, peak = time.time(), {}, Counter()
        while (running := run.poll() is None) or "gone" not in seen:
            up = cluster.nodes()
            peak |= up
            if up["label"]:
                seen.setdefault("first", time.time())
            if "first" in seen and up == {cluster.head_type: 1}:
                seen.setdefault("gone", time.time())
            assert running or run.returncode == 0, log.read_text()[-3000:]
            assert time.time() - began < 400, log.read_text()[-3000:]
            time.sleep(0.2)
    written = max(part.stat().st_mtime for part in out.glob("segments/*.parquet"))
    with capsys.disabled():
        nodes = ", ".join(f"{n} {name}" for name, n in sorted(peak.items()))
        first, last, gone = seen["first"] - began, written - began, seen["gone"] - written
        print(f"\nfirst label node after {first:.1f} s, last image after {last:.1f} s", end="")
        print(f", at most {nodes}, all gone {gone:.1f} s after the last image")
    assert peak["label"] == MOST, "the run is to use what it may, and no more"
    assert peak["train"] == 0
    for kind in ("segments", "labels"):
        table = RunFolder(str(out)).read(kind, ["image_id"])
        assert table is not None
        ids = table["image_id"].to_pylist()
        assert len(ids) == len(set(ids)) == IMAGES
