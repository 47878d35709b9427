"""What a step learns: noise, noise levels and conditions of a batch, and the loss of its streams.

    raw_draws -> condition: clean and given tokens, noise, noise levels
              -> predict velocities -> masked loss per stream

Randomness is a function of (seed, step) alone, and is drawn for the whole global batch at once, so
the same step gives the same numbers on any mesh and however it is cut into micro-batches.
Source: `ltx_trainer/training_strategies/flexible.py`.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ltx2_jax.config import Condition, Config, FlowConfig, StreamConfig
from ltx2_jax.diffusion import conditioning, flow, geometry
from ltx2_jax.diffusion.conditioning import Conditions, of_clip
from ltx2_jax.errors import UserError
from ltx2_jax.models.ltx2 import LTX2, TEXT_FIELDS
from ltx2_jax.models.transformer.streams import Keep, Modality
from ltx2_jax.sharding import pin, spec
from ltx2_jax.training.batch import Batch

STREAMS = ("video", "audio")
Drawn = dict[str, Any]  # of every stream that is there its `Stream`; "drop_caption": bool [B]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("sigma", "noise", "chances"),
    meta_fields=(),
)
@dataclass(frozen=True)
class StreamDraws:
    """All that is random in one stream."""

    sigma: Array | None  # [B]; None: a frozen stream has no noise
    noise: Array | None  # [B, T, C] of the clip's own tokens
    # Of every condition of `FlowConfig.conditions`, uniform on [0, 1): [B]; [1] of a reference. It
    # applies where its chance is below its probability.
    chances: tuple[Array, ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("conditions", "noise", "sigma", "applied", "present", "weight"),
    meta_fields=(),
)
@dataclass(frozen=True)
class Stream:
    """One stream of a batch, ready to be noised. T' tokens: T of the clip, then the appended."""

    conditions: Conditions  # of T' tokens; its clean values are what is learned
    noise: Array | None  # [B, T, C]; None: frozen
    sigma: Array  # [B]; not read if frozen
    applied: Array | None = None  # bool [1], whether appended tokens take part; None: they do
    present: Array | None = None  # bool [B], samples that have this stream; None: all
    weight: Array | None = None  # [B], of their losses: 0, or what makes the mean one of those

    @property
    def x0(self) -> Array:
        """The clip's own latents [B, T, C]."""
        return of_clip(self.conditions, self.conditions.clean)

    @property
    def given(self) -> Array | None:
        """bool [B, T'], True where a token is given, neither noised nor learned; None: nowhere."""
        return self.conditions.strength


# -------------------------------------------------------------------------------------- randomness


def draw(
    key: Array,
    batch: Batch,
    config: Config,
    strides: tuple[int, int, int],
    clock: geometry.AudioClock = geometry.AUDIO_CLOCK,
) -> Drawn:
    """A batch as one step sees it: `condition` with numbers drawn from `key`."""
    return condition(batch, raw_draws(key, batch, config), config, strides, clock)


def raw_draws(key: Array, batch: Batch, config: Config) -> dict[str, Any]:
    """All that is random in one step, before it has any effect.

    Returns {"video": StreamDraws, "audio": StreamDraws, "caption": uniform [B]}, of the streams
    that are there.
    """
    keys = jax.random.split(key, 5)
    run, size = config.flow, batch[config.flow.streams[0]].shape[0]
    shapes = {name: jax.eval_shape(partial(tokens_of, name), batch[name]) for name in run.streams}
    lengths = [shapes[name].shape[1] if name in shapes else 0 for name in STREAMS]
    sigmas = flow.draw_sigmas(
        keys[0],
        size,
        *lengths,
        # A stream that is not noised has no noise level to share.
        shared_prob=run.shared_sigma_prob if len(run.generated) == 2 else 0.0,
        sampler=sampler(run),
    )
    # Of the conditions of a stream the first takes the key itself, the others one of their own.
    chance_keys = keys[1], jax.random.fold_in(keys[1], 2**16)
    drawn: dict[str, Any] = {}
    for i, name in enumerate(STREAMS):
        if name not in run.streams:
            continue
        sigma = noise = None
        if name in run.generated:
            sigma = pin(sigmas[i], "batch")
            out = spec("batch", f"{name}_tokens", None)
            noise = jax.random.normal(
                keys[2 + i], shapes[name].shape, jnp.float32, out_sharding=out
            )
        chances = tuple(
            _uniform(
                jax.random.fold_in(chance_keys[i], n) if n else chance_keys[i],
                1 if given.kind == "reference" else size,
            )
            for n, given in enumerate(run.conditions(name))
        )
        drawn[name] = StreamDraws(sigma, noise, chances)
    return drawn | {"caption": _uniform(keys[4], size)}


