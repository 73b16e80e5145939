"""Images, label maps and masks whose bytes mean no good: refused in one line, in bounded memory."""

import io
import struct
import time
import zlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from zsplg_ray.images import MOST_PX, ImageError, decode_image, decode_indices, image_size
from zsplg_ray.label.pooling import pooling_weights
from zsplg_ray.label.regions import Regions, cut
from zsplg_ray.label.segments import Segments, encode_mask, rle_runs
from zsplg_ray.records import decode_png, encode_png, segments_schema
from zsplg_ray.views.figures import class_shares, iou_bars


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG of zeros, as few bytes as may be, whose header says what it is told to."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(bytes(min((width + 1) * height, 10_000)))
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", head),
            *more,
            chunk(b"IDAT", body),
            chunk(b"IEND", b""),
        ]
    )


def saved(form: str, size=(8, 8), **options) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, form, **options)
    return out.getvalue()


def refused(read, data, words: str = "", **options) -> None:
    began = time.monotonic()
    with pytest.raises(ImageError) as caught:
        read(data, **options)
    assert time.monotonic() - began < 5
    assert words in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("side", [100_000, 2**31 - 1])
def test_headers_that_promise_too_many_pixels(side):
    for read in (decode_image, image_size, decode_png, decode_indices):
        refused(read, png(side, side), words="px" if side == 100_000 else "")
    refused(decode_image, png(side, side), max_px=2**62)  # whatever a setting allows
    assert side**2 > MOST_PX


@pytest.mark.parametrize("form", ["BMP", "GIF", "TIFF", "PPM", "WEBP", "JPEG"])
def test_other_formats_with_huge_sizes(form):
    data = bytearray(saved(form, (16, 16)))
    at = {"BMP": 18, "GIF": 6, "PPM": 3}.get(form)
    if form == "PPM":
        data = bytearray(b"P6 99999 99999 255\n") + data[13:]
    elif form == "JPEG":
        at = bytes(data).index(b"\xff\xc0") + 5
        data[at : at + 4] = b"\xff\xff\xff\xff"
    elif form == "TIFF":
        for tag in (256, 257):  # width and height, as 16 bits and as 32
            new = struct.pack("<HHII", tag, 4, 1, 10**6)
            for kind, value in ((3, struct.pack("<HH", 16, 0)), (4, struct.pack("<I", 16))):
                old = struct.pack("<HHI", tag, kind, 1) + value
                data = bytearray(bytes(data).replace(old, new))
    elif form == "WEBP":
        return refused(decode_image, bytes(data[:40]))
    else:
        assert at is not None
        data[at : at + 4] = b"\xff\xff\xff\x7f" if form == "BMP" else b"\xff\xff\xff\xff"
    refused(decode_image, bytes(data))


def test_chunks_that_unpack_to_much():
    bomb = zlib.compress(bytes(300_000_000), 9)
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        data = png(4, 4, chunk(kind, head + bomb))
        try:
            assert decode_image(data).shape == (4, 4, 3), "the chunk may be left alone"
        except ImageError as e:
            assert "Decompressed data too large" in str(e)


def test_a_text_that_is_only_long_does_no_harm():
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 1000, zip=True)
    out = io.BytesIO()
    Image.new("L", (3, 2)).save(out, "PNG", pnginfo=info)
    assert decode_indices(out.getvalue()).shape == (2, 3)


def test_a_jpeg_of_many_scans():
    """Each scan goes over all pixels: some KB could be an hour's work."""
    data = saved("JPEG", (64, 64), progressive=True)
    last = data.rindex(b"\xff\xda")
    refused(decode_image, data[:-2] + data[last:-2] * 200 + data[-2:], words="scans")
    assert decode_image(data).shape == (64, 64, 3)
    # As the first of several in one file it is no less a bomb.
    several = io.BytesIO()
    more = Image.new("RGB", (8, 8))
    more.save(several, "MPO", save_all=True, append_images=[more])
    at = several.getvalue().index(b"\xff\xe2")
    index = several.getvalue()[at : at + 2 + several.getvalue()[at + 3]]
    assert index[4:8] == b"MPF\0"
    bomb = data[:2] + index + data[2:-2] + data[last:-2] * 200 + data[-2:]
    assert Image.open(io.BytesIO(bomb)).format == "MPO"
    refused(decode_image, bomb, words="scans, got 2")
    # Between the scans there may be other blocks, and fill bytes before a marker.
    other = b"\xff\xfe\x00\x04\xff\xd9" + b"\xff" * 3
    refused(decode_image, data[:-2] + (other + data[last:-2]) * 200, words="scans, got 2")


