"""What a training shows of itself while it goes on: the loss on fixed samples, and clips.

Samples, noise, noise levels and conditions are the same at every step and in every run with the
same `config.validation`, whatever its batch size and mesh, so that losses can be compared.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from ltx2_jax import hosts
from ltx2_jax.chips import compiler_options
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.config import SYNC_LAG, Config
from ltx2_jax.data.records import Records, open_records
from ltx2_jax.diffusion.geometry import AUDIO_CLOCK, AudioClock
from ltx2_jax.errors import UserError
from ltx2_jax.hosts import rows_of_host
from ltx2_jax.models import ltx2
from ltx2_jax.sharding import axis_size, batch_shards, sharding_of
from ltx2_jax.training import checks, goodput, trainable
from ltx2_jax.training.batch import Batch, place
from ltx2_jax.training.checkpoint import Checkpoints
from ltx2_jax.training.housekeeping import compiled
from ltx2_jax.training.objective import averages, draw, flow_of, loss
from ltx2_jax.training.state import State
from ltx2_jax.training.step import summed

PREFIX = "val_"  # of the names of its metrics


class Validation:
    """The loss of a run on fixed samples; without `validation.every` it does nothing.

    All hosts make it and call `after`, in the same order.
    """

    def __init__(
        self,
        config: Config,
        records: Records,
        codec: Codec,
        mesh: jax.sharding.Mesh,
        state: State,
        *beside: Any,
    ):
        """Reads the samples and compiles.

        Args:
          config: of the run.
          records: those that are trained on.
          codec: that of the records.
          mesh: of the run.
          state: the train state, for its shapes.
          *beside: text fields of the empty caption, and the frozen weights if there are any.

        Raises:
          UserError: the samples do not fit the run, or there are too few.
        """
        self._config, self._mesh, self._beside = config, mesh, beside
        run = config.validation
        if not run.every:
            return
        held_out = hosts.agree(lambda: samples_of(config, records))
        checks.same_dataset(held_out)
        self._samples = hosts.agree(lambda: first_samples(config, held_out, mesh))
        program = make_validation(config, mesh, codec.video.strides, codec.audio.clock)
        self._program = compiled("the validation", config, program, *self._args(state))
        whose = f"{run.samples} clips of {held_out.folder}"
        if run.path is None:
            whose += ", which are trained on: it shows no overfitting; validation.path names others"
        hosts.say(f"checked  every {run.every} steps on the first {whose}")

    def after(self, step: int, state: State, saved: bool) -> dict[str, np.ndarray]:
        """Metrics of the weights after `step`, [] or by quarter of sigma [4]; {} if none are due.

        `saved` says whether a checkpoint is made of them, and there is time: with `validation.best`
        it has metrics then.
        """
        run = self._config.validation
        scored = run.best is not None and not run.best_of_clips
        if not run.every or (step % run.every and not (saved and scored)):
            return {}
        hosts.progress("validate", step, self._config.watchdog.long_seconds)
        with goodput.part("sampling"):
            return jax.device_get(self._program(*self._args(state)))

    def _args(self, state: State) -> tuple[Any, ...]:
        weights = sampled_weights(self._config, state)
        return weights, place(self._samples, self._mesh), *self._beside


def sampled_weights(config: Config, state: State) -> Any:
    """The trained weights that sampling uses: averaged if the run averages."""
    return state["params"] if config.optim.ema_decay is None else state["ema"]


def make_validation(
    config: Config,
    mesh: jax.sharding.Mesh,
    strides: tuple[int, int, int],
    clock: AudioClock = AUDIO_CLOCK,
) -> Callable[..., dict[str, Array]]:
    """The jitted loss of all samples: (weights, batch, null_text, frozen) -> metrics.

    As a train step has it, without gradients and without the dropout of adapters. Its micro-batches
    are no larger than those of a step.
    """
    chunks = micro_batches(config, mesh)
    whole = trainable.without_dropout(config)
    graphdef = ltx2.graph(whole.networks) if whole.tune is None else trainable.graph(whole)

    def validate(
        weights: Any, batch: Batch, null_text: Batch, frozen: Any = None
    ) -> dict[str, Array]:
        config = replace(whole, flow=flow_of(whole.flow, batch))

        def loss_of(
            weights: Any, batch: Batch, drawn: Any, null_text: Batch, frozen: Any
        ) -> tuple[Array, dict[str, Array]]:
            params = trainable.join(weights, frozen, trainable.constants(config))
            return loss(nnx.merge(graphdef, params), batch, drawn, null_text, config)

        drawn = draw(fixed_key(config), batch, config, strides, clock)
        total, sums = summed(loss_of, weights, batch, drawn, chunks, null_text, frozen)
        means = {"loss": total / (chunks * axis_size("slices"))}
        means |= averages(sums, config.validation.samples)
        return {PREFIX + name: value for name, value in means.items()}

    return jax.jit(validate, compiler_options=compiler_options(training=True))


def fixed_key(config: Config) -> Array:
    """Of all that is drawn: no step's, nor that of adapters, even if the run has the same seed."""
    return jax.random.fold_in(jax.random.key(config.validation.seed), 2**32 - 2)


