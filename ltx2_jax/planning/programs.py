"""The train step and the sampler as they run, traced for a mesh whose devices need not exist."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ltx2_jax.config import Config
from ltx2_jax.data.mixtures import merged
from ltx2_jax.data.records import read_schema
from ltx2_jax.data.schema import BucketFields, Field, Schema
from ltx2_jax.diffusion import geometry
from ltx2_jax.errors import UserError
from ltx2_jax.models import ltx2
from ltx2_jax.sampling.pipeline import ClipSize
from ltx2_jax.sampling.programs import Request, make_sampler, released_passes
from ltx2_jax.sharding import abstract_state, batch_shards, sharding_of
from ltx2_jax.training import checks, films, initial
from ltx2_jax.training.batch import abstract_batch, abstract_text
from ltx2_jax.training.examples import batch_size
from ltx2_jax.training.state import State, init_state
from ltx2_jax.training.step import make_train_step

STRIDES, AUDIO_BINS, AUDIO_RATE = (8, 32, 32), 16, 25  # of the released codecs
DEFAULT_SIZE = ClipSize(121, 704, 1280, 24.0)


# ------------------------------------------------------------------------------------------ shapes


def request_of(config: Config, **given: int | None) -> Request:
    """The latents of one clip: of `given` num_frames, height, width, else as the config's data.

    Sizes that are not given are the largest of the datasets that the config names, as far as they
    are here, of the synthetic clips if it names none, the largest of `data.films.buckets`, else 121
    frames of 1280x704.

    Raises:
      UserError: a size that the codec cannot encode; a dataset or a codec whose latents or text
        features the model does not take.
    """
    codec, synthetic = config.data.codec, config.data.synthetic
    checks.check_text(config)
    schema = _schema(config)
    if not config.data.folders:
        checks.check_codec(config)
        size = ClipSize(synthetic.num_frames, synthetic.height, synthetic.width, synthetic.fps)
        strides, bins = codec.video_strides, 1
        rate = codec.mel.sample_rate / (codec.mel.hop * codec.mel_frames_per_latent)
    else:
        size, strides, bins, rate = DEFAULT_SIZE, STRIDES, AUDIO_BINS, AUDIO_RATE
        if (given_films := config.data.films).buckets is not None:
            largest = max(films.sizes(given_films, STRIDES), key=math.prod)
            size = ClipSize(*largest, given_films.fps or DEFAULT_SIZE.fps)
    if schema is not None:
        if "video" in schema.fields:
            size = ClipSize(schema.num_frames, schema.height, schema.width, schema.fps)
            frames, rows, columns, _ = schema.fields["video"].shape
            first = (size.num_frames - 1) // max(1, frames - 1)
            strides = (first or strides[0], size.height // rows, size.width // columns)
        if "audio" in schema.fields:
            length, bins, _ = schema.fields["audio"].shape
            if schema.release == "linear" or "video" not in schema.fields:
                rate = length / (size.num_frames / size.fps)
    elif config.model.audio_in_channels % bins:
        raise UserError(
            f"model.audio_in_channels={config.model.audio_in_channels} is not a multiple of the "
            f"{bins} bins of audio latents"
        )
    size = dataclasses.replace(size, **{k: v for k, v in given.items() if v is not None})
    return Request(
        video_shape=geometry.video_latent_shape(size.num_frames, size.height, size.width, strides),
        audio_length=geometry.audio_latent_length(size.num_frames, size.fps, rate),
        audio_bins=bins,
        strides=strides,
        fps=size.fps,
    )


def _schema(config: Config) -> Schema | None:
    """Of the datasets that are given, as far as they are here; None if none is."""
    schemas = {folder: read_schema(folder) for folder, _ in config.data.folders
               if Path(folder).is_dir()}  # fmt: skip
    for folder, schema in schemas.items():
        checks.check_schema(config, schema, Path(folder), whole=not config.data.mixture)
    return merged(list(schemas.values())) if schemas else None


def for_clips(config: Config, request: Request) -> Config:
    """`config` with the batch size that `data.batch_tokens` gives clips of one size.

    Raises:
      UserError: it gives them none.
    """
    if config.data.batch_tokens is None:
        return config
    video, audio = Field("float32", request.video_shape), Field("float32", (request.audio_length,))
    fields = {"video": video, "audio": audio, "video_reference": video, "audio_reference": audio}
    clips = BucketFields(*pixels_of(request), request.fps, fields)
    data = dataclasses.replace(config.data, batch_size=batch_size(config)(clips), batch_tokens=None)
    return dataclasses.replace(config, data=data)


def pixels_of(request: Request) -> tuple[int, int, int]:
    """(frames, height, width) of a clip."""
    frames, *grid = request.video_shape
    return ((frames - 1) * request.strides[0] + 1,
            *(n * stride for n, stride in zip(grid, request.strides[1:], strict=True)))  # fmt: skip


def check(config: Config, request: Request, mesh: jax.sharding.Mesh) -> None:
    """UserError unless the mesh divides the attention heads and the video tokens."""
    checks.check_mesh(config.model.num_heads, math.prod(request.video_shape), mesh)


# ---------------------------------------------------------------------------------------- training


def train_state(config: Config, mesh: jax.sharding.Mesh) -> State:
    """Shapes, dtypes and shardings of the train state."""
    key = jax.eval_shape(jax.random.key, 0)
    return abstract_state(partial(init_state, config=config), key, mesh=mesh)


def train_program(
    config: Config, request: Request, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Lowered, State]:
    """The step of `train` for one batch of clips, and its state.

    Raises:
      UserError: the mesh does not divide batch, heads or tokens, or weights cannot be split so.
    """
    batch, null_text = train_inputs(config, request, mesh)
    state, frozen = train_state(config, mesh), initial.frozen_homes(config, mesh)
    with jax.set_mesh(mesh):
        step = make_train_step(config, request.strides)
        return step.lower(state, batch, null_text, *([frozen] if frozen else [])), state


def train_inputs(
    config: Config, request: Request, mesh: jax.sharding.Mesh
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
    """A batch of clips and the text fields of the empty caption, as `train` places them.

    Raises:
      UserError: the mesh does not divide batch, heads or tokens.
    """
    checks.check_batch(config, mesh)
    check(config, request, mesh)
    fields = abstract_batch(config, request.video_shape, (request.audio_length, request.audio_bins))
    batch = {name: _on(mesh, x, "batch") for name, x in fields.items()}
    null_text = {
        name: _on(mesh, jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
        for name, x in abstract_text(config, 1).items()
    }
    return batch, null_text


# ---------------------------------------------------------------------------------------- sampling


def sample_program(
    config: Config,
    request: Request,
    mesh: jax.sharding.Mesh,
    *,
    batch: int,
    passes: int,
    steps: int,
    quantize: str | None = None,
) -> tuple[jax.stages.Lowered, Any]:
    """Text features to clean latents of `batch` clips, and the weights, quantised or not.

    One pass is that under the prompt, two are with that without a prompt, four those of the
    released pipelines.

    Raises:
      UserError: the mesh does not divide passes, heads or tokens, or weights cannot be split so.
    """
    check(config, request, mesh)
    check_passes(batch, passes, mesh)
    networks = dataclasses.replace(config.networks, quantized=quantize)
    params = ltx2.abstract_params(networks, mesh, for_sampling=True)

    others = released_passes(config.model.num_layers)[: passes - 1]
    number = jax.ShapeDtypeStruct((), jnp.float32)
    given = (
        tuple(abstract_text(config, rows) for rows in (batch, 1)),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.eval_shape(jax.random.key, 0),
        jax.ShapeDtypeStruct((steps + 1,), jnp.float32),
        ((number, number),) * len(others),
    )
    given = jax.tree.map(partial(_on, mesh), given)
    with jax.set_mesh(mesh):
        static = {"graphdef": ltx2.graph(networks), "request": request, "passes": others}
        return make_sampler().lower(params, *given, **static), params


def check_passes(batch: int, passes: int, mesh: jax.sharding.Mesh) -> None:
    """UserError unless the passes of all clips fill the shards of the batch."""
    data, shards, rows = mesh.shape["data"], batch_shards(mesh), batch * passes
    if rows % shards:
        slices = f"{shards // data} slices x " if shards > data else ""
        sizes = ", ".join(str(n) for n in range(1, mesh.size + 1) if rows % n == mesh.size % n == 0)
        raise UserError(
            f"mesh: {slices}data={data} does not divide {batch} clip{'s'[: batch > 1]} x {passes} "
            f"pass{'es'[: 2 * (passes > 1)]}; sizes that do: {sizes}"
        )


def _on(mesh: jax.sharding.Mesh, x: jax.ShapeDtypeStruct, *names: str) -> jax.ShapeDtypeStruct:
    """`x` on a mesh, its first axes split as `names` say, the others whole."""
    where = sharding_of(mesh, *names, *[None] * (x.ndim - len(names)))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
