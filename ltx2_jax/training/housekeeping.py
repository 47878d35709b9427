"""What the loop does beside its steps: reads, compiles ahead, traces, collects garbage, replays."""

import contextlib
import dataclasses
import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.compilation_cache import compilation_cache

from ltx2_jax import hosts
from ltx2_jax.config import Config
from ltx2_jax.errors import UserError
from ltx2_jax.files import location
from ltx2_jax.sharding import sharding_of
from ltx2_jax.training.examples import Share

# Seconds before a read is tried again.
RETRIES = (0.5, 1.0, 2.0, 4.0)
# Steps after which Python looks for garbage.
COLLECT_EVERY = 100


def on_all_devices(values: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, Array]:
    """Arrays that all hosts have, as global ones that every device has a copy of."""
    sharding = sharding_of(mesh)
    return {
        name: jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__)
        for name, x in values.items()
    }


# ------------------------------------------------------------------------------------ data


class Reader:
    """Batches of this host, one by one; what cannot be read is tried again."""

    def __init__(
        self,
        batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
        position: int,
        config: Config,
    ):
        """`batches` gives an iterator from a position in the sequence of batches on."""
        self._batches, self.position = batches, position
        self._iterator, self._seconds = batches(position), config.watchdog.seconds
        self.waited = self._usual = 0.0

    def next(self, step: int) -> dict[str, np.ndarray]:
        """The next batch, for `step`.

        Raises:
          UserError: it cannot be read, nor later.
        """
        hosts.progress("data", step, self._seconds)
        began = time.monotonic()
        for pause in (*RETRIES, None):
            try:
                batch = next(self._iterator)
                break
            except StopIteration:
                raise
            except Exception as error:
                # What names a file was looked at: it is damaged, and seldom mends itself.
                if pause is None or (isinstance(error, UserError) and pause > RETRIES[0]):
                    text = " ".join(str(error).split())[:300]
                    raise UserError(f"the data of step {step} cannot be read: {text}") from error
                hosts.note(f"the data of step {step} is read again: {error!r:.300}")
                time.sleep(pause)
                self._iterator = self._batches(self.position)
        self.position += 1
        self.waited = time.monotonic() - began
        self._usual = 0.9 * self._usual + 0.1 * self.waited
        hosts.progress("data", step, self._seconds, data_wait=self._usual)
        return batch


@dataclasses.dataclass(frozen=True)
class Rows:
    """What this host put into the batch of a step."""

    ids: tuple[int, ...]  # of its examples, in order of their rows in the global batch
    numbers: tuple[int, ...]  # these rows
    position: int  # batches taken so far, with this one
    waited: float  # seconds
    # Of a clip, by field.
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    size: int = 0  # of the global batch
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of its size and dataset

    @classmethod
    def of(cls, batch: dict[str, np.ndarray], share: Share, reader: Reader) -> "Rows":
        """Of what `reader` has just read."""
        ids = tuple(int(i) for i in batch.get("id", ()))
        shapes = {name: np.shape(x)[1:] for name, x in batch.items()}
        place = reader.position, reader.waited
        return cls(ids, share.numbers, *place, shapes, share.size, share.labels)

    def waits(self) -> dict[str, float]:
        """For the log: how long this host waited, and which of all waits longest these days."""
        found = {"data_wait": self.waited}
        if hosts.count() > 1 and (slowest := hosts.slowest("data_wait")):
            found |= {"slowest_host": slowest[0], "slowest_data_wait": slowest[1]}
        return found


# ------------------------------------------------------------------------------------ programs


@contextlib.contextmanager
def programs_kept(config: Config) -> Iterator[None]:
    """While in context, compiled programs are kept in the workdir, or where the user says."""
    if not config.compile_cache or jax.config.jax_compilation_cache_dir:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(location(config.workdir) / "compile_cache"))
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def compiled(what: str, config: Config, program: Any, *args: Any) -> Callable[..., Any]:
    """`program`, jitted, compiled for arguments on every host before any host runs it.

    Hosts that would run other programs are refused: their devices would wait for each other.
    """
    if not hasattr(program, "lower"):
        return program
    hosts.progress("compile", seconds=config.watchdog.long_seconds)
    lowered = program.lower(*args)
    if hosts.count() > 1:
        text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        hosts.same_everywhere({f"the program of {what}": text[:16]})
    ready = lowered.compile()
    hosts.barrier(f"compiling {what}", config.watchdog.long_seconds)
    return ready


