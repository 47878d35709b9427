"""What a program needs on a TPU slice, from a laptop: python -m ltx2_jax.plan --help."""

import argparse
import json
import sys
from collections.abc import Sequence

import jax

from ltx2_jax import plan_text, plan_vae
from ltx2_jax.arguments import count
from ltx2_jax.errors import UserError

DESCRIPTION = """\
Compile the real program for a TPU slice and say what it needs, on any machine.

Nothing runs and no weights are read: the TPU compiler, which comes with the `tpu` extra, works
without a TPU. --what=vae is the video VAE's decoding, or encoding, of one clip that all chips of
the slice share; --what=text is the text encoder, prompts of 1024 tokens to context.
"""

EXAMPLE = """\
example:
  python -m ltx2_jax.plan --what=vae --topology=v5p:2x2x1
  python -m ltx2_jax.plan --what=vae --topology=v6e:2x4 --frames=481 --half=encode --json
  python -m ltx2_jax.plan --what=text --topology=v6e:2x4 --batch=8
"""

GENERATIONS = ("2.0", "2.3", "2.5")


def main(args: argparse.Namespace) -> bool:
    """Compiles, prints; returns whether it fits."""
    jax.config.update("jax_platforms", "cpu")
    if args.what == "vae":
        size = (args.frames, args.height, args.width)
        vae = plan_vae.VAES[args.generation]
        facts = plan_vae.plan_vae(vae, args.half, size, args.topology)
        text = plan_vae.describe(facts)
    else:
        encoder = plan_text.TEXT_ENCODERS[args.generation]
        facts = plan_text.plan_text(encoder, args.batch, args.topology)
        text = plan_text.describe(facts)
    print(json.dumps(facts, indent=2) if args.json else text)
    return facts["fits"]


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
    add("--what", required=True, choices=("vae", "text"), help="the program")
    add("--topology", required=True, metavar="SLICE", help="such as v5p:2x2x1 or v6e:2x4")
    add("--generation", choices=GENERATIONS, default="2.3", help="(default: %(default)s)")
    add("--batch", type=count, default=1, metavar="N", help="prompts, of text (%(default)s)")
    add("--half", choices=("decode", "encode"), default="decode", help="of vae (%(default)s)")
    add("--frames", type=count, default=121, metavar="N", help="of vae (%(default)s)")
    add("--height", type=count, default=704, metavar="PIXELS", help="of vae (%(default)s)")
    add("--width", type=count, default=1280, metavar="PIXELS", help="of vae (%(default)s)")
    add("--json", action="store_true", help="print all facts as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(cli())
