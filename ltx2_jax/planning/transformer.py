"""What training and sampling need on a TPU slice; `plan --what=train`, `--what=sample` print it."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from ltx2_jax import flops, units
from ltx2_jax.accounting.compiled import describe as describe_program
from ltx2_jax.accounting.compiled import program_facts
from ltx2_jax.accounting.memory import (
    compile_or_overflow,
    describe_memory,
    describe_overflow,
    memory_facts,
)
from ltx2_jax.config import Config
from ltx2_jax.models import ltx2
from ltx2_jax.pipeline import Request
from ltx2_jax.planning.changes import (
    mesh_of,
    sizes_of,
    what_helps_sampling,
    what_helps_training,
)
from ltx2_jax.planning.estimate import estimate
from ltx2_jax.planning.programs import (
    check,
    check_passes,
    pixels_of,
    sample_program,
    train_program,
)
from ltx2_jax.sharding import bytes_per_chip, make_mesh, replicated
from ltx2_jax.topology import (
    NO_COMPILER,
    Slice,
    describe_counts,
    has_compiler,
    slice_of,
    tpu_devices,
)
from ltx2_jax.training import checks

WHOLE = 2**20  # bytes of an array that every chip holds whole, from which it is worth a line
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What --what=sample compiles."""

    batch: int = 1  # clips
    passes: int = 1  # of guidance: 1, 2 or 4
    steps: int = 30


def plan_train(config: Config, request: Request, topology: str) -> dict[str, Any]:
    """What one step of `train` needs on a slice.

    Raises:
      UserError: no such slice; a mesh that does not divide devices, batch, heads or tokens; text
        features that do not fit the model.
    """
    where = slice_of(topology)
    checks.check_batch(config, mesh_of(config, where))
    facts = _facts(config, request, where, "train", config.data.batch_size)
    facts["model_flops"] = config.data.batch_size * flops.train_flops(
        config.model, facts["video_tokens"], facts["audio_tokens"], facts["text_tokens"]
    )
    guess = estimate(config, request, mesh_of(config, where), where.chip)
    facts["estimate"] = guess.facts()
    if not has_compiler():
        facts |= {"compiled": False, "fits": guess.peak <= where.chip.device_hbm_bytes}
        return facts | _what_helps(facts, what_helps_training, config, request, where)
    mesh = make_mesh(*sizes_of(config), devices=tpu_devices(topology))
    lowered, state = train_program(config, request, mesh)
    facts["replicated"] = replicated(state, WHOLE) if mesh.size > 1 else []
    facts = _compile(facts, lowered, mesh)
    return facts | _what_helps(facts, what_helps_training, config, request, where)


def plan_sample(
    config: Config, request: Request, topology: str, sampling: Sampling
) -> dict[str, Any]:
    """What sampling a batch of clips needs on a slice: from text features to latents.

    Raises:
      UserError: as `plan_train`.
    """
    where = slice_of(topology)
    check_passes(sampling.batch, sampling.passes, mesh_of(config, where))
    facts = _facts(config, request, where, "sample", sampling.batch)
    terms = flops.forward_flops(
        config.model, facts["video_tokens"], facts["audio_tokens"], facts["text_tokens"]
    )
    runs = sampling.passes * sampling.steps
    facts |= {
        "program": f"{facts['program']}, {_steps(sampling.steps)} of "
        f"{sampling.passes} pass{'es'[: 2 * (sampling.passes > 1)]}",
        "passes": sampling.passes,
        "steps": sampling.steps,
        "model_flops": sampling.batch * runs * sum(terms.values()),
    }
    if not has_compiler():
        params = ltx2.abstract_params(config.networks, mesh_of(config, where), for_sampling=True)
        weights = bytes_per_chip(params)
        fits = weights <= where.chip.device_hbm_bytes
        facts |= {"compiled": False, "weight_bytes_per_device": weights, "fits": fits}
        return facts | _what_helps(facts, what_helps_sampling, config, request, where)
    mesh = make_mesh(*sizes_of(config), devices=tpu_devices(topology))
    lowered, _ = sample_program(
        config, request, mesh,
        batch=sampling.batch, passes=sampling.passes, steps=sampling.steps,
    )  # fmt: skip
    facts = _compile(facts, lowered, mesh)
    return facts | _what_helps(facts, what_helps_sampling, config, request, where)


