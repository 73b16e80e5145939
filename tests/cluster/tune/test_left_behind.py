"""Placement groups whose maker was killed."""

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray._private.state
from ray.exceptions import RayActorError
from ray.util import placement_group, placement_group_table, remove_placement_group

from zsplg_ray.cluster.progress import Progress
from zsplg_ray.cluster.tune.left_behind import remove_left_behind
from zsplg_ray.cluster.tune.train_search import Ears


class Maker:
    def make(self):
        self.group = placement_group([{"CPU": 1}])
        ray.get(self.group.ready())
        return self.group.id.hex(), os.getpid()

    def drop(self):
        remove_placement_group(self.group)


def states() -> dict[str, str]:
    return {name: group["state"] for name, group in placement_group_table().items()}


def test_another_ray_is_a_warning_and_told_once(monkeypatch, caplog):
    monkeypatch.delattr(ray._private.state, "state")
    study, quiet = SimpleNamespace(), Progress("tune train", show=False)
    ears = Ears(study, quiet, lambda number: None)  # type: ignore[arg-type]
    ears.on_trial_recover(0, [], SimpleNamespace(config={"number": 3}, pickled_error_file=None))
    caplog.clear()
    for _ in range(2):
        ears._looked = 0.0
        ears.on_step_end(0, [])
    (record,) = caplog.records
    assert "cannot import name 'state'" in record.message
    assert "does not tell what a dead process still holds" in record.message
    assert remove_left_behind() is None


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
    remove_placement_group(ours)
    ray.get(makers[1].drop.remote())
