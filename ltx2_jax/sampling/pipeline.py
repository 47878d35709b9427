"""Prompt to clip in one object.

pipe = Pipeline.from_workdir("workdir/quickstart")
clip = pipe("a red ball bounces three times")
clip.save("ball.mp4")
"""

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tqdm import tqdm

from ltx2_jax.chips import compiler_options
from ltx2_jax.codecs.clips import decode_clip, write_clip
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.config import Config, SampleConfig
from ltx2_jax.data.records import read_schema
from ltx2_jax.diffusion import geometry, schedules
from ltx2_jax.diffusion.conditioning import first_frame_mask
from ltx2_jax.diffusion.sampler import Latents, Velocity, denoise, guided, rows_axis, unguided
from ltx2_jax.errors import UserError
from ltx2_jax.evaluation.contact_sheet import contact_sheet
from ltx2_jax.files import replacing
from ltx2_jax.media.media import Clip
from ltx2_jax.models import ltx2
from ltx2_jax.models.ltx2 import LTX2
from ltx2_jax.models.transformer.streams import Keep, Modality
from ltx2_jax.sharding import make_mesh, pin
from ltx2_jax.text.cache import TextCache
from ltx2_jax.text.captions import caption_features, load_caption_encoder, tell_cut
from ltx2_jax.text.encoder import TextEncoder
from ltx2_jax.training.checkpoint import ASSETS, weights_of_run
from ltx2_jax.training.checks import check_mesh


@dataclass(frozen=True)
class ClipSize:
    """Pixel frames, rows, columns and frames per second of a clip."""

    num_frames: int
    height: int
    width: int
    fps: float


