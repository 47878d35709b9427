"""Clips from a trained model: python -m ltx2_jax.sample --help."""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence

from etils import epath

from ltx2_jax import command, hosts
from ltx2_jax.command import finite, seed_flag
from ltx2_jax.config import Config, SampleConfig
from ltx2_jax.demo import synthetic
from ltx2_jax.diffusion.schedules import SCHEDULES
from ltx2_jax.errors import UserError
from ltx2_jax.evaluation.sync import sync_report
from ltx2_jax.files import location
from ltx2_jax.sampling.output import write_clips
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.sharding import make_mesh

DESCRIPTION = """\
Make clips with the model that train left in a workdir.

One clip for each PROMPT. Without any, a model of the synthetic clips gets fresh captions of their
grammar. Into the output folder go samples/000.mp4 and on, sample.mp4 (the first clip) and
samples.png (frames and sound of the first four); of more than a gigabyte of pixels, only the clips.
A folder that holds clips is never written over.
"""

EXAMPLE = """\
example:
  python -m ltx2_jax.sample --workdir=workdir/quickstart \\
      "a red ball bounces twice at a fast tempo, each impact a high note"

The same prompts, settings and seed give the same clips. Settings that are not given are those of
the config that the model was trained with.
"""


# Bytes of pixels from which clips are written as they are decoded, without a picture of them.
LARGE = 2**30


def main(args: argparse.Namespace) -> None:
    """Load, sample, write, report."""
    # The first host names and writes the folder; the others only compute.
    out = hosts.agree(lambda: output_folder(args.workdir, args.out))
    mesh = hosts.agree(lambda: make_mesh(*args.mesh))
    pipeline = Pipeline.from_workdir(
        args.workdir, step=args.checkpoint_step, mesh=mesh, text_cache=args.text_cache
    )
    given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(SampleConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    settings = dataclasses.replace(pipeline.config.sample, **given)
    prompts = all_prompts(args.prompts, args.num_clips, pipeline.config, settings)
    hosts.agree_on_first(lambda: make_folder(out), 300, "the folder of the clips is made")
    if pipeline.clip_bytes * len(prompts) > LARGE:
        paths = [out / "samples" / f"{number:03d}.mp4" for number in range(len(prompts))]
        pipeline.save(prompts, paths, sample=settings)
        hosts.say(f"wrote {len(prompts)} clips in {out}/samples")
        return
    clips = pipeline(prompts, sample=settings)
    if hosts.index() != 0:
        return
    write_clips(clips, prompts, out)
    # One clip has no other to exchange its sound with; the measure is made for the synthetic clips.
    if len(clips) > 1 and all(map(synthetic.is_scripted, prompts)):
        kinds = [synthetic.event_kind(prompt) for prompt in prompts]
        print("generated clips:", sync_report(clips, kinds=kinds))


def cli(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `command.run`."""
    parser = _parser()
    command.host_flags(parser)
    return command.run(
        "sample", lambda: command.on_hosts(argv, lambda: main(parser.parse_args(argv)))
    )


def output_folder(workdir: str, out: str | None) -> epath.Path:
    """`out`, or the first of out-001, out-002, ... that the workdir does not have.

    Raises:
      UserError: `out` is a file, or holds clips.
    """
    if out is None:
        names = (location(workdir) / f"out-{number:03d}" for number in itertools.count(1))
        return next(name for name in names if not name.exists())
    folder = location(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file")
    if (folder / "sample.mp4").exists() or (folder / "samples").exists():
        raise UserError(f"--out: {folder} holds clips already; choose another folder")
    return folder


def make_folder(out: epath.Path) -> None:
    """UserError unless `out` can be a folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be made ({error.strerror})") from None


def all_prompts(
    prompts: Sequence[str], num_clips: int | None, config: Config, settings: SampleConfig
) -> list[str]:
    """One prompt for each clip: those given, in turn, or captions that the model may not know.

    Raises:
      UserError: no prompts for a model of other clips than the synthetic ones; too few clips.
    """
    if not prompts:
        if config.data.path is not None:
            raise UserError(
                f"give a prompt: this model was trained on {config.data.path}, and only for the "
                "synthetic clips can captions be made up"
            )
        return synthetic.captions(config.data.synthetic, settings.num_clips, settings.seed)
    count = len(prompts) if num_clips is None else num_clips
    if count < len(prompts):
        raise UserError(f"--num-clips={count} is too few for {len(prompts)} prompts")
    return list(itertools.islice(itertools.cycle(prompts), count))


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("sample", DESCRIPTION, EXAMPLE)
    add = parser.add_argument
    add("prompts", metavar="PROMPT", nargs="*", help="what to see and hear")
    add("--workdir", required=True, metavar="FOLDER", help="what train wrote")
    add(
        "--checkpoint-step",
        type=int,
        metavar="STEP",
        help="the checkpoint to take (default: the newest)",
    )
    add("--out", metavar="FOLDER", help="default: out-001 in the workdir, or the next free number")
    add(
        "--num-clips",
        type=int,
        metavar="N",
        help="clips in all, from the prompts in turn (default: one for each prompt)",
    )
    add(
        "--text-cache",
        metavar="FOLDER",
        help="keeps features of prompts; a released text encoder is loaded for new ones only",
    )
    add("--seed", type=seed_flag, help="of the noise, and of the captions made up")
    add("--steps", type=int, metavar="N", help="calls of the model for each clip")
    add("--schedule", metavar="NAME", help=", ".join(SCHEDULES))
    add("--video-guidance", type=finite, metavar="SCALE", help="how close to the prompt; 1 = off")
    add("--audio-guidance", type=finite, metavar="SCALE", help="the same for the sound")
    add(
        "--mesh",
        type=_mesh,
        default=(-1, 1, 1),
        metavar="DATA,MODEL,SEQUENCE",
        help="how the devices share the work; -1 takes what is left (default: -1,1,1)",
    )
    return parser


def _mesh(text: str) -> tuple[int, int, int]:
    try:
        data, model, sequence = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers like -1,1,1") from None
    return data, model, sequence


if __name__ == "__main__":
    sys.exit(cli())
