"""Reading image files, and saying which one cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageOps

from lit_merge.errors import DataError

__all__ = ["IMAGE_SUFFIXES", "check_image", "first_line", "is_image_name", "read_image"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif")

_Result = TypeVar("_Result")


def is_image_name(name: str) -> bool:
    """Whether a file name is one of an image, and not hidden."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def check_image(path: str | Path, decode: bool = False) -> None:
    """Read an image's header, or all of it.

    Raises:
        DataError: the file is missing, damaged, or holds more than 8 bits per channel.
    """
    if decode:
        read_image(path)
    else:
        _opened(path, lambda image: None)


def read_image(path: str | Path) -> Image.Image:
    """Read an image as RGB, upright as its EXIF orientation says; of an animation, the first frame.

    Raises:
        DataError: the file is missing, damaged, or holds more than 8 bits per channel.
    """
    return _opened(path, lambda image: ImageOps.exif_transpose(image).convert("RGB"))


def _opened(path: str | Path, use: Callable[[Image.Image], _Result]) -> _Result:
    try:
        with Image.open(path) as image:
            mode = image.mode
            if not mode.startswith(("I", "F")):
                return use(image)
    except Exception as error:  # PIL's plugins raise whatever their format's damage leads to
        reason = (
            "an unknown or damaged header" if type(error).__name__ == "UnidentifiedImageError" else first_line(error)
        )
        raise DataError(
            f"{path}: expected a readable image, got {reason}. Replace or remove it, or set skip_corrupt to true."
        ) from error
    raise DataError(
        f"{path}: expected an image with 8 bits per channel, got mode {mode}. Convert it, e.g. with PIL's point()."
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its full stop, or the error's kind if there is none."""
    text = str(error).strip().rstrip(".")
    return text.splitlines()[0] if text else type(error).__name__
