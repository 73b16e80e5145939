"""Ray: the one that is started here or the cluster that is named, its token, its dashboard.

What enters: `ray` and `address` of the settings, the environment. What leaves: findings; no token
is ever in one.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import requests

from zsplg_ray.cluster.doctor import session_there
from zsplg_ray.cluster.doctor.child import bounded
from zsplg_ray.cluster.doctor.finding import Finding, finding
from zsplg_ray.cluster.session import cluster_address
from zsplg_ray.cluster.submit.client import Client, dashboard_address, find_token
from zsplg_ray.config import DoctorConfig
from zsplg_ray.safe_text import masked

CONNECT_S = 15.0
"""How long a cluster may take to take us in."""
ANSWER_S = (3.0, 5.0)
"""Seconds for a dashboard to take a connection, and to answer."""


def ray_here(config: DoctorConfig) -> Finding:
    """The session that runs in this process already, or one that is started for the look."""
    return session_there.look(config)


def ray_there(config: DoctorConfig) -> Finding:
    """The cluster that is named by an address."""
    address = cluster_address(config.ray)
    fix = "see that the head runs and that the address is Ray's (HOST:6379), not the dashboard's"
    found = bounded(session_there.__name__, config, CONNECT_S, fix)
    if "ersion mismatch" in found["told"] + found["fix"]:
        found["fix"] = f"install the Ray and the Python of the cluster here. {found['fix']}"
    return {**found, "told": f"{masked(address)}: {found['told']}"}


def token(config: DoctorConfig) -> Finding:
    """Whether there is a token for clusters that ask for one, and where."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return finding("ok", "none is used: RAY_AUTH_MODE is disabled")
    make = "`ray get-auth-token --generate` makes one; give all nodes the same"
    if find_token() is None:
        if mode == "token":
            return finding("warn", "RAY_AUTH_MODE is token and there is none", make)
        told = "no token: a cluster that asks for one lets nobody in"
        return finding("ok", told, f"if yours does: {make}")
    if os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return finding("ok", f"from RAY_AUTH_TOKEN{_mode(mode)}")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or "~/.ray/auth_token").expanduser()
    told = f"from {path}{_mode(mode)}"
    if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        fix = f"chmod 600 {path}: whoever has the token runs code on the cluster"
        return finding("warn", f"{told}, which others may read", fix)
    return finding("ok", told)


def _mode(mode: str) -> str:
    """A hint for Ray's own commands, which do not use a token by themselves."""
    return "" if mode == "token" else " (Ray's own commands want RAY_AUTH_MODE=token too)"


class _Brief(Client):
    """A client that waits for seconds only."""

    def _do_request(self, method: str, endpoint: str, **given: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **{"timeout": ANSWER_S, **given})


def dashboard(config: DoctorConfig) -> Finding:
    """The address that `submit` would use."""
    named = config.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    address = dashboard_address(config.address)
    try:
        client = _Brief(address)
        client.check_python()
    except ValueError as e:
        if named:
            raise
        why = "no answer" if "answers" in str(e) else str(e).rpartition("; ")[2]
        told = f"none at {masked(address)} ({why}); only `zsplg submit` wants one"
        return finding("ok", told, "give --address or set RAY_API_SERVER_ADDRESS to look elsewhere")
    if client.warnings:
        return finding("warn", f"{client.shown}: {'; '.join(client.warnings)}", "install that Ray")
    return finding("ok", f"{client.shown} answers and takes us in")
