"""The sampler in as many guidance passes as asked for: one compiled program, weights resident.

The first pass is under the prompt. Every other one differs from it in a `Pass`, and the clean
estimate is moved away from what that pass sees:

    x0 = prompt + sum of strength * (prompt - other)

so that a strength is 0 for nothing, and one less than the usual scale of classifier-free guidance.
Source: `ltx_core/components/guiders.py`, `ltx_core/guidance/perturbations.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ltx2_jax.chips import compiler_options
from ltx2_jax.diffusion.sampler import Latents, denoise, in_passes, unguided
from ltx2_jax.models.transformer.streams import Keep
from ltx2_jax.sampling import pipeline
from ltx2_jax.sampling.pipeline import Request

# What a strength multiplies, one pair (video, audio) of float32 scalars for each pass.
Strengths = tuple[tuple[Array, Array], ...]
TextFields = dict[str, Array]  # `TEXT_FIELDS`


@dataclass(frozen=True)
class Pass:
    """How a pass differs from the one under the prompt."""

    prompt: bool = True  # False: under the empty caption
    skipped: tuple[int, ...] = ()  # blocks whose self-attention, of both streams, it skips
    exchange: bool = True  # False: each stream on its own


EMPTY_CAPTION = Pass(prompt=False)


def released_passes(layers: int) -> tuple[Pass, ...]:
    """Those that the released pipelines add by default, for a model of so many blocks.

    Without a prompt, with the self-attention of block 28 skipped, with the streams apart.
    """
    return EMPTY_CAPTION, Pass(skipped=(min(28, layers - 1),)), Pass(exchange=False)


def make_sampler() -> Callable[..., tuple[Array, Array]]:
    """The jitted `sample`, for the mesh in context."""
    static, options = ("graphdef", "request", "passes"), compiler_options(training=False)
    return jax.jit(sample, static_argnames=static, compiler_options=options)


def sample(
    params: Any,
    texts: tuple[TextFields, TextFields],  # of the prompts [B, S, ...], of no prompt [1, S, ...]
    rows: Array,  # [B], number of each clip: its noise is a function of (key, number)
    key: Array,
    sigmas: Array,  # [steps + 1]
    strengths: Strengths,
    *,
    graphdef: Any,
    request: Request,
    passes: tuple[Pass, ...],
) -> tuple[Array, Array]:
    """Text to clean latents of both streams: [B, F', H', W', C] and [B, A, M, C].

    `passes` are those beside the pass under the prompt. All run side by side in one batch.
    """
    model = nnx.merge(graphdef, params)
    clips, layers = rows.shape[0], model.transformer.cfg.num_layers
    text, null_text = (
        {name: jnp.broadcast_to(x, (clips, *x.shape[1:])) for name, x in fields.items()}
        for fields in texts
    )
    network = partial(pipeline.network, model, request)
    if passes:
        kept = any(p.skipped or not p.exchange for p in passes)
        conditions = [
            (text if p.prompt else null_text, _keep(p, clips, layers) if kept else None)
            for p in (Pass(), *passes)
        ]
        combine = partial(_guided, strengths)
        predict = in_passes(lambda condition: network(*condition), conditions, combine)
    else:
        predict = unguided(network, text)
    noise = pipeline.noise(model, request, rows, key)
    return pipeline.unpatchify(denoise(predict, noise, sigmas), request)


def _keep(p: Pass, clips: int, layers: int) -> Keep:
    """What a pass keeps, [B, L]."""
    rows = np.ones((2, clips, layers), bool)
    rows[0, :, list(p.skipped)] = False
    rows[1] = p.exchange
    own, cross = jnp.asarray(rows[0]), jnp.asarray(rows[1])
    return Keep(video_self=own, audio_self=own, audio_to_video=cross, video_to_audio=cross)


def _guided(strengths: Strengths, prompt: Latents, *others: Latents) -> Latents:
    """The estimate under the prompt moved away from the others, in float32."""

    def stream(index: int) -> Array:
        x = prompt[index].astype(jnp.float32)
        away = sum(
            strength[index] * (x - other[index].astype(jnp.float32))
            for strength, other in zip(strengths, others, strict=True)
        )
        return (x + away).astype(prompt[index].dtype)

    return Latents(stream(0), stream(1))
