"""Every kind of image file, each made here, against what a person would see."""

import io
import pickle
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from zsplg_ray.images import (
    IMAGE_SUFFIXES,
    ImageError,
    decode_image,
    decode_indices,
    decode_small,
    image_size,
)

RNG = np.random.default_rng(0)
IMAGE_HWC = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)
GREY_HW = RNG.integers(0, 256, (12, 17), dtype=np.uint8)


def saved(image, kind="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(header, rows, *chunks):
    """A PNG from its parts, for what Pillow cannot write."""
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    )


def three(value_HW):
    return np.stack([value_HW] * 3, axis=2)


def check(data, wanted, tolerance=0):
    got = decode_image(data)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous and got.flags.writeable
    assert got.shape == wanted.shape
    assert np.abs(got.astype(int) - wanted.astype(int)).max() <= tolerance
    assert image_size(data) == wanted.shape[:2]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_rgb(kind):
    check(saved(IMAGE_HWC, kind), IMAGE_HWC)


def test_webp_jpeg2000_and_avif():
    check(saved(IMAGE_HWC, "WEBP", lossless=True), IMAGE_HWC)
    check(saved(IMAGE_HWC, "JPEG2000"), IMAGE_HWC)
    flat = np.full((16, 24, 3), (200, 40, 90), np.uint8)
    check(saved(flat, "AVIF"), flat, tolerance=4)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg(options):
    flat = np.full((16, 24, 3), (200, 40, 90), np.uint8)
    check(saved(flat, "JPEG", quality=95, **options), flat, tolerance=3)
    check(saved(GREY_HW, "JPEG", quality=100), three(GREY_HW), tolerance=4)


def test_cmyk_jpeg_is_not_inverted():
    flat = np.full((16, 24, 3), (200, 40, 90), np.uint8)
    check(saved(Image.fromarray(flat).convert("CMYK"), "JPEG", quality=95), flat, tolerance=4)


def test_ycbcr_tiff():
    flat = np.full((16, 24, 3), (200, 40, 90), np.uint8)
    check(saved(Image.fromarray(flat).convert("YCbCr"), "TIFF"), flat, tolerance=2)


def test_grey_and_one_bit():
    check(saved(GREY_HW), three(GREY_HW))
    bit_HW = GREY_HW > 99
    check(saved(Image.fromarray(bit_HW)), three(bit_HW * np.uint8(255)))
    check(saved(Image.fromarray(bit_HW), "TIFF"), three(bit_HW * np.uint8(255)))


def test_palette_with_and_without_transparency():
    image = Image.fromarray(GREY_HW % 3)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    check(saved(image), colours[GREY_HW % 3])
    seen = colours.copy()
    seen[1] = 255
    check(saved(image, transparency=1), seen[GREY_HW % 3])
    check(saved(image, transparency=bytes([255, 0])), seen[GREY_HW % 3])


def test_alpha_is_composited_on_white():
    alpha_HW1 = GREY_HW[..., None].astype(float) / 255
    rgba = np.dstack([IMAGE_HWC, GREY_HW])
    wanted = IMAGE_HWC * alpha_HW1 + 255 * (1 - alpha_HW1)
    check(saved(rgba), np.rint(wanted), tolerance=1)
    check(saved(rgba, "TIFF"), np.rint(wanted), tolerance=1)
    check(saved(rgba, "WEBP", lossless=True, exact=True), np.rint(wanted), tolerance=1)
    grey = GREY_HW.T.reshape(GREY_HW.shape)
    wanted = grey * alpha_HW1[..., 0] + 255 * (1 - alpha_HW1[..., 0])
    check(saved(Image.fromarray(np.dstack([grey, GREY_HW]))), three(np.rint(wanted)), tolerance=1)


def test_a_transparent_colour():
    image = np.full((4, 4, 3), 7, np.uint8)
    image[0, 0] = 1, 2, 3
    data = saved(image, transparency=(1, 2, 3))
    image[0, 0] = 255
    check(data, image)


def test_sixteen_bit():
    deep_HW = RNG.integers(0, 65536, (12, 17), dtype=np.uint16)
    deep_HW[0, :2] = 0, 65535
    wanted = three(np.rint(deep_HW / 257))
    for kind in ("PNG", "TIFF", "PPM"):
        check(saved(deep_HW, kind), wanted)
    check(saved(Image.fromarray(deep_HW.astype(">u2")), "TIFF"), wanted)
    rgb = RNG.integers(0, 65536, (5, 6, 3), dtype=np.uint16)
    rows = [row.astype(">u2").tobytes() for row in rgb]
    check(png(struct.pack(">IIBBBBB", 6, 5, 16, 2, 0, 0, 0), rows), rgb / 257, tolerance=1)


