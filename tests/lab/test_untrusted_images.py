"""Images of every kind come to the numbers that their arrays stand for, in [0, 1], or are refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, features

from relaxprop.lab import data
from relaxprop.lab.data import DataError

HEIGHT, WIDTH = 5, 7
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
BITS = RNG.integers(0, 2, (HEIGHT, WIDTH)).astype(bool)
FLOATS = RNG.random((HEIGHT, WIDTH), dtype=np.float32)
COLOURS = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
FOUR = RNG.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
TWO = RNG.integers(0, 256, (HEIGHT, WIDTH, 2), dtype=np.uint8)
PALETTE = RNG.integers(0, 256, (16, 3), dtype=np.uint8)
PLACES = RNG.integers(0, 16, (HEIGHT, WIDTH), dtype=np.uint8)


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image(array: np.ndarray, mode: str | None = None) -> Image.Image:
    """An image of a mode that the array's type alone does not tell."""
    if mode is None:
        return Image.fromarray(array)
    return Image.frombytes(mode, (array.shape[1], array.shape[0]), array.tobytes())


def with_palette(colours: np.ndarray = PALETTE) -> Image.Image:
    found = image(PLACES, "P")
    found.putpalette(colours.tobytes())
    return found


def png(array: np.ndarray, colour_type: int, claimed: int | None = None) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write where there are several, or with a side that it has not."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    head = struct.pack(">IIBBBBB", claimed or width, claimed or height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(array: np.ndarray, *, photometric: int, sample_format: int, bits: int | None = None) -> bytes:
    """An uncompressed TIFF with the tags that Pillow does not write."""
    height, width, *rest = array.shape
    channels, content = (rest or [1])[0], array.tobytes()
    bits = bits or 8 * array.dtype.itemsize
    # Several values do not fit into a tag and stand between the pixels and the directory.
    lists = struct.pack(f"<{channels}H", *[bits] * channels) + struct.pack(f"<{channels}H", *[sample_format] * channels)
    at = 8 + len(content)
    many = [at, at + 2 * channels] if channels > 2 else [bits, sample_format]
    tags = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, many[0]), (259, 3, 1, 1), (262, 3, 1, photometric),
        (273, 4, 1, 8), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(content)),
        (339, 3, channels, many[1]),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + b"\0\0\0\0"
    return b"II*\0" + struct.pack("<I", at + len(lists)) + content + lists + directory


def write(folder: Path, train: Sequence[bytes | None], test: Sequence[bytes | None] | None = None) -> Path:
    (folder / "odd").mkdir(parents=True, exist_ok=True)
    for split, cells in (("train", train), ("test", train if test is None else test)):
        table = pyarrow.table(
            {
                "image": pyarrow.array([{"bytes": c, "path": None} for c in cells], _IMAGES),
                "label": [i % 2 for i in range(len(cells))],
            }
        )
        pyarrow.parquet.write_table(table, folder / "odd" / f"{split}.parquet")
    return folder


_IMAGES = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def channels_first(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array.reshape(HEIGHT, WIDTH, -1), 2, 0)


def float32(array: np.ndarray, white: float) -> np.ndarray:
    return channels_first(array.astype(np.float32) / np.float32(white))


def opaque(colours: np.ndarray) -> np.ndarray:
    return np.concatenate([colours, np.full((HEIGHT, WIDTH, 1), 255, np.uint8)], 2)


