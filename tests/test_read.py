"""Real files of every kind, with known colours, and every way in which a file can be broken."""

import contextlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffcam_fast.images.read import (
    ImageError,
    decode_image,
    image_from_pixels,
    read_image,
)

# Top row red, green; bottom row blue, white.
COLOURS = np.array(
    [[[200, 30, 40], [20, 180, 60]], [[10, 50, 220], [255, 255, 255]]], dtype=np.uint8
)


def blocks(array: np.ndarray, side: int = 16) -> np.ndarray:
    """Every pixel as a square: so large that lossy formats keep its colour."""
    return array.repeat(side, axis=0).repeat(side, axis=1)


def centres(image: Image.Image, side: int = 16) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)[side // 2 :: side, side // 2 :: side].astype(int)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(blocks(array))
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_16bit(samples: np.ndarray, colour_type: int, extra: bytes = b"") -> bytes:
    """A PNG of big-endian 16-bit samples (H, W, channels); Pillow cannot write all of them."""
    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + extra
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def tiff(samples: np.ndarray, *, photometric: int, sample_format: int = 1) -> bytes:
    """An uncompressed little-endian TIFF of samples (H, W, channels)."""
    height, width, channels = samples.shape
    bits = samples.dtype.itemsize * 8
    data = samples.tobytes()
    entries = 11
    after = 8 + len(data) + 2 + entries * 12 + 4
    arrays = struct.pack(f"<{channels}H", *[bits] * channels)
    formats = struct.pack(f"<{channels}H", *[sample_format] * channels)

    def short(tag: int, *values: int) -> bytes:
        return struct.pack("<HHI", tag, 3, len(values)) + struct.pack("<HH", *values, 0)

    def long(tag: int, value: int, kind: int = 4, count: int = 1) -> bytes:
        return struct.pack("<HHII", tag, kind, count, value)

    def per_channel(tag: int, value: int, offset: int) -> bytes:
        return short(tag, value) if channels == 1 else long(tag, offset, 3, channels)

    directory = b"".join(
        [
            long(256, width),
            long(257, height),
            per_channel(258, bits, after),
            short(259, 1),
            short(262, photometric),
            long(273, 8),
            short(277, channels),
            long(278, height),
            long(279, len(data)),
            short(284, 1),
            per_channel(339, sample_format, after + len(arrays)),
        ]
    )
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    count = struct.pack("<H", entries)
    return head + data + count + directory + bytes(4) + arrays + formats


@pytest.mark.parametrize(
    ("suffix", "options", "tolerance"),
    [
        ("png", {}, 0),
        ("bmp", {}, 0),
        ("tiff", {}, 0),
        ("tiff", {"compression": "tiff_lzw"}, 0),
        ("webp", {"lossless": True}, 0),
        ("webp", {"quality": 95}, 12),
        ("jpg", {"quality": 95, "subsampling": 0}, 3),
        ("jpg", {"quality": 95, "progressive": True}, 3),
    ],
)
def test_rgb_of_every_format(tmp_path, suffix, options, tolerance):
    image = read_image(save(tmp_path / f"a.{suffix}", COLOURS, **options))
    assert image.size == (32, 32)
    assert np.abs(centres(image) - COLOURS).max() <= tolerance


def test_content_decides_not_the_suffix(tmp_path):
    path = save(tmp_path / "a.png", COLOURS)
    renamed = path.rename(tmp_path / "a.jpg")
    assert (centres(read_image(renamed)) == COLOURS).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "bmp"])
def test_grey(tmp_path, suffix):
    grey = np.array([[0, 77], [160, 255]], dtype=np.uint8)
    image = read_image(save(tmp_path / f"a.{suffix}", grey))
    assert np.abs(centres(image) - grey[..., None]).max() <= 1


def test_one_bit(tmp_path):
    bits = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    image = read_image(save(tmp_path / "a.png", bits, "1"))
    assert (centres(image) == bits[..., None]).all()


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_rgba_is_put_on_white(tmp_path, suffix):
    alpha = np.array([[255, 0], [128, 51]], dtype=np.uint8)
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", np.dstack([COLOURS, alpha]), **options)
    share = alpha[..., None] / 255
    expected = COLOURS * share + 255 * (1 - share)
    assert np.abs(centres(read_image(path)) - expected).max() <= 1


