"""One image to its labels: exact on a rigged pair, and in smaller steps when memory runs out."""

import traceback
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from zsplg_ray.config import ComposeConfig, LabelConfig
from zsplg_ray.label.clip import ClipEncoder
from zsplg_ray.label.failures import is_out_of_memory
from zsplg_ray.label.labeler import Labeler, OutOfMemory
from zsplg_ray.label.naming import Naming
from zsplg_ray.label.presets import resolve_label, resolve_sam
from zsplg_ray.label.sam import MaskProposer
from zsplg_ray.label.segments import Segments
from zsplg_ray.label.textbank import TextBank
from zsplg_ray.label.weights import load_clip, load_sam
from zsplg_ray.settings import from_mapping
from zsplg_ray.vocab import class_list

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
CLASSES = class_list("red,green")


class OneByOne:
    """A proposer that finds segments in one image at a time."""

    images_at_once = 1

    def propose_many(self, images, points_per_batch=None):
        return [self.propose(image, points_per_batch) for image in images]

    def propose(self, image_HWC, points_per_batch=None) -> Segments:
        raise NotImplementedError


class ColourProposer(OneByOne):
    """A segment for every primary colour, and one over the whole image."""

    def propose(self, image_HWC: np.ndarray, points_per_batch: int | None = None) -> Segments:
        strongest_HW = image_HWC.argmax(axis=2)
        masks = [strongest_HW == c for c in range(len(COLOURS))]
        masks.append(np.ones(image_HWC.shape[:2], np.bool_))
        return Segments.from_masks(np.stack(masks), [0.9] * 4, [0.95] * 4)


class ColourEmbedder:
    """A segment's embedding is the direction of its mean colour, moved by less than float16."""

    def embed(self, image_HWC: np.ndarray, segments: Segments) -> np.ndarray:
        means = [image_HWC[segments.mask_HW(r)].mean(axis=0) for r in range(len(segments))]
        embedding_RD = np.array(means, np.float32) + np.float32(1e-6)
        return embedding_RD / np.linalg.norm(embedding_RD, axis=1, keepdims=True)


def naming(**thresholds: Any) -> Naming:
    bank = TextBank(np.eye(3, dtype=np.float32)[:2], np.array([1, 2]), len(CLASSES))
    return Naming(CLASSES, bank, ComposeConfig(**{"min_similarity": 0.9, **thresholds}))


def scene(size=16):
    """Red left above, green right below, blue elsewhere; all of it on a grid of 4 pixels."""
    image_HWC = np.full((size, size + 4, 3), COLOURS["blue"], np.uint8)
    image_HWC[:8, :4] = COLOURS["red"]
    image_HWC[8:, 8:] = COLOURS["green"]
    label_HW = np.zeros((size, size + 4), np.uint8)
    label_HW[:8, :4] = 1
    label_HW[8:, 8:] = 2
    return image_HWC, label_HW


# The right labels --------------------------------------------------------------------------------


def test_the_label_map_is_exactly_the_known_one():
    image_HWC, label_HW = scene()
    segments, composed = Labeler(ColourProposer(), ColourEmbedder(), naming()).label(image_HWC)
    np.testing.assert_array_equal(composed.label_HW, label_HW)
    np.testing.assert_array_equal(composed.score_HW > 0.99, label_HW > 0)
    np.testing.assert_array_equal(composed.painted_HW, label_HW > 0)
    assert len(segments) == 4 and segments.size_hw == label_HW.shape


def test_thresholds_decide_and_may_leave_pixels_open():
    image_HWC, label_HW = scene()
    strict = naming(min_similarity={"red": 1.1 - 0.1, "green": 0.9}, unsure="ignore")
    labeler = Labeler(ColourProposer(), ColourEmbedder(), strict)
    expected = np.where(label_HW == 2, 2, 255)
    expected[label_HW == 1] = 1
    np.testing.assert_array_equal(labeler.label(image_HWC)[1].label_HW, expected)
    none = Labeler(ColourProposer(), ColourEmbedder(), naming(min_area_px=10_000))
    assert not none.label(image_HWC)[1].label_HW.any()


