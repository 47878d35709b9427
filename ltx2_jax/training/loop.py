"""A training from a config: data, state, steps, checkpoints; resumed where there is one.

Clips are made by whoever calls `train`, through a function: training knows no sampler.
"""

import contextlib
import dataclasses
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
from ltx2_jax.data.mixtures import Dataset, index_of, open_datasets
from ltx2_jax.data.records import INDEX_NAME, open_records
from ltx2_jax.demo import synthetic
from ltx2_jax.errors import UserError
from ltx2_jax.files import in_bucket, local_folder, location, only_run, replacing
from ltx2_jax.hosts import rows_of_host
from ltx2_jax.sharding import abstract_state, make_mesh, sharding_of
from ltx2_jax.stop_signals import StopSignals
from ltx2_jax.training import checks, goodput, initial, trainable, validation
from ltx2_jax.training.batch import batches_of, place
from ltx2_jax.training.boards import Shown, WeightsAndBiases, weights_and_biases
from ltx2_jax.training.cadence import Cadence
from ltx2_jax.training.checkpoint import ASSETS, Checkpoints
from ltx2_jax.training.examples import Examples, batch_size, with_data_here
from ltx2_jax.training.housekeeping import (
    ForSizes,
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
from ltx2_jax.training.reports import describe, log, step_timer, work
from ltx2_jax.training.state import State, finite_program, init_state, state_of
from ltx2_jax.training.step import make_train_step
from ltx2_jax.training.workdir import opened

# Makes clips with weights (a tree as `models.ltx2.init_params` gives it), after so many steps. What
# process 0 gives of them is shown where the metrics are.
MakeClips = Callable[[Any, Dataset, int], Shown | None]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training works with, from when its data and its checkpoints are open."""

    config: Config
    mesh: jax.sharding.Mesh
    records: Dataset
    checkpoints: Checkpoints
    make_clips: MakeClips
    frozen: Any = None  # weights that are not trained
    board: WeightsAndBiases | None = None

    def weights(self, state: State) -> Any:
        """What clips are made with: all weights, averaged if the run averages."""
        trained = validation.sampled_weights(self.config, state)
        return trainable.as_sampled(trained, self.frozen, self.config)

    def clips(self, state: State, step: int) -> Shown | None:
        """Clips on the way."""
        weights = self.weights(state)
        with goodput.part("sampling"):
            return self.make_clips(weights, self.records, step)

    def logger(self, step: int, *, bar: bool = True) -> MetricsLogger:
        """Where metrics go from a step on, on process 0."""
        return MetricsLogger(
            self.config.workdir,
            total_steps=self.config.num_steps,
            start_step=step,
            process_index=hosts.index(),
            wandb=self.board,
            bar=bar,
        )


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
    config, workdir, mesh = _checked(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hosts.watched())
        stack.enter_context(programs_kept(config))
        check = hosts.agree(lambda: stack.enter_context(only_run(workdir, hosts.index())))
        board = hosts.agree(lambda: stack.enter_context(weights_and_biases(config)))
        spent = stack.enter_context(goodput.Goodput(workdir, config.num_steps, began=began))
        checkpoints = stack.enter_context(_checkpoints(config, workdir, check))
        stack.enter_context(hosts.together())
        start = checkpoints.latest_step or 0
        records = _data(config, workdir, start)
        stack.enter_context(jax.set_mesh(mesh))
        hosts.agree(lambda: check_clips(records))
        state, frozen = _begun(config, records, checkpoints, start, mesh)
        start = checkpoints.latest_step or 0  # an earlier one if the newest was damaged
        run = Run(config, mesh, records, checkpoints, make_clips, frozen, board)
        stop = stack.enter_context(contextlib.closing(StopSignals()))
        state, step = take_steps(run, state, start, stop)
        with goodput.part("checkpoint"):
            checkpoints.wait()
            hosts.barrier("waiting for the last checkpoint", long)
        stop.close()  # from here on a signal ends at once: all is saved
        if step < config.num_steps or stop.number is not None:
            hosts.say(f"stopped and saved at step {step}; {hosts.AGAIN}")
            hosts.say(str(spent))
            return stop_signals.exit_code()
        validation.tell_best(config, checkpoints)
        weights = run.weights(state)
        run = dataclasses.replace(run, frozen=None)
        del state, frozen  # moments, whose memory the sampler can have
        # They may have been made before its checkpoint was saved, to tell whether it is the best.
        if step == start or not validation.clips_due(config, step):
            last_clips(run, weights, step)
        hosts.say(str(spent))
    return 0


def _checked(config: Config) -> tuple[Config, epath.Path, jax.sharding.Mesh]:
    """The config with its data on this host, workdir and mesh; UserError before any work."""
    hosts.progress("checks", seconds=config.watchdog.long_seconds)
    checks.same_run_everywhere(config)
    workdir, sizes = opened(config.workdir), config.mesh
    hosts.keep_log(workdir, hosts.index())
    mesh = hosts.agree(
        lambda: make_mesh(sizes.data, sizes.model, sizes.sequence, slices=sizes.slices)
    )
    hosts.agree(lambda: checks.check_alone(config, mesh))
    config = with_data_here(config)
    checks.before_work(config, mesh)
    validation.check(config, mesh)
    return config, workdir, mesh


def take_steps(run: Run, state: State, start: int, stop: StopSignals) -> tuple[State, int]:
    """Steps from `start` to the last, or to a stop signal: the state and the step reached.

    From the first step on a signal finishes the step; who gives `stop` says until when.
    """
    config, mesh = run.config, run.mesh
    examples = Examples(config, run.records, mesh)
    null_text = on_all_devices(run.records.empty_caption(), mesh)
    taken = run.checkpoints.data_position(start) if start else 0
    reader = Reader(partial(batches, config, run.records, mesh), taken, config)
    timer, pending, step = step_timer(config, run.records), None, start
    health = checks.Health(config, start, run.checkpoints.folder)
    cadence = Cadence(config.checkpoint, start)
    beside = (null_text, run.frozen) if run.frozen else (null_text,)
    with run.logger(start) as logger, Profile(config) as profile:
        tell = partial(log, logger, timer, partial(work, config))
        show = partial(_shown, run, logger, timer)
        goodput.goes_on(start)
        with goodput.waiting_for_data():
            batch = reader.next(step + 1)
        args = state, place(batch, mesh), *beside
        train_step, again, finite, checked = _programs(run, examples, args)
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
                    _save(run, state, step, values | worth, finite, health)
                    timer.restart()
                if last:
                    break
                collect(step)
                if due and not config.validation.best_of_clips:
                    show(state, step)
    return state, step


def _programs(
    run: Run, examples: Examples, args: tuple[Any, ...]
) -> tuple[Steps, Replay, Callable[[State], Any], validation.Validation]:
    """What the steps run, compiled for the arguments of the first one.

    The step, the one that is run twice, whether a state is finite, and the loss on fixed samples.
    """
    config, (state, _, *beside) = run.config, args
    codec = load_codec(run.records.codec_path)
    make_step = partial(make_train_step, config, codec.video.strides, codec.audio.clock)
    with goodput.part("compile"):
        sizes = batches_of(examples.kinds, run.mesh)
        ready = partial(ForSizes, config=config, args=args, batches=sizes)
        return (
            Steps(config, make_step, ready),
            Replay(config, make_step, ready, state),
            compiled("the check of the weights", config, finite_program(), state),
            validation.Validation(config, run.records, codec, run.mesh, state, *beside),
        )


def _save(
    run: Run,
    state: State,
    step: int,
    values: Mapping[str, float],
    finite: Callable[[State], Any],
    health: checks.Health,
) -> None:
    """A checkpoint with what was measured of it; DivergedError if the state is not finite."""
    hosts.progress("save", step, run.config.watchdog.long_seconds)
    with goodput.part("checkpoint"):
        if not finite(state):
            raise checks.diverged("a weight is not finite", step, **health.run)
        run.checkpoints.save(step, state, run.config, validation.scores(values))


def _shown(
    run: Run, logger: MetricsLogger, timer: StepTimer, state: State, step: int
) -> dict[str, float]:
    """Makes the clips of a step and shows them; what they are worth, the same on all hosts."""
    hosts.progress("sample", step, run.config.watchdog.long_seconds)
    shown = run.clips(state, step) or Shown()
    logger.show(step, shown)
    timer.restart()
    return json.loads(hosts.broadcast(json.dumps(dict(shown.metrics))))


def last_clips(run: Run, weights: Any, step: int) -> None:
    """Clips of a finished training, which is finished whether they can be made or not."""
    hosts.progress("sample", step, run.config.watchdog.long_seconds)
    try:
        with goodput.part("sampling"):
            shown = run.make_clips(weights, run.records, step)
        if shown is not None and shown.clips:
            with run.logger(step, bar=False) as logger:
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


def _data(config: Config, workdir: epath.Path, start: int) -> Dataset:
    """The records, the same on all hosts and of the makers of the run; its assets are kept."""
    records = dataset(config, anew=not start)
    checks.same_dataset(records)
    if start:
        hosts.agree(lambda: checks.check_same_makers(records, local_folder(workdir / ASSETS)))
    hosts.agree(lambda: keep_assets(records, workdir / ASSETS))
    return records


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


def _checkpoints(config: Config, workdir: epath.Path, check: Callable[[], None]) -> Checkpoints:
    kept = config.checkpoint
    return Checkpoints(
        workdir,
        keep=kept.keep,
        keep_every=kept.keep_every,
        best=config.validation.best,
        max_failures=kept.max_failures,
        check=check,
    )


def _begun(
    config: Config, records: Dataset, checkpoints: Checkpoints, start: int, mesh: jax.sharding.Mesh
) -> tuple[State, Any]:
    """The state to go on from, and the weights that are not trained; says what is trained."""
    create = partial(init_state, config=config)
    abstract = abstract_state(create, jax.random.key(config.seed), mesh=mesh)
    describe(config, records, abstract, mesh, start)
    long = config.watchdog.long_seconds
    hosts.progress("restore" if start else "begin", start, long)
    with goodput.part("restore" if start else "init"):
        frozen = initial.load_frozen(config, mesh)
        state = first_state(config, checkpoints, start, abstract, mesh)
        return initial.tied(config, state, frozen), frozen


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
