"""The line that Ray's core writes to stderr as it starts is held back; all others come through.

What enters: nothing; this is a context around `ray.init`. What leaves: stderr as it was; meanwhile
each line passes a filter, and is written as soon as it is whole.

RAY_BACKEND_LOG_LEVEL keeps Ray's core from telling of every lost connection, but the core says that
it has read the variable before it heeds it, from C++, so only the file descriptor can be asked to
hold it back. The filter is a process of its own, this file: if Ray's core ends ours, what it said
last, which is why, still comes through. The display writes to a copy of stderr
(zsplg_ray/display.py), so it goes on.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_LINE = re.compile(
    rb"\[[^\[\]\n]*\] \(?[^\[\]\n]{0,80}logging\.cc:\d+: Set ray log level from env[^\n]*\n?"
)
_STDERR = 2
_DRAIN_S = 2.0
"""How long the filter may take for the last lines; it goes on if others still write to it."""


@contextlib.contextmanager
def start_line_held_back() -> Iterator[None]:
    """What is written to stderr in here appears without that line.

    Nothing is done where stderr is not the system's, or Ray's processes are to write to it too.
    """
    started = _filter() if _is_ours() and not os.environ.get("RAY_LOG_TO_STDERR") else None
    if started is None:
        yield
        return
    process, into = started
    before = os.dup(_STDERR)
    with contextlib.suppress(ValueError, OSError):
        sys.stderr.flush()
    os.dup2(into, _STDERR)
    os.close(into)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):
            sys.stderr.flush()
        os.dup2(before, _STDERR)
        os.close(before)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_DRAIN_S)


def _is_ours() -> bool:
    """Whether sys.stderr writes to the file descriptor that Ray's core writes to."""
    real = getattr(sys.stderr, "real", sys.stderr)  # below a display's stand-in
    try:
        return real is not None and real.fileno() == _STDERR
    except (OSError, ValueError):
        return False


def _filter() -> tuple[subprocess.Popen[bytes], int] | None:
    """The filter, and a file descriptor to write into; None if it cannot be started."""
    try:
        out, into = os.pipe()
    except OSError:  # no room: the line is no harm
        return None
    try:
        # In a session of its own: Ctrl-C and signals to the group are not for it.
        argv = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
        process = subprocess.Popen(
            argv, stdin=out, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True
        )
    except OSError:
        os.close(into)
        return None
    finally:
        os.close(out)
    return process, into


def without_start_line(text: bytes) -> bytes:
    """A line that came to stderr, without Ray's: what is left of it, which may be nothing."""
    return _LINE.sub(b"", text)


def _pass_on() -> None:
    """Until nobody can write any more: each line of stdin that is not Ray's to stderr."""
    for line in sys.stdin.buffer:
        text = without_start_line(line)
        with contextlib.suppress(OSError):
            while text:
                text = text[os.write(_STDERR, text) :]


if __name__ == "__main__":
    _pass_on()
