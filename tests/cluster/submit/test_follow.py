"""A job that is followed: its log, its end, a dashboard that is away, Ctrl-C."""

import json
import os
import pty
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.job_submission import JobDetails, JobSubmissionClient

from tests.cluster.submit.command import submit
from zsplg_ray.cluster.submit import follow

pytestmark = pytest.mark.usefixtures("quick")

# Following ---------------------------------------------------------------------------------------


def state(status: str, code: int | None = None, message: str = "") -> dict[str, object]:
    return {"status": status, "driver_exit_code": code, "message": message}


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (state("SUCCEEDED", 0), 0),
        (state("FAILED", 2), 2),
        (state("FAILED", 7), 7),
        (state("FAILED", -9), 137),
        (state("STOPPED"), 130),
    ],
)
def test_wait_shows_the_log_and_exits_with_the_jobs_code(fake, told, end, code):
    fake.states = [state("PENDING"), state("RUNNING"), end]
    assert submit(fake, "--wait") == code
    out, err = told()
    assert out == "a\nb\nc\n" and f"ended: {end['status']}" in err


def test_a_job_that_never_began_tells_why(fake, capsys):
    fake.log = []
    fake.states = [state("FAILED", None, "Traceback:\n  x\nruntime_env setup failed: no disk")]
    assert submit(fake, "--wait") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: label-") and last.endswith("setup failed: no disk")


def test_json_keeps_the_log_off_stdout(fake, capsys):
    fake.states = [state("FAILED", 3)]
    assert submit(fake, "--wait", "--json") == 3
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["status"], told["exit_code"]) == ("FAILED", 3) and "a\nb\nc\n" in err


@pytest.mark.parametrize("breaks", [[0], [1, 2], [2, 1, 0, 2, 3]])
def test_a_log_that_breaks_is_taken_up_where_it_stopped(fake, capsys, breaks):
    fake.breaks = list(breaks)
    fake.states = [state("RUNNING")]

    def end() -> None:
        if fake.tailed > len(breaks):
            fake.states = [state("SUCCEEDED", 0)]

    fake.while_tailing = end
    assert submit(fake, "--wait") == 0
    assert fake.tailed > len(breaks)
    assert capsys.readouterr().out == "a\nb\nc\n"


def test_a_log_is_shown_once_whatever_comes():
    shown: list[str] = []
    log = follow.JobLog(shown.append)
    for at, text in [(0, "ab"), (0, "a"), (1, "bcd"), (9, "gap"), (0, "abcde"), (5, "")]:
        log.put(at, text)
    assert "".join(shown) == "abcde"


def test_a_job_that_waits_says_why(fake, told):
    fake.status = "Usage\nPending Demands:\n {'GPU': 1.0}: 3+ pending tasks/actors\n"
    fake.states = [state("PENDING", None, "It may be waiting\nfor its environment.")]

    def see() -> None:
        if fake.seen.count("GET /api/cluster_status") > 3:
            fake.states = [state("SUCCEEDED", 0)]

    fake.while_tailing = see
    fake.breaks = [0] * 1000
    assert submit(fake, "--wait") == 0
    err = told()[1]
    assert err.count("waits: It may be waiting for its environment.") == 1
    assert err.count("the cluster has no room yet for {'GPU': 1.0}\n") == 1


def test_a_dashboard_that_is_away_for_a_while(fake, told):
    fake.states = [state("RUNNING"), state("SUCCEEDED", 0)]
    away = iter([False] + [True] * 3)
    fake.special = lambda request: (
        web.Response(status=502, text="<html>bad gateway</html>", content_type="text/html")
        if request.path.count("/") == 3 and "jobs/label" in request.path and next(away, False)
        else None
    )
    assert submit(fake, "--wait") == 0
    assert told()[1].count("asking again") == 1


def test_a_dashboard_that_stays_away(fake, capsys, monkeypatch):
    monkeypatch.setattr(follow, "PACE", replace(follow.PACE, lost=0.1))
    fake.special = lambda request: (
        web.Response(status=502, text="bad gateway") if "jobs/label" in request.path else None
    )
    assert submit(fake, "--wait") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "answered 502: bad gateway; the job may go on without us" in last


