"""A training from a config: data, state, steps, checkpoints; resumed where there is one.

Clips are made by whoever calls `train`, through a function: training knows no sampler.
"""

import contextlib
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from ltx2_jax import chips, hosts, stop_signals
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.config import Config
from ltx2_jax.data.encoding import OtherDataset, PrepareConfig, prepare_dataset
from ltx2_jax.data.loader import make_dataset, seek
from ltx2_jax.data.mixtures import Dataset, index_of, open_datasets, sources_of
from ltx2_jax.data.records import INDEX_NAME, open_records
from ltx2_jax.demo import synthetic
from ltx2_jax.errors import UserError
from ltx2_jax.files import in_bucket, local_folder, location, only_run, replacing
from ltx2_jax.hosts import rows_of_host
from ltx2_jax.sharding import abstract_state, bytes_per_chip, make_mesh, sharding_of
from ltx2_jax.stop_signals import StopSignals
from ltx2_jax.training import checks, goodput, initial, trainable, validation
from ltx2_jax.training.batch import batches_of, place
from ltx2_jax.training.boards import Shown, WeightsAndBiases, weights_and_biases
from ltx2_jax.training.cadence import Cadence
from ltx2_jax.training.checkpoint import ASSETS, Checkpoints
from ltx2_jax.training.examples import Examples, batch_size, clip_tokens, with_data_here
from ltx2_jax.training.housekeeping import (
    Profile,
    Reader,
    Replay,
    Rows,
    Steps,
    compiled,
    on_all_devices,
    programs_kept,
    same_collections,
)
from ltx2_jax.training.metrics import MetricsLogger, StepTimer
from ltx2_jax.training.state import State, finite_program, init_state, state_of
from ltx2_jax.training.step import make_train_step
from ltx2_jax.training.workdir import opened

# Makes clips with weights (a tree as `models.ltx2.init_params` gives it), after so many steps. What
# process 0 gives of them is shown where the metrics are.
MakeClips = Callable[[Any, Dataset, int], Shown | None]


def train(
    config: Config,
    make_clips: MakeClips,
    check_clips: Callable[[Dataset], None] = lambda records: None,
) -> int:
    """Trains, resumes, and hands the weights to `make_clips`; see `Config`. Returns an exit code.

    `check_clips` raises UserError, before the first step, for clips that cannot be made.

    The weights are the averaged ones if the config averages. SIGTERM and Ctrl-C finish the step,
    save and return, without clips. What fails while clips are made after the last step is told, and
    no failure of the training.

    Raises:
      UserError: parts of the config, the data or a checkpoint do not fit each other, or the disk is
        full; DivergedError if the gradients of too many steps in a row are not finite.
    """
    began, long = time.time(), config.watchdog.long_seconds
    hosts.progress("checks", seconds=long)
    checks.same_run_everywhere(config)
    workdir, sizes = opened(config.workdir), config.mesh
    hosts.keep_log(workdir, hosts.index())
    mesh = hosts.agree(
        lambda: make_mesh(sizes.data, sizes.model, sizes.sequence, slices=sizes.slices)
    )
    config = with_data_here(config)
    checks.before_work(config, mesh)
    validation.check(config, mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hosts.watched())
        stack.enter_context(programs_kept(config))
        check = hosts.agree(lambda: stack.enter_context(only_run(workdir, hosts.index())))
        board = hosts.agree(lambda: stack.enter_context(weights_and_biases(config)))
        spent = stack.enter_context(goodput.Goodput(workdir, config.num_steps, began=began))
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir,
                keep=config.checkpoint.keep,
                keep_every=config.checkpoint.keep_every,
                best=config.validation.best,
                max_failures=config.checkpoint.max_failures,
                check=check,
            )
        )
        stack.enter_context(hosts.together())
        start = checkpoints.latest_step or 0
        records = dataset(config, anew=not start)
        checks.same_dataset(records)
        if start:
            hosts.agree(lambda: checks.check_same_makers(records, local_folder(workdir / ASSETS)))
        hosts.agree(lambda: keep_assets(records, workdir / ASSETS))
        stack.enter_context(jax.set_mesh(mesh))
        hosts.agree(lambda: check_clips(records))
        create = partial(init_state, config=config)
        abstract = abstract_state(create, jax.random.key(config.seed), mesh=mesh)
        describe(config, records, abstract, mesh, start)
        hosts.progress("restore" if start else "begin", start, long)
        with goodput.part("restore" if start else "init"):
            frozen = initial.load_frozen(config, mesh)
            state = first_state(config, checkpoints, start, abstract, mesh)
            state = initial.tied(config, state, frozen)
        start = checkpoints.latest_step or 0  # an earlier one if the newest was damaged
        clips = partial(_clips, config, make_clips, records, frozen)
        stop = stack.enter_context(contextlib.closing(StopSignals()))
        state, step = take_steps(
            config,
            state,
            start,
            records,
            checkpoints,
            mesh,
            clips,
            stop=stop,
            frozen=frozen,
            board=board,
        )
        with goodput.part("checkpoint"):
            checkpoints.wait()
            hosts.barrier("waiting for the last checkpoint", long)
        stop.close()  # from here on a signal ends at once: all is saved
        if step < config.num_steps or stop.number is not None:
            hosts.say(f"stopped and saved at step {step}; {hosts.AGAIN}")
            hosts.say(str(spent))
            return stop_signals.exit_code()
        validation.tell_best(config, checkpoints)
        weights = _weights(config, state, frozen)
        del state, clips, frozen  # moments, whose memory the sampler can have
        # They may have been made before its checkpoint was saved, to tell whether it is the best.
        if step == start or not validation.clips_due(config, step):
            last_clips(config, make_clips, weights, records, step, board)
        hosts.say(str(spent))
    return 0


