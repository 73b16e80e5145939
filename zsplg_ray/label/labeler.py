"""Load once, label many: SAM, CLIP and thresholds in one object.

What enters: uint8 RGB images. What leaves: segments (with float16 embeddings, as they are stored)
and the label map composed from them. Labels are composed from the stored embeddings, so that
composing again later from Parquet gives the same bytes. No Ray here: an actor holds one of these,
and so may a notebook.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from zsplg_ray.config import LabelConfig
from zsplg_ray.label.clip import ClipEncoder
from zsplg_ray.label.compose import Composed
from zsplg_ray.label.failures import free_memory, is_broken_device, is_out_of_memory
from zsplg_ray.label.naming import Naming
from zsplg_ray.label.sam import MaskProposer
from zsplg_ray.label.segments import Segments
from zsplg_ray.label.weights import load_clip, load_sam, sam_sha256, state_sha256

log = logging.getLogger(__name__)


class Proposer(Protocol):
    """Whatever finds segments: `MaskProposer`, or a rigged one in a test."""

    images_at_once: int
    """How many images its memory takes together."""

    def propose_many(
        self, images: Sequence[np.ndarray], points_per_batch: int | None = None
    ) -> list[Segments]:
        """Segments of each uint8 RGB image, not embedded yet."""
        ...


class Embedder(Protocol):
    """Whatever embeds segments: `ClipEncoder`, or a rigged one in a test."""

    def embed(self, image_HWC: np.ndarray, segments: Segments) -> np.ndarray:
        """float32 [R, D], unit length."""
        ...


Labelled = tuple[Segments, Composed]
"""Segments with float16 embeddings, and the labels composed from them."""


class LabelsImages(Protocol):
    """Whatever labels images: `Labeler`, or a rigged one in a test."""

    @property
    def images_at_once(self) -> int:
        """How many images to give to `label_many`."""
        ...

    def label_many(self, images: Sequence[np.ndarray]) -> list[Labelled | Exception]:
        """The result for each uint8 RGB image, or what went wrong with it."""
        ...


class OutOfMemory(RuntimeError):
    """One image does not fit, at whatever size was tried."""


class Labeler:
    """Segments and names images, and retries in smaller steps if memory runs out."""

    weights: dict[str, str] | None = None
    """SHA-256 of the weights of sam and clip, as `load` found them; None if parts are given."""

    def __init__(self, proposer: Proposer, embedder: Embedder, naming: Naming) -> None:
        self.proposer, self.embedder, self.naming = proposer, embedder, naming

    @classmethod
    def load(cls, config: LabelConfig, naming: Naming, device: str = "cpu") -> Labeler:
        """SAM and CLIP as a resolved config names them (see presets.resolve_label)."""
        model, tokenizer = load_clip(config.clip, device)
        encoder = ClipEncoder(model, tokenizer, config.clip, device)
        gpu_share = min(1.0, config.actors.gpus or 1.0)
        proposer = MaskProposer(load_sam(config.sam, device), config.sam, gpu_share)
        labeler = cls(proposer, encoder, naming)
        labeler.weights = {"sam": sam_sha256(config.sam), "clip": state_sha256(model)}
        return labeler

    @property
    def images_at_once(self) -> int:
        """How many images SAM takes together."""
        return self.proposer.images_at_once

    def label(self, image_HWC: np.ndarray, found: Segments | None = None) -> Labelled:
        """Segments with float16 embeddings, and the labels composed from them.

        Args:
            image_HWC: uint8 RGB.
            found: Its segments, if they are known already.

        Raises:
            OutOfMemory: If memory runs out even with few points at a time on a quarter of the side.
        """
        segments = self.segment(image_HWC, found)
        return segments, self.naming.compose(segments)

    def label_many(self, images: Sequence[np.ndarray]) -> list[Labelled | Exception]:
        """As `label` for each image, segmented together; what fails for one image is its result.

        Args:
            images: uint8 RGB, of any sizes.

        Raises:
            Exception: If the device is broken (`is_broken_device`): it will not do the others.
        """
        found = self._propose_together(images)
        results: list[Labelled | Exception] = []
        for image, segments in zip(images, found or [None] * len(images), strict=True):
            try:
                results.append(self.label(image, segments))
            except Exception as e:
                if is_broken_device(e):
                    raise
                traceback.clear_frames(e.__traceback__)  # they would keep the tensors alive
                results.append(e)
        return results

    def _propose_together(self, images: Sequence[np.ndarray]) -> list[Segments] | None:
        """Segments of all images; None where each is to be tried alone.

        When memory runs out, fewer go together from then on.
        """
        while min(len(images), self.proposer.images_at_once) > 1:
            try:
                return self.proposer.propose_many(images)
            except Exception as e:
                if is_broken_device(e):
                    raise
                log.warning("%d images together failed: %s", len(images), e)
                if not is_out_of_memory(e):
                    return None
                together = min(len(images), self.proposer.images_at_once)
                self.proposer.images_at_once = together // 2
            free_memory()
        return None

    def segment(self, image_HWC: np.ndarray, found: Segments | None = None) -> Segments:
        """Segments with float16 embeddings; in smaller steps, then smaller, if memory runs out.

        Args:
            image_HWC: uint8 RGB.
            found: Its segments, if they are known already; found again if memory runs out.
        """
        last: BaseException | None = None
        for points_per_batch, shrink in self._steps():
            try:
                if found is not None:
                    return self._embed(image_HWC, found)
                return self._segment(image_HWC, points_per_batch, shrink)
            except (RuntimeError, MemoryError) as e:
                if not is_out_of_memory(e):
                    raise
                last, found = e.with_traceback(None), None  # frames would keep the tensors alive
                log.warning("out of memory (%s points, 1/%d of the side)", points_per_batch, shrink)
            free_memory()
        size = "x".join(map(str, image_HWC.shape[:2]))
        raise OutOfMemory(f"image of {size} px does not fit in memory: {last}")

    def _steps(self) -> Iterator[tuple[int | None, int]]:
        yield from ((None, 1), (16, 1), (2, 1), (2, 2), (2, 4))

    def _segment(self, image_HWC: np.ndarray, points: int | None, shrink: int) -> Segments:
        image = image_HWC if shrink == 1 else _smaller(image_HWC, shrink)
        segments = self.proposer.propose_many([image], points)[0]
        return self._embed(image, segments).resized(image_HWC.shape[:2])

    def _embed(self, image_HWC: np.ndarray, segments: Segments) -> Segments:
        return segments.with_embedding(self.embedder.embed(image_HWC, segments))


def _smaller(image_HWC: np.ndarray, shrink: int) -> np.ndarray:
    height, width = image_HWC.shape[:2]
    size = (max(1, width // shrink), max(1, height // shrink))
    return np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.BILINEAR))
