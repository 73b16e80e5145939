"""Who is at work on which image, so that an image that kills its process is found.

Ray retries the task of a process that died, for ever: a segmentation fault or an out-of-memory kill
that one image causes every time would hold up the job without end. Each worker notes an image here
before it starts on it. An image noted but never finished was under way when its process died; after
`MAX_KILLS` such deaths the worker that gets it next puts it into errors/ instead of trying again.

The ledger lives for one run of the driver: after a kill of the driver itself everybody starts with
a clean sheet, for then the images under way were not to blame.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import ray

MAX_KILLS = 2
"""Deaths of its process after which an image is quarantined."""


class LedgerBook:
    """The book itself, plain Python; `start_ledger` makes it an actor."""

    def __init__(self) -> None:
        self.begun: Counter[tuple[str, str]] = Counter()
        self.committed: set[str] = set()

    def open(self, stage: str, image_ids: list[str]) -> dict[str, int]:
        """Image id -> deaths at this stage so far, for those whose result is not written yet."""
        return {i: self.begun[stage, i] for i in image_ids if i not in self.committed}

    def begin(self, stage: str, image_id: str) -> None:
        """Note that work starts on one image."""
        self.begun[stage, image_id] += 1

    def finish(self, stage: str, image_ids: Iterable[str]) -> None:
        """These images are through this stage, well or badly, with their process alive."""
        for image_id in image_ids:
            self.begun.pop((stage, image_id), None)

    def commit(self, image_ids: list[str]) -> None:
        """The rows of these images stand in the run's folder."""
        self.committed.update(image_ids)


def start_ledger() -> ray.actor.ActorHandle:
    """A ledger as an actor on the driver's own node: it dies with the driver and not before."""
    here = ray.get_runtime_context().get_node_id()
    stay = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(LedgerBook).options(num_cpus=0, scheduling_strategy=stay).remote()
