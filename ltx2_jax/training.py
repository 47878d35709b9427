"""The train state and the train step: pure functions of arrays and a config.

    noise both streams -> predict velocities -> masked loss per stream -> AdamW -> EMA

Randomness is a function of (seed, step) alone, and is drawn for the whole global batch at once, so
the same step gives the same numbers on any mesh and however it is cut into micro-batches.
Source: spec of the released trainer (`ltx_trainer/training_strategies/flexible.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from ltx2_jax.chips import compiler_options
from ltx2_jax.config import Config, OptimConfig
from ltx2_jax.diffusion import flow, geometry
from ltx2_jax.models.connectors import Connectors
from ltx2_jax.models.streams import Modality
from ltx2_jax.models.transformer import LTX2Transformer
from ltx2_jax.sharding import abstract_state, pin, resident_weights, sharding_of, spec

State = dict[str, Any]  # "params", "opt", "step", and "ema" if the config averages weights
Batch = dict[str, Array]  # what data.pipeline yields, placed on the mesh
# Of a batch: features [B, S, Dv], [B, S, Da] (absent where audio receives those of video), [B, S].
TEXT_FIELDS = ("video_text", "audio_text", "text_mask")


def place(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> Batch:
    """A host's part of what `data.pipeline` yields -> global arrays, rows over the data axis."""
    return {
        name: jax.make_array_from_process_local_data(
            sharding_of(mesh, "batch", *[None] * (value.ndim - 1)), value
        )
        for name, value in batch.items()
        if name != "id"
    }


class LTX2(nnx.Module):
    """What is trained as one: the connectors, which read text features, and the transformer."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        text = config.text
        self.connectors = Connectors(text.video_connector, text.audio_connector, rngs=rngs)
        self.transformer = LTX2Transformer(config.model, rngs=rngs)

    def context(self, text: Mapping[str, Array]) -> tuple[Array, Array, Array | None]:
        """Text fields of a batch -> context of video [B, S, Dv], of audio [B, S, Da], and its mask.

        The mask is None where registers fill the padding. Fields: see `TEXT_FIELDS`.
        """
        video = text["video_text"]
        return self.connectors(video, text.get("audio_text", video), text["text_mask"])


def graph(config: Config) -> Any:
    """The static half of the model: `nnx.merge(graph(config), params)` is callable.

    To be made under the mesh that it runs on, which decides whether heads are split.
    """
    return nnx.graphdef(jax.eval_shape(lambda: LTX2(config, rngs=nnx.Rngs(0))))


def init_params(key: Array, config: Config) -> dict[str, Any]:
    """Fresh float32 parameters as a nested dict, born on their shards."""
    return nnx.to_pure_dict(nnx.split(LTX2(config, rngs=nnx.Rngs(key)), nnx.Param)[1])


def abstract_params(
    config: Config, mesh: jax.sharding.Mesh, *, for_sampling: bool = False
) -> dict[str, Any]:
    """Shapes, dtypes and shardings of `init_params` on `mesh`.

    Those that a sampler keeps are resident, and what is cast to the dtype of the activations before
    it is used has that dtype already: it computes the same numbers.
    """
    create, key = partial(init_params, config=config), jax.eval_shape(jax.random.key, 0)
    if not for_sampling:
        return abstract_state(create, key, mesh=mesh)
    with resident_weights():
        params = abstract_state(create, key, mesh=mesh)
    dtypes = {
        ("transformer",): config.model.dtype,
        ("connectors", "video"): config.text.video_connector.dtype,
        ("connectors", "audio"): config.text.audio_connector.dtype,
    }

    def as_used(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = tuple(entry.key for entry in path)
        dtype = dtypes.get(names[:1]) or dtypes[names[:2]]
        dtype = dtype if names[-1] in ("weight", "bias") else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(as_used, params)


def init_state(key: Array, config: Config) -> State:
    """Fresh parameters, moments, EMA copy and step 0; run it under jit, or eval_shape."""
    return state_of(init_params(key, config), config)


def state_of(params: dict[str, Any], config: Config) -> State:
    """The state of step 0 around given parameters."""
    state = {
        "params": params,
        "opt": optimizer(config).init(params),
        "step": jnp.zeros((), jnp.int32),
    }
    if config.optim.ema_decay is not None:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


@jax.jit
def all_finite(state: State) -> Array:
    """Whether every number of a state is finite: bool []. Reads it once, where it lies."""
    numbers = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in numbers]))


# --------------------------------------------------------------------------------------- optimizer


def learning_rate(config: Config) -> Callable[[Array], Array]:
    """Step -> learning rate: linear warm-up, then constant, linear or cosine decay."""
    optim = config.optim
    peak, final = optim.learning_rate, optim.learning_rate * optim.final_fraction
    steps = max(config.num_steps - optim.warmup_steps, 1)
    decay = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps, alpha=optim.final_fraction),
    }[optim.schedule]()
    # The first step trains at peak / warmup_steps, not at 0.
    warmup = optax.linear_schedule(peak / max(optim.warmup_steps, 1), peak, optim.warmup_steps - 1)
    return optax.join_schedules([warmup, decay], [optim.warmup_steps])


def optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW."""
    optim: OptimConfig = config.optim
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.adamw(
            learning_rate(config),
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mask=_matrices,
            mu_dtype=optim.first_moment_dtype,
        ),
    )


