"""Moving pictures for pages that play no films: an animated GIF, without sound."""

import io
import math

import numpy as np

FASTEST = 50  # frames a second that browsers show


def gif(video: np.ndarray, fps: float, longest: int = 384) -> tuple[bytes, int, int]:
    """A GIF that repeats for ever, its height and its width.

    Its times are hundredths of a second: every frame begins at the nearest one, so that the whole
    lasts as long as the clip. Frames that equal the one before them are shown as one.

    Args:
      video: uint8 [F, H, W, 3], at least one frame.
      fps: frames a second; of more than 50 every second, third, ... is shown.
      longest: pixels of the longer side, to which what is larger is made smaller.
    """
    from PIL import Image

    stride = max(1, math.ceil(fps / FASTEST))
    height, width = video.shape[1:3]
    share = min(1.0, longest / max(height, width))
    size = max(1, round(width * share)), max(1, round(height * share))
    images = [Image.fromarray(frame) for frame in video[::stride]]
    if share < 1:
        images = [image.resize(size, Image.Resampling.BOX) for image in images]
    begins = np.rint(np.arange(len(images) + 1) * stride * 100 / fps)
    durations = [10 * int(hundredths) for hundredths in np.diff(begins)]
    file, (first, *others) = io.BytesIO(), images
    first.save(file, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return file.getvalue(), size[1], size[0]