class Pipeline:
    """A model with its codec and text encoder, on a mesh; call it with one prompt or a list."""

    def __init__(
        self,
        config: Config,
        params: Any,
        codec: Any,
        text_encoder: TextEncoder | TextCache,
        size: ClipSize,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.config, self.params, self.codec = config, params, codec
        self.text_encoder, self.size = text_encoder, size
        self.mesh = mesh or make_mesh(devices=jax.devices()[:1])
        check_mesh(config.model.num_heads, math.prod(self._latent_shapes()[0]), self.mesh)
        with jax.set_mesh(self.mesh):
            self._graph = ltx2.graph(config.networks)
            self._generate_latents = make_generate()

    @classmethod
    def from_workdir(
        cls,
        workdir: str | Path,
        *,
        step: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        text_cache: str | Path | None = None,
    ) -> "Pipeline":
        """The model that `train` left in a workdir: averaged weights if it averaged, else the last.

        `text_cache` is a folder for the features of prompts, if the text encoder is a released one:
        it is then loaded for new prompts only, and freed before the clips are sampled.

        Raises:
          UserError: no workdir, no checkpoint or assets there, or none of `step`.
        """
        mesh = mesh or make_mesh(devices=jax.devices()[:1])
        config, params, _ = weights_of_run(workdir, mesh, step=step, for_sampling=True)
        return cls.from_assets(config, params, Path(workdir) / ASSETS, mesh, text_cache)

    @classmethod
    def from_assets(
        cls,
        config: Config,
        params: Any,
        assets: str | Path,
        mesh: jax.sharding.Mesh,
        text_cache: str | Path | None = None,
    ) -> "Pipeline":
        """Weights in memory with the codec, text encoder and clip size of a dataset folder."""
        if not Path(assets).is_dir():
            raise UserError(
                f"{assets}: no such folder; train writes it beside the checkpoints, and sampling "
                "needs both: copy the whole workdir"
            )
        schema = read_schema(assets)
        codec = load_codec(Path(assets) / schema.codec, devices=list(mesh.devices.flat))
        text_encoder = load_caption_encoder(Path(assets) / schema.text_encoder, mesh, text_cache)
        size = ClipSize(schema.num_frames, schema.height, schema.width, schema.fps)
        return cls(config, params, codec, text_encoder, size, mesh)

    def __call__(
        self, prompts: str | Sequence[str], *, sample: SampleConfig | None = None
    ) -> Clip | list[Clip]:
        """One clip per prompt; a single prompt gives a single clip.

        Clip i of a list depends on its prompt and on (seed, i), not on what it is batched with.
        `sample` replaces the config's sampling settings.
        """
        if isinstance(prompts, str):
            return self([prompts], sample=sample)[0]
        return [
            decode_clip(self.codec, video, audio, self.size.fps)
            for video, audio in self.latents(prompts, sample=sample)
        ]

    def save(
        self, prompts: Sequence[str], paths: Sequence[Path], *, sample: SampleConfig | None = None
    ) -> None:
        """The clips of `__call__` straight into mp4 files, decoded and written piece by piece.

        Host memory does not grow with their length or number.
        """
        latents = self.latents(prompts, sample=sample)
        for path, (video, audio) in zip(paths, latents, strict=True):
            write_clip(path, self.codec, video, audio, self.size.fps)

    @property
    def clip_bytes(self) -> int:
        """Bytes of a clip's pixels."""
        return 3 * self.size.num_frames * self.size.height * self.size.width

    def latents(
        self, prompts: Sequence[str], *, sample: SampleConfig | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Latents [F', H', W', C] and [A, M, C] of a clip per prompt; see `__call__`."""
        sample = sample or self.config.sample
        # All at once, so that a prompt that cannot be encoded is refused before any clip is made.
        text = caption_features(self.text_encoder, [*prompts, ""])
        tell_cut(text["text_mask"][:-1], "prompts", "text.length of the training")
        if isinstance(self.text_encoder, TextCache):
            self.text_encoder.release()
        # Batches of one size, the last padded, so that one compiled program serves all. Guidance
        # passes of a clip fill shards of the data axis as well as clips do.
        shards = self.mesh.shape["data"] // math.gcd(self.mesh.shape["data"], _passes(sample))
        batch = -(-min(sample.batch_size, len(prompts)) // shards) * shards
        for start in tqdm(range(0, len(prompts), batch), desc="sampling", disable=None):
            rows = np.arange(start, start + batch)
            real = np.minimum(rows, len(prompts) - 1)
            # JAX_ENABLE_X64 would make other draws, and other clips.
            with jax.set_mesh(self.mesh), jax.enable_x64(False):
                latents = self._generate(text, real, rows, sample)
            video, audio = (np.asarray(x) for x in latents)
            yield from list(zip(video, audio, strict=True))[: len(prompts) - start]

    def _generate(
        self, text: dict[str, np.ndarray], real: np.ndarray, rows: np.ndarray, sample: SampleConfig
    ) -> tuple[Array, Array]:
        video_shape, audio_length = self._latent_shapes()
        num_tokens = int(np.prod(video_shape))
        sigmas = schedules.make_sigmas(sample.schedule, sample.steps, num_tokens)
        return self._generate_latents(
            self.params,
            {name: value[real] for name, value in text.items()},
            {name: value[-1:] for name, value in text.items()},
            rows,
            jax.random.key(sample.seed),
            jnp.asarray(sigmas),
            (jnp.float32(sample.video_guidance), jnp.float32(sample.audio_guidance)),
            graphdef=self._graph,
            request=Request(
                video_shape=video_shape,
                audio_length=audio_length,
                audio_bins=self.codec.audio.bins,
                strides=self.codec.video.strides,
                fps=self.size.fps,
                guided=_passes(sample) > 1,
                audio_clock=self.codec.audio.clock,
            ),
        )

    def _latent_shapes(self) -> tuple[tuple[int, int, int], int]:
        size = self.size
        shape = geometry.video_latent_shape(
            size.num_frames, size.height, size.width, self.codec.video.strides
        )
        rate = self.codec.audio.latents_per_second
        return shape, geometry.audio_latent_length(size.num_frames, size.fps, rate)


def _passes(sample: SampleConfig) -> int:
    return 1 if sample.video_guidance == sample.audio_guidance == 1 else 2


@dataclass(frozen=True)
class Request:
    """What one compiled sampler is specialised to."""

    video_shape: tuple[int, int, int]  # F', H', W'
    audio_length: int
    audio_bins: int
    strides: tuple[int, int, int]
    fps: float
    guided: bool  # one more pass, for the empty caption
    audio_clock: geometry.AudioClock = geometry.AUDIO_CLOCK


def make_generate() -> Callable[..., tuple[Array, Array]]:
    """The jitted `generate`, for the mesh in context."""
    options, static = compiler_options(training=False), ("graphdef", "request")
    return jax.jit(generate, static_argnames=static, compiler_options=options)


def generate(
    params: Any,
    text: dict[str, Array],  # `ltx2.TEXT_FIELDS` of the prompts, [B, S, ...]
    null_text: dict[str, Array],  # the same of the empty caption, [1, S, ...]
    rows: Array,  # [B], number of each clip: its noise is a function of (key, number)
    key: Array,
    sigmas: Array,  # [steps + 1]
    scales: tuple[Array, Array],  # of guidance: video, audio
    *,
    graphdef: Any,
    request: Request,
) -> tuple[Array, Array]:
    """Text to clean latents of both streams: [B, F', H', W', C] and [B, A, M, C]. One program."""
    model = nnx.merge(graphdef, params)
    text, null_text = (
        {name: jnp.broadcast_to(x, (rows.shape[0], *x.shape[1:])) for name, x in part.items()}
        for part in (text, null_text)
    )
    of_text = partial(network, model, request)
    if request.guided:
        predict = guided(of_text, text, null_text, scales)
    else:
        predict = unguided(of_text, text)
    return unpatchify(denoise(predict, noise(model, request, rows, key), sigmas), request)


def noise(model: LTX2, request: Request, rows: Array, key: Array) -> Latents:
    """What each clip starts from, a function of (key, its number in `rows` [B])."""
    cfg, lead = model.transformer.cfg, rows_axis(rows.shape[0])

    def stream(index: int, shape: tuple[int, int], tokens: str) -> Array:
        stream_key = jax.random.fold_in(key, index)
        keys = jax.vmap(lambda row: jax.random.fold_in(stream_key, row))(rows)
        return pin(
            jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys), lead, tokens, None
        )

    return Latents(
        stream(0, (math.prod(request.video_shape), cfg.in_channels), "video_tokens"),
        stream(1, (request.audio_length, cfg.audio_in_channels), "audio_tokens"),
    )


def unpatchify(clean: Latents, request: Request) -> tuple[Array, Array]:
    """Tokens to latents [B, F', H', W', C] and [B, A, M, C]."""
    # Whole clips per chip again: the grid axes below are not the sharded token axis.
    video = pin(clean.video, rows_axis(clean.video.shape[0]), None, None)
    return (
        geometry.unpatchify_video(video, request.video_shape),
        geometry.unpatchify_audio(clean.audio, request.audio_bins),
    )


def network(
    model: LTX2, request: Request, text: dict[str, Array], keep: Keep | None = None
) -> Velocity:
    """The velocity of both streams under text fields [B, S, ...]; see `sampler.Network`.

    `keep` has a row per clip here, [B, L].
    """
    video, audio = modalities(model, request, text)
    fixed = model.transformer.fixed(video, audio)
    keep = jax.tree.map(lambda rows: pin(rows.T, None, "batch"), keep)

    def velocity(x: Latents, sigma: Array) -> Latents:
        level = {"sigma": sigma, "timesteps": sigma[:, None]}
        streams = (
            dataclasses.replace(stream, latent=latent, **level)
            for stream, latent in zip((video, audio), x, strict=True)
        )
        return Latents(*model.transformer(*streams, keep, fixed))

    return velocity


def modalities(model: LTX2, request: Request, text: dict[str, Array]) -> tuple[Modality, Modality]:
    """Both streams without latents and noise levels: text, positions, marks."""
    rows = text["text_mask"].shape[0]
    text = {name: pin(x, "batch", *[None] * (x.ndim - 1)) for name, x in text.items()}
    video_context, audio_context, mask = model.context(text)
    positions = geometry.video_positions(request.video_shape, request.fps, request.strides)
    keyframes = None
    if model.transformer.cfg.keyframe_embedding:
        keyframes = first_frame_mask((rows, *request.video_shape))
    given = {"latent": None, "sigma": None, "timesteps": None, "context_mask": mask}
    video = Modality(**given, positions=jnp.asarray(positions), context=video_context,
                     keyframes_mask=keyframes)  # fmt: skip
    positions = geometry.audio_positions(request.audio_length, request.audio_clock)
    return video, Modality(**given, positions=jnp.asarray(positions), context=audio_context)


def write_clips(clips: Sequence[Clip], prompts: Sequence[str], folder: Path) -> None:
    """Clips to files, for a person to look at.

    `samples/NNN.mp4` are all clips and `samples/captions.csv` their prompts, in the columns that
    `prepare` reads; `sample.mp4` is the first clip, `samples.png` shows the first four. Small clips
    are enlarged, pixel by pixel, to be watchable.
    """
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("video", "caption"))
    rows.writerows((f"{i:03d}.mp4", prompt) for i, prompt in enumerate(prompts))
    for i, clip in enumerate(clips):
        enlarged(clip).save(folder / "samples" / f"{i:03d}.mp4")
    with replacing(folder / "samples" / "captions.csv") as temporary:
        temporary.write_text(table.getvalue(), encoding="utf-8")
    enlarged(clips[0]).save(folder / "sample.mp4")
    contact_sheet(folder / "samples.png", clips[:4], prompts[:4], title="generated clips")
    count = f"{len(clips)} clip{'s' if len(clips) > 1 else ''}"
    print(f"wrote {folder}/sample.mp4, {folder}/samples.png and {count} in {folder}/samples")


def enlarged(clip: Clip, shortest: int = 256) -> Clip:
    """A clip of at least `shortest` pixels a side, every pixel repeated."""
    factor = max(1, shortest // min(clip.video.shape[1:3]))
    video = clip.video.repeat(factor, axis=1).repeat(factor, axis=2)
    return dataclasses.replace(clip, video=video)