def _matrices(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "weight", params)


# -------------------------------------------------------------------------------------------- loss


@dataclass(frozen=True)
class Stream:
    """One stream of a noised batch."""

    x0: Array  # [B, T, C]
    noise: Array  # [B, T, C]
    sigma: Array  # [B]
    clean: Array | None  # [B, T] bool: given tokens, neither noised nor learned; None: no token
    positions: Array  # [B or 1, axes, T, 2]


jax.tree_util.register_dataclass(Stream, ("x0", "noise", "sigma", "clean", "positions"), ())


def draw(key: Array, batch: Batch, config: Config, strides: tuple[int, int, int]) -> dict[str, Any]:
    """All that is random in one step: noise, noise levels, given frames, dropped captions.

    Returns {"video": Stream, "audio": Stream, "drop_caption": bool [B]}.
    """
    keys = jax.random.split(key, 5)
    x0_video = pin(geometry.patchify_video(batch["video"]), "batch", "video_tokens", None)
    x0_audio = pin(geometry.patchify_audio(batch["audio"]), "batch", "audio_tokens", None)
    size = x0_video.shape[0]
    video_sigma, audio_sigma = flow.draw_sigmas(
        keys[0],
        size,
        x0_video.shape[1],
        x0_audio.shape[1],
        shared_prob=config.flow.shared_sigma_prob,
        std=config.flow.sigma_std,
        uniform_prob=config.flow.sigma_uniform_prob,
    )
    latent_shape = batch["video"].shape[1:4]
    clean = None
    # One latent frame is the whole clip: given, it would leave nothing to learn.
    if config.flow.first_frame_prob > 0 and latent_shape[0] > 1:
        given = jax.random.bernoulli(keys[1], config.flow.first_frame_prob, (size,))
        first = np.arange(x0_video.shape[1]) < latent_shape[1] * latent_shape[2]
        clean = pin(given[:, None] & first, "batch", "video_tokens")
    noise = [
        jax.random.normal(key, x.shape, x.dtype, out_sharding=spec("batch", tokens, None))
        for key, x, tokens in (
            (keys[2], x0_video, "video_tokens"),
            (keys[3], x0_audio, "audio_tokens"),
        )
    ]
    video_positions = geometry.video_positions(latent_shape, batch["fps"], strides)
    audio_positions = jnp.asarray(geometry.audio_positions(x0_audio.shape[1]))
    video_sigma, audio_sigma = pin(video_sigma, "batch"), pin(audio_sigma, "batch")
    drop = jax.random.bernoulli(keys[4], config.flow.caption_dropout, (size,))
    return {
        "video": Stream(x0_video, noise[0], video_sigma, clean, video_positions),
        "audio": Stream(x0_audio, noise[1], audio_sigma, None, audio_positions),
        "drop_caption": pin(drop, "batch"),
    }


def as_modality(
    stream: Stream, context: Array, context_mask: Array | None, keyframes: Any
) -> Modality:
    """The noised stream as the network takes it: given tokens are clean and have timestep 0."""
    levels = stream.sigma[:, None]  # [B, 1]
    if stream.clean is not None:
        levels = jnp.where(stream.clean, 0.0, levels)
    return Modality(
        latent=flow.noised(stream.x0, stream.noise, levels),
        sigma=stream.sigma,
        timesteps=stream.sigma[:, None],
        clean=stream.clean,
        positions=stream.positions,
        context=context,
        context_mask=context_mask,
        keyframes_mask=keyframes,
    )


def loss(
    model: LTX2, batch: Batch, drawn: dict[str, Any], null_text: dict[str, Array], config: Config
) -> tuple[Array, dict[str, Array]]:
    """Mean of the per-sample losses, and sums for the log (so that micro-batches add up)."""
    text = {
        name: without_captions(batch[name], null_text[name], drawn["drop_caption"])
        for name in TEXT_FIELDS
        if name in batch
    }
    video_context, audio_context, mask = model.context(text)
    video, audio = drawn["video"], drawn["audio"]
    keyframes = (
        first_frame_mask(batch["video"].shape[:4]) if config.model.keyframe_embedding else None
    )
    v, a = model.transformer(
        as_modality(video, video_context, mask, keyframes),
        as_modality(audio, audio_context, mask, None),
    )
    sums: dict[str, Array] = {}
    losses = {}
    for name, stream, velocity in (("video", video, v), ("audio", audio, a)):
        target = flow.velocity_target(stream.x0, stream.noise)
        losses[name] = flow.masked_loss(velocity, target, learned_mask(stream))
        sums[f"{name}_loss"] = jnp.sum(losses[name])
        sums[f"{name}_quarter"], sums[f"{name}_count"] = flow.sigma_quarters(
            losses[name], stream.sigma
        )
    weights = {"video": config.flow.video_weight, "audio": config.flow.audio_weight}
    return sum(weights[name] * jnp.mean(losses[name]) for name in losses), sums


