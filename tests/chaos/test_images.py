"""Bad images: they are told in errors/, and the others do not notice."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.conftest import IN_FLIGHT
from tests.chaos.runs import CRASHES, EXITS, GOOD, KILLS
from zsplg_ray.cluster.ledger import MAX_KILLS

pytestmark = pytest.mark.ray


def errors(run) -> dict[str, dict]:
    table = run.folder.read("errors")
    return {} if table is None else {row["image_id"]: row for row in table.to_pylist()}


def test_one_image_in_a_hundred_is_corrupt(standing, start_run, seed):
    run = start_run(standing, [GOOD] * 300, "--actors.cpus", "1", seconds=0.0)
    corrupt = set(random.Random(seed).sample(run.ids, 3))
    for image_id in corrupt:
        path = run.images / image_id
        path.write_bytes(path.read_bytes()[:50])
    run.start().end()
    assert set(errors(run)) == corrupt
    run.settle("1 % of the images corrupt", len(corrupt), None, note="they stand in errors/")


def test_images_that_kill_their_process_every_time(standing, start_run, seed):
    """kill -9, as the kernel does where memory runs out, and a crash; four images go together."""
    rng = random.Random(seed)
    kinds = [GOOD] * 50
    bad = dict(zip(rng.sample(range(50), 2), [KILLS, (CRASHES, EXITS)[seed % 2]], strict=True))
    for number, kind in bad.items():
        kinds[number] = kind
    run = start_run(standing, kinds, "--actors.cpus", "1", together=4)
    run.start().end()
    told = errors(run)
    assert set(told) == {run.ids[number] for number in bad}
    for row in told.values():
        assert row["stage"] == "label"
        assert row["error"].startswith(f"killed its process {MAX_KILLS} times")
    deaths = MAX_KILLS * len(bad)
    assert len({note.pid for note in run.notes()}) <= deaths + 1
    first = min(note.at for note in run.notes() if note.number in bad)
    fault = run.settle("an image that kills its process every time", len(bad), first)
    assert fault.recomputed <= deaths * IN_FLIGHT


def test_an_image_that_kills_who_reads_it_every_time(standing, start_run, seed):
    run = start_run(standing, [GOOD] * 30, "--actors.cpus", "1")
    image_id = run.ids[5 + seed % 20]
    run.reading = replace(run.reading, deadly={image_id: 99})
    driver = run.start()
    driver.until(lambda: run.reading.deaths(image_id))
    fault_at = Path(run.reading.notes).stat().st_mtime
    driver.end()
    assert run.reading.deaths(image_id) == MAX_KILLS
    (row,) = errors(run).values()
    assert row["image_id"] == image_id and row["stage"] == "decode"
    assert row["error"] == f"killed its process {MAX_KILLS} times while it was read"
    run.settle("an image that kills who reads it every time", 1, fault_at)
