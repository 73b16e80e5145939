"""What is written and removed: inside the run's folder, and for nobody else to foresee."""

import os
import re
import stat
from pathlib import Path

import pytest

import zsplg_ray
from zsplg_ray.cluster.trainrun import CHECKPOINTS, _forget_other_attempts, sweep
from zsplg_ray.exactly_once import repair
from zsplg_ray.label.weights import fetch
from zsplg_ray.rundir import RunFolder

HIDDEN = "_x.0123456789abcdef0123456789abcdef"


@pytest.fixture
def victim(tmp_path):
    """A folder of somebody else, with a file that looks like one left by a killed writer."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "precious.txt").write_text("x")
    (folder / "sub").mkdir()
    (folder / "sub" / "more.txt").write_text("y")
    yield folder
    assert (folder / "precious.txt").read_text() == "x"
    assert (folder / "sub" / "more.txt").read_text() == "y"


def test_removing_old_checkpoints_follows_no_link(tmp_path, victim):
    checkpoints = tmp_path / "run" / CHECKPOINTS
    (checkpoints / "old" / "step-1").mkdir(parents=True)
    (checkpoints / "linked").symlink_to(victim, target_is_directory=True)
    (checkpoints / "old" / "deep").symlink_to(victim, target_is_directory=True)
    (checkpoints / "now").mkdir()
    _forget_other_attempts(RunFolder(str(tmp_path / "run")), "now")
    assert [p.name for p in checkpoints.iterdir()] == ["now"]


def test_repair_removes_only_what_writers_leave(tmp_path, victim):
    folder = tmp_path / "run"
    (folder / "segments").mkdir(parents=True)
    names = ("_notes.txt", "_SUCCESS", ".hidden", "mine.parquet", "_x.parquet", f"{HIDDEN}.bak")
    for name in names:
        (folder / "segments" / name).write_text("z")
    (folder / "segments" / HIDDEN).symlink_to(victim / "precious.txt")
    (folder / HIDDEN).write_text("half")
    repair(RunFolder(str(folder)))
    sweep(RunFolder(str(folder)))
    assert sorted(p.name for p in (folder / "segments").iterdir()) == sorted(names)
    assert not (folder / HIDDEN).exists()


def test_a_folder_that_is_a_link_is_the_folder_it_names(tmp_path, victim):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "out").symlink_to(real, target_is_directory=True)
    RunFolder(str(tmp_path / "out")).write_bytes("a.txt", b"1")
    assert (real / "a.txt").read_bytes() == b"1" and (tmp_path / "out").is_symlink()


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path, victim):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").symlink_to(victim / "precious.txt")
    RunFolder(str(folder)).write_run({"a": 1})
    assert not (folder / "run.json").is_symlink()


def test_files_have_the_rights_that_the_user_gives(tmp_path):
    before = os.umask(0o077)
    try:
        RunFolder(str(tmp_path / "run")).write_bytes("a.txt", b"1")
    finally:
        os.umask(before)
    for path in (tmp_path / "run", tmp_path / "run" / "a.txt"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077


def test_a_download_of_another_hash_leaves_nothing(tmp_path):
    source = tmp_path / "w.pth"
    source.write_bytes(b"other weights")
    to = tmp_path / "cache" / "w.pth"
    with pytest.raises(ValueError, match="of SHA-256"):
        fetch(source.as_uri(), to, "0" * 64)
    assert not to.exists() and not [p for p in to.parent.iterdir() if p.suffix != ".lock"]


def test_nothing_is_written_to_foreseeable_names_in_tmp():
    """Where others may put a link first; `tempfile` makes names that nobody foresees."""
    for path in Path(zsplg_ray.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"""['"]/tmp/|['"]/var/tmp/|gettempdir\(""", text), path
