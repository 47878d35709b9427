"""The configuration of a run: frozen dataclasses, a file that fills them, flags that change them.

A config file is Python with a function `get_config(arg: str | None) -> Config`. On the command line

    --config=configs/quickstart.py:ARG --config.optim.learning_rate=3e-4 --config.mesh.model=2

calls it with ARG and then replaces fields. A wrong name or type is an error that lists what is
right. One config object goes down through the program, and into every checkpoint.
"""

import math
import runpy
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from ltx2_jax.demo.config import LinearCodecConfig, RandomEncoderConfig, SyntheticConfig
from ltx2_jax.diffusion import schedules
from ltx2_jax.errors import UserError
from ltx2_jax.fields import check_least, check_seed, replaced
from ltx2_jax.models.ltx2 import LTX2Config
from ltx2_jax.models.text.connectors import CONNECTOR_2_0, ConnectorConfig
from ltx2_jax.models.transformer.config import TransformerConfig


@dataclass(frozen=True)
class TextConfig:
    """Where text features come from, and the connectors that are trained on them."""

    length: int = 1024  # tokens per caption, left padded
    release: str = "random"  # of the features: of a random encoder, or "2.0", "2.3", "2.5"
    encoder: RandomEncoderConfig = field(default_factory=RandomEncoderConfig)  # of synthetic clips
    video_connector: ConnectorConfig = CONNECTOR_2_0
    audio_connector: ConnectorConfig = CONNECTOR_2_0

    def __post_init__(self):
        check_least(self, length=1)
        for name in ("video_connector", "audio_connector"):
            registers = getattr(self, name).registers
            if registers and self.length % registers:
                raise UserError(
                    f"length={self.length} is not a multiple of {name}.registers={registers}"
                )
        if bool(self.video_connector.registers) != bool(self.audio_connector.registers):
            raise UserError("video_connector and audio_connector: registers in both or in none")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on: a folder written by `prepare`, or a synthetic set rendered first."""

    path: str | None = None  # dataset folder; None: rendered and prepared under the workdir
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)  # if path is None
    codec: LinearCodecConfig = field(default_factory=LinearCodecConfig)  # fitted to it
    release: str = "linear"  # whose latents: of a linear codec, or of "2.0", "2.3", "2.5"
    batch_size: int = 16  # clips per step over all hosts
    read_threads: int = 2

    def __post_init__(self):
        check_least(self, batch_size=1, read_threads=0)


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh; data = -1 takes the devices that the others leave."""

    data: int = -1
    model: int = 1
    sequence: int = 1


