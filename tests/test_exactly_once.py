"""The index of parts: with it, after any crash, the same stands in the folder as without it."""

import os
import shutil
import tempfile
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_rundir import IDS, META, SHARES, WRECK, WRECKS, check_repair, contents, put, tear
from tests.test_rundir import write as write_wreck
from zsplg_ray import part_index
from zsplg_ray.exactly_once import forget_errors, part_ids, repair
from zsplg_ray.part_index import NAME, SCHEMA, PartIndex, Written
from zsplg_ray.rundir import Kind, RunFolder, Stamp, part_name

BOTH: tuple[Kind, ...] = ("labels", "segments")


@pytest.fixture(autouse=True, scope="module")
def always_worth_it():
    """Small folders get an index too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_index, "WORTH", 1)
        yield


def age(folder, seconds=3600):
    """As if the parts had been written long ago."""
    for path in Path(folder.path).glob("*/*.parquet"):
        status = path.stat()
        past = status.st_mtime_ns - seconds * 10**9
        os.utime(path, ns=(past, past))


def indexed(folder, parts, errors=()):
    """Whole parts, of which an index tells; but for the newest one, which has not settled."""
    for ids in parts:
        put(folder, "labels", ids)
        put(folder, "segments", ids)
    for ids in errors:
        put(folder, "errors", ids)
    age(folder)
    put(folder, "labels", newest := ["the newest"])
    put(folder, "segments", newest)
    return repair(folder)


def without_index(place):
    """Contents of a folder's files by their path in it, but for the index."""
    found = contents(RunFolder(str(place)))
    return {path[len(str(place)) :]: data for path, data in found.items() if NAME not in path}


def test_errors_parts_are_removed_many_at_a_time(tmp_path, monkeypatch):
    """There is one for each image that failed, and an object store takes its time for each."""
    folder, together = RunFolder(str(tmp_path)), threading.Barrier(8)
    for n in range(8):
        put(folder, "errors", [f"{n}"])
    delete_part = RunFolder.delete_part

    def waiting(self, kind, name):
        together.wait(timeout=30)
        delete_part(self, kind, name)

    monkeypatch.setattr(RunFolder, "delete_part", waiting)
    forget_errors(folder, [f"{n}" for n in range(8)])
    assert not folder.parts("errors")


def test_a_torn_part_is_told_of_on_one_line(tmp_path, monkeypatch, caplog):
    def torn(self, kind, name, columns=None):
        raise pa.ArrowInvalid("no Parquet\nat all")

    folder = RunFolder(str(tmp_path))
    put(folder, "segments", ["a"])
    monkeypatch.setattr(RunFolder, "read_part", torn)
    assert repair(folder).done == set()
    (record,) = caplog.records
    assert "is not readable" in record.getMessage() and record.getMessage().isprintable()


# What it saves ------------------------------------------------------------------------------------


def test_a_finished_run_is_resumed_without_reading_its_parts(tmp_path, reads):
    folder = RunFolder(str(tmp_path))
    parts = [[f"{n}/{i}" for i in range(16)] for n in range(20)]
    first = indexed(folder, parts, errors=[["x"], ["y", "z"]])
    reads.clear()
    again = repair(folder)
    newest = part_name(["the newest"])
    assert sorted(reads) == [("labels", newest), ("segments", newest)]
    assert again == first
    assert again.done == {i for ids in parts for i in ids} | {"the newest"}
    assert again.failed == {"x", "y", "z"}


def test_parts_that_their_writer_told_of_are_not_read(tmp_path, reads):
    folder, index = RunFolder(str(tmp_path)), PartIndex()
    name = put(folder, "labels", ["a", "b"])
    put(folder, "segments", ["a", "b"])
    sizes = {kind: folder.listing(kind)[name].size for kind in BOTH}
    index.tell(Written(kind, name, sizes[kind], ["a", "b"]) for kind in BOTH)
    assert repair(folder, "label", index).done == {"a", "b"} and not reads

    lying = PartIndex()  # a writer whose bytes did not all get there
    lying.tell(Written(kind, name, sizes[kind] + 1, ["a", "b"]) for kind in BOTH)
    assert repair(folder, "label", lying).done == {"a", "b"}
    assert sorted(reads) == [("labels", name), ("segments", name)]