def sampler(run: FlowConfig) -> flow.Sampler:
    """How a run draws its noise levels."""
    if run.sigma == "uniform":
        low, high = run.sigma_min, run.sigma_max
        return lambda key, shape, _: flow.uniform_sigmas(key, shape, low, high)
    return lambda key, shape, tokens: flow.sample_sigmas(
        key,
        shape,
        run.sigma_tokens or tokens,
        std=run.sigma_std,
        eps=run.sigma_eps,
        uniform_prob=run.sigma_uniform_prob,
    )


def _uniform(key: Array, size: int) -> Array:
    """float32 [size] on [0, 1); the same draws with JAX_ENABLE_X64."""
    return jax.random.uniform(key, (size,), jnp.float32)


# -------------------------------------------------------------------------------------- conditions


def condition(
    batch: Batch,
    draws: dict[str, Any],
    config: Config,
    strides: tuple[int, int, int],
    clock: geometry.AudioClock = geometry.AUDIO_CLOCK,
) -> Drawn:
    """The streams of a batch with what is given of them, from the numbers of `raw_draws`.

    `strides` and `clock` are the codec's: when and where its latents are.

    Raises:
      UserError: a mask or a reference that a condition needs is not in the batch, or it does not
        fit its clip.
    """
    run = config.flow
    dropped = draws["caption"] < run.caption_dropout
    drawn: Drawn = {"drop_caption": pin(dropped, "batch")}
    for name in run.streams:
        of_stream = draws[name]
        conditions = _clip(name, batch, config, strides, clock)
        applied = None
        given = zip(run.conditions(name), of_stream.chances, strict=True)
        for what, chance in given:
            taken = chance < what.probability
            if what.kind == "reference":
                conditions = _with_reference(conditions, name, batch, strides, clock)
                applied = taken if what.probability < 1 else None
            elif (region := _region(what, name, batch, strides)) is not None:
                where = pin(taken[:, None] & region, "batch", f"{name}_tokens")
                conditions = conditioning.give(conditions, where)
        sigma = of_stream.sigma
        if sigma is None:
            sigma = jnp.zeros_like(draws["caption"])
        present = _present(name, batch)
        drawn[name] = Stream(conditions, of_stream.noise, pin(sigma, "batch"), applied, *present)
    return drawn


def _present(name: str, batch: Batch) -> tuple[Array | None, Array | None]:
    """`Stream.present` and `Stream.weight`, which averages over the whole batch, however it is cut.

    A batch says in `has_video` and `has_audio` which of its samples have the stream.
    """
    if f"has_{name}" not in batch:
        return None, None
    present = pin(jnp.asarray(batch[f"has_{name}"]), "batch")
    share = jnp.mean(present.astype(jnp.float32))
    return present, present / jnp.maximum(share, 1 / present.size)


def tokens_of(name: str, latents: Array) -> Array:
    """Latents of a stream as tokens, over the shards of its tokens: [B, T, C]."""
    patchify = geometry.patchify_video if name == "video" else geometry.patchify_audio
    return pin(patchify(latents), "batch", f"{name}_tokens", None)


def _clip(
    name: str,
    batch: Batch,
    config: Config,
    strides: tuple[int, int, int],
    clock: geometry.AudioClock,
) -> Conditions:
    """The tokens of a clip, of which nothing is given yet; of a frozen stream all is."""
    latents, marks = batch[name], None
    if name == "video":
        positions = geometry.video_positions(latents.shape[1:4], batch["fps"], strides)
        if config.model.keyframe_embedding and config.flow.mark_first_frame:
            marks = conditioning.first_frame_mask(latents.shape[:4])
    else:
        positions = jnp.asarray(geometry.audio_positions(latents.shape[1], clock))
    clean = tokens_of(name, latents)
    frozen = name not in config.flow.generated
    return Conditions(clean, None, positions, marks, None, clean.shape[1], frozen)


def _region(
    what: Condition, name: str, batch: Batch, strides: tuple[int, int, int]
) -> Array | np.ndarray | None:
    """Tokens that a condition gives, bool [T], or [B, T] of masks; None: none in this batch."""
    shape = batch[name].shape
    grid = shape[1:4] if name == "video" else shape[1:2]
    if what.kind == "mask":
        mask = _field(batch, f"{name}_mask", f"flow.{name}.conditions: mask")
        if mask.shape != (shape[0], *grid):
            raise UserError(
                f"{name}_mask is {list(mask.shape[1:])}, the {name} of a clip is {list(grid)}"
            )
        return mask.reshape(shape[0], -1) > 0.5
    return region_of(what, grid, strides)


