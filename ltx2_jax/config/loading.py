"""Configs from files and flags."""

import runpy
import traceback
from pathlib import Path

from ltx2_jax.config.run import Config
from ltx2_jax.errors import UserError
from ltx2_jax.fields import replaced


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
    return changed(config, overrides or {})


def changed(config: Config, overrides: dict[str, str]) -> Config:
    """`config` with the fields that flags name; UserError for one that would not be read."""
    config = replaced(config, overrides)
    _check_used(config, overrides)
    return config


def _check_used(config: Config, overrides: dict[str, str]) -> None:
    """UserError for a flag that this config would accept and never read."""
    idle = {}
    if config.data.folders:
        made = ("data.synthetic.", "data.codec.", "text.encoder.")
        given = ", ".join(folder for folder, _ in config.data.folders)
        name = "path" if config.data.path is not None else "mixture"
        idle = dict.fromkeys(made, f"the dataset is given (data.{name}={given})")
    for name, readers in {
        "start_fraction": ("linear",),
        "final_fraction": ("linear", "cosine", "cosine_with_restarts"),
        "restart_after": ("cosine_with_restarts",),
        "restart_growth": ("cosine_with_restarts",),
        "power": ("polynomial",),
        "step_every": ("step",),
        "step_fraction": ("step",),
    }.items():
        if config.optim.schedule not in readers:
            idle[f"optim.{name}"] = f"optim.schedule is {config.optim.schedule}"
    for sampler, names in {
        "shifted_logit_normal": ("sigma_std", "sigma_tokens", "sigma_uniform_prob", "sigma_eps"),
        "uniform": ("sigma_min", "sigma_max"),
    }.items():
        if config.flow.sigma != sampler:
            idle |= {f"flow.{name}": f"flow.sigma is {config.flow.sigma}" for name in names}
    for stream, names in {
        "video": ("video_weight", "first_frame_prob", "shared_sigma_prob"),
        "audio": ("audio_weight", "shared_sigma_prob"),
    }.items():
        if stream not in config.flow.generated:
            why = f"flow.{stream}.role is {getattr(config.flow, stream).role}"
            idle |= {f"flow.{name}": why for name in names}
    if not config.validation.every:
        idle |= dict.fromkeys(
            ("validation.samples", "validation.seed"), "validation.every is 0: no loss is taken"
        )
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
