"""Encoded images as numbers in [0, 1], by what Pillow says of their mode, or refused.

Grey images of 1, 8 and 16 bits and floats come to the same scale. Palettes become the colours that they stand for.
Channels of 8 bits are taken as they are, alpha and the inks of CMYK included. What Pillow would read wrongly or in
part is refused.

May import: lab.data.dataset.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from relaxprop.lab.data.dataset import DataError

Colour = Literal["L", "RGB"]
COLOURS: tuple[Colour, ...] = get_args(Colour)
# No EPS or PDF, say, which Pillow hands to other programs: data sets are not trusted.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
BYTES = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")  # modes with 8 bits for each channel
WORDS = ("I;16", "I;16L", "I;16B", "I;16N")
AS_PNG = "Write it as an 8-bit or, where it is grey, 16-bit PNG"


class Images(NamedTuple):
    """Images in [0, 1], shape (n, channels, height, width), and what their channels are, as Pillow calls it."""

    pixels: Tensor
    mode: str


class Picture(NamedTuple):
    """One image, shape (height, width, channels): bytes, or floats in [0, 1]."""

    mode: str
    pixels: np.ndarray


class UnfitError(Exception):
    """An image is refused; the message says what it is and what to do."""


def decode(
    cells: Iterable[tuple[bytes | None, str | None]],
    where: str,
    folder: Path | None,
    colour: Colour | None = None,
    declared: str | None = None,
) -> Images:
    """The images of a column.

    Args:
        cells: an encoded image each, or the path of its file.
        where: the column and its file, for messages.
        folder: where relative paths start; None: in the working directory.
        colour: what all become: grey, or three channels.
        declared: the mode that the column's own description asks for.

    Raises:
        DataError: an image is missing, damaged or of a kind that has no sure scale, or they differ in size or mode.
    """
    pictures: list[Picture] = []
    with warnings.catch_warnings():
        import PIL.Image

        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        for row, (encoded, path) in enumerate(cells):
            try:
                pictures.append(_picture(_content(encoded, path, folder), colour, declared))
            except UnfitError as error:
                raise DataError(f"{where}, row {row} (the first is 0): {error}") from error
            _check_alike(pictures[0], pictures[-1], f"{where}, row {row} (the first is 0)")
    return Images(_stacked([picture.pixels for picture in pictures]), pictures[0].mode)


def _content(encoded: bytes | None, path: str | None, folder: Path | None) -> bytes:
    if encoded is not None:
        return encoded
    if path is None:
        raise UnfitError("there is no image (null). Leave such rows out of the file")
    try:
        return next(p for p in ((folder or Path()) / path, Path(path)) if p.is_file()).read_bytes()
    except (StopIteration, OSError, ValueError) as error:  # ValueError: a null character
        raise UnfitError(
            f"there are no bytes of an image, only the path {path!r}, where no file can be read. Write the images "
            "themselves into the file"
        ) from error


def _picture(encoded: bytes, colour: Colour | None, declared: str | None) -> Picture:
    import PIL.ExifTags
    import PIL.Image
    import PIL.ImageOps

    PIL.Image.init()
    known = [name for name in FORMATS if name in PIL.Image.OPEN]  # an old Pillow knows no AVIF
    try:
        with PIL.Image.open(io.BytesIO(encoded), formats=known) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a camera's, with further views after the photograph
                raise UnfitError(f"this {image.format} has {frames} frames or pages. Keep the one that is meant")
            if said := _misread(image, encoded):
                raise UnfitError(f"this {image.format} {said}. {AS_PNG}")
            image.load()
            scale = _scale(image)
            shown: Any = image
            if image.getexif().get(PIL.ExifTags.Base.Orientation) is not None:
                shown = PIL.ImageOps.exif_transpose(image)
            mode = colour or (declared if declared != image.mode else None)
            return _grey(shown, scale, mode) if scale else _coloured(shown, mode)
    except UnfitError:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise UnfitError(f"{error}. Reduce it") from error
    except Exception as error:  # of damaged bytes Pillow raises whatever its decoders stumble over
        # Of bytes that it does not know Pillow says where in memory they are, which tells nobody anything.
        unknown = isinstance(error, PIL.UnidentifiedImageError)
        reason = "" if unknown else f" ({type(error).__name__}: {str(error).rstrip('.')})"
        raise UnfitError(
            f"its {len(encoded):,} bytes cannot be read as one of {', '.join(known)}{reason}: it is damaged, no image "
            "or of an unknown kind. Fetch the file again, or write it as PNG"
        ) from error


def _misread(image: Any, encoded: bytes) -> str | None:
    """What Pillow would not say of an image that it reads in part or wrongly."""
    stored = str([tile[3] for tile in image.tile])
    if image.format == "TIFF":
        if 2 in image.tag_v2.get(339, ()):
            return "has signed numbers, whose range is not known"
        if image.tag_v2.get(262) == 0 and image.mode not in ("1", "L"):
            return "has white as its smallest number"
        if "I;12" in stored:
            return "has 12 bits a pixel"
    deep = image.format in ("PNG", "TIFF") and ";16" in stored
    if image.format == "PPM" and image.tile and isinstance(image.tile[0][3], tuple):
        deep = image.tile[0][3][-1] > 255
    elif image.format == "JPEG2000":
        sizes = encoded.find(b"\xff\x4f\xff\x51")  # the code stream's start; 42 bytes on, the first channel's bits − 1
        deep = (encoded[sizes + 42] & 0x7F) > 7
    elif image.format == "AVIF":  # of each coded picture, a byte 0x81, and two on a bit that says 10 or 12 bits
        deep = re.search(rb"av1C\x81.[\x40-\x7f\xc0-\xff]", encoded, re.DOTALL) is not None
    if deep and image.mode not in ("I", *WORDS):
        return f"has more than 8 bits in each channel of {image.mode}, of which 8 would be read"
    return None


def _scale(image: Any) -> float | None:
    """What white is in a grey image; None for one of several channels."""
    if image.mode in WORDS or (image.mode == "I" and image.format in ("PNG", "PPM")):  # an old Pillow's 16 bits
        return 65535
    return {"1": 1, "L": 255, "F": 1}.get(image.mode)


def _grey(image: Any, scale: float, mode: str | None) -> Picture:
    pixels = np.asarray(image)
    if image.mode == "1":
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    elif image.mode != "L":
        pixels = pixels.astype(np.float32) / np.float32(scale)
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise UnfitError(
                f"its floats (mode F) run from {pixels.min():g} to {pixels.max():g}, and must lie in [0, 1]. Scale them"
            )
    if mode in (None, "L"):
        return Picture("L", pixels[..., None])
    if mode == "RGB":
        return Picture("RGB", np.repeat(pixels[..., None], 3, 2))
    if mode not in BYTES or pixels.dtype != np.uint8:
        raise _no_way(image.mode, mode)
    return Picture(mode, np.asarray(image.convert(mode)))


def _coloured(image: Any, mode: str | None) -> Picture:
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        if image.mode == "RGBA" and _opaque(image):
            image = image.convert("RGB")
    if image.mode not in BYTES:
        raise UnfitError(f"its mode {image.mode} has no range that is known. {AS_PNG}")
    if mode not in (None, image.mode):
        if mode not in BYTES:
            raise _no_way(image.mode, mode)
        if image.mode in ("LA", "RGBA") and mode not in ("LA", "RGBA") and not _opaque(image):
            raise UnfitError(
                f"it is partly transparent (mode {image.mode}) and so has no one {mode} colour. Lay it on a "
                "background and write it again"
            )
        image = image.convert(mode)
    return Picture(image.mode, np.asarray(image).reshape(*reversed(image.size), -1))


def _opaque(image: Any) -> bool:
    return bool(image.getchannel("A").getextrema()[0] == 255)


def _no_way(mode: str, wanted: str | None) -> UnfitError:
    return UnfitError(
        f"the column's description asks for mode {wanted}, which mode {mode} does not become. Pass --colour L or RGB"
    )


def _check_alike(first: Picture, picture: Picture, where: str) -> None:
    if picture.pixels.shape[:2] != first.pixels.shape[:2]:
        shapes = f"{first.pixels.shape[:2]}, {picture.pixels.shape[:2]}"
        raise DataError(
            f"{where}: all images must have one size, and these have {shapes} (height, width). Resize them to one"
        )
    if picture.mode != first.mode:
        raise DataError(
            f"{where}: this image has mode {picture.mode}, and row 0 has {first.mode}. Pass --colour L (grey) or "
            "--colour RGB to read all alike"
        )


def _stacked(pictures: list[np.ndarray]) -> Tensor:
    """(n, height, width, channels) as (n, channels, height, width) in [0, 1]."""
    if all(pixels.dtype == np.uint8 for pixels in pictures):
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(255).contiguous()
    floats = [p.astype(np.float32) / np.float32(255) if p.dtype == np.uint8 else p for p in pictures]
    return torch.from_numpy(np.stack(floats)).permute(0, 3, 1, 2).contiguous()
