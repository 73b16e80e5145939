"""A run's folder: parts appear whole, names are stable, and repair makes every image stand once."""

import itertools
import json
import pickle
import tempfile
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsplg_ray.exactly_once import anti_join, forget_errors, part_ids, repair
from zsplg_ray.records import ERRORS, LABELS, encode_png, segments_schema
from zsplg_ray.rundir import KINDS, RunFolder, made_by, part_name

SCHEMAS = {"segments": segments_schema(4), "labels": LABELS, "errors": ERRORS}
META = {"fingerprint": "f", "classes": {"names": ["background", "chât"]}}


def table(kind, ids):
    """Rows that can be told apart: the uri comes from the id."""
    rows = [{"image_id": i, "uri": f"uri of {i}", "segments": [], "error": kind} for i in ids]
    return pa.Table.from_pylist(rows, schema=SCHEMAS[kind])


def put(folder, kind, ids, name=None):
    folder.write_part(kind, name or part_name(ids), table(kind, ids), META)
    return name or part_name(ids)


def ids_in(folder, kind):
    read = folder.read(kind, ["image_id", "uri"])
    rows = read.to_pylist() if read is not None else []
    assert all(row["uri"] == f"uri of {row['image_id']}" for row in rows)
    return [row["image_id"] for row in rows]


def contents(folder):
    """Every file of the folder with its bytes."""
    selector = pafs.FileSelector(folder.path, recursive=True, allow_not_found=True)
    files = [i.path for i in folder.fs.get_file_info(selector) if i.is_file]
    found = {}
    for path in files:
        with folder.fs.open_input_file(path) as stream:
            found[path] = stream.read()
    return found


# Repair ------------------------------------------------------------------------------------------


@dataclass
class Part:
    """What a writer left of one part when it was killed."""

    ids: list[str]
    segments: bool = True
    labels: bool = True
    torn: dict[str, float] = field(default_factory=dict)
    """Kind -> share of the file's bytes that reached the disk."""
    labels_short: bool = False
    """A repair was killed after it had mended labels and before segments."""


@dataclass
class Wreck:
    """What several killed writers left."""

    parts: list[Part]
    errors: list[list[str]]
    torn_errors: float | None
    retry: set[str]


def write(folder, wreck):
    for part in wreck.parts:
        name = part_name(part.ids)
        short = part.ids[1:] if part.labels_short and len(part.ids) > 1 else part.ids
        if part.labels:
            put(folder, "labels", short, name)
        if part.segments:
            put(folder, "segments", part.ids, name)
        for kind in part.torn:
            if getattr(part, kind):
                tear(folder, kind, name, part.torn[kind])
    for ids in wreck.errors:
        put(folder, "errors", ids)
    if wreck.errors and wreck.torn_errors is not None:
        tear(folder, "errors", part_name(wreck.errors[0]), wreck.torn_errors)


def tear(folder, kind, name, share):
    data = folder.read_bytes(f"{kind}/{name}.parquet")
    assert data is not None
    folder.write_bytes(f"{kind}/{name}.parquet", data[: int(share * len(data))])


def check_repair(folder, wreck):
    write(folder, wreck)
    forget_errors(folder, wreck.retry)
    found = repair(folder)
    whole = [p for p in wreck.parts if p.segments and "segments" not in p.torn]
    done = {i for part in whole for i in part.ids}
    whole_errors = wreck.errors if wreck.torn_errors is None else wreck.errors[1:]
    torn = wreck.errors[:1] if wreck.torn_errors is not None else []
    failed = {i for ids in whole_errors if ids not in torn for i in ids} - done - wreck.retry

    assert sorted(ids_in(folder, "segments")) == sorted(done) == sorted(found.done)
    assert sorted(ids_in(folder, "errors")) == sorted(failed) == sorted(found.failed)
    segments, labels = part_ids(folder, "segments"), part_ids(folder, "labels")
    assert all(segments.values()), "an empty part was kept"
    assert sorted(segments.keys() - labels.keys()) == found.unlabelled
    assert labels == {name: segments[name] for name in labels}
    ids_in(folder, "labels")
    kept = {kind: folder.parts(kind) for kind in KINDS}
    assert all(folder.part_meta(k, name) == META for k in KINDS for name in kept[k])

    for part in whole:  # labels that were whole are not made again without need
        alone = not any(set(part.ids) & set(p.ids) for p in whole if p is not part)
        if alone and part.labels and "labels" not in part.torn and not part.labels_short:
            assert part_name(part.ids) in labels

    before = contents(folder)
    again = repair(folder)
    assert contents(folder) == before
    assert (again.done, again.failed, again.unlabelled) == (
        found.done,
        found.failed,
        found.unlabelled,
    )


