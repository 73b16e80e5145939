"""A job from its submission to its end: its log as it comes, why it waits, how it ended.

What enters: a client, a job's name, where its log goes. What leaves: the job's last state and its
exit code. A connection that breaks ends nothing: the log is taken up again where it stopped, and
only the job's state, which is asked for again and again, decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
from ray.job_submission import JobDetails, JobStatus

from zsplg_ray.cluster.submit.client import Client, Gone
from zsplg_ray.settings import WorkError

log = logging.getLogger(__name__)

STOPPED_CODE = 130
"""Exit code of a job that was stopped: what an interrupted command has."""


@dataclass(frozen=True)
class Pace:
    """How often something is done, seconds."""

    look: float = 1.0
    """Between two questions for the job's state."""
    patience: float = 8.0
    """Before it is told why a job does not start."""
    again: float = 3.0
    """Before a broken log is taken up again."""
    waits: float = 15.0
    """Between two questions for what the cluster waits for."""
    lost: float = 300.0
    """Without any answer, after which the job is given up on (it may go on)."""


PACE = Pace()


@dataclass
class JobLog:
    """What has been shown of a job's log: each character once, in order."""

    show: Callable[[str], None]
    length: int = 0

    def put(self, at: int, text: str) -> None:
        """A piece of the log that begins at its character `at`; what was shown is skipped."""
        if at + len(text) > self.length >= at:
            self.show(text[self.length - at :])
            self.length = at + len(text)


@dataclass
class Follower:
    """Follows one job; `watch` may be called again after an interruption."""

    client: Client
    job_id: str
    log: JobLog
    pace: Pace = field(default_factory=lambda: PACE)
    told: set[str] = field(default_factory=set)

    def watch(self) -> JobDetails:
        """Show the log until the job has ended; returns its last state.

        Raises:
            WorkError: The cluster does not know the job (any more), or has not answered for long.
            KeyboardInterrupt: Ctrl-C; the job goes on.
        """
        return asyncio.run(self._watch())

    async def _watch(self) -> JobDetails:
        reader = asyncio.create_task(self._read())
        reasons = asyncio.create_task(self._reasons())
        begun = time.monotonic()
        try:
            while not (details := await self._details()).status.is_terminal():
                waits = details.status == JobStatus.PENDING and details.message
                if waits and time.monotonic() - begun > self.pace.patience:
                    self._tell(f"{self.job_id} waits: {' '.join(waits.split())}")
                await asyncio.sleep(self.pace.look)
        finally:
            for task in (reader, reasons):
                task.cancel()
            await asyncio.gather(reader, reasons, return_exceptions=True)
        with contextlib.suppress(WorkError):  # its node may be gone; what came before was shown
            self.log.put(0, await self._whole())
        return details

    async def _details(self) -> JobDetails:
        """The job's state, asked for until there is an answer."""
        since = time.monotonic()
        while True:
            try:
                return await asyncio.to_thread(self.client.get_job_info, self.job_id)
            except Gone as e:
                raise WorkError(f"the cluster does not know {self.job_id} any more; {e}") from e
            except (WorkError, ValueError) as e:  # ValueError: what answers is not the dashboard
                if time.monotonic() - since > self.pace.lost:
                    raise WorkError(f"{e}; the job may go on without us") from e
                self._tell(f"{e}; asking again")
            await asyncio.sleep(self.pace.look)

    async def _read(self) -> None:
        """Show the log as it grows, again and again from where it broke, until cancelled."""
        while True:
            at = 0
            try:
                async for text in self.client.tail_job_logs(self.job_id):
                    self.log.put(at, text)
                    at += len(text)
            except (aiohttp.ClientError, RuntimeError, OSError, TimeoutError) as e:
                log.debug("log of %s: %s", self.job_id, e)
                with contextlib.suppress(WorkError, ValueError):  # where no websocket gets through
                    self.log.put(0, await self._whole())
            await asyncio.sleep(self.pace.again)

    async def _whole(self) -> str:
        return await asyncio.to_thread(self.client.get_job_logs, self.job_id)

    async def _reasons(self) -> None:
        """Tell what the cluster lacks, if it lacks the same at two looks."""
        before = None
        while True:
            await asyncio.sleep(self.pace.waits)
            try:
                now = await asyncio.to_thread(self.client.waiting_for)
            except (WorkError, ValueError):
                continue
            if now is not None and before is not None and _kinds(now) == _kinds(before):
                self._tell(f"the cluster has no room yet for {_kinds(now)}")
            before = now

    def _tell(self, line: str) -> None:
        """Say something once."""
        if line not in self.told:
            self.told.add(line)
            log.info("%s", line)


def exit_code(details: JobDetails) -> int:
    """What the command that followed a job exits with: what the job did, or would have."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED_CODE
    code = details.driver_exit_code
    return 1 if not code else code if code > 0 else 128 - code  # killed by a signal, as shells do


def why_failed(details: JobDetails) -> str | None:
    """One line on a job that failed before its command could say why; None for any other."""
    if details.status != JobStatus.FAILED or details.driver_exit_code is not None:
        return None
    lines = [line.strip() for line in (details.message or "").splitlines() if line.strip()]
    return f"{details.submission_id} failed: {lines[-1] if lines else 'no reason is known'}"


def _kinds(demands: str) -> str:
    """Demands without how many of each there are, which changes all the time."""
    kinds = (re.sub(r": *\d+\+? pending.*", "", part) for part in demands.split("; "))
    return "; ".join(dict.fromkeys(kinds))
