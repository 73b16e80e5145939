"""`zsplg submit`: one verb as a job, by Ray Job Submission.

What enters: a `SubmitConfig`, and the verb with settings that have been checked already. What
leaves: a `Job` on the cluster. All that can be wrong is looked for before anything is sent: places
that the job would not find, settings that make no sense there, a folder too large, an address where
no dashboard is, a token that is not the cluster's, versions that do not fit.

The job runs `python -m zsplg_ray.cli VERB ...`, with the package as it is installed here
(py_modules), in a copy of the working directory.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zsplg_ray
from zsplg_ray.cluster.submit.client import Client, dashboard_address
from zsplg_ray.cluster.submit.places import check_places
from zsplg_ray.cluster.submit.sent import Sent, check_size, choose, mib, pack
from zsplg_ray.config import RayConfig, SubmitConfig
from zsplg_ray.runinfo import recorded, user_name
from zsplg_ray.safe_text import masked
from zsplg_ray.settings import Section, WorkError, complain, fingerprint, flatten

log = logging.getLogger(__name__)

STOP_WAIT_S = "60"
"""Seconds that a stopped job has to write down what it has; Ray's own 3 are not enough."""

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NOT_OF_THE_PACKAGE = ["__pycache__/", "*.py[co]"]


@dataclass(frozen=True)
class Command:
    """A verb as it will run in the job."""

    verb: str
    argv: Sequence[str]
    """What stands behind the verb."""
    settings: Section
    """What `argv` means, checked."""
    config_file: str | None = None
    """What `--config` names."""

    @property
    def line(self) -> str:
        """For a shell."""
        words = [*self.verb.split(), *self.argv]
        return f"python -m zsplg_ray.cli {shlex.join(words)}"

    @property
    def out(self) -> str | None:
        """Where its result will be, without credentials; None if it only prints."""
        found = getattr(self.settings, "out", None) or getattr(self.settings, "run", None)
        if isinstance(found, tuple):
            found = " ".join(found)
        return masked(found) if found else None


@dataclass(frozen=True)
class Job:
    """A job that the cluster has taken."""

    job_id: str
    address: str
    """The dashboard's, without credentials."""
    out: str | None
    client: Client = field(repr=False)

    @property
    def how_to(self) -> str:
        """How to look at it and how to end it, with Ray's own command."""
        mode = os.environ.get("RAY_AUTH_MODE", "").lower()
        ray = "RAY_AUTH_MODE=token ray job" if self.client.token and mode != "token" else "ray job"
        where = f"--address {shlex.quote(self.address)}"
        return (
            f"follow it:  {ray} logs {where} --follow {self.job_id}\n"
            f"stop it:    {ray} stop {where} {self.job_id}"
        )

    def told(self, status: str, code: int | None) -> dict[str, Any]:
        """For machines: the job, and how it ended."""
        about = {"job_id": self.job_id, "status": status, "exit_code": code}
        return {**about, "address": self.address, "out": self.out}


def submit(config: SubmitConfig, command: Command) -> Job:
    """Check, send, start.

    Raises:
        ValueError: Bad input; nothing runs on the cluster.
        WorkError: The cluster failed.
    """
    address = dashboard_address(config.address)
    job_id = _job_id(config, command.verb)
    _check_env(config)
    _check_ray(command.settings)
    sent = None
    if config.working_dir is not None:
        sent = choose(_root(config.working_dir), config.exclude, package=zsplg_ray.__name__)
    shared = check_places(command.settings, command.config_file, sent)
    if sent is not None:
        check_size(sent, config.max_working_dir_mib)
    client = Client(address)
    client.check_python()
    job = Job(job_id, client.shown, command.out, client)
    if shared:
        log.info("taken to be the same place on all nodes: %s", masked(", ".join(shared)))
    if any(masked(word) != word for word in command.argv):
        told = "the credentials in the command can be read by whoever sees the cluster's dashboard"
        better = "better give them to the nodes; with --env whoever has the token can read them"
        log.warning("%s: %s", told, better)
    with tempfile.TemporaryDirectory(prefix="zsplg_submit_") as scratch:
        environment = _runtime_env(config, sent, Path(scratch))
        _start(job, command, environment)
    return job