def test_labels_composed_again_from_stored_segments_are_the_same():
    """What is stored is float16, so that is what labels have to be composed from at once."""

    class Between(ColourEmbedder):
        def embed(self, image_HWC, segments):
            embedding_RD = super().embed(image_HWC, segments)
            embedding_RD[:3] = (0.6, 0.79999, 0.0)  # rounds across the threshold below
            return embedding_RD

    stored = float(np.float16(0.79999))
    length = np.hypot(float(np.float16(0.6)), stored)
    exactly = naming(min_similarity=stored / length)
    segments, composed = Labeler(ColourProposer(), Between(), exactly).label(scene()[0])
    assert segments.embedding_RD is not None and segments.embedding_RD.dtype == np.float16
    again = exactly.compose(Segments.from_rows(segments.to_rows(), segments.size_hw))
    np.testing.assert_array_equal(again.label_HW, composed.label_HW)
    np.testing.assert_array_equal(again.score_HW, composed.score_HW)
    assert composed.label_HW.any()


def test_an_image_without_segments_has_labels_too():
    class Nothing(OneByOne):
        def propose(self, image_HWC, points_per_batch=None):
            return Segments.from_masks(np.zeros((0, *image_HWC.shape[:2]), np.bool_), [], [])

    class Embed:
        def embed(self, image_HWC, segments):
            return np.zeros((len(segments), 3), np.float32)

    segments, composed = Labeler(Nothing(), Embed(), naming()).label(scene()[0])
    assert len(segments) == 0 and not composed.label_HW.any()


# Out of memory -----------------------------------------------------------------------------------

CPU_FULL = (
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(CPU_FULL),
    MemoryError(),
]


class Fussy(ColourProposer):
    """Takes images up to some size with up to some points at a time; notes what it was asked."""

    def __init__(self, max_points: int, max_width: int, error: BaseException) -> None:
        self.max_points, self.max_width, self.error = max_points, max_width, error
        self.asked: list[tuple[int | None, int]] = []

    def propose(self, image_HWC, points_per_batch=None):
        self.asked.append((points_per_batch, image_HWC.shape[1]))
        if (points_per_batch or 64) > self.max_points or image_HWC.shape[1] > self.max_width:
            raise self.error
        return super().propose(image_HWC)