def describe(facts: dict[str, Any]) -> str:
    """The facts as lines for a person."""
    if "message" in facts:
        return describe_overflow(facts) + _helps(facts)
    train = facts["what"] == "train"
    remat = f", remat {facts['remat']}" if train else ""
    lines = [
        f"{facts['program']} on {facts['topology']} ({facts['devices']} x {facts['device_kind']})",
        f"  split          {describe_counts(facts['split'])}{remat}",
        f"  tokens         {facts['video_tokens']:,} video and {facts['audio_tokens']:,} audio a "
        f"clip, {facts['text_tokens']:,} of text",
        f"  parameters     {units.parameters(facts['parameters'])}, the transformer's",
        f"  model FLOPs    {units.flops(facts['model_flops'])}, "
        f"{units.flops(facts['model_flops'] / facts['devices'])} a device; nothing recomputed",
    ]
    if train and facts["compiled"]:
        whole = ", ".join(facts["replicated"]) or "none"
        lines.append(f"  whole on every chip, of the train state above 1 MiB: {whole}")
    if not facts["compiled"]:
        return "\n".join([*lines, *_uncompiled(facts)])
    memory = describe_memory(
        facts, *(("state and batch", "new state") if train else ("weights", "latents"))
    )
    program = describe_program(facts, "a step" if train else f"for {_steps(facts['steps'])}")
    return "\n".join(lines) + (
        f"\n{memory}{program}\n  compiled in    {facts['compile_seconds']:.0f} s{_helps(facts)}"
    )


# --------------------------------------------------------------------------------------- internals


def _facts(config: Config, request: Request, where: Slice, what: str, batch: int) -> dict[str, Any]:
    mesh = mesh_of(config, where)
    check(config, request, mesh)
    frames, height, width = pixels_of(request)
    video, audio, text = (
        math.prod(request.video_shape), request.audio_length, config.text.length
    )  # fmt: skip
    clips = f"{batch} clip{'s'[: batch > 1]} of {frames} frames of {width}x{height}"
    return {
        "what": what,
        "program": f"{what} {clips}",
        "topology": where.name,
        "devices": where.devices,
        "device_kind": where.chip.name,
        "mesh": dict(mesh.shape),
        "split": {name: size for name, size in mesh.shape.items() if size > 1},
        "remat": config.model.remat,
        "batch": batch,
        "frames": frames,
        "height": height,
        "width": width,
        "video_tokens": video,
        "audio_tokens": audio,
        "text_tokens": text,
        "layers": config.model.num_layers,
        "hbm_bytes_per_device": where.chip.device_hbm_bytes,
        "parameters": flops.total_parameters(config.model),
    }


def _compile(
    facts: dict[str, Any], lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    started = time.perf_counter()
    compiled = compile_or_overflow(lowered)
    seconds = time.perf_counter() - started
    kind = mesh.devices.flat[0].device_kind
    facts = {**facts, "compiled": True, "device_kind": kind, "compile_seconds": round(seconds, 1)}
    if isinstance(compiled, dict):
        return facts | compiled
    return {
        **facts,
        **memory_facts(compiled, kind),
        **program_facts(compiled, mesh, model_flops=facts["model_flops"]),
    }


def _uncompiled(facts: dict[str, Any]) -> list[str]:
    """Lines of what is known without the compiler."""
    hbm = facts["hbm_bytes_per_device"]
    if "estimate" not in facts:
        weights = facts["weight_bytes_per_device"]
        excess = "" if facts["fits"] else f": {(weights - hbm) / GIB:.2f} GiB too much"
        return [
            f"  per device     weights {weights / GIB:.2f} of {hbm / GIB:.2f} GiB{excess}",
            f"  not compiled   {NO_COMPILER}{_helps(facts)}",
        ]
    guess = facts["estimate"]
    parts = ", ".join(
        f"{name} {guess[name] / GIB:.1f}"
        for name in ("state", "gradients", "saved", "working", "weights")
    )
    excess = f"should not fit: {(guess['peak'] - hbm) / GIB:.1f} GiB too much"
    verdict = "should fit" if facts["fits"] else excess
    return [
        f"  estimate       peak {guess['peak'] / GIB:.1f} of {hbm / GIB:.1f} GiB per device "
        f"({parts}): {verdict}",
        f"  estimate       {guess['step']:.3g} s a step, {guess['mfu']:.1%} MFU at practical rates "
        f"(compute {guess['compute']:.3g} s, HBM {guess['hbm']:.3g}, links {guess['links']:.3g})",
        f"  not compiled   {NO_COMPILER}; these are estimates{_helps(facts)}",
    ]


def _what_helps(facts: dict[str, Any], search: Callable[..., Any], *where: Any) -> dict[str, Any]:
    return {} if facts["fits"] else {"helps": search(*where)}


def _helps(facts: dict[str, Any]) -> str:
    """What to change if a program does not fit."""
    if facts["fits"]:
        return ""
    lines = [
        f"  by estimate    {change['change']} saves {change['saves'] / GIB:.1f} GiB"
        for change in facts["helps"][:4]
    ] or ["  by estimate    no single change helps on this slice: take a larger one"]
    return "".join(f"\n{line}" for line in lines)


def _steps(count: int) -> str:
    return f"{count} step{'s'[: count > 1]}"
