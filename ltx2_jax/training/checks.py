"""What can be refused before any long work: configs, meshes and data that do not fit each other.

And, at the end, a run that is lost.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from ltx2_jax import hosts
from ltx2_jax.config import Config
from ltx2_jax.data.mixtures import Dataset, Mixture, index_of, open_datasets, sources_of
from ltx2_jax.data.records import read_schema
from ltx2_jax.data.schema import BucketFields, Schema
from ltx2_jax.diffusion.geometry import video_latent_shape
from ltx2_jax.errors import DivergedError, UserError
from ltx2_jax.fields import difference, flat
from ltx2_jax.media.media import check_even
from ltx2_jax.sharding import batch_shards
from ltx2_jax.training import examples, housekeeping, initial, objective, runs


def before_work(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses a run that cannot be, in this order, before any of its work.

    The config and its dataset, the config and the checkpoint of its workdir. The config by itself
    was asked before (`check_alone`).

    Raises:
      UserError: the first thing that does not fit, and what it does not fit to.
    """

    def fits() -> None:
        if not config.data.folders:
            check_synthetic(config, mesh)
            return
        check_data(config, mesh)

    # One after the other: Orbax, which reads the stored config, waits for all hosts itself.
    hosts.agree(fits)
    stored = hosts.agree(lambda: runs.stored_config(config.workdir))
    if stored is not None:
        hosts.agree(lambda: check_same_run(config, stored, config.workdir))
    if stored is None or stored.init_from is None or config.tune is not None:
        hosts.agree(lambda: initial.check(config))


def check_alone(config: Config, mesh: jax.sharding.Mesh) -> None:
    """UserError unless the config fits itself and the mesh, whatever the data are.

    To be asked before datasets are copied from buckets, or captions of films encoded.
    """
    check_batch(config, mesh)
    if config.check.sdc_every and mesh.devices.flat[0].platform != "tpu":
        raise UserError("check.sdc_every: the checker is the TPU compiler's; no TPU is here")
    check_text(config)


def check_data(config: Config, mesh: jax.sharding.Mesh) -> None:
    """UserError unless the datasets that are given fit the run and each other."""
    data = open_datasets(config.data.folders)
    for records in sources_of(data):
        check_records(config, records, mesh, whole=not config.data.mixture)
        if len(records):
            records[0]
    if config.data.mixture:
        check_schema(config, data.schema, "data.mixture")
    examples.Examples(config, data, mesh)  # every size has a batch


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
    shards = batch_shards(mesh)
    if config.data.batch_size % (shards * chunks):
        slices = f"{shards // data} slices x " if shards > data else ""
        raise UserError(
            f"data.batch_size={config.data.batch_size} is not a multiple of {slices}"
            f"mesh.data={data} x optim.accumulate_steps={chunks}"
        )


def check_text(config: Config) -> None:
    """UserError unless text features fit the connectors, and these the transformer."""
    text, model, encoder = config.text, config.model, config.text.encoder
    made = not config.data.folders
    if made and config.data.release != "linear":
        raise UserError(
            f"data.release={config.data.release!r}: synthetic clips have latents of a 'linear' "
            "codec; data.path names a dataset with others"
        )
    if made and text.release != "random":
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
        if made and features != width:
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


def check_records(
    config: Config, records: Dataset, mesh: jax.sharding.Mesh, whole: bool = True
) -> None:
    """UserError unless the records fit the model's channels and text, and the mesh their tokens."""
    check_schema(config, records.schema, records.folder, whole)
    for bucket in records.schema.buckets:
        for name in ("video", "video_reference"):
            if name in bucket.fields and "video" in config.flow.streams:
                *grid, _ = bucket.fields[name].shape
                check_mesh(config.model.num_heads, math.prod(grid), mesh)


