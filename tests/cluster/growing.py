"""A cluster that grows, on this machine: Ray's fake nodes behind a real autoscaler.

The node types are those of a cluster file, with its bounds; machines, commands, the provider and
the name of the head's type are exchanged. `python -m tests.cluster.growing IMAGES OUT SETTINGS` is
a driver for it, with a labeler that finds nothing and takes its time.
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
from collections import Counter
from pathlib import Path

import numpy as np
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
)
from ray.autoscaler.v2.sdk import get_cluster_status

from tests.cluster.rigged import OneByOne, config
from zsplg_ray.cluster.label import label
from zsplg_ray.label.segments import Segments

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


def fake_config(path: Path, gcs: str, idle_s: float, most: dict[str, int]) -> dict:
    """The cluster file at `path` for fake nodes; `most`: lower bounds for some types."""
    real = yaml.safe_load(path.read_text())
    types = {}
    for name, what in real["available_node_types"].items():
        has = {**what["resources"], "object_store_memory": 100 * 2**20}
        bounds = {k: what[k] for k in ("min_workers", "max_workers") if k in what}
        bounds["max_workers"] = min(bounds["max_workers"], most.get(name, bounds["max_workers"]))
        name = FAKE_HEAD_NODE_TYPE if name == real["head_node_type"] else name
        types[name] = {"resources": has, "node_config": {}, **bounds}
    provider = {"type": "external", "module": PROVIDER, "gcs_address": gcs}
    provider |= {"launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID}
    commands = ("initialization", "setup", "head_setup", "worker_setup")
    starts = ("head_start_ray", "worker_start_ray")
    kept = ("cluster_name", "max_workers", "upscaling_speed")
    return {
        **{k: real[k] for k in kept},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "idle_timeout_minutes": idle_s / 60,
        "provider": provider,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "available_node_types": types,
        **{f"{k}_commands": [] for k in (*commands, *starts)},
    }


class GrowingCluster:
    """A head with an autoscaler. Its file lies where `ray up` leaves it: in `home`."""

    def __init__(self, home: Path, path: Path, idle_s: float, most: dict[str, int]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        settings = fake_config(path, self.address, idle_s, most)
        self.head_type = FAKE_HEAD_NODE_TYPE
        file = home / "ray_bootstrap_config.yaml"
        file.write_text(yaml.safe_dump(settings))
        self.env = {**os.environ, "HOME": str(home), "RAY_AUTH_MODE": "disabled"}
        self.env["RAY_ADDRESS"] = self.address
        fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        fake |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID}
        fake |= {"RAY_NODE_TYPE_NAME": self.head_type}
        fake |= {"RAY_health_check_timeout_ms": "60000"}  # busy machines answer late
        self.temp = tempfile.mkdtemp(prefix="ray")  # a socket's path may have 107 characters
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += [f"--port={port}", "--num-cpus=0", f"--autoscaling-config={file}"]
        command += ["--include-dashboard=false", f"--temp-dir={self.temp}", "--disable-usage-stats"]
        command += ["--dashboard-agent-listen-port=0", f"--object-store-memory={100 * 2**20}"]
        env = {k: v for k, v in self.env.items() if k != "RAY_ADDRESS"} | fake
        self.log = (home / "head.log").open("wb")
        self.head = subprocess.Popen(
            command, env=env, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def wait_until_up(self, timeout_s: float = 240) -> None:
        """Until the autoscaler answers."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.head.poll() is None, Path(self.log.name).read_text()[-2000:]
            with contextlib.suppress(Exception):  # it is not there yet
                if self.nodes()[self.head_type]:
                    return
            time.sleep(0.2)
        raise AssertionError("the head does not come up")

    def nodes(self) -> Counter[str]:
        """Nodes that are up, by type."""
        status = get_cluster_status(self.address, timeout=5)
        return Counter(n.ray_node_type_name for n in (*status.active_nodes, *status.idle_nodes))

    def close(self) -> None:
        """End the head, and whatever it has started."""
        self.head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.head.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.head.pid, signal.SIGKILL)
        self.head.wait()
        self.log.close()
        shutil.rmtree(self.temp, ignore_errors=True)


class Slow(OneByOne):
    """Finds nothing in an image, in 0.2 s."""

    def __init__(self, naming) -> None:
        self.naming = naming

    def label(self, image_HWC):
        time.sleep(0.2)
        nothing = np.zeros((0, self.naming.bank.embedding_AD.shape[1]))
        segments = Segments.measured(image_HWC.shape[:2], [], [], []).with_embedding(nothing)
        return segments, self.naming.compose(segments)


def load_slow(config, naming, device):
    return Slow(naming)


if __name__ == "__main__":
    images, out, settings = sys.argv[1:]
    label(config(images, out, **json.loads(settings)), load=load_slow)
