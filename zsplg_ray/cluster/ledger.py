"""Who is at work on which image, so that an image that kills its process is found.

Ray retries the task of a process that died, for ever: a segmentation fault or an out-of-memory kill
that one image causes every time would hold up the job without end. Each worker notes an image here
before it starts on it. An image noted but never finished was under way when its process died; after
`MAX_KILLS` such deaths the worker that gets it next puts it into errors/ instead of trying again.

Images that are worked on together are noted together, so one death makes all of them suspects. From
then on each is tried alone: the guilty one dies again and is put aside, the others come through.
Reading is quick, so there all images of a block are noted in one call; labelling notes each group
of images that goes through the model, and they stay noted until their rows are written, for what an
image has broken may show only then. So an image costs little more than one call, and one ledger is
enough for hundreds of images a second.

The ledger lives for one run of the driver: after a kill of the driver itself everybody starts with
a clean sheet, for then the images under way were not to blame.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import ray

from zsplg_ray.cluster.notes import NoteBook, Notes, beside_the_driver

MAX_KILLS = 2
"""Deaths of its process after which an image is quarantined."""


class LedgerBook(NoteBook):
    """The book itself, plain Python; `Ledger.start` makes it an actor. Workers leave word in it
    of how they get on, too."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: Counter[tuple[str, str]] = Counter()
        self.committed: set[str] = set()

    def open(self, stage: str, image_ids: list[str]) -> dict[str, int]:
        """Image id -> deaths at this stage so far, for those whose result is not written yet."""
        return {i: self.begun[stage, i] for i in image_ids if i not in self.committed}

    def enter(self, stage: str, image_ids: list[str]) -> dict[str, int]:
        """`open`, and `begin` on those without a death, together."""
        deaths = self.open(stage, image_ids)
        self.begin(stage, [image_id for image_id, times in deaths.items() if not times])
        return deaths

    def begin(self, stage: str, image_ids: list[str]) -> None:
        """Note that work starts on images: on all of them together."""
        self.begun.update((stage, image_id) for image_id in image_ids)

    def finish(self, stage: str, image_ids: Sequence[str]) -> None:
        """These images are through this stage, well or badly, with their process alive."""
        for image_id in image_ids:
            self.begun.pop((stage, image_id), None)

    def commit(self, stage: str, image_ids: list[str]) -> None:
        """The rows of these images stand in the run's folder: nobody has died of them."""
        self.committed.update(image_ids)
        self.finish(stage, image_ids)


class Ledger(Notes):
    """A worker's handle on the book, which is an actor on the driver's node: it dies with the
    driver and not before, and then every call here that waits raises.
    """

    @classmethod
    def start(cls) -> Ledger:
        """A new ledger; to be called by the driver."""
        return cls(beside_the_driver(LedgerBook))

    def open(self, stage: str, image_ids: list[str]) -> dict[str, int]:
        """See LedgerBook.open."""
        return ray.get(self._handle.open.remote(stage, image_ids))

    def enter(self, stage: str, image_ids: list[str]) -> dict[str, int]:
        """See LedgerBook.enter."""
        return ray.get(self._handle.enter.remote(stage, image_ids))

    def begin(self, stage: str, image_ids: list[str]) -> None:
        """See LedgerBook.begin; returns when it is noted."""
        ray.get(self._handle.begin.remote(stage, image_ids))

    def finish(self, stage: str, image_ids: Sequence[str]) -> None:
        """See LedgerBook.finish; does not wait, since calls of one worker keep their order."""
        self._handle.finish.remote(stage, image_ids)

    def commit(self, stage: str, image_ids: list[str]) -> None:
        """See LedgerBook.commit; returns when it is noted."""
        ray.get(self._handle.commit.remote(stage, image_ids))
