"""One run at a time in a folder of an object store, whoever is killed, paused or late."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading

import pytest

from zsplg_ray.cluster import lease
from zsplg_ray.cluster.lease import NAME, HeldLease, is_alive, process_mark, read, whose
from zsplg_ray.cluster.lock import only_run
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import WorkError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A heart that beats fast."""
    for name, value in {"BEAT_S": 0.1, "WATCH_S": 0.6, "SETTLE_S": 0.05, "CHECK_S": 0.0}.items():
        monkeypatch.setattr(lease, name, value)
    monkeypatch.setattr(lease, "POLL_S", 0.05)


@pytest.fixture
def folder(bucket) -> RunFolder:
    return RunFolder(bucket.uri("run"))


@pytest.fixture
def elsewhere(monkeypatch):
    """No process of a lease can be looked at: it may be on another machine."""
    monkeypatch.setattr(lease, "process_mark", lambda pid: None)


def again(folder) -> RunFolder:
    """What another run makes of the same address."""
    return RunFolder(folder.uri)


def put(folder, **values) -> dict:
    """A lease of somebody else, who is not at work."""
    content = lease.describe("theirs") | {"user": "ada", "host": "far", "pid": 7} | values
    folder.write_bytes(NAME, json.dumps(content).encode())
    return content


def wait_for(folder, least: int) -> dict:
    """The lease, once it has been renewed that often."""
    event = threading.Event()
    for _ in range(600):
        found = read(folder)
        if found is not None and found["beat"] >= least:
            return found
        event.wait(0.05)
    raise AssertionError("the heart does not beat")


def test_it_is_there_while_a_run_is_and_renewed(folder, bucket):
    with only_run(folder):
        found = wait_for(folder, 3)
        assert found["pid"] == os.getpid() and is_alive(found["process"])
        folder.write_bytes("file", b"x")
    assert bucket.files() == {"run/file": b"x"} and folder.guard is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, WorkError])
def test_it_goes_however_a_run_ends(folder, bucket, error):
    with pytest.raises(error), only_run(folder):
        raise error
    assert bucket.files() == {}


def test_a_second_run_is_refused_at_once_on_the_same_machine(folder):
    with only_run(folder):
        found = read(folder)
        told = r"out must be used by one run at a time, got s3://.*/run.*, in use by .*, process "
        told += rf"{os.getpid()}, since .*; wait for the"
        with pytest.raises(ValueError, match=told), only_run(again(folder)):
            raise AssertionError("two at once")
        assert (now := read(folder)) is not None and found is not None
        assert now["owner"] == found["owner"]
    with only_run(again(folder)):
        """Afterwards it is free."""


def test_a_dead_process_of_this_machine_loses_it_at_once(folder, monkeypatch):
    monkeypatch.setattr(lease, "WATCH_S", 1e9)
    dead = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark = process_mark(dead.pid)
    assert is_alive(mark)
    put(folder, process=mark)
    dead.kill()  # a zombie until it is waited for
    while is_alive(mark):
        """It dies in its own time."""
    with only_run(folder):
        found = read(folder)
        assert found is not None and found["owner"] != "theirs"
    dead.communicate()
    assert is_alive(mark) is False and is_alive(f"{mark}0") is False
    assert is_alive(None) is None and is_alive("other-machine 1 2 3") is None


def test_elsewhere_who_renews_it_lives_and_who_does_not_is_dead(
    folder, elsewhere, caplog, monkeypatch
):
    monkeypatch.setattr(lease, "WATCH_S", 120.0)  # however busy this machine is
    refused = pytest.raises(ValueError, match="used by one run at a time")
    with only_run(folder), refused, only_run(again(folder)):
        raise AssertionError("two at once")
    monkeypatch.setattr(lease, "WATCH_S", 0.6)
    put(folder, job="raysubmit_1")  # and renews it no more
    with caplog.at_level("INFO"), only_run(folder):
        found = read(folder)
        assert found is not None and found["owner"] != "theirs"
    assert "in use by ada@far, process 7, Ray job raysubmit_1, since" in caplog.text


def test_what_is_old_by_the_store_s_own_time_is_not_waited_for(folder, elsewhere, monkeypatch):
    monkeypatch.setattr(lease, "WATCH_S", 1e9)
    put(folder)
    assert 0 <= lease.age_s(folder) < 60
    monkeypatch.setattr(lease, "age_s", lambda folder: lease.FORGOTTEN_S)
    with only_run(folder):
        assert (found := read(folder)) is not None and found["owner"] != "theirs"


def test_a_lease_that_nobody_can_read_is_nobody_s(folder):
    for data in (b"", b"{", b"[1]", b'{"owner": 1}', b"\xff"):
        folder.write_bytes(NAME, data)
        with only_run(folder):
            assert read(folder) is not None
    assert whose({"owner": "x"}) == "?@?, process ?, since ?"


