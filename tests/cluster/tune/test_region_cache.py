"""Regions of a run's images: what is cached, when it is counted again, and what is refused."""

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from zsplg_ray.cluster.parts import segments_row
from zsplg_ray.cluster.tune import region_cache
from zsplg_ray.cluster.tune.candidates import Images
from zsplg_ray.cluster.tune.region_cache import judge_part
from zsplg_ray.config import ComposeConfig
from zsplg_ray.exactly_once import repair
from zsplg_ray.label.compose import compose
from zsplg_ray.label.segments import Segments
from zsplg_ray.label.sweep import Sweep
from zsplg_ray.label.textbank import TextBank
from zsplg_ray.masks import open_truth
from zsplg_ray.metrics import confusion
from zsplg_ray.records import segments_schema
from zsplg_ray.rundir import RunFolder, part_name
from zsplg_ray.vocab import ClassList

CLASSES = ClassList.of(["cat", "dog"])
IDS = ["a.jpg", "b.jpg", "c.jpg"]
HW = (12, 15)


def unit(rng, *shape):
    vector = rng.normal(size=shape).astype(np.float32)
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def segments_of(rng, size_hw=HW) -> Segments:
    masks_RHW = rng.random((4, *size_hw)) < 0.4
    found = Segments.from_masks(masks_RHW, rng.random(4).tolist(), rng.random(4).tolist())
    return found.with_embedding(unit(rng, 4, 8))


class World:
    """A run of three images in one part, and masks of two of them."""

    def __init__(self, path) -> None:
        self.rng = np.random.default_rng(0)
        self.folder, self.masks = RunFolder(str(path / "run")), path / "masks"
        self.masks.mkdir()
        self.name = part_name(IDS)
        self.segments = {image_id: segments_of(self.rng) for image_id in IDS}
        self.truth_of = {i: self.rng.integers(0, 3, HW).astype(np.uint8) for i in IDS[:2]}
        bank = TextBank(unit(self.rng, 3, 8), np.array([0, 1, 2]), len(CLASSES))
        other = TextBank(unit(self.rng, 3, 8), np.array([0, 1, 2]), len(CLASSES))
        self.banks = {"run": bank, "seven": other}
        self.write()

    def write(self) -> None:
        rows = []
        for image_id, segments in self.segments.items():
            image = {"image_id": image_id, "uri": f"/x/{image_id}", "image_sha256": "0"}
            rows.append(segments_row(image, segments))
        table = pa.Table.from_pylist(rows, schema=segments_schema(8))
        self.folder.write_part("segments", self.name, table, {})
        for image_id, truth_HW in self.truth_of.items():
            Image.fromarray(truth_HW).save(self.masks / f"{image_id[:-4]}.png")

    def judged(self, ids=("a.jpg", "b.jpg")):
        truth = open_truth(str(self.masks))
        return judge_part(self.folder, truth, self.banks, self.name, ids)


@pytest.fixture()
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture()
def cuts(monkeypatch):
    """How often regions are counted."""
    made, real = [], region_cache.cut

    def counting(segments, truth_HW, n_classes):
        made.append(len(segments))
        return real(segments, truth_HW, n_classes)

    monkeypatch.setattr(region_cache, "cut", counting)
    return made


def test_counts_are_those_of_composed_pixels(world):
    judged = world.judged()
    assert [one.image_id for one in judged] == ["a.jpg", "b.jpg"]
    regions, sims = [one.regions for one in judged], [one.sims["seven"] for one in judged]
    sweep = Sweep(regions, judged, {"seven": sims}, CLASSES)  # type: ignore[arg-type]
    config = ComposeConfig(min_similarity=0.1, min_stability=0.3)
    expected = np.zeros((3, 4), np.int64)
    for one in judged:
        segments = world.segments[one.image_id]
        sim_RK = world.banks["seven"].similarity(segments.embedding_RD)
        composed = compose(segments, sim_RK, config, CLASSES)
        expected += confusion(world.truth_of[one.image_id], composed.label_HW, 3)
    assert np.array_equal(sweep.confusion(config, "seven")[0], expected)
    assert judged[0].classes == frozenset(np.unique(world.truth_of["a.jpg"]).tolist()) - {0}


def test_the_second_time_nothing_is_counted(world, cuts):
    first = world.judged()
    assert len(cuts) == 2
    again = world.judged()
    assert len(cuts) == 2
    for before, after in zip(first, again, strict=True):
        assert before.regions.to_row().keys() == after.regions.to_row().keys()
        assert np.array_equal(before.regions.cover, after.regions.cover)
        assert np.array_equal(before.regions.count_px, after.regions.count_px)


def test_a_mended_mask_is_counted_again_and_only_that(world, cuts):
    world.judged()
    world.truth_of["b.jpg"][0, 0] ^= 1
    world.write()
    judged = world.judged()
    assert len(cuts) == 3
    counts = np.bincount(judged[1].regions.count_class, judged[1].regions.count_px, minlength=3)
    assert counts.tolist() == np.bincount(world.truth_of["b.jpg"].ravel(), minlength=3).tolist()


def test_other_segments_under_the_same_id_are_counted_again(world, cuts):
    world.judged()
    world.segments["a.jpg"] = segments_of(world.rng)
    world.write()
    world.judged()
    assert len(cuts) == 3


def test_a_torn_cache_is_no_matter(world, cuts):
    world.judged()
    world.folder.write_bytes(f"regions/{world.name}.parquet", b"PAR1 torn")
    world.judged()
    assert len(cuts) == 4
    world.judged()
    assert len(cuts) == 4  # mended


def test_images_that_are_labelled_later_join_the_cache(world, cuts):
    world.judged()
    world.truth_of["c.jpg"] = world.truth_of["a.jpg"].copy()
    world.write()
    world.judged(IDS)
    assert len(cuts) == 3
    world.judged(IDS)
    world.judged(["a.jpg"])
    assert len(cuts) == 3


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((3, 3), np.uint8), r"shape \(12, 15\).*\(image b.jpg\)"),
        (np.full(HW, 7, np.uint8), r"class indices below 3.*got 7.*\(image b.jpg\)"),
    ],
)
def test_masks_that_do_not_fit_are_named(world, mask, message):
    world.truth_of["b.jpg"] = mask
    world.write()
    with pytest.raises(ValueError, match=message):
        world.judged()
    assert world.folder.parts("regions") == []


def test_the_cache_does_not_disturb_the_run(world):
    world.judged()
    found = repair(world.folder)
    assert found.done == set(IDS)
    assert len(world.folder.parts("regions")) == 1


def test_masks_that_say_nothing_are_left_out():
    images = Images(["a", "b", "c"], without_truth=4, without_segments=0)
    assert images.only(["a", "c"]) == Images(["a", "c"], without_truth=5, without_segments=0)
    with pytest.raises(ValueError, match=r"^truth must be .* that is not 255, got 1 of 3; "):
        images.only(["b"])
