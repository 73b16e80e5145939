"""`zsplg submit` on a real head with its token, as `ray start` sets one up: jobs that end, fail and
are stopped.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import zsplg_ray
from zsplg_ray import cli, config
from zsplg_ray.cluster.submit import follow
from zsplg_ray.cluster.submit.client import Client
from zsplg_ray.images import decode_image
from zsplg_ray.label.labeler import Labeler
from zsplg_ray.label.naming import prepare
from zsplg_ray.label.presets import resolve_label
from zsplg_ray.records import encode_png
from zsplg_ray.rundir import RunFolder
from zsplg_ray.shapes.scenes import write_voc
from zsplg_ray.vocab import class_list

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = ["--sam", "shapes", "--clip", "shapes", "--sam.points-per-side", "4"]
JOBS = Path(zsplg_ray.__file__).parent.parent / "jobs"
WAIT_S = 300


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A user's home that has the cluster's token."""
    folder = tmp_path_factory.mktemp("home")
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text("open-sesame-" * 4)
    return folder


@pytest.fixture(scope="module")
def head(home) -> Iterator[str]:
    """The address of a head of our own; the token is on, as it is wherever there is one."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(4)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        port, dashboard, agent, client = (each.getsockname()[1] for each in sockets)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    env |= {"RAY_worker_niceness": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    where = tempfile.mkdtemp(prefix="zr_", dir="/tmp")  # paths of sockets must be short
    words = f"{Path(sys.executable).parent}/ray start --head --block --disable-usage-stats"
    words += f" --port {port} --dashboard-port {dashboard} --dashboard-agent-listen-port {agent}"
    words += f" --ray-client-server-port {client} --dashboard-host 127.0.0.1 --temp-dir {where}"
    words += " --num-cpus 4 --object-store-memory 100000000"
    with Path(where, "out").open("w") as out:
        started = subprocess.Popen(words.split(), env=env, stdout=out, stderr=out)
    try:
        until = time.monotonic() + WAIT_S
        while started.poll() is None and time.monotonic() < until and not answers(dashboard):
            time.sleep(0.2)
        assert answers(dashboard), Path(where, "out").read_text()[-2000:]
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(30)
        for left in [
            p for p in Path("/proc").iterdir() if p.name.isdecimal() and runs_in(p, where)
        ]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(left.name), signal.SIGKILL)
        started.wait(10)
        shutil.rmtree(where, ignore_errors=True)


def runs_in(process: Path, folder: str) -> bool:
    """Whether the command line of a process in /proc names our folder."""
    with contextlib.suppress(OSError):
        return folder.encode() in (process / "cmdline").read_bytes()
    return False


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(autouse=True)
def user(home, head, tmp_path, monkeypatch):
    """Somebody who has the token, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_without_the_token_nothing_is_let_in(head, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["submit", "--address", head, "--", "shapes", "--out", "/none"]
    assert cli.main(argv) == 2
    assert "no token was found here" in capsys.readouterr().err
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another" * 5)
    assert cli.main(argv) == 2
    assert "the token that was found here is not the cluster's" in capsys.readouterr().err


def test_a_job_labels_as_a_local_run_does(head, tmp_path, capsys):
    write_voc(tmp_path / "scenes", 6, seed=0)
    Path("classes.txt").write_text("circle\nstar: five-pointed star\n")
    out = str(tmp_path / "run")
    given = ["--images", str(tmp_path / "scenes"), "--classes", "classes.txt", "--out", out]
    argv = ["submit", "--address", head, "--wait", "--", "label", *given, *TINY]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "6 images labelled" in shown and f"{out}/labels" in shown
    assert shown.count("Running entrypoint") == 1
    labels = RunFolder(out).read("labels")
    assert labels is not None
    found = dict(zip(labels["uri"].to_pylist(), labels["label_png"].to_pylist(), strict=True))
    resolved = resolve_label(cli.parse(config.LabelConfig, [*given, *TINY], "label"))
    naming, _ = prepare(resolved, class_list("classes.txt"))
    labeler = Labeler.load(resolved, naming, "cpu")
    for uri in found:
        pixels = decode_image(Path(uri).read_bytes(), max_px=resolved.max_pixels)
        [result] = labeler.label_many([pixels])
        assert not isinstance(result, Exception)
        assert found[uri] == encode_png(result[1].label_HW), uri
    assert len(found) == labels.num_rows == 6


def test_what_fails_there_fails_here_with_the_same_code(head, capsys):
    given = ["submit", "--address", head, "--job-id", "one", "--wait"]
    argv = [*given, "--", "evaluate", "/none", "--truth", "/none"]
    assert cli.main(argv) == 2
    assert "\nerror: " in capsys.readouterr().out
    assert cli.main(argv) == 2, "the same name again"
    assert "error: job_id must be a name that no job there has had" in capsys.readouterr().err


def test_a_job_that_is_stopped_has_written_down_what_it_has(head, tmp_path):
    write_voc(tmp_path / "scenes", 200, seed=0)
    out = str(tmp_path / "run")
    argv = ["--images", str(tmp_path / "scenes"), "--classes", "shapes", "--out", out, *TINY]
    client = Client(head)
    name = client.submit_job(
        entrypoint=f"python label.py {' '.join(argv)} --actors.in-flight 2",
        runtime_env={
            "working_dir": str(JOBS),
            "py_modules": [str(Path(zsplg_ray.__file__).parent)],
            "excludes": ["__pycache__"],
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"},
        },
    )
    folder, until = RunFolder(out), time.monotonic() + WAIT_S
    while not folder.parts("segments") and time.monotonic() < until:
        assert not client.get_job_status(name).is_terminal(), client.get_job_logs(name)
        time.sleep(0.2)
    client.stop_job(name)
    shown: list[str] = []
    ended = follow.Follower(client, name, follow.JobLog(shown.append)).watch()
    assert ended.status.value == "STOPPED" and follow.exit_code(ended) == 130
    assert "interrupted; what is finished is kept" in "".join(shown), "".join(shown)
    run = json.loads(Path(out, "run.json").read_text())
    kept = folder.read("segments", ["image_id"])
    assert run["state"] == "interrupted" and kept is not None
    assert 0 < run["counts"]["labelled"] == len(set(kept["image_id"].to_pylist())) < 200
    assert kept.num_rows == run["counts"]["labelled"]