class ForSizes:
    """A train step compiled for every size of clips of a dataset, before the first step."""

    def __init__(
        self, what: str, step: Any, config: Config, args: tuple[Any, ...], batches: Sequence[Any]
    ):
        """`args` are those of the first step, `batches` the batch of every size: shapes will do."""
        state, first, *beside = args
        kinds = {_size(batch): batch for batch in (*batches, first)}
        if len(kinds) > 1:
            hosts.say(f"compiling {what} for {len(kinds)} sizes of clips")
        self._programs = {
            size: compiled(what, config, step, state, batch, *beside)
            for size, batch in kinds.items()
        }

    def __call__(self, *args: Any) -> Any:
        """The step for the size of its batch, `args[1]`."""
        return self._programs[_size(args[1])](*args)


def _size(batch: dict[str, Any]) -> tuple[Any, ...]:
    """What tells batches apart that one program cannot take."""
    return tuple(sorted((name, x.shape, str(x.dtype)) for name, x in batch.items()))


class Steps:
    """The compiled train step, and now and then the same with libtpu's checker in it."""

    def __init__(
        self, config: Config, make_step: Callable[..., Any], ready: Callable[..., ForSizes]
    ):
        """`make_step` makes the jitted step, with `checked=True` the one with the checker.

        `ready` compiles it, as `ForSizes` does: (what, step) -> program.
        """
        self._every = config.check.sdc_every
        self._usual = ready("the train step", make_step())
        if self._every:
            self._checked = ready("the checked step", make_step(checked=True))

    def __call__(self, step: int, *args: Any) -> Any:
        """`step`, by the program whose turn it is."""
        turn = self._every and step % self._every == 0
        return (self._checked if turn else self._usual)(*args)


class Replay:
    """Runs a step twice, now and then, and compares the results bit by bit."""

    def __init__(
        self,
        config: Config,
        make_step: Callable[..., Any],
        ready: Callable[..., ForSizes],
        state: Any,
    ):
        """`make_step(donate=False)` makes a step that keeps its state; `ready` as for `Steps`."""
        self._every = config.check.replay_every
        if self._every:
            self._step = ready("the replayed step", make_step(donate=False))
            # A state twice: the shapes of what is compared.
            self._same = compiled("the comparison", config, jax.jit(_same_bits), state, state)

    def before(self, step: int, args: tuple[Any, ...]) -> None:
        """Replays `step` if it is its turn.

        Raises:
          LostError: a device computed something else the second time.
        """
        if not self._every or step % self._every:
            return
        hosts.progress("replay", step)
        (first, _), (second, _) = self._step(*args), self._step(*args)
        if self._same(first, second):
            return
        parts = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        mine = any(_differs(a, b) for a, b in parts)
        found = [p for p, said in enumerate(hosts.gather(str(mine))) if said == "True"]
        names = ", ".join(map(hosts.name, found)) if hosts.count() > 1 else "this machine"
        raise hosts.LostError(
            f"step {step} gave other bits when it was run again, on {names}: a device miscounts; "
            f"{hosts.AGAIN} from the last checkpoint"
        )


def _same_bits(a: Any, b: Any) -> Array:
    """Whether all arrays of two trees hold the same: bool []."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.stack([((x == y) | ((x != x) & (y != y))).all() for x, y in pairs]).all()


def _differs(a: Array, b: Array) -> bool:
    """Whether the parts of two arrays that this host holds are not the same."""
    shards = zip(a.addressable_shards, b.addressable_shards, strict=True)
    return any(np.asarray(x.data).tobytes() != np.asarray(y.data).tobytes() for x, y in shards)


class Profile:
    """An XProf trace of the steps of `profile.steps`, on process 0; use as a context manager."""

    def __init__(self, config: Config):
        self._span, self._folder = config.profile.span, location(config.workdir) / "profile"
        self._on = False

    def before(self, step: int) -> None:
        if self._span and step in self._span and not self._on and hosts.index() == 0:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, metrics: Any) -> None:
        if self._on and step + 1 not in self._span:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._on, self._span = False, None
        hosts.say(f"wrote a trace in {self._folder}")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._on:
            self._stop()


# ------------------------------------------------------------------------------------ memory


@contextlib.contextmanager
def same_collections() -> Iterator[Callable[[int], None]]:
    """While in context, Python looks for garbage only where it is told the number of a step.

    All hosts do so at the same steps: one that stops for a second stops all others too.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield lambda step: step % COLLECT_EVERY == 0 and gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
