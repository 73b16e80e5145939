"""The line that Ray's core writes as it starts."""

import os

import pytest

from zsplg_ray.cluster.hush import start_line_held_back

LINE = (
    "[2026-11-28 17:02:02,588 I 7795 7795] logging.cc:303: Set ray log level from environment "
    "variable RAY_BACKEND_LOG_LEVEL to 3\n"
)


def test_only_that_line_is_held_back(capfd):
    with start_line_held_back():
        os.write(2, b"[2026 E 1 1] gcs.cc:1: a warning\n" + LINE.encode() + b"torn")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "[2026 E 1 1] gcs.cc:1: a warning\ntorn"
    os.write(2, LINE.encode())
    assert capfd.readouterr().err == LINE, "stderr is as it was"


def test_stderr_is_back_after_an_error(capfd):
    with pytest.raises(OSError), start_line_held_back():
        os.write(2, b"why\n")
        raise OSError
    os.write(2, b"then\n")
    assert capfd.readouterr().err == "why\nthen\n"