ALPHAS = bytes(range(0, 256, 16))
RIGHT: dict[str, tuple[bytes, np.ndarray]] = {
    "8-bit PNG": (stored(image(GREY)), float32(GREY, 255)),
    "8-bit TIFF": (stored(image(GREY), "TIFF"), float32(GREY, 255)),
    "8-bit TIFF, white is 0": (tiff(255 - GREY, photometric=0, sample_format=1), float32(GREY, 255)),
    "16-bit PNG": (stored(image(DEEP)), float32(DEEP, 65535)),
    "16-bit PNG by hand": (png(DEEP, 0), float32(DEEP, 65535)),
    "16-bit TIFF": (stored(image(DEEP), "TIFF"), float32(DEEP, 65535)),
    "16-bit TIFF, compressed": (stored(image(DEEP), "TIFF", compression="tiff_lzw"), float32(DEEP, 65535)),
    "16-bit TIFF, big-endian": (stored(image(DEEP.astype(">u2"), "I;16B"), "TIFF"), float32(DEEP, 65535)),
    "16-bit PGM": (b"P5 7 5 65535\n" + DEEP.astype(">u2").tobytes(), float32(DEEP, 65535)),
    "16-bit JPEG 2000": (stored(image(DEEP), "JPEG2000"), float32(DEEP, 65535)),
    "1-bit PNG": (stored(image(BITS)), float32(BITS, 1)),
    "1-bit TIFF": (stored(image(BITS), "TIFF"), float32(BITS, 1)),
    "1-bit TIFF, fax": (stored(image(BITS), "TIFF", compression="group4"), float32(BITS, 1)),
    "1-bit BMP": (stored(image(BITS), "BMP"), float32(BITS, 1)),
    "1-bit PBM": (stored(image(BITS), "PPM"), float32(BITS, 1)),
    "palette PNG": (stored(with_palette()), float32(PALETTE[PLACES], 255)),
    "palette PNG, 4 bits": (stored(with_palette(), bits=4), float32(PALETTE[PLACES], 255)),
    "palette GIF": (stored(with_palette(), "GIF"), float32(PALETTE[PLACES], 255)),
    "palette BMP": (stored(with_palette(), "BMP"), float32(PALETTE[PLACES], 255)),
    "palette TIFF": (stored(with_palette(), "TIFF"), float32(PALETTE[PLACES], 255)),
    "palette PNG, opaque": (stored(with_palette(), transparency=b"\xff" * 16), float32(PALETTE[PLACES], 255)),
    "palette PNG, transparent": (
        stored(with_palette(), transparency=ALPHAS),
        float32(np.concatenate([PALETTE[PLACES], np.frombuffer(ALPHAS, np.uint8)[PLACES][..., None]], 2), 255),
    ),
    "float TIFF": (stored(image(FLOATS), "TIFF"), channels_first(FLOATS)),
    "float TIFF, 0 and 1": (stored(image(BITS.astype(np.float32)), "TIFF"), float32(BITS, 1)),
    "float TIFF, compressed": (stored(image(FLOATS), "TIFF", compression="tiff_deflate"), channels_first(FLOATS)),
    "float PFM": (b"Pf\n7 5\n-1.0\n" + FLOATS[::-1].tobytes(), channels_first(FLOATS)),
    "RGB PNG": (stored(image(COLOURS)), float32(COLOURS, 255)),
    "RGB BMP": (stored(image(COLOURS), "BMP"), float32(COLOURS, 255)),
    "RGB WebP": (stored(image(COLOURS), "WEBP", lossless=True), float32(COLOURS, 255)),
    "RGB JPEG 2000": (stored(image(COLOURS), "JPEG2000"), float32(COLOURS, 255)),
    "RGB PPM": (stored(image(COLOURS), "PPM"), float32(COLOURS, 255)),
    "RGBA PNG": (stored(image(FOUR)), float32(FOUR, 255)),
    "RGBA TIFF": (stored(image(FOUR), "TIFF"), float32(FOUR, 255)),
    "LA PNG": (stored(image(TWO, "LA")), float32(TWO, 255)),
    "CMYK TIFF": (stored(image(FOUR, "CMYK"), "TIFF"), float32(FOUR, 255)),
    "turned by EXIF": (
        # Orientation 6: the file's columns, from the bottom up, are the rows that are meant.
        stored(
            image(np.rot90(GREY, 1).copy()), exif=b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
        ),
        float32(GREY, 255),
    ),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_pixels_are_what_the_array_stands_for(tmp_path: Path, kind: str) -> None:
    encoded, expected = RIGHT[kind]
    loaded = data.load("odd", write(tmp_path, [encoded, encoded, encoded]))
    for split in (loaded.train, loaded.test):
        assert split.images.shape == (3, *expected.shape)
        assert split.images.is_contiguous()
        np.testing.assert_array_equal(split.images[1].numpy(), expected)
        assert split.labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(("array", "mode"), [(GREY, "L"), (COLOURS, "RGB"), (FOUR, "CMYK")])
def test_jpegs(tmp_path: Path, array: np.ndarray, mode: str) -> None:
    flat = np.broadcast_to(array[:1, :1], (16, 16, *array.shape[2:])).copy()  # which loses nothing but roundings
    loaded = data.load("odd", write(tmp_path, [stored(image(flat, mode), "JPEG", quality=100)] * 2))
    expected = np.moveaxis(flat.reshape(16, 16, -1), 2, 0).astype(np.float32) / np.float32(255)
    np.testing.assert_allclose(loaded.train.images[0].numpy(), expected, atol=2 / 255)


def test_grey_images_of_several_depths_are_of_one_scale(tmp_path: Path) -> None:
    kinds = ("8-bit PNG", "16-bit PNG", "1-bit PNG", "float TIFF")
    loaded = data.load("odd", write(tmp_path, [RIGHT[kind][0] for kind in kinds]))
    np.testing.assert_array_equal(loaded.train.images.numpy(), np.stack([RIGHT[kind][1] for kind in kinds]))


def luminance(colours: np.ndarray) -> np.ndarray:
    """ITU-R 601-2: 0.299 R + 0.587 G + 0.114 B."""
    return channels_first(colours @ np.array([0.299, 0.587, 0.114]) / 255)


def repeated(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey, 3, 0)


INKS = np.array([255, 128, 0, 51], np.uint8) * np.ones((HEIGHT, WIDTH, 1), np.uint8)
CONVERTED: dict[str, tuple[str, bytes, np.ndarray]] = {
    "RGB to L": ("L", RIGHT["RGB PNG"][0], luminance(COLOURS)),
    "palette to L": ("L", RIGHT["palette PNG"][0], luminance(PALETTE[PLACES])),
    "opaque RGBA to L": ("L", stored(image(opaque(COLOURS))), luminance(COLOURS)),
    "L to RGB": ("RGB", RIGHT["8-bit PNG"][0], repeated(float32(GREY, 255))),
    "16 bits to RGB": ("RGB", RIGHT["16-bit PNG"][0], repeated(float32(DEEP, 65535))),
    "16 bits to L": ("L", RIGHT["16-bit PNG"][0], float32(DEEP, 65535)),
    "1 bit to RGB": ("RGB", RIGHT["1-bit PNG"][0], repeated(float32(BITS, 1))),
    "1 bit to L": ("L", RIGHT["1-bit PNG"][0], float32(BITS, 1)),
    "floats to RGB": ("RGB", RIGHT["float TIFF"][0], repeated(channels_first(FLOATS))),
    "palette to RGB": ("RGB", RIGHT["palette GIF"][0], float32(PALETTE[PLACES], 255)),
    "opaque RGBA to RGB": ("RGB", stored(image(opaque(COLOURS))), float32(COLOURS, 255)),
    "opaque LA to RGB": (
        "RGB",
        stored(image(opaque(GREY[..., None])[..., :2].copy(), "LA")),
        repeated(float32(GREY, 255)),
    ),
    "CMYK to RGB": (
        "RGB",
        stored(image(INKS, "CMYK"), "TIFF"),
        channels_first((1 - INKS[..., :3] / 255) * (1 - INKS[..., 3:] / 255)),
    ),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_conversion_of_colours(tmp_path: Path, kind: str) -> None:
    colour, encoded, expected = CONVERTED[kind]
    other = stored(image(GREY))
    loaded = data.load("odd", write(tmp_path, [encoded, other], [other, encoded]), colour=colour)  # type: ignore[arg-type]
    assert loaded.image_shape[0] == len(colour)
    assert loaded.title == f"odd, all {'grey' if colour == 'L' else 'RGB'}"
    assert loaded.signed().title == loaded.title
    for found in (loaded.train.images[0], loaded.test.images[1]):
        np.testing.assert_allclose(found.numpy(), expected, atol=1 / 255 if expected.dtype == np.float64 else 0)
    grey = float32(GREY, 255)
    np.testing.assert_array_equal(loaded.test.images[0].numpy(), grey if colour == "L" else repeated(grey))


def test_an_unknown_colour_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="colour must be one of L, RGB, got 'HSV'"):
        data.load("odd", write(tmp_path, [stored(image(GREY))]), colour="HSV")  # type: ignore[arg-type]


def frames(kind: str) -> bytes:
    return stored(image(COLOURS), kind, save_all=True, append_images=[image(COLOURS[::-1].copy())])


def deep_avif() -> bytes:
    """Headers that say 10 bits, of which Pillow writes none; the pixels are not looked at."""
    encoded = bytearray(stored(image(COLOURS), "AVIF"))
    encoded[encoded.index(b"av1C") + 6] |= 0x40
    sizes = encoded.index(b"pixi") + 9  # of the three channels
    encoded[sizes : sizes + 3] = bytes([10, 10, 10])
    return bytes(encoded)


def deep_jpeg2000() -> bytes:
    """A header that says 16 bits; the pixels are not looked at."""
    whole = bytearray(stored(image(COLOURS), "JPEG2000"))
    whole[whole.find(b"\xff\x4f\xff\x51") + 42] = 15
    return bytes(whole)


def broken_sum() -> bytes:
    whole = bytearray(stored(image(COLOURS)))
    whole[whole.find(b"IDAT") + 10] ^= 0xFF
    return bytes(whole)


WHOLE = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
DAMAGED = "it is damaged, no image or of an unknown kind. Fetch the file again, or write it as PNG"
REFUSED: dict[str, tuple[Callable[[], bytes | None], str]] = {
    **(
        {"10-bit AVIF": (deep_avif, "this AVIF has more than 8 bits in each channel of RGB")}
        if features.check("avif")
        else {}
    ),
    "16-bit RGB PNG": (lambda: png(COLOURS.astype(np.uint16) * 257, 2), "more than 8 bits in each channel of RGB"),
    "16-bit RGBA PNG": (lambda: png(FOUR.astype(np.uint16) * 257, 6), "more than 8 bits in each channel of RGBA"),
    "16-bit LA PNG": (lambda: png(TWO.astype(np.uint16) * 257, 4), "more than 8 bits in each channel"),
    "16-bit RGB TIFF": (
        lambda: tiff(COLOURS.astype(np.uint16) * 257, photometric=2, sample_format=1),
        "this TIFF has more than 8 bits in each channel of RGB",
    ),
    "16-bit RGB PPM": (
        lambda: b"P6 7 5 65535\n" + (COLOURS.astype(np.uint16) * 257).astype(">u2").tobytes(),
        "this PPM has more than 8 bits in each channel of RGB",
    ),
    "16-bit RGB JPEG 2000": (deep_jpeg2000, "this JPEG2000 has more than 8 bits in each channel of RGB"),
    "16-bit TIFF, white is 0": (
        lambda: tiff(DEEP, photometric=0, sample_format=1),
        "white as its smallest number. Write it as an 8-bit or, where it is grey, 16-bit PNG",
    ),
    "signed 16-bit TIFF": (lambda: tiff(DEEP.astype(np.int16), photometric=1, sample_format=2), "signed numbers"),
    "signed 8-bit TIFF": (lambda: tiff(GREY.astype(np.int8), photometric=1, sample_format=2), "signed numbers"),
    "12-bit TIFF": (
        lambda: tiff(np.zeros((6, 3), np.uint8), photometric=1, sample_format=1, bits=12),
        "has 12 bits a pixel",
    ),
    "32-bit TIFF": (lambda: stored(image(DEEP.astype(np.int32)), "TIFF"), "signed numbers|mode I has no range"),
    "unsigned 32-bit TIFF": (
        lambda: tiff(DEEP.astype(np.uint32), photometric=1, sample_format=1),
        "mode I has no range that is known. Write it as an 8-bit or",
    ),
    "LAB TIFF": (lambda: stored(image(COLOURS, "LAB"), "TIFF"), "mode LAB has no range that is known"),
    "floats to 255": (
        lambda: stored(image(GREY.astype(np.float32)), "TIFF"),
        rf"floats \(mode F\) run from {GREY.min()} to {GREY.max()}, and must lie in \[0, 1\]. Scale them",
    ),
    "floats below 0": (lambda: stored(image(FLOATS - 0.5), "TIFF"), r"run from -0\.\d+ to 0\.\d+, and must lie in"),
    "floats, a bit above 1": (lambda: stored(image(FLOATS + 0.2), "TIFF"), r"to 1\.\d+, and must lie in"),
    "NaN": (lambda: stored(image(FLOATS * np.float32("nan")), "TIFF"), "run from nan to nan, and must lie in"),
    "infinity": (lambda: stored(image(np.full_like(FLOATS, np.inf)), "TIFF"), "run from inf to inf, and must lie in"),
    "animated GIF": (lambda: frames("GIF"), "this GIF has 2 frames or pages. Keep the one that is meant"),
    "animated PNG": (lambda: frames("PNG"), "this PNG has 2 frames or pages"),
    "animated WebP": (lambda: frames("WEBP"), "this WEBP has 2 frames or pages"),
    "TIFF of pages": (lambda: frames("TIFF"), "this TIFF has 2 frames or pages"),
    "64-bit float TIFF": (lambda: tiff(FLOATS.astype(np.float64), photometric=1, sample_format=3), DAMAGED),
    "no image": (lambda: None, r"there is no image \(null\). Leave such rows out"),
    "no bytes": (lambda: b"", "its 0 bytes cannot be read"),
    "text": (lambda: b"<html>404</html>", DAMAGED),
    "SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", DAMAGED),
    "EPS": (lambda: stored(image(COLOURS), "EPS"), DAMAGED),
    "truncated PNG": (lambda: stored(image(WHOLE))[:3000], DAMAGED),
    "truncated JPEG": (lambda: stored(image(WHOLE), "JPEG")[:1000], DAMAGED),
    "truncated TIFF": (lambda: stored(image(WHOLE), "TIFF")[:1000], DAMAGED),
    "truncated WebP": (lambda: stored(image(WHOLE), "WEBP")[:300], DAMAGED),
    "truncated GIF": (lambda: stored(image(WHOLE), "GIF")[:1000], DAMAGED),
    "wrong check sum": (broken_sum, DAMAGED),
    "a bomb": (lambda: png(COLOURS, 2, claimed=30_000), "900000000 pixels.* Reduce it"),
    "a smaller bomb": (lambda: png(COLOURS, 2, claimed=10_000), "100000000 pixels.* Reduce it"),
}


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_sure_numbers_is_refused(tmp_path: Path, kind: str, row: int) -> None:
    make, message = REFUSED[kind]
    cells: list[bytes | None] = [stored(image(GREY))] * 3
    odd = [*cells[:row], make(), *cells[row + 1 :]]
    with pytest.raises(DataError, match=rf"(?s)odd/test\.parquet .*column 'image', row {row} .*{message}"):
        data.load("odd", write(tmp_path, cells, odd))


