"""What a program needs on a TPU slice, from a laptop: python -m ltx2_jax.plan --help."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax

from ltx2_jax import command, planning
from ltx2_jax import config as config_lib
from ltx2_jax.command import count, mesh_flag
from ltx2_jax.config import MeshConfig
from ltx2_jax.errors import UserError
from ltx2_jax.models.quantized import CHOICES
from ltx2_jax.sampling import recipes
from ltx2_jax.training import trainer_yaml

DESCRIPTION = """\
Compile the real program for a TPU slice and say what it needs, on any machine.

Nothing runs and no weights are read: the TPU compiler, which comes with the `tpu` extra, works
without a TPU. Without it, train and sample print what arithmetic can tell, and train does for GPUs
(--topology=h100:1). --what is the program:

  train    one step of a config's training, for a whole batch of clips
  sample   a batch of clips from text features to latents, with a config's model and mesh
  vae      the video VAE's decoding, or encoding, of one clip that all chips of the slice share
  text     the text encoder, prompts of 1024 tokens to context
  clip     every program of a recipe, from a prompt to picture and sound, one clip on all chips

--hosts says which rows of a batch every host of the slice would read, in seconds.
"""

EXAMPLE = """\
example:
  python -m ltx2_jax.plan --config=configs/ltx2_19b.py --topology=v5p:4x4x4
  python -m ltx2_jax.plan --config=configs/ltx2_19b.py --topology=2xv5p:4x4x4
  python -m ltx2_jax.plan --config=configs/ltx2_19b.py --topology=v5p:4x4x4 --hosts
  python -m ltx2_jax.plan --config=configs/ltx2_19b.py --topology=v6e:16x16 --search
  python -m ltx2_jax.plan --config=configs/ltx2_19b.py --topology=v6e:4x4 --search --what=sample
  python -m ltx2_jax.plan --config=configs/ltx2_19b.py --topology=v6e:4x4 --mesh=1,4,4 \\
      --what=sample --height=512 --width=768 --steps=1
  python -m ltx2_jax.plan --what=vae --topology=v6e:2x4 --frames=481 --half=encode --json
  python -m ltx2_jax.plan --what=text --topology=v6e:2x4 --batch=8
  python -m ltx2_jax.plan --what=clip --topology=v6e:2x4 --recipe=distilled --height=512 --width=768