def test_a_job_that_the_cluster_has_forgotten(fake, capsys):
    fake.states = [state("RUNNING"), state("UNKNOWN")]
    assert submit(fake, "--wait") == 1
    assert "the cluster does not know label-" in capsys.readouterr().err.splitlines()[-1]


# Ctrl-C ------------------------------------------------------------------------------------------


class Terminal:
    """A terminal whose user answers so."""

    def __init__(self, answer: str | None) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        if self.answer is None:
            raise KeyboardInterrupt
        return self.answer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_without_a_terminal_leaves_the_job_alone(fake, capsys, number):
    fake.states = [state("RUNNING")]
    fake.while_tailing = lambda: os.kill(os.getpid(), number)
    assert submit(fake, "--wait") == 130
    err = capsys.readouterr().err
    assert "goes on\nfollow it:  ray job logs" in err and not fake.stopped


def test_sigterm_asks_nobody_even_at_a_terminal(fake, capsys, monkeypatch):
    fake.states = [state("RUNNING")]
    fake.while_tailing = lambda: os.kill(os.getpid(), signal.SIGTERM)
    user, terminal = pty.openpty()
    os.write(user, b"y\n")  # an answer to whoever asks, so that nothing waits
    with os.fdopen(user, "rb"), os.fdopen(terminal) as stdin:
        assert stdin.isatty()
        monkeypatch.setattr(sys, "stdin", stdin)
        assert submit(fake, "--wait") == 130
    err = capsys.readouterr().err
    assert "? [y/N]" not in err and "goes on\nfollow it:  ray job logs" in err and not fake.stopped


@pytest.mark.parametrize("answer", ["", "n\n", "\n", "what\n", None])
def test_ctrl_c_asks_and_anything_but_yes_leaves_it(fake, capsys, monkeypatch, answer):
    fake.states = [state("RUNNING")]
    fake.while_tailing = lambda: os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert submit(fake, "--wait") == 130
    err = capsys.readouterr().err
    assert "? [y/N] " in err and "goes on" in err and not fake.stopped


def test_ctrl_c_and_yes_stops_it_and_shows_how_it_ended(fake, capsys, monkeypatch):
    fake.states = [state("RUNNING")]
    fake.breaks = [1]
    interrupts = iter([lambda: os.kill(os.getpid(), signal.SIGINT)])
    fake.while_tailing = lambda: next(interrupts, lambda: None)()
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert submit(fake, "--wait") == 130
    out, err = capsys.readouterr()
    assert fake.stopped == [fake.jobs[0]["submission_id"]] and "ended: STOPPED" in err
    assert out == "a\nb\nc\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_before_the_answer_leaves_open_whether_there_is_a_job(
    fake, capsys, monkeypatch, number
):
    def interrupt(job: JobSubmissionClient, method: str, *more: Any, **named: Any) -> object:
        answer = ask(job, method, *more, **named)  # which the dashboard has taken
        if method == "POST":
            signal.raise_signal(number)
        return answer

    ask = SubmissionClient._do_request
    monkeypatch.setattr(SubmissionClient, "_do_request", interrupt)
    assert submit(fake, "--job-id", "mine") == 130
    err = capsys.readouterr().err
    assert "interrupted; mine may have been submitted\nfollow it:  ray job logs --address" in err
    assert err.endswith(f"ray job stop --address {fake.address} mine\n") and len(fake.jobs) == 1


def test_an_interruption_before_the_job_is_asked_for_leaves_none(fake, capsys):
    Path("classes.txt").write_text("cat")

    def interrupt(request: web.Request) -> None:
        if request.method == "PUT":
            os.kill(os.getpid(), signal.SIGINT)

    fake.special = interrupt
    assert submit(fake) == 130
    assert capsys.readouterr().err.endswith("interrupted; no job was submitted\n")
    assert not fake.jobs


def test_exit_codes_without_a_code():
    about = {"type": "SUBMISSION", "submission_id": "x", "entrypoint": "y"}
    assert follow.exit_code(JobDetails(**about, status="FAILED")) == 1  # type: ignore[arg-type]
