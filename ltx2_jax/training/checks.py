"""What can be refused before any long work: configs, meshes and data that do not fit each other.

And, at the end, a run that is lost.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import jax

from ltx2_jax.config import Config
from ltx2_jax.data.records import Records, open_records, read_schema
from ltx2_jax.data.schema import BucketFields, Schema
from ltx2_jax.diffusion.geometry import video_latent_shape
from ltx2_jax.errors import UserError
from ltx2_jax.fields import difference
from ltx2_jax.media.media import check_even
from ltx2_jax.training import checkpoint, initial, objective


def before_work(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses a run that cannot be, in this order, before any of its work.

    The config alone, the config and its dataset, the config and the checkpoint of its workdir.

    Raises:
      UserError: the first thing that does not fit, and what it does not fit to.
    """
    check_batch(config, mesh)
    check_text(config)
    if config.data.path is None:
        check_synthetic(config, mesh)
    else:
        check_records(config, open_records(config.data.path), mesh)
    stored = checkpoint.stored_config(config.workdir)
    if stored is not None:
        check_same_run(config, stored, Path(config.workdir))
    if stored is None or stored.init_from is None or config.tune is not None:
        initial.check(config)


def check_mesh(heads: int, video_tokens: int, mesh: jax.sharding.Mesh) -> None:
    """UserError unless the mesh divides the attention heads and the video tokens of a clip."""
    for axis, count, things in (
        ("model", heads, "attention heads"),
        ("sequence", video_tokens, "video tokens of a clip"),
    ):
        if count % mesh.shape[axis]:
            sizes = ", ".join(
                str(n) for n in range(1, mesh.size + 1) if count % n == mesh.size % n == 0
            )
            raise UserError(
                f"mesh: {axis}={mesh.shape[axis]} does not divide {count} {things}; "
                f"sizes that do: {sizes}"
            )


def check_batch(config: Config, mesh: jax.sharding.Mesh) -> None:
    """UserError unless the mesh and the micro-batches divide the batch."""
    data, chunks = mesh.shape["data"], config.optim.accumulate_steps
    if config.data.batch_size % (data * chunks):
        raise UserError(
            f"data.batch_size={config.data.batch_size} is not a multiple of mesh.data={data} x "
            f"optim.accumulate_steps={chunks}"
        )


def check_text(config: Config) -> None:
    """UserError unless text features fit the connectors, and these the transformer."""
    text, model, encoder = config.text, config.model, config.text.encoder
    if config.data.path is None and config.data.release != "linear":
        raise UserError(
            f"data.release={config.data.release!r}: synthetic clips have latents of a 'linear' "
            "codec; data.path names a dataset with others"
        )
    if config.data.path is None and text.release != "random":
        raise UserError(
            f"text.release={text.release!r}: synthetic clips have 'random' text features; "
            "data.path names a dataset with others"
        )
    for stream, context in (("video", "context_dim"), ("audio", "audio_context_dim")):
        width = getattr(text, f"{stream}_connector").width
        connector = f"text.{stream}_connector is {width} wide (num_heads x head_dim)"
        # The 2.0 model projects its context itself, from one width for both streams.
        context = "caption_channels" if model.caption_channels else context
        if getattr(model, context) != width:
            raise UserError(f"{connector}, but model.{context}={getattr(model, context)}")
        features = getattr(encoder, f"{stream}_dim") or encoder.video_dim
        if config.data.path is None and features != width:
            raise UserError(f"{connector}, but text.encoder.{stream}_dim={features}")


def check_synthetic(config: Config, mesh: jax.sharding.Mesh) -> None:
    """UserError unless model and mesh fit the clips that are yet to be rendered and encoded."""
    check_codec(config)
    clips, strides = config.data.synthetic, config.data.codec.video_strides
    shape = video_latent_shape(clips.num_frames, clips.height, clips.width, strides)
    check_mesh(config.model.num_heads, math.prod(shape), mesh)


def check_codec(config: Config) -> None:
    """UserError unless the model has the channels of the codec that is yet to be fitted."""
    codec, model = config.data.codec, config.model
    for ours, theirs in (
        ("in_channels", "video_channels"),
        ("audio_in_channels", "audio_channels"),
    ):
        if getattr(model, ours) != getattr(codec, theirs):
            raise UserError(
                f"model.{ours}={getattr(model, ours)} is not "
                f"data.codec.{theirs}={getattr(codec, theirs)}"
            )


