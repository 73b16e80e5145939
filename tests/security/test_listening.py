"""A Ray that this project starts is reached from this machine alone: every socket of it is seen."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from zsplg_ray.cluster import loopback

pytestmark = pytest.mark.ray

SESSION = """
import json, ray
from tests.security.test_listening import listening, tree
from zsplg_ray.cluster.session import ray_session
from zsplg_ray.config import RayConfig

@ray.remote
class Actor:
    def here(self):
        return 1

with ray_session(RayConfig(num_cpus=1)):
    actor = Actor.remote()
    assert ray.get(actor.here.remote()) == 1
    print(json.dumps(listening(tree())))
"""
LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp."""


def tree() -> list[int]:
    """This process and all that it has started."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int(
                    (folder / "stat").read_text().rpartition(")")[2].split()[1]
                )
            except OSError:
                continue  # it has ended
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def listening(pids: list[int]) -> dict[str, str]:
    """Address in the kernel's hex -> name of the process that listens there."""
    sockets = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else []:
            words = line.split()
            if words[3] == LISTEN:
                sockets[f"socket:[{words[9]}]"] = words[1]
    found = {}
    for pid in pids:
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            links = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        found |= {sockets[link]: name for link in links if link in sockets}
    return found


def is_loopback(address: str) -> bool:
    """Whether an address of /proc/net/tcp or tcp6 is 127.0.0.0/8, ::1 or the first mapped to v6."""
    host, _, _ = address.partition(":")
    if len(host) == 8:
        return host.endswith("7F")
    mapped = "0000000000000000FFFF0000"
    return host == "0" * 24 + "01000000" or (host.startswith(mapped) and host.endswith("7F"))


def test_addresses_are_told_apart():
    assert all(map(is_loopback, ("0100007F:1F90", "0000000000000000FFFF00000100007F:1F90")))
    assert is_loopback("00000000000000000000000001000000:1F90")
    others = ("00000000:1F90", "020200C0:1F90", "0" * 32 + ":1F90")
    assert not any(map(is_loopback, (*others, "0000000000000000FFFF0000020200C0:1F90")))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Ray listens on loopback anyway")
def test_no_socket_of_a_session_is_open_to_others(tmp_path):
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    names = " ".join(found.values())
    assert {"gcs_server", "raylet"} <= set(found.values()) and "ray::" in names, found
    assert all(map(is_loopback, found)), found


def test_the_switch_is_put_back():
    constants = loopback._constants()
    assert isinstance(constants, types.ModuleType)
    before = constants.ENABLE_RAY_CLUSTER
    with pytest.raises(KeyError), loopback.loopback_only():
        assert not constants.ENABLE_RAY_CLUSTER
        raise KeyError
    assert before == constants.ENABLE_RAY_CLUSTER


def test_a_ray_without_the_switch_is_told_of(monkeypatch, caplog):
    monkeypatch.setattr(loopback, "_SWITCH", "NO_SUCH_SWITCH")
    with loopback.loopback_only():
        pass
    assert "keep others off" in caplog.text
