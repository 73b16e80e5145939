"""What a killed process leaves of the cluster's resources, given back.

What enters: the cluster we are connected to. What leaves: placement groups removed that nobody can
use any more.

Ray keeps a placement group until the driver ends, even if the actor that made it has died. Ray
Train has an actor that removes those of its controllers, but that one asks Ray's dashboard, which a
Ray started here does not have: a trial that takes the place of a killed one would wait for ever for
the CPUs that its predecessor still holds.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from zsplg_ray.cluster.session import last_line

log = logging.getLogger(__name__)


def remove_left_behind() -> int | None:
    """Remove this driver's placement groups whose maker has died; how many there were.

    Who made a group, and whether it lives, no public call of Ray tells. Where this Ray has other
    private ones than we know, that is a warning, and None.
    """
    try:
        return _remove()
    except Exception as e:  # whatever has changed; those who do not need this are not to suffer
        told = "Ray %s does not tell what a dead process still holds (%s); its CPUs may stay taken"
        log.warning(told, ray.__version__, last_line(e))
        return None


def _remove() -> int:
    from ray import PlacementGroupID
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    job = ray.get_runtime_context().get_job_id()
    protocol: Any = gcs_pb2  # whose names are made while it is imported
    table = protocol.PlacementGroupTableData
    found = 0
    for data in state._connect_and_get_accessor().get_placement_group_table():
        group = table.FromString(data)
        by_actor = bool(group.creator_actor_id.strip(b"\xff"))  # the driver's have none, "dead" too
        left = group.creator_actor_dead and by_actor and group.state != table.REMOVED
        if left and group.creator_job_id.hex() == job:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
            found += 1
    if found:
        log.debug("%d placement groups of dead processes removed", found)
    return found