def check_schema(config: Config, schema: Schema, folder: Path | str, whole: bool = True) -> None:
    """UserError unless the records of a dataset fit the model's channels and text.

    One that is not the `whole`, but a part of a mixture, may lack a stream that others have.
    """
    factors = set()
    for bucket in schema.buckets:
        shapes = {name: field.shape for name, field in bucket.fields.items()}
        flow = objective.flow_of(config.flow, shapes)
        try:
            objective.check_fields(flow, shapes, strides_of(bucket))
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        if "video" in flow.streams:
            factors.add(objective.reference_factors(flow, shapes))
            check_even(bucket.height, bucket.width, str(folder))  # what is learned becomes mp4
        check_channels(config, {name: shapes[name] for name in flow.streams}, folder)
    if len(factors) > 1:
        raise UserError(
            f"{folder}: references of several factors (space, time), {sorted(factors)}: a model "
            "learns one"
        )
    held = {name for bucket in schema.buckets for name in bucket.fields}
    missing = [name for name in config.flow.generated if name not in held]
    if whole and missing:
        raise UserError(
            f"{folder}: flow.{missing[0]}.role=generated: there is no {missing[0]} in its records"
        )
    if schema.release != config.data.release:
        raise UserError(
            f"{folder}: its latents are those of {schema.release!r}, this model is for those of "
            f"data.release={config.data.release!r}"
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


def check_channels(
    config: Config, shapes: Mapping[str, tuple[int, ...]], folder: Path | str
) -> None:
    """UserError unless latents of these shapes, by stream, have the model's channels."""
    kinds = {"video": (4, 1, "in_channels"), "audio": (3, 2, "audio_in_channels")}
    for name, shape in shapes.items():
        rank, axes, wanted = kinds[name]
        ours = getattr(config.model, wanted)
        if len(shape) != rank:
            raise UserError(f"{folder}: {name} is {shape!r}, {rank} axes are needed")
        if (channels := math.prod(shape[-axes:])) != ours:
            raise UserError(
                f"{folder}: latents have {channels} {name} channels, but model.{wanted}={ours}"
            )


def strides_of(bucket: BucketFields) -> tuple[int, int, int]:
    """Pixels behind one video latent of a clip: frames (not known here: 1), rows, columns."""
    if "video" not in bucket.fields:
        return 1, 1, 1
    _, rows, columns, _ = bucket.fields["video"].shape
    return 1, bucket.height // rows, bucket.width // columns


def check_same_makers(records: Dataset, assets: Path) -> None:
    """UserError unless the records' latents and features are of the kind trained on so far."""
    schema = read_schema(assets)
    records.require(codec_hash=schema.codec_hash, text_encoder_hash=schema.text_encoder_hash)


def check_same_run(config: Config, stored: Config, workdir: str | Path) -> None:
    """UserError if the checkpoint's weights, moments or examples are not those of this config."""
    changed = difference(stored, config)
    bound = ("model.", "text.", "seed", "data.batch_", "data.synthetic", "data.codec", "tune")
    bound += ("optim.optimizer", "optim.first_moment_dtype")
    free = ("model.remat", "model.dtype", "model.attention", "tune.rates", "tune.resident")
    refused = [line for line in changed if line.startswith(bound) and not line.startswith(free)]
    if (config.optim.ema_decay is None) != (stored.optim.ema_decay is None):
        refused.append("optim.ema_decay is given in one of them only")
    # Frozen weights are told by their numbers, wherever they lie: see `initial.tied`.
    elsewhere = config.tune is None and config.init_from not in (None, stored.init_from)
    if stored.init_from is not None and elsewhere:
        refused.append(
            f"init_from: {stored.init_from!r} -> {config.init_from!r}; leave it out to go on"
        )
    if refused:
        raise UserError(
            f"{workdir} holds a checkpoint of another config ({'; '.join(refused)}): "
            "choose another --config.workdir"
        )
    for line in changed:
        hosts.say(f"changed since the checkpoint: {line}")


# ------------------------------------------------------------------------------- several hosts


def same_run_everywhere(config: Config) -> None:
    """UserError unless all hosts run the same code on the same config and devices."""
    if hosts.count() == 1:
        return
    values = {f"config.{k}": repr(v) for k, v in flat(dataclasses.asdict(config)).items()}
    # First what is known without devices: another version may not find any.
    values |= {
        "the code of ltx2_jax": _code_hash(),
        "the version of Python": sys.version.split()[0],
    }
    for package in ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            values[f"the version of {package}"] = metadata.version(package)
    for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        values[variable] = " ".join(os.environ.get(variable, "").split()) or "not set"
    hosts.same_everywhere(values)
    kinds = sorted({device.device_kind for device in jax.local_devices()})
    hosts.same_everywhere({"the devices": f"{jax.local_device_count()} of {', '.join(kinds)}"})


def _code_hash() -> str:
    """Of all Python files of the package."""
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def same_dataset(data: Dataset) -> None:
    """UserError unless all hosts read the same index and shards of the same size."""
    if hosts.count() == 1:
        return
    values, several = {}, isinstance(data, Mixture)
    for records in sources_of(data):
        what = str(records.folder) if several else "the dataset"
        index = hashlib.sha256(index_of(records)).hexdigest()
        values[f"the index of {what}"] = index[:16]
        for path in sorted(records.folder.iterdir()):
            if path.suffix == ".arrayrecord":
                name = str(path) if several else path.name
                values[f"the size of {name}"] = str(path.stat().st_size)
    hosts.same_everywhere(values)


# ------------------------------------------------------------------------------- while it runs


class Health:
    """Watches the steps of a run: finite on all, and the same on all hosts."""

    def __init__(self, config: Config, start: int, checkpoints: Path):
        """Of a run from step `start` on, kept in `checkpoints`."""
        self.run = {"start": start, "checkpoints": checkpoints}
        self._config, self.bad, self._in_a_row = config, 0, 0

    def note(
        self, values: Mapping[str, float], step: int, _metrics: Any, rows: housekeeping.Rows
    ) -> None:
        """Takes the metrics of a step.

        Raises:
          DivergedError: as many steps in a row as the config allows were not finite.
          LostError: hosts do not agree on what they did.
        """
        every = self._config.check.compare_every
        if every and step % every == 0:
            self._compare(values, step, rows)
        if is_finite(values):
            self._in_a_row = 0
            return
        self.bad, self._in_a_row = self.bad + 1, self._in_a_row + 1
        clips = ", ".join(map(str, all_ids(rows).values()))
        if "dataset" in rows.labels:
            clips += f" of {rows.labels['dataset']}"
        hosts.say(
            f"step {step} changed nothing: loss {values['loss']:g}, grad_norm "
            f"{values['grad_norm']:g}; {self.bad} such steps so far; its clips: {clips}"
        )
        if self._in_a_row >= self._config.optim.max_bad_steps:
            check_finite(values, step, **self.run)

    def _compare(self, values: Mapping[str, float], step: int, rows: housekeeping.Rows) -> None:
        mine = {"step": step, "data position": rows.position, "loss": float(values["loss"]).hex()}
        said = [json.loads(text) for text in hosts.gather(json.dumps(mine))]
        for process, theirs in enumerate(said):
            for key, value in theirs.items():
                if value != said[0][key]:
                    raise hosts.LostError(
                        f"{hosts.name(process)} has {key} {value}, {hosts.name(0)} has "
                        f"{said[0][key]}, in step {step}; {hosts.AGAIN} from the last checkpoint"
                    )
        all_ids(rows)


def all_ids(rows: housekeeping.Rows) -> dict[int, int]:
    """Row of the global batch -> id of its example; every host gives its own.

    Raises:
      LostError: two hosts that hold the same row hold other examples.
    """
    found: dict[int, tuple[int, int]] = {}
    mine = list(zip(rows.numbers, rows.ids, strict=False))
    for process, text in enumerate(hosts.gather(json.dumps(mine))):
        for row, example in json.loads(text):
            other, first = found.setdefault(row, (example, process))
            if other != example:
                raise hosts.LostError(
                    f"row {row} is example {example} on {hosts.name(process)} and {other} on "
                    f"{hosts.name(first)}; {hosts.AGAIN} from the last checkpoint"
                )
    return {row: example for row, (example, _) in sorted(found.items())}


def is_finite(values: Mapping[str, float]) -> bool:
    """Whether loss and gradients of a step are."""
    return all(math.isfinite(values[name]) for name in ("loss", "grad_norm"))


def check_finite(values: Mapping[str, float], step: int, start: int, checkpoints: Path) -> None:
    """DivergedError if loss or gradients at `step` of a run from step `start` are not finite."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise diverged(f"{name} is {values[name]}", step, start, checkpoints)


def diverged(what: str, step: int, start: int, checkpoints: Path) -> DivergedError:
    """What to do about a run from step `start`, kept in `checkpoints`, that is lost at `step`."""
    if start and step == start + 1:
        return DivergedError(
            f"{what} at step {step}, the first from the checkpoint: remove "
            f"{checkpoints / str(start)}, and the same command goes on from the one before"
        )
    return DivergedError(
        f"{what} at step {step}: lower optim.learning_rate or optim.clip_norm; the same command "
        "goes on from the last checkpoint"
    )