@pytest.mark.parametrize("colour", ["L", "RGB"])
@pytest.mark.parametrize("kind", ["RGBA PNG", "LA PNG", "palette PNG, transparent"])
def test_a_transparent_image_has_no_one_colour(tmp_path: Path, kind: str, colour: data.Colour) -> None:
    with pytest.raises(DataError, match=r"'image', row 0 .*partly transparent .* Lay it on a background"):
        data.load("odd", write(tmp_path, [RIGHT[kind][0]]), colour=colour)


MODES = ("8-bit PNG", "RGB PNG", "RGBA PNG", "LA PNG", "CMYK TIFF")


@pytest.mark.parametrize("other", MODES)
@pytest.mark.parametrize("kind", MODES)
def test_modes_do_not_mix(tmp_path: Path, kind: str, other: str) -> None:
    """Not even RGBA and CMYK, which both have four channels."""
    one, another = RIGHT[kind][0], RIGHT[other][0]
    if kind == other:
        assert len(data.load("odd", write(tmp_path, [one, another])).train) == 2
        return
    first, second = kind.split()[0].replace("8-bit", "L"), other.split()[0].replace("8-bit", "L")
    within = rf"train\.parquet .*'image', row 1 .*has mode {second}, and row 0 has {first}. Pass --colour L .* RGB"
    with pytest.raises(DataError, match=within):
        data.load("odd", write(tmp_path, [one, another]))
    between = rf"{first} images of 5×7 .*train\.parquet and {second} images of 5×7 .*test\.parquet: pass --colour L"
    with pytest.raises(DataError, match=between):
        data.load("odd", write(tmp_path, [one], [another]))


