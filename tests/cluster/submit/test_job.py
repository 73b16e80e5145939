"""`zsplg submit` against a dashboard that answers as Ray's does: what is sent, and who answers."""

import json
import os
import shlex
import socket
from pathlib import Path

import pytest
from aiohttp import web
from ray.dashboard.modules.dashboard_sdk import SubmissionClient

import zsplg_ray
from tests.cluster.submit.command import LABEL, submit
from zsplg_ray import cli
from zsplg_ray.cluster.submit import client as room
from zsplg_ray.cluster.submit.client import dashboard_address, find_token

pytestmark = pytest.mark.usefixtures("quick")

# What is sent ------------------------------------------------------------------------------------


def test_a_job_is_the_verb_with_its_settings_its_files_and_our_code(fake, told):
    Path("classes.txt").write_text("cat")
    Path("a.jpg").write_text("x")
    assert submit(fake, "--env", "A_KEY", "hush-hush", "B", "2") == 0
    out, err = told()
    [job] = fake.jobs
    words = shlex.split(job["entrypoint"])
    assert words == ["python", "-m", "zsplg_ray.cli", *LABEL]
    assert fake.zipped() == ["classes.txt"]
    env = job["runtime_env"]
    assert env["env_vars"] == {"A_KEY": "hush-hush", "B": "2", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    [module] = env["py_modules"]
    assert len(fake.packages[module.rpartition("/")[2]]) > 100_000
    about = job["metadata"]
    assert {k: about[k] for k in ("verb", "version", "out")} == {
        "verb": "label",
        "version": zsplg_ray.__version__,
        "out": "s3://***@b/run",
    }
    assert len(about["fingerprint"]) == 16 and about["user"]
    assert all(isinstance(value, str) for value in about.values())
    assert "hush-hush" not in out + err and "word" not in out + err
    assert "sends 1 file of" in err and "sets A_KEY, B" in err and "credentials in the" in err
    assert "to the nodes; with --env whoever has the token can read them" in err
    name = job["submission_id"]
    assert name.startswith("label-") and out.startswith(f"{name} is a job on {fake.address}\n")
    assert f"ray job logs --address {fake.address} --follow {name}" in out
    assert f"ray job stop --address {fake.address} {name}" in out
    assert out.endswith("its result: s3://***@b/run\n")


def test_the_line_survives_a_shell(fake, monkeypatch):
    assert submit(fake, command=[*LABEL[:4], "new\nline,~,!x,-- ;&|", *LABEL[5:]]) == 0
    line = fake.jobs[0]["entrypoint"].replace("python -m zsplg_ray.cli", "printf '%s\\0'")
    assert os.popen(line).read().split("\0")[:-1] == [
        *LABEL[:4],
        "new\nline,~,!x,-- ;&|",
        *LABEL[5:],
    ]


def test_the_same_files_are_sent_once(fake):
    Path("classes.txt").write_text("cat")
    assert submit(fake) == submit(fake) == 0
    assert sum(line.startswith("PUT") for line in fake.seen) == 2  # the folder and the package
    assert len({job["submission_id"] for job in fake.jobs}) == 2


@pytest.mark.parametrize("flags", [["--working-dir", "None"], []])
def test_without_files_there_is_no_working_directory(fake, flags, told):
    assert submit(fake, *flags, "--json", "--job-id", "my-job.1") == 0
    assert "working_dir" not in fake.jobs[0]["runtime_env"]
    out, err = told()
    assert json.loads(out) == {
        "job_id": "my-job.1",
        "status": "SUBMITTED",
        "exit_code": None,
        "address": fake.address,
        "out": "s3://***@b/run",
    }
    assert "sends no files" in err


def test_a_run_is_not_looked_for_here(fake):
    command = ["relabel", "--run", "/only/there", "--compose.min-margin", "0.1"]
    assert submit(fake, command=command) == 0


# What is refused before anything is sent ---------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--", *LABEL[:-1], "run"], "out must be an address or an absolute path in a job"),
        (["--", *LABEL, "--ray.address", "head:6379"], "ray.address must be left out in a job"),
        (["--", *LABEL, "--sam", "vit_x"], "sam.model must be one of vit_h"),
        (["--job-id", "a/b", "--", *LABEL], "job_id must be letters, digits"),
        (["--env", "A=B", "c", "--", *LABEL], "env must be a name and a value"),
        (["--working-dir", "none", "--", *LABEL], "working_dir must be a folder, got /"),
        (["--address", "ray://head:10001", "--", *LABEL], "give http://head:8265"),
        (
            ["--address", "ray://u:word@head:1", "--", *LABEL],
            "got ray://***@head:1; give http://head:",
        ),
        (["--address", "ray://[::1]:1", "--", *LABEL], "give http://[::1]:8265"),
        (["--address", "ray://[x:1", "--", *LABEL], "give http://HOST:8265"),
        (["--working-dir", "~no-one-here", "--", *LABEL], "got ~no-one-here; write the whole path"),
        (["--address", "http://:8265", "--", *LABEL], "write http://head:8265"),
        (["--address", "http://head:x", "--", *LABEL], "write http://head:8265"),
        (["--address", "auto", "--", *LABEL], "write http://head:8265"),
    ],
)
def test_bad_input_sends_nothing(fake, argv, told, capsys):
    assert cli.main(["submit", "--address", fake.address, *argv]) == 2
    out, err = capsys.readouterr()
    assert told in err and err.startswith("error: ") and len(err.splitlines()) == 1 and not out
    assert not fake.seen