def test_what_a_jpeg_carries_along_is_not_counted():
    """A camera's film or raw data behind the end, a preview inside a block."""
    data, scans = saved("JPEG", (64, 64)), b"\xff\xda" * 200
    block = b"\xff\xef" + struct.pack(">H", 2 + len(scans)) + scans
    noise = np.random.default_rng(0).bytes(20 * 2**20)
    assert noise.count(b"\xff\xda") > 100
    for whole in (data + scans, data + noise, data[:2] + block + data[2:]):
        assert decode_image(whole).shape == (64, 64, 3) and image_size(whole) == (64, 64)


def test_only_the_first_frame_of_many_is_read():
    frames = [Image.new("L", (64, 64), i) for i in range(200)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    began = time.monotonic()
    assert decode_image(out.getvalue()).shape == (64, 64, 3)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "data",
    [
        *(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg xmlns='x'/>", b"%PDF-1.4\n"),
        *(b"\x00\x00\x01\x00\x01\x00", b"SIMPLE  = T", b"8BPS\x00\x01", b"\xd7\xcd\xc6\x9a"),
        *(b"\x89HDF\r\n\x1a\n", b"GIF89a", b"II*\x00", b"\xff\xd8\xff", b"\x00" * 100, b"icns"),
    ],
    ids=range(13),
)
def test_other_kinds_of_files_are_not_tried(data):
    refused(decode_image, data + b"\x00" * 200)
    refused(decode_png, data, words="a PNG")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_damage_to_a_picture_is_a_picture_or_refused(data):
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000"]))
    good = bytearray(saved(form))
    for _ in range(data.draw(st.integers(0, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    del good[data.draw(st.integers(1, len(good))) :]
    try:
        image_HWC = decode_image(bytes(good), max_px=10**6)
    except ImageError as e:
        assert str(e).isprintable()
    else:
        assert image_HWC.ndim == 3 and image_HWC.dtype == np.uint8


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_damage_to_a_label_is_a_map_or_refused(data):
    good = bytearray(encode_png(np.arange(30, dtype=np.uint8).reshape(5, 6)))
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        label_HW = decode_png(bytes(good))
    except ValueError as e:
        assert str(e).isprintable()
    else:
        assert label_HW.ndim == 2 and label_HW.dtype == np.uint8


# Run lengths --------------------------------------------------------------------------------------


def written(counts: list[int]) -> bytes:
    """COCO's compressed form of any counts, sums that wrap too."""
    out = bytearray()
    for i, count in enumerate(counts):
        x = count - (counts[i - 2] if i > 2 else 0)
        while True:
            group = x & 31
            x >>= 5
            more = x != (-1 if group & 16 else 0)
            out.append((group | (32 if more else 0)) + 48)
            if not more:
                break
    return bytes(out)


def test_counts_are_written_as_pycocotools_does():
    mask_HW = np.zeros((5, 7), bool)
    mask_HW[1:3, 2:6] = True
    assert written(rle_runs(encode_mask(mask_HW), 35).tolist()) == encode_mask(mask_HW)


def through(rle: bytes, size_hw: tuple[int, int]) -> Segments:
    """Everything that reads the runs of a segment."""
    segments = Segments.measured(size_hw, [rle, rle], [0.5, 0.5], [0.5, 0.5])
    assert segments.masks_RHW().sum(axis=(1, 2)).tolist() == segments.area_px.tolist()
    pooling_weights(segments, (2, 3))
    cut(segments, np.zeros(size_hw, np.uint8), 2)
    segments.resized((3, 3))
    return segments


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=30),
        st.binary(max_size=30).map(lambda data: bytes(48 + b % 64 for b in data)),
        st.lists(st.integers(-3, 40), max_size=12).map(written),
        st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=9).map(written),
    ),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_any_runs_are_a_mask_or_refused(rle, size_hw):
    try:
        through(rle, size_hw)
    except ValueError as e:
        assert "rle must be" in str(e) and str(e).isprintable()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 6))
