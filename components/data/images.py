"""Images as a viewer shows them, whatever file, row or array they come in: upright, on white, 8 bits, grey (L) or colour (RGB).

read_image(source, size)    any image file, at the size asked for
square(raw, size, mode)     as a tokenizer takes it
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from components.data.bad import BadSample
from components.data.reading import name_for, opened, unreadable

BACKGROUND = 255
"""What shows through a transparent pixel: white, as in a viewer."""


def read_image(source: Any, size: int | None = None, name: str | None = None) -> Image.Image:
    """An image as a viewer shows it, of mode L or RGB; its central square at `size` pixels where a size is asked for.

    - turned upright by its EXIF orientation; of several frames the first
    - transparency (an alpha channel, a palette's, a colour that stands for it) on a white background
    - 16-bit grey is scaled from 0..65535; 32-bit integers and floats from the first of the ranges [0, 1] (floats), [0, 255] and
      [0, 65535] that holds them all, else from their own lowest (or 0) to their highest
    - grey stays grey; all else (palettes, CMYK, YCbCr, ...) becomes RGB before it is resized

    name: what a BadSample is called; None is the path

    Raises BadSample: no image, a truncated one, no pixels, NaN, or more pixels than Pillow's `Image.MAX_IMAGE_PIXELS` (89 M).
    """
    name = name or name_for(source, "image")
    try:
        if isinstance(source, Image.Image):
            image = _flat(source, name)
        else:
            with opened(source, name) as file, Image.open(file) as image_file:
                image = _flat(image_file, name)
    except BadSample:
        raise
    except UnidentifiedImageError as error:
        raise BadSample(name, "it is no image of a known format") from error
    except Exception as error:  # decoders of many formats
        raise unreadable(name, "image", error) from error
    return image if size is None else fit(image, size)


def _flat(image: Image.Image, name: str) -> Image.Image:
    """L or RGB, upright and opaque."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise BadSample(name, f"it has {image.width} x {image.height} pixels, more than the limit of {limit:,}")
    if min(image.size) < 1:
        raise BadSample(name, "it has no pixels")
    image.load()
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        image = ImageOps.exif_transpose(image) if turned else image
    except Exception:  # an EXIF block that cannot be read turns nothing
        pass
    if image.mode in ("I", "F") or sixteen:
        return _eight_bits(image, sixteen, name)
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        picture = image.convert("LA").convert("RGBA") if grey else image.convert("RGBA")
        white = Image.new("RGBA", image.size, (BACKGROUND, BACKGROUND, BACKGROUND, 255))
        return Image.alpha_composite(white, picture).convert("L" if grey else "RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _eight_bits(image: Image.Image, sixteen: bool, name: str) -> Image.Image:
    """A grey image of more than 8 bits, scaled from its range to 0..255."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise BadSample(name, "it holds NaN or infinite pixels")
    low, high = min(values.min(), 0.0), values.max()
    if sixteen:
        low, high = 0.0, 65535.0
    elif low == 0:
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        high = next((r for r in ranges if high <= r), high)
    grey = (values - low) / max(high - low, 1e-30) * 255
    if image.info.get("transparency") is not None:
        grey = np.where(values == image.info["transparency"], BACKGROUND, grey)
    return Image.fromarray(np.rint(grey).clip(0, 255).astype(np.uint8))


def fit(image: Image.Image, size: int) -> Image.Image:
    """The central square of an image at `size` pixels."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def square(raw: Any, size: int, mode: str) -> Image.Image:
    """An image as a tokenizer takes it: as a viewer shows it, of that size, in mode L or RGB. Raises ValueError."""
    image = read_image(raw, name="image tokenizer")
    if image.size != (size, size):
        raise ValueError(f"image tokenizer: expected {size}x{size} pixels, got {image.width}x{image.height}")
    return image.convert(mode)
