"""What a stream is given and need not generate, token by token, for training and sampling alike.

A stream's tokens are those of its clip, and after them any that are appended: keyframes,
references. Each has a clean value, a strength with which that value is given (1: it stays as it is,
0: it is generated), a position and a mark. A condition is a function that gives some tokens or
appends some; several are applied one after another.

Tokens are given in place (`at`, `masked`, `outside_time`: images, prefixes, retakes), or appended
(`keyframe`, `reference_video`, `reference_audio`, `keyframe_slots`), where attention alone connects
them to the clip. A strength of 1 may be a Python number: it then costs what no strength costs.

What is put together from numpy arrays is one: to sample, conditions are made on the host, and no
mesh is in context. Those of jax arrays may be traced, as training does.

Sources: `ltx_core/conditioning/types/*.py`, `ltx_core/conditioning/mask_utils.py`,
`ltx_core/tools.py`, `ltx_trainer/training_strategies/flexible.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ltx2_jax.diffusion import flow, geometry
from ltx2_jax.errors import UserError
from ltx2_jax.sharding import pin


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("clean", "strength", "positions", "marks", "attention", "start"),
    meta_fields=("clip_tokens", "frozen", "grid", "slots"),
)
@dataclass(frozen=True)
class Conditions:
    """What is known of every token of one stream, T tokens in all."""

    clean: Array  # [B, T, C] values; read only where something is given
    # [B, T]: bool, where tokens are either given or not, which costs the network less; or float
    # in [0, 1]. None: no token is given.
    strength: Array | None
    positions: Array  # [B or 1, axes, T, 2]
    marks: Array | None  # [B, T], 1 on keyframes; None for models without the embedding
    attention: Array | None  # [B or 1, T, T] strengths in [0, 1]; None: every token sees all
    clip_tokens: int  # the clip's own tokens, which come first
    frozen: bool = False  # the whole stream is given: its noise level is 0
    start: Array | None = None  # [B, T, C] what noise is mixed with; None: `clean`
    grid: tuple[int, int, int] | None = None  # F', H', W' of a video's own tokens
    slots: tuple[int, int] | None = None  # first token and number of keyframes to be generated


Strength = Array | float | None  # [] or [B]; None: 1


def of_video(
    latents: Array,  # [B, F', H', W', C], what noise is mixed with: zeros for nothing
    fps: float | Array,  # one for all, or [B]
    strides: tuple[int, int, int] = geometry.VIDEO_STRIDES,
    *,
    marked: bool,  # whether the model has the keyframe embedding
) -> Conditions:
    """A video of which nothing is given."""
    grid = latents.shape[1:4]
    tokens = geometry.patchify_video(latents)
    marks = np.arange(tokens.shape[1]) < grid[1] * grid[2]
    return Conditions(
        clean=tokens,
        strength=None,
        positions=geometry.video_positions(grid, fps, strides),
        marks=np.tile(marks.astype(np.float32), (tokens.shape[0], 1)) if marked else None,
        attention=None,
        clip_tokens=tokens.shape[1],
        start=tokens,
        grid=grid,
    )


def of_audio(
    latents: Array,  # [B, A, M, C], what noise is mixed with: zeros for nothing
    clock: geometry.AudioClock = geometry.AUDIO_CLOCK,
) -> Conditions:
    """A sound of which nothing is given."""
    tokens = geometry.patchify_audio(latents)
    positions = geometry.audio_positions(tokens.shape[1], clock)
    return Conditions(tokens, None, positions, None, None, tokens.shape[1], start=tokens)


# -------------------------------------------------------------------------- conditions in the loop


def levels(conditions: Conditions, sigma: Array) -> dict[str, Array | None]:
    """The noise levels of a stream at sigma [B], as fields of `Modality`."""
    if conditions.frozen:
        zero = jnp.zeros_like(sigma)
        return {"sigma": zero, "timesteps": zero[:, None], "clean": None}
    strength = conditions.strength
    if strength is None or strength.dtype == bool:
        return {"sigma": sigma, "timesteps": sigma[:, None], "clean": strength}
    timesteps = (1.0 - strength) * sigma[:, None]
    return {"sigma": sigma, "timesteps": timesteps, "clean": None}


def token_levels(conditions: Conditions, sigma: Array) -> Array:
    """The noise level of every token at sigma [B]: [B, 1] where all have the same, else [B, T]."""
    if conditions.frozen or conditions.strength is None:
        return levels(conditions, sigma)["timesteps"]
    return (1.0 - conditions.strength.astype(jnp.float32)) * sigma[:, None]


def noised(
    conditions: Conditions,
    noise: Array,  # [B, T, C]
    sigma: Array | float,  # [] or [B]
    start: Array | None = None,  # [B, T, C] in the place of `conditions.start`
) -> Array:
    """Tokens [B, T, C] at noise level sigma; given ones are clean as far as they are given."""
    start = conditions.start if start is None else start
    start = conditions.clean if start is None else start
    return keep_given(conditions, flow.noised(start, noise, sigma))


def started(conditions: Conditions, tokens: Array) -> Conditions:
    """With tokens [B, n, C] of the clip, those of an earlier stage, to be mixed with noise."""
    begun = conditions.clean if conditions.start is None else conditions.start
    return replace(conditions, start=_end_with(tokens, begun))


def keep_given(conditions: Conditions, x: Array) -> Array:
    """`x` [B, T, C] with the given tokens put back, as far as they are given."""
    strength = conditions.strength
    if conditions.frozen:
        return conditions.clean.astype(x.dtype)
    if strength is None:
        return x
    if strength.dtype == bool:
        return jnp.where(strength[..., None], conditions.clean.astype(x.dtype), x)
    return flow.noised(conditions.clean.astype(x.dtype), x, 1.0 - strength)


# ------------------------------------------------------------------------------ in place of tokens


def give(
    conditions: Conditions,
    where: Array,  # [B, T] or [T], bool
    strength: Array | float | None = None,  # [] or [B]; None: fully, and the strengths stay bool
    clean: Array | None = None,  # [B, T, C]; None: the values that are there
) -> Conditions:
    """The tokens of `where` given; where several conditions give one, the last decides."""
    before, values = conditions.strength, conditions.clean
    xp = _numpy(where, strength, clean, before, values)
    where = xp.broadcast_to(where, values.shape[:2])
    if clean is not None:
        values = xp.where(where[..., None], clean.astype(values.dtype), values)
    if strength is None and (before is None or before.dtype == bool):
        given = where if before is None else before | where
    else:
        before = xp.zeros(where.shape, np.float32) if before is None else before
        strength = _by_row(1.0 if strength is None else strength, xp)
        given = xp.where(where, strength, before.astype(np.float32))
    return replace(conditions, clean=values, strength=given)


def at(
    conditions: Conditions,
    tokens: Array,  # [B or 1, n, C]
    first: int,  # which token of the clip they begin at; negative: counted from its end
    strength: Strength = None,
) -> Conditions:
    """Some tokens of the clip given: an image, a prefix (`first` 0), a suffix (`first` -n)."""
    length, count = conditions.clip_tokens, tokens.shape[1]
    start = first if first >= 0 else length + first
    if not 0 <= start <= length - count:
        raise UserError(f"{count} given tokens at {first} do not fit into {length} of the clip")
    old, xp = conditions.clean, _numpy(conditions.clean, tokens)
    tokens = xp.broadcast_to(tokens, (old.shape[0], *tokens.shape[1:])).astype(old.dtype)
    clean = xp.concatenate([old[:, :start], tokens, old[:, start + count :]], 1)
    place = np.arange(old.shape[1])
    return give(conditions, (place >= start) & (place < start + count), _partial(strength), clean)


def frames(
    conditions: Conditions,
    latents: Array,  # [B, f, H', W', C]
    index: int = 0,  # the latent frame they begin at; negative: counted from the end
    strength: Strength = None,
) -> Conditions:
    """Latent frames of a video given in place: an image at 0, a clip at any."""
    count = _tokens_per_frame(conditions, latents)
    return at(conditions, geometry.patchify_video(latents), index * count, strength)


def masked(
    conditions: Conditions,
    where: Array,  # [B, F', H', W'] of a video or [B, A] of a sound, True where it is given
    latents: Array | None = None,  # of the whole clip; None: the values that are there
    strength: Strength = None,
) -> Conditions:
    """Inpainting and outpainting: the clip given where the mask says."""
    where = np.reshape(np.asarray(where) > 0.5, (np.shape(where)[0], -1))
    if where.shape[1] != conditions.clip_tokens:
        raise UserError(
            f"a mask of {where.shape[1]} tokens does not fit {conditions.clip_tokens} of the clip"
        )
    where = np.pad(where, ((0, 0), (0, conditions.clean.shape[1] - where.shape[1])))
    clean = None
    if latents is not None:
        of_stream = geometry.patchify_video if latents.ndim == 5 else geometry.patchify_audio
        clean = _end_with(of_stream(latents), conditions.clean)
    return give(conditions, where, _partial(strength), clean)


def outside_time(
    conditions: Conditions, start: float, end: float, strength: Strength = None
) -> Conditions:
    """A retake: the clip given as it is but for the tokens that touch [start, end) seconds."""
    own = np.arange(conditions.clean.shape[1]) < conditions.clip_tokens
    seconds = conditions.positions[:, 0]  # [B or 1, T, 2]
    inside = (seconds[..., 1] > start) & (seconds[..., 0] < end) & own
    if isinstance(inside, np.ndarray) and not inside.any():
        last = seconds[:, conditions.clip_tokens - 1, 1].max()
        raise UserError(
            f"nothing lies between {start:g} and {end:g} s: the clip ends at {last:g} s"
        )
    return give(conditions, ~inside & own, _partial(strength))


def freeze(conditions: Conditions) -> Conditions:
    """The whole stream given; it is only read by the other one."""
    return replace(conditions, frozen=True)


# -------------------------------------------------------------------------------- appended tokens


def append(
    conditions: Conditions,
    clean: Array,  # [B, n, C]
    positions: Array,  # [B or 1, axes, n, 2]
    strength: Strength = None,
    *,
    attention: Array | float | None = None,  # [], [n] or [B, n]: between them and the clip; None: 1
    start: Array | None = None,  # [B, n, C]; None: zeros
    marked: bool = False,
) -> Conditions:
    """More tokens after those that are there. They and others that were appended do not see each
    other once any tokens have an attention strength.
    """
    before, begun, marks = conditions.strength, conditions.start, conditions.marks
    xp = _numpy(conditions.clean, clean, positions, conditions.positions, before, strength, start)
    count, rows = clean.shape[1], conditions.clean.shape[0]
    clean = xp.broadcast_to(clean, (rows, *clean.shape[1:])).astype(conditions.clean.dtype)
    before = _filled(conditions.clean, False) if before is None else before
    new, strength = _filled(clean, True), _partial(strength)
    if strength is not None or before.dtype != bool:
        new = new * _by_row(1.0 if strength is None else strength, xp)
        before = before.astype(np.float32)
    if marks is not None:
        marks = xp.concatenate([marks, _filled(clean, marked).astype(np.float32)], 1)
    if begun is not None or start is not None:
        begun = conditions.clean if begun is None else begun
        begun = xp.concatenate([begun, xp.zeros_like(clean) if start is None else start], 1)
    rows = max(conditions.positions.shape[0], positions.shape[0])
    places = [xp.broadcast_to(x, (rows, *x.shape[1:])) for x in (conditions.positions, positions)]
    return replace(
        conditions,
        clean=xp.concatenate([conditions.clean, clean], 1),
        strength=xp.concatenate([before, new], 1),
        positions=xp.concatenate(places, 2),
        marks=marks,
        attention=_grown(conditions, count, attention),
        start=begun,
    )


def keyframe(
    conditions: Conditions,
    latents: Array,  # [B, f, H', W', C]: an image (f = 1) or a clip
    frame: int,  # of the pixels, where it begins; it may lie beyond the clip
    fps: float | Array,
    strides: tuple[int, int, int] = geometry.VIDEO_STRIDES,
    strength: Strength = None,
    attention: Array | float | None = None,
) -> Conditions:
    """A keyframe beside the clip, at any pixel frame. An image lasts one pixel frame."""
    _tokens_per_frame(conditions, latents)
    positions = _frame_positions(latents.shape[1:4], frame, fps, strides, causal=frame == 0)
    tokens = geometry.patchify_video(latents)
    return append(conditions, tokens, positions, strength, attention=attention)


def reference_video(
    conditions: Conditions,
    latents: Array,  # [B, f, h, w, C]
    fps: float | Array,  # of the clip
    strides: tuple[int, int, int] = geometry.VIDEO_STRIDES,
    *,
    spatial_scale: int = 1,  # the clip's rows and columns for one of the reference
    temporal_scale: int = 1,  # the clip's frames for one of the reference
    strength: Strength = None,
    attention: Array | float | None = None,
) -> Conditions:
    """A whole video to follow (IC-LoRA), of which a token lies where it lies in the clip."""
    positions = geometry.reference_positions(
        latents.shape[1:4],
        fps,
        fps / temporal_scale,
        strides,
        spatial=spatial_scale,
        temporal=temporal_scale,
    )
    tokens = geometry.patchify_video(latents)
    return append(conditions, tokens, positions, strength, attention=attention)


def reference_audio(
    conditions: Conditions,
    latents: Array,  # [B, a, M, C]
    positions: Array,  # [B or 1, 1, a, 2], seconds; a voice to imitate lies before 0
    strength: Strength = None,
    attention: Array | float | None = None,
) -> Conditions:
    """A sound to follow, at times of its own."""
    tokens = geometry.patchify_audio(latents)
    return append(conditions, tokens, positions, strength, attention=attention)


def keyframe_slots(
    conditions: Conditions,
    at_frames: Sequence[int],  # of the pixels, rising
    fps: float | Array,
    strides: tuple[int, int, int] = geometry.VIDEO_STRIDES,
    latents: Array | None = None,  # [B, K, H', W', C], what noise is mixed with
) -> Conditions:
    """Keyframes that are generated beside the clip (2.5); `slots_of` has them in the end."""
    length, rows, columns = conditions.grid
    last = (length - 1) * strides[0]
    rising = all(a < b for a, b in pairwise(at_frames))
    if not at_frames or not rising or at_frames[0] < 0 or at_frames[-1] > last:
        raise UserError(
            f"keyframes at frames {list(at_frames)}: they must rise and lie within 0 to {last}"
        )
    if conditions.slots is not None:
        raise UserError("keyframes to be generated are named once, all together")
    batch, first, channels = conditions.clean.shape
    xp = _numpy(conditions.clean, latents, fps)
    positions = [
        _frame_positions((1, rows, columns), frame, fps, strides, causal=False)
        for frame in at_frames
    ]
    start = None
    if latents is not None:
        _tokens_per_frame(conditions, latents)
        start = geometry.patchify_video(latents)
    clean = np.zeros((batch, len(at_frames) * rows * columns, channels), conditions.clean.dtype)
    more = append(conditions, clean, xp.concatenate(positions, 2), start=start, marked=True)
    strength = None  # they were appended as given
    if conditions.strength is not None:
        strength = more.strength * (np.arange(more.clean.shape[1]) < first)
    return replace(more, strength=strength, slots=(first, len(at_frames)))


def slots_of(conditions: Conditions, x: Array) -> Array:
    """The keyframes that were generated, [B, K, H', W', C], of tokens [B, T, C]."""
    first, count = conditions.slots
    _, rows, columns = conditions.grid
    tokens = x[:, first : first + count * rows * columns]
    return geometry.unpatchify_video(tokens, (count, rows, columns))


def without_appended(conditions: Conditions) -> Conditions:
    """The clip's own tokens alone, as if nothing had been appended."""
    own = partial(of_clip, conditions)
    return replace(
        conditions,
        clean=own(conditions.clean),
        strength=None if conditions.strength is None else own(conditions.strength),
        positions=conditions.positions[:, :, : conditions.clip_tokens],
        marks=None if conditions.marks is None else own(conditions.marks),
    )


