"""What a video VAE needs on a TPU slice.

The program is that of `VideoCodec`, which all chips run on one tile of a clip.
"""

from typing import Any

from ltx2_jax.codecs.video import VideoCodec
from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.inputs import legal_frames
from ltx2_jax.models.codecs.video_vae import VIDEO_VAE_2_0, VIDEO_VAE_2_3, VideoVAEConfig
from ltx2_jax.models.flops import video_vae_flops
from ltx2_jax.planning.reports import compile_facts
from ltx2_jax.planning.topology import one_slice, tpu_devices

VAES = {"2.0": VIDEO_VAE_2_0, "2.3": VIDEO_VAE_2_3, "2.5": VIDEO_VAE_2_3}


def check_size(config: VideoVAEConfig, size: tuple[int, int, int]) -> None:
    """UserError unless the VAE has latents for so many (frames, height, width)."""
    if legal_frames((1, *size, 3), config.strides) != size[0]:
        raise UserError(f"--frames={size[0]} is not {config.strides[0]} k + 1")


def plan_vae(
    config: VideoVAEConfig, half: str, size: tuple[int, int, int], topology: str
) -> dict[str, Any]:
    """What `half` of a video VAE needs for one clip of (frames, height, width) on a slice.

    Raises:
      UserError: no such slice, an illegal size, no TPU compiler.
    """
    devices = tpu_devices(one_slice(topology, "vae").name)
    check_size(config, size)
    codec = VideoCodec(config, dict, devices=devices)
    tile = codec.largest_tile((1, *size, 3))
    mesh, tile_flops = codec.mesh_of(tile), video_vae_flops(config, *tile)[half]
    frames, height, width = size
    return {
        "what": "vae",
        "program": f"{half} {frames} frames of {width}x{height}",
        "half": half,
        "topology": topology,
        "devices": len(devices),
        "tile": list(tile),
        "tiles": codec.num_tiles((1, *size, 3)),
        "split": {name: count for name, count in mesh.shape.items() if count > 1},
        "parameters": codec.num_parameters,
        "flops_of_clip": video_vae_flops(config, *size)[half],
        "flops_of_tile": tile_flops,
        **compile_facts(codec.lower(half, (1, *size, 3)), mesh, tile_flops),
    }
