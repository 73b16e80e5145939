"""Names of files: safe, unique, and those of the ids where these are harmless."""

import pytest

from tests.views.export.runs import HOSTILE
from zsplg_ray.views.export.names import MAX_PART_BYTES, file_names, in_val


def test_harmless_ids_keep_their_folders_and_names():
    ids = ["a.jpg", "2007_000032", "deep/er/b c.png", "été/猫.webp", "x.tar.gz", "-a(1)~.jpg"]
    names = ["a", "2007_000032", "deep/er/b c", "été/猫", "x.tar.gz", "-a(1)~"]
    assert file_names(ids) == names


@pytest.mark.parametrize(
    "image_id",
    [
        *HOSTILE,
        *("", ".", "..", "a/../../b.jpg", "//x", "a//b", ".hidden.jpg", "C:\\x.jpg", "a/ b.jpg"),
        *("a\0b", "a\u202eb.jpg", "nul/b.jpg", "é" * 200, "/".join("abcdefghij"), "~/x\n", "a."),
    ],
)
def test_any_other_id_becomes_a_path_below(image_id):
    (name,) = file_names([image_id])
    for part in name.split("/"):
        assert part and part.isprintable() and part[0] not in ". " and part[-1] not in ". "
        assert len(part.encode()) <= MAX_PART_BYTES + 15
        assert not set(part) & set('<>:"|?*\\') and part.partition(".")[0].lower() != "nul"
    assert file_names([image_id]) == [name], "another name another time"


def test_ids_whose_files_would_meet_get_names_of_their_own():
    ids = ["a.jpg", "a.png", "A.jpg", "a", "b/c.jpg", "B/C.png", "x:y.jpg", "x?y.jpg", "x_y.jpg"]
    names = file_names(ids)
    assert names[0] == "a" and names[4] == "b/c" and names[8] == "x_y"
    assert len({name.casefold() for name in names}) == len(ids)


def test_no_image_is_called_like_a_folder_of_others():
    assert file_names(["a.jpg", "a.jpg/b.jpg"])[1].startswith("a.jpg_/b-")


def test_folders_that_a_format_reads_as_its_own_are_renamed():
    plain, hostile = file_names(["images.jpg", "images/a.jpg"], {"images"})
    assert plain == "images" and hostile.startswith("images_/a-")


def test_the_validation_split_depends_on_the_id_alone():
    ids = [f"{i}.jpg" for i in range(2000)]
    chosen = {i for i in ids if in_val(i, 0.2)}
    assert 300 < len(chosen) < 500
    assert chosen == {i for i in reversed(ids) if in_val(i, 0.2)}
    assert chosen < {i for i in ids if in_val(i, 0.5)}
    assert not any(in_val(i, None) or in_val(i, 0.0) for i in ids)
    assert all(in_val(i, 1.0) for i in ids)