def test_what_was_told_of_is_saved_once_it_is_seen(tmp_path, reads):
    folder, index = RunFolder(str(tmp_path)), PartIndex()
    name = put(folder, "segments", ["a"])
    put(folder, "labels", ["a"])
    age(folder)
    put(folder, "labels", ["b"])  # newer, so that the others have settled
    for kind in BOTH:
        index.tell([Written(kind, name, folder.listing(kind)[name].size, ["a"])])
    index.tell([Written("labels", part_name(["b"]), 0, ["b"])])
    index.tell([Written("segments", part_name(["gone"]), 9, ["gone"])])
    index.save(folder, look=True)
    rows = pq.read_table(tmp_path / NAME).to_pylist()
    assert [row["name"] for row in rows] == [name]
    assert PartIndex.load(folder).match("labels", folder.listing("labels")) == {name: ["a"]}
    assert not reads


def test_a_part_that_has_just_changed_is_not_saved(tmp_path):
    """Where storage tells time in seconds, a change a moment later would not show."""
    folder = RunFolder(str(tmp_path))
    put(folder, "segments", ["a"])
    put(folder, "labels", ["a"])
    repair(folder)
    assert pq.read_table(tmp_path / NAME).num_rows == 0
    age(folder, seconds=4)
    put(folder, "errors", ["b"])
    repair(folder)
    assert pq.read_table(tmp_path / NAME)["image_ids"].to_pylist() == [["a"]]


def test_few_parts_are_not_worth_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(part_index, "WORTH", 5)
    folder = RunFolder(str(tmp_path))
    indexed(folder, [["a"]])
    assert not (tmp_path / NAME).exists()
    put(folder, "errors", ["e"])
    repair(folder)
    assert (tmp_path / NAME).exists()


def test_errors_that_are_dropped_are_known_from_the_index(tmp_path, reads):
    folder = RunFolder(str(tmp_path))
    indexed(folder, [], errors=[["x"], ["y", "z"], ["w"]])
    reads.clear()
    forget_errors(folder, {"x", "y"})
    assert reads == [("errors", part_name(["y", "z"]))], "only to keep its other row"
    assert repair(folder).failed == {"z", "w"}


# What it never does -------------------------------------------------------------------------------

BEFORE = st.lists(IDS, max_size=3, unique_by=tuple)


@given(before=BEFORE, errors=BEFORE, wreck=WRECKS)
@settings(max_examples=40, deadline=None)
def test_a_crash_after_an_index_is_mended_as_without_one(before, errors, wreck):
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(f"{place}/run")
        indexed(folder, before, errors)
        assert Path(folder.path, NAME).exists()
        write_wreck(folder, wreck)
        plain = RunFolder(f"{place}/plain")
        shutil.copytree(folder.path, plain.path)
        Path(plain.path, NAME).unlink()

        assert repair(folder) == repair(plain, "label", PartIndex())
        assert without_index(folder.path) == without_index(plain.path)
        stamps = folder.listing("segments")
        for name, ids in PartIndex.load(folder).match("segments", stamps).items():
            assert part_ids(folder, "segments")[name] == ids


@given(before=BEFORE, changes=st.lists(st.sampled_from(["torn", "gone", "short"]), max_size=3))
@settings(max_examples=40, deadline=None)
def test_parts_that_went_or_changed_since_are_noticed(before, changes):
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(f"{place}/run")
        indexed(folder, before)
        for ids, change in zip(before, changes, strict=False):
            name = part_name(ids)
            if name not in folder.parts("segments"):
                continue  # all its images stood in others too
            if change == "torn":
                tear(folder, "segments", name, 0.7)
            elif change == "gone":
                folder.delete_part("segments", name)
            else:
                put(folder, "segments", ids[1:] or ["another"], name)
        plain = RunFolder(f"{place}/plain")
        shutil.copytree(folder.path, plain.path)
        assert repair(folder) == repair(plain, "label", PartIndex())
        assert without_index(folder.path) == without_index(plain.path)


@given(at=st.floats(0, 1), how=st.sampled_from(["cut", "flip", "empty"]), share=SHARES)
@settings(max_examples=40, deadline=None)
def test_a_broken_index_is_as_good_as_none(at, how, share):
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(f"{place}/run")
        first = indexed(folder, [["a", "b"], ["c"]], [["e"]])
        path = Path(folder.path, NAME)
        data = bytearray(path.read_bytes())
        if how == "flip":
            data[int(at * (len(data) - 1))] ^= 0xFF
        path.write_bytes(data[: int(share * len(data))] if how == "cut" else data)
        if how == "empty":
            path.write_bytes(b"")
        assert repair(folder) == first


