"""The line that Ray's core writes to stderr as it starts is held back; all others come through.

What enters: nothing; this is a context around `ray.init`. What leaves: stderr as it was, after what
was written to it meanwhile.

RAY_BACKEND_LOG_LEVEL keeps Ray's core from telling of every lost connection, but the core says that
it has read the variable before it heeds it, from C++, so only the file descriptor can be asked to
hold it back. The display writes to a copy of stderr (zsplg_ray/display.py), so it goes on.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

_LINE = re.compile(
    rb"\[[^\]]*\] \(?[^\n]{0,80}logging\.cc:\d+: Set ray log level from env[^\n]*\n?"
)
_STDERR = 2


@contextlib.contextmanager
def start_line_held_back() -> Iterator[None]:
    """What is written to stderr in here appears afterwards, without that line."""
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(tempfile.TemporaryFile())
            before = os.dup(_STDERR)
        except OSError:  # no room for a file, or no stderr: the line is no harm
            yield
            return
        sys.stderr.flush()
        os.dup2(held.fileno(), _STDERR)
        try:
            yield
        finally:
            with contextlib.suppress(ValueError, OSError):
                sys.stderr.flush()
            os.dup2(before, _STDERR)
            os.close(before)
            held.seek(0)
            _write(without_start_line(held.read()))


def without_start_line(text: bytes) -> bytes:
    """What came to stderr, without the line."""
    return _LINE.sub(b"", text)


def _write(text: bytes) -> None:
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(_STDERR, text) :]
