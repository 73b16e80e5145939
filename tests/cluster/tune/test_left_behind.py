"""Placement groups whose maker was killed."""

import os
import signal
import time
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from ray.util import placement_group, placement_group_table

from zsplg_ray.cluster.tune.left_behind import remove_left_behind


class Maker:
    def make(self):
        self.group = placement_group([{"CPU": 1}])
        ray.get(self.group.ready())
        return self.group.id.hex(), os.getpid()


def states() -> dict[str, str]:
    return {name: group["state"] for name, group in placement_group_table().items()}


@pytest.mark.ray
def test_only_what_a_dead_actor_made_is_removed(ray_local):
    actor: Any = ray.remote(num_cpus=0)(Maker)
    makers = [actor.remote() for _ in range(2)]
    (dead, pid), (alive, _) = ray.get([maker.make.remote() for maker in makers])
    ours = placement_group([{"CPU": 1}])
    ray.get(ours.ready())
    assert remove_left_behind() == 0
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RayActorError):
        ray.get(makers[0].make.remote())
    deadline = time.monotonic() + 60
    while states()[dead] != "REMOVED":
        assert time.monotonic() < deadline, "it is not removed"
        remove_left_behind()
    assert states()[alive] == states()[ours.id.hex()] == "CREATED"
    assert remove_left_behind() == 0