def test_la_is_put_on_white(tmp_path):
    grey_alpha = np.array([[[0, 255], [0, 0]], [[100, 128], [200, 51]]], dtype=np.uint8)
    image = Image.fromarray(blocks(grey_alpha), "LA")
    image.save(tmp_path / "a.png")
    grey, share = grey_alpha[..., 0], grey_alpha[..., 1] / 255
    expected = (grey * share + 255 * (1 - share))[..., None]
    assert np.abs(centres(read_image(tmp_path / "a.png")) - expected).max() <= 1


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])])
def test_palette_with_transparency(tmp_path, transparency):
    index = Image.fromarray(blocks(np.array([[0, 1], [2, 2]], dtype=np.uint8)), "P")
    index.putpalette([200, 30, 40, 20, 180, 60, 0, 0, 200])
    index.save(tmp_path / "a.png", transparency=transparency)
    last = [0, 0, 200] if transparency == 1 else [127, 127, 227]
    expected = [[[200, 30, 40], [255, 255, 255]], [last, last]]
    assert np.abs(centres(read_image(tmp_path / "a.png")) - expected).max() <= 1


def test_palette_and_gif_without_transparency(tmp_path):
    for suffix in ("png", "gif"):
        path = save(tmp_path / f"a.{suffix}", COLOURS, "P")
        expected = np.asarray(Image.open(path).convert("RGB"))[8::16, 8::16]
        assert (centres(read_image(path)) == expected).all()
        assert expected[0, 0, 0] > expected[0, 0, 1] + 100


def test_rgb_png_with_one_transparent_colour(tmp_path):
    path = save(tmp_path / "a.png", COLOURS, transparency=(20, 180, 60))
    expected = COLOURS.copy()
    expected[0, 1] = 255
    assert (centres(read_image(path)) == expected).all()


CMYK = np.array(
    [[[0, 255, 255, 0], [255, 0, 255, 0]], [[255, 255, 0, 51], [0, 0, 0, 128]]], dtype=np.uint8
)
CMYK_AS_RGB = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 204], [127, 127, 127]]])


@pytest.mark.parametrize("suffix", ["tiff", "jpg"])
def test_cmyk(tmp_path, suffix):
    # JPEG: Pillow writes Adobe's inverted values and Adobe's marker.
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(blocks(CMYK), "CMYK").save(tmp_path / f"a.{suffix}", **options)
    image = read_image(tmp_path / f"a.{suffix}")
    assert np.abs(centres(image) - CMYK_AS_RGB).max() <= 2


def test_cmyk_jpeg_without_adobe_marker_is_not_inverted(tmp_path):
    file = io.BytesIO()
    Image.fromarray(255 - blocks(CMYK), "CMYK").save(file, "JPEG", quality=100, subsampling=0)
    data = file.getvalue()
    marker = data.index(b"\xff\xee\x00\x0eAdobe")
    (tmp_path / "a.jpg").write_bytes(data[:marker] + data[marker + 16 :])
    image = read_image(tmp_path / "a.jpg")
    assert np.abs(centres(image) - CMYK_AS_RGB).max() <= 2


DEEP = np.array([[0, 256 * 100], [257 * 77, 65535]], dtype=np.uint16)
DEEP_AS_GREY = np.array([[0, 100], [77, 255]])


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", DEEP)
    assert (centres(read_image(path)) == DEEP_AS_GREY[..., None]).all()


def test_16_bit_grey_big_endian_and_white_is_zero_tiff(tmp_path):
    Image.fromarray(blocks(DEEP).astype(">u2")).save(tmp_path / "big.tiff")
    (tmp_path / "inverse.tiff").write_bytes(tiff(blocks(65535 - DEEP)[..., None], photometric=0))
    for name in ("big.tiff", "inverse.tiff"):
        assert np.abs(centres(read_image(tmp_path / name)) - DEEP_AS_GREY[..., None]).max() <= 1


def test_16_bit_rgb_and_alpha_png(tmp_path):
    rgb = COLOURS.astype(np.uint16) * 257
    (tmp_path / "rgb.png").write_bytes(png_16bit(blocks(rgb), 2))
    assert (centres(read_image(tmp_path / "rgb.png")) == COLOURS).all()
    alpha = np.array([[65535, 0], [65535, 65535]], dtype=np.uint16)
    (tmp_path / "rgba.png").write_bytes(png_16bit(blocks(np.dstack([rgb, alpha])), 6))
    expected = COLOURS.copy()
    expected[0, 1] = 255
    assert (centres(read_image(tmp_path / "rgba.png")) == expected).all()
    grey_alpha = np.dstack([DEEP, alpha])
    (tmp_path / "la.png").write_bytes(png_16bit(blocks(grey_alpha), 4))
    expected = np.array([[0, 255], [77, 255]])[..., None]
    assert (centres(read_image(tmp_path / "la.png")) == expected).all()


def test_16_bit_grey_png_with_transparent_value(tmp_path):
    clear = png_chunk(b"tRNS", struct.pack(">H", 257 * 77))
    (tmp_path / "a.png").write_bytes(png_16bit(blocks(DEEP)[..., None], 0, clear))
    expected = np.array([[0, 100], [255, 255]])[..., None]
    assert (centres(read_image(tmp_path / "a.png")) == expected).all()