def _start(job: Job, command: Command, environment: dict[str, Any]) -> None:
    """Have the cluster take the job; an error or interruption says so if it may have done that."""
    try:
        job.client.submit_job(
            entrypoint=command.line,
            submission_id=job.job_id,
            runtime_env=environment,
            metadata=_metadata(command),
        )
    except KeyboardInterrupt as e:
        if not job.client.unsure:
            raise
        raise KeyboardInterrupt(f"{job.job_id} may have been submitted\n{job.how_to}") from e
    except (RuntimeError, ConnectionError) as e:
        perhaps = f"; {job.job_id} may have been submitted" if job.client.unsure else ""
        raise WorkError(" ".join(str(e).split()) + perhaps) from e


def _root(working_dir: str) -> Path:
    """The folder to send. Raises: ValueError if `~` is nobody's home."""
    try:
        return Path(working_dir).expanduser().absolute()
    except RuntimeError as e:
        fix = "write the whole path"
        raise ValueError(complain("working_dir", "a folder", working_dir, fix)) from e


def _job_id(config: SubmitConfig, verb: str) -> str:
    """The job's name. Raises: ValueError for one that cannot stand in an address."""
    if config.job_id is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        return f"{verb.replace(' ', '-')}-{stamp}-{secrets.token_hex(2)}"
    if not _JOB_ID.fullmatch(config.job_id):
        rule = "letters, digits, '.', '_' and '-', at most 128"
        raise ValueError(complain("job_id", rule, config.job_id, "choose another name"))
    return config.job_id


def _check_env(config: SubmitConfig) -> None:
    """Names of variables are such; values are nobody's business. Raises: ValueError."""
    for name in config.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            rule = "a name and a value for each variable"
            raise ValueError(complain("env", rule, name, "write --env NAME VALUE [NAME VALUE ...]"))


def _check_ray(settings: Section) -> None:
    """A job's cluster is the one it runs on. Raises: ValueError for another."""
    ray = getattr(settings, "ray", None)
    if not isinstance(ray, RayConfig):
        return
    if ray.address not in (None, "auto"):
        fix = "leave it out; where the job goes is said by --address, before the --"
        raise ValueError(complain("ray.address", "left out in a job", ray.address, fix))
    plain = flatten(RayConfig())
    for name, value in flatten(ray).items():
        if name != "address" and value != plain[name]:
            log.warning("ray.%s has no effect in a job: the cluster is there already", name)


def _metadata(command: Command) -> dict[str, str]:
    """What the cluster keeps beside the job, for people: no credentials."""
    told = {
        "verb": command.verb,
        "fingerprint": fingerprint(recorded(command.settings)),
        "user": user_name(),
        "version": zsplg_ray.__version__,
    }
    return told | ({"out": command.out} if command.out else {})


def _runtime_env(config: SubmitConfig, sent: Sent | None, scratch: Path) -> dict[str, Any]:
    """What the job runs in; the working directory is packed into `scratch`."""
    package = Path(zsplg_ray.__file__).parent
    environment: dict[str, Any] = {
        "py_modules": [str(package)],
        "excludes": _NOT_OF_THE_PACKAGE,
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": STOP_WAIT_S, **config.env},
    }
    if sent is None or not sent.files:
        log.info("sends no files, and zsplg_ray %s from %s", zsplg_ray.__version__, package)
    else:
        target = scratch / "working_dir.zip"
        packed = pack(sent, target)
        environment["working_dir"] = str(target)
        files = f"{len(sent.files)} file" + ("s" if len(sent.files) > 1 else "")
        told = f"{files} of {sent.root}, {mib(sent.size)} ({mib(packed)} packed)"
        log.info("sends %s, and zsplg_ray %s from %s", told, zsplg_ray.__version__, package)
    if config.env:
        log.info("sets %s", ", ".join(sorted(config.env)))
    return environment