def test_splits_of_different_sizes_are_refused(tmp_path: Path) -> None:
    one, another = stored(image(GREY)), stored(image(GREY[:, :6].copy()))
    with pytest.raises(DataError, match=r"L images of 5×7 .*train\.parquet and L images of 5×6 .*: resize them to one"):
        data.load("odd", write(tmp_path, [one], [another]))


def test_a_path_in_place_of_bytes(tmp_path: Path) -> None:
    folder = write(tmp_path, [stored(image(GREY))])
    (folder / "odd" / "a.png").write_bytes(stored(image(GREY)))
    for path in ("a.png", str(folder / "odd" / "a.png")):
        table = pyarrow.table({"image": pyarrow.array([{"bytes": None, "path": path}], _IMAGES), "label": [0]})
        pyarrow.parquet.write_table(table, folder / "odd" / "test.parquet")
        np.testing.assert_array_equal(data.load("odd", folder).test.images[0].numpy(), float32(GREY, 255))
    for path in ("b.png", "https://example.org/a.png", "a\0b", "."):
        table = pyarrow.table({"image": pyarrow.array([{"bytes": None, "path": path}], _IMAGES), "label": [0]})
        pyarrow.parquet.write_table(table, folder / "odd" / "test.parquet")
        with pytest.raises(DataError, match=r"row 0 .*only the path .*Write the images themselves into the file"):
            data.load("odd", folder)


@pytest.mark.skipif(not features.check("avif"), reason="an old Pillow knows no AVIF")
def test_an_avif_of_8_bits_is_read(tmp_path: Path) -> None:
    grey = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)  # one colour, which no compression changes much
    loaded = data.load("odd", write(tmp_path, [stored(image(grey), "AVIF", quality=100)]))
    assert loaded.image_shape == (3, HEIGHT, WIDTH)
    np.testing.assert_allclose(loaded.train.images[0].numpy(), 128 / 255, atol=2 / 255)