def test_16_bit_rgb_tiff(tmp_path):
    (tmp_path / "a.tiff").write_bytes(tiff(blocks(COLOURS.astype(np.uint16) * 257), photometric=2))
    assert (centres(read_image(tmp_path / "a.tiff")) == COLOURS).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.0, 0.2], [0.6, 1.0]], [[0, 51], [153, 255]]),
        ([[0.0, 51.0], [153.0, 255.0]], [[0, 51], [153, 255]]),
        ([[0.0, 257.0 * 51], [257.0 * 153, 65535.0]], [[0, 51], [153, 255]]),
        ([[-5.0, -3.0], [1.0, 5.0]], [[0, 51], [153, 255]]),
    ],
)
def test_float_tiff(tmp_path, values, expected):
    path = save(tmp_path / "a.tiff", np.array(values, dtype=np.float32))
    assert (centres(read_image(path)) == np.array(expected)[..., None]).all()


def test_32_bit_integers(tmp_path):
    path = save(tmp_path / "a.tiff", DEEP.astype(np.int32))
    assert (centres(read_image(path)) == DEEP_AS_GREY[..., None]).all()
    path = save(tmp_path / "b.tiff", np.array([[-50_000, 0], [50_000, 205_000]], dtype=np.int32))
    assert (centres(read_image(path))[..., 0] == [[0, 50], [100, 255]]).all()


