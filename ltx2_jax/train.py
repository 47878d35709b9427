"""Train from a config file, resume, and end with clips: python -m ltx2_jax.train --help."""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ltx2_jax import checks, chips, flops, initial, training
from ltx2_jax import config as config_lib
from ltx2_jax.checkpoint import Checkpoints
from ltx2_jax.codec import load_codec
from ltx2_jax.config import Config
from ltx2_jax.data import synthetic
from ltx2_jax.data.encode import OtherDataset, PrepareConfig, prepare_dataset
from ltx2_jax.data.media import read_clip
from ltx2_jax.data.pipeline import make_dataset, seek
from ltx2_jax.data.records import INDEX_NAME, Records, open_records
from ltx2_jax.errors import UserError
from ltx2_jax.files import only_run, replacing
from ltx2_jax.metrics import MetricsLogger, StepTimer
from ltx2_jax.pipeline import ASSETS, Pipeline, write_clips
from ltx2_jax.sharding import abstract_state, bytes_per_chip, make_mesh, sharding_of
from ltx2_jax.stop_signals import StopSignals, termination_interrupts
from ltx2_jax.sync import sync_report

EPILOG = """\
example:
  python -m ltx2_jax.train --config=configs/quickstart.py
  python -m ltx2_jax.train --config=configs/quickstart.py --config.num_steps=100 \\
      --config.workdir=/tmp/short

Every field of the config can be changed with --config.FIELD=VALUE. Running the same command again
resumes from the newest checkpoint of the workdir.
"""


def main(config: Config) -> None:
    """Data, state, loop, clips; from the newest checkpoint of the workdir if there is one."""
    workdir = Path(config.workdir)

    # ------------------------------------------------------------------------------- mesh and data
    mesh = make_mesh(config.mesh.data, config.mesh.model, config.mesh.sequence)
    checks.check_batch(config, mesh)
    part, parts = checks.part_of_batch(sharding_of(mesh, "batch"), config.data.batch_size)
    checks.check_text(config)
    initial.check(config)
    if config.data.path is None:
        checks.check_synthetic(config, mesh)
    else:
        checks.check_records(config, open_records(config.data.path), mesh)
    with (
        only_run(workdir, jax.process_index()),
        Checkpoints(workdir, keep=config.checkpoint.keep) as checkpoints,
        jax.set_mesh(mesh),
    ):
        start = checkpoints.latest_step or 0
        if start:
            checks.check_same_run(config, checkpoints.config(start), workdir)
        records = dataset(config, anew=not start)
        checks.check_records(config, records, mesh)
        if start:
            checks.check_same_makers(records, workdir / ASSETS)
        assets = keep_assets(records, workdir / ASSETS)
        codec = load_codec(records.codec_path)
        null_text = jax.device_put(records.empty_caption(), sharding_of(mesh))
        examples = iter(
            make_dataset(
                records,
                batch_size=config.data.batch_size,
                seed=config.seed,
                process_index=part,
                process_count=parts,
                threads=config.data.read_threads,
            )
        )

        # -------------------------------------------------------------------------- state and step
        create = partial(training.init_state, config=config)
        key = jax.random.key(config.seed)
        abstract = abstract_state(create, key, mesh=mesh)
        describe(config, records, abstract, mesh, start)
        # Resume order: 1. the newest checkpoint of this workdir; 2. given weights; 3. fresh ones.
        if start:
            state = checkpoints.restore(start, abstract)
            seek(examples, checkpoints.data_position(start))
        elif config.init_from is not None:
            params = initial.load(config, mesh)
            around = partial(training.state_of, config=config)
            state = jax.jit(around, donate_argnums=0)(params)
        else:
            state = jax.jit(create)(key)
        train_step = training.make_train_step(config, codec.video.strides)

        # ------------------------------------------------------------------------------------ loop
        timer, pending, step = step_timer(config, records), None, start
        lost = {"start": start, "checkpoints": checkpoints.folder}
        with (
            MetricsLogger(
                workdir,
                total_steps=config.num_steps,
                start_step=start,
                process_index=jax.process_index(),
            ) as logger,
            StopSignals() as stop,
        ):
            batch = training.place(next(examples), mesh)
            while step < config.num_steps:
                state, metrics = train_step(state, batch, null_text)
                step += 1
                # While the devices work: the next batch, then the log of the step before.
                batch = training.place(next(examples), mesh)
                if pending is not None:
                    checks.check_finite(log(logger, timer, *pending), pending[0], **lost)
                pending = (step, metrics)
                last = step == config.num_steps or stop.requested
                if last or step % config.checkpoint.every_steps == 0:
                    # Looked at first: a state that is not finite is not worth keeping.
                    checks.check_finite(log(logger, timer, *pending), step, **lost)
                    pending = None
                    if not training.all_finite(state):
                        raise checks.diverged("a weight is not finite", step, **lost)
                    checkpoints.save(step, state, config)
                    timer.restart()
                if last:
                    break
        checkpoints.wait()
        if step < config.num_steps:
            print(f"stopped and saved at step {step}; the same command resumes", flush=True)
            return

        # ------------------------------------------------------------------------------------ clips
        weights = state["params"] if config.optim.ema_decay is None else state["ema"]
        show(Pipeline.from_assets(config, weights, assets, mesh), records, workdir)


