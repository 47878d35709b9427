"""What a whole clip needs on a TPU slice: every program of a recipe, from a prompt to the sound.

The text encoder, the sampler of each stage, the latent upsampler between two, the decoders of
picture and sound: each is compiled as `Pipeline` runs it, and they follow one another.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ltx2_jax.codecs.audio import AudioCodec
from ltx2_jax.codecs.codec import ReleasedCodec
from ltx2_jax.codecs.video import VideoCodec
from ltx2_jax.diffusion import conditioning
from ltx2_jax.diffusion.sampler import Given, rows_axis
from ltx2_jax.models import flops, ltx2
from ltx2_jax.models.codecs.audio_vae import AUDIO_VAE, AudioVAEConfig
from ltx2_jax.models.codecs.upsampler import UpsamplerConfig
from ltx2_jax.models.codecs.video_vae import VideoVAEConfig
from ltx2_jax.models.codecs.vocoder import VOCODER_2_0, VOCODER_2_3, VocoderConfig
from ltx2_jax.models.ltx2 import LTX2Config
from ltx2_jax.models.quantized import described
from ltx2_jax.models.streamed import HOST
from ltx2_jax.models.transformer.config import PRESETS, TransformerConfig
from ltx2_jax.planning.reports import compile_facts
from ltx2_jax.planning.text import TEXT_ENCODERS, TextConfig, plan_text
from ltx2_jax.planning.topology import one_slice, tpu_devices
from ltx2_jax.planning.vae import VAES, plan_vae
from ltx2_jax.sampling import meshes, stages, tasks
from ltx2_jax.sampling.loading import upsampled
from ltx2_jax.sampling.programs import make_sampler
from ltx2_jax.sampling.recipes import Recipe
from ltx2_jax.sampling.tasks import Asked, Task
from ltx2_jax.sharding import (
    abstract_mesh,
    bytes_per_chip,
    make_mesh,
    replicated_on,
    sharding_of,
)
from ltx2_jax.text.encoder import LENGTH
from ltx2_jax.training.checks import check_mesh
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names import audio_vae, upsampler, vocoder


@dataclasses.dataclass(frozen=True)
class Networks:
    """All that makes a clip of one release."""

    text: TextConfig
    transformer: TransformerConfig
    video: VideoVAEConfig
    audio: AudioVAEConfig
    vocoder: VocoderConfig
    upsampler: UpsamplerConfig
    quantize: str | None = None  # a form of `models.quantized`, of text encoder and transformer

    @property
    def sampled(self) -> LTX2Config:
        return LTX2Config(self.transformer, self.text.video, self.text.audio, self.quantize)

    @property
    def encoder(self) -> TextConfig:
        gemma = dataclasses.replace(self.text.gemma, quantized=self.quantize)
        return dataclasses.replace(self.text, gemma=gemma)


CLIPS = {
    release: Networks(
        TEXT_ENCODERS[release],
        PRESETS[release],
        VAES[release],
        AUDIO_VAE,
        VOCODER_2_0 if release == "2.0" else VOCODER_2_3,
        # Of the upsamplers x2 for height and width.
        UpsamplerConfig(mid_channels=1024, rational_resampler=release == "2.0"),
    )
    for release in PRESETS
}


def plan_clip(
    networks: Networks,
    recipe: Recipe,
    size: tuple[int, int, int],
    topology: str,
    *,
    sizes: tuple[int, int, int] | None = None,
    offload: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """What one clip of (frames, height, width) needs on a slice, program by program.

    {"programs": [{"name", "times", "seconds", "bound", "facts"}], "seconds", "fits", ..}: seconds
    at practical rates, of all times together; None where a program does not fit.

    Args:
      networks: what runs.
      recipe: how.
      size: of the clip.
      topology: the slice.
      sizes: data, model, sequence of the mesh; None takes that which `Pipeline` would choose.
      offload: whether the layers of transformer and text encoder wait in the host's memory.
      say: told a line after each program, which may take minutes to compile.

    Raises:
      UserError: no such slice, no TPU compiler, an illegal size, a mesh that does not divide.
    """
    where = one_slice(topology, "clip")
    devices = tpu_devices(where.name)
    task, codec = _task(recipe, size, networks, devices), _codec(networks, devices)
    shapes = [_shapes(recipe, number, task, codec) for number in range(len(recipe.stages))]
    if sizes is None:
        room = where.chip.device_hbm_bytes
        sizes = _sizes(networks, recipe, shapes, len(devices), room, offload=offload)
    mesh = make_mesh(*sizes, devices=devices)
    for shape in shapes:
        check_mesh(networks.transformer.num_heads, math.prod(shape.video), mesh)
    programs = []

    def add(name: str, times: int, facts: dict[str, Any]) -> None:
        programs.append((name, times, facts))
        peak = facts.get("peak_bytes_per_device", 0) / 2**30
        came_to = facts.get("message", f"peak {peak:.2f} GiB")
        say(f"{name}: compiled in {facts['compile_seconds']:.0f} s, {came_to}")

    prompts = plan_text(networks.encoder, 2, topology, mesh=mesh, connect=False, offload=offload)
    add("text encoder", 1, prompts)
    for number, stage in enumerate(recipe.stages):
        if number and stage.size != recipe.stages[number - 1].size:
            lowered = upsampler_program(networks.upsampler, shapes[number - 1], devices[0])
            add("upsampler", 1, compile_facts(lowered, _alone(devices[0]), None))
        given = (networks.sampled, networks.text, recipe, number, task, codec, mesh)
        lowered = stage_program(*given, offload=offload)
        passes = 1 + len(stages.passes(stage, None)[0])
        steps = len(stage.sigma_values(math.prod(shapes[number].video))) - 1
        tokens = math.prod(shapes[number].video), shapes[number].audio, LENGTH
        work = sum(flops.forward_flops(networks.transformer, *tokens).values())
        name = f"stage {number + 1}: {steps} x {stage.stepper}, {passes} pass{'es' * (passes > 1)}"
        add(name, 1, compile_facts(lowered, mesh, passes * steps * work))
    facts = plan_vae(networks.video, "decode", size, topology)
    add("picture, largest tile", facts["tiles"], facts)
    lowered = sound_program(codec.audio, shapes[-1])
    add("sound", 1, compile_facts(lowered, _alone(devices[0]), None))
    weights = described(networks.quantize, where.chip.name) + ", on the host" * offload
    return _facts(recipe, weights, task, where, mesh, programs)


def _facts(
    recipe: Recipe,
    weights: str,
    task: Task,
    where: Any,
    mesh: jax.sharding.Mesh,
    programs: list[tuple[str, int, dict[str, Any]]],
) -> dict[str, Any]:
    rows = []
    for name, times, facts in programs:
        rates = facts.get("roofline", {}).get("practical", {})
        seconds = times * rates["step"] if rates else None
        rows.append({"name": name, "times": times, "seconds": seconds, "bound": rates.get("bound"),
                     "facts": facts})  # fmt: skip
    known = [row["seconds"] for row in rows]
    whole = None not in known
    return {
        "what": "clip",
        "program": f"clip of {task.num_frames} frames of {task.width}x{task.height}, recipe "
        f"{recipe.name}, {weights}",
        "topology": where.name,
        "devices": where.devices,
        "device_kind": where.chip.name,
        "mesh": dict(mesh.shape),
        "split": {name: count for name, count in mesh.shape.items() if count > 1},
        "hbm_bytes_per_device": where.chip.device_hbm_bytes,
        "programs": rows,
        "seconds": sum(known) if whole else None,
        "longest": max(rows, key=lambda row: row["seconds"])["name"] if whole else None,
        "compile_seconds": sum(row["facts"]["compile_seconds"] for row in rows),
        "fits": all(row["facts"]["fits"] for row in rows),
    }


# ------------------------------------------------------------------------------------ what is made


def _task(recipe: Recipe, size: tuple[int, int, int], networks: Networks, devices: Any) -> Task:
    """As `Pipeline` makes it of a prompt alone."""
    frames, height, width = size
    strides = networks.video.strides
    smallest = min(stage.size for stage in recipe.stages)
    return tasks.make_task(
        Asked(num_frames=frames, height=height, width=width),
        strides=strides,
        multiple=round(math.lcm(*strides[1:]) / smallest),
        size=(height, width),
    )


def _codec(networks: Networks, devices: list[jax.Device]) -> ReleasedCodec:
    """The codec with shapes in the place of weights."""
    create = (partial(audio_vae.create, networks.audio), partial(vocoder.create, networks.vocoder))

    def read(where: Any) -> tuple[Any, ...]:
        return tuple(_weights(network, where) for network in create)

    audio = AudioCodec(networks.audio, networks.vocoder, read, device=devices[0])
    return ReleasedCodec(VideoCodec(networks.video, dict, devices=devices), audio, "", [])


def _weights(create: Callable[[], nnx.Module], where: Any, dtype: Any = None) -> Any:
    """Weights of a network as shapes, matrices in `dtype` if it is given."""

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        kept = dtype is None or leaf.ndim < 2
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if kept else dtype, sharding=where)

    return jax.tree.map(placed, mapping.nested(mapping.abstract_params(create)))


def _shapes(recipe: Recipe, number: int, task: Task, codec: ReleasedCodec) -> stages.Shapes:
    share = recipe.stages[number].size
    return stages.Shapes.of(task, codec, round(task.height * share), round(task.width * share))


def _sizes(
    networks: Networks,
    recipe: Recipe,
    shapes: list[stages.Shapes],
    devices: int,
    room: float,
    *,
    offload: bool = False,
) -> meshes.Sizes:
    """Of the mesh that `Pipeline` chooses for one clip."""
    how = {"for_sampling": True, "offload": offload}
    weights = jax.tree.leaves(ltx2.abstract_params(networks.sampled, abstract_mesh(1, 1, 1), **how))
    return meshes.choose(
        devices,
        heads=networks.transformer.num_heads,
        weights=bytes_per_chip([x for x in weights if x.sharding.memory_kind != HOST]),
        room=room,
        rows=[1 + len(stages.passes(stage, None)[0]) for stage in recipe.stages],
        tokens=[math.prod(shape.video) for shape in shapes],
    )


def _alone(device: jax.Device) -> jax.sharding.Mesh:
    return replicated_on([device]).mesh


# ---------------------------------------------------------------------------------------- programs


def stage_program(
    config: LTX2Config,
    text: TextConfig,
    recipe: Recipe,
    number: int,
    task: Task,
    codec: ReleasedCodec,
    mesh: jax.sharding.Mesh,
    *,
    offload: bool = False,
) -> jax.stages.Lowered:
    """The sampler of a stage, of one clip, as `stages.run` calls it."""
    params = ltx2.abstract_params(config, mesh, for_sampling=True, offload=offload)
    with jax.set_mesh(mesh), jax.enable_x64(False):
        given, static = stage_arguments(config, text, recipe, number, task, codec, mesh)
        static["graphdef"] = ltx2.graph(config)
        return make_sampler().lower(params, *given, **static)


def stage_arguments(
    config: LTX2Config,
    text: TextConfig,
    recipe: Recipe,
    number: int,
    task: Task,
    codec: ReleasedCodec,
    mesh: jax.sharding.Mesh,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `stages.run` gives the sampler after the weights, as shapes, and its static arguments.

    To be called under `mesh`, which decides whether a batch is split.
    """
    stage, shapes = recipe.stages[number], _shapes(recipe, number, task, codec)
    others, strengths, rescales, how = stages.passes(stage, None)
    data = mesh.shape["data"]
    rows = data // math.gcd(data, len(others) + 1)  # the clip again, until its passes fill `data`
    given = start = None
    if number:  # from the latents of the stage before
        marked = config.transformer.keyframe_embedding
        zeros = np.zeros((rows, *shapes.video, shapes.channels), np.float32)
        video = conditioning.of_video(zeros, task.fps, shapes.strides, marked=marked)
        zeros = np.zeros((rows, shapes.audio, shapes.bins, shapes.audio_channels), np.float32)
        given = Given(video, conditioning.of_audio(zeros, shapes.clock))
        start = tuple(
            jax.ShapeDtypeStruct(
                (rows, *shape), jnp.float32, sharding=sharding_of(mesh, rows_axis(rows))
            )
            for shape in (
                (*shapes.video, shapes.channels),
                (shapes.audio, shapes.bins, shapes.audio_channels),
            )
        )
    features = {"video_text": text.features.video_dim, "audio_text": text.features.audio_dim}

    def fields(rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        found = {
            name: jax.ShapeDtypeStruct((rows, LENGTH, width), text.features.dtype)
            for name, width in features.items()
            if width
        }
        return found | {"text_mask": jax.ShapeDtypeStruct((rows, LENGTH), bool)}

    host = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding_of(mesh)),
        (
            (fields(rows), fields(1)),
            jax.ShapeDtypeStruct((rows,), jnp.uint32),
            jax.eval_shape(jax.random.key, 0),
            stage.sigma_values(math.prod(shapes.video)),
            tuple(strengths),
            rescales,
            given,
        ),
    )
    return (*host, start, (None, None)), {
        "request": shapes.request(task.fps),
        "passes": others,
        "stepper": stage.step,
        "guidance": how,
    }


def upsampler_program(
    config: UpsamplerConfig, shapes: stages.Shapes, device: jax.Device
) -> jax.stages.Lowered:
    """Twice the height and width, for the latents of a stage."""
    create = partial(upsampler.create, config)
    graph, where = mapping.graph(create), replicated_on([device])
    given = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        for shape in ((1, *shapes.video, shapes.channels), (shapes.channels,), (shapes.channels,))
    ]
    return upsampled.lower(_weights(create, where, config.dtype), *given, graph=graph)


def sound_program(codec: AudioCodec, shapes: stages.Shapes) -> jax.stages.Lowered:
    """Audio latents to a waveform, by VAE and vocoder."""
    run, params, x = codec.program("decode", (1, shapes.audio, shapes.bins, shapes.audio_channels))
    where = jax.sharding.SingleDeviceSharding(codec.device)
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    with jax.set_mesh(_alone(codec.device)):
        return run.func.lower(params, x, **run.keywords)
