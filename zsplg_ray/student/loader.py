"""Steps of training, one list of micro batches each, read and cropped on the CPU.

What enters: `TrainingData` and the numbers of the steps wanted. What leaves: weak views with
everything that belongs to them, as `Batch`es.

Why this way: the work item of torch's DataLoader is a whole step, so its processes read ahead and
nothing has to be put in order afterwards. What a step holds follows from its number (draws.py), not
from what was read before. An image that cannot be used (gone, torn, of another size than its label)
is replaced by the next draw, told once, and training goes on; many in a row mean that the storage
is gone, and stop it.

Shapes: B batch, H W pixels, C = 3 channels (RGB).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zsplg_ray.config import AugmentConfig, TrainConfig
from zsplg_ray.images import decode_image
from zsplg_ray.records import IGNORE
from zsplg_ray.settings import WorkError, complain
from zsplg_ray.storage import is_address, read_bytes
from zsplg_ray.student.augment import weak_view
from zsplg_ray.student.batch import Batch
from zsplg_ray.student.data import TrainingData, WrongClass, check_indices
from zsplg_ray.student.draws import Stream, derive, image_seed, step_draws
from zsplg_ray.student.zeroshot import read_label

log = logging.getLogger(__name__)

MAX_BAD_IN_A_ROW = 20

_Maps = list[tuple[np.ndarray, int]]
"""Maps [H, W] of an image, each with what it is padded with."""


def batches(
    data: TrainingData,
    config: TrainConfig,
    *,
    first_step: int,
    steps: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[list[Batch]]:
    """One worker's share of steps first_step .. first_step + steps, in order.

    Args:
        data: What to train on.
        config: Batch sizes, seed, views.
        first_step: Counted from the start of training, so a resumed run gives where it stopped.
        steps: How many.
        rank: Which worker this is, of `world`.
        world: Workers; their shares together are what a single one would get.
        workers: Processes that read ahead, each `DataLoader.prefetch_factor` steps; 0: none.
        pin_memory: Page-lock the batches in a thread, for copies to a GPU that nobody waits for.

    Yields:
        `train.accumulate` micro batches a step.

    Raises:
        ValueError: a mask or zero-shot label holds numbers that its class list has not.
        WorkError: many images in a row could not be read.
    """
    if not steps:
        return
    loader = DataLoader(
        _Steps(data, config, rank, world),
        batch_size=None,
        sampler=range(first_step, first_step + steps),
        num_workers=workers,
        collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType]  (a step is no list)
        pin_memory=pin_memory,
        multiprocessing_context=_start_method(data) if workers else None,
        generator=torch.Generator(),  # else it draws from the global one
    )
    told: set[str] = set()
    for step in loader:
        # An exception that passes from process to process by itself loses its one line.
        if step.error is not None:
            raise step.error
        for image_id, reason in step.bad:
            if image_id not in told:
                told.add(image_id)
                log.warning("another image takes the place of %s: %s", image_id, reason)
        yield step.batches


def _start_method(data: TrainingData) -> str | None:
    """How processes start: anew where a client of an object store must not be forked."""
    columns = (data.labelled["uri"], data.unlabelled["uri"], data.unlabelled["label_uri"])
    firsts = (column[0].as_py() for column in columns if len(column))
    local = ("parquet+file://", "file://")
    remote = any(u and is_address(u) and not u.startswith(local) for u in firsts)
    return "spawn" if remote else None


class _Step(NamedTuple):
    """What comes out of a loading process."""

    batches: list[Batch]
    bad: list[tuple[str, str]]
    """Image id and reason of what was replaced."""
    error: Exception | None = None


class _Image(NamedTuple):
    """An image with its maps, and the seed of its views."""

    image_HWC: np.ndarray
    maps: _Maps
    seed: int


class _Source:
    """Images of one kind in the order of their draws.

    Args:
        kind: A word that keeps its seeds apart from other kinds'.
        seed: train.seed.
        image_ids: For messages, a column of text.
        read: Gives the image of an index and its maps, or raises OSError or ValueError.
    """

    def __init__(
        self,
        kind: str,
        seed: int,
        image_ids: pa.ChunkedArray,
        read: Callable[[int], tuple[np.ndarray, _Maps]],
    ) -> None:
        self.kind, self.seed, self.image_ids, self.read = kind, seed, image_ids, read
        self.stream = Stream(seed, kind, len(image_ids)) if len(image_ids) else None

    def take(self, draw: int, bad: list[tuple[str, str]]) -> _Image:
        """What a draw gives; what is skipped on the way is added to `bad`."""
        assert self.stream is not None, "a draw from no images"
        for attempt in range(MAX_BAD_IN_A_ROW):
            index, number = self.stream.at(draw + attempt)
            try:
                image_HWC, maps = self.read(index)
            except WrongClass:
                raise
            except (OSError, ValueError, pa.ArrowException) as e:
                bad.append((self.image_ids[index].as_py(), " ".join(str(e).split())[:500]))
                continue
            seed = image_seed(self.seed, self.kind, number, index)
            if attempt:
                # The draw that is taken for this one comes by itself too: in another view.
                seed = int(derive(seed, "instead", draw))
            return _Image(image_HWC, maps, seed)
        image_id, reason = bad[-1]
        raise WorkError(
            f"{MAX_BAD_IN_A_ROW} {self.kind} images in a row could not be read, "
            f"the last {image_id}: {reason}"
        )


class _Views(NamedTuple):
    """Weak views of some images."""

    image_BCHW: Tensor
    maps: list[Tensor]
    padding_BHW: Tensor
    seed_B: Tensor


class _Steps(Dataset[_Step]):
    """Step -> its micro batches, for one worker."""

    def __init__(self, data: TrainingData, config: TrainConfig, rank: int, world: int) -> None:
        self.config, self.rank, self.world = config, rank, world
        self.labelled, self.unlabelled = (
            _Source(kind, config.train.seed, table["image_id"], partial(read, data))
            for kind, table, read in (
                ("labelled", data.labelled, _read_labelled),
                ("unlabelled", data.unlabelled, _read_unlabelled),
            )
        )

    def __getitem__(self, step: int) -> _Step:
        """The micro batches of a step."""
        train, bad = self.config.train, []
        share = (self.rank, self.world, train.accumulate)
        x_draws = step_draws(step, train.batch_labeled, *share)
        n_unlabeled = train.batch_unlabeled if self.unlabelled.stream else 0
        u_draws = step_draws(step, n_unlabeled, *share)
        try:
            made = [self._batch(x, u, bad) for x, u in zip(x_draws, u_draws, strict=True)]
        except (ValueError, WorkError) as e:
            return _Step([], bad, e)
        return _Step(made, bad)

    def _batch(self, x_draws: range, u_draws: range, bad: list[tuple[str, str]]) -> Batch:
        before = len(bad)
        x_images = [self.labelled.take(draw, bad) for draw in x_draws]
        u_images = [self.unlabelled.take(draw, bad) for draw in u_draws]
        x = _views(x_images, (IGNORE,), self.config.augment)
        u = _views(u_images, (IGNORE, 0), self.config.augment)
        batch = Batch(
            x_image_BCHW=x.image_BCHW,
            x_label_BHW=x.maps[0],
            u_image_BCHW=u.image_BCHW,
            u_padding_BHW=u.padding_BHW,
            u_label_BHW=u.maps[0],
            u_score_BHW=u.maps[1],
            u_seed_B=u.seed_B,
            bad=len(bad) - before,
        )
        if not self.config.unimatch.same_image:
            return batch
        again = [i._replace(seed=int(derive(i.seed, "mix"))) for i in u_images]
        mix = _views(again, (IGNORE, 0), self.config.augment)
        return replace(
            batch,
            mix_image_BCHW=mix.image_BCHW,
            mix_padding_BHW=mix.padding_BHW,
            mix_label_BHW=mix.maps[0],
            mix_score_BHW=mix.maps[1],
            mix_seed_B=mix.seed_B,
            x_seed_B=x.seed_B,
        )


def _views(images: Sequence[_Image], fills: Sequence[int], config: AugmentConfig) -> _Views:
    """Weak views of images, stacked; a map that an image has not is `fills` everywhere."""
    n, px = len(images), config.crop_px
    image_BCHW = torch.empty(n, 3, px, px, dtype=torch.uint8)
    padding_BHW = torch.empty(n, px, px, dtype=torch.bool)
    maps = [torch.full((n, px, px), fill, dtype=torch.uint8) for fill in fills]
    for b, image in enumerate(images):
        view = weak_view(image.image_HWC, image.maps, config, image.seed)
        image_BCHW[b], padding_BHW[b] = view[0], view[2]
        for stacked_BHW, map_HW in zip(maps, view[1], strict=False):
            stacked_BHW[b] = map_HW
    seeds = torch.tensor([image.seed for image in images], dtype=torch.int64)
    return _Views(image_BCHW, maps, padding_BHW, seeds)


def _read_labelled(data: TrainingData, index: int) -> tuple[np.ndarray, _Maps]:
    """A labelled image and its mask."""
    image_id, uri = (data.labelled[name][index].as_py() for name in ("image_id", "uri"))
    image_HWC = decode_image(read_bytes(uri))
    label_HW = data.truth.read(image_id)
    _check_map(label_HW, image_HWC, len(data.classes), f"mask of {image_id}")
    return image_HWC, [(label_HW, IGNORE)]


def _read_unlabelled(data: TrainingData, index: int) -> tuple[np.ndarray, _Maps]:
    """An unlabelled image, and its zero-shot label and score if it has them."""
    image_id, uri, label_uri, score_uri = (
        data.unlabelled[name][index].as_py()
        for name in ("image_id", "uri", "label_uri", "score_uri")
    )
    image_HWC = decode_image(read_bytes(uri))
    if label_uri is None:
        return image_HWC, []
    label_HW, score_HW = read_label(label_uri, score_uri)
    _check_map(label_HW, image_HWC, len(data.classes), f"zero-shot label of {image_id}")
    return image_HWC, [(label_HW, IGNORE), (score_HW, 0)]


def _check_map(map_HW: np.ndarray, image_HWC: np.ndarray, n_classes: int, what: str) -> None:
    """Raise ValueError if a label does not fit its image or its class list."""
    (height, width), (its_height, its_width) = image_HWC.shape[:2], map_HW.shape
    if (height, width) != (its_height, its_width):
        rule, fix = f"of the image's size, {width} x {height}", "make it again from this image"
        raise ValueError(complain(what, rule, f"{its_width} x {its_height}", fix))
    check_indices(map_HW, n_classes, what)


def _as_it_is(step: _Step) -> _Step:
    """Instead of torch's collating, which would take tuples apart."""
    return step
