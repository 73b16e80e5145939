"""kill -9 and SIGSTOP of drivers, actors and readers of images: nothing lost, nothing twice."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.conftest import IN_FLIGHT
from tests.chaos.runs import GOOD
from zsplg_ray.rundir import RunFolder

pytestmark = pytest.mark.ray


def test_a_driver_is_killed(standing, start_run, seed):
    run = start_run(standing, [GOOD] * 60, "--actors.cpus", "1")
    driver = run.start()
    driver.wait_for(random.Random(seed).randint(5, 40))
    fault_at = driver.kill()
    told = run.start().end()
    assert "60 images labelled" in told
    fault = run.settle("kill -9 of the driver", 1, fault_at)
    assert fault.recomputed <= IN_FLIGHT


def test_an_actor_is_killed(standing, start_run, seed):
    rng = random.Random(100 + seed)
    run = start_run(standing, [GOOD] * 100, "--actors.cpus", "1")
    driver = run.start()
    victim = driver.wait_for(rng.randint(5, 60))
    os.kill(victim, signal.SIGKILL)
    fault_at = time.time()
    driver.end()
    assert run.notes()[-1].pid != victim, "another one has done the rest"
    fault = run.settle("kill -9 of the only actor", 1, fault_at)
    assert fault.recomputed <= IN_FLIGHT


def test_a_reader_of_images_is_killed(standing, start_run, seed):
    run = start_run(standing, [GOOD] * 40, "--actors.cpus", "1")
    image_id = run.ids[10 + seed % 20]
    run.reading = replace(run.reading, deadly={image_id: 1})
    driver = run.start()
    driver.until(lambda: run.reading.deaths(image_id))
    fault_at = Path(run.reading.notes).stat().st_mtime
    driver.end()
    run.settle("kill -9 of a process that reads images", 1, fault_at)


def test_an_actor_stands_still_for_a_while(standing, start_run, seed):
    rng = random.Random(200 + seed)
    two = ("--actors.min", "2", "--actors.max", "2", "--actors.cpus", "1")
    run = start_run(standing, [GOOD] * 120, *two, crew=2)
    driver = run.start()
    victim = driver.wait_for(rng.randint(3, 30))
    os.kill(victim, signal.SIGSTOP)
    fault_at = time.time()
    before = len(run.notes())
    driver.until(lambda: len(run.notes()) >= before + IN_FLIGHT)
    assert {note.pid for note in run.notes()[before + 1 :]} == {run.notes()[-1].pid} != {victim}
    os.kill(victim, signal.SIGCONT)
    driver.end()
    fault = run.settle("SIGSTOP of one of two actors, then SIGCONT", 1, fault_at)
    assert fault.recomputed == 0


def test_a_paused_actor_comes_back_when_its_driver_has_an_heir(standing, start_run, seed):
    rng = random.Random(300 + seed)
    run = start_run(standing, [GOOD] * 80, "--actors.cpus", "1")
    driver = run.start()
    victim = driver.wait_for(rng.randint(5, 40))
    os.kill(victim, signal.SIGSTOP)
    fault_at = driver.kill()
    heir = run.start()
    heir.wait_for(10)
    if Path(f"/proc/{victim}").exists():  # Ray may have ended it
        os.kill(victim, signal.SIGCONT)
    heir.end()
    name = "SIGSTOP of an actor, its driver killed, SIGCONT under the next driver"
    fault = run.settle(name, 1, fault_at)
    assert fault.recomputed <= IN_FLIGHT


def test_a_second_driver_is_refused_and_the_first_unharmed(standing, start_run, seed):
    """Even while the first one stands still, as on a node that is paused."""
    run = start_run(standing, [GOOD] * 100, "--actors.cpus", "1")
    first = run.start()
    first.wait_for(random.Random(400 + seed).randint(1, 40))
    before = files(run.folder)
    os.kill(first.pid, signal.SIGSTOP)
    fault_at = time.time()
    told = run.start().end(code=2)
    (line,) = told.splitlines()
    assert line.startswith("error: out must be used by one run at a time"), told
    assert before <= files(run.folder)
    os.kill(first.pid, signal.SIGCONT)
    first.end()
    fault = run.settle("a second driver, while the first stands still (SIGSTOP)", 1, fault_at)
    assert fault.recomputed == 0


def files(folder: RunFolder) -> set[str]:
    return {str(path) for path in Path(folder.path).rglob("part-*")}


def test_ctrl_c_and_kill_9_of_a_driver_with_a_ray_of_its_own(start_run, seed):
    rng = random.Random(500 + seed)
    run = start_run("local", [GOOD] * 120, "--ray.num-cpus", "2", seconds=0.02)
    first = run.start()
    first.until(lambda: run.folder.parts("segments"))
    os.kill(first.pid, signal.SIGINT)
    told = first.end(code=130)
    assert "the same command goes on" in told and "Traceback" not in told
    state = run.folder.read_run()
    assert state is not None and state["state"] == "interrupted"
    done = state["counts"]["labelled"]
    assert 0 < done < 120
    second = run.start()
    second.wait_for(rng.randint(5, 30))
    fault_at = second.kill()
    run.start().end()
    state = run.folder.read_run()
    assert state is not None and state["counts"]["labelled"] == 120
    fault = run.settle("Ctrl-C, then kill -9, of a driver with a Ray of its own", 2, fault_at)
    assert fault.recomputed <= 2 * IN_FLIGHT