SHARES = st.sampled_from([0.0, 0.01, 0.5, 0.99])
IDS = st.lists(st.sampled_from(["a", "b", "c", "d/e.jpg", "ünï 猫", "x y"]), min_size=1, max_size=4)
WRECKS = st.builds(
    Wreck,
    parts=st.lists(
        st.builds(
            Part,
            ids=IDS,
            segments=st.sampled_from([True, True, False]),
            labels=st.sampled_from([True, True, False]),
            torn=st.dictionaries(st.sampled_from(["segments", "labels"]), SHARES, max_size=1),
            labels_short=st.sampled_from([False, False, True]),
        ),
        max_size=4,
        unique_by=lambda part: tuple(part.ids),
    ),
    errors=st.lists(IDS, max_size=3, unique_by=tuple),
    torn_errors=st.none() | SHARES,
    retry=st.sets(st.sampled_from("abc")),
)


@given(WRECKS)
@settings(max_examples=60, deadline=None)
def test_whatever_was_killed_every_image_stands_once_after_repair(wreck):
    with tempfile.TemporaryDirectory() as place:
        check_repair(RunFolder(f"{place}/run"), wreck)


@given(
    parts=st.lists(st.tuples(IDS, st.none() | SHARES), max_size=4, unique_by=lambda p: tuple(p[0])),
    errors=st.lists(IDS, max_size=2, unique_by=tuple),
)
@settings(max_examples=40, deadline=None)
def test_of_predictions_the_labels_are_the_commit(parts, errors):
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(f"{place}/run")
        check_predictions(folder, parts, errors)


def check_predictions(folder, parts, errors):
    for ids, torn in parts:
        name = put(folder, "labels", ids)
        if torn is not None:
            tear(folder, "labels", name, torn)
    for ids in errors:
        put(folder, "errors", ids)
    found = repair(folder, "predict")
    done = {i for ids, torn in parts if torn is None for i in ids}
    failed = {i for ids in errors for i in ids} - done
    assert sorted(ids_in(folder, "labels")) == sorted(done) == sorted(found.done)
    assert sorted(ids_in(folder, "errors")) == sorted(failed) == sorted(found.failed)
    assert found.unlabelled == []
    kept = {kind: folder.parts(kind) for kind in KINDS}
    assert all(folder.part_meta(k, name) == META for k in KINDS for name in kept[k])
    before = contents(folder)
    repair(folder, "predict")
    assert contents(folder) == before


def test_repair_of_an_empty_folder_writes_nothing(tmp_path):
    found = repair(RunFolder(str(tmp_path / "run")))
    assert (found.done, found.failed, found.unlabelled) == (set(), set(), [])
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_writers_go_and_what_others_put_there_stays(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path))
    put(folder, "labels", ["a"])
    put(folder, "segments", ["a"])
    ours = (tmp_path / "labels" / f"{part_name(['a'])}.parquet").read_bytes()
    with monkeypatch.context() as patch:  # killed between writing and renaming
        patch.setattr(Path, "replace", lambda self, target: None)
        put(folder, "segments", ["b"])
        put(folder, "errors", ["c"])
        folder.write_run({"killed": True})
    theirs = [
        "notes.txt",
        "labels/_SUCCESS",
        "labels/_notes.markdown",
        "labels/_labels.20240101",
        "labels/.hidden",
        "labels/part-00000-spark.c000.parquet",
        "segments/part-mine.parquet",
        "segments/sub/part-x.parquet",
        "errors/readme.parquet.txt",
    ]
    for name in theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(ours if name.endswith("parquet") else b"x")
    assert len(list(tmp_path.glob("**/_*"))) == 6
    found = repair(folder)
    assert found.done == {"a"} and not found.failed
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.glob("**/*") if p.is_file()}
    name = f"{part_name(['a'])}.parquet"
    assert left == {*theirs, f"labels/{name}", f"segments/{name}"}