@pytest.mark.parametrize("given", [["A", "hush", "B"], ["--config", "s.yaml"]])
def test_what_env_holds_is_not_shown_even_in_errors(fake, given, capsys):
    Path("s.yaml").write_text("env: {A: hush, B: 1}")
    flags = given if given[0] == "--config" else ["--env", *given]
    assert submit(fake, *flags) == 2
    err = capsys.readouterr().err
    assert "env must be a name and a text for each variable" in err and "hush" not in err


def test_too_much_to_send_is_told_before_it_is_sent(fake, capsys):
    Path("table.csv").write_bytes(b"x" * 2_000_000)
    assert submit(fake, "--max-working-dir-mib", "1") == 2
    assert "most in table.csv 1.9 MiB" in capsys.readouterr().err and not fake.seen


def test_ray_settings_that_mean_nothing_there_are_told(fake, told):
    command = [*LABEL, "--ray.num-cpus", "2", "--ray.address", "auto"]
    assert submit(fake, command=command) == 0
    assert "ray.num_cpus has no effect in a job" in told()[1]


# Who answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("head", "http://head:8265"),
        ("head:1", "http://head:1"),
        ("http://head:1//", "http://head:1"),
        ("HTTP://head:1", "http://head:1"),
        ("https://ray.example.org/team/", "https://ray.example.org/team"),
        ("http://[::1]:8265", "http://[::1]:8265"),
        (None, "http://127.0.0.1:8265"),
    ],
)
def test_addresses_as_people_write_them(given, address):
    assert dashboard_address(given) == address


def test_an_address_that_is_given_wins_over_the_environment(fake, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://10.0.0.1:8265")
    assert dashboard_address(None) == "http://10.0.0.1:8265"
    assert submit(fake) == 0
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://10.0.0.1:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", fake.address)
    assert cli.main(["submit", "--", *LABEL]) == 0
    assert len(fake.jobs) == 2


def test_nobody_answers(capsys):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, but it does not listen
        address = f"http://127.0.0.1:{held.getsockname()[1]}"
        assert cli.main(["submit", "--address", address, "--", *LABEL]) == 2
    err = capsys.readouterr().err
    assert f"address must be a dashboard that answers, got {address}" in err
    assert "Connection refused" in err and len(err.splitlines()) == 1 and "Pool" not in err


def test_what_hangs_is_not_waited_for(capsys, monkeypatch):
    monkeypatch.setattr(room, "TIMEOUT_S", (0.2, 0.2))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert cli.main(["submit", "--address", address, "--", *LABEL]) == 2
    assert "no answer in time" in capsys.readouterr().err


@pytest.mark.parametrize("status", [200, 404, 500])
def test_something_else_answers(fake, capsys, status):
    fake.special = lambda request: web.Response(
        text="<html>hello</html>", content_type="text/html", status=status
    )
    assert submit(fake) == 2
    err = capsys.readouterr().err
    told = f"address must be Ray's dashboard, got {fake.address}, which answers {status} with text"
    assert told in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("python", "ray_version", "told"),
    [
        ("3.9.18", None, "must be a cluster with Python >=3.11, got 3.9.18 at"),
        ("3.11.1", "2.9.0", "must be a cluster with Ray >=2.60, got 2.9.0 at"),
        ("3.11.1", "1.8.0", "must be a cluster with Ray >=2.60, got 1.8.0 at"),
    ],
)
def test_a_cluster_of_another_age_is_refused(fake, capsys, python, ray_version, told):
    fake.python_version, fake.ray_version = python, ray_version
    assert submit(fake) == 2
    assert told in capsys.readouterr().err and not fake.jobs and not fake.packages