def region_of(
    what: Condition, grid: tuple[int, ...], strides: tuple[int, int, int]
) -> np.ndarray | None:
    """Tokens of a clip that a condition gives whatever the clip: bool [T]. None: it gives none."""
    if what.kind == "first_frame":
        # One latent frame is the whole clip: given, it would leave nothing to learn.
        return geometry.first_latents(grid, 1) if grid[0] > 1 else None
    if what.kind == "prefix":
        return geometry.first_latents(grid, what.length)
    if what.kind == "suffix":
        return geometry.last_latents(grid, what.length)
    return geometry.rectangle(grid, what.region, strides).reshape(-1)


def _with_reference(
    conditions: Conditions,
    name: str,
    batch: Batch,
    strides: tuple[int, int, int],
    clock: geometry.AudioClock,
) -> Conditions:
    """The tokens of the reference behind those of the clip."""
    latents = _field(batch, f"{name}_reference", f"flow.{name}.conditions: reference")
    if name == "audio":
        # On the clip's own time, from 0 on: what sounds at once lies at the same place.
        positions = jnp.asarray(geometry.audio_positions(latents.shape[1], clock))
    else:
        grid, reference = batch["video"].shape[1:4], latents.shape[1:4]
        spatial = geometry.spatial_factor(grid, reference)
        temporal = geometry.temporal_factor(grid, reference)
        fps = jnp.asarray(batch["fps"])
        positions = geometry.reference_positions(
            reference,
            fps,
            jnp.asarray(batch.get("video_reference_fps", fps / temporal)),
            strides,
            spatial=spatial,
            temporal=temporal,
        )
    return conditioning.append(conditions, tokens_of(name, latents), positions)


def _field(batch: Batch, name: str, why: str) -> Array:
    if name not in batch:
        raise UserError(f"{why} needs the field {name!r}; a batch has {', '.join(batch)}")
    return jnp.asarray(batch[name])


def flow_of(run: FlowConfig, fields: Collection[str]) -> FlowConfig:
    """`run` for samples with these fields: a generated stream that they lack is absent.

    So its loss is absent, and not zero. Where none is left to generate, nothing changes.
    """
    missing = [name for name in run.generated if name not in fields]
    if not missing or len(missing) == len(run.generated):
        return run
    return replace(run, **{name: StreamConfig(role="absent") for name in missing})


def check_fields(
    run: FlowConfig, shapes: Mapping[str, tuple[int, ...]], strides: tuple[int, int, int]
) -> None:
    """UserError unless records with fields of these shapes hold what the streams of a run read."""
    for name in run.streams:
        if name not in shapes:
            role = getattr(run, name).role
            raise UserError(f"flow.{name}.role={role}: there is no {name} in its records")
        grid = shapes[name][:3] if name == "video" else shapes[name][:1]
        left = np.ones(math.prod(grid), bool)  # tokens that may have to be generated
        for what in run.conditions(name):
            where = f"flow.{name}.conditions: {what.kind}"
            if what.kind in ("mask", "reference"):
                field = f"{name}_{what.kind}"
                if field not in shapes:
                    raise UserError(f"{where}: there is no field {field!r} in its records")
                if what.kind == "mask" and shapes[field] != grid:
                    raise UserError(f"{where}: {shapes[field]} is not the grid of a clip, {grid}")
                if field == "video_reference":
                    reference_factors(run, shapes)
            elif (region := region_of(what, grid, strides)) is not None:
                left &= ~region if what.probability == 1 else True
        if not left.any():
            raise UserError(
                f"flow.{name}.conditions: all of a clip of {grid} latents is given, always: there "
                "is nothing to learn"
            )


def reference_factors(
    run: FlowConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, int] | tuple[None, None]:
    """Spatial and temporal factor of the video references that a run is given; None without any."""
    if all(what.kind != "reference" for what in run.conditions("video")):
        return None, None
    grid, reference = shapes["video"][:3], shapes["video_reference"][:3]
    return geometry.spatial_factor(grid, reference), geometry.temporal_factor(grid, reference)


# ---------------------------------------------------------------------------------------- the loss


def as_modality(stream: Stream, context: Array, context_mask: Array | None) -> Modality:
    """The noised stream as the network takes it: given tokens are clean and have timestep 0."""
    conditions = stream.conditions
    conditions = replace(conditions, clean=conditions.clean.astype(jnp.float32))
    if conditions.frozen:
        latent = conditions.clean
    else:
        latent = conditioning.noised(conditions, _of_all(stream), stream.sigma)
    return Modality(
        latent=latent,
        positions=conditions.positions,
        context=context,
        context_mask=context_mask,
        attention_mask=conditions.attention,
        keyframes_mask=conditions.marks,
        **conditioning.levels(conditions, stream.sigma),
    )


