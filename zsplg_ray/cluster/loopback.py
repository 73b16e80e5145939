"""A Ray of our own listens on this machine's loopback only.

What enters: nothing. What leaves: a context in which `ray.init` may start Ray.

Why: whoever reaches Ray's ports runs code on its nodes; that is what they are for. On Linux Ray
takes the address that other machines reach and listens on all of them, for more nodes might join
(the loopback that one asks for is turned into it). On macOS and Windows, where none can join, it
stays on the loopback; that switch of Ray's is what is set here, for as long as Ray starts. Where a
Ray without it comes, that is a warning.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import ray

log = logging.getLogger(__name__)

_SWITCH = "ENABLE_RAY_CLUSTER"


def _constants() -> object | None:
    try:
        from ray._private import ray_constants
    except ImportError:
        return None
    return ray_constants


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """While this lasts, a Ray that is started binds to 127.0.0.1 alone."""
    constants = _constants()
    before = getattr(constants, _SWITCH, None)
    if before is None:
        told = "Ray %s will listen on all addresses of this machine: keep others off by a firewall"
        log.warning(told, ray.__version__)
        yield
        return
    setattr(constants, _SWITCH, False)
    try:
        yield
    finally:
        setattr(constants, _SWITCH, before)
