"""The fields of a run's configuration that say what is made of films."""

import math
from dataclasses import dataclass

from ltx2_jax.errors import UserError
from ltx2_jax.fields import check_least


@dataclass(frozen=True)
class FilmsConfig:
    """Of films that are trained on as they are: what `prepare` has as flags of these names.

    The codec is that of `codec`, one file or those of its two halves, or of the checkpoint of the
    text encoder.
    """

    buckets: str | None = None  # sizes of clips, such as "768x512x49,512x768x49"
    # Gemma, whose checkpoint is init_from; or a released checkpoint and its Gemma.
    text_encoder: str | tuple[str, ...] | None = None
    codec: str | tuple[str, ...] | None = None
    fps: float | None = None
    stride: int | None = None
    incomplete: bool = False
    trigger: str | None = None

    def __post_init__(self):
        if self.stride is not None:
            check_least(self, stride=1)
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise UserError(f"fps={self.fps} must be above 0")
