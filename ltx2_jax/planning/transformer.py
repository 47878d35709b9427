"""What training and sampling need on a TPU slice."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ltx2_jax.config import Config
from ltx2_jax.models import flops, ltx2
from ltx2_jax.models.quantized import described
from ltx2_jax.planning.changes import mesh_of, sizes_of, what_helps_sampling, what_helps_training
from ltx2_jax.planning.estimate import estimate
from ltx2_jax.planning.programs import (
    check,
    check_passes,
    pixels_of,
    sample_program,
    train_program,
)
from ltx2_jax.planning.reports import compile_facts, counted
from ltx2_jax.planning.topology import (
    A_GPU,
    NO_COMPILER,
    Slice,
    has_compiler,
    slice_of,
    tpu_devices,
)
from ltx2_jax.sampling.programs import Request
from ltx2_jax.sharding import bytes_per_chip, make_mesh, replicated
from ltx2_jax.training import checks, trainable

WHOLE = 2**20  # bytes of an array that every chip holds whole, from which it is worth a line


def plan_train(config: Config, request: Request, topology: str) -> dict[str, Any]:
    """What one step of `train` needs on a slice.

    Raises:
      UserError: no such slice; a mesh that does not divide devices, batch, heads or tokens; text
        features that do not fit the model.
    """
    where = slice_of(topology)
    mesh = mesh_of(config, where)
    checks.check_batch(config, mesh)
    trainable.check(config)
    facts, tokens = _facts(config, request, where, "train", config.data.batch_size)
    if config.tune is not None and config.tune.quantize is not None:
        facts["program"] += f", frozen weights in {config.tune.quantize}"
    guess = estimate(config, request, mesh, where.chip)
    facts |= {
        "model_flops": facts["batch"] * trainable.train_flops(config, *tokens[:2]),
        "estimate": guess.facts(),
    }
    if has_compiler() and where.chip.torus:
        mesh = make_mesh(*sizes_of(config), slices=where.count, devices=tpu_devices(topology))
        lowered, state = train_program(config, request, mesh)
        facts["replicated"] = replicated(state, WHOLE) if mesh.size > 1 else []
        facts |= compile_facts(lowered, mesh, facts["model_flops"])
    else:
        facts |= {"compiled": False, "fits": guess.peak <= where.chip.device_hbm_bytes}
        facts["why"] = NO_COMPILER if where.chip.torus else A_GPU
    return _with_help(facts, what_helps_training, config, request, where)


def plan_sample(
    config: Config,
    request: Request,
    topology: str,
    *,
    batch: int,
    passes: int,
    steps: int,
    quantize: str | None = None,
) -> dict[str, Any]:
    """What sampling a batch of clips needs on a slice: from text features to latents.

    `passes` are 1, 2 or 4, of guidance; `quantize` is a form of `models.quantized`.

    Raises:
      UserError: as `plan_train`.
    """
    where = slice_of(topology)
    check_passes(batch, passes, mesh_of(config, where))
    facts, tokens = _facts(config, request, where, "sample", batch)
    work = batch * passes * steps * sum(flops.forward_flops(config.model, *tokens).values())
    facts["program"] += f", {counted(steps, 'step')} of {counted(passes, 'pass')}"
    facts["program"] += f", {described(quantize, where.chip.name)}" if quantize else ""
    facts |= {"passes": passes, "steps": steps, "model_flops": work}
    if has_compiler():
        mesh = make_mesh(*sizes_of(config), slices=where.count, devices=tpu_devices(topology))
        counts = {"batch": batch, "passes": passes, "steps": steps}
        lowered, _ = sample_program(config, request, mesh, **counts, quantize=quantize)
        facts |= compile_facts(lowered, mesh, work)
    else:
        networks = dataclasses.replace(config.networks, quantized=quantize)
        params = ltx2.abstract_params(networks, mesh_of(config, where), for_sampling=True)
        weights = bytes_per_chip(params)
        fits = weights <= where.chip.device_hbm_bytes
        facts |= {"compiled": False, "weight_bytes_per_device": weights, "fits": fits}
    return _with_help(facts, what_helps_sampling, config, request, where)


def _facts(
    config: Config, request: Request, where: Slice, what: str, batch: int
) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """What is known of a program from its sizes, and a clip's tokens of video, audio and text."""
    mesh = mesh_of(config, where)
    check(config, request, mesh)
    frames, height, width = pixels_of(request)
    tokens = math.prod(request.video_shape), request.audio_length, config.text.length
    return {
        "what": what,
        "program": f"{what} {counted(batch, 'clip')} of {frames} frames of {width}x{height}",
        "topology": where.name,
        "devices": where.devices,
        "slices": where.count,
        "device_kind": where.chip.name,
        "mesh": dict(mesh.shape),
        "split": {name: size for name, size in mesh.shape.items() if size > 1},
        "remat": config.model.remat,
        "batch": batch,
        "frames": frames,
        "height": height,
        "width": width,
        **dict(zip(("video_tokens", "audio_tokens", "text_tokens"), tokens, strict=True)),
        "layers": config.model.num_layers,
        "hbm_bytes_per_device": where.chip.device_hbm_bytes,
        "parameters": flops.total_parameters(config.model),
    }, tokens


def _with_help(facts: dict[str, Any], search: Callable[..., Any], *where: Any) -> dict[str, Any]:
    return facts if facts["fits"] else facts | {"helps": search(*where)}