def cli(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after printing what the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m ltx2_jax.train",
        description="Train the joint audio-video model, then sample from it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:ARG]", help="a file with get_config(arg)"
    )
    args, rest = parser.parse_known_args(argv)
    try:
        started = time.perf_counter()
        with termination_interrupts():
            main(config_lib.load(args.config, config_lib.overrides(rest)))
        print(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    except UserError as error:
        print(f"train: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


# -------------------------------------------------------------------------------------------- data


def dataset(config: Config, anew: bool = False) -> Records:
    """The records to train on; the synthetic set is rendered and prepared on the first run.

    `anew` allows to replace it where other settings than those of this config made it.
    """
    if config.data.path is not None:
        return open_records(config.data.path)
    folder = Path(config.workdir) / "data"
    clips = config.data.synthetic
    table = folder / "clips" / "captions.csv"
    if jax.process_index() == 0:
        synthetic.write_dataset(table.parent, clips)
        sizes = PrepareConfig(
            num_frames=clips.num_frames,
            height=clips.height,
            width=clips.width,
            text_length=config.text.length,
        )
        makers = {"codec": config.data.codec, "text_encoder": config.text.encoder}
        try:
            records = prepare_dataset(table, folder / "records", sizes, **makers)
        except OtherDataset:
            if not anew:
                raise UserError(
                    f"{folder / 'records'}: made by another version of this program: remove it, or "
                    "choose another --config.workdir"
                ) from None
            records = prepare_dataset(table, folder / "records", sizes, **makers, overwrite=True)
        for clip in records.skipped:
            print(f"skipped {clip['source']}: {clip['reason']}")
    return open_records(folder / "records")


def keep_assets(records: Records, assets: Path) -> Path:
    """What sampling needs of the dataset, copied into the workdir; returns the folder."""
    if jax.process_index() == 0:
        sources = records.codec_path, records.text_encoder_path, records.folder / INDEX_NAME
        for source in sources:
            with replacing(assets / source.name) as temporary:
                shutil.copyfile(source, temporary)
    return assets


# -------------------------------------------------------------------------------------------- loop


def step_timer(config: Config, records: Records) -> StepTimer:
    """Tokens and FLOPs of one global batch, for throughput and MFU."""
    fields, rows = records.schema.fields, config.data.batch_size
    video, audio = int(np.prod(fields["video"].shape[:3])), fields["audio"].shape[0]
    peak = chips.peak_flops(jax.devices()[0].device_kind)
    return StepTimer(
        tokens_per_step=rows * (video + audio),
        flops_per_step=rows * flops.train_flops(config.model, video, audio, config.text.length),
        peak_flops=None if peak is None else peak * jax.device_count(),
    )


def log(
    logger: MetricsLogger, timer: StepTimer, step: int, metrics: dict[str, Any]
) -> dict[str, float]:
    """Waits for a step's metrics, writes them and returns them."""
    values: dict[str, float] = {}
    for name, value in jax.device_get(metrics).items():
        if np.ndim(value):
            values |= {f"{name}_{i + 1}": float(v) for i, v in enumerate(value)}
        else:
            values[name] = float(value)
    logger.log(step, values | timer.tick())
    return values


# ------------------------------------------------------------------------------------------ reports


def describe(
    config: Config, records: Records, abstract: Any, mesh: jax.sharding.Mesh, start: int
) -> None:
    """What is about to run, in four lines, while the first step compiles."""
    schema = records.schema
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract["params"]))
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    print(
        f"data     {len(records)} clips of {schema.num_frames} frames, "
        f"{schema.height}x{schema.width} at {schema.fps:g} fps; latents "
        f"{list(schema.fields['video'].shape)} and {list(schema.fields['audio'].shape)}\n"
        f"model    {parameters / 1e6:,.2f} M parameters, {config.model.num_layers} blocks, "
        f"video {config.model.width} and audio {config.model.audio_width} wide\n"
        f"devices  {jax.device_count()} {jax.devices()[0].device_kind}: {sizes}; "
        f"{bytes_per_chip(abstract) / 1e6:,.0f} MB of train state each\n"
        f"run      steps {start} to {config.num_steps} in {config.workdir}; compiling",
        flush=True,
    )


def show(pipeline: Pipeline, records: Records, workdir: Path) -> None:
    """Clips from fresh prompts: files, a contact sheet, and how well sound and picture agree."""
    config = pipeline.config
    if config.data.path is None:
        prompts = synthetic.captions(
            config.data.synthetic, config.sample.num_clips, config.sample.seed
        )
    else:
        count = min(config.sample.num_clips, len(records))
        prompts = [records[i]["caption"] for i in range(count)]
    clips = pipeline(prompts)
    write_clips(clips, prompts, workdir)
    kinds = [synthetic.event_kind(prompt) for prompt in prompts]
    print("generated clips:", sync_report(clips, kinds=kinds))
    if config.data.path is None:
        shown = [records[i] for i in range(min(len(clips), len(records)))]
        real = [read_clip(workdir / "data" / "clips" / record["source"]) for record in shown]
        kinds = [synthetic.event_kind(record["caption"]) for record in shown]
        print("real clips:     ", sync_report(real, kinds=kinds))


if __name__ == "__main__":
    sys.exit(cli())