def take_steps(
    config: Config,
    state: State,
    start: int,
    records: Dataset,
    checkpoints: Checkpoints,
    mesh: jax.sharding.Mesh,
    clips: Callable[[State, int], Shown | None],
    stop: StopSignals,
    frozen: Any = None,
    board: WeightsAndBiases | None = None,
) -> tuple[State, int]:
    """Steps from `start` to the last, or to a stop signal: the state and the step reached.

    From the first step on a signal finishes the step; who gives `stop` says until when.
    """
    codec = load_codec(records.codec_path)
    make_step = partial(make_train_step, config, codec.video.strides, codec.audio.clock)
    examples = Examples(config, records, mesh)
    null_text = on_all_devices(records.empty_caption(), mesh)
    taken = checkpoints.data_position(start) if start else 0
    reader = Reader(partial(batches, config, records, mesh), taken, config)
    timer, pending, step = step_timer(config, records), None, start
    health = checks.Health(config, start, checkpoints.folder)
    cadence = Cadence(config.checkpoint, start)
    beside = (null_text, frozen) if frozen else (null_text,)
    with (
        MetricsLogger(
            config.workdir,
            total_steps=config.num_steps,
            start_step=start,
            process_index=hosts.index(),
            wandb=board,
        ) as logger,
        Profile(config) as profile,
    ):
        tell = partial(log, logger, timer, partial(work, config))
        show = partial(_shown, config, clips, logger, timer)
        goodput.goes_on(start)
        with goodput.waiting_for_data():
            batch = reader.next(step + 1)
        args = state, place(batch, mesh), *beside
        with goodput.part("compile"):
            sizes = batches_of(examples.kinds, mesh)
            train_step = Steps(config, make_step, args, sizes)
            again = Replay(config, make_step, args, sizes)
            finite = compiled("the check of the weights", config, finite_program(), state)
            checked = validation.Validation(config, records, codec, mesh, state, *beside)
        stop.begin()
        with same_collections() as collect:
            while step < config.num_steps:
                profile.before(step + 1)
                again.before(step + 1, args)
                state, metrics = train_step(step + 1, *args)
                step += 1
                rows = Rows.of(batch, examples.share(reader.position - 1), reader)
                # While the devices work: the next batch, then the log of the step before.
                with goodput.waiting_for_data(metrics):
                    batch = reader.next(step + 1)
                args = state, place(batch, mesh), *beside
                hosts.progress("step", step, config.watchdog.seconds)
                if pending is not None:
                    health.note(tell(*pending), *pending)
                goodput.reached(step)
                stops = stop.asked()
                last = stops or step == config.num_steps
                profile.after(step, metrics)
                saves = cadence.due(step) or last
                if found := checked.after(step, state, saves and not stops):
                    timer.restart()
                pending = (step, metrics | found, rows)
                due = not stops and validation.clips_due(config, step)
                # They are part of a checkpoint's scores only if that is what it is kept for: a
                # checkpoint is worth more than its clips, which may take too much memory.
                worth = show(state, step) if due and config.validation.best_of_clips else {}
                if saves:
                    # Looked at first: a state that is not finite is not worth keeping.
                    values = tell(*pending)
                    health.note(values, *pending)
                    pending = None
                    hosts.progress("save", step, config.watchdog.long_seconds)
                    with goodput.part("checkpoint"):
                        if not finite(state):
                            raise checks.diverged("a weight is not finite", step, **health.run)
                        scores = validation.scores(values | worth)
                        checkpoints.save(step, state, config, scores)
                    timer.restart()
                if last:
                    break
                collect(step)
                if due and not config.validation.best_of_clips:
                    show(state, step)
    return state, step


