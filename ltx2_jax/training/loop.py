"""A training from a config: data, state, steps, checkpoints; resumed where there is one.

Clips are made by whoever calls `train`, through a function: training knows no sampler.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from ltx2_jax import chips, hosts
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.config import Config
from ltx2_jax.data.encoding import OtherDataset, PrepareConfig, prepare_dataset
from ltx2_jax.data.loader import make_dataset, seek
from ltx2_jax.data.records import INDEX_NAME, Records, open_records
from ltx2_jax.demo import synthetic
from ltx2_jax.errors import UserError
from ltx2_jax.files import in_bucket, local_folder, location, only_run, replacing
from ltx2_jax.hosts import rows_of_host
from ltx2_jax.models import flops
from ltx2_jax.sharding import abstract_state, bytes_per_chip, make_mesh, sharding_of
from ltx2_jax.stop_signals import StopSignals
from ltx2_jax.training import checks, goodput, initial
from ltx2_jax.training.batch import place
from ltx2_jax.training.cadence import Cadence
from ltx2_jax.training.checkpoint import ASSETS, Checkpoints
from ltx2_jax.training.metrics import MetricsLogger, StepTimer
from ltx2_jax.training.state import State, all_finite, init_state, state_of
from ltx2_jax.training.step import make_train_step
from ltx2_jax.training.workdir import opened

# Makes clips with weights (a tree as `models.ltx2.init_params` gives it), after so many steps.
MakeClips = Callable[[Any, Records, int], None]


def train(config: Config, make_clips: MakeClips) -> None:
    """Trains, resumes, and hands the weights to `make_clips`; see `Config`.

    The weights are the averaged ones if the config averages. SIGTERM and Ctrl-C finish the step,
    save and return, without clips.

    Raises:
      UserError: parts of the config, the data or a checkpoint do not fit each other, the disk is
        full, or a loss is not finite.
    """
    began = time.time()
    workdir = opened(config.workdir)
    mesh = make_mesh(config.mesh.data, config.mesh.model, config.mesh.sequence)
    checks.before_work(config, mesh)
    with (
        only_run(workdir, jax.process_index()) as check,
        goodput.Goodput(workdir, config.num_steps, began=began) as spent,
        Checkpoints(
            workdir,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            max_failures=config.checkpoint.max_failures,
            check=check,
        ) as checkpoints,
        jax.set_mesh(mesh),
    ):
        start = checkpoints.latest_step or 0
        records = dataset(config, anew=not start)
        if start:
            checks.check_same_makers(records, local_folder(workdir / ASSETS))
        keep_assets(records, workdir / ASSETS)
        create = partial(init_state, config=config)
        abstract = abstract_state(create, jax.random.key(config.seed), mesh=mesh)
        describe(config, records, abstract, mesh, start)
        with goodput.part("restore" if start else "init"):
            state = first_state(config, checkpoints, start, abstract, mesh)
        start = checkpoints.latest_step or 0  # an earlier one if the newest was damaged
        clips = partial(_clips, config, make_clips, records)
        state, step = take_steps(config, state, start, records, checkpoints, mesh, clips)
        with goodput.part("checkpoint"):
            checkpoints.wait()
        if step < config.num_steps:
            hosts.say(f"stopped and saved at step {step}; the same command resumes")
        else:
            clips(state, step)
        hosts.say(str(spent))


def take_steps(
    config: Config,
    state: State,
    start: int,
    records: Records,
    checkpoints: Checkpoints,
    mesh: jax.sharding.Mesh,
    clips: Callable[[State, int], None],
) -> tuple[State, int]:
    """Steps from `start` to the last, or to a stop signal: the state and the step reached."""
    codec = load_codec(records.codec_path)
    train_step = make_train_step(config, codec.video.strides, codec.audio.clock)
    null_text = jax.device_put(records.empty_caption(), sharding_of(mesh))
    taken = checkpoints.data_position(start) if start else 0
    examples = batches(config, records, mesh, taken)
    timer, pending, step = step_timer(config, records), None, start
    lost = {"start": start, "checkpoints": checkpoints.folder}
    cadence = Cadence(config.checkpoint, start)
    with (
        MetricsLogger(
            config.workdir,
            total_steps=config.num_steps,
            start_step=start,
            process_index=jax.process_index(),
        ) as logger,
        StopSignals() as stop,
    ):
        goodput.goes_on(start)
        with goodput.waiting_for_data():
            batch = place(next(examples), mesh)
        while step < config.num_steps:
            with goodput.part("compile" if step == start else "step"):
                state, metrics = train_step(state, batch, null_text)
            step += 1
            # While the devices work: the next batch, then the log of the step before.
            with goodput.waiting_for_data(metrics):
                batch = place(next(examples), mesh)
            if pending is not None:
                checks.check_finite(log(logger, timer, *pending), pending[0], **lost)
            pending = (step, metrics)
            goodput.reached(step)
            last = step == config.num_steps or stop.requested
            if cadence.due(step) or last:
                # Looked at first: a state that is not finite is not worth keeping.
                checks.check_finite(log(logger, timer, *pending), step, **lost)
                pending = None
                with goodput.part("checkpoint"):
                    if not all_finite(state):
                        raise checks.diverged("a weight is not finite", step, **lost)
                    checkpoints.save(step, state, config)
                timer.restart()
            if last:
                break
            if step == config.sample.preview_step:
                clips(state, step)
                timer.restart()
    return state, step


def _clips(
    config: Config, make_clips: MakeClips, records: Records, state: State, step: int
) -> None:
    weights = state["params"] if config.optim.ema_decay is None else state["ema"]
    with goodput.part("sampling"):
        make_clips(weights, records, step)


# ------------------------------------------------------------------------------------ data, state


def dataset(config: Config, anew: bool = False) -> Records:
    """The records to train on; the synthetic set is rendered and prepared on the first run.

    `anew` allows to replace it where other settings than those of this config made it.
    """
    if config.data.path is not None:
        return open_records(config.data.path)
    folder, shared = data_folder(config.workdir)
    clips = config.data.synthetic
    table = folder / "clips" / "captions.csv"
    if jax.process_index() == 0 or not shared:
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


def data_folder(workdir: str) -> tuple[Path, bool]:
    """Where synthetic clips are rendered and prepared, and whether all hosts see it.

    In the workdir; if that is in a bucket, where no dataset can be made, on a disk of every host.
    """
    place = location(workdir)
    if not in_bucket(place):
        return Path(place) / "data", True
    name = "-".join(part for part in str(place).split("/")[2:] if part)
    return Path(tempfile.gettempdir()) / f"ltx2-jax-{name}-{hosts.index()}" / "data", False


def keep_assets(records: Records, assets: epath.Path) -> None:
    """Copies what sampling needs of the dataset into the workdir."""
    if jax.process_index() == 0:
        sources = records.codec_path, records.text_encoder_path, records.folder / INDEX_NAME
        for source in sources:
            with replacing(assets / source.name) as temporary:
                shutil.copyfile(source, temporary)


def batches(
    config: Config, records: Records, mesh: jax.sharding.Mesh, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """The rows of every global batch from step `start` on that the devices of this host hold."""
    examples = iter(
        make_dataset(
            records,
            batch_size=config.data.batch_size,
            seed=config.seed,
            rows=rows_of_host(sharding_of(mesh, "batch"), config.data.batch_size),
            threads=config.data.read_threads,
        )
    )
    seek(examples, start)
    return examples


def first_state(
    config: Config, checkpoints: Checkpoints, start: int, abstract: Any, mesh: jax.sharding.Mesh
) -> State:
    """In this order: the newest checkpoint of the workdir; given weights; fresh ones.

    Weights that are given to a run that began without them take the place of its own; moments and
    average begin anew, the step and the position in the data stay.
    """
    given = config.init_from is not None
    if start and given and checkpoints.config(start).init_from is None:
        print(f"weights  from {config.init_from} at step {start}, in place of the run's own")
    elif start:
        return checkpoints.restore(start, abstract)
    once = partial(jax.jit, compiler_options=chips.one_run_options())
    if not given:
        return once(partial(init_state, config=config))(jax.random.key(config.seed))
    params = initial.load(config, mesh)
    return once(partial(state_of, config=config, step=start), donate_argnums=0)(params)


# ------------------------------------------------------------------------------------------ reports


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