def _of_all(stream: Stream) -> Array:
    """Noise [B, T', C] of all tokens of a stream, of which the appended ones need none."""
    appended = stream.conditions.clean[:, stream.conditions.clip_tokens :]
    if appended.shape[1] == 0:
        return stream.noise
    return jnp.concatenate([stream.noise, jnp.zeros_like(appended, stream.noise.dtype)], axis=1)


def loss(
    model: LTX2, batch: Batch, drawn: Drawn, null_text: dict[str, Array], config: Config
) -> tuple[Array, dict[str, Array]]:
    """Mean of the per-sample losses, and sums for the log (so that micro-batches add up)."""
    text = {
        name: without_captions(batch[name], null_text[name], drawn["drop_caption"])
        for name in TEXT_FIELDS
        if name in batch
    }
    *contexts, mask = model.context(text)
    contexts = dict(zip(STREAMS, contexts, strict=True))
    streams = {name: drawn[name] for name in config.flow.streams}
    return _loss_of_streams(model, streams, contexts, mask, config.flow)


def _loss_of_streams(
    model: LTX2,
    streams: dict[str, Stream],
    contexts: dict[str, Array],
    mask: Array | None,
    run: FlowConfig,
) -> tuple[Array, dict[str, Array]]:
    """As `loss`, once the text has passed the connectors."""
    undecided = [name for name, stream in streams.items() if stream.applied is not None]
    if undecided:  # two programs, one of them without the appended tokens of this stream
        stream = streams[undecided[0]]

        def of(conditions: Conditions) -> tuple[Array, dict[str, Array]]:
            decided = replace(stream, conditions=conditions, applied=None)
            return _loss_of_streams(model, streams | {undecided[0]: decided}, contexts, mask, run)

        whole, alone = stream.conditions, conditioning.without_appended(stream.conditions)
        return jax.lax.cond(stream.applied[0], lambda: of(whole), lambda: of(alone))
    inputs = [
        as_modality(streams[name], contexts[name], mask) if name in streams else None
        for name in STREAMS
    ]
    if any(stream.present is not None for stream in streams.values()):
        inputs.append(_kept(streams, model))
    velocities = dict(zip(STREAMS, model.transformer(*inputs), strict=True))
    weights = {"video": run.video_weight, "audio": run.audio_weight}
    total, sums = 0.0, {}
    for name in run.generated:
        stream = streams[name]
        of_samples = sample_losses(stream, velocities[name])
        weighted = of_samples if stream.weight is None else of_samples * stream.weight
        total += weights[name] * jnp.mean(weighted)
        sums[f"{name}_loss"] = jnp.sum(weighted)
        sums[f"{name}_quarter"], sums[f"{name}_count"] = flow.sigma_quarters(
            of_samples, stream.sigma, stream.present
        )
    return total, sums


def _kept(streams: dict[str, Stream], model: LTX2) -> Keep:
    """A stream that a sample does not have is not read by the other one."""
    layers, kept = model.transformer.cfg.num_layers, {}
    for name, other in (("video", "audio"), ("audio", "video")):
        if name in streams and (present := streams[name].present) is not None:
            kept[f"{name}_to_{other}"] = jnp.tile(present[:, None], (1, layers))
    return Keep(**kept)


def sample_losses(stream: Stream, velocity: Array) -> Array:
    """The loss of every sample [B], of velocities [B, T', C]: over its own, not given tokens."""
    target = flow.velocity_target(stream.x0, stream.noise)
    return flow.masked_loss(of_clip(stream.conditions, velocity), target, learned_mask(stream))


def averages(sums: dict[str, Array], samples: int) -> dict[str, Array]:
    """The sums of `loss` as the log shows them, of the streams that are learned.

    Losses by quarter of sigma are [4], nan where no sample fell.
    """
    found = {}
    for name in STREAMS:
        if f"{name}_loss" in sums:
            found[f"{name}_loss"] = sums[f"{name}_loss"] / samples
            found[f"{name}_loss_quarters"] = sums[f"{name}_quarter"] / sums[f"{name}_count"]
    return found


def without_captions(rows: Array, empty: Array, drop: Array) -> Array:
    """rows [B, S, ...] with `empty` [S, ...], a field of the empty caption, where drop [B] says."""
    axes = ("batch", "text_tokens", *[None] * (rows.ndim - 2))
    empty = pin(jnp.broadcast_to(empty, rows.shape), *axes)
    drop = jnp.expand_dims(drop, range(1, rows.ndim))
    return jnp.where(drop, empty, pin(rows, *axes))


def learned_mask(stream: Stream) -> Array:
    """[B, T], 1 where the token of the clip counts in the loss."""
    if stream.given is None:
        return jnp.ones(stream.x0.shape[:2], out_sharding=jax.typeof(stream.x0[..., 0]).sharding)
    return (~of_clip(stream.conditions, stream.given)).astype(jnp.float32)
