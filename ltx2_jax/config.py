"""The configuration of a run: frozen dataclasses, a file that fills them, flags that change them.

A config file is Python with a function `get_config(arg: str | None) -> Config`. On the command line

    --config=configs/quickstart.py:ARG --config.optim.learning_rate=3e-4 --config.mesh.model=2

calls it with ARG and then replaces fields. A wrong name or type is an error that lists what is
right. One config object goes down through the program, and into every checkpoint.
"""

import ast
import contextlib
import dataclasses
import json
import math
import runpy
import traceback
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltx2_jax.data.synthetic import SyntheticConfig, check_seed
from ltx2_jax.diffusion import schedules
from ltx2_jax.errors import UserError
from ltx2_jax.models.connectors import CONNECTOR_2_0, ConnectorConfig
from ltx2_jax.models.gemma import GEMMA_SMALL
from ltx2_jax.models.gemma_layers import GemmaConfig
from ltx2_jax.models.linear_codec import LinearCodecConfig
from ltx2_jax.models.transformer_config import TransformerConfig


@dataclass(frozen=True)
class RandomEncoderConfig:
    """A text encoder with fixed random weights: a small Gemma and the features of its states."""

    gemma: GemmaConfig = GEMMA_SMALL  # its vocab_size is the most that the tokenizer may have
    video_dim: int = 96  # width of the features for video
    audio_dim: int | None = 64  # and for audio; None: it receives those of video
    last_layer_only: bool = False  # features of the last hidden state alone
    seed: int = 0

    def __post_init__(self):
        check_seed(self)
        for name in self.gemma.layers:
            if name not in ("sliding", "full"):
                raise UserError(f"gemma.layers: {name!r} is not one of sliding, full")
            kv_heads = self.gemma.kind(name).kv_heads
            if self.gemma.num_heads % kv_heads:
                raise UserError(
                    f"gemma.num_heads={self.gemma.num_heads} is not a multiple of "
                    f"gemma.{name}.kv_heads={kv_heads}"
                )


@dataclass(frozen=True)
class TextConfig:
    """Where text features come from, and the connectors that are trained on them."""

    length: int = 1024  # tokens per caption, left padded
    generation: str = "random"  # of the features: of a random encoder, or "2.0", "2.3", "2.5"
    encoder: RandomEncoderConfig = field(default_factory=RandomEncoderConfig)  # of synthetic clips
    video_connector: ConnectorConfig = CONNECTOR_2_0
    audio_connector: ConnectorConfig = CONNECTOR_2_0

    def __post_init__(self):
        _check_least(self, length=1)
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
    batch_size: int = 16  # clips per step over all hosts
    read_threads: int = 2

    def __post_init__(self):
        _check_least(self, batch_size=1, read_threads=0)


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
    accumulate_steps: int = 1  # micro-batches whose gradients are averaged into one step
    ema_decay: float | None = None  # of the averaged weights that sampling uses; None: no average

    def __post_init__(self):
        if self.schedule not in ("constant", "linear", "cosine"):
            raise UserError(f"schedule={self.schedule!r}: use constant, linear or cosine")
        if self.first_moment_dtype not in ("float32", "bfloat16"):
            raise UserError(
                f"first_moment_dtype={self.first_moment_dtype!r}: use float32 or bfloat16"
            )
        _check_least(self, accumulate_steps=1)


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 500
    keep: int = 2  # newest checkpoints that stay on disk

    def __post_init__(self):
        _check_least(self, every_steps=1, keep=1)


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

    def __post_init__(self):
        _check_least(self, num_clips=1, batch_size=1)
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
    sample: SampleConfig = field(default_factory=SampleConfig)
    # Weights to start from: a released file, a name on the Hugging Face Hub, or a folder that
    # convert wrote. None: random ones.
    init_from: str | None = None
    num_steps: int = 1000
    seed: int = 0

    def __post_init__(self):
        _check_least(self, num_steps=1)
        check_seed(self)


def _check_least(config: Any, **least: int) -> None:
    for name, value in least.items():
        if getattr(config, name) < value:
            raise UserError(f"{name}={getattr(config, name)} must be at least {value}")