def _shown(
    config: Config,
    clips: Callable[[State, int], Shown | None],
    logger: MetricsLogger,
    timer: StepTimer,
    state: State,
    step: int,
) -> dict[str, float]:
    """Makes the clips of a step and shows them; what they are worth, the same on all hosts."""
    hosts.progress("sample", step, config.watchdog.long_seconds)
    shown = clips(state, step) or Shown()
    logger.show(step, shown)
    timer.restart()
    return json.loads(hosts.broadcast(json.dumps(dict(shown.metrics))))


def _clips(
    config: Config, make_clips: MakeClips, records: Dataset, frozen: Any, state: State, step: int
) -> Shown | None:
    weights = _weights(config, state, frozen)
    with goodput.part("sampling"):
        return make_clips(weights, records, step)


def _weights(config: Config, state: State, frozen: Any) -> Any:
    """What clips are made with: all weights, averaged if the run averages."""
    return trainable.as_sampled(validation.sampled_weights(config, state), frozen, config)


def last_clips(
    config: Config,
    make_clips: MakeClips,
    weights: Any,
    records: Dataset,
    step: int,
    board: WeightsAndBiases | None = None,
) -> None:
    """Clips of a finished training, which is finished whether they can be made or not."""
    hosts.progress("sample", step, config.watchdog.long_seconds)
    try:
        with goodput.part("sampling"):
            shown = make_clips(weights, records, step)
        if shown is not None and shown.clips:
            with MetricsLogger(
                config.workdir, total_steps=step, start_step=step, wandb=board, bar=False
            ) as logger:
                logger.show(step, shown)
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exception(error)
        text = " ".join(str(error).split())[:400]
        line = f"warning: the training is done and saved, but its clips failed: {text}"
        if hosts.count() > 1:
            hosts.fail(0, line)
        print(line, file=sys.stderr)


# ------------------------------------------------------------------------------------ data, state


def dataset(config: Config, anew: bool = False) -> Dataset:
    """The records to train on; the synthetic set is rendered and prepared on the first run.

    `anew` allows to replace it where other settings than those of this config made it.
    """
    if config.data.folders:
        return hosts.agree(lambda: open_datasets(config.data.folders))
    folder, shared = data_folder(config.workdir)

    def make() -> None:
        clips = config.data.synthetic
        table = folder / "clips" / "captions.csv"
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
            hosts.say(f"skipped {clip['source']}: {clip['reason']}")

    hosts.progress("prepare", seconds=config.watchdog.long_seconds)
    prepare = hosts.agree_on_first if shared else hosts.agree
    prepare(make, config.watchdog.long_seconds, "clips are rendered and prepared")
    return hosts.agree(lambda: open_records(folder / "records"))


def data_folder(workdir: str) -> tuple[Path, bool]:
    """Where synthetic clips are rendered and prepared, and whether all hosts see it.

    In the workdir; if that is in a bucket, where no dataset can be made, on a disk of every host.
    """
    place = location(workdir)
    if not in_bucket(place):
        return Path(place) / "data", True
    name = "-".join(part for part in str(place).split("/")[2:] if part)
    return Path(tempfile.gettempdir()) / f"ltx2-jax-{name}-{hosts.index()}" / "data", False


def keep_assets(records: Dataset, assets: epath.Path) -> None:
    """Copies what sampling needs of the dataset into the workdir."""
    if hosts.index() == 0:
        for source in (records.codec_path, records.text_encoder_path):
            with replacing(assets / source.name) as temporary:
                shutil.copyfile(source, temporary)
        with replacing(assets / INDEX_NAME) as temporary:
            temporary.write_bytes(index_of(records))


