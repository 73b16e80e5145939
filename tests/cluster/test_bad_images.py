"""Twelve kinds of bad image among good ones, through the command line."""

import io
import json
import struct
import zlib

import pytest
from PIL import Image

from zsplg_ray import cli
from zsplg_ray.rundir import RunFolder
from zsplg_ray.shapes.scenes import make_scene

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


def encoded(kind: str, seed: int = 0, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_scene(seed, 64).image_HWC).save(buffer, kind, **options)
    return buffer.getvalue()


def huge_png(side: int) -> bytes:
    """A true header for side x side pixels and next to no data: a decompression bomb."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes(b ^ 0x5A for b in data[at : at + 200]) + data[at + 200 :]


BAD = {
    "empty.jpg": b"",
    "cut.jpg": encoded("JPEG")[:700],
    "cut.png": encoded("PNG")[:-2000],
    "cut.webp": encoded("WEBP")[:100],
    "cut.gif": encoded("GIF")[:40],
    "text.jpg": b"this is not an image\n" * 20,
    "page.png": b"<!doctype html><title>404</title>",
    "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "damaged.png": damaged(encoded("PNG"), 300),
    "zeros.bmp": encoded("BMP")[:54].ljust(60, b"\0"),
    "bomb.png": huge_png(30_000),
}
"""File name -> content; the twelfth kind is a file that vanishes between listing and reading."""


def test_twelve_bad_and_twenty_good(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        (images / f"good{i:02d}.jpg").write_bytes(encoded("JPEG", i))
    for name, data in BAD.items():
        (images / name).write_bytes(data)
    listed = [*sorted(p.name for p in images.iterdir()), "vanished.jpg"]
    split = tmp_path / "split.txt"
    split.write_text("\n".join(listed) + "\n")
    out = tmp_path / "run"
    command = ["label", "--images", str(split)]
    command += ["--root", str(images), "--classes", "shapes", "--out", str(out), "--json"]
    command += ["--sam", "shapes", "--clip", "shapes", "--sam.points-per-side", "4"]
    assert cli.main(command) == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert (counts["images"], counts["labelled"], counts["quarantined"]) == (32, 20, 12)
    folder = RunFolder(str(out))
    good, bad = folder.read("segments", ["image_id"]), folder.read("errors")
    assert good is not None and bad is not None
    assert sorted(good["image_id"].to_pylist()) == [f"good{i:02d}.jpg" for i in range(20)]
    errors = {row["image_id"]: row for row in bad.to_pylist()}
    assert set(errors) == {*BAD, "vanished.jpg"} and len(bad) == 12
    assert errors["vanished.jpg"]["stage"] == "read"
    assert "FileNotFoundError" in errors["vanished.jpg"]["error"]
    assert {errors[name]["stage"] for name in BAD} == {"decode"}
    assert (
        "200,000,000" in errors["bomb.png"]["error"] or "200000000" in errors["bomb.png"]["error"]
    )
    assert "900" in errors["bomb.png"]["error"]  # 900 megapixels
    for row in errors.values():
        assert row["error"] and "\n" not in row["error"]
