"""Prompts and a task to latents: text, what is given, stages, each with the memory to itself."""

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx

from ltx2_jax import __version__, hosts
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.diffusion import geometry
from ltx2_jax.errors import UserError
from ltx2_jax.sampling import recipes, stages, tasks
from ltx2_jax.sampling.given import continued, encode, last_frames
from ltx2_jax.sampling.loading import Files, RunWeights, Weights, explain
from ltx2_jax.sampling.loras import OFF, Adapter, Used, even
from ltx2_jax.sampling.output import Made
from ltx2_jax.sampling.programs import make_sampler
from ltx2_jax.sampling.recipes import Recipe
from ltx2_jax.sampling.stages import Found
from ltx2_jax.sampling.tasks import Asked, KnownAudio, KnownVideo, Task
from ltx2_jax.text.enhancement import enhance
from ltx2_jax.training.checks import check_mesh
from ltx2_jax.weights.lora_files import Lora

# What a released model is led away from where guidance asks for a prompt without a wish of its own.
NEGATIVE = (
    "blurry, low quality, noisy, compression artifacts, overexposed, washed out, distorted faces, "
    "deformed hands, extra limbs, flicker, jitter, frozen picture, subtitles, watermark, logo, "
    "text, cartoonish, muffled or clipped sound, hiss, hum, echo, robotic voice, sound out of sync"
)
ONE_STAGE_SIZE, TWO_STAGE_SIZE = (512, 768), (1024, 1536)
SEED = 10
OVERLAP = 2.0  # seconds that a part of a long clip sees of the part before
SECONDS = (1.0, 20.0)  # that a duration head is held to


@dataclass
class Way:
    """How clips are made; what they are is `tasks.Asked`. See `Pipeline.make`."""

    recipe: str | Recipe | None = None
    changes: dict[str, str] | None = None
    negative_prompt: str | None = None
    seed: int | Sequence[int] | None = None
    auto_duration: Sequence[float] | None = None  # limits of a length that the model chooses
    skip_stage_2: bool = False
    enhance_prompt: bool = False
    enhancer: Any = None
    batch_size: int = 1

    @classmethod
    def of(cls, wishes: dict[str, Any]) -> tuple["Way", dict[str, Any]]:
        """The way that some of the wishes say, and the others; a length by the model is one."""
        given = dict(wishes)
        names = [field.name for field in dataclasses.fields(cls) if field.name in given]
        way = cls(**{name: given.pop(name) for name in names})
        if given.get("duration") == "auto" or way.auto_duration is not None:
            given.pop("duration", None)
            way.auto_duration = way.auto_duration or SECONDS
        return way, given