def check_records(config: Config, records: Records, mesh: jax.sharding.Mesh) -> None:
    """UserError unless the records fit the model's channels and text, and the mesh their tokens."""
    check_schema(config, records.schema, records.folder)
    for bucket in records.schema.buckets:
        for name in ("video", "video_reference"):
            if name in bucket.fields and "video" in config.flow.streams:
                *grid, _ = bucket.fields[name].shape
                check_mesh(config.model.num_heads, math.prod(grid), mesh)


def check_schema(config: Config, schema: Schema, folder: Path) -> None:
    """UserError unless the records of a dataset fit the model's channels and text."""
    model, streams = config.model, config.flow.streams
    factors = set()
    for bucket in schema.buckets:
        shapes = {name: field.shape for name, field in bucket.fields.items()}
        try:
            objective.check_fields(config.flow, shapes, strides_of(bucket))
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        factors.add(objective.reference_factors(config.flow, shapes))
        if "video" in streams:  # what is learned is written as mp4
            check_even(bucket.height, bucket.width, str(folder))
    if len(factors) > 1:
        raise UserError(
            f"{folder}: references of several factors (space, time), {sorted(factors)}: a model "
            "learns one"
        )
    ranks = {"video": (None,) * 4, "audio": (None,) * 3}
    schema.require(folder, **{name: ranks[name] for name in streams})
    if schema.release != config.data.release:
        raise UserError(
            f"{folder}: its latents are those of {schema.release!r}, this model is for those of "
            f"data.release={config.data.release!r}"
        )
    for name, axes, wanted in (("video", 1, "in_channels"), ("audio", 2, "audio_in_channels")):
        if name in streams:
            shape, ours = schema.fields[name].shape, getattr(model, wanted)
            channels = math.prod(shape[-axes:])
            if channels != ours:
                raise UserError(
                    f"{folder}: latents have {channels} {name} channels, but model.{wanted}={ours}"
                )
    text = config.text
    schema.require(
        folder,
        text="features",
        text_release=text.release,
        video_text=(text.length, text.video_connector.width),
        text_mask=(text.length,),
    )
    audio = "audio_text" if "audio_text" in schema.fields else "video_text"
    schema.require(folder, **{audio: (text.length, text.audio_connector.width)})


def strides_of(bucket: BucketFields) -> tuple[int, int, int]:
    """Pixels behind one video latent of a clip: frames (not known here: 1), rows, columns."""
    if "video" not in bucket.fields:
        return 1, 1, 1
    _, rows, columns, _ = bucket.fields["video"].shape
    return 1, bucket.height // rows, bucket.width // columns


def check_same_makers(records: Records, assets: Path) -> None:
    """UserError unless the records' latents and features are of the kind trained on so far."""
    schema = read_schema(assets)
    records.require(codec_hash=schema.codec_hash, text_encoder_hash=schema.text_encoder_hash)


def check_same_run(config: Config, stored: Config, workdir: Path) -> None:
    """UserError if the checkpoint's weights, moments or examples are not those of this config."""
    changed = difference(stored, config)
    bound = ("model.", "text.", "seed", "data.batch_size", "data.synthetic", "data.codec", "tune")
    bound += ("optim.optimizer", "optim.first_moment_dtype")
    free = ("model.remat", "model.dtype", "model.attention", "tune.rates", "tune.resident")
    refused = [line for line in changed if line.startswith(bound) and not line.startswith(free)]
    if (config.optim.ema_decay is None) != (stored.optim.ema_decay is None):
        refused.append("optim.ema_decay is given in one of them only")
    if stored.init_from is not None and config.init_from not in (None, stored.init_from):
        refused.append(
            f"init_from: {stored.init_from!r} -> {config.init_from!r}; leave it out to go on"
        )
    if refused:
        raise UserError(
            f"{workdir} holds a checkpoint of another config ({'; '.join(refused)}): "
            "choose another --config.workdir"
        )
    for line in changed:
        print(f"changed since the checkpoint: {line}")


def check_finite(values: Mapping[str, float], step: int, start: int, checkpoints: Path) -> None:
    """UserError if loss or gradients at `step` of a run from step `start` are not finite."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise diverged(f"{name} is {values[name]}", step, start, checkpoints)


def diverged(what: str, step: int, start: int, checkpoints: Path) -> UserError:
    """What to do about a run from step `start`, kept in `checkpoints`, that is lost at `step`."""
    if start and step == start + 1:
        return UserError(
            f"{what} at step {step}, the first from the checkpoint: remove "
            f"{checkpoints / str(start)}, and the same command goes on from the one before"
        )
    return UserError(
        f"{what} at step {step}: lower optim.learning_rate or optim.clip_norm; the same command "
        "goes on from the last checkpoint"
    )
