"""A run's labels as numpy, pandas and torch read them."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.made_runs import CLASSES, made_run
from zsplg_ray.labels import Labels
from zsplg_ray.records import IGNORE, encode_png


@pytest.fixture
def made(tmp_path):
    """Seven images in parts of three, ids not in the order of the parts."""
    return made_run(tmp_path, ["g.png", "b.png", "e.png", "a.png", "d/x.png", "c.png", "f.png"], 3)


def test_images_come_by_position_id_and_slice_in_the_order_of_ids(made):
    labels = Labels(made.uri)
    assert labels.ids == sorted(made.maps) and len(labels) == 7
    assert labels.classes.names == CLASSES.names
    for i, image_id in enumerate(labels.ids):
        for row in (labels[i], labels[image_id], labels[i - 7]):
            assert row.image_id == image_id
            assert np.array_equal(row.label_HW, made.maps[image_id])
            assert np.array_equal(row.score_HW, np.float32(i / 255) + np.zeros(row.label_HW.shape))
            assert np.array_equal(row.image_HWC, made.images[image_id])
    assert labels["d/x"].image_id == "d/x.png", "without its suffix too"
    assert "d/x" in labels and "x" not in labels
    assert [row.image_id for row in labels[2:5]] == labels.ids[2:5]
    assert [row.image_id for row in labels[::3]] == labels.ids[::3]
    assert [row.image_id for row in labels] == labels.ids
    assert sorted(row.image_id for row in labels.read(range(7))) == labels.ids
    with pytest.raises(IndexError):
        labels[7]
    with pytest.raises(KeyError):
        labels["none"]


def test_a_name_without_suffix_that_two_have_is_nobodys(tmp_path):
    labels = Labels(made_run(tmp_path, ["a.jpg", "a.png", "b.png"], 2).uri)
    assert labels["a.jpg"].image_id == "a.jpg" and labels["a.png"].image_id == "a.png"
    assert "a" not in labels and labels.find("a.webp") is None and labels["b"].image_id == "b.png"


def test_parts_are_not_read_again_and_again(made, reads):
    labels = Labels(made.uri)
    reads.clear()
    for i in [0, 6, 3, 1, 5, 2, 4] * 3:
        assert labels[i].image_id == labels.ids[i]
    assert len(reads) == 3
    labels._kept.clear()
    reads.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zsplg_ray.labels.MOST_KEPT", 0)
        assert [row.image_id for row in labels] == labels.ids
    assert len(labels._kept) == 1 and len(reads) > 3


def test_of_an_image_that_stands_twice_the_first_counts(made):
    first = made.folder.parts("labels")[0]
    table = made.folder.read_part("labels", first)
    again = table.set_column(
        table.schema.get_field_index("label_png"),
        "label_png",
        pa.array([encode_png(np.zeros((2, 2), np.uint8))] * len(table), pa.binary()),
    )
    made.folder.write_part("labels", "part-" + "f" * 20, again, made.meta)
    labels = Labels(made.uri)
    assert len(labels) == 7
    assert all(np.array_equal(row.label_HW, made.maps[row.image_id]) for row in labels)


def test_a_table_for_pandas(made):
    frame = Labels(made.uri).to_pandas()
    assert list(frame.index) == sorted(made.maps)
    assert {"uri", "width", "height", "source", "confidence"} <= set(frame.columns)
    for image_id, label_HW in made.maps.items():
        share = (label_HW == 2).mean()
        assert frame.loc[image_id, "share of <b>dog</b>"] == pytest.approx(share)


def test_tensors_for_torch_in_other_processes_too(made):
    labels = Labels(made.uri)
    items = list(DataLoader(labels.to_torch(), batch_size=None, num_workers=1))
    assert [item["image_id"] for item in items] == labels.ids
    for item in items:
        label_HW = made.maps[item["image_id"]]
        assert item["label"].dtype == torch.int64 and item["image"].dtype == torch.uint8
        assert np.array_equal(item["label"].numpy(), label_HW)
        assert np.array_equal(
            item["image"].numpy().transpose(1, 2, 0), made.images[item["image_id"]]
        )
        assert item["score"].shape == label_HW.shape
    assert labels.to_torch(lambda item: item["image_id"])[1] == labels.ids[1]
    assert len(pickle.loads(pickle.dumps(labels.to_torch()))) == 7


def test_an_image_that_is_gone_or_another_is_told(made, tmp_path):
    labels = Labels(made.uri)
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(FileNotFoundError):
        _ = labels["a.png"].image_HWC
    Image.new("RGB", (5, 4)).save(tmp_path / "images" / "b.png")
    with pytest.raises(ValueError, match=r"image b\.png must be .+, got 5 x 4; label it again"):
        _ = labels["b.png"].image_HWC
    assert labels["b.png"].label_HW.any(), "its label is there all the same"


def test_what_is_no_run_with_labels_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match=r"labels must be a run's folder with labels/"):
        Labels(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"fuse must be a run's folder"):
        Labels(str(tmp_path / "nothing"), name="fuse")
    keys = {key: {} for key in ("config", "resolved", "classes", "weights")}
    made.folder.write_run({**keys, "labels_state": "relabelling"})
    with pytest.raises(ValueError, match=r"labels must be whole, got a half relabelled run"):
        Labels(made.uri)


def test_ignored_pixels_stay_so(made):
    assert any((row.label_HW == IGNORE).any() for row in Labels(made.uri))
