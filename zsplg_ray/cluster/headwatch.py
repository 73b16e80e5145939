"""Says that the head of the cluster is gone, which Ray does not.

What enters: the address of the head's control service. What leaves: one line of the log, when it
has not answered for a while. Ray itself waits for a head that may come back, and after a minute
(`RAY_gcs_rpc_server_reconnect_timeout_s`) ends the process with exit 1, in the midst of whatever it
does and without a word that a user would see.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator

log = logging.getLogger(__name__)

PERIOD_S = 3.0
"""Between two looks."""
MISSES = 3
"""Looks in a row that must fail: a head under load may miss one."""


@contextlib.contextmanager
def watched_head(address: str) -> Iterator[None]:
    """Watch the head at HOST:PORT from a thread while the body runs."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(address, ended), name="headwatch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _watch(address: str, ended: threading.Event) -> None:
    misses = 0
    while not ended.wait(PERIOD_S):
        found = answers(address)
        if found and misses >= MISSES:
            log.warning("the head of the Ray cluster at %s is back", address)
        misses = 0 if found else misses + 1
        if misses == MISSES:
            told = "the head of the Ray cluster at %s does not answer. If it does not come back "
            told += "within a minute this ends with exit 1; once there is a cluster again, the "
            log.error(told + "same command goes on from what is finished", address)


def answers(address: str) -> bool:
    """Whether somebody takes connections at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PERIOD_S).close()
    except OSError:
        return False
    return True
