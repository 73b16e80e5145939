"""Parquet files and records of strangers: manifests, masks, parts of a run's folder, run.json."""

import io
import json
import re
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.s3 import bucket, faulty, s3_server  # noqa: F401 (fixtures)
from zsplg_ray import filesystems
from zsplg_ray.cluster.trainrun import CHECKPOINTS, put_models, start_of
from zsplg_ray.exactly_once import repair
from zsplg_ray.masks import open_truth
from zsplg_ray.parquet_texts import opened
from zsplg_ray.records import LABELS, encode_png
from zsplg_ray.rundir import RunFolder, part_name
from zsplg_ray.sources import list_images
from zsplg_ray.storage import Place, read_bytes
from zsplg_ray.student.zeroshot import find_labels, read_label
from zsplg_ray.views.evaluate import open_labels

LABEL = encode_png(np.zeros((2, 3), np.uint8))
ROWS = {"image_id": ["a", "b"], "uri": ["a.jpg", "b.jpg"], "label_png": [LABEL] * 2}


def refused(call, *args) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args)
    told = str(caught.value)
    assert told.isprintable() and len(told) < 5000 and " must be " in told, told[:300]
    return told


COLUMNS = [
    pa.array([["a"], ["b"]]),
    pa.array([{"x": "a"}, {"x": "b"}]),
    pa.array([b"\xff", b"b"]),
    pa.array(["a", None]),
    pa.array(["a", "a"]),
    pa.array(["a", "b" * 5000]),
    pa.array(["a", None]).dictionary_encode(),
    pa.array([["a", "b"], None]),
]


@pytest.mark.parametrize("column", COLUMNS, ids=range(len(COLUMNS)))
def test_ids_of_other_types(tmp_path, column):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({**ROWS, "image_id": column}), path)
    refused(list_images, str(path))
    refused(open_truth, str(path))


def test_a_dictionary_of_one_long_text_is_not_unpacked(tmp_path):
    """A file of some KB that stands for ids of 200 GB."""
    ids = pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int32()), ["x" * 1_000_000])
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image_id": ids, "uri": ids, "label_png": ids}), path)
    assert path.stat().st_size < 1_000_000
    assert "1000000 characters" in refused(list_images, str(path))
    assert "1000000 characters" in refused(open_truth, str(path))


@pytest.mark.parametrize("kind", ["bytes", "fixed", "list"])
def test_a_dictionary_of_anything_long_is_not_unpacked(tmp_path, kind):
    """It would be 20 MB; of a worse file, more than there is memory."""
    many, long = 200, b"x" * 100_000
    values = pa.array([long], pa.binary(len(long)) if kind == "fixed" else pa.binary())
    uris = pa.DictionaryArray.from_arrays(pa.array([0] * many, pa.int32()), values)
    if kind == "list":
        uris = pa.ListArray.from_arrays(range(many + 1), uris.dictionary_decode())
    elif kind == "fixed":
        uris = uris.dictionary_decode()
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image_id": [str(i) for i in range(many)], "uri": uris}), path)
    told = refused(list_images, str(path))
    assert ("100000 characters" if kind == "bytes" else "neither texts nor numbers") in told


def test_ids_of_bytes_and_numbers_are_texts(tmp_path):
    path = tmp_path / "t.parquet"
    for ids in (pa.array([b"5", b"6"]), pa.array([5, 6]), pa.array([5, 6], pa.decimal128(4, 0))):
        pq.write_table(pa.table({**ROWS, "image_id": ids}), path)
        assert list_images(str(path))["image_id"].to_pylist() == ["5", "6"]


def test_a_store_that_fails_is_not_taken_for_a_bad_file(bucket, faulty, monkeypatch):  # noqa: F811
    monkeypatch.setattr(filesystems, "PATIENCE_S", 0.0)
    pq.write_table(pa.table(ROWS), tmp := io.BytesIO())
    with bucket.fs.open_output_stream(f"{bucket.name}/t.parquet") as stream:
        stream.write(tmp.getvalue())
    with bucket.fs.open_output_stream(f"{bucket.name}/bad.parquet") as stream:
        stream.write(b"PAR1 and no more PAR1")
    with faulty() as proxy:
        assert len(list_images(bucket.uri("t.parquet", proxy))) == 2
        assert "a readable Parquet file" in refused(list_images, bucket.uri("bad.parquet", proxy))
        place = Place.parse(bucket.uri("t.parquet", proxy))
        proxy.answer = (403, "AccessDenied")
        told = pytest.raises(filesystems.StoreError, match="these credentials allow")
        with told as caught, opened(place, "images"):
            pass
    assert "write it again" not in str(caught.value)


@pytest.mark.parametrize(
    "meta",
    [
        *(b"\xff{", b"[]", b"[" * 100_000, b"{", b"null", b'{"classes": 1}', b'{"classes": {}}'),
        *(b'{"classes": {"names": ["background", 5], "aliases": [[], []]}}', b"9" * 5000),
    ],
    ids=range(9),
)
def test_metadata_that_is_none(tmp_path, meta):
    table = pa.table(ROWS).replace_schema_metadata({b"zsplg_ray": meta})
    pq.write_table(table, tmp_path / "t.parquet")
    refused(open_truth, str(tmp_path / "t.parquet"))
    part(tmp_path, table)
    refused(open_labels, str(tmp_path))
    refused(find_labels, str(tmp_path), ["a"])