# ------------------------------------------------------------------------------- files and flags


def load(source: str, overrides: dict[str, str] | None = None) -> Config:
    """`file.py` or `file.py:ARG`, then `{"optim.learning_rate": "3e-4", ...}`.

    Raises:
      UserError: no such file, one that does not run, no `get_config`, an argument it refuses, an
        unknown or mistyped field.
    """
    path, _, arg = source.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config: no file {path}")
    try:
        names = runpy.run_path(path)
        if "get_config" not in names:
            raise UserError("has no function get_config(arg)")
        config = names["get_config"](arg or None)
    except Exception as error:  # whatever it is, it is in the user's file
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        message = kind + " ".join(str(error).split())
        raise UserError(f"--config: {source}{_place(error, path)}: {message}") from error
    if not isinstance(config, Config):
        raise UserError(f"--config: {source}: get_config returned {config!r:.40}, not a Config")
    return _replace(config, overrides or {})


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


def _replace(node: Any, changes: dict[str, str], prefix: str = "--config") -> Any:
    """`node` with all changes made at once: a class may check its fields against one another."""
    hints = typing.get_type_hints(type(node))
    grouped: dict[str, dict[str, str]] = {}
    for path, text in changes.items():
        name, _, rest = path.partition(".")
        if name not in hints:
            raise UserError(f"{prefix}.{path}: no field {name!r}; valid: {', '.join(hints)}")
        grouped.setdefault(name, {})[rest] = text
    new = {}
    for name, inner in grouped.items():
        value, where = getattr(node, name), f"{prefix}.{name}"
        if not dataclasses.is_dataclass(value):
            if list(inner) != [""]:
                raise UserError(f"{where} has no fields")
            new[name] = _parse(inner[""], hints[name], where)
        elif "" in inner:
            raise UserError(f"{where}: set its fields: {', '.join(vars(value))}")
        else:
            new[name] = _replace(value, inner, where)
    try:
        return dataclasses.replace(node, **new)
    except ValueError as error:
        raise UserError(f"{prefix}: {error}") from error


def _parse(text: str, hint: Any, where: str) -> Any:
    readings: list[Any] = [text]  # as it stands last: a folder may be called 2024
    if hint is not str:
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            readings.insert(0, ast.literal_eval(text))
    for reading in readings:
        with contextlib.suppress(TypeError):
            return _coerce(reading, hint)
    raise UserError(f"{where}={text}: expected {_type_name(hint)}")


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as `hint` says (ints pass as floats, lists as tuples); TypeError otherwise."""
    if dataclasses.is_dataclass(hint):
        return _from_dict(hint, value)
    mismatch = TypeError(f"expected {_type_name(hint)}, not {value!r}")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            with contextlib.suppress(TypeError):
                return _coerce(value, option)
        raise mismatch
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise mismatch
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(items) != len(value):
            raise mismatch
        return tuple(_coerce(v, h) for v, h in zip(value, items, strict=True))
    if hint is float and type(value) is int:
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise mismatch
    return value


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


# ------------------------------------------------------------------------------------------- JSON


def to_json(config: Any) -> str:
    """A config dataclass as JSON text, for checkpoints and dataset files."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(kind: type, text: str) -> Any:
    """The inverse of `to_json`.

    Raises:
      UserError: not JSON, or fields or values that `kind` does not have.
    """
    try:
        return _from_dict(kind, json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"not a {kind.__name__} of this version: {error}") from error


def _from_dict(kind: type, values: Any) -> Any:
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} needs fields, got {values!r}")
    hints = typing.get_type_hints(kind)
    fields = {}
    for name, value in values.items():
        if name not in hints:
            raise TypeError(f"{kind.__name__} has no field {name}")
        try:
            fields[name] = _coerce(value, hints[name])
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error
    return kind(**fields)


def difference(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Fields in which two configs differ, as `path: a -> b` lines."""
    lines = []
    for f in dataclasses.fields(a):
        x, y, name = getattr(a, f.name), getattr(b, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(x) and type(x) is type(y):
            lines += difference(x, y, name + ".")
        elif x != y:
            lines.append(f"{name}: {x!r} -> {y!r}")
    return lines
