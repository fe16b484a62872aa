"""One picture: opened as transformers opens it or refused with a reason; flipped and cropped.

A picture is turned as its EXIF data says and brought to RGB, for training and for prediction alike.
It is decoded when it is needed and never kept. Augmentation is a pure function of its keys (seed,
epoch, row), so that a resumed run sees what the uninterrupted one would have seen.

H height, W width of a picture.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from qlora_trainer.data.faults import RowError
from qlora_trainer.data.order import mix

_FORMATS = ("PNG", "JPEG")
_MOST_PIXELS = 90_000_000  # above, Pillow itself suspects a decompression bomb
_BORDER_SHARE = 8  # crops move by at most this part of a side: 4 of 32 pixels, as on CIFAR
_AGAIN = "save it again as PNG or JPEG, or drop the row"
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def open_picture(path: Path) -> Image.Image:
    """Decode a picture as RGB, the right way up.

    Raises:
        RowError: It is not there, is no PNG or JPEG, or does not decode to its end.
    """
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            _check_kind(picture, path)
            turned = ImageOps.exif_transpose(picture) or picture
            return turned.convert("RGB")
    except FileNotFoundError:
        raise RowError(
            f"the picture {path} is not there",
            "mend the path (relative ones start at the folder of the file that names them)",
            "no picture",
        ) from None
    except (IsADirectoryError, PermissionError) as error:
        problem = f"the picture {path} cannot be read ({error.strerror})"
        raise RowError(problem, "name a file that can be read", "unreadable") from error
    except UnidentifiedImageError:
        raise RowError(_what_it_is(path), _AGAIN, "no PNG or JPEG") from None
    except Image.DecompressionBombError as error:
        raise RowError(
            f"the picture {path} is too large ({error})", "make it smaller", "too large"
        ) from error
    except _BROKEN as error:
        raise RowError(
            f"the picture {path} does not open: {str(error) or type(error).__name__}",
            _AGAIN,
            "broken picture",
        ) from error


def _check_kind(picture: Image.Image, path: Path) -> None:
    if picture.width * picture.height > _MOST_PIXELS:
        size = f"{picture.width} x {picture.height}"
        raise RowError(f"the picture {path} is too large ({size})", "make it smaller", "too large")
    if picture.mode.startswith(("I", "F")):
        raise RowError(
            f"the picture {path} has {'16' if picture.mode.startswith('I;16') else '32'} bits a "
            "channel, which would be cut off and not scaled",
            "save it with 8 bits a channel",
            "bit depth",
        )


def _what_it_is(path: Path) -> str:
    """Say why Pillow knows nothing of a file."""
    with path.open("rb") as handle:
        head = handle.read(16)
    if not head:
        return f"the picture {path} is an empty file"
    if head.lstrip()[:1] == b"<":
        return f"the picture {path} is a web page or SVG, no PNG or JPEG"
    return f"the picture {path} is no PNG or JPEG (it begins with {head[:4].hex(' ')})"


def augment_picture(picture: Image.Image, *keys: int) -> Image.Image:
    """Flip every second picture left to right, and cut it out of itself a little aside.

    The picture is continued by its border pixels for an eighth of each side, and a window of its
    old size is cut at a random place, as is common on CIFAR (He et al. 2016).

    Args:
        picture: RGB.
        keys: Decide what happens: seed, epoch, row.
    """
    pixels = np.asarray(picture)  # (H, W, 3)
    draws = mix(np.arange(3), *keys)
    if int(draws[0]) & 1:
        pixels = pixels[:, ::-1]
    height, width = pixels.shape[:2]
    down, right = height // _BORDER_SHARE, width // _BORDER_SHARE
    top, left = int(draws[1] % (2 * down + 1)), int(draws[2] % (2 * right + 1))
    rows = np.clip(np.arange(top - down, top - down + height), 0, height - 1)
    columns = np.clip(np.arange(left - right, left - right + width), 0, width - 1)
    return Image.fromarray(np.ascontiguousarray(pixels[rows][:, columns]))
