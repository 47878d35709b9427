"""What a training says of itself: at its beginning, and of every step."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ltx2_jax import chips, hosts
from ltx2_jax.config import Config
from ltx2_jax.data.mixtures import Dataset, sources_of
from ltx2_jax.sharding import bytes_per_chip
from ltx2_jax.training import trainable
from ltx2_jax.training.examples import Examples, clip_tokens
from ltx2_jax.training.housekeeping import Rows
from ltx2_jax.training.metrics import MetricsLogger, StepTimer


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