@pytest.mark.parametrize("error", FULL, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(
    ("max_points", "max_width", "tries"),
    [(64, 20, 1), (16, 20, 2), (2, 20, 3), (2, 10, 4), (2, 5, 5)],
)
def test_fewer_points_are_tried_and_then_smaller_images(max_points, max_width, tries, error):
    image_HWC, label_HW = scene()
    proposer = Fussy(max_points, max_width, error)
    segments, composed = Labeler(proposer, ColourEmbedder(), naming()).label(image_HWC)
    assert proposer.asked == [(None, 20), (16, 20), (2, 20), (2, 10), (2, 5)][:tries]
    assert segments.size_hw == label_HW.shape
    assert segments.area_px.tolist() == [32, 96, 192, 320], "segments have the image's own size"
    np.testing.assert_array_equal(composed.label_HW, label_HW)


@pytest.mark.parametrize("error", FULL, ids=lambda e: type(e).__name__)
def test_what_does_not_fit_at_all_is_told_with_its_size(error):
    proposer = Fussy(0, 0, error)
    with pytest.raises(OutOfMemory, match=r"^image of 16x20 px does not fit in memory"):
        Labeler(proposer, ColourEmbedder(), naming()).label(scene()[0])
    assert len(proposer.asked) == 5


def test_an_embedder_out_of_memory_gets_a_smaller_image_too():
    class FussyEmbedder(ColourEmbedder):
        def embed(self, image_HWC, segments):
            assert image_HWC.shape[:2] == segments.size_hw
            if image_HWC.shape[1] > 10:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().embed(image_HWC, segments)

    image_HWC, label_HW = scene()
    composed = Labeler(ColourProposer(), FussyEmbedder(), naming()).label(image_HWC)[1]
    np.testing.assert_array_equal(composed.label_HW, label_HW)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_not_tried_again(error):
    proposer = Fussy(0, 0, error)
    with pytest.raises(type(error)) as caught:
        Labeler(proposer, ColourEmbedder(), naming()).label(scene()[0])
    assert caught.value is error and len(proposer.asked) == 1


def test_a_failed_try_gives_its_memory_back_before_the_next():
    alive: list[weakref.ref] = []

    class Hungry(ColourProposer):
        def propose(self, image_HWC, points_per_batch=None):
            assert not any(ref() is not None for ref in alive), "the last try still holds memory"
            large = np.zeros(1000)
            alive.append(weakref.ref(large))
            if len(alive) < 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().propose(image_HWC)

    Labeler(Hungry(), ColourEmbedder(), naming()).label(scene()[0])
    assert len(alive) == 4


def test_a_failed_image_gives_its_memory_back_before_the_next():
    alive: list[weakref.ref] = []

    class Failing(ColourEmbedder):
        def embed(self, image_HWC, segments):
            assert not any(ref() is not None for ref in alive), "a failed image still holds memory"
            large = np.zeros(1000)
            alive.append(weakref.ref(large))
            raise ArithmeticError("no")

    results = Labeler(ColourProposer(), Failing(), naming()).label_many([scene()[0]] * 3)
    assert len(alive) == 3
    assert [str(result) for result in results] == ["no"] * 3
    told = "".join(traceback.format_exception(results[0]))  # type: ignore[arg-type]
    assert "in embed" in told, "where it failed is still known"


def test_tiny_images_can_still_be_made_smaller():
    proposer = Fussy(2, 20, MemoryError())
    proposer.max_points = 0
    with pytest.raises(OutOfMemory):
        Labeler(proposer, ColourEmbedder(), naming()).label(np.zeros((1, 2, 3), np.uint8))
    assert proposer.asked[-1] == (2, 1)


def test_which_errors_mean_out_of_memory():
    assert all(is_out_of_memory(error) for error in FULL)
    assert is_out_of_memory(RuntimeError("HIP out of memory. Tried"))
    assert not is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"))


# Several images together -------------------------------------------------------------------------


class Together(Fussy):
    """Notes how many images it is given at a time; fails if there are too many."""

    def __init__(self, images_at_once: int, most: int, error: BaseException) -> None:
        super().__init__(64, 20, error)
        self.images_at_once, self.most = images_at_once, most
        self.given: list[int] = []

    def propose_many(self, images, points_per_batch=None):
        found = []
        for start in range(0, len(images), self.images_at_once):
            some = images[start : start + self.images_at_once]
            self.given.append(len(some))
            if len(some) > self.most:
                raise self.error
            found += super().propose_many(some, points_per_batch)
        return found


def test_several_images_are_segmented_together_and_labelled_as_if_alone():
    image_HWC, label_HW = scene()
    proposer = Together(3, 3, MemoryError())
    labeler = Labeler(proposer, ColourEmbedder(), naming())
    assert labeler.images_at_once == 3
    results = labeler.label_many([image_HWC, image_HWC[:, ::-1], image_HWC[::-1]])
    assert proposer.given == [3]
    for result, expected in zip(
        results, (label_HW, label_HW[:, ::-1], label_HW[::-1]), strict=True
    ):
        assert not isinstance(result, Exception)
        np.testing.assert_array_equal(result[1].label_HW, expected)


def test_images_that_fail_together_are_tried_one_by_one():
    image_HWC, label_HW = scene()
    proposer = Together(3, 1, ValueError("one of them is odd"))
    labeler = Labeler(proposer, ColourEmbedder(), naming())
    for result in labeler.label_many([image_HWC] * 3):
        assert not isinstance(result, Exception)
        np.testing.assert_array_equal(result[1].label_HW, label_HW)
    assert proposer.given == [3, 1, 1, 1] and labeler.images_at_once == 3


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_fewer_go_together_for_good_when_memory_runs_out(error):
    image_HWC, label_HW = scene()
    proposer = Together(8, 2, error)
    labeler = Labeler(proposer, ColourEmbedder(), naming())
    for _ in range(2):
        for result in labeler.label_many([image_HWC] * 8):
            assert not isinstance(result, Exception)
            np.testing.assert_array_equal(result[1].label_HW, label_HW)
    assert labeler.images_at_once == 2
    assert proposer.given == [8, 4, *[2] * 8]


def test_what_fails_for_one_image_is_its_own_result():
    class Picky(ColourEmbedder):
        def embed(self, image_HWC, segments):
            if (image_HWC == 0).all():
                raise ArithmeticError("black")
            return super().embed(image_HWC, segments)

    image_HWC, label_HW = scene()
    labeler = Labeler(Together(3, 3, MemoryError()), Picky(), naming())
    first, second, third = labeler.label_many([image_HWC, np.zeros_like(image_HWC), image_HWC])
    assert isinstance(second, ArithmeticError)
    for result in (first, third):
        assert not isinstance(result, Exception)
        np.testing.assert_array_equal(result[1].label_HW, label_HW)


def test_a_broken_device_is_told_at_once():
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    proposer = Together(3, 1, error)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Labeler(proposer, ColourEmbedder(), naming()).label_many([scene()[0]] * 3)
    assert proposer.given == [3], "tried again on a device that is broken"


# The real pair -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes_config():
    values = {"images": "i", "out": "o", "classes": "shapes", "sam": "shapes", "clip": "shapes"}
    return resolve_label(from_mapping(LabelConfig, {**values, "sam.points_per_side": 4}))


def test_points_at_a_time_change_memory_and_not_the_result(shapes_config):
    config = from_mapping(
        type(shapes_config.sam),
        {
            **{
                f: getattr(shapes_config.sam, f)
                for f in ("stability_score_offset", "box_nms_thresh")
            },
            **{"model": "shapes", "random_weights": True, "points_per_side": 4},
            **{"points_per_batch": 8, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0},
        },
    )
    config = resolve_sam(config)
    proposer = MaskProposer(load_sam(config), config)
    image_HWC = np.random.default_rng(0).integers(0, 255, (40, 64, 3), np.uint8)
    found = {points: proposer.propose(image_HWC, points) for points in (None, 3, 500)}
    batches: list[int] = []
    decode = proposer.decoder.decode

    def noting(side, point_IQ2, min_iou):
        batches.append(point_IQ2.shape[1])
        return decode(side, point_IQ2, min_iou)

    proposer.decoder.decode = noting  # type: ignore[method-assign]
    proposer.propose(image_HWC, 500)
    assert max(batches) == 8, "more points than configured"
    proposer.propose(image_HWC, 3)
    proposer.propose(image_HWC)
    assert batches == [8, 8, 3, 3, 3, 3, 3, 1, 8, 8], "fewer points only for one image"
    for segments in found.values():
        assert segments.rle == found[None].rle
        np.testing.assert_allclose(segments.predicted_iou, found[None].predicted_iou, atol=1e-5)


def test_the_real_pair_labels_the_same_bytes_again(shapes_config):
    model, tokenizer = load_clip(shapes_config.clip)
    classes = class_list("shapes")
    bank = ClipEncoder(model, tokenizer, shapes_config.clip).encode_classes(
        classes, shapes_config.prompts
    )
    labeler = Labeler.load(shapes_config, Naming(classes, bank, shapes_config.compose))
    image_HWC = np.full((64, 80, 3), 90, np.uint8)
    image_HWC[20:44, 30:54] = (250, 220, 30)
    first, second = labeler.label(image_HWC), labeler.label(image_HWC)
    assert first[0].embedding_RD is not None and first[0].embedding_RD.dtype == np.float16
    assert first[0].rle == second[0].rle
    np.testing.assert_array_equal(first[1].label_HW, second[1].label_HW)
    assert first[1].label_HW.shape == (64, 80) and len(first[0]) > 0
