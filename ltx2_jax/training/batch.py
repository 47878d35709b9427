"""What a train step is given: a global batch of clips, its rows over the data axis.

With B rows, F' H' W' latent frames, rows, columns; A M audio latents, mel bins; C channels; S text
tokens; Dv Da widths of the text features for video and audio:

    video       float   [B, F', H', W', C]
    audio       float   [B, A, M, C]
    fps         float32 [B]                 frames per second
    video_text  float   [B, S, Dv]          before the connectors, left padded
    audio_text  float   [B, S, Da]          absent where audio receives those of video
    text_mask   bool    [B, S]              True where there is a token

and where a condition of the run reads them, with F" H" W" and A' of a reference:

    video_mask            bool or float [B, F', H', W']   given where True, or above 0.5
    audio_mask            bool or float [B, A]
    video_reference       float   [B, F", H", W", C]      another grid, see `conditioning`
    video_reference_fps   float32 [B]                     absent: fps over the temporal factor
    audio_reference       float   [B, A', M, C]

and where not every sample has both streams (zeros stand for one that it has not):

    has_video, has_audio  bool    [B]

A stream that is absent from a run need not be in its batches. The text fields
(`models.ltx2.TEXT_FIELDS`) without their first axis are those of one caption.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ltx2_jax.config import Config
from ltx2_jax.data.order import Kind
from ltx2_jax.data.schema import Field
from ltx2_jax.sharding import sharding_of

Batch = dict[str, Array]


def place(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> Batch:
    """The rows of a host, `hosts.rows_of_host`, -> global arrays, rows over the data axis."""
    return {
        name: jax.make_array_from_process_local_data(
            sharding_of(mesh, "batch", *[None] * (value.ndim - 1)), value
        )
        for name, value in batch.items()
        if name != "id"
    }


def batches_of(
    kinds: Sequence[Kind], mesh: jax.sharding.Mesh
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """What `place` gives of every kind of batches: shapes, dtypes and shardings."""

    def shape(field: Field, rows: int) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(field.dtype)
        sharding = sharding_of(mesh, "batch", *[None] * len(field.shape))
        return jax.ShapeDtypeStruct((rows, *field.shape), dtype, sharding=sharding)

    return [
        {
            name: shape(field, kind.batch_size)
            for name, field in kind.bucket.fields.items()
            if field.dtype != "str" and name != "id"
        }
        for kind in kinds
        if kind.bucket is not None
    ]


def abstract_batch(
    config: Config,
    video_shape: tuple[int, int, int],  # F', H', W'
    audio_shape: tuple[int, int],  # A, M
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of clips of one size, of the size that `config` says.

    References are as large as the clips.
    """
    bins = audio_shape[1]
    clips = {
        "video": (*video_shape, config.model.in_channels),
        "audio": (*audio_shape, config.model.audio_in_channels // bins),
    }
    shapes, size = {"fps": ()}, config.data.batch_size
    for name in config.flow.streams:
        shapes[name] = clips[name]
        for what in config.flow.conditions(name):
            if what.kind == "mask":
                shapes[f"{name}_mask"] = video_shape if name == "video" else audio_shape[:1]
            elif what.kind == "reference":
                shapes[f"{name}_reference"] = clips[name]
    fields = {k: jax.ShapeDtypeStruct((size, *x), jnp.float32) for k, x in shapes.items()}
    return fields | abstract_text(config, size)


def abstract_text(config: Config, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The text fields of so many captions."""
    text = config.text
    if text.release == "random":
        shared = text.encoder.audio_dim is None
    else:
        shared = text.release == "2.0"
    widths: dict[str, Any] = {"video_text": text.video_connector.width}
    if not shared:
        widths["audio_text"] = text.audio_connector.width
    fields = {
        name: jax.ShapeDtypeStruct((rows, text.length, width), jnp.bfloat16)
        for name, width in widths.items()
    }
    return fields | {"text_mask": jax.ShapeDtypeStruct((rows, text.length), jnp.bool)}
