"""One image file as RGB pixels, whatever it holds, or a word on why not."""

import contextlib
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

# Those that photographs, screenshots and data sets come in; not formats that are programs (EPS).
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "WEBP", "TIFF")
BACKGROUND = (128, 128, 128)  # neither black nor white drawings vanish on it, nor does a trigger
_ORIENTATION, _TURNED = 0x0112, range(5, 9)  # EXIF's tag, and its values that swap the sides


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Image.Image]:
    """An open image of at most Pillow's ``MAX_IMAGE_PIXELS``; ValueError says what is wrong."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if limit is not None and pixels > limit:
                raise Image.DecompressionBombError
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"more than the {Image.MAX_IMAGE_PIXELS:,} pixels that Pillow takes for "
                         "a decompression bomb; make it smaller") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"no image, or none of {', '.join(FORMATS)}") from error
    except ValueError:
        raise
    except Exception as error:  # what decoders raise on damaged files is of many kinds
        raise ValueError(f"{type(error).__name__}: {error}") from error


def size_of(path: pathlib.Path) -> tuple[int, int]:
    """``(height, width)`` as the picture is meant to be seen, from the file's header.

    Raises:
      ValueError: no image, a damaged one, or one of too many pixels.
    """
    with _opened(path) as image:
        turned = image.getexif().get(_ORIENTATION) in _TURNED
        return (image.width, image.height) if turned else (image.height, image.width)


def rgb(path: pathlib.Path, size: tuple[int, int]) -> np.ndarray:
    """The picture turned as EXIF says, in RGB, resized bilinearly where it has another size.

    Grey becomes RGB, 16 bits become 8, transparency is laid on mid-grey. The sides are resized
    each by itself, so that nothing is cut off.

    Args:
      path: the file.
      size: ``(height, width)`` of the result.

    Returns:
      ``[height, width, 3]`` uint8.

    Raises:
      ValueError: no image, a damaged one, one of too many pixels, or pixels of unknown range.
    """
    with _opened(path) as image:
        picture = _eight_bit(ImageOps.exif_transpose(image), image.format)
        if picture.has_transparency_data:
            ground = Image.new("RGBA", picture.size, (*BACKGROUND, 255))
            picture = Image.alpha_composite(ground, picture.convert("RGBA"))
        picture = picture.convert("RGB")
        height, width = size
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(picture)


def _eight_bit(image: Image.Image, file_format: str | None) -> Image.Image:
    """An image of at most eight bits a channel; sixteen are divided by 257."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return Image.fromarray(np.uint8(np.round(np.asarray(image) / 257)))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers of unknown range; save it with 8 or 16 "
                         "bits a channel")
    return image
