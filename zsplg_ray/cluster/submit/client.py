"""The cluster's dashboard, over HTTP: where it is, who we are, and what goes wrong, in one line.

What enters: an address as a user writes it, and the token of the cluster. What leaves: a `Client`,
Ray's own with time-outs, whose errors are ValueErrors where the user can mend them before anything
has been sent, and WorkErrors where the cluster fails.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import requests
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from ray import __version__ as our_ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from zsplg_ray.safe_text import masked
from zsplg_ray.settings import WorkError, complain

log = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
DEFAULT_PORT = 8265
TIMEOUT_S = (10.0, 20.0)
"""Seconds to wait for a connection, and for an answer."""
SEND_TIMEOUT_S = (10.0, 300.0)
"""The same while something is sent, which the cluster has to store before it answers."""

_VERSION = "/api/version"
_JOBS = "/api/jobs/"
_FROM_ENV = "RAY_API_SERVER_ADDRESS"
_LOGGERS = (
    *("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"),
    "ray._private.runtime_env.packaging",
)
"""Of Ray, telling each file that it looks at."""


class Gone(WorkError):
    """The cluster does not know the job."""


def dashboard_address(given: str | None) -> str:
    """`http(s)://host:port` of the dashboard, without a slash at the end.

    `given`: None stands for RAY_API_SERVER_ADDRESS if it is set, else this machine. `host` and
    `host:port` will do.

    Raises: ValueError if it is the address of something else, or none.
    """
    text = (given or os.environ.get(_FROM_ENV) or DEFAULT_ADDRESS).strip()
    scheme, there, rest = text.rpartition("://")
    scheme = scheme.lower()
    if there and scheme not in ("http", "https"):
        fix = f"give http://{_host(text)}:{DEFAULT_PORT} (what `ray start` calls the dashboard)"
        raise ValueError(complain("address", "a dashboard's, http://HOST:PORT", masked(text), fix))
    address = f"{scheme or 'http'}://{rest}".rstrip("/")
    try:
        parts = urlsplit(address)
        if not parts.hostname or parts.hostname == "auto" or re.search(r"\s", address):
            raise ValueError("no host")
        if parts.port is None and not there:
            address = f"{address}:{DEFAULT_PORT}"
    except ValueError as e:
        fix = f"write http://head:{DEFAULT_PORT}"
        raise ValueError(complain("address", "http://HOST:PORT", masked(text), fix)) from e
    return address


def _host(address: str) -> str:
    """The host of an address, as it stands in another; HOST if there is none."""
    try:
        host = urlsplit(address).hostname or "HOST"
    except ValueError:  # brackets around what is no address
        return "HOST"
    return f"[{host}]" if ":" in host else host


def find_token() -> str | None:
    """The token of the cluster, where Ray itself looks: RAY_AUTH_TOKEN, the file that
    RAY_AUTH_TOKEN_PATH names, ~/.ray/auth_token; None if there is none, or if RAY_AUTH_MODE is
    `disabled`.

    Raises: ValueError if the file that is named cannot be read.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        path = Path(named or "~/.ray/auth_token").expanduser()
        return path.read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError, RuntimeError) as e:  # RuntimeError: there is no home
        if not named:
            return None
        rule, fix = "a file that holds the token", "mend or unset it"
        raise ValueError(complain("RAY_AUTH_TOKEN_PATH", rule, named, fix)) from e