@dataclass
class Maker:
    """A model with its codec and text encoder, each of which may be loaded only when it is needed.

    `files` are those of a released model; None for a training run, whose `recipe` and `size` are
    those that it was trained with.
    """

    weights: Weights | RunWeights
    texts: Callable[[Sequence[str]], dict[str, np.ndarray]]
    open_codec: Callable[[], Codec]
    mesh: jax.sharding.Mesh
    files: Files | None = None
    dtype: str = "bfloat16"
    adapters: tuple[Adapter, ...] = ()
    distilled_lora: tuple[Lora, float] | None = None
    keep: bool = False
    recipe: Recipe | None = None
    size: tuple[int, int] | None = None
    fps: float | None = None
    frames: int | None = None
    reads: tuple[int, int] | None = None  # as `Adapter.scales`, of a run that trains on references
    seed: int = SEED
    seconds: dict[str, float] = field(default_factory=dict)  # of the phases, since the last `make`
    # The best mesh for (rows=, tokens=), as `meshes.choose` has them, where none was asked for.
    spread: Callable[..., jax.sharding.Mesh] | None = None
    _codec: Codec | None = None

    def __post_init__(self):
        self._trace()

    def _trace(self) -> None:
        """The sampler for the mesh."""
        marked = self.weights.config.transformer.keyframe_embedding
        with jax.set_mesh(self.mesh):
            sampler = make_sampler()
        self._program = stages.Program(sampler, self.weights.graph(), self.mesh, marked)

    @property
    def codec(self) -> Codec:
        self._codec = self._codec or self.open_codec()
        return self._codec

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the seconds of a part of the work, and explains a lack of memory in it."""
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            explain(error, name)
            raise
        finally:
            spent = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    # ---- what is to be made ------------------------------------------------------------------

    def chosen(self, name: str | Recipe | None, changes: dict[str, str]) -> Recipe:
        """The recipe: by name, by what there is, or as given; with changes."""
        if isinstance(name, Recipe):
            return name.replaced(changes)
        if self.files is None:
            if name not in (None, "one_stage"):
                raise UserError(f"recipe {name}: a training run has one stage")
            return self.recipe.replaced(changes)
        recipe = recipes.choose(
            self.files.version,
            self.files.kind,
            upsampler=self.files.upsampler is not None,
            distilled_lora=self.distilled_lora is not None,
            layers=self.weights.config.transformer.num_layers,
            name=name,
        )
        return recipe.replaced(changes)

    def check(self, prompts: Sequence[str], **wishes: Any) -> None:
        """UserError for what `make` could not do with these: files are read, and no weights."""
        how, given = Way.of(wishes)
        _seeds(self.seed if how.seed is None else how.seed, len(prompts))
        plan = self.chosen(how.recipe, how.changes or {})
        if how.enhance_prompt:
            self._writer(how.enhancer)
        if how.auto_duration is not None:
            self._check_auto(prompts, how.auto_duration)
        self._task(Asked(**given), plan, how.skip_stage_2)

    def make(self, prompts: Sequence[str], **wishes: Any) -> list[Made]:
        """See `Pipeline.make`; `wishes` are the fields of `Way` and of `tasks.Asked`."""
        self.seconds = {}
        self._free_codec()
        how, given = Way.of(wishes)
        seeds = _seeds(self.seed if how.seed is None else how.seed, len(prompts))
        plan = self.chosen(how.recipe, how.changes or {})
        if how.enhance_prompt:
            prompts = self._enhanced(prompts, how.enhancer, seeds[0], given)
        negative = how.negative_prompt
        if negative is None:
            negative = "" if self.files is None else NEGATIVE
        if how.auto_duration is not None:
            fps = given.get("fps") or tasks.FPS
            given["num_frames"] = self._auto_frames(prompts, negative, how.auto_duration, fps)
        task, plan = self._task(Asked(**given), plan, how.skip_stage_2)
        if task.fresh and task.picture and task.num_frames > self._longest(task.fps):
            again = {"recipe": how.recipe, "changes": how.changes, "negative_prompt": negative,
                     "skip_stage_2": how.skip_stage_2}  # fmt: skip
            return [self._long(*of, task, again, given) for of in zip(prompts, seeds, strict=True)]
        self._settle(plan, task, len(prompts))
        self._tell(plan, task, seeds)
        text = self._text([*prompts, negative])
        if not self.keep and hasattr(self.texts, "free"):
            self.texts.free()
        latents = self._run_stages(plan, task, text, seeds, how.batch_size)
        about = self._about(plan, task, negative)
        return [
            Made(video, audio, task, prompt, {**about, "prompt": prompt, "seed": s})
            for (video, audio), prompt, s in zip(latents, prompts, seeds, strict=True)
        ]

    def _task(self, asked: Asked, plan: Recipe, skip_stage_2: bool) -> tuple[Task, Recipe]:
        """The task, and the recipe as it fits it."""
        strides = self.codec.video.strides
        if asked.video is not None or not asked.picture:
            # A part of a clip, or no picture: no small stage comes first.
            plan = recipes.at_full_size(plan)
        smallest = min(stage.size for stage in plan.stages)
        size = self.size or (ONE_STAGE_SIZE if smallest == 1 else TWO_STAGE_SIZE)
        if self.fps is not None and asked.fps is None and asked.video is None and asked.dub is None:
            asked.fps = self.fps
        lengths = (asked.num_frames, asked.duration, asked.video, asked.dub, asked.audio)
        if self.frames is not None and all(x is None for x in lengths):
            asked.num_frames = self.frames
        scales = next(
            (a.scales for a in self.adapters if a.scales is not None), self.reads or (1, 1)
        )
        reads = tasks.several(asked.references) or asked.dub is not None
        finest = smallest / (scales[0] if reads else 1)
        task = tasks.make_task(
            asked,
            strides=strides,
            multiple=round(math.lcm(*strides[1:]) / finest),
            size=size,
            scales=scales,
            longest=self.weights.config.transformer.max_pos[0],
        )
        self._check(task, plan)
        if skip_stage_2 and len(plan.stages) > 1:
            share = plan.stages[0].size
            task = dataclasses.replace(
                task, height=round(task.height * share), width=round(task.width * share)
            )
            plan = recipes.at_full_size(plan)
        return task, plan

    def _check(self, task: Task, plan: Recipe) -> None:
        config = self.weights.config.transformer
        for adapter in self.adapters:
            if adapter.scales is not None and adapter.scales != (1, 1) and not task.references:
                raise UserError(
                    f"{adapter.lora.name}: is an IC-LoRA, which reads a reference clip: give "
                    "--video-conditioning (references=)"
                )
        if task.references and not self.adapters and self.reads is None:
            how = "give --lora (loras=)" if self.files else "this run trains on none"
            raise UserError(f"references: only an IC-LoRA reads them; {how}")
        if task.slots and not config.keyframe_embedding:
            raise UserError("generated keyframes: only for models of LTX-2 2.5")
        if not config.audio_video_attention and task.partial:
            raise UserError("this model was trained without attention between sound and picture")

    def _settle(self, plan: Recipe, task: Task, clips: int) -> None:
        """Moves to the best mesh for the work, if none was asked for.

        Raises:
          UserError: the one that was asked for does not divide heads and tokens.
        """
        shapes = [stages.Shapes.of(task, self.codec, *size) for size in _sizes(plan, task)]
        tokens = [math.prod(shape.video) for shape in shapes] if task.picture else []
        if self.spread is not None:
            rows = [clips * (1 + len(stages.passes(stage, None)[0])) for stage in plan.stages]
            best = self.spread(rows=rows, tokens=tokens + stages.beside(task, shapes))
            if best != self.mesh:
                self.mesh = best
                self.weights.move(best)
                self._trace()
        for count in tokens:
            check_mesh(self.weights.config.transformer.num_heads, count, self.mesh)

    def _tell(self, plan: Recipe, task: Task, seeds: Sequence[int]) -> None:
        """What is going to be made, before the work begins."""
        for note in task.notes:
            hosts.say(f"note: {note}")
        distilled = plan.distilled or (self.files is not None and self.files.kind == "distilled")
        if distilled and any(s.video.on or s.audio.on for s in plan.stages):
            hosts.say(
                "note: guidance on a distilled model, which was made to need none: colours and "
                "contrast become too strong; scales of 1 and stg 0 turn it off"
            )
        for adapter in self.adapters:
            if adapter.scales == (1, 1) and not task.references:
                hosts.say(
                    f"note: {adapter.lora.name} says that it reads a reference clip; none is given"
                )
        whole = f"{task.width}x{task.height}, " if task.picture else "sound alone, "
        hosts.say(plan.described())
        hosts.say(
            f"{len(seeds)} clip{'s' if len(seeds) > 1 else ''}: {whole}{task.num_frames} frames at "
            f"{task.fps:g} fps ({task.seconds:.2f} s), seed{'s' if len(seeds) > 1 else ''} "
            f"{', '.join(map(str, seeds))}"
        )

    # ---- longer than the model knows -------------------------------------------------------------

    def _longest(self, fps: float) -> int:
        """Frames of the longest clip that the model was trained on."""
        seconds = self.weights.config.transformer.max_pos[0]
        return geometry.snap_frames(math.floor(seconds * fps + 1e-6), self.codec.video.strides[0])

    def _long(
        self, prompt: str, seed: int, task: Task, again: dict[str, Any], given: dict[str, Any]
    ) -> Made:
        """A clip in parts, each of which goes on from the end of the one before.

        The model sees the last seconds of picture and sound, as it does when a clip is extended.
        """
        total, most, stride = task.num_frames, self._longest(task.fps), self.codec.video.strides[0]
        shared = geometry.snap_frames(round(OVERLAP * task.fps), stride)
        shared = min(max(shared, stride + 1), geometry.snap_frames(most - stride, stride))
        parts = 1 + -(-(total - most) // (most - shared))
        hosts.say(
            f"note: {task.seconds:.1f} s are more than the {most / task.fps:.1f} s that the model "
            f"was trained on: made in {parts} parts, each from the last {shared / task.fps:.1f} s "
            "of the one before; what a part does not see, it does not keep to"
        )
        sizes = {"height": task.height, "width": task.width, "fps": task.fps}
        first = {**given, **again, "num_frames": most, "seed": seed}
        (made,) = self.make([prompt], **first)
        clip, spent, about = made.clip(self.codec), dict(self.seconds), made.about
        again["skip_stage_2"] = False
        for part in range(1, parts):
            have = len(clip.video)
            tail = last_frames(clip, shared)
            seconds = min(most - shared, total - have) / task.fps
            more = {**again, **sizes, "video": tail, "extend": seconds, "sound": task.sound}
            (made,) = self.make([prompt], **more, seed=(seed + 7919 * part) % 2**32)
            clip = continued(clip, made.clip(self.codec), shared)
            spent = {k: spent.get(k, 0) + self.seconds.get(k, 0) for k in {**spent, **self.seconds}}
        self.seconds = spent
        sound = None if clip.audio is None else KnownAudio(clip.audio, clip.sample_rate)
        whole = dataclasses.replace(task, video=KnownVideo(clip.video), audio=sound)
        return Made(
            None, None, whole, prompt, about | {"clip": about["clip"] | {"num_frames": total}}
        )

    # ---- text ----------------------------------------------------------------------------------

    def _enhanced(
        self, prompts: Sequence[str], gemma: Any, seed: int, given: dict[str, Any]
    ) -> list[str]:
        gemma = self._writer(gemma)
        mode = "image-to-video" if given.get("image") is not None else "text-to-video"
        with self.phase("enhancing prompts"):
            settings = {"mode": mode, "seed": seed, "mesh": self.mesh, "dtype": self.dtype}
            written = enhance(prompts, gemma, **settings)
        for prompt in written:
            hosts.say(f"prompt: {prompt}")
        return written

    def _writer(self, gemma: Any) -> Any:
        """The Gemma that writes prompts out: the one given, or the model's own."""
        if gemma is None and (self.files is None or self.files.version == "2.5"):
            raise UserError(
                "enhance_prompt: give --prompt-enhancer-gemma-root (enhancer=), an instruct "
                "Gemma: this text encoder does not write"
            )
        return self.files.text_encoder if gemma is None else gemma

    def _text(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        with self.phase("text"):
            return self.texts(prompts)

    def _auto_frames(
        self, prompts: Sequence[str], negative: str, limits: Sequence[float], fps: float
    ) -> int:
        """Frames of the duration that the model itself finds right for a prompt."""
        self._check_auto(prompts, limits)
        low, high = limits
        text = self._text([*prompts, negative])
        head = self.files.release.module("duration_head", self.mesh)
        graph, params = self.weights.connectors()
        first = {name: value[:1] for name, value in text.items()}
        audio = first.get("audio_text", first["video_text"])

        @jax.jit
        def found(params: Any, head: nnx.Module, *text: jax.Array) -> jax.Array:
            return head(*nnx.merge(graph, params)(*text)[:2])

        with jax.set_mesh(self.mesh):
            made = found(params, head, first["video_text"], audio, first["text_mask"])
            seconds = float(hosts.whole(made)[0])
        stride = self.codec.video.strides[0]
        lowest, highest = math.ceil(low * fps - 1e-6), math.floor(high * fps + 1e-6)
        frames = geometry.seconds_to_frames(seconds, fps, max(1, lowest), max(1, highest), stride)
        hosts.say(f"duration: {seconds:.2f} s by the model, {frames} frames")
        return frames

    def _check_auto(self, prompts: Sequence[str], limits: Sequence[float]) -> None:
        if self.files is None or "duration_head" not in self.files.release.networks:
            raise UserError(
                'duration="auto": the model has no duration head (that of 2.5 is in a file of its '
                "own: --duration-head-path)"
            )
        if len(prompts) > 1:
            raise UserError('duration="auto": for one prompt at a time, as clips differ in length')
        if len(limits) != 2 or not 0 < limits[0] <= limits[1]:
            raise UserError("auto_duration: give MIN and MAX seconds, or neither")

    # ---- stages ----------------------------------------------------------------------------------

    def _run_stages(
        self, plan: Recipe, task: Task, text: dict[str, np.ndarray], seeds: list[int], batch: int
    ) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
        """Latents of every clip: [F', H', W', C] and [A, M, C]."""
        sizes = _sizes(plan, task)
        shapes = [stages.Shapes.of(task, self.codec, *size) for size in sizes]
        with self.phase("encoding what is given"):
            encoded = [
                # References are for the first stage, as is the LoRA that reads them.
                encode(task, self.codec, *size, plan.image_crf, references=number == 0)
                for number, size in enumerate(sizes)
            ]
        self._free_codec()
        found, sound = None, None
        for number, stage in enumerate(plan.stages):
            if number:
                found = self._between(plan, number, found)
            loras = self._loras(plan, number)
            with self.phase("loading weights"):
                params = self.weights.params(loras)
                program = dataclasses.replace(self._program, graph=self.weights.graph(loras))
            with self.phase(f"stage {number + 1}"):
                found = stages.run(
                    stage,
                    program,
                    params,
                    shapes[number],
                    task,
                    encoded[number],
                    text,
                    seeds,
                    found,
                    number=number,
                    batch=batch,
                )
            if number == plan.sound_of % len(plan.stages):
                sound = [clip.audio for clip in found]
        if not self.keep:
            del params
            self.weights.free()
        return [(clip.video, audio) for clip, audio in zip(found, sound, strict=True)]

    def _between(self, plan: Recipe, number: int, found: list[Found]) -> list[Found]:
        """Latents at the size of a stage, from those of the stage before."""
        growth = plan.stages[number].size / plan.stages[number - 1].size
        if growth == 1:
            return found
        if growth != 2 or self.files is None or self.files.upsampler is None:
            raise UserError(
                f"stage{number + 1}.size: from x{plan.stages[number - 1].size:g} to "
                f"x{plan.stages[number].size:g} needs the upsampler x2 (--spatial-upsampler-path)"
            )
        with self.phase("upsampling"):
            upsample = self.files.load_upsampler(self.dtype)
            return [
                clip._replace(
                    video=upsample(clip.video[None])[0],
                    # Every keyframe is a clip of one frame.
                    slots=None if clip.slots is None else upsample(clip.slots[:, None])[:, 0],
                )
                for clip in found
            ]

    def _loras(self, plan: Recipe, number: int) -> Used:
        used = [(adapter.lora, adapter.at(number)) for adapter in self.adapters]
        share = plan.stages[number].distilled_lora
        if share and self.distilled_lora is not None:
            lora, strength = self.distilled_lora
            used.append((lora, even(share * strength)))
        return tuple((lora, s) for lora, s in used if s != OFF)

    def _free_codec(self) -> None:
        if not self.keep and self.files is not None:
            self._codec = None
            gc.collect()

    def _about(self, plan: Recipe, task: Task, negative: str) -> dict[str, Any]:
        sizes = ("num_frames", "height", "width", "fps")
        return {
            "made_by": f"ltx2_jax {__version__}",
            "model": None if self.files is None else self.files.named(),
            "loras": [adapter.lora.name for adapter in self.adapters],
            "recipe": dataclasses.asdict(plan),
            "negative_prompt": negative,
            "clip": {name: getattr(task, name) for name in sizes},
        }


def _sizes(plan: Recipe, task: Task) -> list[tuple[int, int]]:
    """Height and width of every stage."""
    return [(round(task.height * s.size), round(task.width * s.size)) for s in plan.stages]


def _seeds(seed: int | Sequence[int], clips: int) -> list[int]:
    """One a clip: the one given and those that follow it, or as many as there are clips."""
    if not clips:
        raise UserError("no prompts")
    seeds = [(seed + i) % 2**32 for i in range(clips)] if isinstance(seed, int) else list(seed)
    if len(seeds) != clips:
        raise UserError(f"{len(seeds)} seeds for {clips} prompts: give one, or as many")
    if any(not 0 <= s < 2**32 for s in seeds):
        raise UserError(f"seed={seeds} is not from 0 to {2**32 - 1}")
    return seeds
