"""Class lists and the palette."""

import json

import pytest

from zsplg_ray.vocab import SPECS, ClassList, class_list, palette

VOC_COLOURS = [
    (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128),
    (0, 128, 128), (128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0),
    (64, 0, 128), (192, 0, 128), (64, 128, 128), (192, 128, 128), (0, 64, 0), (128, 64, 0),
    (0, 192, 0), (128, 192, 0), (0, 64, 128), (128, 64, 128),
]  # fmt: skip


def test_palette_is_that_of_voc():
    colours = palette()
    assert len(colours) == 768
    assert list(zip(*[iter(colours[:66])] * 3, strict=True)) == VOC_COLOURS
    assert tuple(colours[-3:]) == (224, 224, 192)
    assert len(set(zip(*[iter(colours)] * 3, strict=True))) == 256


@pytest.mark.parametrize(
    ("spec", "n", "last"),
    [
        ("voc", 21, "tvmonitor"),
        ("coco", 81, "toothbrush"),
        ("cityscapes", 20, "bicycle"),
        ("ade20k", 151, "flag"),
        ("shapes", 9, "crescent"),
    ],
)
def test_known_lists(spec, n, last):
    classes = class_list(spec)
    assert len(classes) == n
    assert classes.names[0] == "background"
    assert classes.names[-1] == last
    assert classes.aliases[0] == ()
    assert all(a[0] == name for name, a in zip(classes.names[1:], classes.aliases[1:], strict=True))
    assert ClassList.from_dict(json.loads(json.dumps(classes.to_dict()))) == classes


def test_known_lists_have_their_usual_indices():
    assert class_list("voc").index("person") == 15
    assert class_list("voc").index("airplane") == 1
    assert class_list("VOC").index("TV monitor") == 20
    assert class_list("coco").names[1:4] == ("person", "bicycle", "car")
    assert class_list("coco").index("dining table") == 61
    assert class_list("cityscapes").index("sky") == 11
    assert class_list("ade20k").names[1:6] == ("wall", "building", "sky", "floor", "tree")
    assert class_list("ade20k").index("television") == 90
    from zsplg_ray.shapes.scenes import CLASSES

    assert class_list("shapes").names[1:] == CLASSES


def test_names_with_commas():
    assert class_list("cat, dog").names == ("background", "cat", "dog")
    assert class_list("background,cat").names == ("background", "cat")
    assert class_list("traffic cone").names == ("background", "traffic cone")
    assert class_list("background,vox").names == ("background", "vox")


def test_text_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("# mine\nbackground\n\ncat: kitten,  tabby \r\ndog  # woof\nöl\n", "utf-8-sig")
    classes = class_list(str(path))
    assert classes.names == ("background", "cat", "dog", "öl")
    assert classes.aliases == ((), ("cat", "kitten", "tabby"), ("dog",), ("öl",))
    assert classes.index("Tabby") == 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("vox", "did you mean voc"),
        ("cityscape", "did you mean cityscapes"),
        ("", "not empty"),
        ("cat,,dog", "not empty"),
        ("cat,Cat", "unique"),
        ("cat,background", "background first"),
        ("background", "at least one class"),
        ("c" * 101 + ",d", "at most 100 characters"),
        ("ca\nt,dog", "printable"),
        ("ca\x07t", "printable"),
        ("a\0b", "printable"),
        ("cat: kitten,dog", "without a colon"),
        ("nope.names", "a file that exists"),
        ("some/where", "a file that exists"),
        (",".join(f"c{i}" for i in range(255)), "at most 254"),
    ],
)
def test_refused(spec, words):
    with pytest.raises(ValueError, match=r"^classes must be .*, got .*; .*$") as caught:
        class_list(spec)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_most_classes_fit():
    assert len(class_list(",".join(f"c{i}" for i in range(254)))) == 255


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(ValueError, match=r"did you mean .*/classes\.txt\?"):
        class_list(str(tmp_path / "clases.txt"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat\n: kitten\n", "line 2"),
        ("cat\nbackground\n", "line 2"),
        ("cat: dog\ndog\n", "unique"),
        ("cat: kitten,,tabby\n", "not empty"),
        ("# nothing\n", "at least one class"),
    ],
)
def test_bad_text_file(tmp_path, text, words):
    (tmp_path / "c.txt").write_text(text)
    with pytest.raises(ValueError, match="classes must be") as caught:
        class_list(str(tmp_path / "c.txt"))
    assert words in str(caught.value)


def test_file_that_is_no_text(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        class_list(str(tmp_path / "c.txt"))


def test_bad_dicts():
    for data in ({}, {"names": ["background", "a"]}, {"names": 3, "aliases": []}):
        with pytest.raises(ValueError, match="classes must be"):
            ClassList.from_dict(data)
    with pytest.raises(ValueError, match="background"):
        ClassList(("cat",), (("cat",),))
    with pytest.raises(ValueError, match="the nearest is 'cat'"):
        ClassList.of(["cat", "dog"]).index("cap")


def test_every_spec_is_listed():
    assert SPECS == ("voc", "coco", "cityscapes", "ade20k", "shapes")