def micro_batches(config: Config, mesh: jax.sharding.Mesh) -> int:
    """Into how many equal parts the samples are cut, as few as memory that trains can take."""
    count, shards = config.validation.samples, batch_shards(mesh)
    largest = config.data.batch_size // config.optim.accumulate_steps
    parts = (n for n in range(1, count + 1) if count % (n * shards) == 0)
    return next(n for n in parts if count // n <= largest)


# ------------------------------------------------------------------------------- what it is made on


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses, before any work, what `config.validation` asks for and cannot be.

    Raises:
      UserError: an unknown metric, a dataset that does not fit, samples that the mesh cannot share,
        checkpoints without the clips that would tell the best.
    """
    run = config.validation

    def fits() -> None:
        if run.best_of_clips and config.checkpoint.every_steps % run.clips_every:
            raise UserError(
                f"validation.best={run.best}: is measured of clips, which checkpoints after every "
                f"{config.checkpoint.every_steps} steps lack: make checkpoint.every_steps a "
                f"multiple of validation.clips_every={run.clips_every}"
            )
        if not run.every:
            return
        known = metric_names(config)
        if run.best not in (None, SYNC_LAG, *known):
            close = ", ".join(difflib.get_close_matches(run.best, [*known, SYNC_LAG], n=2))
            close = f"did you mean {close}?" if close else f"use {', '.join(known)} or {SYNC_LAG}"
            raise UserError(f"validation.best={run.best!r}: no metric of this run; {close}")
        if run.samples % batch_shards(mesh):
            raise UserError(
                f"validation.samples={run.samples} is not a multiple of the {batch_shards(mesh)} "
                "shards of a batch"
            )
        if run.path is not None:
            if "://" in run.path:
                raise UserError(
                    f"validation.path={run.path}: a dataset is read from a folder alone"
                )
            checks.check_records(config, open_records(run.path), mesh)
        if config.data.path is not None:
            held_out = samples_of(config, open_records(config.data.path))
            first_samples(config, held_out, mesh)

    if run.every or run.best_of_clips:
        hosts.agree(fits)


def metric_names(config: Config) -> list[str]:
    """Names of all metrics, as the log has them."""
    names = [f"{PREFIX}loss"]
    for stream in config.flow.generated:
        names.append(f"{PREFIX}{stream}_loss")
        names += [f"{PREFIX}{stream}_loss_quarters_{i}" for i in (1, 2, 3, 4)]
    return names


def scores(values: dict[str, float]) -> dict[str, float]:
    """What a checkpoint keeps of the metrics of its step: those of the validation, if finite."""
    return {k: v for k, v in values.items() if k.startswith(PREFIX) and np.isfinite(v)}


def tell_best(config: Config, checkpoints: Checkpoints) -> None:
    """Says which checkpoint a finished run kept as the best."""
    if config.validation.best is not None and (best := checkpoints.best) is not None:
        step, score = best
        hosts.say(
            f"best     {config.validation.best} {score:.4g}, in checkpoint {step}; sample takes it "
            f"with --checkpoint-step={step}"
        )


def samples_of(config: Config, records: Records) -> Records:
    """The records to validate on, made by what made `records`, which are trained on.

    Raises:
      UserError: another codec or text encoder made them.
    """
    if config.validation.path is None:
        return records
    held_out, made = open_records(config.validation.path), {}
    # Of released ones the files may lie elsewhere; which release it is has been checked.
    if records.schema.release == "linear":
        made["codec_hash"] = records.schema.codec_hash
    if records.schema.text_release == "random":
        made["text_encoder_hash"] = records.schema.text_encoder_hash
    held_out.require(**made)
    return held_out


def first_samples(
    config: Config, records: Records, mesh: jax.sharding.Mesh
) -> dict[str, np.ndarray]:
    """The rows of this host of the first records of one size, in one batch.

    Raises:
      UserError: there are too few.
    """
    count, buckets = config.validation.samples, np.asarray(records.buckets)
    numbers = np.flatnonzero(buckets == buckets[:1])
    if len(numbers) < count:
        size = " of one size" if len(numbers) < len(records) else ""
        raise UserError(
            f"{records.folder}: validation.samples={count}, but it has {len(numbers)} clips{size}"
        )
    rows = [records[int(numbers[row])] for row in rows_of_host(sharding_of(mesh, "batch"), count)]
    names = [name for name, value in rows[0].items() if not isinstance(value, str)]
    return {name: np.stack([row[name] for row in rows]) for name in names}


# -------------------------------------------------------------------------------------------- clips


def clips_due(config: Config, step: int) -> bool:
    """Whether clips are made after a step, while the training goes on.

    After the last one only if they tell whether its checkpoint is the best: others come then.
    """
    run = config.validation
    every = run.clips_every > 0 and step % run.clips_every == 0
    if step == config.num_steps:
        return every and run.best_of_clips
    return step == config.sample.preview_step or every