def batches(
    config: Config, records: Dataset, mesh: jax.sharding.Mesh, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """The rows of every global batch from step `start` on that the devices of this host hold."""
    examples = iter(
        make_dataset(
            records,
            batch_size=batch_size(config),
            seed=config.seed,
            rows=partial(rows_of_host, sharding_of(mesh, "batch")),
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
        hosts.say(f"weights  from {config.init_from} at step {start}, in place of the run's own")
    elif start:
        return checkpoints.restore(start, abstract)
    once = partial(jax.jit, compiler_options=chips.one_run_options())
    if not given:
        key = jax.random.key(config.seed)
        return compiled("fresh weights", config, once(partial(init_state, config=config)), key)(key)
    params = initial.load(config, mesh)
    begin = once(partial(state_of, config=config, step=start), donate_argnums=0)
    return compiled("the state around them", config, begin, params)(params)


# ------------------------------------------------------------------------------------------ reports


def step_timer(config: Config, records: Dataset) -> StepTimer:
    """Tokens and FLOPs of a global batch, for throughput and MFU; of the largest clips at first."""
    shapes = {name: field.shape for name, field in records.schema.fields.items()}
    peak = chips.peak_flops(jax.devices()[0].device_kind)
    return StepTimer(
        **work(config, shapes, config.data.batch_size),
        peak_flops=None if peak is None else peak * jax.device_count(),
    )


def work(config: Config, shapes: Mapping[str, tuple[int, ...]], rows: int) -> dict[str, float]:
    """Tokens and FLOPs of a step on so many clips with fields of these shapes."""
    count = clip_tokens(config, shapes)
    return {
        "tokens_per_step": rows * sum(count.values()),
        "flops_per_step": rows * trainable.train_flops(config, *count.values()),
    }


def log(
    logger: MetricsLogger,
    timer: StepTimer,
    work: Callable[[Mapping[str, tuple[int, ...]], int], dict[str, float]],
    step: int,
    metrics: dict[str, Any],
    rows: Rows,
) -> dict[str, float]:
    """Waits for a step's metrics, writes them and returns them."""
    values: dict[str, float] = {}
    for name, value in jax.device_get(metrics).items():
        if np.ndim(value):
            values |= {f"{name}_{i + 1}": float(v) for i, v in enumerate(value)}
        else:
            values[name] = float(value)
    timer.of(**work(rows.shapes, rows.size))
    logger.log(step, rows.labels | values | timer.tick() | rows.waits())
    return values


def describe(
    config: Config, records: Dataset, abstract: Any, mesh: jax.sharding.Mesh, start: int
) -> None:
    """What is about to run, in four lines and more of a mixture, while the first step compiles."""
    schema = records.schema
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract["params"]))
    trained = "" if config.tune is None else " trained"
    if config.tune is not None and config.tune.quantize is not None:
        trained += f" beside {config.tune.quantize} ones"
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    held = [name for name in config.flow.streams if name in schema.fields]
    more = len(schema.buckets) - 1
    hosts.say(
        f"data     {len(records)} clips of {schema.num_frames} frames, "
        f"{schema.height}x{schema.width} at {schema.fps:g} fps; latents "
        f"{' and '.join(str(list(schema.fields[name].shape)) for name in held)}"
        f"{f'; and of {more} more sizes' if more else ''}\n"
        f"{''.join(_parts(config, records, mesh))}"
        f"model    {parameters / 1e6:,.2f} M parameters{trained}, "
        f"{config.model.num_layers} blocks, "
        f"video {config.model.width} and audio {config.model.audio_width} wide\n"
        f"devices  {jax.device_count()} {jax.devices()[0].device_kind}: {sizes}; "
        f"{bytes_per_chip(abstract) / 1e6:,.0f} MB of train state each\n"
        f"run      steps {start} to {config.num_steps} in {config.workdir}; compiling"
    )


def _parts(config: Config, records: Dataset, mesh: jax.sharding.Mesh) -> Iterator[str]:
    """A line for every dataset of a mixture, and one for batches of several sizes."""
    for (folder, share), source in zip(config.data.mixture, sources_of(records), strict=False):
        yield f"         {share:.1%} of them from {folder}, which has {len(source)}\n"
    if config.data.batch_tokens is not None:
        sizes = [kind.batch_size for kind in Examples(config, records, mesh).kinds]
        yield f"         in batches of {min(sizes)} to {max(sizes)}\n"
