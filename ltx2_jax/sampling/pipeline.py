"""Prompt to clip in one object.

    pipe = Pipeline.from_workdir("workdir/quickstart")
    clip = pipe("a red ball bounces three times")
    clip.save("ball.mp4")

    pipe = Pipeline.from_pretrained(
        "ltx-2.3-22b-distilled-1.1.safetensors",
        text_encoder="gemma-3-12b-it/",
        upsampler="ltx-2.3-spatial-upscaler-x2-1.1.safetensors",
    )
    clip = pipe("a dog barks twice", image="dog.png")

`Pipeline.make` has all that can be given.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
from ltx2_jax.data.schema import Schema
from ltx2_jax.diffusion import geometry, schedules
from ltx2_jax.errors import UserError
from ltx2_jax.files import local_folder, location
from ltx2_jax.media.media import Clip
from ltx2_jax.models.quantized import PRODUCTS, check_form, described
from ltx2_jax.sampling.loading import (
    Files,
    RunWeights,
    Weights,
    check_host,
    fit_together,
    fitting_mesh,
)
from ltx2_jax.sampling.loras import adapter, lora_bytes
from ltx2_jax.sampling.making import Maker
from ltx2_jax.sampling.output import Made
from ltx2_jax.sampling.programs import EMPTY_CAPTION, Request, make_sampler
from ltx2_jax.sampling.recipes import Recipe, Scales, Stage, one_stage
from ltx2_jax.sampling.tasks import several
from ltx2_jax.sharding import batch_shards, make_mesh
from ltx2_jax.text.cache import TextCache
from ltx2_jax.text.captions import FeatureEncoder, caption_features, load_caption_encoder, tell_cut
from ltx2_jax.training import trainable
from ltx2_jax.training.checkpoint import ASSETS
from ltx2_jax.training.checks import check_mesh
from ltx2_jax.training.objective import reference_factors
from ltx2_jax.training.runs import weights_of_run


@dataclass(frozen=True)
class ClipSize:
    """Pixel frames, rows, columns and frames per second of a clip."""

    num_frames: int
    height: int
    width: int
    fps: float

    @classmethod
    def of(cls, schema: Schema) -> "ClipSize":
        return cls(schema.num_frames, schema.height, schema.width, schema.fps)


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
        reads: tuple[int, int] | None = None,
    ):
        """`reads`: factors of the references that the run trains on; see `Maker`."""
        self.reads = reads
        self.config, self.params, self.codec = config, params, codec
        self.text_encoder, self.size = text_encoder, size
        self.mesh = mesh or make_mesh(devices=jax.devices()[:1])
        check_mesh(config.model.num_heads, math.prod(self._latent_shapes()[0]), self.mesh)
        with jax.set_mesh(self.mesh):
            self._graph = trainable.sampled_graph(config)
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

    @staticmethod
    def from_pretrained(
        *files: str | Path,
        text_encoder: str | Path | None = None,
        mesh: jax.sharding.Mesh | None = None,
        loras: Any = (),
        distilled_lora: Any = None,
        upsampler: str | Path | None = None,
        kind: str | None = None,
        text_cache: str | Path | None = None,
        keep: bool | None = None,
        dtype: str = "bfloat16",
        quantize: str | None = None,
        offload: bool = False,
    ) -> "Released":
        """A released model. Headers are read and checked; weights are when they are first used.

        Args:
          files: a checkpoint, or the files of the split pack, or a folder of them, here or on the
            Hugging Face Hub; LoRAs, upsampler and text encoder likewise.
          text_encoder: a Gemma folder or a packed text encoder; None if `files` have one.
          mesh: None takes all devices, and for every call the mesh that `sampling.meshes` chooses.
          loras: one or a list of files, or of (file, strength): a number, a `Strength` of the
            streams, or a list of those, one a stage; or as text "VIDEO,AUDIO,CROSS" and
            "STAGE1/STAGE2".
          distilled_lora: a file or (file, strength), which the recipes of two stages need.
          upsampler: a latent upsampler x2, for a second stage.
          kind: "dev" or "distilled"; None goes by the name of the file.
          text_cache: a folder that keeps features of prompts.
          keep: whether text encoder, transformer and codec stay in memory beside one another; None:
            if they fit.
          dtype: "bfloat16" or "float32", of activations and matrices.
          quantize: "int8", "fp8" or "int4": the matrices of all blocks of transformer, connectors
            and text encoder are kept so; "int8-products" or "fp8-products": what the transformer
            multiplies them by is rounded, too, for the faster units of a chip.
          offload: the layers of transformer and text encoder wait in the memory of the host, and
            each comes to the devices ahead of its use.

        Raises:
          UserError: what is missing, damaged, of another release, or too large.
        """
        check_form(quantize)
        found = Files.open(files, text_encoder, upsampler, kind)
        networks = dataclasses.replace(found.networks(dtype), quantized=quantize)
        heads = networks.transformer.num_heads
        adapters = []
        for given in several(loras):
            source, *strength = given if isinstance(given, tuple) else (given,)
            adapters.append(adapter(found.lora(source, networks), *strength))
        distilled = None
        if distilled_lora is not None:
            pair = isinstance(distilled_lora, tuple | list)
            source, *share = distilled_lora if pair else (distilled_lora,)
            distilled = found.lora(source, networks), *(share or [1.0])
        every = [one.lora for one in adapters] + ([distilled[0]] if distilled else [])
        beside = sum(map(lora_bytes, every)) if quantize else 0
        kept = {"form": quantize, "offload": offload, "adapters": beside}
        best = None if mesh else partial(fitting_mesh, found.release, heads, **kept)
        mesh = mesh or best()
        if offload:
            check_host(found.release, mesh, quantize)
        if quantize in PRODUCTS:
            hosts.say(described(quantize, mesh.devices.flat[0].device_kind))
        maker = Maker(
            Weights(found.release, networks, mesh, offload=offload),
            found.texts(mesh, dtype, text_cache, quantize, offload),
            lambda: found.codec(mesh, dtype),
            mesh,
            found,
            dtype,
            tuple(adapters),
            distilled,
            keep=not offload and fit_together(found, mesh, quantize) if keep is None else keep,
            spread=best,
        )
        return Released(maker)

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
        size, reads = ClipSize.of(schema), references_of(config, schema)
        return cls(config, params, codec, text_encoder, size, mesh, reads)

    def __call__(
        self, prompts: str | Sequence[str], *, sample: SampleConfig | None = None, **wishes: Any
    ) -> Clip | list[Clip]:
        """One clip per prompt; a single prompt gives a single clip.

        Of a released model, or with `wishes`, those of `make`. Else clip i of a list depends on its
        prompt and on (seed, i), not on what it is batched with; `sample` replaces the sampling
        settings of a run's config. Of several hosts, all of which call this, the first gets the
        clips.
        """
        if isinstance(prompts, str):
            return next(iter(self([prompts], sample=sample, **wishes)), None)
        if wishes:
            if sample is not None:
                raise UserError("sample= is for clips of a run as it was trained: give changes=")
            return [made.clip(self.codec) for made in self.make(prompts, **wishes)]
        return [
            decode_clip(self.codec, video, audio, self.size.fps)
            for video, audio in self.latents(prompts, sample=sample)
            if hosts.index() == 0
        ]

    def make(self, prompts: Sequence[str], **wishes: Any) -> list[Made]:
        """Clips as the sampler leaves them, one for each prompt: `Made.clip` decodes, or `.write`.

        What can be given (paths, pixels uint8 [H, W, 3] or `Clip`s for pictures, paths, `Clip`s or
        (samples, rate) for sounds; times are seconds):

          num_frames, or duration (seconds, or "auto" with auto_duration=(MIN, MAX)), height, width,
            fps: of the clip; picture=False or sound=False leaves a stream out
          recipe: a name of `recipes.RECIPES` or a `Recipe`; changes: {"stage1.steps": "20"};
            skip_stage_2
          seed: of the first clip, the others have those that follow; or one a clip
          negative_prompt; enhance_prompt, with enhancer: the Gemma that writes
          image: one, or a list, each an image or (image, frame, strength, crf): at frame 0 in the
            clip, else beside it
          keyframes: the same, all of them beside the clip; num_generated_keyframes (2.5)
          audio: sound for which a picture is made; audio_start, audio_max_duration
          video: alone, a picture for which sound is made; with start and end, a clip of which that
            span is made anew (retake="both", "video" or "audio"); with extend or extend_before, a
            clip that becomes so much longer
          references: what an IC-LoRA reads, one or a list, each a clip or (clip, strength,
            attention)
          dub: a clip whose speaker says other words; voice: a sound whose voice is heard
          batch_size: clips at a time

        Raises:
          UserError: naming what cannot be.
        """
        return self.maker.make(prompts, **wishes)

    @property
    def seconds(self) -> dict[str, float]:
        """Of the phases of the last `make`, and of decoding since."""
        return self.maker.seconds

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Counts the seconds of what is done within."""
        return self.maker.phase(name)

    @cached_property
    def maker(self) -> Maker:
        """What `make` works with."""
        texts, size, reads = self._texts, self.size, self.reads
        return maker_of_run(self.config, self.params, texts, self.codec, size, self.mesh, reads)

    def _texts(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        text = caption_features(self.text_encoder, prompts)
        tell_cut(text["text_mask"], "prompts", "text.length of the training")
        if isinstance(self.text_encoder, TextCache):
            self.text_encoder.free()
        return text

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
        shards = batch_shards(self.mesh)
        shards //= math.gcd(shards, _passes(sample))
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


class Released(Pipeline):
    """A released model; `Pipeline.from_pretrained` makes it."""

    def __init__(self, maker: Maker):
        self.maker = maker

    def __call__(self, prompts: str | Sequence[str], **wishes: Any) -> Clip | list[Clip]:
        """One clip per prompt; a single prompt gives a single clip. For `wishes` see `make`."""
        if isinstance(prompts, str):
            return self([prompts], **wishes)[0]
        made = self.make(prompts, **wishes)
        with self.phase("decoding"):
            return [one.clip(self.codec) for one in made]

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """On which the last clips were made."""
        return self.maker.mesh

    @property
    def codec(self) -> Codec:
        return self.maker.codec

    @property
    def release(self) -> str:
        """ "2.0", "2.3" or "2.5"."""
        return self.maker.files.version


def maker_of_run(
    config: Config,
    params: Any,
    texts: Callable[[Sequence[str]], dict[str, np.ndarray]] | None,
    codec: Codec,
    size: ClipSize,
    mesh: jax.sharding.Mesh,
    reads: tuple[int, int] | None = None,
) -> Maker:
    """What makes clips with the weights of a run; None for weights and texts, to check alone."""
    sample, release = config.sample, config.data.release
    stage = Stage(
        schedule=sample.schedule,
        steps=sample.steps,
        tokens=None,
        video=Scales(cfg=sample.video_guidance),
        audio=Scales(cfg=sample.audio_guidance),
    )
    crf = 0 if release == "linear" else one_stage(release).image_crf
    with jax.set_mesh(mesh):
        graph = trainable.sampled_graph(config)
    return Maker(
        RunWeights(params, config.networks, mesh, graph),
        texts,
        lambda: codec,
        mesh,
        keep=True,
        recipe=Recipe("one_stage", (stage,), image_crf=crf),
        size=(size.height, size.width),
        fps=size.fps,
        frames=size.num_frames,
        reads=reads,
        seed=sample.seed,
    )


def references_of(config: Config, schema: Schema) -> tuple[int, int] | None:
    """How many times smaller, and of fewer frames, the references are that a run trains on."""
    if all(condition.kind != "reference" for condition in config.flow.conditions("video")):
        return None
    return reference_factors(config.flow, {name: x.shape for name, x in schema.fields.items()})


def _passes(sample: SampleConfig) -> int:
    return 1 if sample.video_guidance == sample.audio_guidance == 1 else 2