def of_clip(conditions: Conditions, x: Array) -> Array:
    """The clip's own tokens of `x` [B, T, ...], without the appended ones."""
    return x[:, : conditions.clip_tokens]


def first_frame_mask(shape: tuple[int, int, int, int]) -> Array:
    """[B, T], 1 on latent frame 0: a keyframe to models that have the embedding.

    Official inference sets it, but `ltx_trainer/training_strategies/flexible.py` never does. Here
    both do.
    """
    batch, frames, height, width = shape
    first = jnp.arange(frames * height * width) < height * width
    return pin(jnp.tile(first.astype(jnp.float32), (batch, 1)), "batch", "video_tokens")


def _partial(strength: Strength) -> Strength:
    """None for a strength that is known to be 1."""
    return None if isinstance(strength, float | int) and strength == 1 else strength


def _filled(
    tokens: Array,  # [B, n, C]
    value: bool,
) -> Array:
    """bool [B, n], `value` everywhere, on the shards of the tokens."""
    if isinstance(tokens, np.ndarray):
        return np.full(tokens.shape[:2], value)
    like = jax.typeof(tokens[..., 0])
    return (jnp.ones if value else jnp.zeros)(like.shape, bool, out_sharding=like.sharding)


def _end_with(
    tokens: Array,  # [B, n, C]
    others: Array,  # [B, T, C]
) -> Array:  # [B, T, C]
    """`tokens`, then those of `others` that come after so many."""
    xp, rest = _numpy(tokens, others), others[:, tokens.shape[1] :]
    tokens = tokens.astype(others.dtype)
    if not rest.shape[1]:
        return tokens
    if xp is jnp and not jax.sharding.get_abstract_mesh().empty:
        where = jax.typeof(tokens).sharding  # conditions from the host are whole on every device
        if jax.typeof(rest).sharding != where:
            rest = jax.sharding.reshard(rest, where.spec)
    return xp.concatenate([tokens, rest], 1)