Fields of the config can be changed with --config.FIELD=VALUE, as in train. The exit code is 0 if
the program fits, 1 if it does not, 2 for a mistake in the command.
"""

RELEASES = ("2.0", "2.3", "2.5")
TO_COMPILE = 3  # rows of a search
# Programs that a flag is of, and its default.
FLAGS = {
    "config": (("train", "sample"), None),
    "mesh": (("train", "sample", "clip"), None),
    "frames": (("train", "sample", "vae", "clip"), None),
    "height": (("train", "sample", "vae", "clip"), None),
    "width": (("train", "sample", "vae", "clip"), None),
    "search": (("train", "sample"), False),
    "compile": (("train", "sample"), None),
    "hosts": (("train",), False),
    "batch": (("sample", "text"), 1),
    "passes": (("sample",), 1),
    "steps": (("sample",), None),
    "quantize": (("sample", "text", "clip"), None),
    "offload": (("clip",), False),
    "release": (("vae", "text", "clip"), "2.3"),
    "recipe": (("clip",), "distilled"),
    "half": (("vae",), "decode"),
}


def main(args: argparse.Namespace, overrides: dict[str, str]) -> bool:
    """Compiles, prints; returns whether it fits."""
    jax.config.update("jax_platforms", "cpu")
    _check_flags(args, overrides)
    facts = _of_config(args, overrides) if args.what in FLAGS["config"][0] else _released(args)
    print(json.dumps(facts, indent=2) if args.json else planning.describe(facts))
    return facts["fits"]


def _progress(text: str) -> None:
    """Beside the answer, which may be JSON."""
    print(text, file=sys.stderr, flush=True)


def _check_flags(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    """UserError for a flag of another program; fills in what was not given."""
    for flag, (programs, default) in FLAGS.items():
        given = getattr(args, flag)
        if given is not None and args.what not in programs:
            raise UserError(
                f"--{flag} is not of --what={args.what}, but of {' and '.join(programs)}"
            )
        if given is None:
            setattr(args, flag, default)
    if overrides and args.what not in FLAGS["config"][0]:
        raise UserError(f"--config.{next(iter(overrides))} is not of --what={args.what}")
    if args.compile and not args.search:
        raise UserError("--compile is a number of the rows of --search")
    if args.search and args.hosts:
        raise UserError("--search tries all meshes: leave --hosts out")
    if args.search and args.mesh:
        raise UserError("--search tries all meshes: leave --mesh out")


def _released(args: argparse.Namespace) -> dict[str, Any]:
    if args.what == "text":
        encoder = planning.TEXT_ENCODERS[args.release]
        gemma = dataclasses.replace(encoder.gemma, quantized=args.quantize)
        encoder = dataclasses.replace(encoder, gemma=gemma)
        return planning.plan_text(encoder, args.batch, args.topology)
    default = planning.DEFAULT_SIZE
    size = (
        args.frames or default.num_frames,
        args.height or default.height,
        args.width or default.width,
    )
    if args.what == "clip":
        networks = dataclasses.replace(planning.CLIPS[args.release], quantize=args.quantize)
        recipe = recipes.choose(
            args.release,
            "distilled",  # or a distilled LoRA, which is fused: the same programs
            upsampler=True,
            layers=networks.transformer.num_layers,
            name=args.recipe,
        )
        how = {"sizes": args.mesh, "offload": args.offload, "say": _progress}
        return planning.plan_clip(networks, recipe, size, args.topology, **how)
    return planning.plan_vae(planning.VAES[args.release], args.half, size, args.topology)


def _of_config(args: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any]:
    if args.config is None:
        raise UserError(f"--what={args.what} needs --config=FILE.py")
    config = trainer_yaml.load(args.config, overrides)
    if args.mesh is not None:
        mesh = MeshConfig(*args.mesh, slices=config.mesh.slices)
        config = dataclasses.replace(config, mesh=mesh)
    request = planning.request_of(
        config, num_frames=args.frames, height=args.height, width=args.width
    )
    if args.what == "train":
        config = planning.for_clips(config, request)
    if args.hosts:
        return planning.plan_hosts(config, request, args.topology)
    rows = TO_COMPILE if args.compile is None else args.compile
    if args.what == "train" and args.search:
        return planning.search_plans(config, request, args.topology, compiled=rows)
    if args.what == "train":
        return planning.plan_train(config, request, args.topology)
    counts = {
        "batch": args.batch,
        "passes": args.passes,
        "steps": args.steps or config.sample.steps,
        "quantize": args.quantize,
    }
    if args.search:
        return planning.search_samples(config, request, args.topology, compiled=rows, **counts)
    return planning.plan_sample(config, request, args.topology, **counts)


def cli(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 if it fits, 1 if not, else see `command.run`."""
    args, rest = _parser().parse_known_args(argv)
    return command.run("plan", lambda: 0 if main(args, config_lib.overrides(rest)) else 1)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("plan", DESCRIPTION, EXAMPLE)
    add = parser.add_argument
    what = ("train", "sample", "vae", "text", "clip")
    add("--what", choices=what, default="train", help="the program (default: %(default)s)")
    add("--topology", required=True, metavar="SLICE", help="such as v5p:4x4x4, or 2xv5p:4x4x4")
    add("--config", metavar="FILE[:ARG]", help="of train and sample, as for train")
    add(
        "--mesh",
        type=mesh_flag,
        metavar="D,M,S",
        help="data, model, sequence of a slice instead of the config's",
    )
    add("--frames", type=count, metavar="N", help="(default: those of the dataset, or 121)")
    add("--height", type=count, metavar="PIXELS", help="(default: the dataset's, or 704)")
    add("--width", type=count, metavar="PIXELS", help="(default: the dataset's, or 1280)")
    add(
        "--search",
        action="store_true",
        default=None,
        help="rank meshes in place of the config's, of train with remat policies and batch sizes",
    )
    add("--hosts", action="store_true", default=None, help="the rows of every host, of train")
    add("--compile", type=count, metavar="N", help=f"of them to compile ({TO_COMPILE})")
    add("--batch", type=count, metavar="N", help="clips of sample, prompts of text (1)")
    add("--passes", type=int, choices=(1, 2, 4), help="of guidance, of sample (1)")
    add("--steps", type=count, metavar="N", help="of sample (default: the config's)")
    add("--quantize", choices=CHOICES, help="the large matrices, of sample, text and clip")
    add(
        "--offload", action="store_true", default=None, help="weights in the host's memory, of clip"
    )
    add("--release", choices=RELEASES, help="of vae, text and clip (2.3)")
    add("--recipe", choices=recipes.RECIPES, help="of clip (distilled)")
    add("--half", choices=("decode", "encode"), help="of vae (decode)")
    add("--json", action="store_true", help="print all facts as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(cli())
