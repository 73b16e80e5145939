"""Places: where a run is written, what a job would be sent, where runs are tracked.

What enters: `out` and `mlflow` of the settings, the working directory. What leaves: findings.
Nothing is left behind, and no database is made or changed.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import socket
import sqlite3
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests

import zsplg_ray
from zsplg_ray.cluster.doctor import store
from zsplg_ray.cluster.doctor.child import bounded
from zsplg_ray.cluster.doctor.finding import Finding, finding
from zsplg_ray.cluster.submit.sent import choose, mib
from zsplg_ray.config import DoctorConfig, SubmitConfig
from zsplg_ray.safe_text import masked

WRITE_S = 10.0
"""How long a storage may take for some bytes; a client of S3 tries for 6 s by itself."""
ANSWER_S = (3.0, 5.0)
"""Seconds for a server to take a connection, and to answer."""
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_SQLITE = "sqlite:///"


def storage(config: DoctorConfig) -> Finding:
    """Whether `out` can be written and read."""
    fix = "see whether the network and the store are there; a file _doctor.* may have been left"
    found = bounded(store.__name__, config, WRITE_S, fix)
    if found["state"] != "fail" or masked(config.out) in found["told"]:
        return found
    return finding("fail", f"{config.out}: {found['told']}", found["fix"])


def sent(config: DoctorConfig) -> Finding:
    """What `submit` would send of the working directory."""
    plain = SubmitConfig()
    here = Path().absolute()
    chosen = choose(here, package=zsplg_ray.__name__)
    told = f"a job would get {len(chosen.files):,} files of {here}, {mib(chosen.size)}"
    if chosen.size > plain.max_working_dir_mib * 2**20:
        fix = f"over --max-working-dir-mib {plain.max_working_dir_mib:g}: --exclude what it does "
        return finding("warn", told, f"{fix}not read, or submit from another folder")
    return finding("ok", told)


def mlflow(config: DoctorConfig) -> Finding:
    """Whether runs can be tracked."""
    version = f"MLflow {importlib.metadata.version('mlflow')}"
    uri = config.mlflow.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri == "off":
        return finding("ok", f"{version}; tracking is off")
    if not uri:
        return finding("ok", f"{version}; mlflow.db in the run's folder, for none is named")
    told = f"{version}; {masked(uri)}"
    if uri.startswith(("http://", "https://")):
        return _server(uri, told)
    if uri.startswith(_SQLITE):
        return _database(Path(uri.removeprefix(_SQLITE)).absolute(), told)
    scheme = re.match(r"(\w+)(\+\w+)?://", uri)
    if scheme and scheme.group(1) in _PORTS:
        parts = urlsplit(uri)
        where = (parts.hostname or "localhost", parts.port or _PORTS[scheme.group(1)])
        socket.create_connection(where, ANSWER_S[0]).close()
        return finding("ok", f"{told} takes connections; whether it lets us in was not tried")
    return finding("ok", f"{told} is not looked at")


def _server(uri: str, told: str) -> Finding:
    """An MLflow server."""
    base, fix = uri.rstrip("/"), "start it (`mlflow server`), or mend --mlflow.uri"
    try:
        answer = requests.get(f"{base}/version", timeout=ANSWER_S)
        if not answer.ok or not re.fullmatch(r"\d+(\.\w+)+", answer.text.strip()):
            return finding("warn", f"{told} is no MLflow server ({answer.status_code})", fix)
        found = _ask(base)
    except requests.exceptions.RequestException as e:
        why = type(e).__name__  # its text holds the address
        return finding("warn", f"{told} does not answer ({why}); runs go on without it", fix)
    told += f" answers, version {answer.text.strip()}"
    if found.status_code in (401, 403):
        fix = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return finding("warn", f"{told}, and does not let us in ({found.status_code})", fix)
    if not found.ok:
        return finding("warn", f"{told}, and fails ({found.status_code})", "see its log")
    return finding("ok", told)


def _ask(base: str) -> requests.Response:
    """The list of experiments, with the credentials that MLflow's client would use."""
    user, word = (os.environ.get(f"MLFLOW_TRACKING_{x}") for x in ("USERNAME", "PASSWORD"))
    bearer = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return requests.post(
        f"{base}/api/2.0/mlflow/experiments/search",
        json={"max_results": 1},
        auth=(user, word or "") if user else None,
        headers={"Authorization": f"Bearer {bearer}"} if bearer and not user else None,
        timeout=ANSWER_S,
    )


def _database(path: Path, told: str) -> Finding:
    """An SQLite file, opened for reading only."""
    if not path.exists():
        there = next(p for p in path.parents if p.exists())
        if not os.access(there, os.W_OK):
            return finding("warn", f"{told} cannot be made", f"{there} may not be written")
        return finding("ok", f"{told} will be made")
    try:
        with sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=3) as database:
            database.execute("select version_num from alembic_version").fetchall()
        database.close()
    except sqlite3.Error as e:
        return finding("warn", f"{told} is no store of MLflow ({e})", "give another --mlflow.uri")
    if not os.access(path, os.W_OK):
        return finding("warn", f"{told} may not be written", "change its permissions")
    return finding("ok", f"{told} is there")