def part(folder, table: pa.Table, kind: str = "labels") -> None:
    (folder / kind).mkdir(exist_ok=True)
    pq.write_table(table, folder / kind / f"{part_name(['a', 'b'])}.parquet")


def labels_table(**columns) -> pa.Table:
    rows = {"width": [3, 3], "height": [2, 2], "score_png": [LABEL] * 2, "class_px": [[6], [6]]}
    rows |= {"source": ["zeroshot"] * 2, "confidence": [0.5] * 2}
    return pa.table({**pa.table({**ROWS, **rows}, schema=LABELS).to_pydict(), **columns})


@pytest.mark.parametrize("name", ["image_id", "uri", "label_png", "width", "class_px"])
@pytest.mark.parametrize(
    "column", [[["a"], ["b"]], [{"x": 1}, None], [1.5, 2.5], None], ids=range(4)
)
def test_parts_of_other_types(tmp_path, name, column):
    table = (
        labels_table().drop_columns([name]) if column is None else labels_table(**{name: column})
    )
    part(tmp_path, table)
    folder = RunFolder(str(tmp_path))
    refused(lambda: folder.read_part("labels", folder.parts("labels")[0], LABELS.names))
    if name in ("image_id", "label_png"):
        refused(lambda: list(open_labels(str(tmp_path)).maps({"a", "b"})))
    if name == "image_id":
        refused(repair, folder, "predict")
        assert folder.parts("labels"), "what is not ours is not removed either"


@pytest.mark.parametrize("cell", [None, b"", b"GIF89a", LABEL[:40], "x"])
def test_label_cells_that_are_no_maps(tmp_path, cell):
    if cell != "x":
        part(tmp_path, labels_table(label_png=[cell, LABEL]))
        refused(lambda: list(open_labels(str(tmp_path)).maps({"a", "b"})))
        found = find_labels(str(tmp_path), ["a"])
        refused(lambda: read_label(str(found.label_uris[0]), str(found.score_uris[0])))
    pq.write_table(pa.table({**ROWS, "label_png": [cell, cell]}), tmp_path / "t.parquet")
    truth = open_truth(str(tmp_path / "t.parquet"))
    refused(truth.read, "a")


def test_label_and_score_of_other_sizes(tmp_path):
    part(tmp_path, labels_table(score_png=[encode_png(np.zeros((9, 9), np.uint8))] * 2))
    found = find_labels(str(tmp_path), ["a"])
    refused(lambda: read_label(str(found.label_uris[0]), str(found.score_uris[0])))


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_damage_to_a_file_is_a_list_or_refused(tmp_path, data):
    """Bytes changed anywhere, the footer above all, where sizes and counts of rows stand."""
    path = tmp_path / "t.parquet"
    pq.write_table(labels_table(), path, compression=data.draw(st.sampled_from(["none", "zstd"])))
    good = bytearray(path.read_bytes())
    footer = len(good) - 8 - struct.unpack("<I", good[-8:-4])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        low = data.draw(st.sampled_from([4, footer]))
        good[data.draw(st.integers(low, len(good) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.integers(0, 3)) == 0:
        del good[data.draw(st.integers(0, len(good))) :]
    path.write_bytes(good)
    for read in (list_images, open_truth):
        try:
            found = read(str(path))
        except ValueError as e:
            assert str(e).isprintable()
            continue
        if read is open_truth:
            for image_id in found.ids:
                one_cell(lambda truth=found, i=image_id: truth.read(i))
    one_cell(lambda: read_bytes(f"parquet+file://{path}#row=1&column=label_png"))


def one_cell(read) -> None:
    try:
        read()
    except (ValueError, OSError) as e:
        assert isinstance(e, ValueError) or str(e)


# Records ------------------------------------------------------------------------------------------

RUN = {"config": {}, "resolved": {}, "classes": {}, "weights": {}, "labels_state": "complete"}


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000, "{", "[]", "null", "9" * 5000, "\ud800", json.dumps({})),
        *(json.dumps(RUN | {name: [1]}) for name in ("config", "resolved", "classes", "weights")),
        *(json.dumps(RUN | {"verb": {}}), json.dumps(RUN | {"config": None})),
    ],
    ids=range(13),
)
def test_run_json_that_is_none(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(RunFolder(str(tmp_path)).read_run)
    refused(find_labels, str(tmp_path), ["a"])
    refused(open_labels, str(tmp_path))


@pytest.mark.parametrize(
    "name", ["../../elsewhere", "/etc", "a/step-1/../../..", "a\n/step-1", 5, None, "a/step-1/x"]
)
def test_checkpoints_are_those_of_the_folder(tmp_path, name):
    """train.json cannot send the reader, or the copy to best.pt, to another folder."""
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    for file in ("state.pt", "student.pt"):
        (outside / file).write_bytes(b"secret")
    folder = RunFolder(str(tmp_path / "run"))
    (tmp_path / "run" / CHECKPOINTS).mkdir(parents=True)
    run = {"last": {"checkpoint": name, "step": 1}, "best": {"step": 1}}
    refused(start_of, folder, run)
    refused(put_models, folder, run)
    assert not list((tmp_path / "run").glob("*.pt"))


def test_names_of_parts_and_files_tell_nothing_of_ids():
    for image_id in ("../../x", "a\0b", "\n", "x" * 10**6, "\ud800", "--flag", "*"):
        assert re.fullmatch(r"part-[0-9a-f]{20}", part_name([image_id]))
