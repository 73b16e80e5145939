"""Every kind of source, on disk and in an object store, down to the bytes behind each uri."""

import json
import os
import sys
from pathlib import Path
from urllib.parse import quote

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from zsplg_ray.sources import image_key, list_images, read_bytes

STRANGE = [
    "a b.jpg", "c#d.png", "50%.jpg", "100%25.jpg", "q?x=1.jpg", "ünï 猫.PNG", "new\nline.jpeg",
    "[x].webp", "it's+&;.jpg", "-dash.jpg", "two..dots.tif", "~home.gif",
]  # fmt: skip


def fill(folder, *names):
    """Files that hold their own name."""
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))
    return str(folder)


def listed(src, **options):
    table = list_images(src, **options)
    assert table.schema.names == ["image_id", "uri"]
    assert {str(t) for t in table.schema.types} == {"string"}
    ids = table["image_id"].to_pylist()
    assert ids == sorted(set(ids))
    return dict(zip(ids, table["uri"].to_pylist(), strict=True))


def contents(src, **options):
    return {i: read_bytes(uri).decode() for i, uri in listed(src, **options).items()}


def refused(words, src, **options):
    with pytest.raises(ValueError, match=r"^images must be .*, got .*; .*$") as caught:
        list_images(str(src), **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder(tmp_path, monkeypatch):
    names = ["a.jpg", "sub/B.JPEG", "sub/deep/c.Png"]
    fill(tmp_path / "imgs", *names, "notes.txt", ".hidden.jpg", ".git/x.jpg", "noext")
    src = str(tmp_path / "imgs")
    assert contents(src) == {name: name for name in names}
    assert listed(src)["a.jpg"] == str(tmp_path / "imgs" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    assert listed("imgs") == listed("imgs/") == listed(f"file://{src}") == listed(src)


def test_strange_names(tmp_path):
    names = [*STRANGE, "dir #1%/x y.jpg"]
    src = fill(tmp_path / "s p#c%20", *names)
    assert contents(src) == {name: name for name in names}
    assert contents("file://" + quote(src)) == {name: name for name in names}
    assert listed(src)["c#d.png"] == f"{src}/c#d.png"


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8 need Linux")
def test_name_that_is_no_text(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(b"x")
    refused("UTF-8", tmp_path)


def test_links(tmp_path):
    fill(tmp_path / "elsewhere", "x.jpg")
    fill(tmp_path / "imgs", "a.jpg", "sub/b.jpg")
    (tmp_path / "imgs/sub/up").symlink_to(tmp_path / "imgs")
    (tmp_path / "imgs/sub/self").symlink_to(tmp_path / "imgs/sub")
    (tmp_path / "imgs/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "imgs/broken.jpg").symlink_to(tmp_path / "nothing")
    assert list(listed(str(tmp_path / "imgs"))) == ["a.jpg", "more/x.jpg", "sub/b.jpg"]


def test_glob(tmp_path, monkeypatch):
    fill(tmp_path / "i", "a.jpg", "b.png", "n/c.jpg", "n/m/d.jpg", "n/m/e.JPG", "f.txt", ".h.jpg")
    src = str(tmp_path / "i")
    assert list(contents(f"{src}/**/*.jpg")) == ["a.jpg", "n/c.jpg", "n/m/d.jpg"]
    assert list(listed(f"{src}/*.jpg")) == ["a.jpg"]
    assert list(listed(f"{src}/*")) == ["a.jpg", "b.png"]
    assert list(listed(f"{src}/n/*/?.jpg")) == ["m/d.jpg"]
    assert list(listed(f"{src}/[!b].*")) == ["a.jpg"]
    assert list(listed(f"{src}/**")) == ["a.jpg", "b.png", "n/c.jpg", "n/m/d.jpg", "n/m/e.JPG"]
    assert listed(f"{src}/**/m/**/*.jpg") == {"n/m/d.jpg": f"{src}/n/m/d.jpg"}
    monkeypatch.chdir(src)
    assert list(listed("n/*.jpg")) == ["c.jpg"]
    assert listed("*.jpg") == {"a.jpg": f"{src}/a.jpg"}
    refused("none", f"{src}/*.webp")
    refused("there is no", f"{src}/nope/*.jpg")
    refused("none", f"{src}/n?m/d.jpg")


def test_brackets_in_a_folder_that_exists(tmp_path):
    assert list(listed(fill(tmp_path / "[old] imgs", "a.jpg"))) == ["a.jpg"]


def test_voc(tmp_path):
    fill(tmp_path, "JPEGImages/2007_1.jpg", "JPEGImages/2007.2.jpg", "SegmentationClass/2007_1.png")
    assert contents(str(tmp_path)) == {
        "2007_1": "JPEGImages/2007_1.jpg",
        "2007.2": "JPEGImages/2007.2.jpg",
    }
    fill(tmp_path, "JPEGImages/2007_1.png")
    refused("2007_1 more than once", tmp_path)


def test_single_image(tmp_path):
    fill(tmp_path, "a b.JPG")
    assert contents(str(tmp_path / "a b.JPG")) == {"a b.JPG": "a b.JPG"}


def test_split_file(tmp_path):
    fill(tmp_path / "data", "i/a.jpg", "i/b.jpg", "i/c d.jpg", "m/a.png")
    split = tmp_path / "split.txt"
    split.write_text("\ufeffi/b.jpg\n\ni/a.jpg m/a.png\r\ni/c d.jpg\tm/c d.png\n", "utf-8")
    root = str(tmp_path / "data")
    assert contents(str(split), root=root) == {n: n for n in ("i/a.jpg", "i/b.jpg", "i/c d.jpg")}
    assert contents(str(split), root=f"file://{root}")["i/a.jpg"] == "i/a.jpg"
    (tmp_path / "data/split.txt").write_text(f"i/a.jpg\n{root}/i/b.jpg\ni/gone.jpg\n")
    uris = listed(str(tmp_path / "data/split.txt"))
    assert read_bytes(uris["i/a.jpg"]) == b"i/a.jpg"
    assert read_bytes(uris[f"{root}/i/b.jpg"]) == b"i/b.jpg"
    with pytest.raises(FileNotFoundError):
        read_bytes(uris["i/gone.jpg"])
    refused("set root", split)
    refused("set root", split, root=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("line", ["a.jpg b.png c", "2007_000032", "my image.jpg", "a.jpg\tm"])
def test_malformed_split_line(tmp_path, line):
    fill(tmp_path, "a.jpg")
    (tmp_path / "s.txt").write_text(f"a.jpg\n\n{line}\n")
    refused(f"line 3 of {tmp_path}/s.txt", tmp_path / "s.txt")


def test_split_twice_or_empty_or_no_text(tmp_path):
    fill(tmp_path, "a.jpg")
    split = tmp_path / "s.txt"
    split.write_text("a.jpg\na.jpg\n")
    refused("a.jpg more than once", split)
    split.write_text("\n")
    refused("none", split)
    split.write_bytes(b"\xff\xfe\x00a")
    refused("text file", split)


def test_coco(tmp_path):
    fill(tmp_path / "train", "b.jpg", "a x.jpg")
    images = [{"id": 2, "file_name": "b.jpg"}, {"id": 1, "file_name": "a x.jpg"}]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images}))
    assert contents(str(path), root=str(tmp_path / "train")) == {
        "a x.jpg": "a x.jpg",
        "b.jpg": "b.jpg",
    }
    path.write_text(json.dumps({"images": images + images[:1]}))
    refused("b.jpg more than once", path, root=str(tmp_path / "train"))


@pytest.mark.parametrize(
    "text", ['{"images": [', "[]", "{}", '{"images": 3}', '{"images": [{"id": 1}]}', "[" * 100_000]
)
def test_malformed_json(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    refused("a COCO file", tmp_path / "c.json")


def test_parquet_with_uris(tmp_path):
    fill(tmp_path / "imgs", "a.jpg", "b#.jpg")
    columns = {"image_id": ["z", "a"], "uri": ["imgs/b#.jpg", f"{tmp_path}/imgs/a.jpg"]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert contents(str(tmp_path / "t.parquet")) == {"a": "a.jpg", "z": "b#.jpg"}
    with pytest.raises(FileNotFoundError):
        contents(str(tmp_path / "t.parquet"), root="/nowhere")


def test_parquet_with_bytes(tmp_path):
    folder = tmp_path / "pq #1%"
    folder.mkdir()
    for part in range(2):
        ids = [f"p{part}-{9 - row}" for row in range(10)]
        table = pa.table({"image_id": ids, "uri": ids, "bytes": [i.encode() for i in ids]})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=3)
    uris = listed(str(folder))
    assert len(uris) == 20
    assert uris["p0-0"] == f"parquet+file://{quote(str(folder))}/0.parquet#row=9"
    for image_id in sorted(uris, key=hash):
        assert read_bytes(uris[image_id]) == image_id.encode()
    assert listed(str(folder / "1.parquet")).keys() == {i for i in uris if i.startswith("p1")}
    assert listed(f"{folder}/*.parquet") == uris
    for wrong in ("row=10", "row=-1", "", "row=0&column=uri"):
        with pytest.raises(ValueError, match="uri must be"):
            read_bytes(uris["p0-0"].replace("row=9", wrong))
    table = pa.table({"image_id": [str(row) for row in range(10)], "bytes": [b"new"] * 10})
    pq.write_table(table, folder / "0.parquet")
    assert read_bytes(uris["p0-0"]) == b"new"
    (folder / "0.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        read_bytes(uris["p0-0"])


def test_parquet_refused(tmp_path):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 no")
    refused("a readable Parquet file", path)
    for columns, words in [
        ({"uri": ["a"]}, "its columns are uri"),
        ({"image_id": ["a"]}, "its columns are image_id"),
        ({"image_id": ["a", None], "uri": ["a", "b"]}, "row 1"),
        ({"image_id": ["a"], "uri": pa.array([None], pa.string())}, "row 0"),
        ({"image_id": ["a", "a"], "uri": ["a", "b"]}, "a more than once"),
        ({"image_id": pa.array([], pa.string()), "uri": []}, "none"),
    ]:
        pq.write_table(pa.table(columns), path)
        refused(words, path)


def test_missing_empty_unknown(tmp_path):
    refused("check the path", tmp_path / "nope")
    refused("check the path", tmp_path / "new\nline")
    refused(".jpg .jpeg", tmp_path)
    fill(tmp_path, "x.docx")
    refused("rename or convert", tmp_path / "x.docx")
    refused(".jpg .jpeg", tmp_path)
    with pytest.raises(ValueError, match="address must be"):
        list_images("nope://somewhere/imgs")
    with pytest.raises(FileNotFoundError):
        read_bytes(str(tmp_path / "gone.jpg"))


def test_folder_that_may_not_be_read(tmp_path, monkeypatch):
    fill(tmp_path, "sub/a.jpg")
    scandir = os.scandir

    def closed(folder):
        if Path(folder).name == "sub":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    refused(f"readable, got {tmp_path}/sub", tmp_path)


def test_key():
    assert [image_key(i) for i in ("a/b.JPG", "a.b", "x", ".jpg", "a.jpg.png")] == [
        "a/b", "a.b", "x", ".jpg", "a.jpg",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def bucket():
    """A fresh bucket: (its client, the options that its addresses need)."""
    keys = {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_EC2_METADATA_DISABLED": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in keys.items():
            patch.setenv(key, value)
        server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="bkt")
        yield client, f"?scheme=http&region=us-east-1&endpoint_override={host}:{port}"
        server.stop()


def test_s3(bucket, tmp_path):
    client, options = bucket
    strange = [name for name in STRANGE if "\n" not in name]  # moto cannot store those
    names = [*strange, "sub dir/x.jpg", "sub dir/.hidden/y.jpg", "sub dir/notes.txt"]
    for name in names:
        client.put_object(Bucket="bkt", Key=f"im gs/{name}", Body=name.encode())
    wanted = {name: name for name in (*strange, "sub dir/x.jpg")}
    assert contents(f"s3://bkt/im%20gs{options}") == wanted
    assert contents(f"s3://bkt/im gs/{options}") == wanted
    assert all(uri.endswith(options) for uri in listed(f"s3://bkt/im gs{options}").values())
    assert contents(f"s3://bkt/im gs/**/*.jpg{options}").keys() == {
        name for name in wanted if name.endswith(".jpg")
    }
    assert contents(f"s3://bkt/im gs/sub dir/x.jpg{options}") == {"x.jpg": "sub dir/x.jpg"}
    assert len(listed(f"s3://bkt{options}")) == len(wanted)
    refused("check the path", f"s3://bkt/nope{options}")
    refused("check the path", f"s3://nobucket/x{options}")
    uri = listed(f"s3://bkt/im gs{options}")["a b.jpg"]
    with pytest.raises(FileNotFoundError):
        read_bytes(uri.replace("a%20b", "gone"))


def test_lists_and_parquet_on_s3(bucket, tmp_path):
    client, options = bucket
    for name in ("i/a.jpg", "i/c d.jpg"):
        client.put_object(Bucket="bkt", Key=f"lists/{name}", Body=name.encode())
    client.put_object(Bucket="bkt", Key="lists/s.txt", Body=b"i/a.jpg\ni/c d.jpg\tm.png\n")
    client.put_object(
        Bucket="bkt",
        Key="lists/c.json",
        Body=json.dumps({"images": [{"file_name": "i/a.jpg"}]}).encode(),
    )
    assert contents(f"s3://bkt/lists/s.txt{options}") == {n: n for n in ("i/a.jpg", "i/c d.jpg")}
    assert contents(f"s3://bkt/lists/c.json{options}") == {"i/a.jpg": "i/a.jpg"}
    (tmp_path / "s.txt").write_text("a.jpg\n")
    root = f"s3://bkt/lists/i{options}"
    assert contents(str(tmp_path / "s.txt"), root=root) == {"a.jpg": "i/a.jpg"}
    pq.write_table(
        pa.table({"image_id": ["x", "y"], "bytes": [b"1", b"2"]}), tmp_path / "t.parquet"
    )
    client.upload_file(str(tmp_path / "t.parquet"), "bkt", "tables #/t.parquet")
    assert contents(f"s3://bkt/tables %23{options}") == {"x": "1", "y": "2"}


def test_voc_on_s3(bucket):
    client, options = bucket
    client.put_object(Bucket="bkt", Key="VOC/JPEGImages/1.jpg", Body=b"one")
    client.put_object(Bucket="bkt", Key="VOC/SegmentationClass/1.png", Body=b"mask")
    assert contents(f"s3://bkt/VOC{options}") == {"1": "one"}
