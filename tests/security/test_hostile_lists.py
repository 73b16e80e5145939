"""What lists images, classes and settings, written by somebody who means no good: one line each."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsplg_ray import cli
from zsplg_ray.coco import CocoMasks
from zsplg_ray.config import LabelConfig
from zsplg_ray.masks import open_truth
from zsplg_ray.rundir import RunFolder
from zsplg_ray.safe_text import SafeFormatter
from zsplg_ray.safe_yaml import MAX_BYTES
from zsplg_ray.settings import complain, from_mapping, read_yaml
from zsplg_ray.sources import list_images
from zsplg_ray.storage import Place, read_bytes
from zsplg_ray.vocab import ClassList, class_list

MOST_S = 5.0
"""No refusal takes more of a processor; a busy machine does not count."""


def refused(call, *args, words: str = "", **options) -> str:
    """The one line that a call is refused with, soon and without control characters."""
    began = time.process_time()
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    told = str(caught.value)
    assert time.process_time() - began < MOST_S
    assert told.isprintable() and len(told) < 5000 and words in told, told[:300]
    return told


# COCO ---------------------------------------------------------------------------------------------

IMAGE = {"id": 1, "file_name": "a.jpg", "height": 4, "width": 6}
CATEGORY = {"id": 7, "name": "cat"}


def coco(folder: Path, *, annotations=(), images=(IMAGE,), categories=(CATEGORY,)) -> str:
    path = folder / "c.json"
    content = {"images": list(images), "categories": list(categories)}
    path.write_text(json.dumps({**content, "annotations": list(annotations)}))
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000, '{"images": ' * 50_000, "\ud800", "\0", "NaN", "1" * 10_000),
        '{"images": [' + "[" * 900 + "]" * 900 + "]}",
        '{"images": [{"file_name": 1e999}]}',
        '{"images": [{"file_name": ' + "9" * 5000 + "}]}",
    ],
    ids=range(9),
)
def test_coco_that_is_none(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(list_images, str(path), words="images must be a COCO file")
    refused(open_truth, str(path), words="truth must be a COCO file")


@pytest.mark.parametrize(
    "changes",
    [
        *({"height": 10**9, "width": 10**9}, {"height": -1}, {"height": 0}, {"height": None}),
        *({"height": float("inf")}, {"height": float("nan")}, {"height": [4]}, {"id": [1]}),
        *({"height": "x" * 10_000}, {"height": {"a": 1}}, {"height": 10**400}),
    ],
)
def test_coco_images_of_impossible_sizes(tmp_path, changes):
    refused(open_truth, coco(tmp_path, images=[IMAGE | changes]), words="truth must be a COCO file")


def annotation(**changes):
    polygon = [[0, 0, 3, 0, 3, 3]]
    return {"id": 1, "image_id": 1, "category_id": 7, "segmentation": polygon} | changes


@pytest.mark.parametrize("name", ["image_id", "category_id", "segmentation"])
@pytest.mark.parametrize("value", [None, [1], {"a": {}}, "x" * 10_000, 1e308, True])
def test_annotations_of_wrong_types(tmp_path, name, value):
    truth_file = coco(tmp_path, annotations=[annotation(**{name: value})])
    if name == "image_id" and value is True:
        return  # JSON's true is Python's 1, the image's id
    refused(lambda: open_truth(truth_file).read("a"), words="truth must be a COCO file")


@pytest.mark.parametrize(
    "outline",
    [
        [[1e300, 0, 0, 1e300, 5, 5]],
        [[1e9, 0, 0, 1e9, 5, 5]],
        [[0, 0, 3, float("nan"), 1, 1]],
        [[0, 0, 1000, 1000] * 250_000],
        [[[0, 0], [1]]],
        [["a", "b"] * 3],
        {"size": [4, 6], "counts": [2**64, 24]},
        {"size": [4, 6], "counts": [2**63, 2**63, 24]},
        {"size": [4, 6], "counts": [-1, 25]},
        {"size": [4, 6], "counts": [23.5, 0.5]},
        {"size": [4, 6], "counts": [[24]]},
        {"size": [4, 6], "counts": [True] * 24},
        {"size": [4, 6], "counts": "o" * 1_000_000},
        {"size": [4, 6], "counts": "P" * 1_000_000},
        {"size": [4, 6], "counts": "\u20ac"},
        {"size": [4, 6], "counts": ""},
        {"size": [4, 6], "counts": None},
        {"size": [10**9, 10**9], "counts": [10**18]},
        {"size": 4, "counts": [24]},
        {},
    ],
    ids=range(20),
)
def test_masks_that_are_none(tmp_path, outline):
    truth = open_truth(coco(tmp_path, annotations=[annotation(segmentation=outline)]))
    refused(truth.read, "a", words="truth must be a COCO file")


def test_many_annotations_take_no_more_memory_than_one_mask(tmp_path):
    """Each is 4 MB dense: a list of all would be 400 MB."""
    big = IMAGE | {"height": 2000, "width": 2000}
    boxes = [[i, i, i + 9, i, i + 9, i + 9, i, i + 9] for i in range(100)]
    drawn = [annotation(segmentation=[box]) for box in boxes]
    path = coco(tmp_path, annotations=drawn, images=[big])
    label_HW = CocoMasks(Place.parse(path)).draw("a.jpg")
    assert label_HW[5, 5] == label_HW[105, 105] == 1 and label_HW[0, 100] == 0
    # A process of its own, for the most that this one has had may be more than any list of masks.
    done = subprocess.run([sys.executable, "-c", DRAW, path], capture_output=True, check=True)
    before_kb, after_kb = map(int, done.stdout.split())
    assert 4 * 2**10 <= after_kb - before_kb < 100 * 2**10


DRAW = """
import sys
from pathlib import Path
from zsplg_ray.coco import CocoMasks
from zsplg_ray.storage import Place
most_kb = lambda: Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
masks = CocoMasks(Place.parse(sys.argv[1]))
before_kb = most_kb()
masks.draw("a.jpg")
print(before_kb, most_kb())
"""


@settings(max_examples=60, deadline=None)
@given(st.text("0123PQ`ao_o\x00\u00ff", max_size=40), st.integers(1, 9), st.integers(1, 9))
def test_any_run_length_is_a_mask_or_refused(tmp_path_factory, text, height, width):
    folder = tmp_path_factory.getbasetemp()
    outline = {"size": [height, width], "counts": text}
    image = IMAGE | {"height": height, "width": width}
    masks = CocoMasks(
        Place.parse(coco(folder, annotations=[annotation(segmentation=outline)], images=[image]))
    )
    try:
        label_HW = masks.draw("a.jpg")
    except ValueError as e:
        assert "truth must be a COCO file" in str(e)
    else:
        assert label_HW.shape == (height, width) and set(np.unique(label_HW)) <= {0, 1}


# Classes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("a\nb", "a\x1b[31mb", "\u202eabc", "a\0b", "\ud800", "x" * 101, "a\x7f", "\ufeffa"),
        *("a\u200bb", "a\rb", "\tb" + "c" * 100_000),
    ],
)
def test_class_names_that_cannot_be(name):
    refused(ClassList.of, [name, "dog"], words="classes must be names")


def test_class_names_that_look_the_same():
    for one, other in (
        ("caf\u00e9", "cafe\u0301"),
        ("\uff43at", "cat"),
        ("STRASSE", "stra\u00dfe"),
    ):
        refused(ClassList.of, [one, other], words="unique names")


def test_class_names_that_are_merely_odd_stay_names():
    odd = ("<script>alert(1)</script>", "../../etc/passwd", "--out", "$\\oops{", "*", "a'b\"c")
    classes = ClassList.of(odd)
    assert ClassList.from_dict(json.loads(json.dumps(classes.to_dict()))) == classes


@pytest.mark.parametrize(
    "content",
    [
        *(b"\x00" * 100, b"\xff\xfe\x00", b"a\n" * 100_000, b"x" * (2**20 + 1), b"\x89PNG\r\n"),
        b"".join(b"c%d\n" % i for i in range(100_000)),
    ],
    ids=range(6),
)
def test_class_files_that_are_none(tmp_path, content):
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    refused(class_list, str(path), words="classes must be")


@pytest.mark.parametrize("spec", ["/dev/zero", "/dev/stdin", "a\0b", "c," * 100_000, "/" * 100_000])
def test_class_specs_that_are_none(spec):
    refused(class_list, spec, words="classes must be")


@pytest.mark.parametrize("data", [None, 1, "x", [], {"names": 1, "aliases": []}, {"names": "ab"}])
def test_class_lists_of_records(data):
    refused(ClassList.from_dict, data, words="class list as to_dict writes it")
    bad = {"names": ["background", 1], "aliases": [[], [1]]}
    refused(ClassList.from_dict, bad, words="class list as to_dict writes it")


# Settings -----------------------------------------------------------------------------------------

BILLION = b"a: &a [x,x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(9)
)
MERGED = b"a: &a {x: 1}\n" + b"".join(
    b"%c: &%c {<<: [%s]}\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10))
    for i in range(9)
)


@pytest.mark.parametrize(
    "content",
    [
        *(BILLION, MERGED, b"[" * 3000, b"a: &a [*a]", b"a: &a {b: *a}", b"x: " + b"9" * 5000),
        *(b"x: 2001-99-99", b"!!python/object/apply:os.system [ls]", b"x: !!python/name:os.system"),
        *(b"a: 1\na: 2", b"c: {x: 1, x: 2}", b"#" * (MAX_BYTES + 1), b"\xff\xfe\x00", b"? {a: 1}"),
        *(b"x: 59" + b":59" * 80_000, b"59" + b":59" * 80_000 + b".0: x", b"x: !!bool maybe"),
        *(b"x: !!int ''", b"x: !!timestamp soon", b"x: 0b_"),
    ],
    ids=range(20),
)
def test_yaml_that_is_none(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    refused(read_yaml, str(path), words="config must be")


def test_yaml_is_told_what_is_wrong_with_its_values(tmp_path):
    path = tmp_path / "c.yaml"
    for text, told in (
        ("a: 1\nx: 59" + ":59" * 80_000, "mend line 2 (a number of 240002 characters)"),
        ("x: 2001-99-99", "mend it (month must be in 1..12)"),
    ):
        path.write_text(text)
        assert refused(read_yaml, str(path)).endswith(told)
    path.write_text("x: 1:59\ny: " + "9" * 100 + "\nz: " + "word " * 100)
    assert read_yaml(str(path))["x"] == 119


@pytest.mark.parametrize("path", ["/dev/zero", "/dev", "a\0b", "x" * 10_000])
def test_yaml_that_is_no_file(path):
    refused(read_yaml, path, words="config must be")


def test_yaml_may_come_through_a_pipe():
    for content, found in ((b"seed: 5", {"seed": 5}), (b"#" * (MAX_BYTES + 2), None)):
        out, into = os.pipe()
        writing = threading.Thread(target=write_all, args=(into, content))
        writing.start()
        with os.fdopen(out, "rb"):
            if found is None:
                refused(read_yaml, f"/dev/fd/{out}", words="larger than")
            else:
                assert read_yaml(f"/dev/fd/{out}") == found
        writing.join()


def write_all(into: int, content: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), os.fdopen(into, "wb") as pipe:
        pipe.write(content)


@pytest.mark.parametrize(
    "value",
    [
        *(float("nan"), float("inf"), 10**400, 10**5000, -(10**400), [[1]], {1: 2}, "1e999"),
        *("9" * 5000, True),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("name", ["compose.min_similarity", "sam.points_per_side", "max_pixels"])
def test_values_that_no_setting_takes(name, value):
    given_ = {"images": "i", "classes": "cat,dog", "out": "o", name: value}
    refused(from_mapping, LabelConfig, given_, words=name)


def test_keys_that_are_no_texts():
    given_ = {"images": "i", "classes": "cat,dog", "out": "o", "compose": {1: 2}}
    refused(from_mapping, LabelConfig, given_, words="by name")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60) | st.text("a: &*[]{}-<>|\n'\"#!1e.", max_size=60).map(str.encode))
def test_any_bytes_are_settings_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    try:
        assert isinstance(read_yaml(str(path)), dict)
    except ValueError as e:
        assert str(e).startswith("config must be ") and str(e).isprintable()


# Names and addresses ------------------------------------------------------------------------------

NASTY = ("\x1b[2J", "a\nb", "\u202egpj.", "\x07", "\r\x1b]0;title\x07")


@pytest.mark.parametrize("text", NASTY)
def test_no_message_commands_a_terminal(text, capsys):
    assert complain("x", text, text, text).isprintable()
    assert len(complain("x", "y", text * 10_000_000, "z")) < 5000, "an id can have any length"
    record = logging.LogRecord("zsplg_ray", 20, "f", 1, "found %s", (text,), None)
    assert SafeFormatter("%(message)s").format(record).isprintable()
    for argv in ([text], ["label", text], ["label", "--config", text], ["label", f"--{text}"]):
        assert cli.main(argv) == 2
        told = capsys.readouterr().err
        assert told.rstrip("\n").isprintable() and told.count("\n") == 1


def test_ids_are_never_paths_that_are_written(tmp_path):
    """An id that climbs is read as the path it is, and stands in files named after hashes alone."""
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(b"secret")
    source = tmp_path / "in"
    source.mkdir()
    names = ["../outside.jpg", str(outside), "..\\outside.jpg", "a/../../outside.jpg"]
    images = [IMAGE | {"id": i, "file_name": name} for i, name in enumerate(names)]
    found = list_images(coco(source, images=images))
    assert sorted(found["image_id"].to_pylist()) == sorted(names)
    folder = RunFolder(str(tmp_path / "run"))
    for name in names:
        folder.write_part("errors", part_name_of(name), found, {})
    written = {p.relative_to(tmp_path).parts[:2] for p in tmp_path.rglob("*.parquet")}
    assert written == {("run", "errors")}


def part_name_of(image_id: str) -> str:
    from zsplg_ray.rundir import part_name

    name = part_name([image_id])
    assert name.removeprefix("part-").isalnum()
    return name


@pytest.mark.parametrize("length", [5000, 10_000_000])
def test_ids_of_any_length_are_refused(tmp_path, length):
    name = "x" * length + ".jpg"
    (tmp_path / "a.jpg").write_bytes(b"")
    images = [IMAGE, IMAGE | {"id": 2, "file_name": name}]
    refused(list_images, coco(tmp_path, images=images), words="ids of at most 4096")


@pytest.mark.parametrize("name", ["\ud800.jpg", "a\ud800.jpg"])
def test_ids_that_are_no_text_are_refused(tmp_path, name):
    (tmp_path / "a.jpg").write_bytes(b"")
    images = [IMAGE, IMAGE | {"id": 2, "file_name": name}]
    refused(list_images, coco(tmp_path, images=images), words="UTF-8")


def test_what_is_no_file_is_not_read(tmp_path):
    """Neither waits for ever nor fills the memory."""
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in ("/dev/zero", str(tmp_path / "pipe.jpg")):
        with pytest.raises(OSError, match="neither a file nor a folder"):
            read_bytes(path)
    with pytest.raises(ValueError, match="null byte"):
        read_bytes("/tmp/a\0b.jpg")


@pytest.mark.parametrize(
    "uri", ["http://169.254.169.254/latest", "ftp://host/a.jpg", "javascript://x", "gopher://x/y"]
)
def test_no_other_services_are_asked(uri):
    refused(read_bytes, uri, words="address must be")


def test_addresses_of_cells_that_are_not_there(tmp_path):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 and no more PAR1")
    for fragment in ("row=0", "row=0&column=x", "row=-1", "row=" + "9" * 5000, "", "row=1e3"):
        refused(read_bytes, f"parquet+file://{path}#{fragment}", words="uri must be")