def test_a_storage_that_fails_is_not_mistaken_for_a_torn_file(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path))
    name = put(folder, "segments", ["a"])

    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(RunFolder, "read_part", fail)
    with pytest.raises(OSError, match="Input/output"):
        repair(folder)
    assert folder.parts("segments") == [name]


# One file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", ["write", "rename"])
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, fails_at):
    folder = RunFolder(str(tmp_path))
    folder.write_bytes("file", b"old")

    def fail(*args):
        raise KeyboardInterrupt

    if fails_at == "rename":
        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            folder.write_bytes("file", b"new")
    else:
        with pytest.raises(TypeError):
            folder.write_bytes("file", object())  # type: ignore[arg-type]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def test_while_a_part_is_written_no_reader_sees_it(tmp_path, monkeypatch):
    seen = []
    rename = Path.replace

    def look(self, target):
        seen.append((RunFolder(str(tmp_path)).parts("labels"), self.name.startswith("_")))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", look)
    put(RunFolder(str(tmp_path)), "labels", ["a"])
    assert seen == [([], True)]
    assert RunFolder(str(tmp_path)).parts("labels") == [part_name(["a"])]


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "file").write_text("x")
    assert RunFolder(str(tmp_path)).read_bytes("none") is None
    assert RunFolder(str(tmp_path / "none")).read_run() is None
    assert RunFolder(str(tmp_path / "file")).read_run() is None
    folder = RunFolder(str(tmp_path))
    assert folder.read("labels") is None and folder.parts("errors") == []
    folder.delete_part("labels", "part-00000000000000000000")


def test_run_json_comes_back_and_is_for_people_too(tmp_path):
    folder = RunFolder(str(tmp_path))
    keys = ("config", "resolved", "classes", "weights", "labels_state")
    run: dict = {key: {"ü": [1, None, 0.1]} for key in keys} | {"labels_state": "complete"}
    folder.write_run(run)
    assert folder.read_run() == run
    assert "ü" in (tmp_path / "run.json").read_text(encoding="utf-8")
    assert made_by(run) == "label" and made_by({**run, "verb": "predict"}) == "predict"
    folder.write_run({**run, "verb": "predict"})
    with pytest.raises(ValueError, match=r"run must be a run with segments, .* `zsplg predict`;"):
        folder.label_settings()
    (tmp_path / "run.json").write_text("[1")
    with pytest.raises(ValueError, match=r"run\.json must be valid JSON, got .*; restore it"):
        folder.read_run()


def test_parts_carry_their_metadata_and_come_back_as_they_were(tmp_path):
    folder = RunFolder(str(tmp_path))
    png = encode_png(np.eye(3, dtype=np.uint8))
    row = {"image_id": "a", "uri": "u", "label_png": png, "class_px": [6, 3], "confidence": 0.5}
    written = pa.Table.from_pylist([row], schema=LABELS)
    folder.write_part("labels", part_name(["a"]), written, META)
    back = folder.read_part("labels", part_name(["a"]))
    assert back.schema.equals(LABELS, check_metadata=False)
    assert back.to_pylist() == written.to_pylist()
    assert folder.part_meta("labels", part_name(["a"])) == META
    assert json.loads((back.schema.metadata or {})[b"zsplg_ray"]) == META


