"""What a program needs on a TPU slice, from a laptop: python -m ltx2_jax.plan --help."""

import argparse
import collections
import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from ltx2_jax.conv_flops import video_vae_flops
from ltx2_jax.errors import UserError
from ltx2_jax.models.codec_inputs import legal_frames
from ltx2_jax.models.video_vae import VIDEO_VAE_2_0, VIDEO_VAE_2_3, VideoVAEConfig
from ltx2_jax.topology import hbm_bytes, tpu_devices
from ltx2_jax.video_codec import VideoCodec

DESCRIPTION = """\
Compile the real program for a TPU slice and say what it needs, on any machine.

Nothing runs and no weights are read: the TPU compiler, which comes with the `tpu` extra, works
without a TPU. --what=vae is the video VAE's decoding, or encoding, of one clip that all chips of
the slice share.
"""

EXAMPLE = """\
example:
  python -m ltx2_jax.plan --what=vae --topology=v5p:2x2x1
  python -m ltx2_jax.plan --what=vae --topology=v6e:2x4 --frames=481 --half=encode --json
"""

VAES = {"2.0": VIDEO_VAE_2_0, "2.3": VIDEO_VAE_2_3, "2.5": VIDEO_VAE_2_3}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def main(args: argparse.Namespace) -> bool:
    """Compiles, prints; returns whether it fits."""
    jax.config.update("jax_platforms", "cpu")
    facts = plan_vae(
        VAES[args.generation], args.half, (args.frames, args.height, args.width), args.topology
    )
    print(json.dumps(facts, indent=2) if args.json else describe(facts))
    return facts["fits"]


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
    lowered = codec.lower(half, (1, *size, 3))
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    tile = codec.largest_tile((1, *size, 3))
    hbm = hbm_bytes(devices[0].device_kind)
    return {
        "program": f"{half} {frames} frames of {width}x{height}",
        "topology": topology,
        "chips": len(devices),
        "device_kind": devices[0].device_kind,
        "tile": list(tile),
        "split": {name: size for name, size in codec.mesh_of(tile).shape.items() if size > 1},
        "parameters": codec.num_parameters,
        "weight_bytes_per_chip": memory.argument_size_in_bytes,
        "output_bytes_per_chip": memory.output_size_in_bytes,
        "temporary_bytes_per_chip": memory.temp_size_in_bytes,
        "peak_bytes_per_chip": peak,
        "hbm_bytes_per_chip": hbm,
        "fits": hbm is None or peak <= hbm,
        "flops_of_clip": video_vae_flops(config, *size)[half],
        "flops_of_tile": video_vae_flops(config, *tile)[half],
        "collectives": collectives(compiled.as_text()),
        "compile_seconds": round(seconds, 1),
    }


def collectives(program: str) -> dict[str, int]:
    """Number of collective operations of each kind in a compiled program's text."""
    found = re.findall(rf"({'|'.join(COLLECTIVES)})(?:-start)?\(", program)
    return dict(collections.Counter(found))


def describe(facts: dict[str, Any]) -> str:
    """The facts as lines for a person."""
    gib = {name: facts[name] / 2**30 for name in facts if name.endswith("_bytes_per_chip")}
    hbm = gib["hbm_bytes_per_chip"]
    peak = gib["peak_bytes_per_chip"]
    verdict = "fits" if facts["fits"] else f"does not fit: {peak - hbm:.2f} GiB too much"
    split = " x ".join(f"{n} {name}" for name, n in facts["split"].items()) or "not split"
    frames, height, width = facts["tile"]
    sent = ", ".join(f"{n} {name}" for name, n in facts["collectives"].items()) or "none"
    return (
        f"{facts['program']} on {facts['topology']} ({facts['chips']} x {facts['device_kind']})\n"
        f"  largest tile   {frames} frames of {width}x{height}, {split}\n"
        f"  parameters     {facts['parameters'] / 1e6:,.0f} M\n"
        f"  per chip       weights {gib['weight_bytes_per_chip']:.2f}, pixels "
        f"{gib['output_bytes_per_chip']:.2f}, temporaries "
        f"{gib['temporary_bytes_per_chip']:.2f} GiB\n"
        f"  peak per chip  {peak:.2f} of {hbm:.0f} GiB: {verdict}\n"
        f"  FLOPs          {facts['flops_of_clip'] / 1e12:,.1f} T for the clip; a tile "
        f"{facts['flops_of_tile'] / 1e12:,.1f} T\n"
        f"  collectives    {sent}\n"
        f"  compiled in    {facts['compile_seconds']:.0f} s"
    )


def cli(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 if it fits, 1 if not, 2 after printing what the user can fix."""
    args = _parser().parse_args(argv)
    try:
        return 0 if main(args) else 1
    except UserError as error:
        print(f"plan: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ltx2_jax.plan",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--what", required=True, choices=("vae",), help="the program")
    add("--topology", required=True, metavar="SLICE", help="such as v5p:2x2x1 or v6e:2x4")
    add("--generation", choices=tuple(VAES), default="2.3", help="(default: %(default)s)")
    add("--half", choices=("decode", "encode"), default="decode", help="(default: %(default)s)")
    add("--frames", type=int, default=121, metavar="N", help="(default: %(default)s)")
    add("--height", type=int, default=704, metavar="PIXELS", help="(default: %(default)s)")
    add("--width", type=int, default=1280, metavar="PIXELS", help="(default: %(default)s)")
    add("--json", action="store_true", help="print all facts as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(cli())
