"""Train from a config file, resume, and end with clips: python -m ltx2_jax.train --help."""

import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from ltx2_jax import command, hosts
from ltx2_jax import config as config_lib
from ltx2_jax.config import Config
from ltx2_jax.data.mixtures import Dataset, sources_of
from ltx2_jax.demo import synthetic
from ltx2_jax.evaluation.contact_sheet import contact_sheet
from ltx2_jax.evaluation.sync import sync_report
from ltx2_jax.files import in_bucket, local_folder, location
from ltx2_jax.media.media import read_clip
from ltx2_jax.sampling.output import write_clips
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.training import trainer_yaml, validation
from ltx2_jax.training.checkpoint import ASSETS
from ltx2_jax.training.loop import data_folder, train
from ltx2_jax.training.status import status

DESCRIPTION = """\
Train the joint audio-video model, then sample from it.

Exit codes: 0 done, 2 something is to be fixed, 3 diverged, 42 start it again, 130 Ctrl-C and 143
another signal; a training that was stopped is saved.
"""

EPILOG = """\
example:
  python -m ltx2_jax.train --config=configs/quickstart.py
  python -m ltx2_jax.train --config=configs/quickstart.py --config.num_steps=100 \\
      --config.workdir=/tmp/short
  python -m ltx2_jax.train --config=t2v_lora.yaml   # a file of the official trainer

Every field of the config can be changed with --config.FIELD=VALUE. Running the same command again
resumes from the newest checkpoint of the workdir. While it runs, and from any machine,

  python -m ltx2_jax.train --status workdir/quickstart

says how far it is.
"""

PREVIEW_CLIPS = 4


def main(config: Config) -> int:
    """Trains, with clips on the way and at the end; returns an exit code."""
    started = time.perf_counter()
    given = validation.prompts_of(config)

    def make_clips(weights: Any, records: Dataset, step: int) -> None:
        workdir, mesh = location(config.workdir), jax.sharding.get_mesh()
        # A released text encoder is loaded for the first clips, and for those after them no more.
        cached = config.text.release != "random" and not in_bucket(workdir)
        text_cache = workdir / "text_cache" if cached else None
        pipeline = Pipeline.from_assets(
            config, weights, local_folder(workdir / ASSETS), mesh, text_cache
        )
        if step < config.num_steps:
            preview(pipeline, given or fresh_prompts(config, records)[:PREVIEW_CLIPS], step)
        else:
            show(pipeline, given or fresh_prompts(config, records), records)

    code = train(config, make_clips)
    hosts.say(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    return code


def preview(pipeline: Pipeline, prompts: list[str], step: int) -> None:
    """A few clips while the training goes on: one contact sheet, or files every so many steps."""
    config, workdir = pipeline.config, location(pipeline.config.workdir)
    clips = pipeline(prompts)
    if hosts.index() != 0:
        return
    if step == config.sample.preview_step:
        sheet = workdir / "preview.png"
        contact_sheet(sheet, clips, prompts, title=f"generated clips after {step} steps")
        print(f"wrote {sheet}, the first clips, after {step} steps", flush=True)
    every = config.validation.clips_every
    if every and step % every == 0:
        write_clips(clips, prompts, workdir / "validation" / f"step-{step:06d}")


def show(pipeline: Pipeline, prompts: list[str], records: Dataset) -> None:
    """Clips at the end: files, a contact sheet, and how well sound and picture agree."""
    config, workdir = pipeline.config, location(pipeline.config.workdir)
    clips = pipeline(prompts)
    if hosts.index() != 0:
        return
    write_clips(clips, prompts, workdir)
    # The measure is made for the synthetic clips.
    if not config.data.folders and config.validation.prompts is None:
        kinds = [synthetic.event_kind(prompt) for prompt in prompts]
        print("generated clips:", sync_report(clips, kinds=kinds))
        shown = [records[i] for i in range(min(len(clips), len(records)))]
        rendered, _ = data_folder(config.workdir)
        real = [read_clip(rendered / "clips" / record["source"]) for record in shown]
        kinds = [synthetic.event_kind(record["caption"]) for record in shown]
        print("real clips:     ", sync_report(real, kinds=kinds))


def fresh_prompts(config: Config, records: Dataset) -> list[str]:
    """Captions of the synthetic clips' grammar, or the first ones of every dataset, in turns."""
    if not config.data.folders:
        clips, seed = config.data.synthetic, config.sample.seed
        return synthetic.captions(clips, config.sample.num_clips, seed)
    sources, count = sources_of(records), config.sample.num_clips
    turns = ((source, i) for i in range(count) for source in sources if i < len(source))
    return [source[i]["caption"] for source, i in itertools.islice(turns, count)]


def cli(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `command.run`."""
    parser = command.parser("train", DESCRIPTION, EPILOG)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config",
        metavar="FILE[:ARG]",
        help="a file with get_config(arg), or one of the official trainer (.yaml)",
    )
    what.add_argument(
        "--status", metavar="WORKDIR", help="say how far the run there is, from its files alone"
    )
    command.host_flags(parser)

    argv = list(sys.argv[1:] if argv is None else argv)
    if any(word.partition("=")[0] == "--status" for word in argv):
        args = parser.parse_args(argv)
        return command.run("train", lambda: print(status(args.status)))

    def config() -> Config:
        args, rest = parser.parse_known_args(argv)
        return trainer_yaml.load(args.config, config_lib.overrides(rest))

    return command.run(
        "train",
        lambda: command.on_hosts(argv, lambda: main(hosts.agree(config))),
        interrupted="the same command continues",
        stopped=hosts.STOPPED,
    )


if __name__ == "__main__":
    sys.exit(cli())
