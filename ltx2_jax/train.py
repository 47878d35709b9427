"""Train from a config file, resume, and end with clips: python -m ltx2_jax.train --help."""

import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ltx2_jax import command, hosts
from ltx2_jax import config as config_lib
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.config import SYNC_LAG, Config
from ltx2_jax.data.records import Records
from ltx2_jax.demo import synthetic
from ltx2_jax.errors import UserError
from ltx2_jax.evaluation.contact_sheet import contact_sheet
from ltx2_jax.evaluation.sync import events, sync_report
from ltx2_jax.files import in_bucket, local_folder, location
from ltx2_jax.media.clip_files import fingerprints
from ltx2_jax.media.media import Clip, read_clip
from ltx2_jax.sampling import wishes
from ltx2_jax.sampling.output import enlarged, write_clips
from ltx2_jax.sampling.pipeline import ClipSize, Pipeline, maker_of_run, references_of
from ltx2_jax.sampling.wishes import Wish, read_wishes
from ltx2_jax.training import trainer_yaml
from ltx2_jax.training.boards import Shown
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
    given = wishes_of(config)

    def make_clips(weights: Any, records: Records, step: int) -> Shown | None:
        workdir, mesh = location(config.workdir), jax.sharding.get_mesh()
        # A released text encoder is loaded for the first clips, and for those after them no more.
        cached = config.text.release != "random" and not in_bucket(workdir)
        text_cache = workdir / "text_cache" if cached else None
        pipeline = Pipeline.from_assets(
            config, weights, local_folder(workdir / ASSETS), mesh, text_cache
        )
        asked = given or [Wish(prompt) for prompt in fresh_prompts(config, records)]
        last = step == config.num_steps
        clips = made(pipeline, asked if last or given else asked[:PREVIEW_CLIPS])
        if hosts.index() != 0:
            return None
        prompts = [wish.prompt for wish in asked[: len(clips)]]
        if last:
            sheet = at_the_end(config, clips, prompts, records)
        else:
            sheet = on_the_way(config, clips, prompts, step)
        return shown(clips, prompts, sheet)

    def check_clips(records: Records) -> None:
        if given and any(wish.given for wish in given):
            codec, schema = load_codec(records.codec_path), records.schema
            size, reads = ClipSize.of(schema), references_of(config, schema)
            mesh = jax.sharding.get_mesh()
            wishes.check(maker_of_run(config, None, None, codec, size, mesh, reads), given)

    code = train(config, make_clips, check_clips)
    hosts.say(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    return code


def made(pipeline: Pipeline, asked: Sequence[Wish]) -> list[Clip]:
    """A clip for each, on the first host."""
    if not any(wish.given for wish in asked):
        return pipeline([wish.prompt for wish in asked])
    found = wishes.make(pipeline.maker, asked)
    return [one.clip(pipeline.codec) for one in found] if hosts.index() == 0 else []


def shown(clips: list[Clip], prompts: list[str], sheet: epath.Path | None) -> Shown:
    """Clips for the boards, large enough to be watched, and what they are worth."""
    metrics = {}
    if (found := events(clips)) is not None:
        metrics = {"seen": found.seen, "heard": found.heard, "matched": found.matched}
        metrics = {f"val_sync_{name}": float(count) for name, count in metrics.items()}
        if found.median_lag is not None:
            metrics[SYNC_LAG] = 1000 * found.median_lag
    larger = [enlarged(clip) if len(clip.video) else clip for clip in clips]
    return Shown(larger, prompts, None if sheet is None else sheet.read_bytes(), metrics)


def on_the_way(
    config: Config, clips: list[Clip], prompts: list[str], step: int
) -> epath.Path | None:
    """Clips while the training goes on: files every so many steps, one contact sheet of a few."""
    workdir, every, sheet = location(config.workdir), config.validation.clips_every, None
    if every and step % every == 0:
        sheet = write_clips(clips, prompts, workdir / "validation" / f"step-{step:06d}")
    if step == config.sample.preview_step and all(len(clip.video) for clip in clips):
        sheet = workdir / "preview.png"
        contact_sheet(sheet, clips, prompts, title=f"generated clips after {step} steps")
        print(f"wrote {sheet}, the first clips, after {step} steps", flush=True)
    return sheet


def at_the_end(
    config: Config, clips: list[Clip], prompts: list[str], records: Records
) -> epath.Path | None:
    """The last clips: files, a contact sheet, and how well sound and picture agree."""
    sheet = write_clips(clips, prompts, location(config.workdir))
    # The measure is made for the synthetic clips.
    if config.data.path is None and config.validation.prompts is None:
        kinds = [synthetic.event_kind(prompt) for prompt in prompts]
        print("generated clips:", sync_report(clips, kinds=kinds))
        seen = [records[i] for i in range(min(len(clips), len(records)))]
        rendered, _ = data_folder(config.workdir)
        real = [read_clip(rendered / "clips" / record["source"]) for record in seen]
        kinds = [synthetic.event_kind(record["caption"]) for record in seen]
        print("real clips:     ", sync_report(real, kinds=kinds))
    return sheet


def wishes_of(config: Config) -> list[Wish] | None:
    """The lines of `validation.prompts`, the same on all hosts; None without such a file.

    Raises:
      UserError: it cannot be read, is empty, has a blank line or one that cannot be.
    """
    path = config.validation.prompts
    if path is None:
        return None

    def read() -> list[Wish]:
        asked = read_wishes(path, "validation.prompts")
        if not asked:
            raise UserError(f"validation.prompts: {path} has no prompts, one a line")
        return asked

    asked = hosts.agree(read)
    files = fingerprints(file for wish in asked for file in wish.files)
    digest = hashlib.sha256(repr((Path(path).read_text("utf-8"), files)).encode()).hexdigest()
    hosts.same_everywhere({"the prompts of the validation": digest[:16]})
    return asked


def fresh_prompts(config: Config, records: Records) -> list[str]:
    """Captions of the synthetic clips' grammar, or the first ones of the dataset."""
    if config.data.path is None:
        clips, seed = config.data.synthetic, config.sample.seed
        return synthetic.captions(clips, config.sample.num_clips, seed)
    return [records[i]["caption"] for i in range(min(config.sample.num_clips, len(records)))]


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