def _tokens_per_frame(conditions: Conditions, latents: Array) -> int:
    """Tokens of a latent frame, if the frames of `latents` are as large as those of the clip."""
    rows, columns = conditions.grid[1:]
    if latents.shape[2:4] != (rows, columns):
        raise UserError(
            f"frames of {latents.shape[2]}x{latents.shape[3]} latents do not fit a clip of "
            f"{rows}x{columns}"
        )
    return rows * columns


def _frame_positions(
    grid: tuple[int, int, int],
    frame: int,
    fps: float | Array,
    strides: tuple[int, int, int],
    *,
    causal: bool,
) -> Array:
    """[B or 1, 3, T, 2] of latent frames from a pixel frame on; a single one lasts for one."""
    bounds = geometry.pixel_bounds(grid, strides, causal)
    bounds[:, 0] += frame
    if grid[0] == 1:
        bounds[:, 0, :, 1] = bounds[:, 0, :, 0] + 1
    return geometry.in_seconds(bounds, fps)


def _grown(
    conditions: Conditions,
    count: int,
    attention: Array | float | None,  # [], [n] or [B, n]
) -> Array | None:
    """Strengths [B or 1, T + n, T + n] with those of n more tokens."""
    before = conditions.attention
    if attention is None and before is None:
        return None
    length = conditions.clean.shape[1]
    xp = _numpy(attention, before)
    attention = xp.asarray(1.0 if attention is None else attention, np.float32)
    if attention.ndim and attention.shape[-1] != count:
        raise UserError(f"{attention.shape[-1]} attention strengths for {count} tokens")
    rows = max(1 if before is None else before.shape[0], attention.size // count)
    attention = xp.broadcast_to(attention, (rows, count))
    before = np.ones((1, length, length), np.float32) if before is None else before
    before = xp.broadcast_to(before, (rows, length, length))
    own = np.arange(length) < conditions.clip_tokens
    across = attention[:, :, None] * own.astype(np.float32)  # [rows, n, T]
    above = xp.concatenate([before, across.swapaxes(1, 2)], 2)
    below = xp.concatenate([across, np.ones((rows, count, count), np.float32)], 2)
    return xp.concatenate([above, below], 1)


def _by_row(strength: Array | float, xp: Any) -> Array:
    """Strengths [] or [B] in float32, to broadcast against [B, T]."""
    strength = xp.asarray(strength, np.float32)
    return strength[:, None] if strength.ndim else strength


def _numpy(*arrays: Any) -> Any:
    """numpy for what lies on the host: nothing is compiled to put it together. Else jax.numpy."""
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np