def test_ints_and_floats_in_tiff():
    deep_HW = RNG.integers(0, 65536, (12, 17), dtype=np.int32)
    check(saved(deep_HW, "TIFF"), three(np.rint(deep_HW / 257)))
    float_HW = RNG.random((12, 17), dtype=np.float32)
    check(saved(float_HW, "TIFF"), three(np.rint(float_HW * 255)))
    check(saved(float_HW * 255, "TIFF"), three(np.rint(float_HW * 255)))
    odd = np.array([[np.nan, -1, 0.5, 1]], np.float32)
    check(saved(odd, "TIFF"), three(np.array([[0, 0, 128, 255]])))
    odd = np.array([[np.inf, -np.inf, 300, 7]], np.float32)
    check(saved(odd, "TIFF"), three(np.array([[255, 0, 255, 7]])))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    check(data, np.full((6, 8, 3), (255, 0, 0), np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation, kind):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255, 0, 0
    upright[8:, 16:] = 0, 0, 255
    # How a camera that was held so would have stored it.
    stored = {
        1: upright,
        2: np.fliplr(upright),
        3: np.rot90(upright, 2),
        4: np.flipud(upright),
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = saved(np.ascontiguousarray(stored), kind, exif=exif, **options)
    check(data, upright, tolerance=6 if kind == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", None])
def test_broken_exif_is_no_reason_to_fail(exif):
    if exif is None:
        exif = Image.Exif()
        exif[0x0112] = 77
    check(saved(IMAGE_HWC, "PNG", exif=exif), IMAGE_HWC)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_cut_short(kind):
    data = saved(Image.fromarray(np.repeat(np.repeat(IMAGE_HWC, 8, 0), 8, 1)), kind)
    decode_image(data)
    for length in (1, 7, 20, len(data) // 2, len(data) - len(data) // 10):
        with pytest.raises(ImageError, match=r"^image must be .*, got .*; .*$") as caught:
            decode_image(data[:length])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\0", b"hello\nworld", b"<svg/>", b"%!PS-Adobe-3.0 EPSF"])
def test_no_image(data):
    for function in (decode_image, image_size):
        with pytest.raises(ImageError, match=r"^image must be .*, got .*; .*$"):
            function(data)


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageError("image must be whole, got nothing; drop it")))
    assert isinstance(error, ValueError) and "whole" in str(error)


def test_bound_is_exact_and_read_from_the_header():
    data = saved(IMAGE_HWC)
    assert decode_image(data, max_px=12 * 17).shape == IMAGE_HWC.shape
    with pytest.raises(ImageError, match="at most 203 px, got 17 x 12 = 204 px"):
        decode_image(data, max_px=12 * 17 - 1)
    huge = png(struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0), [b""])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="200000000 px, got 100000 x 100000"):
            decode_image(huge)
        with pytest.raises(ImageError, match="200000000 px"):
            image_size(huge)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "GIF"])
def test_pillows_own_bound_neither_bites_nor_changes(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data = saved(IMAGE_HWC, kind)
    seen = []

    def work():
        for _ in range(20):
            seen.append(decode_image(data).shape)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(ImageError):
            decode_image(data[:20])
    assert seen == [IMAGE_HWC.shape] * 80
    assert Image.MAX_IMAGE_PIXELS == 10


def test_indices_are_those_stored():
    index_HW = GREY_HW.copy()
    assert (decode_indices(saved(index_HW)) == index_HW).all()
    image = Image.fromarray(index_HW % 16)
    image.putpalette(list(range(48)))
    for bits in (8, 4):
        got = decode_indices(saved(image, bits=bits))
        assert got.dtype == np.uint8
        assert (got == index_HW % 16).all()
    assert (decode_indices(saved(Image.fromarray(index_HW > 9))) == (index_HW > 9)).all()


def test_indices_refuse_other_pngs():
    four = png(struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0), [b"\x12"])
    cases = [
        (saved(IMAGE_HWC), "got 8-bit RGB;"),
        (saved(np.dstack([IMAGE_HWC, GREY_HW])), "got 8-bit RGBA;"),
        (saved(np.dstack([GREY_HW, GREY_HW])), "greyscale with alpha"),
        (saved(GREY_HW.astype(np.uint16)), "16-bit greyscale"),
        (four, "4-bit greyscale"),
        (saved(GREY_HW, "JPEG"), "a PNG, got"),
        (saved(GREY_HW)[:60], "whole"),
    ]
    for data, words in cases:
        with pytest.raises(ImageError, match=r"^mask of x must be") as caught:
            decode_indices(data, name="mask of x")
        assert words in str(caught.value)


def test_suffixes_are_lower_case():
    assert all(s.startswith(".") and s == s.lower() for s in IMAGE_SUFFIXES)


# Made smaller ------------------------------------------------------------------------------------


def smooth(height, width):
    """A picture that looks the same at every size."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * y / height, 255 * x / width, 0 * x + 90], axis=2).astype(np.uint8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_small_one_is_what_the_large_one_shows(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(smooth(300, 900), kind, exif=exif)
    large, (small, size_hw) = decode_image(data), decode_small(data, 90)
    assert size_hw == large.shape[:2] == image_size(data)
    assert small.shape == ((30, 90, 3) if orientation == 1 else (90, 30, 3))
    same = np.asarray(Image.fromarray(large).resize(small.shape[1::-1], Image.Resampling.BOX))
    assert np.abs(small.astype(int) - same).max() < 12


def test_a_small_one_stays_as_it_is():
    small, size_hw = decode_small(saved(IMAGE_HWC), 17)
    assert (small == IMAGE_HWC).all() and size_hw == (12, 17)
    thin, _ = decode_small(saved(smooth(1, 400)), 40)
    assert thin.shape == (1, 40, 3)


def test_a_large_jpeg_is_not_decoded_whole(monkeypatch):
    loaded, load, data = [], Image.Image.load, saved(smooth(1600, 1600), "JPEG")
    monkeypatch.setattr(Image.Image, "load", lambda i: (loaded.append(i.size), load(i))[1])
    decode_small(data, 200)
    assert loaded and max(max(size) for size in loaded) <= 400


@pytest.mark.parametrize("data", [b"", b"rubbish", saved(IMAGE_HWC)[:60]])
def test_no_image_is_refused_by_it_too(data):
    with pytest.raises(ImageError):
        decode_small(data, 10)