def test_of_many_that_start_at_once_one_has_it(folder, monkeypatch):
    monkeypatch.setattr(lease, "SETTLE_S", 1.5)
    start, has, refused = threading.Barrier(6), [], []
    over = threading.Event()

    def one():
        start.wait()
        try:
            with only_run(again(folder)):
                has.append(1)
                over.wait(60)
        except ValueError:
            refused.append(1)
            if len(refused) == 5:
                over.set()

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert (len(has), len(refused)) == (1, 5)


def test_who_has_lost_it_writes_no_more_in_any_process(folder, bucket):
    with only_run(folder):
        folder.guard._end.set()  # else a beat under way might take it back
        folder.guard._thread.join()
        copy = pickle.loads(pickle.dumps(folder))
        copy.write_bytes("before", b"x")
        put(folder)
        for one in (folder, copy):
            with pytest.raises(WorkError, match=r"another run, ada@far, .* has gone on in s3://"):
                one.write_bytes("after", b"x")
            with pytest.raises(WorkError, match="this one stops"):
                one.delete_part("labels", "part-0")
    assert set(bucket.files()) == {"run/before", f"run/{NAME}"}
    assert (found := read(folder)) is not None and found["owner"] == "theirs"


def test_removed_by_hand_it_comes_back(folder):
    with only_run(folder):
        folder.fs.delete_file(f"{folder.path}/{NAME}")
        wait_for(folder, 2)
        folder.write_bytes("file", b"x")


def test_a_folder_that_cannot_be_written_is_bad_input(folder, bucket, faulty):
    with faulty() as proxy:
        there = RunFolder(bucket.uri("run", proxy))
        assert there.read_bytes("x") is None
        proxy.answer = (403, "AccessDenied")
        with pytest.raises(ValueError, match="check the credentials"), only_run(there):
            raise AssertionError("no lease, no run")


PAUSED = """
import sys
from zsplg_ray.cluster import lease
from zsplg_ray.cluster.lock import only_run
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import WorkError

lease.BEAT_S, lease.CHECK_S, lease.SETTLE_S = 0.1, 0.2, 0.05
folder = RunFolder(sys.argv[1])
try:
    with only_run(folder):
        folder.write_bytes("first", b"x")
        print("held", flush=True)
        input()
        folder.write_bytes("late", b"x")
except WorkError as e:
    print(e, flush=True)
"""


def test_a_process_that_was_paused_notices_before_it_writes_on(folder, bucket, elsewhere):
    command = [sys.executable, "-c", PAUSED, folder.uri]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as paused:
        assert paused.stdin is not None and paused.stdout is not None
        assert paused.stdout.readline() == "held\n"
        paused.send_signal(signal.SIGSTOP)
        with only_run(folder):
            paused.send_signal(signal.SIGCONT)
            told, _ = paused.communicate("\n", timeout=60)
            assert told.startswith("another run, ") and told.endswith("this one stops\n")
            assert (found := read(folder)) is not None and found["pid"] == os.getpid()
    assert set(bucket.files()) == {"run/first"}


def test_a_write_that_comes_late_leaves_one_owner(folder, monkeypatch):
    """Two looked at once, and this one wrote so late that the other one had settled already."""
    monkeypatch.setattr(lease, "SETTLE_S", 0.2)
    other, late = again(folder), HeldLease(again(folder))
    write, held = late._write, only_run(other)

    def write_late():
        monkeypatch.setattr(late, "_write", write)
        held.__enter__()
        threading.Event().wait(0.3)
        write()

    monkeypatch.setattr(late, "_write", write_late)
    try:
        late.take()
    except ValueError:  # the other one's heart beat between: it has the lease still
        other.write_bytes("x", b"x")
    else:
        with pytest.raises(WorkError, match="has gone on"):
            other.write_bytes("x", b"x")
        late.check()
    held.__exit__(None, None, None)
    late.release()
    assert read(folder) is None


def test_the_age_leaves_nothing_behind_and_bears_a_file_that_is_gone(folder, bucket, monkeypatch):
    put(folder)
    folder.write_bytes(lease.PROBE, b"")  # of a process that died while it looked
    assert lease.age_s(folder) >= 0 and list(bucket.files()) == [f"run/{NAME}"]
    delete_file = folder.fs.delete_file

    def unheard(path):
        """The store has done it, but its answer got lost; then it has nothing to delete."""
        delete_file(path)
        raise FileNotFoundError(path)

    monkeypatch.setattr(folder.fs, "delete_file", unheard)
    assert lease.age_s(folder) >= 0 and list(bucket.files()) == [f"run/{NAME}"]

    def away(paths):
        raise OSError("the store is away")

    monkeypatch.setattr(folder.fs, "delete_file", delete_file)
    monkeypatch.setattr(folder.fs, "get_file_info", away)
    with pytest.raises(OSError, match="is away"):
        lease.age_s(folder)
    assert list(bucket.files()) == [f"run/{NAME}"]