def row(name, ids, size, mtime_ns):
    stamps = {f"segments_{k}": v for k, v in (("size", size), ("mtime_ns", mtime_ns))}
    return {"name": name, "image_ids": ids, **stamps}


def test_an_index_that_lies_is_not_believed(tmp_path):
    folder = RunFolder(str(tmp_path))
    name = put(folder, "segments", ["a", "b"])
    stamp = folder.listing("segments")[name]
    lies = [
        row(name, ["a", "b", "c"], *stamp),  # more than its name says
        row(name, ["b", "a"], *stamp),
        row(name, [None], *stamp),
        row(name, None, *stamp),
        row(None, ["a"], *stamp),
        row(part_name(["z"]), ["z"], *stamp),  # a part that is not there
        row(name, ["a", "b"], stamp.size - 1, stamp.mtime_ns),
        row(name, ["a", "b"], stamp.size, None),
    ]
    for lie in lies:
        pq.write_table(pa.Table.from_pylist([lie], schema=SCHEMA), tmp_path / NAME)
        assert not PartIndex.load(folder).match("segments", folder.listing("segments")), lie
    pq.write_table(pa.table({"name": [name]}), tmp_path / NAME)  # of another version
    assert not PartIndex.load(folder).match("segments", folder.listing("segments"))
    true = row(name, ["a", "b"], *stamp)
    pq.write_table(pa.Table.from_pylist([true], schema=SCHEMA), tmp_path / NAME)
    assert PartIndex.load(folder).match("segments", folder.listing("segments")) == {
        name: ["a", "b"]
    }


def test_a_storage_that_tells_no_time_is_read_each_time():
    index, name = PartIndex(), part_name(["a"])
    index.note("labels", name, Stamp(5, None), ["a"])
    assert index.match("labels", {name: Stamp(5, None)}) == {}
    assert index.match("labels", {name: Stamp(5, 1)}) == {name: ["a"]}


def test_killed_while_the_index_is_written(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path))
    with monkeypatch.context() as patch:  # killed between writing and renaming
        patch.setattr(part_index.PartIndex, "save", lambda self, folder: None)
        first = indexed(folder, [["a"]])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda self, target: None)
        folder.write_bytes(NAME, b"half")
    assert len(list(tmp_path.glob("__index*"))) == 1 and not (tmp_path / NAME).exists()
    assert repair(folder) == first
    assert not list(tmp_path.glob("__index*")) and (tmp_path / NAME).exists()


def test_an_index_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path))
    put(folder, "labels", ["a"])
    put(folder, "segments", ["a"])

    def full(self, name, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "write_bytes", full)
    assert repair(folder).done == {"a"}


def test_every_kind_of_wreck_on_top_of_an_index(tmp_path):
    folder = RunFolder(str(tmp_path))
    write_wreck(folder, WRECK)
    repair(folder)
    age(folder)
    put(folder, "errors", ["the newest"])
    repair(folder)
    assert pq.read_table(tmp_path / NAME).num_rows > 0
    shutil.rmtree(tmp_path / "errors")
    for kind in BOTH:
        for name in folder.parts(kind):
            folder.delete_part(kind, name)
    check_repair(folder, WRECK)
    assert all(folder.part_meta("labels", name) == META for name in folder.parts("labels"))


def test_in_an_object_store_a_finished_run_is_listed_and_not_read(bucket, faulty, monkeypatch):
    monkeypatch.setattr(part_index, "SETTLED_NS", -1)  # the newest parts count too
    folder = RunFolder(bucket.uri("run"))
    parts = [[f"{n}/{i}" for i in range(4)] for n in range(10)]
    for ids in parts:
        put(folder, "labels", ids)
        put(folder, "segments", ids)
    first = repair(folder)
    with faulty(share=0, seed=0) as proxy:
        assert repair(RunFolder(bucket.uri("run", proxy))) == first
    with faulty(share=0, seed=0) as plain:
        assert repair(RunFolder(bucket.uri("run", plain)), "label", PartIndex()) == first
    assert first.done == {i for ids in parts for i in ids}
    assert proxy.asked["GetObject"] == 1, "the index alone"
    assert sum(proxy.asked.values()) < 20
    assert plain.asked["GetObject"] >= 2 * len(parts)
