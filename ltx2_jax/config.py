"""The configuration of a run: frozen dataclasses, a file that fills them, flags that change them.

A config file is Python with a function `get_config(arg: str | None) -> Config`. On the command line

    --config=configs/quickstart.py:ARG --config.optim.learning_rate=3e-4 --config.mesh.model=2

calls it with ARG and then replaces fields. A wrong name or type is an error that lists what is
right. One config object goes down through the program, and into every checkpoint.
"""

import ast
import dataclasses
import importlib.util
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx2_jax.data.synthetic import SyntheticConfig
from ltx2_jax.errors import UserError
from ltx2_jax.models.caption_embedding import TextConfig
from ltx2_jax.models.linear_codec import LinearCodecConfig
from ltx2_jax.models.transformer import TransformerConfig


@dataclass(frozen=True)
class DataConfig:
    """What is trained on: a dataset folder written by `prepare`, or a synthetic set rendered first."""

    path: str | None = None  # dataset folder; None: rendered and prepared under the workdir
    synthetic: SyntheticConfig = SyntheticConfig()  # what is rendered when path is None
    codec: LinearCodecConfig = LinearCodecConfig()  # fitted to it
    batch_size: int = 16  # clips per step over all hosts
    read_threads: int = 2


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
    accumulate_steps: int = 1  # micro-batches whose gradients are averaged into one step
    ema_decay: float | None = None  # of the averaged weights that sampling uses; None: no average

    def __post_init__(self):
        if self.schedule not in ("constant", "linear", "cosine"):
            raise UserError(f"optim.schedule={self.schedule!r}: use constant, linear or cosine")


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 500
    keep: int = 2  # newest checkpoints that stay on disk


@dataclass(frozen=True)
class SampleConfig:
    """The clips that `train` makes when it ends, and the defaults of `sample`."""

    num_clips: int = 8
    batch_size: int = 16  # clips in one call of the jitted sampler
    schedule: str = "ltx2"  # or "linear_quadratic", "distilled"
    steps: int = 30
    video_guidance: float = 3.0  # classifier-free guidance scales; 1 = off
    audio_guidance: float = 7.0
    seed: int = 10


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    workdir: str
    model: TransformerConfig = TransformerConfig()
    text: TextConfig = TextConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    flow: FlowConfig = FlowConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()
    num_steps: int = 1000
    seed: int = 0


# ------------------------------------------------------------------------------- files and flags


def load(source: str, overrides: dict[str, str] | None = None) -> Config:
    """`file.py` or `file.py:ARG`, then `{"optim.learning_rate": "3e-4", ...}`.

    Raises:
      UserError: no such file, no `get_config`, an argument it refuses, an unknown or mistyped field.
    """
    path, _, arg = source.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config: no file {path}")
    module_spec = importlib.util.spec_from_file_location("ltx2_jax_config_file", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (SyntaxError, ImportError, TypeError, NameError) as error:
        raise UserError(f"--config: {path} does not load: {error}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"--config: {path} has no function get_config(arg)")
    config = module.get_config(arg or None)
    for name, text in (overrides or {}).items():
        config = _replace(config, name.split("."), text, name)
    return config


def overrides(flags: list[str]) -> dict[str, str]:
    """`--config.a.b=value` or `--config.a.b value` flags -> {"a.b": "value"}; UserError for others."""
    found, rest = {}, list(flags)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--config."):
            raise UserError(f"unknown flag {name}; fields of the config are --config.FIELD=VALUE")
        if not equals:
            if not rest:
                raise UserError(f"{name} needs a value")
            value = rest.pop(0)
        found[name.removeprefix("--config.")] = value
    return found


def _replace(node: Any, path: list[str], text: str, whole: str) -> Any:
    hints = typing.get_type_hints(type(node))
    if path[0] not in hints:
        raise UserError(f"--config.{whole}: no field {path[0]!r}; valid: {', '.join(hints)}")
    value = getattr(node, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(value):
            raise UserError(f"--config.{whole}: {path[0]} has no fields")
        new = _replace(value, path[1:], text, whole)
    else:
        new = _parse(text, hints[path[0]], whole)
    try:
        return dataclasses.replace(node, **{path[0]: new})
    except ValueError as error:
        raise UserError(f"--config.{whole}: {error}") from error


def _parse(text: str, hint: Any, whole: str) -> Any:
    if hint is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    try:
        return _coerce(value, hint)
    except TypeError:
        raise UserError(f"--config.{whole}={text}: expected {_type_name(hint)}") from None


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as `hint` says (ints pass as floats, lists as tuples); TypeError otherwise."""
    if dataclasses.is_dataclass(hint):
        return _from_dict(hint, value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _coerce(value, option)
            except TypeError:
                continue
        raise TypeError
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(items) != len(value):
            raise TypeError
        return tuple(_coerce(v, h) for v, h in zip(value, items, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None) and value is None:
        return None
    if not isinstance(hint, type) or not isinstance(value, hint):
        raise TypeError
    if hint is int and isinstance(value, bool):
        raise TypeError
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
      UserError: not JSON, or fields that `kind` does not have.
    """
    try:
        return _from_dict(kind, json.loads(text))
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"not a {kind.__name__} of this version: {error}") from error


def _from_dict(kind: type, values: Any) -> Any:
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} needs fields, got {values!r}")
    hints = typing.get_type_hints(kind)
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise TypeError(f"{kind.__name__} has no field {', '.join(unknown)}")
    return kind(**{name: _coerce(value, hints[name]) for name, value in values.items()})


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