def test_runs_that_fit_are_taken(counts, height):
    counts[-1] += -sum(counts) % height
    if sum(counts):
        through(written(counts), (height, sum(counts) // height))


def test_sums_that_wrap_around_are_refused():
    """Four runs of 2 ** 62 add up to 0 in 64 bits, and climbing there takes only KBs of counts."""
    step, counts = 2**48, [0, 0]
    while counts[-1] < 2**62:
        counts += [counts[-1] + step] * 2
    total = sum(counts) % 2**64
    while total:  # runs on the other side bring the sum to a whole turn
        run = min(2**64 - total, counts[-1])
        counts.append(run)
        total = (total + run) % 2**64
    counts.append(6)
    assert min(counts) >= 0 and np.array(counts).sum() == 6
    with pytest.raises(ValueError, match="rle must be"):
        Segments.measured((2, 3), [written(counts)], [0.5], [0.5])


def test_sizes_that_no_memory_holds_are_refused():
    for size_hw in ((2**31 - 1, 2**31 - 1), (2**16, 2**16), (2**24, 2**24)):
        n_px = size_hw[0] * size_hw[1]
        with pytest.raises(ValueError, match="must be"):
            Segments.measured(size_hw, [written([n_px])], [0.5], [0.5])


# Rows of a run's folder ---------------------------------------------------------------------------

ITEM = segments_schema(2).field("segments").type.value_type
GOOD = {
    "box_xyxy": [0, 0, 1, 2],
    "area_px": 2,
    "rle": written([0, 2, 4]),
    "predicted_iou": 0.5,
    "stability": 0.5,
    "embedding": np.array([1, 0], np.float16),
}


def test_segments_of_wrong_types_are_refused():
    assert len(Segments.from_arrow(pa.array([GOOD], ITEM), (2, 3))) == 1  # type: ignore[arg-type]
    for name in GOOD:
        for kind in (pa.string(), pa.int8(), pa.list_(pa.string()), pa.null(), pa.binary(3)):
            fields = [f if f.name != name else pa.field(name, kind) for f in ITEM]
            bad = pa.nulls(2, pa.struct(fields))
            with pytest.raises(ValueError, match="must be"):
                Segments.from_arrow(bad, (2, 3))
        if name != "embedding":
            missing = pa.array([GOOD | {name: None}], ITEM)
            with pytest.raises(ValueError, match="must be"):
                Segments.from_arrow(missing, (2, 3))  # type: ignore[arg-type]
    for name in GOOD:
        less = pa.struct([f for f in ITEM if f.name != name])
        with pytest.raises(ValueError, match="must be"):
            Segments.from_arrow(pa.nulls(2, less), (2, 3))
    for bad in (pa.array([1, 2]), None, pa.nulls(1, pa.struct([]))):
        with pytest.raises(ValueError, match="must be"):
            Segments.from_arrow(bad, (2, 3))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_regions_of_any_numbers_are_refused_or_fit(data):
    segments = through(written([0, 2, 4]), (2, 3))
    row = cut(segments, np.zeros((2, 3), np.uint8), 2).to_row()
    name = data.draw(st.sampled_from(["cover_start", "cover", "count_start", "count_class"]))
    row[name] = data.draw(st.lists(st.integers(-2, 300), max_size=6))
    try:
        made = Regions.from_row(row)
    except (ValueError, OverflowError):
        return
    assert made.cover.max(initial=0) < 2 and made.cover_start[-1] == len(made.cover)


# Names in pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["$\\oops{", "$x", "<b>", "a" * 100, "$$", "\\", "%s{}"])
def test_class_names_in_figures_are_only_text(name):
    assert class_shares({name: 0.5, "dog": 0.5}).startswith(b"\x89PNG")
    assert iou_bars({name: {name: 0.5, "dog": None}}).startswith(b"\x89PNG")
