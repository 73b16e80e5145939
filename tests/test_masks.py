"""Ground truth of every kind, against the arrays that it was made from."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle_codec

from zsplg_ray.masks import open_truth
from zsplg_ray.rundir import META
from zsplg_ray.vocab import class_list, palette

RNG = np.random.default_rng(0)
LABEL_HW = RNG.choice([0, 1, 2, 255], (9, 14)).astype(np.uint8)


def encoded(label_HW, colours=True):
    image = Image.fromarray(label_HW)
    if colours:
        image.putpalette(palette())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def refused(words, src, **options):
    with pytest.raises(ValueError, match=r"^truth must be .*, got .*; .*$") as caught:
        open_truth(str(src), **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def check(truth, ids):
    assert truth.ids == ids
    assert len(truth) == len(ids)
    for copy in (truth, pickle.loads(pickle.dumps(truth))):
        label_HW = copy.read(ids[0])
        assert label_HW.dtype == np.uint8
        assert (label_HW == LABEL_HW).all()


def test_folder(tmp_path):
    put(tmp_path / "a b.png", encoded(LABEL_HW))
    put(tmp_path / "sub/c.PNG", encoded(LABEL_HW[::-1], colours=False))
    put(tmp_path / ".hidden.png", b"")
    truth = open_truth(str(tmp_path))
    check(truth, ["a b", "sub/c"])
    assert truth.classes is None
    assert (truth.read("sub/c.jpg") == LABEL_HW[::-1]).all()
    assert truth.has("a b") and truth.has("a b.JPG") and not truth.has("c") and not truth.has("")
    with pytest.raises(ValueError, match="none for c"):
        truth.read("c")
    check(open_truth(f"file://{tmp_path}".replace(" ", "%20")), ["a b", "sub/c"])


def test_voc(tmp_path):
    put(tmp_path / "JPEGImages/2007_1.jpg", b"")
    put(tmp_path / "SegmentationObject/2007_1.png", b"")
    put(tmp_path / "SegmentationClass/2007_1.png", encoded(LABEL_HW))
    check(open_truth(str(tmp_path)), ["2007_1"])


def test_split_file(tmp_path):
    put(tmp_path / "m/x_mask.png", encoded(LABEL_HW))
    split = tmp_path / "s.txt"
    split.write_text("i/x.jpg m/x_mask.png\ni/y.jpg m/gone.png\n")
    truth = open_truth(str(split))
    check(truth, ["i/x", "i/y"])
    assert truth.has("i/x.jpg")
    with pytest.raises(FileNotFoundError):
        truth.read("i/y")
    (tmp_path / "lists").mkdir()
    split = split.rename(tmp_path / "lists/s.txt")
    check(open_truth(str(split), root=str(tmp_path)), ["i/x", "i/y"])
    split.write_text("i/x.jpg m/x.png\ni/y.jpg\n")
    refused("line 2", split)
    split.write_text("x.jpg m/x.png\nx.png m/x.png\n")
    refused("one mask an image", split)


def test_labels_of_this_project(tmp_path):
    table = pa.table({"image_id": ["b.jpg", "a.jpg"], "label_png": [encoded(LABEL_HW)] * 2})
    meta = {META: json.dumps({"classes": class_list("cat,dog").to_dict()})}
    (tmp_path / "run/labels").mkdir(parents=True)
    pq.write_table(table.replace_schema_metadata(meta), tmp_path / "run/labels/0.parquet")
    pq.write_table(pa.table({"image_id": ["b.jpg"]}), tmp_path / "run/errors.parquet")
    for src in ("run", "run/labels", "run/labels/0.parquet"):
        truth = open_truth(str(tmp_path / src))
        check(truth, ["a", "b"])
        assert truth.classes == class_list("cat,dog")
    pq.write_table(table, tmp_path / "plain.parquet")
    assert open_truth(str(tmp_path / "plain.parquet")).classes is None
    refused("its columns are image_id", tmp_path / "run/errors.parquet")
    refused("readable Parquet", put(tmp_path / "bad.parquet", b"PAR1"))


def test_masks_that_are_none(tmp_path):
    put(tmp_path / "rgb.png", encoded(np.zeros((2, 2, 3), np.uint8), colours=False))
    put(tmp_path / "text.png", b"hello")
    truth = open_truth(str(tmp_path))
    with pytest.raises(ValueError, match=r"mask of rgb must be one 8-bit channel.*got 8-bit RGB"):
        truth.read("rgb.jpg")
    with pytest.raises(ValueError, match="mask of text must be a PNG"):
        truth.read("text")


def test_missing_empty_unknown(tmp_path):
    refused("check the path", tmp_path / "nope")
    refused("none", tmp_path)
    refused("rename or convert", put(tmp_path / "x.docx", b""))
    put(tmp_path / "a.png", b"")
    put(tmp_path / "a.PNG", b"")
    refused("one mask an image", tmp_path)


def uncompressed(mask_HW):
    """COCO's run lengths of a mask, counted one pixel at a time."""
    counts, value = [0], 0
    for pixel in mask_HW.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"counts": counts, "size": list(mask_HW.shape)}


def compressed(mask_HW):
    rle = rle_codec.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    return {
        "counts": bytes(rle["counts"]).decode(),  # pyright: ignore
        "size": list(mask_HW.shape),
    }


def coco(path, *annotations, size_hw=(20, 30), **more):
    """A COCO file with one image x/1.jpg, and categories 7 cat and 3 dog."""
    data = {
        "images": [
            {"id": 1, "file_name": "x/1.jpg", "height": size_hw[0], "width": size_hw[1]},
            {"id": 2, "file_name": "x/2.jpg", "height": 4, "width": 5},
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": c, "segmentation": s, **crowd}
            for i, (c, s, crowd) in enumerate(annotations)
        ],
    } | more
    path.write_text(json.dumps(data))
    return str(path)


