"""Single looks of `doctor`: each soon says what is wrong and how to mend it, and leaves nothing."""

import http.server
import json
import socket
import sqlite3
import threading
import time
from types import SimpleNamespace

import boto3
import pytest
import torch

from zsplg_ray.cluster.doctor import child, cluster, examine, machine, models, places
from zsplg_ray.cluster.doctor.finding import met, report
from zsplg_ray.config import DoctorConfig
from zsplg_ray.settings import complain, from_mapping

SECRET = "hunter2secret"


def config(**settings) -> DoctorConfig:
    return from_mapping(DoctorConfig, {"sam": "shapes", "clip": "shapes", **settings})


@pytest.fixture
def silent():
    """An address that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def served():
    """Serves fixed answers: path -> (status, body)."""
    servers = []

    def start(answers: dict[str, tuple[int, str]]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, body = answers.get(self.path, (404, ""))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            do_POST = do_GET

            def log_message(self, format, *args):
                """Quiet."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# The machine -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "built", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90a"], False),
        ((10, 0), ["sm_100"], True),
    ],
)
def test_which_gpus_a_torch_is_built_for(compute, built, runs):
    assert machine.runs_on(compute, built) is runs


def fake_gpus(monkeypatch, free_gib, compute=(9, 0)):
    card = SimpleNamespace(name="H200", major=compute[0], minor=compute[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    memory = (int(free_gib * 2**30), 140 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: memory)


def test_gpus(monkeypatch):
    fake_gpus(monkeypatch, 139)
    found = machine.gpu(config())
    assert found["state"] == "ok" and "H200, 139 of 140 GiB free, compute 9.0" in found["told"]
    fake_gpus(monkeypatch, 10)
    found = machine.gpu(config())
    assert found["state"] == "warn" and "nvidia-smi" in found["fix"]
    fake_gpus(monkeypatch, 139, (7, 0))
    found = machine.gpu(config())
    assert found["state"] == "fail" and "sm_80 sm_90" in found["fix"]


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides" in machine.gpu(config())["told"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(machine, "driver", lambda: "470.57.02")
    monkeypatch.setattr(torch.version, "cuda", None)
    found = machine.gpu(config())
    assert "driver 470.57.02 is here" in found["told"] and "torch with CUDA" in found["fix"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nX")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(machine.Path, "glob", lambda self, pattern: iter([self]))
    found = machine.gpu(config())
    assert found["state"] == "warn" and "too old (found version 11040)" in found["told"]
    assert "older CUDA than 13.0" in found["fix"]


def test_shared_memory_and_open_files(monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda p: SimpleNamespace(total=64 * 2**20))
    monkeypatch.setattr(machine.Path, "is_dir", lambda self: True)
    small = machine.shared_memory(config())
    assert small["state"] == "warn" and "--shm-size" in small["fix"]
    asked = machine.shared_memory(config(**{"ray.object_store_gib": 4}))
    assert "--ray.object-store-gib" in asked["fix"] and "wants 4.0" in asked["told"]
    limits = {"low": (1024, 4096), "high": (1024, 65536)}
    for name, state in (("low", "warn"), ("high", "ok")):
        monkeypatch.setattr(machine.resource, "getrlimit", lambda what, n=name: limits[n])
        assert machine.open_files(config())["state"] == state


# Models ------------------------------------------------------------------------------------------


def test_clip_is_looked_for_where_open_clip_would_find_it(tmp_path, monkeypatch):
    given = config(clip="ViT-B-16/laion2b_s34b_b88k")
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda repository, file: None)
    missing = models.clip(given)
    assert missing["state"] == "warn" and "downloads" in missing["fix"]
    monkeypatch.setattr(models.constants, "HF_HUB_OFFLINE", True)
    assert models.clip(given)["state"] == "fail"
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"weights")
    asked = []

    def cached(repository, file):
        asked.append((repository, file))
        return str(weights) if file.endswith(".bin") else None

    monkeypatch.setattr(models, "try_to_load_from_cache", cached)
    here = models.clip(given)
    assert here["state"] == "ok" and models.sha256_file(weights) in here["told"]
    assert asked[0] == ("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "open_clip_model.safetensors")
    assert models.clip(config(clip=f"ViT-B-16/{weights}"))["state"] == "ok"
    assert models.clip(config(clip=f"local-dir:{tmp_path}"))["state"] == "fail"


def test_room_for_what_is_to_come(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSPLG_CACHE", str(tmp_path / "new" / "cache"))
    given = config(sam="vit_h")
    assert "2.4 to come" in models.cache(given)["told"]
    full = SimpleNamespace(free=3 * 2**30)
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: full)
    found = models.cache(given)
    assert found["state"] == "fail" and "ZSPLG_CACHE" in found["fix"]
    assert models.cache(config())["state"] == "ok", "nothing is to come"
    assert list(tmp_path.iterdir()) == []


# Places ------------------------------------------------------------------------------------------


def test_a_store_is_tried_and_nothing_of_others_is_removed(bucket):
    def keys() -> list[str]:
        client = boto3.client("s3", endpoint_url=bucket.endpoint)
        return [o["Key"] for o in client.list_objects_v2(Bucket=bucket.name).get("Contents", [])]

    secret = {"keys": f"test:{SECRET}@"}
    found = places.storage(config(out=bucket.uri("a/b/run", **secret)))
    assert found["state"] == "ok" and SECRET not in str(found), found
    assert keys() == ["a/b/run/"] and "an empty object" in found["told"]
    bucket.fs.create_dir(f"{bucket.name}/mine")
    with bucket.fs.open_output_stream(f"{bucket.name}/mine/file") as stream:
        stream.write(b"x")
    before = keys()
    assert places.storage(config(out=bucket.uri("mine/run")))["state"] == "ok"
    assert keys() == sorted([*before, "mine/run/"])
    gone = places.storage(config(out=bucket.uri("run").replace(bucket.name, "no-such-bucket")))
    assert gone["state"] == "fail" and "make the bucket" in gone["fix"]


def test_a_store_that_hangs_is_told_in_time(silent, monkeypatch, s3_server):
    monkeypatch.setattr(places, "WRITE_S", 1.0)
    out = f"s3://me:{SECRET}@b/run?endpoint_override=http://{silent}&scheme=http&region=x"
    began = time.monotonic()
    found = places.storage(config(out=out))
    assert time.monotonic() - began < 60, "not the two minutes of a run"
    assert found["state"] == "fail" and "no answer in 1 s" in found["told"]
    assert SECRET not in str(found)


def test_local_folders_are_not_made(tmp_path):
    assert places.storage(config(out=str(tmp_path / "a" / "b")))["state"] == "ok"
    (tmp_path / "file").write_text("x")
    assert places.storage(config(out=str(tmp_path / "file" / "run")))["state"] == "fail"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_a_job_would_get(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.txt").write_text("cat")
    assert "1 files" in places.sent(config())["told"]
    with (tmp_path / "big.csv").open("wb") as big:
        big.truncate(60 * 2**20)
    found = places.sent(config())
    assert found["state"] == "warn" and "--exclude" in found["fix"] and "60.0 MiB" in found["told"]


def test_mlflow_servers(served, silent, monkeypatch):
    monkeypatch.setattr(places, "ANSWER_S", (0.5, 0.5))
    search = "/api/2.0/mlflow/experiments/search"

    def look(address):
        found = places.mlflow(config(**{"mlflow.uri": f"http://me:{SECRET}@{address}"}))
        assert SECRET not in str(found) and "***@" in found["told"]
        return found

    good = look(served({"/version": (200, "3.15.0"), search: (200, "{}")}))
    assert good["state"] == "ok" and "version 3.15.0" in good["told"]
    closed = look(served({"/version": (200, "3.15.0"), search: (401, "")}))
    assert closed["state"] == "warn" and "MLFLOW_TRACKING_USERNAME" in closed["fix"]
    assert "no MLflow server" in look(served({"/version": (200, "<html>")}))["told"]
    assert "does not answer" in look(silent)["told"]


def test_mlflow_stores(tmp_path, monkeypatch):
    def look(uri):
        return places.mlflow(config(**{"mlflow.uri": uri} if uri else {}))

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "in the run's folder" in look(None)["told"]
    assert "off" in look("off")["told"]
    assert "will be made" in look(f"sqlite:///{tmp_path}/new/mlflow.db")["told"]
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as database:
        database.execute("create table notes (text)")
    before = other.read_bytes()
    assert look(f"sqlite:///{other}")["state"] == "warn"
    assert other.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["other.db"]
    with sqlite3.connect(other) as database:
        database.execute("create table alembic_version (version_num)")
    assert look(f"sqlite:///{other}")["state"] == "ok"


# The cluster -------------------------------------------------------------------------------------


def test_the_token_is_found_and_never_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert cluster.token(config())["state"] == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    none = cluster.token(config())
    assert none["state"] == "warn" and "ray get-auth-token --generate" in none["fix"]
    kept = tmp_path / ".ray" / "auth_token"
    kept.parent.mkdir()
    kept.write_text(SECRET)
    kept.chmod(0o644)
    found = cluster.token(config())
    assert found["state"] == "warn" and "chmod 600" in found["fix"]
    kept.chmod(0o600)
    assert cluster.token(config()) == {"state": "ok", "told": f"from {kept}", "fix": ""}
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    found = cluster.token(config())
    assert "from RAY_AUTH_TOKEN" in found["told"] and SECRET not in str(found)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no"))
    found = examine._look("token", cluster.token, config())
    assert found["state"] == "warn" and "RAY_AUTH_TOKEN_PATH" in found["told"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert cluster.token(config())["state"] == "ok"


def test_a_dashboard_is_wanted_only_if_named(served, silent, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_S", (0.5, 0.5))
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setattr("zsplg_ray.cluster.submit.client.DEFAULT_ADDRESS", "http://127.0.0.1:9")
    assert cluster.dashboard(config())["state"] == "ok"

    def look(address):
        return examine._look("dashboard", cluster.dashboard, config(address=address))

    assert look(silent)["state"] == "warn" and "no answer in time" in look(silent)["fix"]
    old = look(served({"/api/version": (200, json.dumps({"ray_version": "1.0.0"}))}))
    assert old["state"] == "warn" and "1.0.0" in old["told"] and "update" in old["fix"]
    wrong = look(served({"/api/version": (200, "<html>")}))
    assert wrong["state"] == "warn" and "Ray's dashboard" in wrong["told"]


def test_a_cluster_that_hangs_or_is_gone(silent, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_S", 1.0)
    began = time.monotonic()
    found = cluster.ray_there(config(**{"ray.address": silent}))
    assert found["state"] == "fail" and silent in found["told"] and found["fix"]
    assert time.monotonic() - began < 60
    monkeypatch.setattr(cluster, "CONNECT_S", 60.0)
    gone = cluster.ray_there(config(**{"ray.address": "127.0.0.1:9"}))
    assert gone["state"] == "fail" and "a running Ray cluster" in gone["told"]


# All of it ---------------------------------------------------------------------------------------


def test_only_what_label_needs_can_fail(monkeypatch):
    def broken(config):
        raise OSError("\x1b[31mno\nway")

    for name in ("mlflow", "storage"):
        found = examine._look(name, broken, config())
        assert found["state"] == ("fail" if name == "storage" else "warn")
        assert found["told"].isprintable()
    found = met(ValueError(complain("out", "a folder", "x", "give another")))
    assert found == {"state": "fail", "told": "out must be a folder, got x", "fix": "give another"}
    assert report([{"what": "out", **found}]).splitlines()[1].strip() == "-> give another"


def test_a_look_that_dies_is_a_finding():
    found = child.bounded("zsplg_ray.cluster.doctor.nothing", config(), 60, "mend it")
    assert found["state"] == "fail" and "nothing" in found["told"]
