"""Decoded frames of libav as they are meant to be seen: upright, square pixels, BT.709 colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from ltx2_jax.errors import UserError
from ltx2_jax.media.colour import UNSPECIFIED, conversion, matrix_of

ALMOST_SQUARE = Fraction(1, 4), Fraction(4)  # pixel shapes that are no mistake


def to_rgb(
    frame: Any,
    size: tuple[int, int] | None,
    pixel_shape: Fraction | None,
    converter: Any,
) -> tuple[np.ndarray, str | None]:
    """A frame of PyAV -> uint8 [H, W, 3], upright, and what the user is told about its colours.

    size: (height, width) to cover and to crop to, in the middle; None keeps the size as it is
    shown. pixel_shape: width of a pixel by its height; None is a square one. converter: PyAV's
    VideoReformatter, one for all frames of a film.

    Raises UserError for a meaning of its numbers that we do not know.
    """
    codes = int(frame.color_primaries), int(frame.color_trc)
    if frame.side_data.get("DOVI_METADATA") is not None and codes[1] == UNSPECIFIED:
        raise UserError("Dolby Vision with colours that only its own players know (profile 5)")
    convert = conversion(*codes)
    is_rgb = frame.format.is_rgb
    matrix = None if is_rgb else matrix_of(int(frame.colorspace), *codes)
    transposed, flips = orientation(frame)
    shown = frame.height, shown_width(frame.width, pixel_shape)
    if size is None:
        full = shown
    else:
        upright = shown[::-1] if transposed else shown
        scale = max(size[0] / upright[0], size[1] / upright[1])
        full = tuple(max(size[i], round(upright[i] * scale)) for i in (0, 1))
        full = full[::-1] if transposed else full
    deep = frame.format.components[0].bits > 8
    image = converter.reformat(
        frame,
        width=full[1],
        height=full[0],
        # Planes: libav's short cut from deep pictures to rgb24 makes them darker by two levels,
        # and that to rgb48 had a fault in its version 8.0. Scaled ones take half the time for the
        # same numbers.
        format="gbrp16le" if convert else "gbrp" if deep or size else "rgb24",
        src_colorspace=matrix,
        interpolation="BICUBIC" if size or shown[1] != frame.width else None,
    ).to_ndarray()
    image = (np.swapaxes(image, 0, 1) if transposed else image)[flips]
    if size is not None:
        top, left = ((image.shape[i] - size[i]) // 2 for i in (0, 1))
        image = image[top : top + size[0], left : left + size[1]]
    if convert is not None:
        return convert(image), convert.note
    return np.ascontiguousarray(image), None


def with_colours(frames: Iterable[Any], context: Any) -> Iterator[Any]:
    """Frames of PyAV; where they do not say what their colours mean, the container's word holds.

    context: of their decoder, which knows that word until it decodes the first frame.
    """
    unsaid = {"color_primaries": 2, "color_trc": 2, "colorspace": 2, "color_range": 0}
    said = {name: int(getattr(context, name)) for name in unsaid}
    for frame in frames:
        for name, value in said.items():
            if int(getattr(frame, name)) == unsaid[name] != value:
                setattr(frame, name, value)
        yield frame


def orientation(frame: Any) -> tuple[bool, tuple[slice, slice]]:
    """Whether rows and columns change places, and then the flips of both, as the file wants it.

    Its display matrix, rows (a, b, u), (c, d, v), ..., puts what is at (x, y) to
    (a x + c y, b x + d y). Turns that are no multiple of 90 degrees become the nearest one.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, (slice(None), slice(None))
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].astype(np.int64)
    transposed = bool(abs(b) + abs(c) > abs(a) + abs(d))
    right, down = (c, b) if transposed else (a, d)
    return transposed, tuple(slice(None, None, -1 if sign < 0 else 1) for sign in (down, right))


def shown_width(width: int, pixel_shape: Fraction | None) -> int:
    """Pixels; an even number where it is not the stored one, as mp4 wants it."""
    if not pixel_shape or pixel_shape == 1:
        return width
    if not ALMOST_SQUARE[0] <= pixel_shape <= ALMOST_SQUARE[1]:
        raise UserError(f"its pixels are {float(pixel_shape):.3g} times as wide as high")
    return max(2, 2 * round(width * pixel_shape / 2))


def covering(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Images [..., H, W, 3] scaled to cover a size, and cropped to it in the middle; float32.

    Bilinear between the centres of pixels, without a filter before, as the released pipelines scale
    images that a clip begins with. Values keep their range.
    """
    rows, columns = images.shape[-3:-1]
    scale = max(height / rows, width / columns)
    # An exact product must not be rounded up to the next pixel.
    full = [math.ceil(round(size * scale, 6)) for size in (rows, columns)]
    x = images.astype(np.float32)
    for axis, wanted, size in ((-3, height, full[0]), (-2, width, full[1])):
        first = (size - wanted) // 2
        x = _interpolated(x, axis, size, slice(first, first + wanted))
    return x


def _interpolated(x: np.ndarray, axis: int, size: int, part: slice) -> np.ndarray:
    """`part` of what an axis is, scaled to `size`."""
    old = x.shape[axis]
    if old == size:
        index = [slice(None)] * x.ndim
        index[axis] = part
        return x[tuple(index)]
    at = (np.arange(part.start, part.stop, dtype=np.float64) + 0.5) * (old / size) - 0.5
    at = np.clip(at, 0, old - 1)
    low = np.minimum(at.astype(int), old - 1)
    share = (at - low).astype(np.float32).reshape(-1, *[1] * (-axis - 1))
    high = np.minimum(low + 1, old - 1)
    return np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