@dataclass(frozen=True)
class FlowConfig:
    """The training distribution: noise levels and conditions."""

    shared_sigma_prob: float = 0.0  # both streams take one sigma; released training draws two
    sigma_std: float = 1.0
    sigma_uniform_prob: float = 0.1
    first_frame_prob: float = 0.0  # the first latent frame is given, clean (image to video)
    caption_dropout: float = 0.0  # the caption is emptied, for classifier-free guidance
    video_weight: float = 1.0  # of the video loss in the sum of both
    audio_weight: float = 1.0


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with clipping by global norm, a warm-up and a decay."""

    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: str = "constant"  # or "linear", "cosine": decay to final_fraction at the last step
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01  # on matrices only: not on biases, norms, tables, embeddings
    clip_norm: float = 1.0
    # Of the average of gradients, "float32" or "bfloat16", 2 bytes a parameter less. That of their
    # squares stays float32: with b2 = 0.999 it moves by less than bfloat16 resolves.
    first_moment_dtype: str = "float32"
    # What gradients of matrices are summed in over the shards of a batch, "float32" or "bfloat16".
    reduce_dtype: str = "float32"
    accumulate_steps: int = 1  # micro-batches whose gradients are averaged into one step
    ema_decay: float | None = None  # of the averaged weights that sampling uses; None: no average
    # Steps in a row whose gradient is not finite, after which the run ends. They change no weight.
    max_bad_steps: int = 10

    def __post_init__(self):
        if self.schedule not in ("constant", "linear", "cosine"):
            raise UserError(f"schedule={self.schedule!r}: use constant, linear or cosine")
        for name in ("first_moment_dtype", "reduce_dtype"):
            if (value := getattr(self, name)) not in ("float32", "bfloat16"):
                raise UserError(f"{name}={value!r}: use float32 or bfloat16")
        check_least(self, accumulate_steps=1, max_bad_steps=1)


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 500
    every_minutes: float | None = None  # saves after so many minutes too, by the clock of process 0
    keep: int = 2  # newest checkpoints that stay
    keep_every: int | None = None  # checkpoints of multiples of so many steps are never deleted
    max_failures: int = 3  # saves in a row that may fail (a full disk) before the run ends

    def __post_init__(self):
        check_least(self, every_steps=1, keep=1, max_failures=0)
        for name in ("every_minutes", "keep_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name}={value} must be above 0")


@dataclass(frozen=True)
class CheckConfig:
    """What is looked for while a run goes on: hosts that drifted apart, computers that miscount."""

    compare_every: int = 100  # steps after which hosts compare what they have done; 0: never
    replay_every: int = 0  # steps after which one is run twice and compared; 0: never

    def __post_init__(self):
        check_least(self, compare_every=0, replay_every=0)


@dataclass(frozen=True)
class WatchdogConfig:
    """Seconds after which a phase is stuck, and the run ends to be started again."""

    seconds: float = 900.0  # a step, or its data
    long_seconds: float = 7200.0  # preparing data, restoring, compiling, saving, sampling

    def __post_init__(self):
        check_least(self, seconds=1, long_seconds=1)


@dataclass(frozen=True)
class ProfileConfig:
    """An XProf trace of some steps, in `profile/` of the workdir."""

    steps: str | None = None  # such as "10:13", from the first step on and before the second

    def __post_init__(self):
        if self.steps is not None and self.span is None:
            raise UserError(f"profile.steps={self.steps!r}: expected FIRST:END, such as 10:13")

    @property
    def span(self) -> range | None:
        first, colon, end = (self.steps or "").partition(":")
        if not (colon and first.isdecimal() and end.isdecimal() and 0 < int(first) < int(end)):
            return None
        return range(int(first), int(end))


@dataclass(frozen=True)
class SampleConfig:
    """The clips that `train` makes when it ends, and the defaults of `sample`."""

    num_clips: int = 8
    batch_size: int = 16  # clips in one call of the jitted sampler
    schedule: str = "ltx2"  # or another of `schedules.SCHEDULES`
    steps: int = 30
    video_guidance: float = 3.0  # classifier-free guidance scales; 1 = off
    audio_guidance: float = 7.0
    seed: int = 10
    preview_step: int | None = None  # a few clips after so many steps, to see how it goes

    def __post_init__(self):
        check_least(self, num_clips=1, batch_size=1)
        check_seed(self)
        for name in ("video_guidance", "audio_guidance"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)} is not a number")
        schedules.make_sigmas(self.schedule, self.steps)  # refused now, not after the training


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    workdir: str
    model: TransformerConfig = field(default_factory=TransformerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    # Compiled programs are kept in the workdir, so that the next start needs no compiler.
    compile_cache: bool = True
    # Weights to start from: a released file, one that convert wrote, or a name on the Hugging Face
    # Hub. None: random ones.
    init_from: str | None = None
    num_steps: int = 1000
    seed: int = 0

    def __post_init__(self):
        check_least(self, num_steps=1)
        check_seed(self)

    @property
    def networks(self) -> LTX2Config:
        """Of what is trained: the transformer, and the connectors before it."""
        return LTX2Config(self.model, self.text.video_connector, self.text.audio_connector)


# ------------------------------------------------------------------------------- files and flags


def load(source: str, overrides: dict[str, str] | None = None) -> Config:
    """`file.py` or `file.py:ARG`, then `{"optim.learning_rate": "3e-4", ...}`.

    Raises:
      UserError: no such file, one that does not run, no `get_config`, an argument it refuses, an
        unknown or mistyped field.
    """
    # A name may hold colons too: what stands after the last one is ARG where the rest is a file.
    path, _, arg = source.rpartition(":")
    if Path(source).is_file() or not path:
        path, arg = source, ""
    if not Path(path).is_file():
        raise UserError(f"--config: no file {path}")
    try:
        names = runpy.run_path(path)
        if "get_config" not in names:
            raise UserError("has no function get_config(arg)")
        config = names["get_config"](arg or None)
    except Exception as error:  # whatever it is, it is in the user's file
        first = error  # of a config that this one is made from
        while isinstance(first, UserError) and first.__cause__ is not None:
            first = first.__cause__
        kind = "" if isinstance(first, UserError) else f"{type(first).__name__}: "
        message = kind + " ".join(str(first).split())
        raise UserError(f"--config: {source}{_place(error, path)}: {message}") from error
    if not isinstance(config, Config):
        raise UserError(f"--config: {source}: get_config returned {config!r:.40}, not a Config")
    config = replaced(config, overrides or {})
    _check_used(config, overrides or {})
    return config


def _check_used(config: Config, overrides: dict[str, str]) -> None:
    """UserError for a flag that this config would accept and never read."""
    idle = {}
    if config.data.path is not None:
        made = ("data.synthetic.", "data.codec.", "text.encoder.")
        idle = dict.fromkeys(made, f"the dataset is given (data.path={config.data.path})")
    if config.optim.schedule == "constant":
        idle["optim.final_fraction"] = "optim.schedule is constant"
    for flag in overrides:
        for name, why in idle.items():
            if flag.startswith(name):
                raise UserError(f"--config.{flag} is not used: {why}")


def _place(error: Exception, path: str) -> str:
    """Where in the file at `path` the error came from, as a suffix of its name."""
    trace = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in trace if frame.filename == path]
    return f", line {lines[-1]}" if lines else ""


def overrides(flags: list[str]) -> dict[str, str]:
    """`--config.a.b=value` or `--config.a.b value` -> {"a.b": "value"}; UserError for others."""
    found, rest = {}, list(flags)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--config."):
            raise UserError(f"unknown flag {name}; fields of the config are --config.FIELD=VALUE")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{name} needs a value")
            value = rest.pop(0)
        found[name.removeprefix("--config.")] = value
    return found
