"""The line that Ray's core writes as it starts."""

import io
import os
import subprocess
import sys
import time

import pytest

from zsplg_ray.cluster.hush import start_line_held_back, without_start_line

LINE = (
    "[2026-11-28 17:02:02,588 I 7795 7795] logging.cc:303: Set ray log level from environment "
    "variable RAY_BACKEND_LOG_LEVEL to 3\n"
)
FOREIGN = "a [list\nof two lines] and [2026 E 1 1] gcs.cc:1: a warning\n"


@pytest.fixture
def systems(capfd, monkeypatch):
    """Called, sys.stderr is the file descriptor 2, as it is where no test looks."""
    monkeypatch.delenv("RAY_LOG_TO_STDERR", raising=False)
    with os.fdopen(2, "w", closefd=False) as stream:
        yield lambda: monkeypatch.setattr("sys.stderr", stream)


def test_only_that_line_is_held_back_and_the_others_come_at_once(capfd, systems):
    systems()
    with start_line_held_back():
        os.write(2, FOREIGN.encode() + LINE.encode() + b"torn")
        told, until = "", time.monotonic() + 30
        while told != FOREIGN and time.monotonic() < until:
            told += capfd.readouterr().err
        assert told == FOREIGN
    assert capfd.readouterr().err == "torn"
    os.write(2, LINE.encode())
    assert capfd.readouterr().err == LINE, "stderr is as it was"


def test_what_is_no_part_of_the_line_stays():
    assert without_start_line(b"half a line " + LINE.encode()) == b"half a line "
    assert without_start_line(b"[why\n" + LINE.encode()) == b"[why\n"


def test_stderr_is_back_after_an_error(capfd, systems):
    systems()
    with pytest.raises(OSError), start_line_held_back():
        os.write(2, b"why\n")
        raise OSError
    os.write(2, b"then\n")
    assert capfd.readouterr().err == "why\nthen\n"


def test_what_a_process_says_that_dies_in_there_is_not_lost():
    code = (
        "import os\nfrom zsplg_ray.cluster.hush import start_line_held_back\n"
        f"with start_line_held_back(): os.write(2, {LINE.encode()!r} + b'check failed'); os.abort()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode and done.stderr == b"check failed"


def test_it_keeps_away_where_it_would_do_harm(capfd, systems, monkeypatch):
    systems()

    def passes() -> bool:
        with start_line_held_back():
            os.write(2, LINE.encode())
        return capfd.readouterr().err == LINE

    assert not passes()
    with monkeypatch.context() as at:
        at.setenv("RAY_LOG_TO_STDERR", "1")
        assert passes(), "Ray's processes inherit stderr, and outlive us"
    for other in (None, io.StringIO()):
        with monkeypatch.context() as at:
            at.setattr("sys.stderr", other)
            assert passes()