class Client(JobSubmissionClient):
    """Ray's client of one cluster, with time-outs and our kind of errors."""

    def __init__(self, address: str) -> None:
        """Connect.

        Raises:
            ValueError: Nothing, or something else, answers at `address`.
            WorkError: Ray here is not one that this class fits.
        """
        for name in ("_do_request", "_raise_error"):  # Ray's own, and not promised to stay
            if not hasattr(JobSubmissionClient, name):
                told = f"the client of Ray {our_ray}, which is installed here, has no {name}"
                raise WorkError(f"{told}; install an earlier Ray {_wanted('Ray')}")
        self.unsure = False
        """A job has been asked for, and there was no answer."""
        self.shown = masked(address)
        self.token = find_token()
        self.warnings: set[str] = set()
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        if not self.token and os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
            raise self._no_entry("no token was found here")
        with _env(_FROM_ENV, address):  # which else wins over what is passed
            super().__init__(address, headers=headers)
        for warning in self.warnings:
            log.warning("%s", warning)

    def check_python(self) -> None:
        """Refuse a cluster whose Python cannot run this package. Raises: ValueError."""
        if found := self._told("/api/v0/cluster_metadata", "pythonVersion"):
            self._check_version("Python", found)

    def waiting_for(self) -> str | None:
        """Resources that work on the cluster waits for, as `ray status` tells it; None: none."""
        status = self._told("/api/cluster_status?format=1", "clusterStatus")
        lines = status.partition("Pending Demands:")[2].strip().splitlines()
        demands = [line.strip() for line in lines if line.strip()]
        return None if not demands or demands[0].startswith("(no ") else "; ".join(demands)

    def _told(self, endpoint: str, key: str) -> str:
        """One of the things that a dashboard tells, "" if this one does not."""
        answer = self._do_request("GET", endpoint)
        try:
            return str(answer.json()["data"][key] or "") if answer.ok else ""
        except (ValueError, KeyError, TypeError):
            return ""

    def _do_request(self, method: str, endpoint: str, **given: Any) -> requests.Response:
        """One request, as Ray's client makes all of them."""
        first = endpoint == _VERSION
        self.unsure = starts = (method, endpoint) == ("POST", _JOBS)
        given.setdefault("timeout", TIMEOUT_S if method == "GET" else SEND_TIMEOUT_S)
        try:
            answer = super()._do_request(method, endpoint, **given)
        except AuthenticationError as e:
            wrong = "the token that was found here is not the cluster's"
            raise self._no_entry(wrong if self.token else "no token was found here") from e
        except requests.exceptions.Timeout as e:
            raise self._no_answer("no answer in time", first) from e
        except requests.exceptions.RequestException as e:
            raise self._no_answer(_reason(e), first) from e
        self.unsure = False
        if first:
            self._check_version("Ray", self._ray_version(answer))
        elif answer.status_code == requests.codes.request_entity_too_large:
            fix = "--exclude what the job does not read"
            rule = "no larger than the cluster takes, which is 100 MiB packed as a rule"
            raise ValueError(complain("working_dir", rule, "more", fix))
        elif starts and not answer.ok and "already exists" in answer.text:
            rule, fix = "a name that no job there has had", "give another, or leave it out"
            raise ValueError(complain("job_id", rule, "one that is taken", fix))
        return answer

    def _raise_error(self, r: requests.Response) -> NoReturn:
        """What Ray's client calls for an answer that says no."""
        if r.status_code == requests.codes.not_found:
            raise Gone(f"{self.shown}: {_last_line(r.text)}")
        raise WorkError(f"{self.shown} answered {r.status_code}: {_last_line(r.text)}")

    def _check_version(self, name: str, found: str) -> None:
        """What the cluster has must be able to run this package. Raises: ValueError."""
        wanted = _wanted(name)
        if not wanted.contains(found, prereleases=True):
            fix = "update the cluster; it runs the code that is installed here"
            rule, got = f"a cluster with {name} {wanted}", f"{found} at {self.shown}"
            raise ValueError(complain("address", rule, got, fix))
        if name == "Ray" and Version(found).release[:2] != Version(our_ray).release[:2]:
            self.warnings.add(f"the cluster has Ray {found}, here is Ray {our_ray}: it may differ")

    def _ray_version(self, answer: requests.Response) -> str:
        """Ray's version, of the answer that only a dashboard gives."""
        try:
            return str(Version(answer.json()["ray_version"]))
        except (ValueError, KeyError, TypeError, InvalidVersion) as e:
            kind = answer.headers.get("Content-Type", "nothing").partition(";")[0]
            got = f"{self.shown}, which answers {answer.status_code} with {kind}"
            fix = "give what `ray start` calls the dashboard, or forward its port"
            raise ValueError(complain("address", "Ray's dashboard", got, fix)) from e

    def _no_answer(self, why: str, first: bool) -> Exception:
        if not first:
            return WorkError(f"{self.shown} does not answer: {why}")
        fix = f"check it and that the head runs ({why})"
        return ValueError(complain("address", "a dashboard that answers", self.shown, fix))

    def _no_entry(self, why: str) -> ValueError:
        fix = (
            "print the token on the head with `ray get-auth-token` and set RAY_AUTH_TOKEN to it, "
            "or put it into ~/.ray/auth_token or the file that RAY_AUTH_TOKEN_PATH names"
        )
        got = f"{self.shown} ({why})"
        return ValueError(complain("address", "a cluster that lets us in", got, fix))


def _wanted(name: str) -> SpecifierSet:
    """The versions of Python or Ray that this package asks for."""
    try:
        ours = importlib.metadata.metadata("zsplg_ray")
    except importlib.metadata.PackageNotFoundError:  # run from a folder that is not installed
        return SpecifierSet()
    if name == "Python":
        return SpecifierSet(ours["Requires-Python"])
    needs = map(Requirement, ours.get_all("Requires-Dist") or [])
    return next((need.specifier for need in needs if need.name == "ray"), SpecifierSet())


def _reason(error: requests.exceptions.RequestException) -> str:
    """The last cause of a failed request, without the library's names around it."""
    cause = error.args[0] if error.args else error
    if "BadStatusLine" in str(cause):
        return "what is there does not speak HTTP"
    return re.sub(r"^\w+\([^)]*\): ", "", _last_line(getattr(cause, "reason", cause)))


def _last_line(told: object) -> str:
    lines = [line.strip() for line in str(told).strip().splitlines() if line.strip()]
    return masked(lines[-1])[:300] if lines else "nothing"


@contextlib.contextmanager
def _env(name: str, value: str) -> Iterator[None]:
    """An environment variable, for as long as this lasts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
