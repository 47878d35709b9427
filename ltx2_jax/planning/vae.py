"""What a video VAE needs on a TPU slice; `python -m ltx2_jax.plan --what=vae` prints it.

The program is that of `VideoCodec`, which all chips run on one tile of a clip.
"""

import time
from typing import Any

from ltx2_jax import units
from ltx2_jax.accounting.compiled import describe as describe_program
from ltx2_jax.accounting.compiled import program_facts
from ltx2_jax.accounting.memory import (
    compile_or_overflow,
    describe_memory,
    describe_overflow,
    memory_facts,
)
from ltx2_jax.conv_flops import video_vae_flops
from ltx2_jax.errors import UserError
from ltx2_jax.models.codec_inputs import legal_frames
from ltx2_jax.models.video_vae import VIDEO_VAE_2_0, VIDEO_VAE_2_3, VideoVAEConfig
from ltx2_jax.topology import describe_counts, tpu_devices
from ltx2_jax.video_codec import VideoCodec

VAES = {"2.0": VIDEO_VAE_2_0, "2.3": VIDEO_VAE_2_3, "2.5": VIDEO_VAE_2_3}


def plan_vae(
    config: VideoVAEConfig, half: str, size: tuple[int, int, int], topology: str
) -> dict[str, Any]:
    """What `half` of a video VAE needs for one clip of (frames, height, width) on a slice.

    Raises:
      UserError: no such slice, an illegal size, no TPU compiler.
    """
    devices = tpu_devices(topology)
    frames, height, width = size
    if legal_frames((1, *size, 3), config.strides) != frames:
        raise UserError(f"--frames={frames} is not {config.strides[0]} k + 1")
    codec = VideoCodec(config, dict, devices=devices)
    started = time.perf_counter()
    compiled = compile_or_overflow(codec.lower(half, (1, *size, 3)))
    seconds = time.perf_counter() - started
    tile = codec.largest_tile((1, *size, 3))
    mesh, tile_flops = codec.mesh_of(tile), video_vae_flops(config, *tile)[half]
    facts = {
        "program": f"{half} {frames} frames of {width}x{height}",
        "half": half,
        "topology": topology,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "tile": list(tile),
        "split": {name: size for name, size in mesh.shape.items() if size > 1},
        "parameters": codec.num_parameters,
        "flops_of_clip": video_vae_flops(config, *size)[half],
        "flops_of_tile": tile_flops,
    }
    if isinstance(compiled, dict):
        return facts | compiled
    return {
        **facts,
        **memory_facts(compiled, devices[0].device_kind),
        **program_facts(compiled, mesh, model_flops=tile_flops),
        "compile_seconds": round(seconds, 1),
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts as lines for a person."""
    if "message" in facts:
        return describe_overflow(facts)
    frames, height, width = facts["tile"]
    return (
        f"{facts['program']} on {facts['topology']} ({facts['devices']} x {facts['device_kind']})\n"
        f"  largest tile   {frames} frames of {width}x{height}, split over "
        f"{describe_counts(facts['split'])}\n"
        f"  parameters     {units.parameters(facts['parameters'])} in both halves\n"
        + describe_memory(facts, "weights", "pixels" if facts["half"] == "decode" else "latents")
        + f"  FLOPs          {units.flops(facts['flops_of_clip'])} for the clip; a tile "
        f"{units.flops(facts['flops_of_tile'])}\n"
        f"  the largest tile\n{describe_program(facts, 'a tile')}\n"
        f"  compiled in    {facts['compile_seconds']:.0f} s"
    )
