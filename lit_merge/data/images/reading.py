"""Reading image files, and saying which one cannot be read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lit_merge.errors import DataError, LitMergeError, one_line

__all__ = ["IMAGE_SUFFIXES", "image_problem", "is_image_name", "read_image", "reading", "undecoded", "upright_rgb"]

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
_SELDOM_READ = (".avif", ".heic", ".heif")  # where PIL cannot, they are refused by name, not passed over


def is_image_name(name: str) -> bool:
    """Whether a file name is one of an image, and not hidden."""
    return not name.startswith(".") and name.lower().endswith((*IMAGE_SUFFIXES, *_SELDOM_READ))


def image_problem(path: str | Path, decode: bool = False) -> DataError | None:
    """What :func:`read_image` would raise; without ``decode`` only of what the image's header tells."""
    try:
        _opened(path, upright_rgb if decode else lambda image: image)
    except DataError as error:
        return error
    return None


def read_image(path: str | Path) -> Image.Image:
    """Read an image as :func:`upright_rgb` gives it; of an animation, the first frame.

    Raises:
        DataError: the file is missing, damaged, or cannot be converted to 8-bit RGB.
    """
    return _opened(path, upright_rgb)


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image as 8-bit RGB, upright as its EXIF orientation says.

    Of 16 bits per channel the upper eight are kept, as PIL itself does with colours (65,535 and 65,280 are 255); this
    is what PIL reads as mode I;16 or I. In an image of floats (mode F) 1 is white.

    Raises:
        ValueError: values of mode I are not in [0, 65535], or of mode F not in [0, 1].
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values, white = np.asarray(image), 1 if image.mode == "F" else 65535
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= white):  # also where one is NaN
            raise ValueError(f"values from {low:g} to {high:g} in mode {image.mode}, whose white is {white}")
        image = Image.fromarray((np.rint(values * 255) if white == 1 else values >> 8).astype(np.uint8))
    return image.convert("RGB")


def _opened(path: str | Path, use: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with Image.open(path) as image:
            return use(image)
    except Exception as error:  # PIL's plugins raise whatever their format's damage leads to
        raise DataError(
            f"{path}: expected a readable image, got {undecoded(error)}. Replace or remove it, or set skip_corrupt to "
            "true."
        ) from error


def undecoded(error: Exception) -> str:
    """What an error of PIL says of an image, in one line."""
    return "an unknown or damaged header" if isinstance(error, UnidentifiedImageError) else one_line(error)


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a file that cannot be read leads to into one line.

    Raises:
        DataError: the file is missing, truncated, malformed, or of another kind; or a library that reads it is missing.
    """
    try:
        yield
    except LitMergeError:
        raise
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename or path}: expected {what}, got no such file. Complete the data set."
        ) from error
    except Exception as error:  # parsers raise whatever the damage leads to
        absent = next((one for one in (error, error.__context__) if isinstance(one, ImportError)), None)
        if absent is not None:
            library = str(absent.name).partition(".")[0].replace("datasets", "the datasets library")
            raise DataError(
                f"{path}: expected {library} to read it, got none. Run: pip install 'lit-merge[data]'."
            ) from error
        raise DataError(f"{path}: expected {what}, got {one_line(error)}. Fetch the file again.") from error
