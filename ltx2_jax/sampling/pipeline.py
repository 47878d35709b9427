"""Prompt to clip in one object.

pipe = Pipeline.from_workdir("workdir/quickstart")
clip = pipe("a red ball bounces three times")
clip.save("ball.mp4")
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from ltx2_jax import hosts
from ltx2_jax.codecs.clips import decode_clip, write_clip
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.config import Config, SampleConfig
from ltx2_jax.data.records import read_schema
from ltx2_jax.diffusion import geometry, schedules
from ltx2_jax.errors import UserError
from ltx2_jax.files import local_folder, location
from ltx2_jax.media.media import Clip
from ltx2_jax.models import ltx2
from ltx2_jax.sampling.programs import EMPTY_CAPTION, Request, make_sampler
from ltx2_jax.sharding import make_mesh
from ltx2_jax.text.cache import TextCache
from ltx2_jax.text.captions import FeatureEncoder, caption_features, load_caption_encoder, tell_cut
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
        codec: Codec,
        text_encoder: FeatureEncoder,
        size: ClipSize,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.config, self.params, self.codec = config, params, codec
        self.text_encoder, self.size = text_encoder, size
        self.mesh = mesh or make_mesh(devices=jax.devices()[:1])
        check_mesh(config.model.num_heads, math.prod(self._latent_shapes()[0]), self.mesh)
        with jax.set_mesh(self.mesh):
            self._graph = ltx2.graph(config.networks)
            self._sampler = make_sampler()

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
        assets = local_folder(location(workdir) / ASSETS)
        return cls.from_assets(config, params, assets, mesh, text_cache)

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
        # Of several hosts each has text features of its own, and the first decodes.
        here = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
        own = mesh if len(here) == mesh.size else make_mesh(devices=here[:1])
        codec = load_codec(Path(assets) / schema.codec, devices=here)
        text_encoder = load_caption_encoder(Path(assets) / schema.text_encoder, own, text_cache)
        size = ClipSize(schema.num_frames, schema.height, schema.width, schema.fps)
        return cls(config, params, codec, text_encoder, size, mesh)

    def __call__(
        self, prompts: str | Sequence[str], *, sample: SampleConfig | None = None
    ) -> Clip | list[Clip]:
        """One clip per prompt; a single prompt gives a single clip.

        Clip i of a list depends on its prompt and on (seed, i), not on what it is batched with.
        `sample` replaces the config's sampling settings. Of several hosts, all of which call this,
        the first gets the clips.
        """
        if isinstance(prompts, str):
            return next(iter(self([prompts], sample=sample)), None)
        return [
            decode_clip(self.codec, video, audio, self.size.fps)
            for video, audio in self.latents(prompts, sample=sample)
            if hosts.index() == 0
        ]

    def save(
        self, prompts: Sequence[str], paths: Sequence[Path], *, sample: SampleConfig | None = None
    ) -> None:
        """The clips of `__call__` straight into mp4 files, decoded and written piece by piece.

        Host memory does not grow with their length or number.
        """
        latents = self.latents(prompts, sample=sample)
        for path, (video, audio) in zip(paths, latents, strict=True):
            if hosts.index() == 0:
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
            self.text_encoder.free()
        # Batches of one size, the last padded, so that one compiled program serves all. Guidance
        # passes of a clip fill shards of the data axis as well as clips do.
        shards = self.mesh.shape["data"] // math.gcd(self.mesh.shape["data"], _passes(sample))
        batch = -(-min(sample.batch_size, len(prompts)) // shards) * shards
        silent = True if hosts.index() else None  # or where nobody looks
        for start in tqdm(range(0, len(prompts), batch), desc="sampling", disable=silent):
            rows = np.arange(start, start + batch)
            real = np.minimum(rows, len(prompts) - 1)
            # JAX_ENABLE_X64 would make other draws, and other clips.
            with jax.set_mesh(self.mesh), jax.enable_x64(False):
                latents = self._sample(text, real, rows, sample)
            video, audio = (hosts.whole(x) for x in latents)
            yield from list(zip(video, audio, strict=True))[: len(prompts) - start]

    def _sample(
        self, text: dict[str, np.ndarray], real: np.ndarray, rows: np.ndarray, sample: SampleConfig
    ) -> tuple[Array, Array]:
        video_shape, audio_length = self._latent_shapes()
        num_tokens = int(np.prod(video_shape))
        sigmas = schedules.make_sigmas(sample.schedule, sample.steps, num_tokens)
        guided = _passes(sample) > 1
        scales = np.float32(sample.video_guidance), np.float32(sample.audio_guidance)
        return self._sampler(
            self.params,
            (
                {name: value[real] for name, value in text.items()},
                {name: value[-1:] for name, value in text.items()},
            ),
            rows,
            jax.random.key(sample.seed),
            jnp.asarray(sigmas),
            (tuple(scale - np.float32(1) for scale in scales),) if guided else (),
            graphdef=self._graph,
            request=Request(
                video_shape=video_shape,
                audio_length=audio_length,
                audio_bins=self.codec.audio.bins,
                strides=self.codec.video.strides,
                fps=self.size.fps,
                audio_clock=self.codec.audio.clock,
            ),
            passes=(EMPTY_CAPTION,) if guided else (),
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
