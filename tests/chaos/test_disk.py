"""A disk that is full while a run writes: one clear line, nothing half, and later it goes on."""

import subprocess

import pytest

from tests.chaos.runs import GOOD

pytestmark = pytest.mark.ray
ROOM_K = 160


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with little room, and what gives it more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM_K}k", "zsplg", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")

    def more_room():
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)

    yield disk, more_room
    subprocess.run(["umount", "-l", str(disk)], check=True)


def one_line(told: str) -> None:
    """What was told is one clear line; what Ray's own log says of itself is left out."""
    (line,) = (line for line in told.splitlines() if not line.startswith("["))
    assert line.startswith("error: ") and "No space left on device: '/" in line, told


def test_the_disk_is_full_while_parts_are_written(standing, start_run, small_disk, seed):
    disk, more_room = small_disk
    # The first parts find room, however large they are today.
    run = start_run(standing, [GOOD] * 120, "--actors.cpus", "1", out=str(disk / "run"))
    one_line(run.start().end(code=1))
    done = len(run.folder.parts("segments"))
    assert 0 < done < 15
    state = run.folder.read_run()
    assert state is not None and state["state"] in ("failed", "running")
    before = len(run.notes())
    more_room()
    heir = run.start()
    heir.end()
    assert run.notes()[before:], "there was something left to do"
    run.settle("disk full while parts are written", 1, heir.began, note="from the second start")


def test_the_disk_is_full_before_the_run_begins(standing, start_run, small_disk, seed):
    disk, more_room = small_disk
    run = start_run(standing, [GOOD] * 20, "--actors.cpus", "1", out=str(disk / "run"))
    ballast = disk / "ballast"
    with pytest.raises(OSError, match="No space"), ballast.open("wb") as file:
        file.write(bytes(2 * ROOM_K * 1024))
    one_line(run.start().end(code=1))
    assert not run.notes() and not list((disk / "run").rglob("*.parquet"))
    more_room()
    heir = run.start()
    heir.end()
    run.settle("disk full before run.json is written", 1, heir.began, note="from the second start")