def box(y0, y1, x0, x1, size_hw=(20, 30)):
    mask_HW = np.zeros(size_hw, bool)
    mask_HW[y0:y1, x0:x1] = True
    return mask_HW


def polygon(y0, y1, x0, x1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def test_coco_kinds_and_order(tmp_path):
    src = coco(
        tmp_path / "c.json",
        (7, [polygon(2, 6, 3, 9)], {}),
        (3, compressed(box(0, 15, 0, 15)), {"iscrowd": 0}),
        (3, uncompressed(box(4, 8, 8, 12)), {}),
        (7, uncompressed(box(0, 5, 0, 5)), {"iscrowd": 1}),
        (7, [polygon(16, 18, 20, 22), polygon(16, 18, 26, 28), [1, 1, 2, 2]], {}),
        (7, [], {}),
    )
    truth = open_truth(src)
    assert truth.ids == ["x/1", "x/2"]
    assert truth.classes is not None and truth.classes.names == ("background", "dog", "cat")
    wanted = np.zeros((20, 30), np.uint8)
    wanted[:5, :5] = 2  # the crowd first, although it is small
    wanted[:15, :15] = 1
    wanted[2:6, 3:9] = 2
    wanted[4:8, 8:12] = 1  # the smallest last
    wanted[16:18, 20:22] = wanted[16:18, 26:28] = 2
    got = truth.read("x/1.jpg")
    assert got.dtype == np.uint8
    assert (got == wanted).all()
    assert not truth.read("x/2").any() and truth.read("x/2").shape == (4, 5)
    assert (pickle.loads(pickle.dumps(truth)).read("x/1") == wanted).all()


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None)
def test_coco_run_lengths_against_pycocotools(tmp_path_factory, seed, height, width):
    rng = np.random.default_rng(seed)
    mask_HW = rng.random((height, width)) < rng.random()
    for segmentation in (compressed(mask_HW), uncompressed(mask_HW)):
        path = tmp_path_factory.getbasetemp() / "rle.json"
        src = coco(path, (3, segmentation, {}), size_hw=mask_HW.shape)
        assert (open_truth(src).read("x/1") == mask_HW).all()


def test_coco_polygon_against_pycocotools(tmp_path):
    points = [3.2, 1.1, 28.7, 4.0, 15.5, 19.3, 2.0, 12.0]
    rle = rle_codec.frPyObjects([points], 20, 30)  # pyright: ignore
    wanted = rle_codec.decode(rle_codec.merge(rle)) * 2
    got = open_truth(coco(tmp_path / "c.json", (7, [points], {}))).read("x/1")
    assert wanted.any() and (got == wanted).all()


def test_coco_category_called_background(tmp_path):
    categories = [{"id": 0, "name": "Background"}, {"id": 1, "name": "cat"}]
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [polygon(0, 20, 0, 30)]},
        {"id": 2, "image_id": 1, "category_id": 0, "segmentation": [polygon(0, 5, 0, 5)]},
    ]
    src = coco(tmp_path / "c.json", categories=categories, annotations=annotations)
    truth = open_truth(src)
    assert truth.classes is not None and truth.classes.names == ("background", "cat")
    assert (truth.read("x/1") == ~box(0, 5, 0, 5)).all()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"categories": None}, "categories"),
        ({"annotations": {}}, "annotations"),
        ({"categories": [{"id": 1}]}, "name"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": "2", "name": "b"}]}, "TypeError"),
        ({"images": [{"file_name": "a.jpg"}]}, "height"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "height": 0, "width": 3}]}, "without pixels"),
        ({"images": [{"id": 1, "file_name": "a", "height": 1, "width": 1}] * 2}, "same id"),
        ({"annotations": [{"id": 1}]}, "needs a segmentation"),
        ({"annotations": [3]}, "needs a segmentation"),
        ({"annotations": [{"segmentation": [], "category_id": 4, "image_id": 1}]}, "category"),
        ({"annotations": [{"segmentation": [], "category_id": 3, "image_id": 9}]}, "image_id"),
        ({"annotations": [{"segmentation": [], "category_id": [], "image_id": 1}]}, "category"),
        ({"images": []}, "none"),
    ],
)
def test_coco_refused(tmp_path, more, words):
    refused(words, coco(tmp_path / "c.json", **more))


def test_coco_that_is_no_json(tmp_path):
    refused("COCO file in JSON", put(tmp_path / "c.json", b'{"images": '))


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 2, 3, 4, 5]],
        [[1, 2, "x", 4, 5, 6]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [1, 2, 3],
        {"counts": [3, 4], "size": [20, 30]},
        {"counts": [-1, 601], "size": [20, 30]},
        {"counts": [], "size": [20, 30]},
        {"counts": "0000", "size": [20, 30]},
        {"counts": "zzz\x7f", "size": [20, 30]},
        {"counts": "ppppppppppppppppppp", "size": [20, 30]},
        {"counts": 3, "size": [20, 30]},
        {"counts": [600], "size": [30, 20]},
        {"counts": [600]},
        "abc",
        3,
    ],
)
def test_broken_segmentation(tmp_path, segmentation):
    truth = open_truth(coco(tmp_path / "c.json", (7, segmentation, {})))
    with pytest.raises(ValueError, match=r"^truth must be a COCO file, got annotation 0.*; .*$"):
        truth.read("x/1")
    truth.read("x/2")