def test_float_tiff_with_nan_is_refused(tmp_path):
    path = save(tmp_path / "a.tiff", np.array([[0, np.nan], [1, 1]], dtype=np.float32))
    with pytest.raises(ImageError, match="not finite"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[:, ::-1],
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.concatenate([COLOURS, COLOURS[:, :1]], axis=1)
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", stored, exif=exif, **options)
    found = centres(read_image(path))
    expected = turns[orientation](stored).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= (12 if suffix == "jpg" else 0)


def test_exif_orientation_of_16_bit_and_grey_alpha(tmp_path):
    exif = Image.Exif()
    exif[274] = 3
    path = save(tmp_path / "deep.png", DEEP, exif=exif)
    assert (centres(read_image(path)) == DEEP_AS_GREY[::-1, ::-1, None]).all()
    path = save(tmp_path / "deep.tiff", DEEP, exif=exif)
    assert (centres(read_image(path)) == DEEP_AS_GREY[::-1, ::-1, None]).all()
    path = save(tmp_path / "rgba.png", COLOURS, "RGBA", exif=exif)
    assert (centres(read_image(path)) == COLOURS[::-1, ::-1]).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_matter(tmp_path):
    path = save(tmp_path / "a.jpg", COLOURS, exif=b"Exif\0\0II*\0\xff\xff\xff\xff", quality=95)
    assert np.abs(centres(read_image(path)) - COLOURS).max() <= 12


@pytest.mark.parametrize("suffix", ["gif", "tiff", "webp", "png"])
def test_first_of_several_frames(tmp_path, suffix):
    first = Image.new("RGB", (8, 8), (200, 0, 0))
    second = Image.new("RGB", (8, 8), (0, 200, 0))
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(path, save_all=True, append_images=[second], **options)
    assert (np.asarray(read_image(path)) == (200, 0, 0)).all()


# Broken files


def refusal(path: Path, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path, **limits)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    return message


def test_missing_directory_empty_pipe(tmp_path):
    assert refusal(tmp_path / "no.png") == "no such file"
    assert refusal(tmp_path) == "is a directory"
    (tmp_path / "empty.png").touch()
    assert refusal(tmp_path / "empty.png") == "empty file"
    os.mkfifo(tmp_path / "pipe.png")
    assert refusal(tmp_path / "pipe.png") == "not a regular file"
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    assert refusal(tmp_path / "link.png") == "no such file"


def test_permission(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", COLOURS)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    # Not by chmod: root may read everything.
    monkeypatch.setattr("builtins.open", refuse)
    assert refusal(path) == "permission denied"


@pytest.mark.parametrize("data", [b"hello, this is text", b"\x00" * 100, b"%PDF-1.7 ...", b"x"])
def test_not_an_image(tmp_path, data):
    (tmp_path / "a.jpg").write_bytes(data)
    assert refusal(tmp_path / "a.jpg").startswith("not an image")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
def test_cut_anywhere(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = tmp_path / f"whole.{suffix}"
    Image.fromarray(noise).save(whole)
    data, path = whole.read_bytes(), tmp_path / f"cut.{suffix}"
    reasons = set()
    for size in [*range(1, 100), *range(100, len(data) - 64, max(1, len(data) // 40))]:
        path.write_bytes(data[:size])
        reasons.add(refusal(path).split(":")[0].split(" (")[0])
    kind = {"jpg": "JPEG"}.get(suffix, suffix.upper())
    assert reasons <= {f"truncated {kind} image", f"damaged {kind} image", "not an image"}
    assert f"truncated {kind} image" in reasons or suffix in ("webp", "tiff")


# Pillow warns of damage in its own words, many of them.
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
@pytest.mark.filterwarnings("ignore")
def test_random_damage_gives_an_image_or_an_image_error(tmp_path, suffix):
    rng = np.random.default_rng(1)
    whole = save(tmp_path / f"whole.{suffix}", COLOURS)
    data, path = np.frombuffer(whole.read_bytes(), np.uint8), tmp_path / f"bad.{suffix}"
    for _ in range(150):
        bad = data.copy()
        places = rng.integers(0, min(len(bad), 400), size=rng.integers(1, 12))
        bad[places] = rng.integers(0, 256, len(places))
        path.write_bytes(bad.tobytes())
        # Any other exception fails the test.
        with contextlib.suppress(ImageError):
            assert read_image(path, max_pixels=1_000_000).mode == "RGB"


def test_pixel_bomb_is_refused_before_decoding(tmp_path):
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")
    (tmp_path / "bomb.png").write_bytes(data)
    assert refusal(tmp_path / "bomb.png") == (
        "too large: 30000 x 30000 = 900 Mpixel, the limit is 179 Mpixel"
    )


def test_webp_canvas_bomb(tmp_path):
    frame = io.BytesIO()
    Image.new("RGB", (8, 8)).save(frame, "WEBP")
    side = struct.pack("<I", 59_999)[:3]
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + side + side
    body = b"WEBP" + extended + frame.getvalue()[12:]
    (tmp_path / "bomb.webp").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert refusal(tmp_path / "bomb.webp").startswith(("too large", "damaged WEBP image"))


def test_a_kind_that_no_decoder_knows_is_not_called_damaged(tmp_path):
    samples = blocks(COLOURS / 255.0)
    (tmp_path / "a.tiff").write_bytes(tiff(samples, photometric=2, sample_format=3))
    assert refusal(tmp_path / "a.tiff") == "unsupported TIFF image: unknown pixel mode"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_limits_hold_exactly(tmp_path, suffix, recwarn):
    path = save(tmp_path / f"a.{suffix}", COLOURS)
    size = path.stat().st_size
    assert read_image(path, max_pixels=1024, max_bytes=size).size == (32, 32)
    assert refusal(path, max_pixels=1023).startswith("too large: 32 x 32 = ")
    assert refusal(path, max_bytes=size - 1).startswith("too large: ")
    assert "MiB" in refusal(path, max_bytes=size - 1)
    assert not recwarn.list


def test_memory_error_is_a_reason(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", COLOURS)

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    assert refusal(path) == "not enough memory to decode it"


def test_result_does_not_need_the_file(tmp_path):
    path = save(tmp_path / "a.png", COLOURS)
    image = read_image(path)
    path.unlink()
    assert (centres(image) == COLOURS).all()


def test_bytes_are_read_as_their_file_is(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", COLOURS)
    data = path.read_bytes()
    assert decode_image(data).tobytes() == read_image(path).tobytes()
    for damaged in (b"", b"no image", data[:60], data[:-40]):
        path.write_bytes(damaged)
        with pytest.raises(ImageError) as from_bytes:
            decode_image(damaged)
        with pytest.raises(ImageError) as from_file:
            read_image(path)
        assert str(from_bytes.value) == str(from_file.value)


def test_bytes_have_the_same_limits() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (30, 20)).save(stream, "PNG")
    with pytest.raises(ImageError, match=r"30 x 20 = 0.0006 Mpixel, the limit is 0.0005 Mpixel"):
        decode_image(stream.getvalue(), max_pixels=500)
    with pytest.raises(ImageError, match=r"too large: 0.0 MiB, the limit"):
        decode_image(stream.getvalue(), max_bytes=10)


def test_pixels_become_rgb() -> None:
    assert np.array_equal(np.asarray(image_from_pixels(COLOURS)), COLOURS)
    grey = COLOURS[:, :, 0]
    assert np.array_equal(np.asarray(image_from_pixels(grey)), np.stack([grey] * 3, axis=2))
    assert np.array_equal(
        np.asarray(image_from_pixels(grey[:, :, None])), np.stack([grey] * 3, axis=2)
    )
    clear = np.dstack([COLOURS, np.zeros((2, 2), np.uint8)])
    assert np.asarray(image_from_pixels(clear)).min() == 255


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((2, 2), np.float32), "pixels are float32"),
        (np.zeros((2, 2, 2), np.uint8), r"of shape \(2, 2, 2\)"),
        (np.zeros((0, 2, 3), np.uint8), "has no pixels"),
        (np.zeros((200, 200, 3), np.uint8), "the limit is 0.01 Mpixel"),
    ],
)
def test_pixels_are_checked(pixels: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        image_from_pixels(pixels, max_pixels=10_000)