def test_a_cluster_that_is_a_little_newer_is_warned_of(fake, told):
    fake.ray_version = "2.99.0"
    assert submit(fake) == 0
    assert "the cluster has Ray 2.99.0, here is Ray" in told()[1]


@pytest.mark.parametrize(
    ("path", "status", "body", "code", "told"),
    [
        (
            "PUT /api/packages",
            413,
            "big",
            2,
            "working_dir must be no larger than the cluster takes",
        ),
        ("PUT /api/packages", 500, "no\nroom", 1, "answered 500: room"),
        ("POST /api/jobs", 500, "Job with submission_id x already exists", 2, "job_id must be a"),
        ("POST /api/jobs", 500, "No available agent", 1, "answered 500: No available agent"),
    ],
)
def test_a_cluster_that_says_no(fake, capsys, path, status, body, code, told):
    Path("classes.txt").write_text("cat")
    fake.special = lambda request: (
        web.Response(status=status, text=body)
        if f"{request.method} {request.path}".startswith(path)
        else None
    )
    assert submit(fake) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and told in last and not fake.jobs


@pytest.mark.parametrize("raised", [RuntimeError("no\nroom"), ConnectionError("no room")])
def test_what_rays_client_raises_is_one_line(fake, capsys, monkeypatch, raised):
    def fail(*given: object, **named: object) -> None:
        raise raised

    monkeypatch.setattr(room.JobSubmissionClient, "submit_job", fail)
    assert submit(fake) == 1
    assert capsys.readouterr().err.endswith("error: no room\n")


def test_without_an_answer_there_may_be_a_job(fake, capsys):
    def hang_up(request: web.Request) -> None:
        if request.method == "POST":
            assert request.transport is not None
            request.transport.abort()

    fake.special = hang_up
    assert submit(fake, "--job-id", "mine") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "does not answer" in last and last.endswith("; mine may have been submitted")


@pytest.mark.parametrize("name", ["_do_request", "_raise_error"])
def test_a_ray_whose_client_is_another_is_refused(fake, capsys, monkeypatch, name):
    monkeypatch.delattr(SubmissionClient, name)
    assert submit(fake) == 1
    err = capsys.readouterr().err
    assert f"which is installed here, has no {name}; install an earlier Ray >=" in err
    assert not fake.seen


# The token ---------------------------------------------------------------------------------------


def test_without_the_token_there_is_no_entry(fake, capsys, monkeypatch):
    fake.token = "right"
    assert submit(fake) == 2
    assert "no token was found here); print the token on the head" in capsys.readouterr().err
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    assert submit(fake) == 2
    err = capsys.readouterr().err
    assert "the token that was found here is not the cluster's" in err and "wrong" not in err
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert submit(fake) == 2 and not fake.jobs


def test_the_token_is_found_where_ray_finds_it(fake, capsys, monkeypatch, tmp_path):
    fake.token = "right"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("right\n")
    assert submit(fake) == 0
    assert "RAY_AUTH_MODE=token ray job logs" in capsys.readouterr().out
    (tmp_path / "other").write_text("other")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert find_token() == "other"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "third")
    assert find_token() == "third"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert find_token() is None
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/none")
    assert submit(fake) == 2
    assert "RAY_AUTH_TOKEN_PATH must be a file that holds the token" in capsys.readouterr().err


def test_who_has_no_home_has_no_token_there(monkeypatch):
    def nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    monkeypatch.setattr(Path, "home", lambda: nobody(Path()))
    assert find_token() is None
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "~/token")
    with pytest.raises(ValueError, match="RAY_AUTH_TOKEN_PATH must be a file that holds"):
        find_token()