def without_captions(rows: Array, empty: Array, drop: Array) -> Array:
    """rows [B, S, ...] with `empty` [S, ...], a field of the empty caption, where drop [B] says."""
    axes = ("batch", "text_tokens", *[None] * (rows.ndim - 2))
    empty = pin(jnp.broadcast_to(empty, rows.shape), *axes)
    drop = jnp.expand_dims(drop, range(1, rows.ndim))
    return jnp.where(drop, empty, pin(rows, *axes))


def learned_mask(stream: Stream) -> Array:
    """[B, T], 1 where the token counts in the loss."""
    if stream.clean is None:
        return jnp.ones(stream.x0.shape[:2], out_sharding=jax.typeof(stream.x0[..., 0]).sharding)
    return (~stream.clean).astype(jnp.float32)


def first_frame_mask(shape: tuple[int, int, int, int]) -> Array:
    """[B, T], 1 on latent frame 0: a keyframe to models that have the embedding.

    The released trainer never sets it although inference does; here both do.
    """
    batch, frames, height, width = shape
    first = jnp.arange(frames * height * width) < height * width
    return pin(jnp.tile(first.astype(jnp.float32), (batch, 1)), "batch", "video_tokens")


# -------------------------------------------------------------------------------------------- step


def make_train_step(
    config: Config, strides: tuple[int, int, int]
) -> Callable[[State, Batch, Batch], tuple[State, dict[str, Array]]]:
    """The jitted step: (state, batch, null_text) -> (state, metrics); the state is donated.

    `strides` are the video codec's, `null_text` the text fields [S, ...] of the empty caption.
    Metrics: loss, video_loss, audio_loss, both by quarter of sigma ([4], nan where no sample
    fell), gradient norm, learning rate.
    """
    graphdef, tx = graph(config), optimizer(config)
    chunks = config.optim.accumulate_steps
    schedule = learning_rate(config)

    def train_step(state: State, batch: Batch, null_text: Batch) -> tuple[State, dict[str, Array]]:
        def loss_of(params, batch, drawn):
            return loss(nnx.merge(graphdef, params), batch, drawn, null_text, config)

        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        drawn = draw(key, batch, config, strides)
        (value, sums), grads = gradients(loss_of, state["params"], batch, drawn, chunks)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        new = {
            "params": optax.apply_updates(state["params"], updates),
            "opt": opt,
            "step": state["step"] + 1,
        }
        if config.optim.ema_decay is not None:
            decay = ema_decay(config.optim.ema_decay, state["step"])
            new["ema"] = jax.tree.map(
                lambda e, p: decay * e + (1 - decay) * p, state["ema"], new["params"]
            )
        size = batch["video"].shape[0]
        metrics = {
            "loss": value,
            "video_loss": sums["video_loss"] / size,
            "audio_loss": sums["audio_loss"] / size,
            "video_loss_quarters": sums["video_quarter"] / sums["video_count"],
            "audio_loss_quarters": sums["audio_quarter"] / sums["audio_count"],
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state["step"]),
        }
        return new, metrics

    return jax.jit(
        train_step, donate_argnames="state", compiler_options=compiler_options(training=True)
    )


def gradients(
    loss_of: Callable[..., Any], params: Any, batch: Batch, drawn: dict[str, Any], chunks: int
) -> tuple[tuple[Array, dict[str, Array]], Any]:
    """((mean loss, summed log values), mean gradients) over `chunks` micro-batches, one by one."""
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if chunks == 1:
        return value_and_grad(params, batch, drawn)

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(params, *part)), None

    parts = jax.tree.map(lambda x: _split(x, batch["video"].shape[0], chunks), (batch, drawn))
    like = jax.eval_shape(value_and_grad, params, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, out_sharding=a.sharding), like)
    ((value, sums), grads), _ = jax.lax.scan(add, zeros, parts)
    return (value / chunks, sums), jax.tree.map(lambda g: g / chunks, grads)


def ema_decay(decay: float, step: Array) -> Array:
    """The decay after `step` updates: young averages forget the random start faster."""
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + step) / (10 + step))


def _split(x: Array, batch: int, chunks: int) -> Array:
    """[B, ...] -> [chunks, B / chunks, ...], every chunk spread over all shards of the batch.

    What is shared by the batch (leading axis 1) is repeated.
    """
    if x.shape[0] != batch:
        return jnp.broadcast_to(x, (chunks, *x.shape))
    return x.reshape(batch // chunks, chunks, *x.shape[1:]).swapaxes(0, 1)