def test_all_parts_read_as_one_table_though_their_metadata_differ(tmp_path):
    folder = RunFolder(str(tmp_path))
    for i, ids in enumerate((["a"], ["b", "c"])):
        folder.write_part("errors", part_name(ids), table("errors", ids), {"labels": i})
    assert sorted(ids_in(folder, "errors")) == ["a", "b", "c"]
    read = folder.read("errors", ["image_id"])
    assert read is not None and read.column_names == ["image_id"]


# Names and addresses -----------------------------------------------------------------------------


def test_a_part_is_named_after_its_ids_and_nothing_else():
    digest = sha256(b"a\0b\0").hexdigest()
    assert part_name(["a", "b"]) == part_name(iter(["a", "b"])) == f"part-{digest[:20]}"
    lists = [[], ["a"], ["b"], ["a", "b"], ["b", "a"], ["ab"], ["a", ""], ["", "a"], ["a\udcff"]]
    assert len({part_name(ids) for ids in lists}) == len(lists)


def test_anti_join_keeps_order_and_what_is_missing(tmp_path):
    manifest = pa.table({"image_id": ["c", "a", "b"], "uri": ["3", "1", "2"]})
    for n in range(4):
        for done in itertools.combinations(["a", "b", "c", "other"], n):
            left = anti_join(manifest, set(done))
            kept = [i for i in ["c", "a", "b"] if i not in done]
            assert left["image_id"].to_pylist() == kept
            assert left.schema == manifest.schema
    assert len(anti_join(manifest.slice(0, 0), {"a"})) == 0


def test_a_folder_can_be_sent_to_other_processes_and_keeps_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("run/")
    assert folder.path == str(tmp_path / "run")
    sent = pickle.loads(pickle.dumps(folder))
    sent.write_bytes("file", b"x")
    assert folder.read_bytes("file") == b"x" == (tmp_path / "run/file").read_bytes()
    assert RunFolder((tmp_path / "run").as_uri()).read_bytes("file") == b"x"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/run").path == str(tmp_path / "run")


def test_a_relative_folder_stays_where_it_was_when_a_worker_runs_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(RunFolder("run"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(sent).path == str(tmp_path / "run")


def test_an_address_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"address must be a path, .*, got nope://x; check it"):
        RunFolder("nope://x")


# An object store ---------------------------------------------------------------------------------


WRECK = Wreck(
    parts=[
        Part(["a", "b", "c"]),
        Part(["c", "d"]),
        Part(["d", "e", "e"], labels_short=True),
        Part(["a"]),
        Part(["f"], segments=False),
        Part(["g"], labels=False),
        Part(["h"], torn={"segments": 0.5}),
        Part(["k", "l"], torn={"labels": 0.9}),
    ],
    errors=[["i", "a"], ["i", "j", "j"], ["m"]],
    torn_errors=0.3,
    retry={"m"},
)
"""One of every kind."""


def test_repair_of_every_kind_of_wreck(tmp_path):
    check_repair(RunFolder(str(tmp_path)), WRECK)


def test_a_run_on_an_object_store(bucket):
    folder = RunFolder(bucket.uri("one"))
    assert not folder.local
    check_predictions(RunFolder(bucket.uri("two")), [(["a", "b"], None), (["b"], None)], [["a"]])
    assert folder.read_run() is None and folder.parts("labels") == []
    assert repair(folder).done == set()
    check_repair(pickle.loads(pickle.dumps(folder)), WRECK)
    folder.write_run(run := {key: {} for key in ("config", "resolved", "classes", "weights")})
    with pytest.raises(ValueError, match=r"run\.json must be a run's"):
        folder.read_run()
    folder.write_run({**run, "labels_state": "complete"})
    assert folder.read_run() == {**run, "labels_state": "complete"}
    folder.delete_part("labels", "part-00000000000000000000")
    assert RunFolder(bucket.uri("two")).parts("segments") == []
